"""Slide probabilities, heat maps and Grad-CAM of slides, with a finished model.

    python -m experiments.predict_slides --workdir=runs/ws --slides=<file, folder or CSV> --out=out

Leaves out/slides.csv (a row for every slide given), a folder for each slide, out/summary.json and out/report.html. The exit status is
0 only when every slide is done.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from absl import flags

from data_pipelines.annotations import AnnotationError
from data_pipelines.cohort import SlideRecord
from data_pipelines.exports import write_json, write_table, write_text
from data_pipelines.files import check_writable
from data_pipelines.prepare import PreparedSlide, prepare_slide
from data_pipelines.scan import ScanJob, ScanShape, prefetch, scan
from data_pipelines.slides import RegionError, SlideError
from data_pipelines.tiles import Grid
from experiments.run.evaluation import Merit, measure
from experiments.run.model import Model
from experiments.run.program import UsageError, run, start_devices
from experiments.run.progress import progress
from experiments.run.scoring import TileScorer
from experiments.run.slide_outputs import PICTURES, SlideCollector, SlideResult
from experiments.run.slides import NO_TISSUE, slide_records
from experiments.run.workdir import Workdir, versions
from srcc_jax.parallel import make_mesh
from srcc_jax.report import Report, SlideRow, render

_WORKDIR = flags.DEFINE_string("workdir", None, "work directory of a finished model", required=True)
_SLIDES = flags.DEFINE_string(
    "slides", None, "a slide, a folder (searched with its sub-folders) or a cohort CSV", required=True
)
_OUT = flags.DEFINE_string("out", None, "folder for the results", required=True)
_SPLIT = flags.DEFINE_string("split", None, "of a cohort CSV, predict this split only (train, validation or test)")
_STRIDE = flags.DEFINE_integer(
    "stride",
    None,
    "stride in pixels, where it should not be the model's; 32 is the paper's for Grad-CAM",
    lower_bound=1,
)
_GRADCAM = flags.DEFINE_bool("gradcam", True, "make Grad-CAM maps")
_MPP_OVERRIDE = flags.DEFINE_float(
    "mpp_override", None, "µm per pixel of level 0 for slides that do not say it themselves"
)
_THREADS = flags.DEFINE_integer("threads", 2, "threads that read slides", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "seed of the bootstrap", lower_bound=0)


class Prediction:
    """The cohort on its way through: slides are prepared ahead, their tiles share batches, and files are written behind."""

    def __init__(self, records: Sequence[SlideRecord], grid: Grid, *, min_tissue: float, out: pathlib.Path):
        self._records = records
        self._grid = grid
        self._min_tissue = min_tissue
        self._out = out
        self._open: list[SlideCollector] = []
        self._results: dict[str, SlideResult] = {}
        self._next_row = 0
        self._prepared = 0
        self._noting = threading.Lock()

    def run(self, scorer: TileScorer, model: Model, *, threads: int) -> list[SlideResult]:
        """Results in the order of the records."""
        folded = scorer.fold(model.variables)
        shape = ScanShape.of(self._grid)
        with ThreadPoolExecutor(1, thread_name_prefix="write") as writer, progress(None, "predicting") as bar:
            writing: list[Future[SlideResult]] = []
            batches = prefetch(scan(self._jobs(), shape, threads=threads), depth=2)
            with contextlib.closing(batches):
                for scored in scorer.score(folded, batches):
                    bar.total = self._estimated_tiles()
                    bar.update(sum(collector.add(scored) for collector in self._open))
                    for collector in [c for c in self._open if c.complete]:
                        self._open.remove(collector)
                        folder = self._out / "slides" / collector.prepared.record.slide_id
                        writing.append(writer.submit(collector.write, folder))
                    writing = [future for future in writing if not self._keep(future)]
            for future in writing:
                self._note(future.result())
        return [self._results[record.slide_id] for record in self._records]

    def _jobs(self) -> Iterator[ScanJob]:
        for record in self._records:
            self._prepared += 1
            try:
                prepared = prepare_slide(
                    record, self._grid, min_tissue=self._min_tissue, mpp_override=_MPP_OVERRIDE.value
                )
            except (SlideError, RegionError, AnnotationError) as error:
                self._note(SlideResult(record.slide_id, str(record.path), "failed", str(error)))
                continue
            if not len(prepared.tiles):
                self._note(self._empty(prepared))
                continue
            collector = SlideCollector(prepared, first_row=self._next_row)
            self._next_row += len(prepared.tiles)
            self._open.append(collector)
            yield ScanJob.of_open(prepared.slide, prepared.tiles, collector.rows)

    def _estimated_tiles(self) -> int:
        """Tiles of the cohort, as far as it is known: the slides still to be opened are taken to be like those before them."""
        return round(self._next_row / max(1, self._prepared) * len(self._records))

    def _empty(self, prepared: PreparedSlide) -> SlideResult:
        prepared.slide.close()
        slide, record = prepared.slide, prepared.record
        return SlideResult(record.slide_id, str(record.path), "failed", NO_TISSUE, None, slide.mpp, slide.mpp_source)

    def _keep(self, future: Future[SlideResult]) -> bool:
        if future.done():
            self._note(future.result())
        return future.done()

    def _note(self, result: SlideResult) -> None:
        """Adds a row and writes the table again, so that it always tells how far the cohort has come. Two threads come here."""
        with self._noting:
            self._results[result.slide_id] = result
            rows = [self._results[r.slide_id] for r in self._records if r.slide_id in self._results]
            names = [field.name for field in dataclasses.fields(SlideResult)]
            write_table(self._out / "slides.csv", {name: [getattr(row, name) for row in rows] for name in names})


def training_curves(workdir: Workdir) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Training and validation loss of each stage over its steps, as far as the work directory has a log of them."""
    curves = {}
    for stage in ("fs", "ws"):
        rows = workdir.history(stage)
        for key, name in (("loss", "training"), ("validation_loss", "validation")):
            points = [(row["step"], row[key]) for row in rows if key in row]
            if points:
                steps, values = zip(*points)
                curves[f"{stage.upper()} {name}"] = (np.asarray(steps), np.asarray(values))
    return curves


def write_report(
    model: Model,
    grid: Grid,
    merit: Merit,
    records: Sequence[SlideRecord],
    results: Sequence[SlideResult],
    out: pathlib.Path,
    speed: dict,
) -> None:
    """summary.json and report.html."""
    slides = [
        SlideRow(
            slide_id=row.slide_id,
            label=record.label or "",
            patient_id=record.patient_id,
            probability=row.probability,
            status=row.status,
            reason=row.reason,
            tiles=row.tiles,
            images=_pictures(out, row.slide_id),
        )
        for record, row in zip(records, results)
    ]
    report = Report(
        title=f"{model.positive} in {len(results)} slides",
        subtitle=f"{model.about['name']}, {grid.mpp:g} µm per pixel, tiles of {grid.tile} px at stride {grid.stride}",
        summary=merit.summary,
        notes=merit.remarks,
        warnings=[f"{row.slide_id}: {row.reason}" for row in results if row.reason],
        roc=merit.curves,
        slides=slides,
        training=training_curves(Workdir(pathlib.Path(_WORKDIR.value))),
        configuration={**model.about["settings"], **speed},
        versions=versions(),
    )
    write_text(out / "report.html", render(report))
    failed = {row.slide_id: row.reason for row in results if row.status == "failed"}
    auc = merit.summary["ROC AUC"]["slide"] if merit.summary else None
    numbers = {
        "slide_auc": auc,
        "metrics": merit.summary,
        "slides": len(results),
        "failed": failed,
        **speed,
        "versions": versions(),
    }
    write_json(out / "summary.json", numbers)


def _pictures(out: pathlib.Path, slide_id: str) -> dict[str, bytes | str]:
    found = {name: f"slides/{slide_id}/{file}" for name, file in PICTURES.items()}
    return {name: path for name, path in found.items() if (out / path).exists()}


def main() -> int:
    """Predicts, reports, and returns the exit status."""
    began = time.perf_counter()
    start_devices()
    model = Model.load(_WORKDIR.value)
    records = slide_records(_SLIDES.value, _SPLIT.value)
    out = pathlib.Path(_OUT.value).absolute()
    check_writable(out)
    grid = dataclasses.replace(model.grid, stride=_STRIDE.value or model.grid.stride)
    if grid.stride > grid.tile:
        raise UsageError(
            f"--stride={grid.stride} is larger than the model's tile of {grid.tile} px: tissue between tiles is not seen"
        )
    scorer = TileScorer(model.architecture, tile=grid.tile, mesh=make_mesh(), cam=_GRADCAM.value)
    prediction = Prediction(records, grid, min_tissue=model.min_tissue, out=out)
    results = prediction.run(scorer, model, threads=_THREADS.value)
    seconds = time.perf_counter() - began
    speed = {
        "tiles": scorer.tiles,
        "tiles_per_second": scorer.tiles / scorer.seconds if scorer.seconds else 0.0,
        "device_waiting_share": scorer.waiting_share,
        "seconds": {"prediction": seconds},
    }
    merit = measure(
        records,
        [row.probability for row in results],
        positive=model.positive,
        name=model.about["name"],
        seed=_SEED.value,
    )
    write_report(model, grid, merit, records, results, out, speed)
    if not merit.summary:
        print(merit.remarks[0])
    failed = [row for row in results if row.status == "failed"]
    print(
        f"{len(results) - len(failed)} of {len(results)} slides done, {scorer.tiles} tiles in {seconds:.1f} s "
        f"({speed['tiles_per_second']:.0f} tiles/s; the device waited {scorer.waiting_share:.1%} of the time): {out / 'report.html'}"
    )
    for row in failed:
        print(f"failed: {row.slide_id}: {row.reason}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    run(main)
