"""Detected cells against annotated boxes, as DigestPath and Li 2019 score them: recall, false positives on normal images, FROC.

    python -m experiments.evaluate_detection --truth=annotated/ --detections=found/ --normal=normal_images/ --out=table

--truth is a folder with an annotation for each annotated image, --detections a folder of the same kind with scores, or one CSV (image, x1,
y1, x2, y2, score), of this or any other program. Leaves images.csv, metrics.json and report.html.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from absl import flags

from data_pipelines.boxes import NONE, Boxes, image_name, read_box_folder, read_box_table, read_names, require_scores
from data_pipelines.cohort_rows import listed
from data_pipelines.exports import write_json, write_table, write_text
from experiments.run.program import UsageError, run
from experiments.run.workdir import versions
from srcc_jax.detection_metrics import (
    FP_RATES,
    MIN_IOU,
    Matches,
    bootstrap_images,
    challenge_false_positives,
    collective_recall,
    instance_recall,
    match,
    normal_false_positives,
    precise_recall,
    recall_at_rates,
)
from srcc_jax.metrics import Interval
from srcc_jax.report import Report, Table, render

_TRUTH = flags.DEFINE_string("truth", None, "folder with an annotation for each annotated image", required=True)
_DETECTIONS = flags.DEFINE_string("detections", None, "folder of annotations with scores, or a CSV", required=True)
_NORMAL = flags.DEFINE_string("normal", None, "images without cells: a folder of them, or a text file of names")
_OUT = flags.DEFINE_string("out", None, "folder for the results", required=True)
_IOU = flags.DEFINE_float("iou", MIN_IOU, "a detection matches a box above this IoU", lower_bound=0, upper_bound=1)
_COVERED = flags.DEFINE_float(
    "covered", 0.3, "a box counts as found collectively above this share under detections (ours)"
)
_STEAL = flags.DEFINE_bool("steal", False, "a detection whose best box is taken is lost, as in some public evaluations")
_RULE = flags.DEFINE_enum(
    "froc_rule", "above_next", ["above_next", "at_kth"], "which detections a rate of false positives allows"
)
_CHALLENGE = flags.DEFINE_bool(
    "challenge", False, "add the challenge's numbers: recall at 20 % precision at least, 100 - FPs"
)
_SEED = flags.DEFINE_integer("seed", 0, "seed of the bootstrap over images")

Metric = Callable[[Sequence[Matches], Sequence[np.ndarray]], float]


def read_detections(path: pathlib.Path) -> dict[str, Boxes]:
    """Image -> detections with scores."""
    found = read_box_folder(path) if path.is_dir() else read_box_table(path)
    require_scores(found, where=str(path))
    return found


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
            f"no image of --truth or --normal is in {_DETECTIONS.value}: images go by their names without ending"
        )
    if missing:
        print(f"no detections are given for {listed(missing)}: taken as none found")
    extra = sorted(set(found) - {*truth, *normal})
    if extra:
        print(f"detections in {listed(extra)} are not scored: neither in --truth nor in --normal")


def metrics() -> dict[str, Metric]:
    """Name -> metric of (annotated images, scores on normal images)."""
    covered, froc = f"collective recall (> {_COVERED.value:g} covered)", "FROC (mean recall)"
    chosen: dict[str, Metric] = {
        "instance recall": lambda images, normal: instance_recall(images),
        covered: lambda images, normal: collective_recall(images, covered=_COVERED.value),
    }
    if _CHALLENGE.value:
        chosen["recall at precision ≥ 0.2"] = lambda images, normal: precise_recall(images)
    if _NORMAL.value:
        recall = functools.partial(recall_at_rates, rule=_RULE.value)
        chosen["false positives per normal image"] = lambda images, normal: normal_false_positives(normal)
        chosen[froc] = lambda images, normal: float(recall(images, normal).mean())
        for place, rate in enumerate(FP_RATES):
            chosen[f"recall at {rate} false positives"] = functools.partial(_recall_at, recall, place)
        if _CHALLENGE.value:
            chosen["100 - false positives"] = lambda images, normal: challenge_false_positives(normal)
    return chosen


def _recall_at(
    recall: Callable[..., np.ndarray], place: int, images: Sequence[Matches], normal: Sequence[np.ndarray]
) -> float:
    return float(recall(images, normal)[place])


def main() -> None:
    """Scores and prints the numbers."""
    truth = read_box_folder(_TRUTH.value)
    normal = read_names(_NORMAL.value) if _NORMAL.value else []
    found = read_detections(pathlib.Path(_DETECTIONS.value))
    found = {image_name(name): boxes for name, boxes in found.items()}
    split_images(truth, normal, found)
    images = [
        match(boxes.box, found.get(name, NONE).box, found.get(name, NONE).score, min_iou=_IOU.value, steal=_STEAL.value)
        for name, boxes in truth.items()
    ]
    others = [found.get(name, NONE).score for name in normal]
    merit = {name: bootstrap_images(metric, images, others, seed=_SEED.value) for name, metric in metrics().items()}
    write_results(pathlib.Path(_OUT.value), dict(zip(truth, images)), dict(zip(normal, others)), merit)
    for name, interval in merit.items():
        print(f"{name} {interval.value:.4f} [{interval.low:.4f}, {interval.high:.4f}]")


def write_results(
    out: pathlib.Path, images: Mapping[str, Matches], normal: Mapping[str, np.ndarray], merit: Mapping[str, Interval]
) -> None:
    """images.csv, metrics.json, report.html."""
    rows = [(name, image.truths, len(image.hit), int(image.hit.sum())) for name, image in images.items()]
    rows += [(name, 0, len(scores), 0) for name, scores in normal.items()]
    names = ("image", "annotated", "detected", "matched")
    write_table(out / "images.csv", dict(zip(names, zip(*rows))))
    about = {
        "iou": _IOU.value,
        "images": len(images),
        "boxes": sum(i.truths for i in images.values()),
        "normal images": len(normal),
    }
    write_json(out / "metrics.json", {**merit, **about, "versions": versions()})
    report = Report(
        title="Detected cells",
        subtitle=f"{about['boxes']} boxes in {len(images)} images, {len(normal)} normal images",
        summary={name: {"image": interval} for name, interval in merit.items()},
        notes=[
            f"A detection matches above an IoU of {_IOU.value:g}, in descending score, one to a box.",
            "Unmatched detections on annotated images are not counted: the annotation is taken to be incomplete.",
            "Intervals: percentile bootstrap, annotated and normal images each drawn with replacement, 1000 resamples.",
        ],
        comparison=Table(columns=list(names), rows=rows),
        configuration=about,
        versions=versions(),
    )
    write_text(out / "report.html", render(report))


if __name__ == "__main__":
    run(main)
