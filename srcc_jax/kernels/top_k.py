"""The k most suspicious tiles of each slide. Ties go to the lowest row; a tile without a score (NaN) is never chosen."""

import functools

import jax
import jax.numpy as jnp

NONE = -1  # the row of an empty place


@functools.partial(jax.jit, static_argnames=("slides", "k"))
def select_top_k(scores: jax.Array, slide: jax.Array, *, slides: int, k: int) -> tuple[jax.Array, jax.Array]:
    """Rows of the k highest scores of each slide, best first (Kanavati 2021, weak supervision; Campanella 2019).

    scores [N] float; slide [N] int, 0 <= slide < slides (other values are padding).
    Returns rows [slides, k] int32 into scores, and valid [slides, k] bool: False (and row -1) where a slide has fewer.
    """
    count = scores.shape[0]
    slide = jnp.where(jnp.isnan(scores), slides, slide)
    slide, _, order = jax.lax.sort((slide, -scores, jnp.arange(count, dtype=jnp.int32)), num_keys=3)
    begin, end = (jnp.searchsorted(slide, jnp.arange(slides), side=side) for side in ("left", "right"))
    place = begin[:, None] + jnp.arange(k)[None, :]
    valid = place < end[:, None]
    rows = jnp.take(order, place, mode="fill", fill_value=NONE)
    return jnp.where(valid, rows, NONE), valid


@functools.partial(jax.jit, static_argnames="k")
def merge_top_k(
    best_scores: jax.Array, best_rows: jax.Array, new_scores: jax.Array, new_rows: jax.Array, *, k: int
) -> tuple[jax.Array, jax.Array]:
    """Running top-k over the batches of one slide: (scores [k], rows [k]) of the k best seen so far, best first.

    best_* [J]: the result so far, or empty arrays at the start; new_* [M]. In whatever batches and order the tiles come,
    the result is that of one full sort by (score descending, row ascending). Empty places hold (-inf, -1); a new tile
    with score NaN or -inf is left out, which is also how padding is kept out.
    """
    scores = jnp.concatenate([best_scores, new_scores, jnp.full(k, -jnp.inf, new_scores.dtype)])
    rows = jnp.concatenate([best_rows, new_rows, jnp.full(k, NONE, new_rows.dtype)])
    counts = scores > -jnp.inf  # False for NaN as well
    worst_first = jnp.where(counts, -scores, jnp.inf)
    negated, rows = jax.lax.sort((worst_first, jnp.where(counts, rows, NONE)), num_keys=2)
    return -negated[:k], rows[:k]
