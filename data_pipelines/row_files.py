"""Rows of numbers in a file, written in any order while they come, and read back in theirs; little of it is ever in memory."""

from __future__ import annotations

import dataclasses
import os
import pathlib

import numpy as np

from data_pipelines.files import writing


@dataclasses.dataclass(frozen=True)
class RowFile:
    """A file of `rows` rows of `width` numbers of type `dtype`, row after row. Which of them are written, somebody else has to
    know: it is changed in place, so that what a killed process wrote is still there. No file is open between calls."""

    path: pathlib.Path
    rows: int
    width: int
    dtype: str

    @property
    def exists(self) -> bool:
        """Whether there is a file of this size."""
        try:
            return self.path.stat().st_size == self.rows * self._row_bytes
        except FileNotFoundError:
            return False

    def create(self) -> None:
        """Makes the file, unless it exists. Raises OutputError."""
        if not self.exists:
            with writing(self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with open(self.path, "wb") as file:
                    file.truncate(self.rows * self._row_bytes)

    def write(self, rows: np.ndarray, values: np.ndarray) -> None:
        """values [n, width] to the rows int [n]. Raises OutputError."""
        if values.shape != (len(rows), self.width) or values.dtype != np.dtype(self.dtype):
            raise ValueError(
                f"{self.path}: rows need {self.dtype} [{len(rows)}, {self.width}], not {values.dtype} {values.shape}"
            )
        order = np.argsort(rows, kind="stable")
        runs = np.split(order, np.flatnonzero(np.diff(rows[order]) != 1) + 1) if len(rows) else []
        with writing(self.path), open(self.path, "r+b") as file:
            for run in runs:
                file.seek(int(rows[run[0]]) * self._row_bytes)
                file.write(np.ascontiguousarray(values[run]).data)

    def read(self, first: int, stop: int) -> np.ndarray:
        """The rows from `first` to before `stop`: [stop - first, width]."""
        with open(self.path, "rb") as file:
            file.seek(first * self._row_bytes)
            found = np.fromfile(file, self.dtype, (stop - first) * self.width)
        return found.reshape(stop - first, self.width)

    def sync(self) -> None:
        """Returns when all that was written is on the disk. Raises OutputError."""
        with writing(self.path), open(self.path, "r+b") as file:
            os.fsync(file.fileno())

    def remove(self) -> None:
        """Removes the file, if there is one."""
        self.path.unlink(missing_ok=True)

    @property
    def _row_bytes(self) -> int:
        return self.width * np.dtype(self.dtype).itemsize
