"""The sliding-window kernel against a loop in NumPy: what is padding, which device computes what, and what is compiled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srcc_jax.kernels.windows import make_window_fn
from srcc_jax.parallel import make_mesh

TILE, SIDE = 6, 16


@pytest.fixture(scope="module")
def batch():
    """Two super-tiles and 21 windows, of which each test says how many are real."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (2, SIDE, SIDE, 3), np.uint8)
    window = np.stack([rng.integers(0, 2, 21), *rng.integers(0, SIDE - TILE + 1, (2, 21))], axis=1).astype(np.int32)
    return image, window


def describe(scale, windows):
    """A mean per channel, the windows themselves, and a whole number: [c, 3], [c, tile, tile, 3], [c]."""
    assert windows.dtype == jnp.uint8
    values = windows.astype(jnp.float32)
    return {"mean": scale * values.mean((1, 2)), "same": windows, "top": windows.max((1, 2, 3)).astype(jnp.int32)}


def slow_describe(scale, image, window, count):
    out = {
        "mean": np.zeros((len(window), 3)),
        "same": np.zeros((len(window), TILE, TILE, 3)),
        "top": np.zeros(len(window)),
    }
    for i, (b, top, left) in enumerate(window[:count]):
        out["same"][i] = image[b, top : top + TILE, left : left + TILE]
        out["mean"][i], out["top"][i] = scale * out["same"][i].mean((0, 1)), out["same"][i].max()
    return out


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("chunk", [1, 2, 3, 64, None])
def test_equal_to_a_loop_whatever_the_count_and_compiled_once(batch, devices, chunk):
    kernel = make_window_fn(describe, tile=TILE, mesh=make_mesh(jax.devices()[:devices]), chunk=chunk)
    for count in (21, 0, 1, 4, 10, 20):
        got, wanted = kernel(2.0, *batch, count), slow_describe(2.0, *batch, count)
        for name in wanted:
            np.testing.assert_allclose(got[name], wanted[name], rtol=1e-6, err_msg=f"{name}, {count} windows")
    assert kernel._cache_size() == 1


def test_padding_is_not_looked_at_and_stays_zero(batch):
    """Neither windows that lie nowhere nor a function that makes NaN of them can leave a trace."""
    image, window = batch
    window = np.where(np.arange(len(window))[:, None] < 5, window, 10_000).astype(np.int32)
    image[1] = 0

    def invert(_, windows):
        return 1 / windows.astype(jnp.float32).mean((1, 2, 3))

    out = np.asarray(make_window_fn(invert, tile=TILE, mesh=make_mesh())(None, image, window, 3))
    assert (out[3:] == 0).all()


@pytest.mark.parametrize("count, chunks", [(0, 0), (1, 1), (4, 4), (8, 4), (9, 5), (17, 9)])
def test_only_chunks_with_real_windows_are_computed(batch, count, chunks):
    """Four devices, two windows at a time: nine windows are dealt out as 3, 2, 2, 2, which is 2 + 1 + 1 + 1 chunks."""
    calls = []

    def counted(_, windows):
        jax.debug.callback(lambda _: calls.append(1), windows[0, 0, 0, 0])
        return windows.max((1, 2, 3))

    jax.block_until_ready(make_window_fn(counted, tile=TILE, mesh=make_mesh(), chunk=2)(None, *batch, count))
    jax.effects_barrier()
    assert len(calls) == chunks
