"""A slide under gastric screening: its patches become a map of lesion, a probability, two verdicts, and files (Yu et al. 2019)."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from data_pipelines.cohort import SlideRecord
from data_pipelines.exports import write_json
from data_pipelines.prepare import PreparedSlide
from data_pipelines.scan import ScanShape
from data_pipelines.tiles import Tiles
from experiments.run.journal import Journal, SlideScores
from experiments.run.scoring import probability
from experiments.run.screening.features import BLOCK, FEATURES, LESION, LOGIT
from experiments.run.screening.prediction_gates import GatedSlide, SlideGates, on_judged_grid
from experiments.run.slide_formats import DEFAULT_FORMATS, FORMATS, PROBABILITY_MAP, FinishedSlide, MapStyle, Writer
from experiments.run.slide_outputs import ValueCollector
from experiments.run.slide_quality import write_slide_page
from experiments.run.slide_result import PROBABILITY, SlideResult
from experiments.run.slide_state import Place, TileSettings
from experiments.run.task import Begun
from srcc_jax.kernels.heat_maps import HeatMap, TileMapAverage, paint_tiles

MEASURES = (PROBABILITY, "verdict", "verdict_validation", "patches", "lesion_mm2", "blurred")
LESION_MAP = MapStyle("lesion probability", LESION, (0.0, 1.0))
CALLED = 0.5  # lesion probability from which on a cell counts for lesion_mm2, as pixels do when patches are judged
_TAPERED_AT_ONCE = 256  # maps whose weights are summed at once
BLURRED = "blurred"  # the status of a slide that is out of focus

JudgeSlide = Callable[[np.ndarray], float]
"""Features float32 [k' <= k, D] of a slide's most malignant patches -> its probability."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScreeningSettings(TileSettings):
    """What verdicts and lesion maps rest on. judged_stride: of the grid whose patches the verdict is made of; top_k: how many, with
    `features` numbers each; cell: px of the grid's scale along a cell of the lesion map; tissue, focus_patches: of `SlideGates.prepare`;
    most_blurred: a slide with a larger share of them out of focus is not judged; threshold, validation_threshold: a slide is positive
    above; thresholds: lesion probabilities from which on regions are outlined."""

    files_alone = ("focus patches", "most blurred", "threshold", "validation threshold", "formats", "thresholds")

    judged_stride: int
    top_k: int
    features: int
    cell: int
    tissue: str
    focus_patches: int
    most_blurred: float
    threshold: float
    validation_threshold: float
    formats: tuple[str, ...]
    thresholds: tuple[float, ...]

    @property
    def shape(self) -> ScanShape:
        """Few windows: they are large."""
        return ScanShape.of(self.grid, block=BLOCK)

    def basis(self, record: SlideRecord) -> dict[str, Any]:
        return super().basis(record) | {
            "judged stride": self.judged_stride,
            "top k": self.top_k,
            "cell": self.cell,
            "tissue": self.tissue,
            "focus patches": self.focus_patches,
            "most blurred": self.most_blurred,
            "threshold": self.threshold,
            "validation threshold": self.validation_threshold,
            "formats": ",".join(self.formats),
            "thresholds": ",".join(map(str, self.thresholds)),
        }


class ScreeningProgress(SlideScores):
    """Malignancy of the patches, the weighted mean of their overlapping lesion maps, and the features of the best patches so far."""

    def __init__(self, tiles: Tiles, settings: ScreeningSettings, *, slide_mpp: float):
        super().__init__(tiles, slide_mpp=slide_mpp, block=settings.shape.block, output=LOGIT, maps=LESION)
        self._judged = on_judged_grid(tiles, settings.judged_stride)
        self._top_k = settings.top_k
        self.best = np.zeros(0, np.int64)  # rows, the highest logit first, of equals the lowest row
        self.features = np.zeros((0, settings.features), np.float32)  # theirs

    def keep(self, rows: np.ndarray, outputs: Mapping[str, np.ndarray]) -> None:
        if LESION in outputs:
            outputs = {**outputs, LESION: outputs[LESION] * tapering(outputs[LESION].shape[-1])}
        super().keep(rows, outputs)
        mine = self._judged[rows] & np.isfinite(self.values[rows])
        found = np.concatenate([self.best, rows[mine]])
        features = np.concatenate([self.features, outputs[FEATURES][mine]])
        order = np.lexsort((found, -self.values[found]))[: self._top_k]
        self.best, self.features = found[order], features[order]

    def kept(self, whole: np.ndarray) -> dict[str, np.ndarray]:
        return super().kept(whole) | {"best": self.best.copy(), "best_features": self.features.copy()}

    def restore(self, kept: Mapping[str, np.ndarray]) -> None:
        super().restore(kept)
        self.best, self.features = kept["best"], kept["best_features"]

    def mean_map(self) -> HeatMap | None:
        """The weighted mean of the lesion maps so far, in which each patch counts most in its middle and hardly at its edge: where patches
        overlap, none of them has a visible edge. None where there is none."""
        total = super().mean_map()
        if total is None or self._mean is None:
            return None
        weight = TileMapAverage(self.tiles.x, self.tiles.y, size=self._map_side, **self.scale)
        rows, window = np.flatnonzero(self._mean.sums()[1]), tapering(self._map_side)
        for part in np.array_split(rows, -(-len(rows) // _TAPERED_AT_ONCE)):
            weight.add(part, np.broadcast_to(window, (len(part), *window.shape)))
        return dataclasses.replace(total, values=total.values / weight.result().values)

    def leave_out(self) -> None:
        """Has no tile scored; a journal of this says that none was."""
        self.seen[:] = True


def tapering(side: int) -> np.ndarray:
    """float32 [side, side]: a Hann window, whose copies half a side apart sum to 1; above 0 everywhere."""
    line = np.sin(np.pi * (np.arange(side) + 0.5) / side) ** 2
    return np.outer(line, line).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class ScreenedSlide(FinishedSlide):
    """probability: of the slide, None where no patch could be read; patches: how many it is made of; lesion_mm2: None of a network
    without a map of lesion."""

    probability: float | None = None
    patches: int = 0
    lesion_mm2: float | None = None


def _write_page(folder: pathlib.Path, slide: ScreenedSlide) -> None:
    pictures = {style.unit: style.picture for style in slide.maps}
    write_slide_page(
        folder, slide.prepared, slide.values, pictures=pictures, unit=PROBABILITY_MAP.unit, headline=slide.headline
    )


WRITERS: dict[str, Writer] = {**FORMATS, "html": _write_page}
SCREENING_FORMATS = (*DEFAULT_FORMATS, "asap")


class ScreeningCollector(ValueCollector):
    """Gathers what the network of the patches finds; of a slide out of focus nothing. judge: the screening network."""

    def __init__(self, settings: ScreeningSettings, begun: Begun, first_row: int, *, judge: JudgeSlide):
        prepared, self._settings, self._judge = begun.prepared, settings, judge
        assert isinstance(prepared, GatedSlide)
        self._gated = prepared
        self._refused = prepared.blurred is not None and prepared.blurred > settings.most_blurred
        self._scores = ScreeningProgress(prepared.tiles, settings, slide_mpp=prepared.slide.mpp)
        if self._refused:
            self._scores.leave_out()
        super().__init__(
            prepared,
            self._scores,
            first_row=first_row,
            journal=None if self._refused else begun.journal,
            formats=settings.formats,
            writers=WRITERS,
        )

    def write(self, folder: pathlib.Path) -> SlideResult:
        return self._write_refused(folder) if self._refused else super().write(folder)

    def finished(self, thumbnail: np.ndarray, downsample: float) -> ScreenedSlide:
        tiles, scores = self.prepared.tiles, self._scores
        values, lesion = probability(scores.values), scores.mean_map()
        maps: dict[MapStyle, HeatMap] = {} if lesion is None else {LESION_MAP: lesion}
        maps[PROBABILITY_MAP] = paint_tiles(values, tiles.x, tiles.y, **scores.scale)
        made = ScreenedSlide(
            self.prepared,
            values,
            PROBABILITY,
            maps,
            thumbnail,
            downsample,
            self._settings.thresholds,
            probability=self._judge(scores.features) if len(scores.best) else None,
            patches=len(scores.best),
            lesion_mm2=None if lesion is None else float((lesion.values >= CALLED).sum()) * (lesion.mpp / 1000) ** 2,
        )
        return dataclasses.replace(made, headline=self._headline(made))

    def found(self, slide: FinishedSlide) -> dict[str, float | None]:
        assert isinstance(slide, ScreenedSlide)
        settings, score, blurred = self._settings, slide.probability, self._gated.blurred
        if score is None:
            return dict.fromkeys(MEASURES) | {"blurred": blurred}
        verdicts = (int(score > settings.threshold), int(score > settings.validation_threshold))
        return dict(zip(MEASURES, (score, *verdicts, slide.patches, slide.lesion_mm2, blurred)))

    def about(self, result: SlideResult) -> dict[str, Any]:
        """Also how the tissue was found and what the verdicts are measured by."""
        settings = self._settings
        thresholds = {"verdict": settings.threshold, "verdict_validation": settings.validation_threshold}
        return super().about(result) | {"tissue_rule": self._gated.tissue_rule, "verdict_thresholds": thresholds}

    def _headline(self, slide: ScreenedSlide) -> str:
        """Empty where no patch could be read."""
        if slide.probability is None:
            return ""
        settings = self._settings
        verdict = "positive" if slide.probability > settings.threshold else "negative"
        lesion = "" if slide.lesion_mm2 is None else f", {slide.lesion_mm2:.3g} mm² of lesion"
        return (
            f"{verdict} at {settings.threshold:g}: probability {slide.probability:.4f} from {slide.patches} patches, "
            f"threshold of the validation slides {settings.validation_threshold:.4f}{lesion}"
        )

    def _write_refused(self, folder: pathlib.Path) -> SlideResult:
        reason = f"out of focus: {self._gated.blurred:.0%} of the patches looked at; not judged, scan it again"
        measures = dict.fromkeys(MEASURES[1:]) | {"blurred": self._gated.blurred}
        result = dataclasses.replace(self.result(done=True, measures=measures, problem=reason), status=BLURRED)
        values = np.full(len(self.prepared.tiles), np.nan)
        if "html" in self._settings.formats:
            write_slide_page(folder, self.prepared, values, pictures={}, headline=reason)
        flags = {"flags": ["out of focus", *self.prepared.quality.flags()], "top_tiles": []}
        write_json(folder / "slide.json", self.about(result) | flags | self.lost())
        self.prepared.slide.close()
        return result


@dataclasses.dataclass(frozen=True, eq=False)
class ScreeningTask:
    """Focus, tissue, lesion map and verdicts of each slide."""

    settings: ScreeningSettings
    gates: SlideGates
    judge: JudgeSlide
    doing, done = "predicting", "predicted"
    measures = MEASURES

    def prepare(self, record: SlideRecord) -> PreparedSlide:
        settings = self.settings
        return self.gates.prepare(
            record,
            settings.grid,
            min_tissue=settings.min_tissue,
            tissue_rule=settings.tissue,
            focus_patches=settings.focus_patches,
            judged_stride=settings.judged_stride,
            mpp_override=settings.mpp_override,
        )

    def fits(self, journal: Journal, place: Place, basis: Mapping[str, Any], tiles: int) -> bool:
        return journal.fits(basis, tiles)

    def collector(self, begun: Begun, first_row: int) -> ScreeningCollector:
        return ScreeningCollector(self.settings, begun, first_row, judge=self.judge)
