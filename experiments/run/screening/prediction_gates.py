"""What happens to a slide before any patch of it is judged: its tissue by the foreground network, and whether it is in focus."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from data_pipelines.cohort import SlideRecord
from data_pipelines.prepare import PreparedSlide, prepare_slide
from data_pipelines.quality import SlideQuality
from data_pipelines.slides import RegionError, SlideError, open_slide
from data_pipelines.tiles import Grid, Tiles
from data_pipelines.tissue import tissue_mask
from experiments.run.screening.gates import ForegroundFinder, blur_logits
from experiments.run.screening.model import GateSpec
from experiments.run.slides import UNEXPECTED

FOREGROUND, OTSU = "foreground", "otsu"
AGREEMENT = 0.7  # ours: tissue of network and Otsu's threshold whose intersection over union is below is worth a look
_BATCH = 32


@dataclasses.dataclass(frozen=True)
class GatedQuality(SlideQuality):
    """notes: further lines for somebody to look at."""

    notes: tuple[str, ...]

    def flags(self) -> list[str]:
        return [*super().flags(), *self.notes]


@dataclasses.dataclass(frozen=True)
class GatedSlide(PreparedSlide):
    """tissue_rule: by which its tissue was found. blurred: the share of the patches looked at that are out of focus; None where none
    was looked at, or none of them could be read."""

    tissue_rule: str
    blurred: float | None


@dataclasses.dataclass(frozen=True, eq=False)
class SlideGates:
    """variables: "foreground" and "blur" {"params"}, where the model has these networks; spec: how they see slides."""

    variables: Mapping[str, Any]
    spec: GateSpec

    def prepare(
        self,
        record: SlideRecord,
        grid: Grid,
        *,
        min_tissue: float,
        tissue_rule: str,
        focus_patches: int,
        judged_stride: int,
        mpp_override: float | None,
    ) -> GatedSlide:
        """The open slide with its tiles. tissue_rule: "foreground", for which "otsu" stands in where the network finds no tissue at all, or
        "otsu"; focus_patches: how many, of the grid of judged_stride, are looked at for the focus. Raises SlideError."""
        used, notes = [OTSU], []

        def find_tissue(thumbnail: np.ndarray) -> np.ndarray:
            simple = tissue_mask(thumbnail)
            if tissue_rule == OTSU:
                return simple
            finder = ForegroundFinder(self.variables[FOREGROUND], self.spec)
            with open_slide(record.path, mpp_cohort=record.mpp, mpp_override=mpp_override) as slide:
                found = finder.mask(slide, shape=thumbnail.shape[:2])  # from a picture at the network's own scale
            if not found.any():
                notes.append("the foreground network finds no tissue: found by Otsu's threshold")
                return simple
            used[0] = FOREGROUND
            agreement = (found & simple).sum() / (found | simple).sum()
            if agreement < AGREEMENT:
                notes.append(
                    f"tissue of the foreground network and of Otsu's threshold differ: they share {agreement:.0%}"
                )
            return found

        prepared = prepare_slide(
            record, grid, min_tissue=min_tissue, mpp_override=mpp_override, find_tissue=find_tissue
        )
        looked_at = np.flatnonzero(on_judged_grid(prepared.tiles, judged_stride))
        blurred = self.blurred_share(prepared, looked_at, focus_patches) if "blur" in self.variables else None
        quality = GatedQuality(**vars(prepared.quality), notes=tuple(notes))
        parts = {field.name: getattr(prepared, field.name) for field in dataclasses.fields(PreparedSlide)}
        return GatedSlide(**{**parts, "quality": quality}, tissue_rule=used[0], blurred=blurred)

    def blurred_share(self, prepared: PreparedSlide, rows: np.ndarray, count: int) -> float | None:
        """Of up to `count` tiles, evenly spread over these rows, the share whose middle square is out of focus."""
        rows = rows[np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int))]
        squares = [square for row in rows if (square := self._square(prepared, row)) is not None]
        if not squares:
            return None
        blurred = 0
        for begin in range(0, len(squares), _BATCH):
            part = np.stack(squares[begin : begin + _BATCH])
            padded = np.pad(part, [(0, _BATCH - len(part)), (0, 0), (0, 0), (0, 0)])
            blurred += int((np.asarray(blur_logits(self.variables["blur"], padded))[: len(part)] > 0).sum())
        return blurred / len(squares)

    def _square(self, prepared: PreparedSlide, row: int) -> np.ndarray | None:
        """uint8 [side, side, 3] from the middle of a tile; None where it cannot be read, which is told when the tile is."""
        tiles, slide, side = prepared.tiles, prepared.slide, self.spec.blur_side
        inset = (tiles.tile - side) / 2 * tiles.mpp / slide.mpp
        try:
            return slide.read(tiles.x[row] + inset, tiles.y[row] + inset, side, side, tiles.mpp)
        except (RegionError, SlideError, *UNEXPECTED):
            return None


def on_judged_grid(tiles: Tiles, stride: int) -> np.ndarray:
    """bool [N]: the tiles of a finer grid that are also places of the grid of this stride; all of them where none is."""
    found = (tiles.u % stride == 0) & (tiles.v % stride == 0)
    return found if found.any() else np.ones(len(tiles), bool)
