"""The paper's Table 3 on labelled patches (He & Li 2023): reverse distillation with more and more tumour patches, beside the baseline.

    python -m experiments.distillation_study --patches=pcam --teacher=resnet50.npz --teacher_arch=resnet50 --workdir=runs/few_shot
    python -m experiments.distillation_study --section=mosaic --workdir=runs/few_shot ...

Validation and test patches are fixed before the first run. Every model is trained, and reads the test patches once, by the command
that a user runs (reverse_distillation; patch_classification for --arms=supervised); a study that was cut off goes on with the run
that is not finished. Leaves table.md, results.csv, summary.json and curve.png, written anew after each run. --section=mosaic lays
the test patches out as slides, predicts them with one of the models, and scores lesions and slides.
"""

from __future__ import annotations

import json
import pathlib
import shutil
from typing import Any

import numpy as np
from absl import flags

from data_pipelines.exports import write_json, write_table
from data_pipelines.patches import Patches, read_patches, write_patches
from experiments.run.distillation.baselines import baseline_scores, pooled_features
from experiments.run.distillation.few_shot import (
    DISTANCE,
    FURTHER,
    LOGISTIC,
    MAIN,
    SUPERVISED,
    Row,
    divide,
    finished_rows,
    name_slides,
    plan,
)
from experiments.run.distillation.few_shot_table import Result, read_result, write_tables
from experiments.run.distillation.mosaic_slides import predict_and_score, write_cohort
from experiments.run.distillation.report import measure
from experiments.run.distillation.teachers import keep_teacher, load_teacher
from experiments.run.program import UsageError, command, run, start_devices
from experiments.run.workdir import Workdir, file_hash, keep_record
from srcc_jax.methods.reverse_distillation import Config, training_rows
from srcc_jax.metrics import best_threshold
from srcc_jax.models import zoo
from srcc_jax.models.teachers import TEACHERS
from srcc_jax.parallel import make_mesh

_PATCHES = flags.DEFINE_string("patches", None, "folder or list of labelled patches", required=True)
_POSITIVE = flags.DEFINE_string("positive", "tumour", "labels that are tumour, with commas between them")
_TEACHER = flags.DEFINE_string(
    "teacher", None, "the teacher's weights: a folder of import_weights or a file", required=True
)
_ARCH = flags.DEFINE_enum("teacher_arch", "wide_resnet50_2", list(TEACHERS), "the network of a file")
_SOURCE = flags.DEFINE_enum(
    "teacher_source", None, list(zoo.SOURCES), "who published the file, where its names do not tell"
)
_WORKDIR = flags.DEFINE_string("workdir", None, "folder for the patches' list, the runs and the tables", required=True)
_SLIDES = flags.DEFINE_string(
    "slide_pattern", None, "regular expression; its first group is the slide in a file's name"
)
_TEST_SLIDES = flags.DEFINE_list("test_slides", [], "slides whose patches are the test patches; none: drawn by --test")
_VALIDATION = flags.DEFINE_list(
    "validation", ["20", "20"], "normal and tumour validation patches, where no splits are given"
)
_TEST = flags.DEFINE_list("test", ["40", "140"], "normal and tumour test patches, where no splits are given")
_NORMAL = flags.DEFINE_integer("normal_patches", 300, "normal patches to train on; 0: all there are")
_COUNTS = flags.DEFINE_list("tumour_patches", ["0", "5", "10", "50", "100", "180"], "numbers of tumour patches")
_SEEDS = flags.DEFINE_integer("seeds", 3, f"seeds of the main arm ({MAIN}) and of the baseline")
_ARMS = flags.DEFINE_list(
    "arms", [], "further arms, as focal_pixel; supervised: patch_classification, from the teacher's own weights"
)
_ARM_COUNTS = flags.DEFINE_list(
    "arm_tumour_patches", ["100"], "numbers of tumour patches that come first, and of further arms"
)
_ARM_SEEDS = flags.DEFINE_integer("arm_seeds", 1, "seeds of the further arms")
_TILE = flags.DEFINE_integer("tile", 96, "side of a patch in pixels, to which all are resized")
_MPP = flags.DEFINE_float("mpp", 0.972, "µm per pixel of the patches at --tile")
_SHORTCUT = flags.DEFINE_enum("shortcut", "1x1", ["1x1", "3x3"], "around the bottleneck's strided block")
_BATCH = flags.DEFINE_integer("batch", 16, "patches in a batch")
_EPOCHS = flags.DEFINE_integer("epochs", 6, "passes over the training patches")
_SUPERVISED_EPOCHS = flags.DEFINE_integer(
    "supervised_epochs", None, "passes of the arm supervised over the training patches; none: --epochs", lower_bound=1
)
_RATE = flags.DEFINE_float("learning_rate", 1e-3, "Adam's learning rate")
_SELECTION = flags.DEFINE_enum("selection", "auc", ["chosen", "fixed", "auc"], "what selects on the validation patches")
_ALPHA = flags.DEFINE_bool("alpha_by_share", True, "α is the tumour patches' share, as in §4.4; else 0.1")
_SECTION = flags.DEFINE_enum(
    "section",
    "few_shot",
    ["few_shot", "mosaic"],
    "few_shot: the table; mosaic: slides of test patches, with a model of the table",
)
_MOSAIC_SLIDES = flags.DEFINE_list("mosaic_slides", ["8", "8"], "mosaic slides with and without tumour")
_MOSAIC_MODEL = flags.DEFINE_string(
    "mosaic_model", "focal_flat_100_0", "name of the run whose model predicts the mosaic slides"
)
_STRIDE = flags.DEFINE_integer("stride", 48, "pixels between the patches of a mosaic slide's map")
_THREADS = flags.DEFINE_integer("threads", 2, "threads that read patches")


def fixed_patches(workdir: pathlib.Path) -> Patches:
    """The patches with their splits, drawn once and kept in the work directory."""
    listing, validation, test = workdir / "patches.csv", *map(_pair, (_VALIDATION, _TEST))
    given = pathlib.Path(_PATCHES.value)
    how = {
        "patches": str(given.absolute() if given.exists() else given),  # it may be the name of a public set
        "slide_pattern": _SLIDES.value,
        "test_slides": _TEST_SLIDES.value,
        "validation": validation,
        "test": test,
    }
    keep_record(workdir / "splits.json", how, made=listing)
    if not listing.exists():
        patches = read_patches(_PATCHES.value)
        if _SLIDES.value:
            patches = name_slides(patches, _SLIDES.value)
        tumour = patches.is_one_of(positives())
        write_patches(
            listing, divide(patches, tumour, validation=validation, test=test, test_slides=_TEST_SLIDES.value)
        )
    return read_patches(listing)


def _pair(flag: flags.FlagHolder) -> tuple[int, int]:
    """The two numbers of a flag."""
    first, second = (int(number) for number in flag.value)
    return first, second


def positives() -> tuple[str, ...]:
    """The labels that are tumour."""
    return tuple(name.strip() for name in _POSITIVE.value.split(","))


def settings() -> dict[str, Any]:
    """What every run shares: another value of any of it needs another work directory."""
    teacher = pathlib.Path(_TEACHER.value)
    return {
        "teacher": file_hash(teacher) if teacher.is_file() else str(teacher),
        "positive": _POSITIVE.value,
        "tile": _TILE.value,
        "mpp": _MPP.value,
        "shortcut": _SHORTCUT.value,
        "batch": _BATCH.value,
        "epochs": _EPOCHS.value,
        "learning_rate": _RATE.value,
        "alpha_by_share": _ALPHA.value,
        "selection": _SELECTION.value,
        "normal_patches": _NORMAL.value or None,
    }


def run_baselines(workdir: pathlib.Path, patches: Patches, rows: list[Row]) -> None:
    """The baseline of each row, on the features of the same teacher, that is not there yet: metrics.json and patches.csv."""
    waiting = [row for row in rows if not (workdir / "runs" / row.name / "metrics.json").exists()]
    if not waiting:
        return
    teacher, variables = load_teacher(pathlib.Path(_TEACHER.value), arch=_ARCH.value, source=_SOURCE.value)
    features = pooled_features(
        teacher, variables, patches, tile=_TILE.value, batch=_BATCH.value, mesh=make_mesh(), threads=_THREADS.value
    )
    known = np.isfinite(features).all(1)
    tumour = patches.is_one_of(positives())
    rows_of = {split: patches.rows(split)[known[patches.rows(split)]] for split in ("train", "validation", "test")}
    for row in waiting:
        config = Config(seed=row.seed, normal_patches=_NORMAL.value or None, tumour_patches=row.tumour)
        train = rows_of["train"][training_rows(tumour[rows_of["train"]], config)]
        score = np.full(len(patches), np.nan)
        score[known] = baseline_scores(
            features[known],
            tumour[known].astype(int),
            *(np.flatnonzero(np.isin(np.flatnonzero(known), chosen)) for chosen in (train, rows_of["validation"])),
        )
        write_baseline(workdir / "runs" / row.name, row, patches, tumour, score, rows_of)


def write_baseline(
    folder: pathlib.Path,
    row: Row,
    patches: Patches,
    tumour: np.ndarray,
    score: np.ndarray,
    rows_of: dict[str, np.ndarray],
) -> None:
    """In the form in which a trained model leaves its results. A probability is fixed at 0.5; a distance has no fixed threshold."""
    validation, test = rows_of["validation"], rows_of["test"]
    limits = {"validation": best_threshold(tumour[validation], score[validation])[0]}
    if row.arm == LOGISTIC:
        limits["fixed"] = 0.5
    label = tumour[test].astype(int)
    columns = {"path": [str(patches.path[n]) for n in test], "label": patches.label[test], "score": score[test]}
    write_table(folder / "patches.csv", columns)
    merit = measure(label, score[test], patches.unit[test], limits, seed=row.seed)
    write_json(folder / "metrics.json", {**merit, "thresholds": limits})


def run_row(workdir: pathlib.Path, row: Row) -> None:
    """Trains and judges one model, unless that is done. Its checkpoints, which are large, go once it is finished."""
    folder = workdir / "runs" / row.name
    if row.arm == SUPERVISED:
        run_supervised(workdir, row, folder)
    elif not (folder / "metrics.json").exists():
        shared = {name: value for name, value in settings().items() if name not in ("teacher", "alpha_by_share")}
        command(
            "reverse_distillation",
            patches=workdir / "patches.csv",
            workdir=folder,
            teacher=_TEACHER.value,
            teacher_arch=_ARCH.value,
            teacher_source=_SOURCE.value,
            tumour_patches=row.tumour,
            seed=row.seed,
            alpha_by_share=_ALPHA.value and row.tumour > 0,
            threads=_THREADS.value,
            **shared,
            **row.settings,
        )
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def run_supervised(workdir: pathlib.Path, row: Row, folder: pathlib.Path) -> None:
    """The same for a classifier, which begins as the teacher's network and sees the patches that distillation sees by this seed."""
    epochs = _SUPERVISED_EPOCHS.value or _EPOCHS.value
    if (folder / "metrics.json").exists():
        there = json.loads((folder / "settings.json").read_text())["epochs"]
        if there != epochs:
            raise UsageError(f"{folder} was trained for {there} epochs, not {epochs}: remove it to train it again")
        return
    start = workdir / "teacher"
    teacher = keep_teacher(pathlib.Path(_TEACHER.value), start, arch=_ARCH.value, source=_SOURCE.value)
    command(
        "patch_classification",
        patches=workdir / "patches.csv",
        workdir=folder,
        backbone=teacher.name,
        pretrained=start,
        positive=_POSITIVE.value,
        tile=_TILE.value,
        mpp=_MPP.value,
        batch=_BATCH.value,
        epochs=epochs,
        selection="auc" if _SELECTION.value == "auc" else "accuracy",
        normal_patches=_NORMAL.value or None,
        tumour_patches=row.tumour,
        seed=row.seed,
        threads=_THREADS.value,
    )


def tabulate(workdir: pathlib.Path, rows: list[Row]) -> None:
    """The tables and the curve over all runs that are finished, of arms that this start does not ask for, too."""
    found: list[Result] = []
    counts = [int(number) for number in _COUNTS.value]
    for row in dict.fromkeys([*rows, *finished_rows(workdir / "runs", counts)]):
        folder = workdir / "runs" / row.name
        if (folder / "metrics.json").exists():
            found.append(read_result(row, folder, positives()))
    write_tables(workdir, found, counts, {"settings": settings()})


def few_shot(workdir: pathlib.Path) -> None:
    """Baselines, then one run after the other; the tables after each."""
    counts, arm_counts = ([int(number) for number in given] for given in (_COUNTS.value, _ARM_COUNTS.value))
    arms = [name.replace("_", ", ") for name in _ARMS.value]
    unknown = sorted(set(arms) - set(FURTHER))
    if unknown:
        known = ", ".join(arm.replace(", ", "_") for arm in FURTHER)
        raise UsageError(f"--arms: {', '.join(unknown)}: give some of {known}")
    absent = [number for number in _ARM_COUNTS.value if int(number) not in counts]
    if arms and absent:
        raise UsageError(f"--arm_tumour_patches: {absent[0]} is none of --tumour_patches={','.join(_COUNTS.value)}")
    rows = plan(counts, seeds=_SEEDS.value, arms=arms, arm_counts=arm_counts, arm_seeds=_ARM_SEEDS.value)
    baselines = [Row(LOGISTIC if n else DISTANCE, n, seed) for seed in range(_SEEDS.value) for n in counts]
    run_baselines(workdir, fixed_patches(workdir), baselines)
    tabulate(workdir, [*rows, *baselines])
    for row in rows:
        run_row(workdir, row)
        tabulate(workdir, [*rows, *baselines])
        print(f"{row.name}: {workdir / 'table.md'}", flush=True)


def mosaic(workdir: pathlib.Path) -> None:
    """Mosaic slides of the test patches, their maps, and the numbers of lesions and slides."""
    slides, folder = _pair(_MOSAIC_SLIDES), workdir / "mosaic"
    keep_record(folder / "slides.json", {"mosaic_slides": slides}, made=folder / "slides" / "cohort.csv")
    cohort = write_cohort(
        folder / "slides",
        fixed_patches(workdir),
        positives(),
        slides=slides,
        side=_TILE.value,
        mpp=_MPP.value,
    )
    model = workdir / "runs" / _MOSAIC_MODEL.value
    predict_and_score(model, cohort, folder / _MOSAIC_MODEL.value, positive=positives()[0], stride=_STRIDE.value)


def main() -> None:
    """Runs what is not finished."""
    start_devices(batch=1)
    workdir = Workdir.open(_WORKDIR.value, settings()).path
    few_shot(workdir) if _SECTION.value == "few_shot" else mosaic(workdir)


if __name__ == "__main__":
    run(main)
