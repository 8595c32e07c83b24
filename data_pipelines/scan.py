"""Scanning: every tile of one slide or of many, read by super-tiles, in batches of one shape.

A super-tile is a square region that holds up to `block` x `block` windows. It is read once, travels to the device as uint8, and
the windows are cut there: windows that overlap by half would otherwise be decoded four times. Reading runs in threads,
ahead of the consumer by a bounded number of regions, and never touches TensorFlow, so that prediction does without it.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from data_pipelines.slides import RegionError, Slide, SlideError
from data_pipelines.tiles import Grid, Tiles

S = TypeVar("S")
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class ScanShape:
    """The fixed shape of a batch: `windows` windows cut from `regions` super-tiles of `side` x `side` model pixels."""

    block: int
    side: int
    regions: int
    windows: int

    @classmethod
    def of(cls, grid: Grid, *, block: int = 8, regions: int = 2) -> ScanShape:
        """Room for `regions` full blocks."""
        side = (block - 1) * grid.stride + grid.tile
        return cls(block=block, side=side, regions=regions, windows=regions * block**2)


@dataclasses.dataclass(frozen=True)
class ScanJob:
    """Tiles of one slide. lend() gives the open slide for the time of a `with` block, in any thread; row int [n]: the row of
    each tile in the table that the consumer knows."""

    lend: Callable[[], contextlib.AbstractContextManager[Slide]]
    tiles: Tiles
    row: np.ndarray

    @classmethod
    def of_open(cls, slide: Slide, tiles: Tiles, row: np.ndarray) -> ScanJob:
        """A job for a slide that the caller keeps open until the last tile has come."""
        return cls(lambda: contextlib.nullcontext(slide), tiles, row)


@dataclasses.dataclass(frozen=True)
class ScanBatch:
    """image uint8 [regions, side, side, 3], window int32 [windows, 3] = (region, top, left) in model pixels, row int32
    [windows], count = how many leading windows are real. `failed`: rows that could not be read, each with the reason."""

    image: np.ndarray
    window: np.ndarray
    row: np.ndarray
    count: int
    failed: tuple[tuple[int, str], ...]


@dataclasses.dataclass(frozen=True)
class _Region:
    pixels: np.ndarray  # uint8 [h, w, 3], h and w at most `side`
    window: np.ndarray  # int32 [n, 2] (top, left)
    row: np.ndarray  # int32 [n]
    failed: tuple[tuple[int, str], ...] = ()


def scan(jobs: Iterable[ScanJob], shape: ScanShape, *, threads: int = 2, ahead: int = 8) -> Iterator[ScanBatch]:
    """Batches over all tiles of all jobs, in order of jobs and blocks, whatever the number of threads.

    At most `ahead` regions are read before they are asked for. A region that cannot be read is tried again tile by tile; the
    tiles that still fail arrive in `failed`, never as pixels.
    """
    tasks = ((job, rows) for job in jobs for rows in job.tiles.blocks(shape.block))
    packer = _Packer(shape)
    with contextlib.closing(work_ahead(tasks, lambda task: _read_block(*task), threads=threads, ahead=ahead)) as read:
        for regions in read:
            yield from packer.add(regions)
        yield from packer.rest()


def work_ahead(
    items: Iterable[S], work: Callable[[S], T], *, threads: int, ahead: int, name: str = "scan"
) -> Generator[T, None, None]:
    """work(item) of every item, in order: done in `threads` threads, at most `ahead` items before they are asked for.

    Closing the iterator drops what was not begun and waits for what was.
    """
    with ThreadPoolExecutor(threads, thread_name_prefix=name) as pool:
        pending: collections.deque[Future[T]] = collections.deque()
        try:
            for item in items:
                pending.append(pool.submit(work, item))
                if len(pending) > ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def _read_block(job: ScanJob, rows: np.ndarray) -> list[_Region]:
    """One region with its windows; where it cannot be read, the regions of its single tiles."""
    try:
        return [_read_region(job, rows)]
    except (RegionError, SlideError) as error:
        if len(rows) == 1:
            failed = ((int(job.row[rows[0]]), str(error)),)
            return [_Region(np.zeros((0, 0, 3), np.uint8), np.zeros((0, 2), np.int32), np.zeros(0, np.int32), failed)]
        return [region for row in rows for region in _read_block(job, np.asarray([row]))]


def _read_region(job: ScanJob, rows: np.ndarray) -> _Region:
    tiles = job.tiles
    left, top = int(tiles.u[rows].min()), int(tiles.v[rows].min())
    width = int(tiles.u[rows].max()) + tiles.grid.tile - left
    height = int(tiles.v[rows].max()) + tiles.grid.tile - top
    with job.lend() as slide:
        scale = tiles.grid.mpp / slide.mpp
        pixels = slide.read(left * scale, top * scale, width, height, tiles.grid.mpp)
    window = np.stack([tiles.v[rows] - top, tiles.u[rows] - left], axis=1).astype(np.int32)
    return _Region(pixels, window, job.row[rows].astype(np.int32))


class _Packer:
    """Puts regions into batches of the fixed shape, in order."""

    def __init__(self, shape: ScanShape):
        self._shape = shape
        self._regions: list[_Region] = []
        self._failed: list[tuple[int, str]] = []

    def add(self, regions: list[_Region]) -> Iterator[ScanBatch]:
        for region in regions:
            self._failed += region.failed
            if not len(region.row):
                continue
            windows = sum(len(r.row) for r in self._regions) + len(region.row)
            if len(self._regions) == self._shape.regions or windows > self._shape.windows:
                yield self._batch()
            self._regions.append(region)

    def rest(self) -> Iterator[ScanBatch]:
        if self._regions or self._failed:
            yield self._batch()

    def _batch(self) -> ScanBatch:
        shape = self._shape
        image = np.zeros((shape.regions, shape.side, shape.side, 3), np.uint8)
        window = np.zeros((shape.windows, 3), np.int32)
        row = np.full(shape.windows, -1, np.int32)
        count = 0
        for number, region in enumerate(self._regions):
            height, width = region.pixels.shape[:2]
            image[number, :height, :width] = region.pixels
            end = count + len(region.row)
            window[count:end, 0], window[count:end, 1:] = number, region.window
            row[count:end] = region.row
            count = end
        batch = ScanBatch(image, window, row, count, tuple(self._failed))
        self._regions, self._failed = [], []
        return batch


_END = object()


def prefetch(items: Iterable[T], *, depth: int = 2) -> Generator[T, None, None]:
    """The same items, made in one background thread up to `depth` ahead. Closing the iterator stops the thread."""
    ready: queue.Queue = queue.Queue(maxsize=depth)
    stop = threading.Event()

    def put(item: object) -> bool:
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    worker = threading.Thread(target=_fill, args=(items, put), name="prefetch", daemon=True)
    worker.start()
    try:
        while (item := ready.get()) is not _END:
            if isinstance(item, _Failure):
                raise item.error
            yield item
    finally:
        stop.set()
        worker.join()


@dataclasses.dataclass(frozen=True)
class _Failure:
    error: BaseException


def _fill(items: Iterable[T], put: Callable[[object], bool]) -> None:
    """Hands every item on; an error of the maker is raised in the consumer's thread."""
    iterator = iter(items)
    try:
        for item in iterator:
            if not put(item):
                break
        else:
            put(_END)
    except BaseException as error:  # noqa: BLE001 (raised again by the consumer)
        put(_Failure(error))
    finally:
        if hasattr(iterator, "close"):
            iterator.close()
