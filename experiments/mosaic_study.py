"""The seven models of Kanavati 2021 on a cohort of mosaic slides made of real labelled patches: the runs behind RESULTS.md.

    python -m experiments.mosaic_study --patches=<folder with train/<class> and test/<class>> --positive_classes=AC \\
        --weights=efficientnet-lite1.pth --workdir=runs/mosaic

Every model is trained and its test slides predicted by the commands that a user runs, one after the other; a study that was cut off
goes on with the first that is not finished. The test slides are read once for each finished model.
"""

from __future__ import annotations

import csv
import pathlib
import subprocess
import sys
from collections.abc import Mapping, Sequence

from absl import flags

from data_pipelines.mosaics import MosaicPlan, folder_patches, pcam_patches
from data_pipelines.synthetic import mosaic_cohort
from experiments.run.program import UsageError, command, run

_PATCHES = flags.DEFINE_string("patches", None, "folder of labelled patches", required=True)
_KIND = flags.DEFINE_enum(
    "kind", "folder", ["folder", "pcam"], "train/<class> and test/<class> folders, or PatchCamelyon"
)
_POSITIVE = flags.DEFINE_list(
    "positive_classes", ["AC"], "classes of patches that make a slide positive; the others fill it"
)
_WEIGHTS = flags.DEFINE_string("weights", None, "ImageNet weights of the backbone", required=True)
_BACKBONE = flags.DEFINE_string("backbone", "lite1", "network that the weights are of")
_WORKDIR = flags.DEFINE_string("workdir", None, "folder for the cohort, the runs and the table", required=True)
_SLIDES = flags.DEFINE_list(
    "slides", ["20", "20", "6", "6", "20", "20"], "positive and negative slides of train, validation and test"
)
_TISSUE = flags.DEFINE_list("tissue_patches", ["32", "40"], "least and most patches in a slide")
_SHARE = flags.DEFINE_list(
    "positive_share", ["0.03", "0.05"], "least and most share of a positive slide's tissue that is positive"
)
_PATCH_PX = flags.DEFINE_integer(
    "patch_px", None, "side of a patch in the slide in pixels of 0.5 µm; none: that of its file"
)
_ROWS = flags.DEFINE_list("rows", None, "names of models to run (see ROWS); none: all")
_SEEDS = flags.DEFINE_integer("seeds", 3, "seeds of the two main models, FS x10 and WS x10; the others have one")

MPP = 0.5  # of the slides' level 0
LABELS = ("tumour", "normal")
MAIN = ("FS x10", "WS x10")
FS = {"mode": "fs", "tiles_per_slide": 16, "max_epochs": 10}
WS = {"mode": "ws", "top_k": 8, "buffer": 128, "max_epochs": 12}
# A patch is 224 px of level 0: a tile at x10 is annotated where at least half of it is tumour, one at x5 where a quarter is.
# Tiles of 112 px and short schedules, so that a study takes about two hours on two cores; all else is the paper's.
SHARED = {
    "tile": 112,
    "stride": 56,
    "learning_rate": 3e-4,
    "bn_momentum": 0.9,
    "positive": LABELS[0],
    "min_annotated": 0.4,
}
ROWS: dict[str, dict[str, object]] = {
    "FS x10": {**FS, "mpp": 1.0},
    "WS x10": {**WS, "mpp": 1.0},
    "WS-noanno x10": {**WS, "mpp": 1.0, "annotations": False},
    "FS+WS x10": {**WS, "mpp": 1.0, "max_epochs": 6, "start_from": "FS x10"},
    "FS w/o TL x10": {**FS, "mpp": 1.0, "pretrained": None},
    "FS x5": {**FS, "mpp": 2.0, "min_annotated": 0.2},
    "FS x20": {**FS, "mpp": 0.5},
}


def make_cohort(folder: pathlib.Path) -> pathlib.Path:
    """The mosaic cohort, written once."""
    if (folder / "cohort.csv").exists():
        return folder / "cohort.csv"
    collect = folder_patches if _KIND.value == "folder" else pcam_patches
    patches = collect(_PATCHES.value, seed=0)
    counts = [int(number) for number in _SLIDES.value]
    classes = sorted(patches["train"])
    low, high = (int(number) for number in _TISSUE.value)
    least, most = (float(number) for number in _SHARE.value)
    return mosaic_cohort(
        folder,
        patches=patches,
        positive_classes=_POSITIVE.value,
        negative_classes=[name for name in classes if name not in _POSITIVE.value],
        slides={split: (counts[2 * n], counts[2 * n + 1]) for n, split in enumerate(("train", "validation", "test"))},
        mpp=MPP,
        plan=MosaicPlan(tissue_patches=(low, high), positive_fraction=(least, most), patch_px=_PATCH_PX.value),
        labels=LABELS,
        workers=2,
    )


def run_row(name: str, seed: int, cohort: pathlib.Path, workdir: pathlib.Path) -> pathlib.Path:
    """Trains one model and predicts the test slides, unless that is done; returns the folder of predictions."""
    runs = {row: workdir / "runs" / f"{row.replace(' ', '_').replace('/', '')}_{seed}" for row in ROWS}
    out = runs[name] / "test"
    if not (out / "summary.json").exists():
        settings: dict[str, object] = {"pretrained": _WEIGHTS.value, **SHARED, **ROWS[name]}
        if "start_from" in settings:
            settings |= {"start_from": runs[str(settings["start_from"])], "pretrained": None}
        command(
            "slide_classification", cohort=cohort, workdir=runs[name], backbone=_BACKBONE.value, seed=seed, **settings
        )
        command("predict_slides", workdir=runs[name], slides=cohort, split="test", gradcam=False, out=out)
    return out


def tabulate(predictions: Mapping[str, pathlib.Path], cohort: pathlib.Path, workdir: pathlib.Path) -> None:
    """The table over all models that are finished."""
    line = [
        sys.executable,
        "-m",
        "experiments.compare_models",
        f"--cohort={cohort}",
        "--split=test",
        f"--positive={LABELS[0]}",
    ]
    line += [f"--predictions={name}={folder}" for name, folder in predictions.items()]
    subprocess.run([*line, f"--out={workdir / 'table'}"], check=True)


def plan(rows: Sequence[str]) -> list[tuple[str, int]]:
    """(model, seed) in the order of the runs: every model once, then the main ones again."""
    return [(name, 0) for name in rows] + [
        (name, seed) for seed in range(1, _SEEDS.value) for name in rows if name in MAIN
    ]


def main() -> None:
    """Makes the cohort, runs what is not finished, and writes the table after each model."""
    workdir = pathlib.Path(_WORKDIR.value)
    cohort = make_cohort(workdir / "cohort")
    with open(cohort, newline="", encoding="utf-8") as file:
        print(f"{cohort}: {sum(1 for _ in csv.DictReader(file))} slides", flush=True)
    unknown = set(_ROWS.value or ()) - set(ROWS)
    if unknown:
        raise UsageError(f"--rows: {', '.join(sorted(unknown))} is none of {', '.join(ROWS)}")
    predictions: dict[str, pathlib.Path] = {}
    for name, seed in plan(_ROWS.value or list(ROWS)):
        predictions[name if seed == 0 else f"{name} (seed {seed})"] = run_row(name, seed, cohort, workdir)
        tabulate(predictions, cohort, workdir)


if __name__ == "__main__":
    run(main)
