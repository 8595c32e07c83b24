"""Training batches as a tf.data pipeline: a pure function of (seed, step).

What crosses from TensorFlow to Python is one call per batch, never one per tile. The rows of a batch are computed from the number of
its step, so a run that was cut off goes on at any step without a saved iterator.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import tensorflow as tf

from data_pipelines.shelf import Shelf
from data_pipelines.slides import RegionError, SlideError
from data_pipelines.tiles import Tiles

tf.config.set_visible_devices([], "GPU")  # the accelerator belongs to JAX

Rows = Callable[[int], Mapping[str, np.ndarray]]
READ, FAILED = 0, 1  # values of a batch's `status`


@dataclasses.dataclass(frozen=True)
class TileReader:
    """Pixels for rows of a Tiles table, read from the slides on the shelf by a few threads."""

    tiles: Tiles
    shelf: Shelf
    threads: int = 4

    def read(self, rows: np.ndarray, shift: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """rows int [B]; shift int [B, 2] = (right, down) in model pixels, added to each tile's corner.

        Returns image uint8 [B, tile, tile, 3] and status uint8 [B]: FAILED where a tile could not be read (its pixels are 0 and
        mean nothing), else READ.
        """
        image = np.zeros((len(rows), self.tiles.grid.tile, self.tiles.grid.tile, 3), np.uint8)
        status = np.full(len(rows), READ, np.uint8)

        def one(position: int) -> None:
            try:
                image[position] = self._tile(int(rows[position]), shift[position])
            except (RegionError, SlideError):
                status[position] = FAILED

        with ThreadPoolExecutor(self.threads, thread_name_prefix="tiles") as pool:
            list(pool.map(one, range(len(rows))))
        return image, status

    def _tile(self, row: int, shift: np.ndarray) -> np.ndarray:
        tiles = self.tiles
        with self.shelf.lend(str(tiles.slides[tiles.slide[row]])) as slide:
            scale = tiles.grid.mpp / slide.mpp
            x, y = tiles.x[row] + shift[0] * scale, tiles.y[row] + shift[1] * scale
            return slide.read(x, y, tiles.grid.tile, tiles.grid.tile, tiles.grid.mpp)


def training_batches(
    reader: TileReader, rows: Rows, *, begin: int, end: int, share: np.ndarray | None = None, prefetch: int = 2
) -> Iterator[dict[str, np.ndarray]]:
    """Batches of the steps begin..end-1, in order.

    rows(step) gives the global batch: row int [B], shift int [B, 2], label float [B], weight float [B]. share int [b]: the
    places in it that this process reads; None: all. Yields image uint8 [b, tile, tile, 3], row int32 [b], label float32 [b],
    weight float32 [b] (0 for padding and for tiles that could not be read) and status uint8 [b].
    """
    tile = reader.tiles.grid.tile

    def load(step: np.ndarray) -> tuple[np.ndarray, ...]:
        batch = {name: values if share is None else values[share] for name, values in rows(int(step)).items()}
        image, status = reader.read(batch["row"], batch["shift"])
        weight = np.where(status == READ, batch["weight"], 0)
        return (
            image,
            batch["row"].astype(np.int32),
            batch["label"].astype(np.float32),
            weight.astype(np.float32),
            status,
        )

    types = (tf.uint8, tf.int32, tf.float32, tf.float32, tf.uint8)
    names = ("image", "row", "label", "weight", "status")
    shapes = ((None, tile, tile, 3), (None,), (None,), (None,), (None,))

    def element(step: tf.Tensor) -> dict[str, tf.Tensor]:
        arrays = tf.numpy_function(load, [step], types, stateful=False)
        return {name: tf.ensure_shape(array, shape) for name, array, shape in zip(names, arrays, shapes)}

    steps = tf.data.Dataset.range(begin, end)
    batches = steps.map(element, num_parallel_calls=2, deterministic=True).prefetch(prefetch)
    yield from batches.as_numpy_iterator()
