"""Annotations proposed by a model, for pathologists to correct: outlines of its maps, the most useful slides first (Yu et al. 2019, §3.2).

    python -m experiments.predict_slides --workdir=runs/gastric --slides=cohort.csv --out=out
    python -m experiments.propose_annotations --predictions=out --cohort=cohort.csv --out=proposals
    python -m experiments.gastric_screening --cohort=proposals/cohort.csv --workdir=runs/second --stage=refine

--predictions is a folder that predict_slides wrote with any kind of model that leaves probability maps. Leaves
annotations/<slide_id>.geojson (QuPath: drag it onto the slide, correct it, export it under the same name) or .xml (ASAP), each outline
with its confidence; proposals/ with the same files, not to be touched; index.csv, the most useful slides first; and with --cohort a
table for gastric_screening, whose stage refine reads the corrected files and tells what changed. What was corrected is never written
over; slides that the table has annotations of are left out.

Useful is a slide whose score is near its threshold, whose score and map contradict each other, or of which much is uncertain: each is a
number from 0 to 1 in index.csv (the uncertain area as a share of the largest), and the order is by their mean, or by one of them.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from absl import flags

from data_pipelines.cohort import read_cohort, read_columns
from data_pipelines.contours import Region
from data_pipelines.exports import write_table
from data_pipelines.files import check_writable
from data_pipelines.polygons import EXCLUSION_GROUPS
from experiments.run.program import UsageError, run
from experiments.run.proposals.folder import SUFFIXES, ProposalFolder
from experiments.run.proposals.outlines import OutlineRule, find_outlines, outlined_mm2
from experiments.run.proposals.predictions import SLIDE_THRESHOLD, PredictedSlide, read_predictions
from experiments.run.proposals.usefulness import ORDERS, Doubt, order, usefulness
from experiments.run.screening.judging import REVIEWED

MAPS = ("lesion", "probability")  # the first that a slide has, unless --map says another

_PREDICTIONS = flags.DEFINE_string("predictions", None, "folder that predict_slides wrote", required=True)
_OUT = flags.DEFINE_string("out", None, "folder for the proposals", required=True)
_COHORT = flags.DEFINE_string(
    "cohort",
    None,
    "cohort table (CSV) to be written again with the proposals; slides that it does not have are left out",
)
_FORMAT = flags.DEFINE_enum("format", "geojson", list(SUFFIXES), "geojson: QuPath; asap: ASAP XML")
_MAP = flags.DEFINE_string("map", None, f"name of the map; none: the first of {', '.join(MAPS)} that a slide has")
_THRESHOLD = flags.DEFINE_float(
    "threshold", 0.5, "probability from which on something is outlined", lower_bound=0, upper_bound=1
)
_SLIDE_THRESHOLD = flags.DEFINE_float(
    "slide_threshold",
    None,
    f"a slide is positive above this score; none: the model's, or {SLIDE_THRESHOLD:g}",
    lower_bound=0,
    upper_bound=1,
)
_UNCERTAIN = flags.DEFINE_list(
    "uncertain", ["0.25", "0.75"], "lowest and highest probability that count as uncertain (ours)"
)
_ORDER = flags.DEFINE_enum("order", ORDERS[0], list(ORDERS), "what slides are ordered by, the highest first")
_LABEL = flags.DEFINE_string("label", "lesion", "class of the outlines")
_LEAST = flags.DEFINE_float("least_mm2", 0.01, "smaller outlines and holes are left out (ours)", lower_bound=0)
_SMOOTH = flags.DEFINE_float("smooth_um", 16.0, "σ in µm of a Gaussian over the map before (ours)", lower_bound=0)
_SIMPLIFY = flags.DEFINE_float(
    "simplify_um", 8.0, "how far in µm an outline may be moved to save vertices (ours)", lower_bound=0
)


def uncertain_limits() -> tuple[float, float]:
    """--uncertain. UsageError for what is no range of probabilities."""
    try:
        low, high = map(float, _UNCERTAIN.value)
    except ValueError:
        low, high = 1.0, 0.0
    if not 0 <= low < high <= 1:
        raise UsageError(f"--uncertain={','.join(_UNCERTAIN.value)}: give two probabilities such as 0.25,0.75")
    return low, high


def index_row(doubt: Doubt, regions: Sequence[Region], useful: float) -> dict[str, object]:
    """The columns of index.csv for a slide, but for its rank and files."""
    areas = [region.measurements["area µm^2"] for region in regions]
    weighted = sum(area * region.measurements["confidence"] for area, region in zip(areas, regions))
    return {
        "slide_id": doubt.slide_id,
        "usefulness": round(useful, 4),
        "nearness": round(doubt.nearness, 4),
        "disagreement": round(doubt.disagreement, 4),
        "uncertain_mm2": round(doubt.uncertain_mm2, 4),
        "score": doubt.score,
        "peak": doubt.peak,
        "outlines": len(regions),
        "outlined_mm2": round(outlined_mm2(regions), 4),
        "confidence": round(weighted / sum(areas), 4) if areas else None,
    }


def doubts_of(slides: Sequence[PredictedSlide], outlines: Sequence[Sequence[Region]]) -> list[Doubt]:
    """What makes each slide worth a look. outlines: of each."""
    limits = uncertain_limits()
    return [
        Doubt.of(
            slide.slide_id,
            slide.found,
            slide.score,
            regions,
            slide_threshold=slide.threshold if _SLIDE_THRESHOLD.value is None else _SLIDE_THRESHOLD.value,
            map_threshold=_THRESHOLD.value,
            limits=limits,
        )
        for slide, regions in zip(slides, outlines)
    ]


def write_proposals(slides: Sequence[PredictedSlide], folder: ProposalFolder) -> dict[str, pathlib.Path]:
    """Outlines of every slide, and index.csv. Returns slide -> file to correct."""
    rule = OutlineRule(_THRESHOLD.value, _LABEL.value, _LEAST.value, _SMOOTH.value, _SIMPLIFY.value)
    outlines = [find_outlines(slide.found, rule) for slide in slides]
    doubts = doubts_of(slides, outlines)
    useful, annotations = usefulness(doubts), {}
    rows: list[dict[str, object]] = []
    for rank, place in enumerate(order(doubts, _ORDER.value), 1):
        slide, regions = slides[place], outlines[place]
        corrected = folder.corrected(slide.slide_id)
        file = corrected or folder.write(slide.slide_id, regions, offset=slide.offset)
        annotations[slide.slide_id] = file
        numbers = index_row(doubts[place], regions, float(useful[place]))
        files = {
            "corrected": int(corrected is not None),
            "annotation": file.relative_to(folder.path),
            "slide": slide.path,
        }
        rows.append({"rank": rank, **numbers, **files})
    write_table(folder.path / "index.csv", {name: [row[name] for row in rows] for name in rows[0]})
    done = sum(row["corrected"] == 1 for row in rows)
    print(f"{len(rows)} slides, {done} of them corrected before: {folder.path / 'index.csv'}")
    return annotations


def main() -> None:
    """Proposes, orders, and writes."""
    uncertain_limits()
    if _LABEL.value in EXCLUSION_GROUPS:
        raise UsageError(f"--label={_LABEL.value}: outlines of this class are cut out of others: give another")
    out = pathlib.Path(str(_OUT.value)).absolute()
    check_writable(out)
    records, wanted = None, None
    if _COHORT.value is not None:
        records = read_cohort(_COHORT.value, require_labels=False).records
        wanted = {record.slide_id for record in records if record.annotation is None}
        if len(wanted) < len(records):
            print(f"{len(records) - len(wanted)} slides of {_COHORT.value} have annotations and are left out")
    maps = MAPS if _MAP.value is None else (_MAP.value,)
    slides = read_predictions(pathlib.Path(str(_PREDICTIONS.value)), maps, wanted=wanted)
    folder = ProposalFolder(out, _FORMAT.value)
    annotations = write_proposals(slides, folder)
    if records is not None:
        print(folder.write_cohort(records, annotations, read_columns(str(_COHORT.value), REVIEWED)))


if __name__ == "__main__":
    run(main)
