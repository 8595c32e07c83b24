"""Cell detection from incomplete boxes measured (Li et al. 2019): its four trainings on DigestPath's crops, and where the truth is whole.

    python -m experiments.detection_study --digestpath=digestpath_signet_ring --monuseg=monuseg --glas=glas --workdir=runs/cells

DigestPath: each annotated crop is held out in turn; of a crop that is known to have no such cells one half is trained on as normal
tissue, and false positives are counted in the other. MoNuSeg and GlaS: half of the boxes are withheld, and recall of the withheld ones
and precision are measured by round. Every model is trained by the command that a user runs (experiments.cell_detection); a study that
was cut off goes on with the run that is not finished. A run with --training=self_extra gives the rows FT, ST and ST-Ex, the states of
one model after its rounds; one with cooperative gives CT. Leaves rounds.csv, with a line for each model and round, table.md and
summary.json, written anew after each run.
"""

from __future__ import annotations

import csv
import pathlib
from collections.abc import Iterator, Sequence

from absl import flags

from data_pipelines.boxes import read_box_folder
from data_pipelines.cell_images import ANNOTATIONS, IMAGE_ENDINGS, NEGATIVE, POSITIVE
from data_pipelines.exports import write_json, write_table, write_text
from experiments.run.cells.study_data import (
    Material,
    copy_folder,
    read_truth,
    write_halves,
    write_material,
    write_splits,
)
from experiments.run.cells.study_table import ABSENT, Outcome, read_rounds, score_boxes, summarise
from experiments.run.program import UsageError, command, run
from srcc_jax.methods.cell_detection import NETWORKS

_DIGESTPATH = flags.DEFINE_string(
    "digestpath", None, "folder with gt/ (annotated crops), no_boxes/ and, of another program, predicted_yolov3/"
)
_NORMAL = flags.DEFINE_list(
    "normal", ["18-36771A"], "beginnings of the names of crops in no_boxes/ that are known to have no such cells"
)
_MONUSEG = flags.DEFINE_string("monuseg", None, "folder of MoNuSeg images with masks or annotations")
_GLAS = flags.DEFINE_string("glas", None, "folder of GlaS images with masks")
_WORKDIR = flags.DEFINE_string("workdir", None, "folder for the images, the runs and the tables", required=True)
_SEEDS = flags.DEFINE_integer("seeds", 3, "seeds", lower_bound=1)
_NETWORK = flags.DEFINE_enum("network", "unet_resnet34", list(NETWORKS), "the network that is handed on")
_SECOND = flags.DEFINE_enum("second_network", "unet_dla34", list(NETWORKS), "the other one of cooperative training")
_PRETRAINED = flags.DEFINE_string("pretrained", None, "weights of --network or its encoder; none: random")
_SECOND_PRETRAINED = flags.DEFINE_string("second_pretrained", None, "the same for --second_network")
_STEPS = flags.DEFINE_integer("epoch_steps", 10, "steps of an epoch", lower_bound=1)
_EPOCHS = flags.DEFINE_list(
    "epochs",
    ["15", "5", "10", "5"],
    "epochs on the boxes, of a round of self-training, of the first and each later round with others",
)
_ROUNDS = flags.DEFINE_list("rounds", ["3", "2"], "rounds of self-training, and with unlabelled regions")
_WITHHELD = flags.DEFINE_float(
    "withheld", 0.5, "share of the boxes that is withheld where the truth is whole", lower_bound=0
)
_LEARNING_RATE = flags.DEFINE_float("learning_rate", 1e-3, "Adam's learning rate")

TRAININGS = ("self_extra", "cooperative")
# Pixels of the images are reduced so that a cell is 20 to 50 pixels wide and a step takes about a second on two cores.
SIZES: dict[str, dict[str, object]] = {
    "digestpath": {"reduce": 4, "crop": 128, "batch": 8, "window": 256, "overlap": 64, "min_area": 20, "edge_px": 3},
    "monuseg": {"reduce": 1, "crop": 128, "batch": 8, "window": 256, "overlap": 64, "min_area": 10, "edge_px": 1},
    "glas": {"reduce": 4, "crop": 128, "batch": 8, "window": 160, "overlap": 64, "min_area": 20, "edge_px": 3},
}


def digestpath_folds(workdir: pathlib.Path) -> Iterator[tuple[str, Material]]:
    """Held-out crop -> material: the other annotated crops and the left halves of normal ones to train on, crops without boxes as
    unlabelled, the right halves of normal ones held out with the crop."""
    root = pathlib.Path(_DIGESTPATH.value or "")
    bare = [path for path in sorted((root / "no_boxes").iterdir()) if path.suffix.lower() in IMAGE_ENDINGS]
    normal = [path for path in bare if path.name.startswith(tuple(_NORMAL.value))]
    data, unlabelled = workdir / "data", workdir / "unlabelled"
    files = sorted(path for path in (root / "gt").iterdir() if path.suffix.lower() in IMAGE_ENDINGS | ANNOTATIONS)
    copy_folder(files, data / POSITIVE)
    trained, held = write_halves(normal, data / NEGATIVE)
    copy_folder([path for path in bare if path not in normal], unlabelled)
    truth = {name: boxes.box for name, boxes in read_box_folder(root / "gt").items()}
    names = [*truth, *trained, *held]
    for number, held_out in enumerate(truth):
        test = [held_out, *held]
        yield (
            str(number),
            Material(data, unlabelled, write_splits(workdir / f"groups_{number}.csv", names, test), truth, {}),
        )


def withheld_material(part: str, folder: str, workdir: pathlib.Path, seed: int) -> Iterator[tuple[str, Material]]:
    """One division: a quarter of the images held out, a quarter unlabelled, half of the boxes of the others withheld."""
    images = read_truth(pathlib.Path(folder))
    names = list(images)
    quarter = max(1, len(names) // 4)
    if len(names) < 3:
        raise UsageError(
            f"--{part}={folder} holds {len(names)} images: three are needed, to train on, unlabelled and held out"
        )
    test, unlabelled = names[:quarter], names[quarter : 2 * quarter]
    yield (
        "0",
        write_material(
            workdir / f"seed{seed}", images, test=test, unlabelled=unlabelled, share=_WITHHELD.value, seed=seed
        ),
    )


def plan(workdir: pathlib.Path) -> Iterator[tuple[str, int, str, str, Material]]:
    """(part, seed, fold, training, material) in the order of the runs: every part by the first seed before the second."""
    for seed in range(_SEEDS.value):
        parts: list[tuple[str, Iterator[tuple[str, Material]]]] = []
        if _DIGESTPATH.value:
            parts.append(("digestpath", digestpath_folds(workdir / "digestpath")))
        for part, folder in (("monuseg", _MONUSEG.value), ("glas", _GLAS.value)):
            if folder:
                parts.append((part, withheld_material(part, folder, workdir / part, seed)))
        for part, folds in parts:
            for fold, material in folds:
                for training in TRAININGS:
                    yield part, seed, fold, training, material


def run_row(part: str, seed: int, fold: str, training: str, material: Material, workdir: pathlib.Path) -> pathlib.Path:
    """Trains one model, unless that is done; returns its work directory."""
    folder = workdir / part / "runs" / f"{training}_fold{fold}_seed{seed}"
    if not (folder / "metrics.json").exists():
        epochs, self_epochs, first_extra_epochs, extra_epochs = (int(number) for number in _EPOCHS.value)
        self_rounds, extra_rounds = (int(number) for number in _ROUNDS.value)
        command(
            "cell_detection", data=material.data, unlabelled=material.unlabelled, groups=material.groups, workdir=folder,
            training=training, network=_NETWORK.value, pretrained=_PRETRAINED.value, second_network=_SECOND.value,
            second_pretrained=_SECOND_PRETRAINED.value if training == "cooperative" else None, seed=seed,
            epoch_steps=_STEPS.value, epochs=epochs, self_epochs=self_epochs, first_extra_epochs=first_extra_epochs,
            extra_epochs=extra_epochs, self_rounds=self_rounds, extra_rounds=extra_rounds,
            learning_rate=_LEARNING_RATE.value, stop_iou=1, **SIZES[part],
        )  # fmt: skip
    return folder


def tabulate(outcomes: Sequence[Outcome], workdir: pathlib.Path) -> None:
    """rounds.csv, table.md and summary.json of all that is finished."""
    rows = [row for outcome in outcomes for row in read_rounds(outcome)]
    if _DIGESTPATH.value:
        rows += score_boxes(pathlib.Path(_DIGESTPATH.value), _NORMAL.value)
    names = list(dict.fromkeys(name for row in rows for name in row))
    write_table(workdir / "rounds.csv", {name: [row.get(name, ABSENT) for row in rows] for name in names})
    text, summary = summarise(workdir / "rounds.csv")
    write_text(workdir / "table.md", text)
    write_json(workdir / "summary.json", {"runs": len(outcomes), "rows": summary})


def main() -> None:
    """Runs what is not finished, and writes the tables after each run."""
    if not (_DIGESTPATH.value or _MONUSEG.value or _GLAS.value):
        raise UsageError("give one or more of --digestpath, --monuseg and --glas")
    if len(_EPOCHS.value) != 4 or len(_ROUNDS.value) != 2:
        raise UsageError("--epochs takes four numbers and --rounds two, with commas between them")
    workdir = pathlib.Path(_WORKDIR.value).absolute()
    outcomes: list[Outcome] = []
    for part, seed, fold, training, material in plan(workdir):
        folder = run_row(part, seed, fold, training, material, workdir)
        outcomes.append(Outcome(part, seed, fold, training, folder, material))
        tabulate(outcomes, workdir)
    with open(workdir / "rounds.csv", newline="", encoding="utf-8") as file:
        print(f"finished: {sum(1 for _ in csv.DictReader(file))} rows: {workdir / 'table.md'}")


if __name__ == "__main__":
    run(main)
