"""Top-k of tiles against full sorts: ties, short slides, padding, unreadable tiles, batches in any order."""

import jax.numpy as jnp
import numpy as np
import pytest

from srcc_jax.kernels.top_k import merge_top_k, select_top_k


def slow_top_k(scores, slide, slides, k):
    """Rows by slide: highest score first, lowest row first on ties."""
    chosen = []
    for one in range(slides):
        rows = [row for row in range(len(scores)) if slide[row] == one and not np.isnan(scores[row])]
        chosen.append(sorted(rows, key=lambda row: (-scores[row], row))[:k])
    return chosen


def test_rows_stay_inside_their_slide():
    score, slide = np.array([0.9, 0.1, 0.8, 0.2, 0.7]), np.array([0, 0, 1, 1, 1])
    rows, valid = select_top_k(score, slide, slides=2, k=2)
    np.testing.assert_array_equal(rows[valid], [0, 1, 2, 4])  # best first, slide by slide


def test_lowest_row_first_on_ties():
    rows, _ = select_top_k(np.array([0.2, 0.9, 0.9, 0.4, 0.9]), np.zeros(5, int), slides=1, k=2)
    np.testing.assert_array_equal(rows, [[1, 2]])


def test_zero_of_either_sign_is_a_tie():
    rows, _ = select_top_k(np.array([-0.0, 0.0, -0.0]), np.zeros(3, int), slides=1, k=3)
    np.testing.assert_array_equal(rows, [[0, 1, 2]])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("k", [1, 3, 50])
def test_equal_to_a_full_sort(seed, k):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 5, 60).astype(np.float32) / 4  # many ties
    scores[rng.random(60) < 0.1] = np.nan
    slide = rng.integers(-1, 6, 60)  # -1 and 5 are padding, and rows of a slide are not neighbours
    slide[slide == 3] = 2  # slide 3 has no tile
    rows, valid = select_top_k(scores, slide, slides=5, k=k)
    assert rows.shape == valid.shape == (5, k)
    assert [row[ok].tolist() for row, ok in zip(np.asarray(rows), np.asarray(valid))] == slow_top_k(scores, slide, 5, k)
    assert (np.asarray(rows)[~np.asarray(valid)] == -1).all()


def test_unreadable_tiles_and_padding_are_never_chosen():
    score, slide = np.array([np.nan, 0.1, 0.9]), np.array([0, 0, 1])
    rows, valid = select_top_k(score, slide, slides=1, k=3)
    np.testing.assert_array_equal(rows, [[1, -1, -1]])
    np.testing.assert_array_equal(valid, [[True, False, False]])


@pytest.mark.parametrize("seed", range(3))
def test_batches_in_any_order_give_the_full_sort(seed):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 4, 40).astype(np.float32)
    scores[rng.random(40) < 0.1] = np.nan
    best = jnp.full(5, -jnp.inf), jnp.full(5, -1)
    for batch in rng.permutation(40).reshape(5, 8):
        best = merge_top_k(*best, jnp.asarray(scores[batch]), jnp.asarray(batch), k=5)
    expected = slow_top_k(scores, np.zeros(40, int), 1, 5)[0]
    np.testing.assert_array_equal(best[1], expected)
    np.testing.assert_array_equal(best[0], scores[expected])


def test_merging_into_empty_arrays_leaves_empty_places():
    scores, rows = merge_top_k(jnp.zeros(0), jnp.zeros(0, int), jnp.array([jnp.nan, 0.5, -jnp.inf]), jnp.arange(3), k=2)
    np.testing.assert_array_equal(scores, [0.5, -np.inf])
    np.testing.assert_array_equal(rows, [1, -1])
