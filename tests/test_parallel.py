"""Devices and processes: where rows go, and that their number changes nothing."""

import contextlib
import pathlib
import signal
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from srcc_jax import losses, parallel, train
from srcc_jax.checkpoints import Checkpoints
from tests import small_training as small

ROOT = pathlib.Path(__file__).resolve().parents[1]


def assert_close(tree, other, atol):
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, atol=atol, err_msg=jax.tree_util.keystr(path))


def parameters(folder, step, mesh):
    """The parameters and statistics of a checkpoint of the small run."""
    state = train.init_state(small.variables(), small.optimizer(), 0, mesh)
    with Checkpoints(str(folder), read_only=True) as checkpoints:
        return checkpoints.restore({"params": state.params, "stats": state.stats}, step)


def test_mesh_has_one_automatic_axis_over_all_devices():
    mesh = parallel.make_mesh()
    assert mesh.axis_names == ("data",) and mesh.size == 4
    assert mesh.axis_types == (jax.sharding.AxisType.Auto,)
    assert parallel.make_mesh(jax.devices()[:2]).size == 2


def test_put_splits_rows_and_keeps_values():
    batch = {"image": np.arange(96, dtype=np.uint8).reshape(8, 2, 2, 3), "weight": np.ones(8, np.float32)}
    on_devices = parallel.put(batch, parallel.make_mesh())
    assert [shard.data.shape for shard in on_devices["image"].addressable_shards] == [(2, 2, 2, 3)] * 4
    for name, array in batch.items():
        assert on_devices[name].dtype == array.dtype
        np.testing.assert_array_equal(on_devices[name], array)


@pytest.mark.parametrize("array", [np.ones((6, 3)), np.float32(1)])
def test_rows_that_cannot_be_dealt_out_are_refused(array):
    with pytest.raises(ValueError, match=r"batch\['label'\].*4 devices.*weight 0"):
        parallel.put({"image": np.ones((8, 2)), "label": array}, parallel.make_mesh())
    with pytest.raises(ValueError, match="batch of 6 rows"):
        parallel.process_rows(6, parallel.make_mesh())


def test_one_process_reads_all_rows():
    assert parallel.process_rows(8, parallel.make_mesh()).tolist() == list(range(8))
    assert parallel.any_process(True, parallel.make_mesh()) is True


def test_replicated_arrays_are_whole_on_every_device():
    copies = parallel.replicate({"kernel": np.arange(3.0, dtype=np.float32)}, parallel.make_mesh())
    assert [shard.data.tolist() for shard in copies["kernel"].addressable_shards] == [[0, 1, 2]] * 4


def test_devices_are_set_before_jax_starts_or_not_at_all():
    with pytest.raises(RuntimeError, match="before backends are initialized"):
        parallel.set_cpu_devices(jax.device_count() + 1)


def test_a_step_on_four_devices_equals_one():
    """The statistics of BatchNorm, dropout and augmentation included."""
    states, metrics = {}, {}
    for count in (1, 4):
        mesh = parallel.make_mesh(jax.devices()[:count])
        loss_fn = losses.binary_cross_entropy(small.Net(), prepare=small.prepare)
        step_fn = train.make_train_step(loss_fn, small.optimizer(), mesh)
        state = train.init_state(small.variables(), small.optimizer(), 5, mesh)
        for step in range(3):
            state, metrics[count] = step_fn(state, parallel.put(small.batch_of(step), mesh))
        states[count] = state
    assert_close((states[4].params, states[4].stats), (states[1].params, states[1].stats), 1e-5)
    assert_close(metrics[4], metrics[1], 1e-5)


@contextlib.contextmanager
def two_processes(folder):
    """Two real processes of the small run, two devices each; they end with the test."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "tests.small_training", folder, "2", address, "2"]
    processes = [
        subprocess.Popen([*command, str(i)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def ends(processes):
    """[(exit status, last line)] of processes that are left to run."""
    outputs = [process.communicate(timeout=100) for process in processes]
    return [(process.returncode, (out.splitlines() or [err])[-1]) for process, (out, err) in zip(processes, outputs)]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """The small run to its end, in this process, on four devices."""
    return small.run(tmp_path_factory.mktemp("one"), mesh=parallel.make_mesh())


def test_two_processes_train_the_same_model_as_one(tmp_path, one_process):
    with two_processes(tmp_path) as processes:
        assert ends(processes) == [(0, f"evaluated {small.STEPS}")] * 2
    state = one_process.state
    ours = parameters(tmp_path, small.STEPS, parallel.make_mesh())
    assert_close(ours, {"params": state.params, "stats": state.stats}, 1e-5)


def test_stopping_one_process_stops_both_at_the_same_step(tmp_path, one_process):
    with two_processes(tmp_path) as processes:
        for line in processes[1].stdout:
            if line == "step 5\n":
                processes[1].send_signal(signal.SIGTERM)
                break
        (status, message), other = ends(processes)
    assert (status, message) == other and status == small.INTERRUPTED and "checkpoint is written" in message
    rest = small.run(tmp_path, mesh=parallel.make_mesh())  # goes on in one process
    assert_close(rest.state.params, one_process.state.params, 1e-5)
