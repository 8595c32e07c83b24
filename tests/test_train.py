"""The loop: what a step computes, what is kept, and that stopping or killing a run changes nothing."""

import functools
import pathlib
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from srcc_jax import losses, parallel, train
from srcc_jax.checkpoints import Checkpoints
from tests import small_training as small
from tests.small_training import assert_same_bits

ROOT = pathlib.Path(__file__).resolve().parents[1]
KEEP = train.Keep(metric="error", mode="min", patience=3)


# A model of one number: it moves by -rate * batch["pull"] a step, so that every state can be worked out by hand.
def pull_loss(params, stats, batch, key):
    del key
    return params["x"] * batch["pull"].mean(), (stats, {"pull": (batch["pull"].sum(), jnp.float32(4))})


def pulls(begin, value=lambda step: 1.0):
    for step in range(begin, 100):
        yield {"pull": np.full(4, value(step), np.float32)}


@functools.cache
def pulled():
    """(mesh, optimiser, step function) of the model of one number; one function for all tests, as in rounds."""
    mesh, tx = parallel.make_mesh(), optax.sgd(1.0)
    return mesh, tx, train.make_train_step(pull_loss, tx, mesh)


def pull(state=None, **kwargs):
    mesh, tx, step_fn = pulled()
    state = train.init_state({"params": {"x": np.float32(0)}}, tx, 0, mesh) if state is None else state
    return train.fit(step_fn, state, **{"batches": pulls, "num_steps": 6, "mesh": mesh, **kwargs})


def resumed(checkpoints, **kwargs):
    mesh, tx, _ = pulled()
    start = train.init_state({"params": {"x": np.float32(0)}}, tx, 0, mesh)
    return pull(checkpoints.resume(start), checkpoints=checkpoints, **kwargs)


def scripted(values):
    """An evaluation that gives values[0] the first time that the state is at step 2, values[1] at step 4, ..."""
    return lambda state: {"error": values[int(state.step) // 2 - 1]}


@pytest.fixture
def checkpoints(tmp_path):
    with Checkpoints(str(tmp_path / "checkpoints")) as opened:
        yield opened


def test_steps_are_taken_logged_and_counted():
    rows = []
    result = pull(
        num_steps=3, batches=lambda begin: pulls(begin, float), log=lambda step, row: rows.append((step, row))
    )
    assert float(result.state.params["x"]) == -(0 + 1 + 2) and int(result.state.step) == 3
    assert [step for step, _ in rows] == [1, 2, 3]
    assert rows[2][1] == {"loss": -2.0, "grad_norm": 2.0, "pull": 2.0}
    assert not result.stopped and result.best == train.Best()


def test_metrics_are_read_one_step_late():
    """Step 2 is already under way when the metrics of step 1 are asked for."""
    mesh, tx, step_fn = pulled()
    events = []

    def watched(state, batch):
        events.append("step")
        return step_fn(state, batch)

    state = train.init_state({"params": {"x": np.float32(0)}}, tx, 0, mesh)
    train.fit(watched, state, pulls, num_steps=3, mesh=mesh, log=lambda step, row: events.append(step))
    assert events == ["step", "step", 1, "step", 2, 3]


def test_rounds_run_on_one_compiled_step():
    traces = []

    def counted(*args):
        traces.append(1)
        return pull_loss(*args)

    mesh, tx, _ = pulled()
    step_fn = train.make_train_step(counted, tx, mesh)
    state = train.init_state({"params": {"x": np.float32(0)}}, tx, 0, mesh)
    for num_steps in (2, 2, 4, 5):
        state = train.fit(step_fn, state, pulls, num_steps=num_steps, mesh=mesh).state
    assert len(traces) == 1 and int(state.step) == 5 and float(state.params["x"]) == -5


def test_state_and_variables_share_no_memory():
    mesh, tx, step_fn = pulled()
    variables = {"params": {"x": jnp.float32(3)}, "batch_stats": {"mean": jnp.ones(2)}}
    state = train.init_state(variables, tx, 0, mesh)
    step_fn(state, parallel.put(next(pulls(0)), mesh))  # uses its state up
    assert float(variables["params"]["x"]) == 3 and variables["batch_stats"]["mean"].sum() == 2


def test_batches_that_end_early_are_an_error():
    with pytest.raises(ValueError, match="ended after step 2"):
        pull(batches=lambda begin: iter([next(pulls(0))] * 2))


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_divergence_stops_before_it_is_saved(checkpoints, value):
    """1e30 is a finite loss whose gradient's norm is not."""
    with pytest.raises(train.TrainingDiverged, match=r"(loss|grad_norm) is (nan|-?inf) at step 4: .*learning rate"):
        pull(
            batches=lambda begin: pulls(begin, lambda step: value if step == 3 else 1.0),
            every=2,
            checkpoints=checkpoints,
        )
    assert list(checkpoints.metrics) == [2]


def test_a_metric_that_is_not_finite_cannot_select(checkpoints):
    with pytest.raises(train.TrainingDiverged, match="error is nan at step 4"):
        pull(evaluate=scripted([1.0, np.nan, 1.0]), every=2, keep=KEEP, checkpoints=checkpoints)
    with pytest.raises(ValueError, match=r"'error'.*\['loss'\]"):
        pull(evaluate=lambda state: {"loss": 1.0}, every=2, keep=KEEP)


def test_evaluation_and_saving_at_multiples_and_at_the_end(checkpoints):
    seen = []
    pull(
        num_steps=5,
        evaluate=lambda state: {"error": -float(state.step)},
        every=2,
        keep=KEEP,
        checkpoints=checkpoints,
        log=lambda step, row: seen.append(step) if "error" in row else None,
    )
    assert seen == [2, 4, 5] and checkpoints.latest == 5
    pull(num_steps=2, evaluate=lambda state: pytest.fail("every=0 evaluates nothing"))


ERRORS = [5.0, 3.0, 4.0, 3.0, 3.5, 1.0, 2.0]  # by patience 3 the run ends at the fifth: 3.0 again is no better


def test_best_and_latest_are_kept_and_patience_ends_the_run(checkpoints):
    result = pull(num_steps=14, evaluate=scripted(ERRORS), every=2, keep=KEEP, checkpoints=checkpoints)
    assert result.stopped and int(result.state.step) == 10
    assert result.best == train.Best(step=4, value=3.0, since=3)
    assert list(checkpoints.metrics) == [4, 10]
    assert float(checkpoints.restore(result.state, 4).params["x"]) == -4


@pytest.mark.parametrize("mode, step", [("min", 6), ("max", 2)])
def test_modes(mode, step):
    keep = train.Keep(metric="error", mode=mode)
    assert pull(evaluate=scripted([5.0, 3.0, 1.0]), every=2, keep=keep).best.step == step


@pytest.mark.parametrize("life", [1, 2, 4, 7])
def test_stopped_and_resumed_runs_select_and_end_alike(checkpoints, life):
    settings = {"num_steps": 14, "evaluate": scripted(ERRORS), "every": 2, "keep": KEEP}
    whole, lives, result = pull(**settings), 0, None
    while result is None:
        answers = iter([False] * (life - 1) + [True] * 14)
        try:
            result = resumed(checkpoints, **settings, stop=lambda answers=answers: next(answers))
        except train.Interrupted as interrupted:
            assert checkpoints.latest == interrupted.step
            lives += 1
    assert lives >= 1
    assert (result.best, result.stopped) == (whole.best, True)
    assert_same_bits(result.state, whole.state)


def test_a_finished_run_is_not_trained_again(checkpoints):
    settings = {"num_steps": 14, "evaluate": scripted(ERRORS), "every": 2, "keep": KEEP, "checkpoints": checkpoints}
    first = pull(**settings)
    again = pull(first.state, batches=lambda begin: pytest.fail("nothing to train"), **settings)
    assert (again.best, again.stopped) == (first.best, True)


def test_patience_is_shared_by_rounds(checkpoints):
    state, ends = None, []
    for num_steps in (3, 6, 9, 12, 14):
        result = pull(
            state, num_steps=num_steps, evaluate=lambda s: {"error": 1.0}, every=3, keep=KEEP, checkpoints=checkpoints
        )
        state = result.state
        ends.append((int(state.step), result.stopped))
    assert ends == [(3, False), (6, False), (9, False), (12, True), (12, True)]


def test_stop_without_checkpoints_says_so():
    with pytest.raises(train.Interrupted, match="after step 2; no checkpoint") as caught:
        pull(stop=lambda: True)
    assert caught.value.step == 2


def test_a_state_behind_the_checkpoints_is_refused(checkpoints):
    pull(every=3, checkpoints=checkpoints)
    with pytest.raises(ValueError, match=r"holds step 6.*at step 0.*resume"):
        pull(checkpoints=checkpoints)


def test_decay_by_epochs():
    rate = train.epoch_decay(1e-3, 0.95, every_epochs=2, steps_per_epoch=10)
    expected = [1e-3, 1e-3, 9.5e-4, 9.5e-4, 9.025e-4, 9.025e-4]  # Kanavati 2021: epochs 0 to 5
    np.testing.assert_allclose([rate(10 * epoch) for epoch in range(6)], expected, rtol=1e-6)
    np.testing.assert_allclose([rate(10 * epoch + 9) for epoch in range(6)], expected, rtol=1e-6)
    halves = train.epoch_decay(1e-3, 0.95, every_epochs=1, steps_per_epoch=4162.5)
    assert float(halves(4162)) == pytest.approx(1e-3) and float(halves(4163)) == pytest.approx(9.5e-4)


# --- the frozen phase, on the network with BatchNorm and dropout


def head_only(path):
    return path.startswith("head/")


def small_step(tx, **kwargs):
    mesh = parallel.make_mesh()
    loss_fn = losses.binary_cross_entropy(small.Net(), prepare=small.prepare, freeze_norm="trainable" in kwargs)
    return train.make_train_step(loss_fn, tx, mesh, **kwargs), train.init_state(small.variables(), tx, 5, mesh), mesh


def test_only_what_is_trainable_moves():
    step_fn, state, mesh = small_step(optax.adamw(1e-2, weight_decay=0.1), trainable=head_only)
    before = jax.device_get(state)
    for step in range(3):
        state, metrics = step_fn(state, parallel.put(small.batch_of(step), mesh))
    for name in ("stem", "norm"):
        assert_same_bits(before.params[name], state.params[name])
        assert not any(leaf.any() for leaf in jax.tree.leaves((state.opt[0].mu[name], state.opt[0].nu[name])))
    assert_same_bits(before.stats, state.stats)
    assert (before.params["head"]["kernel"] != state.params["head"]["kernel"]).all()
    assert float(metrics["grad_norm"][0]) > 0


def test_nothing_goes_backward_through_what_is_frozen():
    """No gradient of a convolution is left in the compiled step."""
    count = {}
    for name, trainable in (("all", None), ("head", head_only)):
        step_fn, state, mesh = small_step(optax.sgd(0.1), trainable=trainable)
        compiled = step_fn.lower(state, parallel.put(small.batch_of(0), mesh)).compile()
        count[name] = compiled.cost_analysis()["flops"]
    assert count["head"] < 0.75 * count["all"]


def test_trainable_that_matches_nothing_is_an_error():
    step_fn, state, mesh = small_step(optax.sgd(0.1), trainable=lambda path: path == "haed/kernel")
    with pytest.raises(ValueError, match=r"none of the parameters.*head/kernel"):
        step_fn(state, parallel.put(small.batch_of(0), mesh))


def test_thawed_parameters_begin_with_a_new_optimizer():
    """Adam's first update is its rate; without a restart, after 20 frozen steps, it is the bias corrections of the 21st."""
    tx, moved = optax.adam(1e-3, b1=0.5, b2=0.9), {}
    frozen_step, state, mesh = small_step(tx, trainable=head_only)
    free_step, _, _ = small_step(tx)
    for step in range(20):
        state, _ = frozen_step(state, parallel.put(small.batch_of(step), mesh))
    for name, start in (("restarted", train.restart_optimizer(state, tx, mesh)), ("went on", state)):
        before = np.asarray(start.params["stem"]["kernel"])
        after, _ = free_step(jax.tree.map(jnp.copy, start), parallel.put(small.batch_of(20), mesh))
        moved[name] = np.abs(after.params["stem"]["kernel"] - before).max()
    assert moved["restarted"] == pytest.approx(1e-3, rel=1e-3)
    expected = 1e-3 * (0.5 / (1 - 0.5**21)) / np.sqrt(0.1 / (1 - 0.9**21))
    assert moved["went on"] == pytest.approx(expected, rel=1e-3)


# --- real processes


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return small.run(tmp_path_factory.mktemp("uninterrupted"), mesh=parallel.make_mesh())


def small_process(folder, at, sent):
    """Start the small run as a process, send it a signal when it says `at`; (exit status, what it says at the end)."""
    command = [sys.executable, "-m", "tests.small_training", str(folder), "4"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.strip() == at:
                process.send_signal(sent)
        return process.wait(), line.strip()


@pytest.mark.parametrize("at, survivors", [("step 7", [4]), ("evaluated 8", [4, 8])])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, uninterrupted, at, survivors):
    """Killed between two checkpoints; and killed while one is written, or just after."""
    status, _ = small_process(tmp_path, at, signal.SIGKILL)
    assert status == -signal.SIGKILL
    with Checkpoints(str(tmp_path), read_only=True) as checkpoints:
        assert checkpoints.latest in survivors
    result = small.run(tmp_path, mesh=parallel.make_mesh())
    assert_same_bits(result.state, uninterrupted.state)
    assert result.best == uninterrupted.best


def test_a_terminated_run_writes_a_checkpoint_and_goes_on_bit_for_bit(tmp_path, uninterrupted):
    status, message = small_process(tmp_path, "step 5", signal.SIGTERM)
    assert status == small.INTERRUPTED and "the same command continues" in message
    with Checkpoints(str(tmp_path), read_only=True) as checkpoints:
        assert f"after step {checkpoints.latest};" in message
    result = small.run(tmp_path, mesh=parallel.make_mesh())
    assert_same_bits(result.state, uninterrupted.state)
    assert result.best == uninterrupted.best
