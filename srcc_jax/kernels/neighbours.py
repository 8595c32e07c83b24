"""Exact nearest neighbours of a few queries among any number of feature vectors, which need not fit in memory.

The candidates are taken in chunks. A matrix product gives the similarity of every query with every candidate of a chunk; of each
block of candidates only the maximum is looked at first, since a block whose maximum is below the k-th largest of all block
maxima holds none of the k best. The shortlist so found is ranked again by distances computed in float64, because
single precision of a product cannot tell near duplicates apart.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from srcc_jax.parallel import by_rows, make_mesh, replicate, whole

METRICS = ("l2", "cosine")
BLOCK = 64  # candidates whose maximum is looked at first
MARGIN = 16  # of the shortlist beyond k: candidates that rounding may have put on the wrong side
_RERANKED_BYTES = 64 << 20  # of float64 vectors held at a time


class Features(Protocol):
    """Feature vectors [M, D]: an array, or a memory map, of any type of float."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, rows: Any, /) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class Neighbours:
    """index int [N, k]: rows of the candidates, most similar first. value float64 [N, k]: Euclidean distance (l2) or cosine similarity.
    Equal values stand in the order of their rows."""

    index: np.ndarray
    value: np.ndarray


def nearest(
    queries: np.ndarray,
    candidates: Features,
    *,
    k: int,
    metric: str = "l2",
    chunk: int = 16_384,
    mesh: Mesh | None = None,
) -> Neighbours:
    """The k candidates [M, D] most similar to each of the queries [N, D].

    metric: "l2", smallest Euclidean distance, or "cosine", largest cosine (a vector of zeros has cosine 0 with all). chunk: candidates
    held on the devices at a time, split over them. Memory is that of N · chunk similarities, whatever M is. Where M < k, there
    are M neighbours. ValueError for vectors that are not finite or of different lengths.
    """
    queries = _checked(queries, candidates, metric)
    mesh = mesh or make_mesh(jax.local_devices())
    count = candidates.shape[0]
    k = min(k, count)
    wanted = min(k + MARGIN, count)
    size = _chunk_size(chunk, count, wanted, mesh.size)
    centre = np.zeros_like(queries[:1]) if metric == "cosine" else queries.mean(0, keepdims=True)
    step = _make_step(mesh, wanted, metric)
    asked = replicate(jnp.asarray(queries - centre), mesh)
    middle = replicate(jnp.asarray(centre), mesh)
    best = replicate(
        (jnp.full((len(queries), wanted), -jnp.inf), jnp.full((len(queries), wanted), -1, jnp.int32)), mesh
    )
    for begin, rows in _chunks(candidates, size):
        filled = np.pad(rows, ((0, size - len(rows)), (0, 0))) if len(rows) < size else rows
        best = step(asked, middle, best, jax.device_put(filled, by_rows(mesh)), begin, len(rows))
    shortlist = np.sort(np.asarray(best[1]), axis=1)
    if not np.isfinite(np.asarray(best[0])).all():
        raise ValueError("some feature vectors are not finite: leave them out")
    return _ranked(queries, candidates, shortlist, k, metric)


def _checked(queries: np.ndarray, candidates: Features, metric: str) -> np.ndarray:
    queries = np.asarray(queries, np.float32)
    if metric not in METRICS:
        raise ValueError(f"metric is {metric!r}: choose one of {', '.join(METRICS)}")
    if queries.ndim != 2 or not len(queries) or len(candidates.shape) != 2 or not candidates.shape[0]:
        raise ValueError(f"queries [N, D] and candidates [M, D] are needed, got {queries.shape}, {candidates.shape}")
    if queries.shape[1] != candidates.shape[1]:
        raise ValueError(f"queries have {queries.shape[1]} features, candidates {candidates.shape[1]}")
    if not np.isfinite(queries).all():
        raise ValueError("some queries are not finite: leave them out")
    return queries


def _chunk_size(chunk: int, count: int, wanted: int, devices: int) -> int:
    """Rows of a chunk: whole blocks on every device, on each at least as many candidates as are wanted."""
    unit = devices * BLOCK
    return -(-max(min(chunk, count), devices * wanted) // unit) * unit


def _chunks(candidates: Features, size: int) -> Iterator[tuple[int, np.ndarray]]:
    for begin in range(0, candidates.shape[0], size):
        yield begin, np.asarray(candidates[begin : begin + size])


@functools.cache
def _make_step(mesh: Mesh, wanted: int, metric: str):
    """(queries, centre, best, candidates [size, D], begin, count) -> best: the running shortlist, (similarity, row) [N, wanted]."""
    split, same = PartitionSpec("data"), PartitionSpec()

    def local(queries, centre, rows, begin, count):
        """The shortlist of this device's part of the chunk, [1, N, wanted]."""
        first = lax.axis_index("data") * rows.shape[0]
        similarity = _similarity(queries, rows.astype(jnp.float32) - centre, metric)
        similarity = jnp.where(first + jnp.arange(rows.shape[0])[None] < count, similarity, -jnp.inf)
        value, place = top_k_by_blocks(similarity, wanted)
        return value[None], (begin + first + place)[None]

    everywhere = jax.shard_map(local, mesh=mesh, in_specs=(same, same, split, same, same), out_specs=(split, split))

    def step(queries, centre, best, rows, begin, count):
        value, row = (
            jnp.moveaxis(part, 0, 1).reshape(len(queries), -1)
            for part in everywhere(queries, centre, rows, begin, count)
        )
        value, row = jnp.concatenate([best[0], value], 1), jnp.concatenate([best[1], row], 1)
        value, place = lax.top_k(value, wanted)
        return value, jnp.take_along_axis(row, place, 1)

    return jax.jit(step, donate_argnums=2, out_shardings=whole(mesh))


def _similarity(queries: jax.Array, rows: jax.Array, metric: str) -> jax.Array:
    """[N, M]: the cosine up to the query's length, or minus the squared distance up to what all candidates share; NaN as it comes."""
    product = lax.dot_general(queries, rows, (((1,), (1,)), ((), ())), precision=lax.Precision.HIGHEST)
    squares = jnp.square(rows).sum(1)[None]
    if metric == "cosine":
        return product * lax.rsqrt(jnp.maximum(squares, jnp.finfo(squares.dtype).tiny))
    return product - 0.5 * squares


def top_k_by_blocks(scores: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """`lax.top_k` of scores [N, M], M a multiple of BLOCK, by way of the maxima of blocks: values and places [N, k].

    Exact, lowest place first among equals: a block left out has a maximum no larger than that of k others, and comes after those
    that are equal.
    """
    n, m = scores.shape
    blocks = m // BLOCK
    if blocks <= k:
        return lax.top_k(scores, k)
    parts = scores.reshape(n, blocks, BLOCK)
    chosen = jnp.sort(lax.top_k(parts.max(-1), k)[1], axis=1)
    value, place = lax.top_k(jnp.take_along_axis(parts, chosen[..., None], 1).reshape(n, k * BLOCK), k)
    return value, jnp.take_along_axis(chosen, place // BLOCK, 1) * BLOCK + place % BLOCK


def _ranked(queries: np.ndarray, candidates: Features, shortlist: np.ndarray, k: int, metric: str) -> Neighbours:
    """The best k of each query's shortlist [N, J], rows in ascending order, by distances in float64."""
    index, value = np.empty((len(queries), k), np.int64), np.empty((len(queries), k))
    together = max(1, _RERANKED_BYTES // (8 * shortlist.shape[1] * queries.shape[1]))
    for begin in range(0, len(queries), together):
        rows = shortlist[begin : begin + together]
        unique, place = np.unique(rows, return_inverse=True)
        vectors = np.asarray(candidates[unique], np.float64)[place.reshape(rows.shape)]
        query = queries[begin : begin + together, None].astype(np.float64)
        if metric == "cosine":
            lengths = np.linalg.norm(vectors, axis=2) * np.linalg.norm(query, axis=2)
            worth = np.divide((vectors * query).sum(2), lengths, out=np.zeros(rows.shape), where=lengths > 0)
        else:
            worth = -np.linalg.norm(vectors - query, axis=2)
        order = np.argsort(-worth, axis=1, kind="stable")[:, :k]
        index[begin : begin + len(rows)] = np.take_along_axis(rows, order, 1)
        value[begin : begin + len(rows)] = (
            np.abs(np.take_along_axis(worth, order, 1)) if metric == "l2" else np.take_along_axis(worth, order, 1)
        )
    return Neighbours(index, value)
