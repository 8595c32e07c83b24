"""Detected cells against annotated boxes, as DigestPath and Li 2019 score them: recall, false positives on normal images, FROC.

    python -m experiments.evaluate_detection --truth=annotated/ --detections=found/ --normal=normal_images/ --out=table
    python -m experiments.evaluate_detection --truth=annotated/ --detections=fold0/,fold1/,fold2/ --folds=3 --fold_mode=hard --out=table

--truth is a folder with an annotation for each annotated image, --detections a folder of the same kind with scores, or one CSV (image, x1,
y1, x2, y2, score), of this or any other program, or what predict_slides left of images as slides, or several with commas between them,
each for other images. --folds adds the numbers of each fold, by the same division as cell_detection's, and their mean, as the paper's
Table 1 has it. Leaves images.csv, metrics.json and report.html.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from absl import flags

from data_pipelines.boxes import NONE, Boxes, read_box_folder, read_box_table, read_names, require_scores
from data_pipelines.cell_images import ANNOTATED, NORMAL, assign_folds, check_groups, read_groups
from data_pipelines.cohort_rows import listed
from data_pipelines.exports import write_json, write_table, write_text
from experiments.run.cells.evaluation import Scoring
from experiments.run.program import UsageError, run
from experiments.run.workdir import versions
from srcc_jax.detection_metrics import MIN_IOU, RULES, Matches
from srcc_jax.metrics import Interval
from srcc_jax.report import Report, Table, render

_TRUTH = flags.DEFINE_string("truth", None, "folder with an annotation for each annotated image", required=True)
_DETECTIONS = flags.DEFINE_list(
    "detections", None, "folders of annotations with scores, results of predict_slides, or CSVs", required=True
)
_NORMAL = flags.DEFINE_string("normal", None, "images without cells: a folder of them, or a text file of names")
_OUT = flags.DEFINE_string("out", None, "folder for the results", required=True)
_IOU = flags.DEFINE_float("iou", MIN_IOU, "a detection matches a box above this IoU", lower_bound=0, upper_bound=1)
_COVERED = flags.DEFINE_float(
    "covered", 0.3, "a box counts as found collectively above this share under detections (ours)"
)
_STEAL = flags.DEFINE_bool("steal", False, "a detection whose best box is taken is lost, as in some public evaluations")
_RULE = flags.DEFINE_enum("froc_rule", RULES[0], list(RULES), "which detections a rate of false positives allows")
_CHALLENGE = flags.DEFINE_bool(
    "challenge", False, "add the challenge's numbers: recall at 20 % precision at least, 100 - FPs"
)
_SEED = flags.DEFINE_integer("seed", 0, "seed of the bootstrap over images")
_FOLDS = flags.DEFINE_integer(
    "folds", 0, "add the numbers of this many folds and their mean (§3.1: 3); 0: none", lower_bound=0
)
_FOLD_MODE = flags.DEFINE_enum(
    "fold_mode",
    "hard",
    ["easy", "hard"],
    "easy: images are divided; hard: slides, patients and organs, as far as known",
)
_SPLIT_SEED = flags.DEFINE_integer("split_seed", 0, "seed of the division into folds")
_GROUPS = flags.DEFINE_string(
    "groups", None, "table (CSV: image, and any of slide_id, patient_id, organ) that folds keep together by"
)


@dataclasses.dataclass(frozen=True)
class Scored:
    """Annotated image -> its matches, normal image -> scores of its detections, metric -> interval, fold -> metric -> value."""

    images: Mapping[str, Matches]
    normal: Mapping[str, np.ndarray]
    merit: Mapping[str, Interval]
    folds: Sequence[Mapping[str, float]]


def read_detections(paths: Sequence[str]) -> dict[str, Boxes]:
    """Image -> detections with scores, of all folders and tables together."""
    together: dict[str, Boxes] = {}
    for path in [part for given in paths for part in _of_slides(pathlib.Path(given))]:
        found = read_box_folder(path) if path.is_dir() else read_box_table(path)
        require_scores(found, where=str(path))
        twice = sorted(set(found) & set(together))
        if twice:
            raise UsageError(f"detections of {listed(twice)} are in {path} and before it: give each image's once")
        together |= found
    return together


def _of_slides(path: pathlib.Path) -> Sequence[pathlib.Path]:
    """The folders of detections below what predict_slides left; the path itself where it is another."""
    folders = sorted(path.glob("slides/*/detections")) if (path / "slides.csv").is_file() else []
    return folders or [path]


def split_images(truth: Mapping[str, Boxes], normal: Sequence[str], found: Mapping[str, Boxes]) -> None:
    """Refuses what cannot be scored, and says what is taken for granted."""
    both = sorted(set(truth) & set(normal))
    if both:
        raise UsageError(f"{listed(both)}: annotated in --truth and without cells in --normal: it can be only one")
    if not any(len(boxes) for boxes in truth.values()):
        raise UsageError(f"{_TRUTH.value} has no annotated box in {len(truth)} files: recall needs at least one")
    missing = sorted({*truth, *normal} - set(found))
    if len(missing) == len(truth) + len(normal):
        raise UsageError(
            f"no image of --truth or --normal is in {', '.join(_DETECTIONS.value)}: images go by their names without ending"
        )
    if missing:
        print(f"no detections are given for {listed(missing)}: taken as none found")
    extra = sorted(set(found) - {*truth, *normal})
    if extra:
        print(f"detections in {listed(extra)} are not scored: neither in --truth nor in --normal")


def score_folds(
    scoring: Scoring, images: Mapping[str, Matches], normal: Mapping[str, np.ndarray]
) -> list[dict[str, float]]:
    """Metric -> value in each fold. Raises BoxesError where the images cannot be divided, UsageError for a fold without a box."""
    if not _FOLDS.value:
        return []
    if _FOLDS.value == 1:
        raise UsageError("--folds=1 divides nothing: give 2 or more, or none")
    names = [*images, *normal]
    kinds = [ANNOTATED] * len(images) + [NORMAL] * len(normal)
    groups = read_groups(_GROUPS.value) if _GROUPS.value else {}
    for note in check_groups(_GROUPS.value, groups, names) if _GROUPS.value else ():
        print(note)
    fold = assign_folds(names, kinds, groups, folds=_FOLDS.value, mode=_FOLD_MODE.value, seed=_SPLIT_SEED.value)
    of = dict(zip(names, fold))
    numbers = []
    for number in range(_FOLDS.value):
        mine = [image for name, image in images.items() if of[name] == number]
        others = [scores for name, scores in normal.items() if of[name] == number]
        if not any(image.truths for image in mine):
            raise UsageError(
                f"fold {number} of {_FOLDS.value} has no annotated box: give fewer folds, or --fold_mode=easy"
            )
        numbers.append({name: metric(mine, others) for name, metric in scoring.metrics(normal=bool(others)).items()})
    return numbers


def main() -> None:
    """Scores and prints the numbers."""
    truth = read_box_folder(_TRUTH.value)
    normal = read_names(_NORMAL.value) if _NORMAL.value else []
    found = read_detections(_DETECTIONS.value)
    split_images(truth, normal, found)
    scoring = Scoring(
        iou=_IOU.value, covered=_COVERED.value, steal=_STEAL.value, rule=_RULE.value, challenge=_CHALLENGE.value
    )
    images = scoring.matches(truth, found)
    others = {name: found.get(name, NONE).score for name in normal}
    merit = scoring.merit(list(images.values()), list(others.values()), seed=_SEED.value)
    scored = Scored(images, others, merit, score_folds(scoring, images, others))
    write_results(pathlib.Path(_OUT.value), scored)
    for name, interval in merit.items():
        print(f"{name} {interval.value:.4f} [{interval.low:.4f}, {interval.high:.4f}]")
    for name, (mean, deviation) in fold_means(scored.folds).items():
        print(f"{name}, mean of {len(scored.folds)} folds ({_FOLD_MODE.value}) {mean:.4f} (sd {deviation:.4f})")


def fold_means(folds: Sequence[Mapping[str, float]]) -> dict[str, tuple[float, float]]:
    """Metric -> mean and standard deviation (n - 1) over folds, of metrics that every fold has."""
    names = [name for name in (folds[0] if folds else ()) if all(name in fold for fold in folds)]
    return {
        name: (float(np.mean(values)), float(np.std(values, ddof=1)))
        for name in names
        for values in [[fold[name] for fold in folds]]
    }


def write_results(out: pathlib.Path, scored: Scored) -> None:
    """images.csv, metrics.json, report.html."""
    rows = [(name, image.truths, len(image.hit), int(image.hit.sum())) for name, image in scored.images.items()]
    rows += [(name, 0, len(scores), 0) for name, scores in scored.normal.items()]
    names = ("image", "annotated", "detected", "matched")
    write_table(out / "images.csv", dict(zip(names, zip(*rows))))
    about = {
        "iou": _IOU.value,
        "images": len(scored.images),
        "boxes": sum(image.truths for image in scored.images.values()),
        "normal images": len(scored.normal),
    }
    means = fold_means(scored.folds)
    folds = {"mode": _FOLD_MODE.value, "folds": scored.folds, "mean": {name: mean for name, (mean, _) in means.items()}}
    divided = {"folds": folds} if scored.folds else {}
    write_json(out / "metrics.json", {**scored.merit, **divided, **about, "versions": versions()})
    report = Report(
        title="Detected cells",
        subtitle=f"{about['boxes']} boxes in {len(scored.images)} images, {len(scored.normal)} normal images",
        summary={name: {"image": interval} for name, interval in scored.merit.items()},
        notes=[
            f"A detection matches above an IoU of {_IOU.value:g}, in descending score, one to a box.",
            "Unmatched detections on annotated images are not counted: the annotation is taken to be incomplete.",
            "Intervals: percentile bootstrap, annotated and normal images each drawn with replacement, 1000 resamples.",
            *(
                f"{name}: mean of {len(scored.folds)} folds ({_FOLD_MODE.value}) {mean:.4f}, standard deviation {deviation:.4f}."
                for name, (mean, deviation) in means.items()
            ),
        ],
        comparison=Table(columns=list(names), rows=rows),
        configuration=about,
        versions=versions(),
    )
    write_text(out / "report.html", render(report))


if __name__ == "__main__":
    run(main)
