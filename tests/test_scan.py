"""Scanning by super-tiles: every tile once, the right pixels, failures as failures; and the prefetching thread."""

import contextlib
import threading
import time

import numpy as np
import pytest

from data_pipelines.scan import ScanJob, ScanShape, prefetch, scan, work_ahead
from data_pipelines.slides import RegionError
from data_pipelines.tiles import Grid, tile_slide

GRID = Grid(tile=16, stride=8, mpp=1.0)


class ArraySlide:
    """A slide of one level held in memory; `bad` is a level-0 point that no region can be read over."""

    def __init__(self, pixels, *, mpp=1.0, bad=None):
        self.pixels, self.mpp, self.bad, self.reads = pixels, mpp, bad, 0
        self.height, self.width = pixels.shape[:2]

    def read(self, x, y, width, height, mpp):
        assert mpp == self.mpp
        self.reads += 1
        x, y = int(x), int(y)
        if self.bad and x <= self.bad[0] < x + width and y <= self.bad[1] < y + height:
            raise RegionError(f"corrupt tile at {self.bad}")
        return self.pixels[y : y + height, x : x + width]


def slide_of(height, width, seed=0, **options):
    return ArraySlide(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8), **options)


def job_of(slide, grid=GRID, first_row=0, tissue=None):
    tissue = np.ones((slide.height, slide.width), bool) if tissue is None else tissue
    size = {"width": slide.width, "height": slide.height, "slide_mpp": slide.mpp}
    tiles = tile_slide("s", **size, grid=grid, tissue=tissue, mask_downsample=1.0)
    return ScanJob(lambda: contextlib.nullcontext(slide), tiles, np.arange(first_row, first_row + len(tiles)))


def windows_of(batches, tile=GRID.tile):
    """row -> pixels of its window, and all failures."""
    seen, failed = {}, {}
    for batch in batches:
        failed |= dict(batch.failed)
        for (region, top, left), row in zip(batch.window[: batch.count], batch.row[: batch.count]):
            assert row not in seen
            seen[int(row)] = batch.image[region, top : top + tile, left : left + tile]
    return seen, failed


@pytest.mark.parametrize("flush", [False, True])
@pytest.mark.parametrize("threads", [1, 3])
def test_every_tile_arrives_once_with_its_pixels(flush, threads):
    grid = Grid(tile=16, stride=8, mpp=1.0, flush=flush)
    slide = slide_of(83, 117)
    job = job_of(slide, grid)
    seen, failed = windows_of(scan([job], ScanShape.of(grid, block=4), threads=threads))
    assert not failed and sorted(seen) == list(range(len(job.tiles)))
    for row, pixels in seen.items():
        u, v = job.tiles.u[row], job.tiles.v[row]
        np.testing.assert_array_equal(pixels, slide.pixels[v : v + 16, u : u + 16])


def test_super_tiles_read_each_region_once_and_keep_one_shape():
    slide = slide_of(72, 136)  # 8 x 16 windows: two blocks of 8 x 8
    job = job_of(slide)
    batches = list(scan([job], ScanShape.of(GRID, block=8, regions=1)))
    assert slide.reads == 2 and [batch.count for batch in batches] == [64, 64]
    assert {batch.image.shape for batch in batches} == {(1, 72, 72, 3)}


def test_slides_share_batches_and_keep_their_rows():
    slides = [slide_of(16, 24, seed) for seed in range(3)]  # two windows each
    jobs = [job_of(slide, first_row=10 * n) for n, slide in enumerate(slides)]
    batches = list(scan(jobs, ScanShape.of(GRID, block=2, regions=3)))
    assert len(batches) == 1 and batches[0].row[:6].tolist() == [0, 1, 10, 11, 20, 21]
    seen, _ = windows_of(batches)
    np.testing.assert_array_equal(seen[21], slides[2].pixels[:, 8:24])


def test_only_tiles_over_a_corrupt_place_are_lost():
    slide = slide_of(72, 72, bad=(30, 30))
    job = job_of(slide)
    seen, failed = windows_of(scan([job], ScanShape.of(GRID, block=8)))
    u, v = job.tiles.u, job.tiles.v
    over = set(np.flatnonzero((u <= 30) & (u > 14) & (v <= 30) & (v > 14)).tolist())
    assert set(failed) == over and len(over) == 4
    assert set(seen) == set(range(len(job.tiles))) - over
    assert all("corrupt tile at (30, 30)" in reason for reason in failed.values())


def test_regions_are_read_ahead_but_boundedly():
    slide = slide_of(16, 8 * 400)
    iterator = scan([job_of(slide)], ScanShape.of(GRID, block=1, regions=1), threads=2, ahead=4)
    next(iterator)
    time.sleep(0.05)
    assert slide.reads <= 8
    iterator.close()


def test_work_ahead_keeps_order_is_bounded_and_passes_errors_on():
    begun = []

    def slow(item):
        begun.append(item)
        time.sleep(0.01 if item % 2 else 0.0)
        if item == 20:
            raise RegionError("the last")
        return -item

    with contextlib.closing(work_ahead(range(21), slow, threads=3, ahead=4)) as results:
        assert next(results) == 0 and len(begun) <= 5
        with pytest.raises(RegionError, match="the last"):
            assert [-item for item in results] == list(range(1, 20))
    begun.clear()
    with contextlib.closing(work_ahead(range(1000), slow, threads=1, ahead=2)) as results:
        next(results)
    assert len(begun) <= 4


def test_prefetch_keeps_order_and_passes_errors_on():
    def items():
        yield from range(5)
        raise RegionError("the sixth")

    got = []
    with pytest.raises(RegionError, match="the sixth"):
        for item in prefetch(items()):
            got.append(item)
    assert got == list(range(5))


def test_closing_prefetch_stops_its_thread_and_closes_the_source():
    closed = threading.Event()

    def endless():
        try:
            while True:
                yield 0
        finally:
            closed.set()

    iterator = prefetch(endless(), depth=1)
    next(iterator)
    iterator.close()
    assert closed.wait(5)
    assert not any(thread.name == "prefetch" for thread in threading.enumerate())
