"""Does similarity beat chance in hard negative mining? Weak, random, L2 and cosine arms on real patches: the runs behind RESULTS.md.

    python -m experiments.mining_study --patches=<PatchCamelyon folder> --kind=pcam --weights=efficientnet-lite1.pth --workdir=runs/mining

Part of the negative patches becomes mosaic slides known negative, which are searched; of the others, and of the positive ones, each
seed draws its own training, validation and test patches, with no patch in two of them. The controls add as many tiles at random
as the search found that they stand beside, and all fits have equally many steps, so that arms differ in which tiles they add.
All seeds of an arm are done before the next, so that a study that was cut off compares what it has; the same command
goes on with it.
"""

from __future__ import annotations

import csv
import dataclasses
import itertools
import pathlib
import shutil
from collections.abc import Iterator

import numpy as np
from absl import flags
from PIL import Image

from data_pipelines.exports import write_json, write_table, write_text
from data_pipelines.mosaics import MosaicPlan, class_folders
from data_pipelines.patches import Patches, patch_table
from data_pipelines.synthetic import mosaic_cohort
from experiments.run.mining.comparison import WEAK, Result, difference_rows, table_rows
from experiments.run.mining.program import Bench, decisive_settings, define_mining_flags, start, start_of, trainer_of
from experiments.run.mining.sources import Sources
from experiments.run.mining.stages import Arm, MiningRun
from experiments.run.mining.weak_sets import NEGATIVE
from experiments.run.program import Stop, UsageError, run
from experiments.run.starting import pretrained_hash
from experiments.run.workdir import Workdir, versions
from srcc_jax.methods.negative_mining import METRICS, Config
from srcc_jax.report import markdown_table

_MINING = define_mining_flags()
_PATCHES = flags.DEFINE_string("patches", None, "folder of labelled patches", required=True)
_KIND = flags.DEFINE_enum(
    "kind", "pcam", ["pcam", "folder"], "PatchCamelyon, or folders <split>/<class>, whose splits are mixed"
)
_POSITIVE = flags.DEFINE_list("positive_classes", ["AC"], "of --kind=folder: classes that are positive")
_BACKBONE = flags.DEFINE_string("backbone", "lite1", "network of --pretrained")
_WORKDIR = flags.DEFINE_string("workdir", None, "folder for slides, runs and tables", required=True)
_SEEDS = flags.DEFINE_integer("seeds", 5, "seeds of each arm", lower_bound=1)
_ALPHAS = flags.DEFINE_list("alphas", ["20", "100", "5"], "tiles for each false positive, the first one run first")
_SHARES = flags.DEFINE_list("shares", ["1", "0.1"], "shares of the hard training patches")
_COUNTS = flags.DEFINE_list("counts", ["80", "30", "110"], "training, validation and test patches of each class")
_POOL = flags.DEFINE_integer("pool", 140, "negative patches that the slides are made of", lower_bound=1)
_SLIDES = flags.DEFINE_integer("slides", 32, "mosaic slides to search", lower_bound=1)
_TISSUE = flags.DEFINE_list("tissue_patches", ["600", "700"], "least and most patches in a slide")
_ALIGNED = flags.DEFINE_bool("aligned", False, "patches lie on the lattice of the tiles, so that no tile has a seam")
_TILE = flags.DEFINE_integer("tile", 96, "side of a patch as the network sees it", lower_bound=32)
_BATCH = flags.DEFINE_integer("batch", 16, "patches in a batch", lower_bound=2)
_EPOCHS = flags.DEFINE_integer("epochs", 8, "validations of a fit", lower_bound=1)
_EPOCH_STEPS = flags.DEFINE_integer("epoch_steps", 12, "steps between two", lower_bound=1)

MPP = 0.5  # of the slides' level 0
ARMS = {"l2": ("l2", None), "random as l2": ("random", "l2"), "cosine": ("cosine", None)}
LAST_ARM = {"random as cosine": ("random", "cosine")}
PAIRS = {
    "l2 - random": ("l2", "random as l2"),
    "cosine - random": ("cosine", "random as cosine"),
    "l2 - weak": ("l2", WEAK),
    "random - weak": ("random as l2", WEAK),
}
SHOWN = ("AUROC", "AP, positive", "F1 at 0.5", "accuracy at 0.5", "sensitivity at 0.5", "specificity at 0.5")
_POOLED, _SPLIT = 0, 1  # purposes that a seed is folded with


@dataclasses.dataclass(frozen=True)
class Material:
    """Files of the study: positive and negative patches to draw from, and those that the slides are made of."""

    positive: list[pathlib.Path]
    negative: list[pathlib.Path]
    pool: list[pathlib.Path]


def read_material(root: pathlib.Path) -> Material:
    """All patches by class, a part of the negative ones set apart, always the same."""
    if _KIND.value == "pcam":
        with open(root / "labels.csv", newline="") as table:
            found = sorted((row["id"], row["label"]) for row in csv.DictReader(table))
        files = {kind: [root / "images" / f"{name}.tif" for name, label in found if label == kind] for kind in "10"}
        positive, negative = files["1"], files["0"]
    else:
        folders = [class_folders(place) for place in sorted(root.iterdir()) if place.is_dir()]
        each = [(name, file) for classes in folders for name, files in classes.items() for file in files]
        positive = [file for name, file in each if name in _POSITIVE.value]
        negative = [file for name, file in each if name not in _POSITIVE.value]
    order = np.random.default_rng([0, _POOLED]).permutation(len(negative))
    needed = sum(map(int, _COUNTS.value))
    if len(positive) < needed or len(negative) < needed + _POOL.value:
        raise UsageError(
            f"{root}: {len(positive)} positive and {len(negative)} negative patches; --counts needs {needed} of each, and --pool "
            f"{_POOL.value} more negative ones: lower them"
        )
    kept = [negative[place] for place in order[_POOL.value :]]
    return Material(positive, kept, [negative[place] for place in order[: _POOL.value]])


def hard_patches(material: Material, seed: int) -> Patches:
    """The patches of a seed: each class in as many of each split as --counts says."""
    counts = [int(count) for count in _COUNTS.value]
    random = np.random.default_rng([seed, _SPLIT])
    files: list[pathlib.Path] = []
    for group in (material.positive, material.negative):
        files += [group[place] for place in random.permutation(len(group))[: sum(counts)]]
    split = [name for name, count in zip(("train", "validation", "test"), counts) for _ in range(count)]
    return patch_table(files, ["positive"] * sum(counts) + [NEGATIVE] * sum(counts), split=split * 2)


def make_slides(material: Material, folder: pathlib.Path) -> pathlib.Path:
    """The mosaic slides known negative, written once."""
    if not (folder / "cohort.csv").exists():
        low, high = (int(number) for number in _TISSUE.value)
        mosaic_cohort(
            folder,
            patches={"train": {"positive": material.positive[:1], NEGATIVE: material.pool}},
            positive_classes=["positive"],  # which no slide shows
            negative_classes=[NEGATIVE],
            slides={"train": (0, _SLIDES.value)},
            mpp=MPP,
            plan=MosaicPlan(tissue_patches=(low, high), aligned=_ALIGNED.value),
            labels=("positive", NEGATIVE),
            workers=2,
        )
    return folder / "cohort.csv"


def open_bench(material: Material, patch_px: int) -> Bench:
    """Trainer and weak set of the whole study."""
    config = Config(
        backbone=_BACKBONE.value,
        positive="positive",
        tile=_TILE.value,
        mpp=MPP * patch_px / _TILE.value,
        batch=_BATCH.value,
        scoring_batch=64,
        epochs=_EPOCHS.value,
        epoch_steps=_EPOCH_STEPS.value,
        learning_rate=3e-4,
        bn_momentum=0.9,
    )
    mesh, workdir = start(config), pathlib.Path(_WORKDIR.value).absolute()
    begin = start_of(_MINING, config)
    threads = _MINING.threads.value
    trainer = trainer_of(config, begin.architecture, mesh, threads=threads, stop=Stop())
    cohort = make_slides(material, workdir / "slides")
    weak_set = Sources(config, workdir, threads=threads).weak(str(cohort), trainer)
    print(f"{len(weak_set)} weak tiles", flush=True)
    hard = hard_patches(material, 0)
    decisive = decisive_settings(
        config, hard, weak_set, pretrained=pretrained_hash(_MINING.pretrained.value), counts=_COUNTS.value
    )
    return Bench(config, begin, trainer, hard, weak_set, Workdir.open(workdir, decisive), mesh, decisive)


def plan() -> Iterator[tuple[float, str, Arm | None, int]]:
    """(share, name, arm, seed) in the order of the runs; no arm: the weak model."""
    rows: list[tuple[float, str, Arm | None]] = []
    alphas, shares = [int(alpha) for alpha in _ALPHAS.value], [float(share) for share in _SHARES.value]
    for alpha, share in itertools.product(alphas, shares):
        rows += [(share, WEAK, None)] if alpha == alphas[0] else []
        rows += [(share, name, Arm(query, alpha, like)) for name, (query, like) in ARMS.items()]
    for alpha, share, (name, (query, like)) in itertools.product(alphas, shares, LAST_ARM.items()):
        rows += [(share, name, Arm(query, alpha, like))]
    return ((*row, seed) for row, seed in itertools.product(rows, range(_SEEDS.value)))


def result_of(mining: MiningRun, share: float, name: str, arm: Arm | None) -> Result:
    """Trains what is missing, and scores the test patches once. A strong model is not kept."""
    model = WEAK if arm is None else f"strong_{arm.name}"
    probability = mining.test(model, lambda: mining.weak if arm is None else mining.strong(arm))
    known = np.isfinite(probability)
    result = Result(mining.config.seed, share, WEAK, 0, mining.label[mining.rows["test"]][known], probability[known])
    if arm is None:
        return result
    shutil.rmtree(mining.folder / model, ignore_errors=True)
    mined, found = int(mining.mined(arm).new.sum()), len(mining.false_positives.row)
    return dataclasses.replace(result, arm=name, alpha=arm.alpha, mined=mined, false_positives=found)


def write_tables(folder: pathlib.Path, results: list[Result], settings: object) -> None:
    """results.csv (a line a model), table.md, summary.json."""
    columns: dict[str, list] = {
        name: [getattr(result, name) for result in results]
        for name in ("seed", "share", "arm", "alpha", "false_positives", "mined")
    }
    write_table(folder / "results.csv", columns | {name: [r.value(name) for r in results] for name in METRICS})
    differences = difference_rows(results, PAIRS, SHOWN[:3])
    about = ["hard set", "arm", "α", "seeds", "tiles added"]
    text = markdown_table(table_rows(results, SHOWN), [*about, *SHOWN])
    text += "\n" + markdown_table(differences, ["hard set", "α", "difference", "seeds", *SHOWN[:3]])
    write_text(folder / "table.md", text)
    write_json(folder / "summary.json", {"differences": differences, "settings": settings, "versions": versions()})


def main() -> None:
    """Runs what is not finished, and writes the tables after each row."""
    material = read_material(pathlib.Path(_PATCHES.value))
    with Image.open(material.pool[0]) as image:
        bench = open_bench(material, image.width)
    results: list[Result] = []
    runs: dict[tuple[float, int], MiningRun] = {}
    for share, name, arm, seed in plan():
        if (share, seed) not in runs:
            drawn = dataclasses.replace(bench, hard=hard_patches(material, seed))
            runs[share, seed] = drawn.run(seed=seed, name=f"share_{share:g}", positive=share, negative=share)
        results.append(result_of(runs[share, seed], share, name, arm))
        latest = results[-1]
        print(f"{share:.0%} {latest.arm} {latest.alpha} seed {seed}: AUROC {latest.value('AUROC'):.4f}", flush=True)
        write_tables(bench.workdir.path, results, bench.settings)
    print((bench.workdir.path / "table.md").read_text())


if __name__ == "__main__":
    run(main)
