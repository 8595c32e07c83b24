"""Exact nearest neighbours of a few queries among any number of feature vectors, which need not fit in memory.

The candidates are taken in chunks. A matrix product gives the similarity of every query with every candidate of a chunk; of each
block of candidates only the maximum is looked at first, since a block whose maximum is below the k-th largest of all block
maxima holds none of the k best. The shortlist so found is ranked again by distances computed in float64, because
single precision of a product cannot tell near duplicates apart. Where the error of the product could hide one of the k best
from the shortlist, the search is repeated for that query with a longer one: no neighbour is ever missed.
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
BLOCK = 16  # candidates whose maximum is looked at first
_BLOCKS = (8, 16, 32, 64)  # of a chunk that are looked at, where no query needs more
MARGIN = 16  # of the shortlist beyond k: candidates that rounding may have put on the wrong side
LONGER = 8  # times, a shortlist that was too short
_CHUNK, _CHUNK_OF_SHORTLIST = 16_384, 128  # candidates held at a time: at least, and for each of a shortlist
_RANKED_BYTES = 4 << 20  # of float64 vectors held at a time
_FAR = 4.0  # lengths of the queries about their centre, from zero to there
_IN_FLIGHT = 2  # chunks that are on their way to the devices or on them


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
    chunk: int | None = None,
    mesh: Mesh | None = None,
) -> Neighbours:
    """The k candidates [M, D] most similar to each of the queries [N, D].

    metric: "l2", smallest Euclidean distance, or "cosine", largest cosine (a vector of zeros has cosine 0 with all). chunk: candidates
    held on the devices at a time, split over them; None: 16,384, and more for a large k. Memory is that of a few chunks and
    N · chunk similarities, whatever M is. Where M < k, there are M neighbours. ValueError for vectors that are not finite or of
    different lengths.
    """
    queries = _checked(queries, candidates, metric)
    count, mesh = candidates.shape[0], mesh or make_mesh(jax.local_devices())
    k = min(k, count)
    origin = _origin(queries, metric)
    index, value = np.empty((len(queries), k), np.int64), np.empty((len(queries), k))
    left, wanted = np.arange(len(queries)), k + MARGIN
    while len(left):
        wanted = min(wanted, count)
        size = _chunk_size(chunk or max(_CHUNK, _CHUNK_OF_SHORTLIST * wanted), count, mesh.size)
        rows, least = _shortlist(queries[left], origin, candidates, wanted, metric, size, mesh)
        index[left], value[left] = _ranked(queries[left], candidates, rows, k, metric)
        if wanted == count:
            break
        left = left[~_certain(queries[left], origin, value[left, -1], least, metric)]
        wanted *= LONGER
    return Neighbours(index, value)


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


@dataclasses.dataclass(frozen=True)
class _Origin:
    """What is subtracted from the queries [1, D]; from the candidates, too, if they are `moved`: that costs a pass over them, and is
    worth it where the queries are close together and far from zero, or products would lose what tells them apart."""

    centre: np.ndarray
    moved: bool


def _origin(queries: np.ndarray, metric: str) -> _Origin:
    if metric == "cosine":
        return _Origin(np.zeros_like(queries[:1]), False)
    centre = queries.mean(0, keepdims=True)
    return _Origin(centre, bool(np.linalg.norm(centre) > _FAR * np.linalg.norm(queries - centre, axis=1).max()))


def _chunk_size(chunk: int, count: int, devices: int) -> int:
    """Rows of a chunk: whole blocks on every device."""
    unit = devices * BLOCK
    return -(-min(chunk, count) // unit) * unit


def _shortlist(
    queries: np.ndarray, origin: _Origin, candidates: Features, wanted: int, metric: str, size: int, mesh: Mesh
) -> tuple[np.ndarray, np.ndarray]:
    """Rows int [N, wanted], in ascending order, and the similarity of the last that got in, float32 [N]."""
    step, merge = _make_steps(mesh, wanted, metric, origin.moved)
    asked, centre = replicate((jnp.asarray(queries - origin.centre), jnp.asarray(origin.centre)), mesh)
    shape = (mesh.size, len(queries), wanted)
    best = jax.device_put((np.full(shape, -np.inf, np.float32), np.full(shape, -1, np.int32)), by_rows(mesh))
    lengths = list[jax.Array]()
    for begin, rows in _chunks(candidates, size):
        filled = np.pad(rows, ((0, size - len(rows)), (0, 0))) if len(rows) < size else rows
        best, longest = step(asked, centre, best, jax.device_put(filled, by_rows(mesh)), begin, len(rows))
        lengths.append(longest)
        jax.block_until_ready(lengths[-_IN_FLIGHT:][0])  # else the chunks of a whole search wait in memory
    if not np.isfinite(lengths).all():
        raise ValueError("some feature vectors are not finite: leave them out")
    similarity, rows = (np.asarray(part) for part in merge(*best))
    return np.sort(rows, axis=1), similarity[:, -1]


def _chunks(candidates: Features, size: int) -> Iterator[tuple[int, np.ndarray]]:
    for begin in range(0, candidates.shape[0], size):
        yield begin, np.asarray(candidates[begin : begin + size])


@functools.cache
def _make_steps(mesh: Mesh, wanted: int, metric: str, moved: bool):
    """The step (queries, centre, best, candidates [size, D], begin, count) -> best, and per device the greatest square of a candidate's
    length from the centre; and merge(*best) -> similarity, row [N, wanted].

    best: the shortlist (similarity, row) of each device [devices, N, wanted], from its own candidates: a step needs no exchange.
    """
    split, same = PartitionSpec("data"), PartitionSpec()
    similarity = _cosine if metric == "cosine" else _l2

    def local(queries, centre, best, rows, begin, count):
        first = lax.axis_index("data") * rows.shape[0]
        rows = rows.astype(jnp.float32)
        factor = rows - centre if moved else rows
        product = lax.dot_general(factor, queries, (((1,), (1,)), ((), ())), precision=lax.Precision.HIGHEST)
        squares = jnp.square(rows - centre).sum(1, keepdims=True)
        real = first + jnp.arange(rows.shape[0])[:, None] < count
        score = jnp.where(real, similarity(product, squares), -jnp.inf)
        value, row = (part[0] for part in best)
        found, place = top_k_by_blocks(score, min(wanted, rows.shape[0]), above=value[:, -1])
        value, row = jnp.concatenate([value, found], 1), jnp.concatenate([row, begin + first + place], 1)
        return tuple(part[None] for part in _first(value, row, wanted)), jnp.where(real, squares, 0).max()[None]

    step = jax.shard_map(local, mesh=mesh, in_specs=(same, same, split, split, same, same), out_specs=(split, split))

    def merge(value, row):
        value, row = (jnp.moveaxis(part, 0, 1).reshape(part.shape[1], -1) for part in (value, row))
        return _first(value, row, wanted)

    return jax.jit(step, donate_argnums=2), jax.jit(merge, out_shardings=whole(mesh))


def _first(value: jax.Array, row: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k largest values of each line, and their rows."""
    value, place = lax.top_k(value, k)
    return value, jnp.take_along_axis(row, place, 1)


def _l2(product: jax.Array, squares: jax.Array) -> jax.Array:
    """Minus half the squared distance, up to half the square of the query's length."""
    return product - 0.5 * squares


def _cosine(product: jax.Array, squares: jax.Array) -> jax.Array:
    """The cosine times the query's length."""
    return product * lax.rsqrt(jnp.maximum(squares, jnp.finfo(squares.dtype).tiny))


def top_k_by_blocks(score: jax.Array, k: int, *, above: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`lax.top_k` of the columns of score [M, N], M a multiple of BLOCK, by way of the maxima of blocks: values and places [N, k].

    above [N]: what is no larger may be left out; then the list ends in -inf. Few blocks have a maximum above what a search has found
    so far, and only as many as any column needs are looked at. Exact, lowest place first among equals: a block left out has a maximum
    no larger than that of k others, and comes after those that are equal.
    """
    m, n = score.shape
    if m // BLOCK <= k:
        return lax.top_k(score.T, k)
    parts = score.reshape(m // BLOCK, BLOCK, n)
    peaks = parts.max(1).T

    def look_at(blocks: int) -> tuple[jax.Array, jax.Array]:
        chosen = jnp.sort(lax.top_k(peaks, blocks)[1], axis=1)
        values = parts[chosen, :, jnp.arange(n)[:, None]].reshape(n, blocks * BLOCK)
        value, place = lax.top_k(values, min(k, blocks * BLOCK))
        place = jnp.take_along_axis(chosen, place // BLOCK, 1) * BLOCK + place % BLOCK
        missing = (0, 0), (0, k - place.shape[1])
        return jnp.pad(value, missing, constant_values=-jnp.inf), jnp.pad(place, missing)

    enough = [*(blocks for blocks in _BLOCKS if blocks < k), k]
    needed = (peaks > above[:, None]).sum(1).max()
    level = sum(((needed > blocks).astype(jnp.int32) for blocks in enough[:-1]), jnp.int32(0))
    return lax.switch(level, [functools.partial(look_at, blocks) for blocks in enough])


def _certain(queries: np.ndarray, origin: _Origin, last: np.ndarray, least: np.ndarray, metric: str) -> np.ndarray:
    """bool [N]: whether no candidate outside the shortlist can be among the k best.

    last [N]: distance or cosine of the k-th best; least [N]: the smallest similarity, as computed, within the shortlist, which no
    candidate outside exceeds. A sum of D products of float32 is off by at most about D · 2^-24 of the product of the
    lengths, in any order (Higham 2002, §3.1). With l2, a candidate whose length exceeds the query's by more than the
    k-th distance is further away than that.
    """
    asked, centre = (queries - origin.centre).astype(np.float64), origin.centre.astype(np.float64)
    length = np.linalg.norm(asked, axis=1)
    rounding = (queries.shape[1] + 8) * 2.0**-24
    if metric == "cosine":
        return last * length > least + 2 * rounding * length
    reach, similarity = length + last, (length**2 - last**2) / 2
    if origin.moved:
        return similarity > least + rounding * (length * reach + reach**2)
    similarity += (asked * centre).sum(1)  # products with candidates that the centre is not taken from
    return similarity > least + rounding * (length * (reach + np.linalg.norm(centre)) + reach**2)


def _ranked(
    queries: np.ndarray, candidates: Features, shortlist: np.ndarray, k: int, metric: str
) -> tuple[np.ndarray, np.ndarray]:
    """The best k of each query's shortlist [N, J], rows in ascending order, by distances in float64: rows and values [N, k]."""
    index, value = np.empty((len(queries), k), np.int64), np.empty((len(queries), k))
    vectors = max(1, _RANKED_BYTES // (8 * queries.shape[1]))
    together = max(1, vectors // shortlist.shape[1])
    for begin in range(0, len(queries), together):
        rows, asked = (array[begin : begin + together] for array in (shortlist, queries))
        parts = (rows[:, start : start + vectors] for start in range(0, rows.shape[1], vectors))
        worth = np.concatenate([_exact(asked, candidates, part, metric) for part in parts], axis=1)
        order = np.argsort(worth if metric == "l2" else -worth, axis=1, kind="stable")[:, :k]
        index[begin : begin + len(rows)] = np.take_along_axis(rows, order, 1)
        value[begin : begin + len(rows)] = np.take_along_axis(worth, order, 1)
    return index, value


def _exact(queries: np.ndarray, candidates: Features, rows: np.ndarray, metric: str) -> np.ndarray:
    """Distance or cosine of each query [N, D] and the candidates of its rows [N, J], float64 [N, J]."""
    unique, place = np.unique(rows, return_inverse=True)
    vectors, asked = (
        np.asarray(array, np.float64) for array in (candidates[unique][place.reshape(rows.shape)], queries[:, None])
    )
    if metric == "l2":
        return np.linalg.norm(vectors - asked, axis=2)
    lengths = np.linalg.norm(vectors, axis=2) * np.linalg.norm(asked, axis=2)
    return np.divide((vectors * asked).sum(2), lengths, out=np.zeros(rows.shape), where=lengths > 0)
