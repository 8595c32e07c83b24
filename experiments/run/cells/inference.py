"""Probabilities of cells over whole images: windows through the network, their overlaps averaged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from data_pipelines.tiles import Grid
from srcc_jax.kernels.windows import make_window_fn
from srcc_jax.methods.cell_detection import fold, make_probability
from srcc_jax.models.architecture import Architecture
from srcc_jax.parallel import replicate

_WINDOWS = {"cpu": 1}  # a device at a time; a window of 1024 pixels takes hundreds of megabytes
_ACCELERATOR_WINDOWS = 4


class CellScorer:
    """A network of one architecture, compiled once for windows of `window` pixels that overlap by `overlap`."""

    def __init__(self, architecture: Architecture, *, window: int, overlap: int, mesh: Mesh) -> None:
        each = _WINDOWS.get(mesh.devices.flat[0].platform, _ACCELERATOR_WINDOWS)
        self._grid = Grid(tile=window, stride=window - overlap, mpp=1.0, flush=True)
        self._size, self._mesh = mesh.size * each, mesh
        self._fold = jax.jit(lambda variables: fold(variables, architecture))
        self._score = make_window_fn(make_probability(architecture), tile=window, mesh=mesh, chunk=each)

    def fold(self, variables: Mapping[str, Any]) -> Mapping[str, Any]:
        """Inference weights on the mesh's devices."""
        return replicate(self._fold(dict(variables)), self._mesh)

    def probabilities(self, folded: Mapping[str, Any], image: np.ndarray) -> np.ndarray:
        """float32 [H, W, 3]: probabilities of background, edge and inner region at each pixel of image uint8 [H, W, 3]."""
        height, width = image.shape[:2]
        side = self._grid.tile
        places = [(top, left) for top in self._grid.positions(height) for left in self._grid.positions(width)]
        total = np.zeros((height, width, 3), np.float32)
        count = np.zeros((height, width, 1), np.float32)
        for begin in range(0, len(places), self._size):
            mine = places[begin : begin + self._size]
            windows = np.full((self._size, side, side, 3), 255, np.uint8)
            for window, (top, left) in zip(windows, mine):
                part = image[top : top + side, left : left + side]
                window[: part.shape[0], : part.shape[1]] = part
            cut = np.zeros((self._size, 3), np.int32)
            cut[:, 0] = np.arange(self._size)
            found = np.asarray(self._score(folded, windows, cut, len(mine)))
            for values, (top, left) in zip(found, mine):
                target = total[top : top + side, left : left + side]
                target += values[: target.shape[0], : target.shape[1]]
                count[top : top + side, left : left + side] += 1
        return total / count
