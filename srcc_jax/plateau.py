"""A learning rate that is cut when validation stagnates: a function of the recorded losses, so that a killed run continues exactly."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from srcc_jax import parallel
from srcc_jax.train import TrainState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plateau:
    """The rate is multiplied by `factor` when more than `patience` losses in a row were not below the best by the share `threshold`;
    then the count begins again. This is torch's ReduceLROnPlateau, whose words these are, without cooldown or least rate.

    Yu et al. 2019, §5.1: ×0.5 "when the validation loss stagnates for 3 epochs".
    """

    base: float
    factor: float = 0.5
    patience: int = 3
    threshold: float = 1e-4

    def rate(self, losses: Iterable[float]) -> float:
        """The learning rate of the epoch that follows these validation losses, in the order of the epochs."""
        rate, best, stagnant = self.base, float("inf"), 0
        for loss in losses:
            stagnant = 0 if loss < best * (1 - self.threshold) else stagnant + 1
            best = loss if not stagnant else best
            if stagnant > self.patience:
                rate, stagnant = rate * self.factor, 0
        return rate


def adjustable_adam(rate: float) -> optax.GradientTransformation:
    """Adam whose learning rate is a part of its state: `with_rate` changes it without compiling a step again."""

    def adam(learning_rate: jax.Array) -> optax.GradientTransformation:
        return optax.flatten(optax.adam(learning_rate))  # one vector: less to compile, one update

    return optax.inject_hyperparams(adam)(learning_rate=rate)


def with_rate(state: TrainState, rate: float, mesh: Mesh) -> TrainState:
    """The state of an `adjustable_adam` with another learning rate."""
    value = parallel.replicate(jnp.asarray(rate, jnp.float32), mesh)
    return state.replace(opt=state.opt._replace(hyperparams={"learning_rate": value}))


def rate_of(state: TrainState) -> jax.Array:
    """The learning rate in the state of an `adjustable_adam`, float32 []."""
    return state.opt.hyperparams["learning_rate"]
