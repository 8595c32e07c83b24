"""Features of all weak tiles in one file on the disk, made part by part, so that they need not fit in memory and a killed run goes on."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from data_pipelines.exports import write_json
from data_pipelines.row_files import RowFile
from experiments.run.progress import progress


@dataclasses.dataclass(frozen=True)
class Part:
    """A batch of tiles: row int [n], features float32 [n, D]."""

    row: np.ndarray
    features: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class ChosenFeatures:
    """The rows int [m] of a memory map of features [M, D], as `neighbours.nearest` takes them: nothing is read before it is asked for."""

    table: np.ndarray
    rows: np.ndarray

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.rows), self.table.shape[1]

    def __getitem__(self, rows: Any, /) -> np.ndarray:
        return np.asarray(self.table[self.rows[rows]])


@dataclasses.dataclass(frozen=True)
class FeatureTable:
    """Features of `rows` tiles of `width` numbers in `folder`. digest: of the tiles and the network; other features are made anew."""

    folder: pathlib.Path
    rows: int
    width: int
    digest: str

    def fill(self, parts: Sequence[np.ndarray], make: Callable[[np.ndarray], Iterator[Part]]) -> None:
        """Makes the features of the parts (rows int [m] each) that are not there yet; make(part) gives them in batches."""
        file = RowFile(self.folder / "features.rows", self.rows, self.width, "float32")
        done = self._done() if file.exists else 0
        if done == len(parts):
            return
        file.create()
        missing = self._missing() if done else []
        with progress(self.rows, "features of weak tiles") as bar:
            bar.update(sum(len(part) for part in parts[:done]))
            for number, part in enumerate(parts[done:], start=done + 1):
                seen = [np.zeros(0, int)]
                for found in make(part):
                    file.write(found.row, np.ascontiguousarray(found.features, np.float32))
                    seen.append(found.row)
                    bar.update(len(found.row))
                file.sync()
                missing += np.setdiff1d(part, np.concatenate(seen)).tolist()
                write_json(self._state, {"digest": self.digest, "parts": number, "missing": missing})

    @property
    def readable(self) -> np.ndarray:
        """bool [M]: tiles that have features."""
        found = np.ones(self.rows, bool)
        found[self._missing()] = False
        return found

    def chosen(self, allowed: np.ndarray) -> ChosenFeatures:
        """Of the tiles that `allowed`, bool [M], admits and that could be read."""
        table = np.memmap(self.folder / "features.rows", np.float32, "r", shape=(self.rows, self.width))
        return ChosenFeatures(table, np.flatnonzero(allowed & self.readable))

    @property
    def _state(self) -> pathlib.Path:
        return self.folder / "features.json"

    def _done(self) -> int:
        if not self._state.exists():
            return 0
        state = json.loads(self._state.read_text())
        return state["parts"] if state["digest"] == self.digest else 0

    def _missing(self) -> list[int]:
        return json.loads(self._state.read_text())["missing"]
