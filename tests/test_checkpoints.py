"""Checkpoints: what comes back, what is refused, and what a full disk or an interrupted deletion leaves."""

import resource
import shutil

import jax
import numpy as np
import optax
import pytest

from srcc_jax import parallel, train
from srcc_jax.checkpoints import CheckpointError, Checkpoints
from tests import small_training as small
from tests.small_training import assert_same_bits


@pytest.fixture
def checkpoints(tmp_path):
    with Checkpoints(str(tmp_path / "checkpoints")) as opened:
        yield opened


def test_another_model_is_refused_by_name(checkpoints):
    tx, mesh = optax.adam(1e-3), parallel.make_mesh()
    state = train.init_state(small.variables(), tx, 5, mesh)
    checkpoints.save(7, state, {})
    wider = small.variables()
    wider["params"]["head"]["kernel"] = np.zeros((8, 2), np.float32)
    wider["params"]["body"] = wider["params"].pop("norm")
    with pytest.raises(CheckpointError) as caught:
        checkpoints.resume(train.init_state(wider, tx, 5, mesh))
    assert "opt/0/mu/head/kernel is float32[8, 1] in the checkpoint and float32[8, 2] in the model" in str(caught.value)
    assert "(15 arrays differ)" in str(caught.value)  # a kernel, two names gone and two new, each with two moments
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 8 .*there are \[7\]"):
        checkpoints.restore(state, 8)


def test_parts_and_keys_are_restored_bit_for_bit(checkpoints):
    tx, mesh = optax.adam(1e-3), parallel.make_mesh()
    state = train.init_state(small.variables(), tx, 5, mesh)
    checkpoints.save(7, state, {"auc": 1 / 3})
    other = train.init_state(
        jax.tree.map(np.zeros_like, small.variables()), tx, 6, parallel.make_mesh(jax.devices()[:1])
    )
    assert_same_bits(checkpoints.restore(other, 7), state)
    parts = checkpoints.restore({"params": other.params, "stats": other.stats}, 7)
    assert_same_bits(parts, {"params": state.params, "stats": state.stats})
    assert parts["params"]["head"]["kernel"].sharding == other.params["head"]["kernel"].sharding
    with Checkpoints(checkpoints.directory, read_only=True) as reader:
        assert reader.metrics == {7: {"auc": 1 / 3}}


def test_folders_that_cannot_hold_checkpoints(tmp_path):
    with pytest.raises(CheckpointError, match="absolute"):
        Checkpoints("runs/a")
    with pytest.raises(CheckpointError, match="no such folder"):
        Checkpoints(str(tmp_path / "missing"), read_only=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot keep checkpoints in"):
        Checkpoints(str(tmp_path / "file"))


def test_a_full_disk_is_one_clear_line_and_harms_nothing(checkpoints, caplog):
    state = {"noise": np.random.default_rng(0).normal(size=20_000)}
    checkpoints.save(1, state, {})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(
            CheckpointError, match=r"^cannot write the checkpoint of step 2 in .*File too large.*Make room.*$"
        ):
            checkpoints.save(2, state, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not caplog.records and list(checkpoints.metrics) == [1]
    checkpoints.save(3, state, {})
    np.testing.assert_array_equal(checkpoints.restore(state, 3)["noise"], state["noise"])


def test_a_deletion_cut_short_is_finished_by_the_next_save(checkpoints):
    keep = train.Keep(metric="error", mode="min")
    for step, error in ((1, 3.0), (2, 1.0), (3, 2.0)):
        checkpoints.save(step, {"x": np.ones(3)}, {"error": error}, keep=[1, 2])
    shutil.rmtree(f"{checkpoints.directory}/1/metrics")
    shutil.rmtree(f"{checkpoints.directory}/1/state")
    with Checkpoints(checkpoints.directory) as reopened:
        assert reopened.latest == 3 and keep.best_of(reopened).step == 2
        reopened.save(4, {"x": np.ones(3)}, {"error": 1.5}, keep=[2])
        assert list(reopened.metrics) == [2, 4]
