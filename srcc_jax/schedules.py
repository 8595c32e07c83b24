"""Learning rates whose length is a part of the optimiser's state, so that fits of different lengths share one compiled step."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax


class CosineState(NamedTuple):
    """int32 [] each. step: how many were taken.  unit: steps that have one rate.  span: units after which the rate is 0."""

    step: jax.Array
    unit: jax.Array
    span: jax.Array


def cosine_decay(step: jax.Array, base: float, *, span: jax.Array, unit: jax.Array) -> jax.Array:
    """base / 2 · (1 + cos(π floor(step / unit) / span)), the rate of one half period (Loshchilov & Hutter 2017, eq. 5)."""
    return base / 2 * (1 + jnp.cos(jnp.pi * (step // unit) / span))


def by_cosine(base: float, *, span: int, unit: int = 1) -> optax.GradientTransformation:
    """Scales updates by minus `cosine_decay`. span and unit count from the state that `init` makes; `update` knows neither.

    span: units until the rate is 0.  unit: steps between two changes of the rate; 1: it changes with every step.
    """

    def init(params: optax.Params) -> CosineState:
        del params
        return CosineState(*(jnp.asarray(value, jnp.int32) for value in (0, unit, span)))

    def update(updates: optax.Updates, state: CosineState, params: optax.Params | None = None):
        del params
        rate = cosine_decay(state.step, base, span=state.span, unit=state.unit)
        return jax.tree.map(lambda leaf: -rate * leaf, updates), state._replace(step=state.step + 1)

    return optax.GradientTransformation(init, update)
