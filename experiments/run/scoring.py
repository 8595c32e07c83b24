"""Tiles to logits and Grad-CAM maps on the device, batch by batch, while the next region is being read."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from data_pipelines.scan import ScanBatch
from srcc_jax.kernels.grad_cam import grad_cam
from srcc_jax.kernels.windows import make_window_fn
from srcc_jax.models.architecture import Architecture, normalize
from srcc_jax.models.layers import fold_batch_norm
from srcc_jax.models.zoo import build
from srcc_jax.parallel import replicate


@dataclasses.dataclass(frozen=True)
class Scored:
    """row int [n] of scored tiles, logit float32 [n], cam float32 [n, h, w] or None; failed: rows that were not readable, with reasons."""

    row: np.ndarray
    logit: np.ndarray
    cam: np.ndarray | None
    failed: tuple[tuple[int, str], ...]


class TileScorer:
    """The network in inference mode, BatchNorm folded, over batches of windows. Compiled once, whatever the weights."""

    def __init__(self, architecture: Architecture, *, tile: int, mesh: Mesh, cam: bool):
        network = build(architecture, folded=True)

        def outputs(variables: Mapping[str, Any], windows: jax.Array) -> dict[str, jax.Array]:
            out: Any = network.apply(variables, normalize(windows, architecture), train=False)
            result = {"logit": out["logits"][:, 0]}
            if cam:
                head = variables["params"]["classifier"]
                result["cam"] = grad_cam(
                    lambda maps: maps.mean((1, 2)) @ head["kernel"] + head["bias"][None], out["maps"]
                )
            return result

        self._mesh = mesh
        self._fold = jax.jit(functools.partial(fold_batch_norm, epsilon=architecture.bn_epsilon))
        self._outputs = make_window_fn(outputs, tile=tile, mesh=mesh)
        self.tiles = 0
        self.seconds = 0.0
        self.waited_seconds = 0.0

    def fold(self, variables: Mapping[str, Any]) -> Mapping[str, Any]:
        """Inference weights on the mesh's devices."""
        return replicate(self._fold(variables), self._mesh)

    @property
    def waiting_share(self) -> float:
        """Share of the time in which the device had nothing to do because no batch was ready."""
        return self.waited_seconds / self.seconds if self.seconds else 0.0

    def score(self, folded: Mapping[str, Any], batches: Iterable[ScanBatch]) -> Iterator[Scored]:
        """Results of each batch, one batch behind: while the device works on one, the next is read and the last written."""
        began, iterator, pending = time.perf_counter(), iter(batches), None
        while True:
            asked = time.perf_counter()
            batch = next(iterator, None)
            if pending is None or _ready(pending[1]):
                self.waited_seconds += time.perf_counter() - asked
            running = None if batch is None else (batch, self._outputs(folded, batch.image, batch.window, batch.count))
            if pending is not None:
                yield self._fetch(*pending)
            pending = running
            if batch is None:
                break
        self.seconds += time.perf_counter() - began

    def logits(
        self,
        folded: Mapping[str, Any],
        batches: Iterable[ScanBatch],
        *,
        rows: int,
        scored_tiles: Callable[[int], object] = lambda count: None,
    ) -> np.ndarray:
        """float32 [rows]: logit of each row of the table, NaN where it was not scanned or not readable. scored_tiles: told after
        each batch how many tiles it held."""
        table = np.full(rows, np.nan, np.float32)
        for scored in self.score(folded, batches):
            table[scored.row] = scored.logit
            scored_tiles(len(scored.row))
        return table

    def _fetch(self, batch: ScanBatch, outputs: Mapping[str, jax.Array]) -> Scored:
        values = {name: np.asarray(value)[: batch.count] for name, value in outputs.items()}
        self.tiles += batch.count
        return Scored(batch.row[: batch.count], values["logit"], values.get("cam"), batch.failed)


def probability(logit: np.ndarray) -> np.ndarray:
    """Sigmoid in float64, so that a confident model keeps its differences; NaN stays NaN."""
    return 1 / (1 + np.exp(-np.asarray(logit, np.float64)))


def _ready(outputs: Mapping[str, jax.Array]) -> bool:
    return all(value.is_ready() for value in outputs.values())  # type: ignore[attr-defined]
