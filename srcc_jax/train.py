"""The one training loop: a step that is compiled once, and `fit`, which runs it, evaluates, keeps checkpoints and stops.

What a method does between fits (mining, pseudo-labels, exchange of models) is a plain loop in the method's file.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, Protocol

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from srcc_jax import parallel
from srcc_jax.checkpoints import Checkpoints

Batch = Mapping[str, Any]
Metrics = dict[str, tuple[jax.Array, jax.Array]]
"""name -> (sum, count), both scalars: rows of weight 0 are in neither."""


class TrainState(flax.struct.PyTreeNode):
    """All that a restart needs."""

    step: jax.Array  # int32 []: optimiser steps taken
    params: Any
    stats: Any  # {collection: ...} of the variables that are not trained, as batch_stats
    opt: Any
    key: jax.Array  # never advanced: a step folds in its number


class LossFn(Protocol):
    """(params, stats, batch, key) -> (scalar, (the new stats, metrics))."""

    def __call__(self, params: Any, stats: Any, batch: Any, key: jax.Array, /) -> tuple[jax.Array, tuple[Any, Any]]: ...


StepFn = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


class TrainingDiverged(ArithmeticError):
    """A loss, a gradient or the metric that selects is not a finite number. Nothing was saved since."""


class Interrupted(RuntimeError):
    """A run was asked to stop and did; `step` is the one that a restart begins from."""

    def __init__(self, step: int, *, saved: bool) -> None:
        end = "the checkpoint is written: the same command continues" if saved else "no checkpoint was asked for"
        super().__init__(f"stopped after step {step}; {end}")
        self.step = step


def init_state(variables: Mapping[str, Any], tx: optax.GradientTransformation, seed: int, mesh: Mesh) -> TrainState:
    """The state before step 0, whole on every device of the mesh. It shares no memory with `variables`."""

    def build(variables: Mapping[str, Any]) -> TrainState:
        stats = jax.tree.map(jnp.copy, dict(variables))
        params = stats.pop("params")
        return TrainState(jnp.zeros((), jnp.int32), params, stats, tx.init(params), jax.random.key(seed))

    return jax.jit(build, out_shardings=parallel.whole(mesh))(jax.device_get(variables))


def restart_optimizer(state: TrainState, tx: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """The state with the optimiser as new, for the moment when frozen parameters begin to train.

    Adam counts steps for all parameters alike: with a high count and moments still at zero it would move the thawed
    ones three to six times too far for a hundred steps. A schedule starts anew as well: shift `tx`'s by `state.step`.
    """
    return state.replace(opt=jax.jit(tx.init, out_shardings=parallel.whole(mesh))(state.params))


def epoch_decay(base: float, rate: float, every_epochs: float, steps_per_epoch: float) -> optax.Schedule:
    """Learning rate base * rate^floor(epoch / every_epochs). An epoch may end within a step: 4162.5 steps are fine."""
    return optax.exponential_decay(base, every_epochs * steps_per_epoch, rate, staircase=True)


def make_train_step(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    *,
    trainable: Callable[[str], bool] | None = None,
) -> StepFn:
    """Compile one optimiser step: (state, batch) -> (state, metrics). The state given is used up.

    Batch statistics are those of the whole batch, over all devices. To the metrics of the loss come `loss` and
    `grad_norm`, the 2-norm of the gradient of all that is trained.
    trainable: which parameters are, by path ("head/kernel"); the others get no gradient, no update and no moments.
    Raises ValueError, at the first step, where that is none.
    """

    def step_fn(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        trained, frozen = _split(state.params, trainable)

        def loss_of(trained: Any) -> tuple[jax.Array, tuple[Any, Metrics]]:
            return loss_fn(_join(trained, frozen), state.stats, batch, key)

        (loss, (stats, metrics)), grads = jax.value_and_grad(loss_of, has_aux=True)(trained)
        still = jax.tree.map(jnp.zeros_like, frozen)
        updates, opt = tx.update(_join(grads, still), state.opt, state.params)
        updates = _join(_split(updates, trainable)[0], still)  # weight decay would move the frozen ones
        one = jnp.ones(())
        return (
            state.replace(step=state.step + 1, params=optax.apply_updates(state.params, updates), stats=stats, opt=opt),
            {"loss": (loss, one), "grad_norm": (optax.tree.norm(grads), one), **metrics},
        )

    whole, rows = parallel.whole(mesh), parallel.by_rows(mesh)
    return jax.jit(step_fn, in_shardings=(whole, rows), out_shardings=(whole, whole), donate_argnums=0)


def _split(tree: Any, trainable: Callable[[str], bool] | None) -> tuple[Any, Any]:
    """A tree as two of its kind: the leaves trained and the leaves frozen, None in the places of the others."""
    if trainable is None:
        return tree, jax.tree.map(lambda _: None, tree)
    chosen = jax.tree_util.tree_map_with_path(
        lambda path, _: bool(trainable(jax.tree_util.keystr(path, simple=True, separator="/"))), tree
    )
    if not any(jax.tree.leaves(chosen)):
        raise ValueError("trainable() is true for none of the parameters; its argument is a path like 'head/kernel'")
    trained = jax.tree.map(lambda leaf, choose: leaf if choose else None, tree, chosen)
    frozen = jax.tree.map(lambda leaf, choose: None if choose else leaf, tree, chosen)
    return trained, frozen


def _join(trained: Any, frozen: Any) -> Any:
    """The tree that `_split` split."""
    return jax.tree.map(lambda a, b: b if a is None else a, trained, frozen, is_leaf=lambda leaf: leaf is None)


@dataclasses.dataclass(frozen=True)
class Best:
    """The best evaluation so far, and how many have passed since."""

    step: int | None = None
    value: float | None = None
    since: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Keep:
    """Which checkpoint a run hands on, and when it stops looking.

    metric: a name that `evaluate` gives.  patience: evaluations without a better one after which to stop (as in Keras:
    at 10, the tenth in a row ends the run); None: never.  Of equals the first is best.
    """

    metric: str
    mode: Literal["min", "max"]
    patience: int | None = None

    def best_of(self, checkpoints: Checkpoints) -> Best:
        """Where a run stands, from the metrics kept with its checkpoints."""
        best = Best()
        metrics: Mapping[str, float] = {}
        for step, metrics in checkpoints.metrics.items():
            if self.metric in metrics:
                best = self.after(best, step, metrics)
        return dataclasses.replace(best, since=int(metrics.get(_SINCE, 0)))  # as the latest one says

    def after(self, best: Best, step: int, metrics: Mapping[str, float]) -> Best:
        """Where a run stands after the evaluation of a step. Raises TrainingDiverged for a value that is not finite."""
        if self.metric not in metrics:
            raise ValueError(f"no metric {self.metric!r} to keep the best of: evaluation gives {sorted(metrics)}")
        value = float(metrics[self.metric])
        if not math.isfinite(value):
            raise TrainingDiverged(f"{self.metric} is {value} at step {step}: there is nothing to select by")
        sign = 1 if self.mode == "max" else -1
        if best.value is None or sign * value > sign * best.value:
            return Best(step, value)
        return dataclasses.replace(best, since=best.since + 1)

    def exhausted(self, best: Best) -> bool:
        """Whether patience has run out."""
        return self.patience is not None and best.since >= self.patience


@dataclasses.dataclass(frozen=True)
class BestCheckpoint:
    """variables: {"params", "batch_stats", ...} on the devices; metrics: of its evaluation."""

    variables: dict[str, Any]
    step: int
    metrics: Mapping[str, float]


def best_checkpoint(keep: Keep, checkpoints: Checkpoints, state: TrainState) -> BestCheckpoint:
    """What a finished fit hands on. state: any of the same fit."""
    step = keep.best_of(checkpoints).step
    assert step is not None
    found = checkpoints.restore({"params": state.params, "stats": state.stats}, step)
    return BestCheckpoint({"params": found["params"], **found["stats"]}, step, checkpoints.metrics[step])


_SINCE = "evaluations_since_best"  # kept among the metrics of a checkpoint, for a restart


@dataclasses.dataclass(frozen=True)
class FitResult:
    """state: the last one.  best: the evaluation to hand on.  stopped: patience ran out."""

    state: TrainState
    best: Best
    stopped: bool


def fit(
    step_fn: StepFn,
    state: TrainState,
    batches: Callable[[int], Iterator[Batch]],
    *,
    num_steps: int,
    mesh: Mesh,
    evaluate: Callable[[TrainState], dict[str, float]] | None = None,
    every: int = 0,
    keep: Keep | None = None,
    checkpoints: Checkpoints | None = None,
    log: Callable[[int, dict[str, float]], None] = lambda step, row: None,
    stop: Callable[[], bool] = lambda: False,
) -> FitResult:
    """Train from `state.step` until `num_steps` steps are taken in all. Fits on one step_fn are rounds of one run.

    batches(begin): this process's batches of steps begin, begin + 1, ...: a function of the seed and the step, so that
        a killed run goes on from `checkpoints.resume(state)` as if it had not been killed, bit for bit.
    evaluate, every: at multiples of `every` and at num_steps the state is evaluated and saved; 0: neither is done.
    keep: selects the best evaluation, whose checkpoint is kept beside the latest, and ends the run by its patience.
        What it knows is in the checkpoints, so rounds and restarts share it; without checkpoints it is of this fit.
    log(step, metrics): every step's means, one step late, so that the device never waits; and every evaluation.
    stop(): asked after each step; once true, in any process, a checkpoint is written and Interrupted raised.

    Raises TrainingDiverged for a loss or gradient that is not finite, before a checkpoint holds it; ValueError for
    batches that end early or a state behind the checkpoints; CheckpointError for one that cannot be written.
    """
    step, best = int(state.step), _best_so_far(state, keep, checkpoints)
    stopped = keep is not None and keep.exhausted(best)
    if stopped or step >= num_steps:
        return FitResult(state, best, stopped)
    feed, unread = batches(step), None
    while step < num_steps and not stopped:
        state, metrics = step_fn(state, parallel.put(_next(feed, step), mesh))
        step, stopping = step + 1, _read(unread, log)
        unread = step, metrics, parallel.any_process(stop(), mesh)
        due = every > 0 and (step % every == 0 or step == num_steps)
        if due or stopping or step == num_steps:
            stopping, unread = _read(unread, log) or stopping, None
        row: dict[str, float] = {}
        if due and evaluate:
            row = evaluate(state)
            log(step, row)
        if due and keep:
            best = keep.after(best, step, row)
            stopped = keep.exhausted(best)
        if checkpoints and (due or stopping):
            kept = [] if best.step is None else [best.step]
            checkpoints.save(step, state, {**row, _SINCE: best.since}, keep=kept)
        if stopping:
            raise Interrupted(step, saved=checkpoints is not None)
    return FitResult(state, best, stopped)


def fit_to_best(
    step_fn: StepFn,
    state: TrainState,
    batches: Callable[[int], Iterator[Batch]],
    *,
    folder: str,
    keep: Keep,
    **options: Any,
) -> BestCheckpoint:
    """The best evaluation of a `fit` whose checkpoints are in the folder (an absolute path): it goes on from where they stand. options:
    the others of `fit`."""
    with Checkpoints(folder) as checkpoints:
        resumed = checkpoints.resume(state)
        result = fit(step_fn, resumed, batches, keep=keep, checkpoints=checkpoints, **options)
        return best_checkpoint(keep, checkpoints, result.state)


def _best_so_far(state: TrainState, keep: Keep | None, checkpoints: Checkpoints | None) -> Best:
    """Where the run of these checkpoints stands. Raises ValueError where they are ahead of the state."""
    if checkpoints is None:
        return Best()
    if (checkpoints.latest or 0) > int(state.step):
        raise ValueError(
            f"{checkpoints.directory} holds step {checkpoints.latest}, the state given is at step {state.step}: "
            "begin with checkpoints.resume(state), or with an empty folder"
        )
    return keep.best_of(checkpoints) if keep else Best()


def _next(feed: Iterator[Batch], step: int) -> Batch:
    batch = next(feed, None)
    if batch is None:
        raise ValueError(f"the batches ended after step {step}, before the fit did")
    return batch


def _read(unread: tuple[int, Metrics, bool | jax.Array] | None, log: Callable[[int, dict[str, float]], None]) -> bool:
    """Wait for a step (None: for nothing), log the means of its metrics; whether a stop was asked for after it."""
    if unread is None:
        return False
    step, metrics, stopping = unread
    row = {name: float(total / count) for name, (total, count) in jax.device_get(metrics).items() if count}
    for name in ("loss", "grad_norm"):
        if not math.isfinite(row[name]):
            raise TrainingDiverged(
                f"{name} is {row[name]} at step {step}: training has diverged. "
                "Lower the learning rate, or look for bad pixels or labels in this step's batch"
            )
    log(step, row)
    return bool(stopping)
