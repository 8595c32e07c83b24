"""What is known of a slide's tiles, gathered block by block, and its file: a run that was killed goes on from there, to the bit.

A block is what scanning reads at once. Only whole blocks are saved: the rest of one would be read as another region, whose
pixels may differ where it is resampled.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from data_pipelines.files import atomic_write
from data_pipelines.tiles import Tiles
from srcc_jax.kernels.heat_maps import HeatMap, TileMapAverage


@dataclasses.dataclass(frozen=True)
class Journal:
    """seen bool [N]: the tiles that are settled; logit float32 [N], NaN where none; reasons: row -> why it could not be read;
    cam_side: side of the tiles' Grad-CAM maps, cam_sum float32 [H, W] and cam_times int32 [N] their sums (`TileMapAverage.sums`),
    or 0 and empty; basis: what all this rests on; seconds: what each stage took so far."""

    basis: Mapping[str, Any]
    seen: np.ndarray
    logit: np.ndarray
    reasons: Mapping[int, str]
    cam_side: int
    cam_sum: np.ndarray
    cam_times: np.ndarray
    seconds: Mapping[str, float]

    def save(self, path: pathlib.Path) -> None:
        """Writes .npz, whole or not at all."""
        header = {"basis": self.basis, "reasons": self.reasons, "seconds": self.seconds, "cam_side": self.cam_side}
        arrays = {name: getattr(self, name) for name in ("seen", "logit", "cam_sum", "cam_times")}
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, header=np.str_(json.dumps(header)), **arrays)

    @classmethod
    def load(cls, path: pathlib.Path) -> Journal | None:
        """What `save` wrote; None where there is nothing, or nothing that can be read: the slide is then begun anew."""
        try:
            with np.load(path, allow_pickle=False) as file:
                header = json.loads(str(file["header"]))
                arrays = {name: file[name] for name in ("seen", "logit", "cam_sum", "cam_times")}
            reasons = {int(row): reason for row, reason in header["reasons"].items()}
            return cls(
                header["basis"], reasons=reasons, cam_side=header["cam_side"], seconds=header["seconds"], **arrays
            )
        except (FileNotFoundError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None

    def fits(self, basis: Mapping[str, Any], tiles: int, *, cam: bool) -> bool:
        """Whether a slide of so many tiles, on this basis, can go on from here."""
        has_cam = self.cam_side > 0 or not np.isfinite(self.logit).any()
        return dict(self.basis) == dict(basis) and len(self.seen) == tiles and (has_cam or not cam)


class SlideScores:
    """Logits and the mean Grad-CAM of one slide, as its tiles come: block by block, in the order of `tiles.blocks(block)`."""

    def __init__(self, tiles: Tiles, *, slide_mpp: float, block: int):
        blocks = tiles.blocks(block)
        self.tiles = tiles
        self.logit = np.full(len(tiles), np.nan, np.float32)
        self.seen = np.zeros(len(tiles), bool)
        self.reasons: dict[int, str] = {}
        self.scale: dict[str, Any] = {
            "tile": tiles.grid.tile,
            "stride": tiles.grid.stride,
            "mpp": tiles.grid.mpp,
            "slide_mpp": slide_mpp,
        }
        self._block = np.empty(len(tiles), np.int64)
        for number, rows in enumerate(blocks):
            self._block[rows] = number
        self._left = np.asarray([len(rows) for rows in blocks])
        self._begun = np.zeros(len(blocks), bool)  # a window of it was scored: its Grad-CAM is in the sums
        self._cam_side = 0
        self._cam: TileMapAverage | None = None

    @property
    def complete(self) -> bool:
        return bool(self.seen.all())

    @property
    def between_blocks(self) -> bool:
        """Whether every block that was begun is complete."""
        return not (self._begun & (self._left > 0)).any()

    def blocks_of(self, rows: np.ndarray) -> list[np.ndarray]:
        """Positions in `rows`, cut where a block ends."""
        ends = np.flatnonzero(np.diff(self._block[rows])) + 1
        return np.split(np.arange(len(rows)), ends) if len(rows) else []

    def add(self, rows: np.ndarray, logit: np.ndarray, cam: np.ndarray | None) -> None:
        """Results [n] of tiles of one block; cam [n, h, w] or None."""
        self.logit[rows] = logit
        if cam is not None:
            self._average(cam.shape[-1]).add(rows, cam)
        self._begun[self._block[rows]] = True
        self._settle(rows)

    def fail(self, reasons: Mapping[int, str]) -> None:
        """Tiles that could not be read: row -> reason."""
        self.reasons |= reasons
        self._settle(np.asarray(list(reasons), np.int64))

    def cam_map(self) -> HeatMap | None:
        """The mean Grad-CAM of the tiles so far; None where there is none."""
        return None if self._cam is None else self._cam.result()

    def journal(self, basis: Mapping[str, Any], seconds: Mapping[str, float]) -> Journal:
        """A copy of what stands between blocks. ValueError elsewhere."""
        if not self.between_blocks:
            raise ValueError("a block is half done")
        whole = self._left[self._block] == 0
        total, times = self._cam.sums() if self._cam else (np.zeros((0, 0), np.float32), np.zeros(0, np.int32))
        reasons = {row: reason for row, reason in self.reasons.items() if whole[row]}
        logit = np.where(whole, self.logit, np.float32(np.nan))
        return Journal(basis, whole, logit, reasons, self._cam_side, total, times, dict(seconds))

    def resume(self, journal: Journal, *, cam: bool) -> None:
        """Goes on from a journal of the same tiles that `fits`. Only on scores to which nothing was added."""
        self.logit, self.reasons = journal.logit.copy(), dict(journal.reasons)
        if cam and journal.cam_side:
            self._average(journal.cam_side).restore(journal.cam_sum, journal.cam_times)
        self._settle(np.flatnonzero(journal.seen))

    def _settle(self, rows: np.ndarray) -> None:
        np.subtract.at(self._left, self._block[rows], 1)
        self.seen[rows] = True

    def _average(self, side: int) -> TileMapAverage:
        if self._cam is None:
            self._cam = TileMapAverage(self.tiles.x, self.tiles.y, size=side, **self.scale)
            self._cam_side = side
        return self._cam
