"""Labelled patches on their way to the device, for training and for scoring, with a note of each that cannot be read."""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Callable, Iterator

import numpy as np

from data_pipelines.patches import PatchBatch, PatchesError, PatchReader, patch_batches
from experiments.run.progress import progress


class PatchFeed:
    """Reads ahead in threads. unit: what the progress bars count. unreadable: file -> why, said once of each."""

    def __init__(self, *, threads: int, unit: str = "patches"):
        self.unreadable: dict[pathlib.Path, str] = {}
        self._threads, self._unit = threads, unit

    def training(
        self, reader: PatchReader, rows: Callable[[int], np.ndarray], *, size: int, begin: int, end: int
    ) -> Iterator[dict[str, np.ndarray]]:
        """The batches of the steps begin..end-1, rows(step) the patches of each. PatchesError where none of a batch can be read."""
        with progress((end - begin) * size, "training", unit=self._unit) as bar:
            for batch in patch_batches(reader, rows, size=size, begin=begin, end=end, threads=self._threads):
                self._note(reader, batch)
                if not batch.arrays["weight"].any():
                    reason = next(iter(batch.failed.values()))
                    raise PatchesError(f"no patch of a batch could be read: {reason}: is the disk there?")
                yield batch.arrays
                bar.update(size)

    def scoring(self, reader: PatchReader, rows: np.ndarray, *, size: int) -> Iterator[PatchBatch]:
        """Batches of the patches of rows int [n], in their order, the last filled up with padding."""
        batches = patch_batches(
            reader,
            lambda step: rows[step * size : (step + 1) * size],
            size=size,
            begin=0,
            end=-(-len(rows) // size),
            threads=self._threads,
        )
        for batch in batches:
            self._note(reader, batch)
            yield batch

    def scores(
        self, reader: PatchReader, rows: np.ndarray, score: Callable[[np.ndarray], np.ndarray], *, size: int, what: str
    ) -> np.ndarray:
        """float64 [n]: the score of each patch of rows int [n], NaN where it cannot be read. score: image uint8 [size, S, S, 3] to
        values [size]; what: heads the progress bar."""
        found = np.full(len(rows), np.nan)
        with progress(len(rows), what, unit=self._unit) as bar:
            for step, batch in enumerate(self.scoring(reader, rows, size=size)):
                part = found[step * size : (step + 1) * size]
                values = score(batch.arrays["image"])[: len(part)]
                part[:] = np.where(batch.arrays["weight"][: len(part)] > 0, values, np.nan)
                bar.update(len(part))
        return found

    def _note(self, reader: PatchReader, batch: PatchBatch) -> None:
        for row, reason in batch.failed.items():
            path = reader.patches.path[row]
            if path not in self.unreadable:
                print(f"left out: {reason}", file=sys.stderr, flush=True)
            self.unreadable[path] = reason
