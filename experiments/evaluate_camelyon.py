"""Lesion FROC and slide ROC AUC as Camelyon16 scores them, of our maps or of any program's detections.

    python -m experiments.evaluate_camelyon --cohort=test.csv --maps=out --out=table
    python -m experiments.evaluate_camelyon --cohort=test.csv --detections=folder --out=table

--maps is a folder that predict_slides wrote, of slide classifiers or of reverse distillation; --detections one of <slide_id>.csv with
score, x, y in level-0 pixels, or one that predict_slides wrote with lesion candidates. The cohort table names each slide's annotation
(ASAP XML, GeoJSON, NCRF JSON, or a mask image). Leaves slides.csv, froc.csv, metrics.json and report.html.

A slide's score is its best detection, unless predict_slides gave it another (of reverse distillation: the mean of high map values; of
classifiers: the probability). Scores are any numbers, logits too: only their order counts.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib

import numpy as np
from absl import flags

from data_pipelines.camelyon16 import EXCLUDED
from data_pipelines.cohort import Cohort, SlideRecord, check_two_classes, read_cohort
from data_pipelines.cohort_rows import listed
from data_pipelines.detections import Detections, read_detections
from data_pipelines.exports import read_map, write_json, write_table, write_text
from data_pipelines.tumour_masks import coarser, tumour_mask
from experiments.run.program import UsageError, run
from experiments.run.progress import progress
from experiments.run.workdir import versions
from srcc_jax.froc import FP_RATES, Froc, SlideHits, bootstrap_froc, candidates, find_lesions, froc, score_slide
from srcc_jax.metrics import Interval, bootstrap, roc_auc, roc_curve
from srcc_jax.report import Report, Table, render

# µm per pixel of the masks that lesions are found on: level 5 of slides at 0.243 µm per pixel; MONAI's LesionFROC takes level 6.
VARIANTS = {"camelyon16": 0.243 * 2**5, "monai": 0.243 * 2**6}
# Half the side of the square that a candidate clears, in µm: 6 pixels of level 6 (He & Li's released code); MONAI's 24 of them.
RADII = {"camelyon16": 93.3, "monai": 24 * 0.243 * 2**6}
_NEAR = 1.1  # ours: how often coarser, or finer, than asked for a mask may be without a word
STOPS = {"anomaly score": 1.0}  # ours: of 3; nearly all tissue is above the 0.5 that suits probabilities

_COHORT = flags.DEFINE_string("cohort", None, "cohort table with label and annotation", required=True)
_SPLIT = flags.DEFINE_string("split", None, "of the cohort table, this split only")
_POSITIVE = flags.DEFINE_string("positive", "tumour", "label of the slides with tumour")
_MAPS = flags.DEFINE_string("maps", None, "folder that predict_slides wrote")
_DETECTIONS = flags.DEFINE_string("detections", None, "folder of <slide_id>.csv: score, x, y")
_OUT = flags.DEFINE_string("out", None, "folder for the results", required=True)
_VARIANT = flags.DEFINE_enum(
    "variant", "camelyon16", list(VARIANTS), "whose scale of the masks; the numbers of the two differ"
)
_MASK_MPP = flags.DEFINE_float("mask_mpp", None, "µm per pixel of the masks, where neither is wanted", lower_bound=0.1)
_GROUPS = flags.DEFINE_list("groups", None, "groups of the annotations that are tumour; none: all but exclusions")
_EXCLUDE = flags.DEFINE_list(
    "exclude", list(EXCLUDED), "slides to leave out; as set: Camelyon16's two known exceptions"
)
_RADIUS = flags.DEFINE_float(
    "nms_radius_um",
    None,
    "of --maps: half the side of the square that a candidate clears, in µm; none: 93.3, or MONAI's 373.2",
)
_STOP = flags.DEFINE_float(
    "nms_stop", None, "of --maps: values up to this are no candidates; none: 0.5, or 1 where they are anomaly scores"
)
_MPP_OVERRIDE = flags.DEFINE_float("mpp_override", None, "µm per pixel of slides that do not say it themselves")
_SEED = flags.DEFINE_integer("seed", 0, "seed of the bootstrap over slides")


@dataclasses.dataclass(frozen=True)
class Scored:
    """A slide, its detections and what they hit."""

    record: SlideRecord
    detections: Detections
    hits: SlideHits
    itc: int
    mask_mpp: float | None
    given: float | None  # the slide's score by predict_slides


def source() -> tuple[pathlib.Path, tuple[str, ...]]:
    """The folder of the detections, and the names that a slide's file in it may have. UsageError where not exactly one is given."""
    if _DETECTIONS.value and not _MAPS.value:
        return pathlib.Path(_DETECTIONS.value), ("{}.csv", "slides/{}/detections.csv")
    if _MAPS.value and not _DETECTIONS.value:
        return pathlib.Path(_MAPS.value), ("slides/{}/probability.npz", "slides/{}/anomaly.npz")
    raise UsageError("give one of --maps (of predict_slides) and --detections (tables of any program)")


def file_of(record: SlideRecord) -> pathlib.Path | None:
    """The slide's map or table; None where there is none."""
    folder, names = source()
    files = [folder / name.format(record.slide_id) for name in names]
    return next((file for file in files if file.exists()), None)


def given_score(file: pathlib.Path) -> float | None:
    """The slide's score as predict_slides wrote it beside this file; None where it gave none, or another program wrote the file."""
    about = file.with_name("slide.json")
    found = json.loads(about.read_text(encoding="utf-8")) if about.exists() else {}
    return found.get("score", found.get("probability"))


def find_detections(path: pathlib.Path) -> Detections:
    """Of one slide, read from its table, or made of its map."""
    if path.suffix == ".csv":
        return read_detections(path)
    found = read_map(path)
    wide = RADII[_VARIANT.value] if _RADIUS.value is None else _RADIUS.value
    radius = max(1, round(wide / found.mpp))
    stop = STOPS.get(found.unit, 0.5) if _STOP.value is None else _STOP.value
    score, x, y = candidates(found.values, downsample=found.downsample, radius=radius, stop=stop)
    return Detections(score, x + found.origin[0], y + found.origin[1])


def wanted_mpp() -> float:
    """µm per pixel of the masks that are asked for."""
    return _MASK_MPP.value or VARIANTS[_VARIANT.value]


def score_record(record: SlideRecord) -> Scored:
    """One slide against its annotation. UsageError where a slide with tumour has none."""
    tumour = tumour_mask(record, mpp=wanted_mpp(), groups=_GROUPS.value, mpp_override=_MPP_OVERRIDE.value)
    if tumour is None and record.label == _POSITIVE.value:
        raise UsageError(
            f"{_COHORT.value}: {record.slide_id} is {record.label} but has no annotation: fill the column `annotation`"
        )
    lesions = None
    if tumour is not None:
        tumour = coarser(tumour, wanted_mpp())
    if tumour is not None and tumour.mask.any():
        lesions = find_lesions(tumour.mask, mpp=tumour.mpp, downsample=tumour.downsample)
    file = file_of(record)
    assert file is not None  # `chosen` has seen it
    found = find_detections(file)
    hits = score_slide(lesions, found.score, found.x, found.y)
    itc = 0 if lesions is None else int(lesions.itc.sum())
    return Scored(record, found, hits, itc, None if tumour is None else tumour.mpp, given_score(file))


def chosen(cohort: Cohort) -> Cohort:
    """The slides to score. UsageError that names slides without detections: none found must be said by an empty file."""
    left_out = {name.casefold() for name in _EXCLUDE.value}
    records = tuple(r for r in cohort if r.slide_id.casefold() not in left_out)
    for record in cohort:
        if record not in records:
            print(f"left out: {record.slide_id} ({EXCLUDED.get(record.slide_id.capitalize(), 'as --exclude says')})")
    absent = [record.slide_id for record in records if file_of(record) is None]
    if absent:
        raise UsageError(
            f"{source()[0]} has nothing for {listed(absent)}: a slide in which nothing was detected needs an empty table; slides that "
            "shall not count belong into --exclude"
        )
    return dataclasses.replace(cohort, records=records)


def slide_scores(scored: list[Scored]) -> np.ndarray:
    """float [S]: what each slide was given, or its best detection; where there is none 0, or less than any detection has."""
    lowest = min((slide.detections.score.min() for slide in scored if len(slide.detections)), default=1.0)
    none = 0.0 if lowest > 0 else lowest - 1
    best = [slide.detections.score.max() if len(slide.detections) else none for slide in scored]
    return np.array([one if slide.given is None else slide.given for slide, one in zip(scored, best)])


def scale_notes(scored: list[Scored]) -> list[str]:
    """Which masks are at another scale than the one asked for, because their images have none nearer to it."""
    wanted = wanted_mpp()
    off = {
        s.record.slide_id: s.mask_mpp for s in scored if s.mask_mpp and not 1 / _NEAR <= s.mask_mpp / wanted <= _NEAR
    }
    if not off:
        return []
    scales = listed([f"{mpp:.4g}" for mpp in sorted(set(off.values()))])
    return [
        f"Masks at {scales} µm per pixel, not at {wanted:.4g}, with lesions a little different: {listed(list(off))}."
    ]


def write_results(
    out: pathlib.Path, cohort: Cohort, scored: list[Scored], curve: Froc, merit: dict[str, Interval]
) -> None:
    """slides.csv, froc.csv, metrics.json, report.html."""
    columns: dict[str, list] = {
        "slide_id": [s.record.slide_id for s in scored],
        "label": [s.record.label for s in scored],
        "score": list(slide_scores(scored)),
        "lesions": [s.hits.lesions for s in scored],
        "lesions_found": [int(np.isfinite(s.hits.true).sum()) for s in scored],
        "itc": [s.itc for s in scored],
        "detections": [len(s.detections) for s in scored],
        "false_positives": [len(s.hits.false) for s in scored],
    }
    write_table(out / "slides.csv", columns)
    write_table(out / "froc.csv", {"false_positives_per_slide": curve.fp_per_slide, "sensitivity": curve.sensitivity})
    at = dict(zip(map(str, FP_RATES), curve.sensitivity_at.tolist()))
    about = {
        "variant": _VARIANT.value,
        "mask_mpp": sorted({float(f"{s.mask_mpp:.5g}") for s in scored if s.mask_mpp}),
        "mask_mpp_wanted": wanted_mpp(),
        "slides": len(scored),
        "lesions": sum(s.hits.lesions for s in scored),
        "exclude": _EXCLUDE.value,
    }
    write_json(
        out / "metrics.json", {**merit, "sensitivity at false positives per slide": at, **about, "versions": versions()}
    )
    rows = [[f"{rate} false positives per slide", value] for rate, value in at.items()]
    report = Report(
        title="Lesions and slides",
        subtitle=f"{len(scored)} slides, {about['lesions']} lesions",
        summary={name: {"slide": interval} for name, interval in merit.items()},
        notes=[
            "Intervals: percentile bootstrap over slides, 1000 resamples.",
            "FROC: mean of the sensitivities of the table.",
            *scale_notes(scored),
        ],
        roc={"slides": roc_curve(cohort.labels(_POSITIVE.value), np.asarray(columns["score"]))},
        comparison=Table(columns=["sensitivity at", "of lesions"], rows=rows),
        configuration=about,
        versions=versions(),
    )
    write_text(out / "report.html", render(report))


def main() -> None:
    """Scores every slide and prints the two numbers."""
    cohort = read_cohort(_COHORT.value, require_files=False)
    cohort = chosen(cohort.split(_SPLIT.value) if _SPLIT.value else cohort)
    check_two_classes(cohort, _POSITIVE.value, where=f"{_COHORT.value}, as far as it is scored,")
    with progress(len(cohort), "scoring", unit="slides") as bar:
        scored = []
        for record in cohort:
            scored.append(score_record(record))
            bar.update()
    hits = [slide.hits for slide in scored]
    if not any(slide.lesions for slide in hits):
        itc = sum(slide.itc for slide in scored)
        raise UsageError(
            f"{_COHORT.value}: none of {len(scored)} slides has a lesion that counts ({itc} are isolated tumour cells, less than "
            "275 µm long): there is no FROC without one"
        )
    label = cohort.labels(_POSITIVE.value)
    merit = {
        "lesion FROC": bootstrap_froc(hits, seed=_SEED.value),
        "slide ROC AUC": bootstrap(roc_auc, label, slide_scores(scored), seed=_SEED.value),
    }
    out = pathlib.Path(_OUT.value)
    write_results(out, cohort, scored, froc(hits), merit)
    for note in scale_notes(scored):
        print(note)
    for name, interval in merit.items():
        print(f"{name} {interval.value:.4f} [{interval.low:.4f}, {interval.high:.4f}]")
    print(out / "report.html")


if __name__ == "__main__":
    run(main)
