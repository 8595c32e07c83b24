"""Tiles to logits and Grad-CAM maps on the device, batch by batch, while the next region is being read."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from data_pipelines.scan import ScanBatch, ScanShape
from experiments.run.device_clock import DeviceClock
from srcc_jax.kernels.grad_cam import grad_cam
from srcc_jax.kernels.windows import make_window_fn
from srcc_jax.models.architecture import Architecture, normalize
from srcc_jax.models.features import pooled
from srcc_jax.models.layers import fold_batch_norm
from srcc_jax.models.zoo import build
from srcc_jax.parallel import replicate


@dataclasses.dataclass(frozen=True)
class Scored:
    """row int [n] of scored tiles, logit float32 [n] (NaN where none is asked for), cam float32 [n, h, w] or None, features
    float32 [n, D] or None; failed: rows that were not readable, with reasons; seconds: for how long the device was at it."""

    row: np.ndarray
    logit: np.ndarray
    cam: np.ndarray | None
    failed: tuple[tuple[int, str], ...]
    seconds: float = 0.0
    features: np.ndarray | None = None


class TileScorer:
    """The network in inference mode, BatchNorm folded, over batches of windows. Compiled once, whatever the weights.

    Of its outputs those are computed that are asked for: logit (of the first class), cam (its Grad-CAM), and features by this
    pooling (`features.widths`).
    """

    def __init__(
        self,
        architecture: Architecture,
        *,
        tile: int,
        mesh: Mesh,
        cam: bool,
        logit: bool = True,
        pooling: str | None = None,
    ):
        network = build(architecture, folded=True)

        def outputs(variables: Mapping[str, Any], windows: jax.Array) -> dict[str, jax.Array]:
            out: Any = network.apply(variables, normalize(windows, architecture), train=False)
            result = {"logit": out["logits"][:, 0]} if logit else {}
            if pooling is not None:
                result["features"] = pooled(out, pooling)
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

    def compile(self, folded: Mapping[str, Any], shape: ScanShape) -> None:
        """Compiles for batches of this shape, by scoring one without windows: it need not wait for the first slide."""
        image = np.zeros((shape.regions, shape.side, shape.side, 3), np.uint8)
        jax.block_until_ready(self._outputs(folded, image, np.zeros((shape.windows, 3), np.int32), 0))

    @property
    def waiting_share(self) -> float:
        """Share of the time in which the device had nothing to do, because no batch was ready or nobody took its results."""
        return self.waited_seconds / self.seconds if self.seconds else 0.0

    def score(self, folded: Mapping[str, Any], batches: Iterable[ScanBatch]) -> Iterator[Scored]:
        """Results of each batch, one batch behind: while the device works on one, the next is read and the last written."""
        iterator, pending = iter(batches), None
        with DeviceClock() as clock:
            while True:
                batch = next(iterator, None)
                running = None if batch is None else (batch, *self._begin(clock, folded, batch))
                if pending is not None:
                    yield self._fetch(*pending)
                pending = running
                if batch is None:
                    break
        self.seconds += clock.seconds
        self.waited_seconds += clock.seconds - clock.busy_seconds

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

    def _begin(
        self, clock: DeviceClock, folded: Mapping[str, Any], batch: ScanBatch
    ) -> tuple[Mapping[str, jax.Array], Future[float]]:
        began = time.perf_counter()
        outputs = self._outputs(folded, batch.image, batch.window, batch.count)
        return outputs, clock.watch(began, outputs)

    def _fetch(self, batch: ScanBatch, outputs: Mapping[str, jax.Array], seconds: Future[float]) -> Scored:
        values = {name: np.asarray(value)[: batch.count] for name, value in outputs.items()}
        self.tiles += batch.count
        row, unknown = batch.row[: batch.count], np.full(batch.count, np.nan, np.float32)
        return Scored(
            row,
            values.get("logit", unknown),
            values.get("cam"),
            batch.failed,
            seconds=seconds.result(),
            features=values.get("features"),
        )


def probability(logit: np.ndarray) -> np.ndarray:
    """Sigmoid in float64, so that a confident model keeps its differences; NaN stays NaN."""
    return 1 / (1 + np.exp(-np.asarray(logit, np.float64)))
