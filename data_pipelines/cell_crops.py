"""Training crops of images with masks: which, by seed and step, and their pixels."""

from __future__ import annotations

import collections
import dataclasses
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from data_pipelines.cell_images import CellImage, load_image
from data_pipelines.cell_masks import read_mask
from data_pipelines.scan import work_ahead

_CROPS = 0  # purpose that a run's seed is folded with
_CACHE_BYTES = 2 << 30
_BEYOND = 255  # value of a mask beyond its image


@dataclasses.dataclass(frozen=True)
class CropSource:
    """An image and its mask; no mask: background everywhere."""

    image: CellImage
    mask: Path | None


@dataclasses.dataclass(frozen=True)
class CropSampler:
    """Draws `batch` crops of `side` pixels for each step: a pool by its share, an image of it, a place in the image, all evenly.

    size int [N, 2]: height and width of the images; pools: rows of the images in each; shares: of the crops, by pool.
    """

    size: np.ndarray
    pools: Sequence[np.ndarray]
    shares: Sequence[float]
    side: int
    batch: int
    seed: Sequence[int]

    def __call__(self, step: int) -> np.ndarray:
        """int [batch, 3]: row of the image, top and left of the crop, of a step."""
        random = np.random.default_rng([*self.seed, _CROPS, step])
        pool = random.choice(len(self.pools), size=self.batch, p=np.asarray(self.shares) / np.sum(self.shares))
        draws = random.random((self.batch, 3))
        lengths = np.array([len(rows) for rows in self.pools])
        place = (draws[:, 0] * lengths[pool]).astype(int)
        row = np.array([self.pools[p][n] for p, n in zip(pool, place)])
        room = np.maximum(self.size[row] - self.side, 0) + 1
        return np.concatenate([row[:, None], (draws[:, 1:] * room).astype(int)], axis=1)


class CropReader:
    """Cuts crops of sources; decoded images stay in memory up to 2 GiB. reduce: as in `load_image`; masks are of reduced images."""

    def __init__(self, sources: Sequence[CropSource], *, side: int, reduce: int) -> None:
        self._sources, self._side, self._reduce = sources, side, reduce
        self._kept: collections.OrderedDict[int, tuple[np.ndarray, np.ndarray]] = collections.OrderedDict()
        self._lock = threading.Lock()
        self._bytes = 0

    def read(self, crops: np.ndarray) -> dict[str, np.ndarray]:
        """image uint8 [B, side, side, 3], mask uint8 [B, side, side], weight float32 [B] of crops [B, 3]. Beyond an image smaller than a
        crop there is white, and 255 in the mask. Raises BoxesError."""
        side = self._side
        image = np.full((len(crops), side, side, 3), 255, np.uint8)
        mask = np.full((len(crops), side, side), _BEYOND, np.uint8)
        for number, (row, top, left) in enumerate(crops.tolist()):
            pixels, classes = self._load(row)
            part = pixels[top : top + side, left : left + side]
            image[number, : part.shape[0], : part.shape[1]] = part
            mask[number, : part.shape[0], : part.shape[1]] = classes[top : top + side, left : left + side]
        return {"image": image, "mask": mask, "weight": np.ones(len(crops), np.float32)}

    def _load(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        with self._lock:
            if row in self._kept:
                self._kept.move_to_end(row)
                return self._kept[row]
        source = self._sources[row]
        pixels = load_image(source.image, reduce=self._reduce)
        classes = np.zeros(pixels.shape[:2], np.uint8) if source.mask is None else read_mask(source.mask)
        with self._lock:
            if row not in self._kept:
                self._kept[row] = pixels, classes
                self._bytes += pixels.nbytes + classes.nbytes
            while self._bytes > _CACHE_BYTES and len(self._kept) > 1:
                _, (old, its_mask) = self._kept.popitem(last=False)
                self._bytes -= old.nbytes + its_mask.nbytes
        return pixels, classes


def crop_batches(
    reader: CropReader, sampler: Callable[[int], np.ndarray], *, begin: int, end: int, threads: int
) -> Iterator[Mapping[str, np.ndarray]]:
    """The batches of steps begin to end - 1, read in threads a few steps ahead."""
    yield from work_ahead(
        range(begin, end), lambda step: reader.read(sampler(step)), threads=threads, ahead=threads + 1, name="crops"
    )
