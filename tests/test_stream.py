"""The tf.data pipeline: batches are a function of the step, shared among processes, and failures are marked."""

import contextlib

import numpy as np

from data_pipelines.slides import RegionError
from data_pipelines.stream import FAILED, READ, TileReader, training_batches
from data_pipelines.tiles import Grid, tile_slide

GRID = Grid(tile=8, stride=8, mpp=1.0)


class ArrayShelf:
    """A shelf with one slide held in memory at half the grid's µm per pixel, unreadable right of level-0 column `bad_from`."""

    mpp = 0.5

    def __init__(self, bad_from=10**6):
        self.pixels = np.random.default_rng(1).integers(0, 256, (64, 96, 3), np.uint8)
        self.bad_from = bad_from

    @contextlib.contextmanager
    def lend(self, slide_id):
        assert slide_id == "s"
        yield self

    def read(self, x, y, width, height, mpp):
        assert (width, height, mpp) == (8, 8, 1.0)
        if x + 16 > self.bad_from:
            raise RegionError("unreadable")
        padded = np.pad(self.pixels, ((16, 16), (16, 16), (0, 0)), constant_values=255)
        return padded[int(y) + 16 : int(y) + 32 : 2, int(x) + 16 : int(x) + 32 : 2]


def reader(**options):
    tiles = tile_slide(
        "s", width=96, height=64, slide_mpp=0.5, grid=GRID, tissue=np.ones((64, 96), bool), mask_downsample=1.0
    )
    return TileReader(tiles, ArrayShelf(**options))


def rows_of(step):
    random = np.random.default_rng([5, step])
    row = random.integers(0, 24, 6)
    shift = random.integers(-2, 2, (6, 2), endpoint=True)
    return {"row": row, "shift": shift, "label": row % 2, "weight": np.array([1, 1, 1, 1, 1, 0])}


def batches(begin, end, **options):
    return list(training_batches(reader(), rows_of, begin=begin, end=end, **options))


def test_any_beginning_gives_the_same_batches():
    whole, rest = batches(0, 6), batches(3, 6)
    assert len(whole) == 6
    for a, b in zip(whole[3:], rest):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


def test_pixels_labels_and_weights_are_those_of_the_rows():
    (batch,) = batches(4, 5)
    wanted, table = rows_of(4), reader()
    for n, (row, shift) in enumerate(zip(wanted["row"], wanted["shift"])):
        x, y = table.tiles.x[row] + 2 * shift[0], table.tiles.y[row] + 2 * shift[1]
        np.testing.assert_array_equal(batch["image"][n], table.shelf.read(x, y, 8, 8, 1.0))
    np.testing.assert_array_equal(batch["label"], wanted["label"])
    np.testing.assert_array_equal(batch["weight"], wanted["weight"])
    assert batch["image"].dtype == np.uint8 and batch["label"].dtype == batch["weight"].dtype == np.float32


def test_processes_share_a_batch_without_overlap():
    (whole,) = batches(2, 3)
    parts = [batches(2, 3, share=np.arange(2 * p, 2 * p + 2))[0] for p in range(3)]
    for name in whole:
        np.testing.assert_array_equal(whole[name], np.concatenate([part[name] for part in parts]))


def test_a_tile_that_cannot_be_read_has_a_status_and_no_weight():
    table = reader(bad_from=64)
    rows = lambda step: {  # noqa: E731
        "row": np.array([0, 5]),
        "shift": np.zeros((2, 2), int),
        "label": np.ones(2),
        "weight": np.ones(2),
    }
    (batch,) = training_batches(table, rows, begin=0, end=1)
    assert table.tiles.x[5] > 64 > table.tiles.x[0] + 16
    assert batch["status"].tolist() == [READ, FAILED] and batch["weight"].tolist() == [1, 0]
