"""Nearest neighbours against a full sort in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srcc_jax.kernels.neighbours import BLOCK, nearest, top_k_by_blocks
from srcc_jax.parallel import make_mesh


def full_sort(queries, candidates, k, metric):
    """Index and value [N, k], the slow way."""
    queries, candidates = queries.astype(np.float64), candidates.astype(np.float64)
    if metric == "l2":
        value = np.linalg.norm(queries[:, None] - candidates[None], axis=2)
        order = np.argsort(value, axis=1, kind="stable")[:, :k]
    else:
        lengths = np.linalg.norm(queries, axis=1)[:, None] * np.linalg.norm(candidates, axis=1)[None]
        value = np.divide(queries @ candidates.T, lengths, out=np.zeros(lengths.shape), where=lengths > 0)
        order = np.argsort(-value, axis=1, kind="stable")[:, :k]
    return order, np.take_along_axis(value, order, 1)


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("count, k, chunk", [(3000, 10, 512), (700, 100, 256), (257, 5, 10_000)])
def test_equals_a_full_sort(metric, count, k, chunk):
    rng = np.random.default_rng(count)
    queries, candidates = rng.standard_normal((7, 24), np.float32), rng.standard_normal((count, 24), np.float32)
    found = nearest(queries, candidates, k=k, metric=metric, chunk=chunk)
    index, value = full_sort(queries, candidates, k, metric)
    np.testing.assert_array_equal(found.index, index)
    np.testing.assert_allclose(found.value, value, rtol=1e-12, atol=1e-12)


def test_the_worked_numbers_of_the_paper():
    queries = np.asarray([[1, 0], [0, 1]], np.float32)
    candidates = np.asarray([(0.9, 0.1), (0.5, 0.5), (0, 2), (2, 0), (-1, 0)], np.float32)
    l2, cosine = (nearest(queries, candidates, k=2, metric=metric) for metric in ("l2", "cosine"))
    np.testing.assert_array_equal(l2.index, [[0, 1], [1, 2]])
    np.testing.assert_allclose(l2.value, [[0.141421, 0.707107], [0.707107, 1]], atol=1e-6)
    np.testing.assert_array_equal(cosine.index, [[3, 0], [2, 1]])
    np.testing.assert_allclose(cosine.value, [[1, 0.993884], [1, 0.707107]], atol=1e-6)
    assert nearest(queries, candidates, k=9, metric="cosine").index[1].tolist() == [2, 1, 0, 3, 4]  # equal ones by row


def test_equal_candidates_come_by_row():
    rng = np.random.default_rng(0)
    candidates = np.repeat(rng.standard_normal((4, 16), np.float32), 300, axis=0)[rng.permutation(1200)]
    queries = rng.standard_normal((5, 16), np.float32)
    found = nearest(queries, candidates, k=20, chunk=256)
    np.testing.assert_array_equal(found.index, full_sort(queries, candidates, 20, "l2")[0])


def test_near_duplicates_far_from_the_origin_are_told_apart():
    """Single precision alone would lose the distances: vectors of length 5,000 that differ by 0.01."""
    rng = np.random.default_rng(1)
    base = np.full(32, 1000, np.float32)
    candidates = (base + 0.01 * rng.standard_normal((2000, 32))).astype(np.float32)
    queries = candidates[[5, 77]] + np.float32(0.002)
    found = nearest(queries, candidates, k=3, chunk=512)
    np.testing.assert_array_equal(found.index, full_sort(queries, candidates, 3, "l2")[0])


def test_what_single_precision_hides_is_found_all_the_same():
    """Two clusters 20,000 apart, so that the centre is far from both: a product is off by far more than neighbours differ."""
    rng = np.random.default_rng(5)
    side = np.where(np.arange(1500) % 2, 1e4, -1e4)[:, None].astype(np.float32)
    candidates = side + rng.standard_normal((1500, 16)).astype(np.float32)
    queries = candidates[:4] + np.float32(0.01)
    for metric in ("l2", "cosine"):
        found = nearest(queries, candidates, k=6, metric=metric, chunk=512)
        np.testing.assert_array_equal(found.index, full_sort(queries, candidates, 6, metric)[0])


def test_devices_do_not_change_the_result():
    rng = np.random.default_rng(2)
    queries, candidates = rng.standard_normal((6, 8), np.float32), rng.standard_normal((900, 8)).astype(np.float16)
    one, four = (nearest(queries, candidates, k=12, chunk=512, mesh=make_mesh(jax.devices()[:n])) for n in (1, 4))
    np.testing.assert_array_equal(one.index, four.index)
    np.testing.assert_array_equal(one.value, four.value)


def test_memory_maps_are_read_by_chunks(tmp_path):
    rng = np.random.default_rng(3)
    candidates = np.lib.format.open_memmap(tmp_path / "features.npy", "w+", np.float16, (1000, 8))
    candidates[:] = rng.standard_normal((1000, 8))
    queries = rng.standard_normal((3, 8), np.float32)

    class Watched:
        shape, asked = candidates.shape, []

        def __getitem__(self, rows):
            self.asked.append(rows)
            return candidates[rows]

    watched = Watched()
    found = nearest(queries, watched, k=4, chunk=256)
    np.testing.assert_array_equal(found.index, full_sort(queries, np.asarray(candidates), 4, "l2")[0])
    assert [(s.start, s.stop) for s in watched.asked[:-1]] == [(0, 256), (256, 512), (512, 768), (768, 1024)]
    assert len(watched.asked[-1]) <= 3 * 20


@pytest.mark.parametrize("k", [1, 7, 39, 40, 64])
def test_top_k_by_blocks_keeps_the_order_of_equals(k):
    score = np.random.default_rng(4).integers(0, 12, (40 * BLOCK, 50)).astype(np.float32)
    found = top_k_by_blocks(jnp.asarray(score), k, above=jnp.full(50, -jnp.inf))
    for ours, theirs in zip(found, jax.lax.top_k(score.T, k)):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("worth", [3, 12, 20])
def test_top_k_by_blocks_looks_at_all_that_is_above(worth):
    """Of 40 blocks some hold one score above 5, in the first column only: whatever their number, none is left out."""
    score = np.random.default_rng(worth).uniform(0, 5, (40 * BLOCK, 2)).astype(np.float32)
    places = BLOCK * np.random.default_rng(worth).permutation(40)[:worth] + 3
    score[places, 0] = 6 + np.arange(worth)
    value, place = top_k_by_blocks(jnp.asarray(score), 30, above=jnp.full(2, 5.0))
    np.testing.assert_array_equal(value[0, :worth], 6 + np.arange(worth)[::-1])
    np.testing.assert_array_equal(place[0, :worth], places[::-1])


@pytest.mark.parametrize(
    "queries, candidates, message",
    [
        (np.zeros((2, 3)), np.zeros((4, 2)), "3 features, candidates 2"),
        (np.zeros((0, 3)), np.zeros((4, 3)), "are needed"),
        (np.full((1, 3), np.nan), np.zeros((4, 3)), "queries are not finite"),
        (np.zeros((1, 3)), np.full((400, 3), np.nan), "vectors are not finite"),
    ],
)
def test_what_cannot_be_searched_is_refused(queries, candidates, message):
    with pytest.raises(ValueError, match=message):
        nearest(queries, candidates, k=2)
