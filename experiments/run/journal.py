"""What is known of a slide's tiles, gathered block by block, and its file: a run that was killed goes on from there, to the bit.

A block is what scanning reads at once. Only whole blocks are saved: the rest of one would be read as another region, whose
pixels may differ where it is resampled.
"""

from __future__ import annotations

import abc
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

_KEPT = "kept."  # how the names of arrays begin that the kind of work keeps


@dataclasses.dataclass(frozen=True)
class Journal:
    """seen bool [N]: the tiles that are settled; reasons: row -> why it could not be read; kept: name -> array, what else the kind
    of work knows of them; basis: what all this rests on; seconds: what each stage took so far."""

    basis: Mapping[str, Any]
    seen: np.ndarray
    reasons: Mapping[int, str]
    kept: Mapping[str, np.ndarray]
    seconds: Mapping[str, float]

    def save(self, path: pathlib.Path) -> None:
        """Writes .npz, whole or not at all."""
        header = {"basis": self.basis, "reasons": self.reasons, "seconds": self.seconds}
        kept: dict[str, Any] = {_KEPT + name: array for name, array in self.kept.items()}
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, header=np.str_(json.dumps(header)), seen=self.seen, **kept)

    @classmethod
    def load(cls, path: pathlib.Path) -> Journal | None:
        """What `save` wrote; None where there is nothing, or nothing that can be read: the slide is then begun anew."""
        try:
            with np.load(path, allow_pickle=False) as file:
                header, seen = json.loads(str(file["header"])), file["seen"]
                kept = {name.removeprefix(_KEPT): file[name] for name in file.files if name.startswith(_KEPT)}
            reasons = {int(row): reason for row, reason in header["reasons"].items()}
            return cls(header["basis"], seen, reasons, kept, header["seconds"])
        except (FileNotFoundError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None

    def fits(self, basis: Mapping[str, Any], tiles: int) -> bool:
        """Whether a slide of so many tiles, on this basis, can go on from here."""
        return dict(self.basis) == dict(basis) and len(self.seen) == tiles


class SlideProgress(abc.ABC):
    """Which tiles of one slide are settled, block by block in the order of `tiles.blocks(block)`. What is kept of them is up to
    its kind, which implements the three methods at the end."""

    def __init__(self, tiles: Tiles, *, block: int):
        blocks = tiles.blocks(block)
        self.tiles = tiles
        self.seen = np.zeros(len(tiles), bool)
        self.reasons: dict[int, str] = {}
        self._block = np.empty(len(tiles), np.int64)
        for number, rows in enumerate(blocks):
            self._block[rows] = number
        self._left = np.asarray([len(rows) for rows in blocks])
        self._begun = np.zeros(len(blocks), bool)  # a window of it was scored: sums over tiles hold a part of it

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

    def add(self, rows: np.ndarray, outputs: Mapping[str, np.ndarray]) -> None:
        """The network's outputs, name -> array [n, ...], for tiles of one block."""
        self.keep(rows, outputs)
        self._begun[self._block[rows]] = True
        self._settle(rows)

    def fail(self, reasons: Mapping[int, str]) -> None:
        """Tiles that could not be read: row -> reason."""
        self.reasons |= reasons
        self._settle(np.asarray(list(reasons), np.int64))

    def journal(self, basis: Mapping[str, Any], seconds: Mapping[str, float]) -> Journal:
        """A copy of what stands between blocks. ValueError elsewhere."""
        if not self.between_blocks:
            raise ValueError("a block is half done")
        whole = self._left[self._block] == 0
        reasons = {row: reason for row, reason in self.reasons.items() if whole[row]}
        return Journal(basis, whole, reasons, self.kept(whole), dict(seconds))

    def resume(self, journal: Journal) -> None:
        """Goes on from a journal of the same tiles that fits. Only where nothing was added."""
        self.reasons = dict(journal.reasons)
        self.restore(journal.kept)
        self._settle(np.flatnonzero(journal.seen))

    def _settle(self, rows: np.ndarray) -> None:
        np.subtract.at(self._left, self._block[rows], 1)
        self.seen[rows] = True

    @abc.abstractmethod
    def keep(self, rows: np.ndarray, outputs: Mapping[str, np.ndarray]) -> None:
        """Takes the outputs of these tiles."""

    @abc.abstractmethod
    def kept(self, whole: np.ndarray) -> dict[str, np.ndarray]:
        """Copies of what is known of the tiles for which `whole`, bool [N], is true: every tile that was kept is one of them,
        because no block is half done."""

    @abc.abstractmethod
    def restore(self, kept: Mapping[str, np.ndarray]) -> None:
        """Goes on from what `kept` returned; what follows must give the same results to the bit."""


class SlideScores(SlideProgress):
    """A value of each tile, and the mean of overlapping maps of the tiles where there are such. output: the name of the values
    among the network's outputs, float [n]; where it is absent they stay NaN. maps: the name of the maps, float [n, h, h]; None:
    none are wanted, although the network may make them."""

    def __init__(self, tiles: Tiles, *, slide_mpp: float, block: int, output: str = "logit", maps: str | None = "cam"):
        super().__init__(tiles, block=block)
        self.values = np.full(len(tiles), np.nan, np.float32)
        self.scale: dict[str, Any] = {
            "tile": tiles.grid.tile,
            "stride": tiles.grid.stride,
            "mpp": tiles.grid.mpp,
            "slide_mpp": slide_mpp,
        }
        self._output, self._maps = output, maps
        self._mean: TileMapAverage | None = None
        self._map_side = 0

    def mean_map(self) -> HeatMap | None:
        """The mean of the maps of the tiles so far; None where there is none."""
        return None if self._mean is None else self._mean.result()

    def keep(self, rows: np.ndarray, outputs: Mapping[str, np.ndarray]) -> None:
        if self._output in outputs:
            self.values[rows] = outputs[self._output]
        if self._maps is not None and self._maps in outputs:
            maps = outputs[self._maps]
            self._average(maps.shape[-1]).add(rows, maps)

    def kept(self, whole: np.ndarray) -> dict[str, np.ndarray]:
        kept = {"values": np.where(whole, self.values, np.float32(np.nan))}
        if self._mean is not None:
            total, times = self._mean.sums()
            kept |= {"map_side": np.asarray(self._map_side), "map_sum": total, "map_times": times}
        return kept

    def restore(self, kept: Mapping[str, np.ndarray]) -> None:
        self.values = kept["values"].copy()
        if self._maps is not None and "map_sum" in kept:
            self._average(int(kept["map_side"])).restore(kept["map_sum"], kept["map_times"])

    @staticmethod
    def has_maps(journal: Journal) -> bool:
        """Whether maps are known wherever values are."""
        return "map_sum" in journal.kept or not np.isfinite(journal.kept["values"]).any()

    def _average(self, side: int) -> TileMapAverage:
        if self._mean is None:
            self._mean = TileMapAverage(self.tiles.x, self.tiles.y, size=side, **self.scale)
            self._map_side = side
        return self._mean
