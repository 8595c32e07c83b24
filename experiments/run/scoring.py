"""Tiles to a network's outputs on the device, batch by batch, while the next region is being read."""

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

WindowOutputs = Callable[[Mapping[str, Any], jax.Array], dict[str, jax.Array]]
"""(variables for inference, windows uint8 [c, tile, tile, 3]) -> name -> array [c, ...], each row a function of its own window."""

Fold = Callable[[Mapping[str, Any]], Mapping[str, Any]]
"""Variables as they were trained -> variables for inference, such as those with BatchNorm in the convolutions."""


@dataclasses.dataclass(frozen=True)
class Scored:
    """row int [n] of scored tiles; outputs: name -> array [n, ...], as the scorer computes them; failed: rows that were not
    readable, with reasons; seconds: for how long the device was at it."""

    row: np.ndarray
    outputs: Mapping[str, np.ndarray]
    failed: tuple[tuple[int, str], ...] = ()
    seconds: float = 0.0


class TileScorer:
    """A network in inference mode over batches of windows. Compiled once, whatever the weights.

    outputs: what is computed of windows, `chunk` of them at a time (None: as many as suit the platform); fold: what its variables
    are made of. The device holds the outputs of a whole batch: `ScanShape.windows` times those of one.
    """

    def __init__(self, outputs: WindowOutputs, fold: Fold, *, tile: int, mesh: Mesh, chunk: int | None = None):
        self._mesh = mesh
        self._fold = jax.jit(fold)
        self._outputs = make_window_fn(outputs, tile=tile, mesh=mesh, chunk=chunk)
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
        """float32 [rows]: the output "logit" of each row of the table, NaN where it was not scanned or not readable. scored_tiles:
        told after each batch how many tiles it held."""
        table = np.full(rows, np.nan, np.float32)
        for scored in self.score(folded, batches):
            table[scored.row] = scored.outputs["logit"]
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
        return Scored(batch.row[: batch.count], values, batch.failed, seconds=seconds.result())


def classifier_scorer(
    architecture: Architecture, *, tile: int, mesh: Mesh, cam: bool, logit: bool = True, pooling: str | None = None
) -> TileScorer:
    """Of a classifier, BatchNorm folded. Of its outputs those are computed that are asked for: "logit" [n] (of the first class),
    "cam" [n, h, w] (its Grad-CAM), and "features" [n, D] by this pooling (`features.widths`); all float32."""
    network = build(architecture, folded=True)

    def outputs(variables: Mapping[str, Any], windows: jax.Array) -> dict[str, jax.Array]:
        out: Any = network.apply(variables, normalize(windows, architecture), train=False)
        result = {"logit": out["logits"][:, 0]} if logit else {}
        if pooling is not None:
            result["features"] = pooled(out, pooling)
        if cam:
            head = variables["params"]["classifier"]
            result["cam"] = grad_cam(lambda maps: maps.mean((1, 2)) @ head["kernel"] + head["bias"][None], out["maps"])
        return result

    return TileScorer(
        outputs, functools.partial(fold_batch_norm, epsilon=architecture.bn_epsilon), tile=tile, mesh=mesh
    )


def probability(logit: np.ndarray) -> np.ndarray:
    """Sigmoid in float64, so that a confident model keeps its differences; NaN stays NaN."""
    return 1 / (1 + np.exp(-np.asarray(logit, np.float64)))
