"""Pooling: against `lax`'s windows and torch's recorded results, gradients included."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from srcc_jax.kernels.pooling import avg_pool, max_pool
from srcc_jax.parallel import by_rows, make_mesh

CASES = [  # size, stride, padding
    (3, 2, ((1, 1), (1, 1))),
    (2, 2, ((0, 0), (0, 0))),
    (3, 1, ((1, 1), (0, 2))),
    (2, 3, ((0, 1), (1, 0))),
    (5, 2, ((2, 0), (1, 2))),
]
MAX_GOLDENS = ["k3s2p1_even", "k3s2p1_odd", "k3s2p1_negative", "k3s2p1_ceil", "k2s2_floor", "k2s2_ceil", "ties"]
AVG_GOLDENS = ["k3s1p1", "k3s2p1", "k3s2p1_exclude", "k2s2_floor", "k2s2_ceil_exclude"]


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def slow_pool(x, *, size, stride, padding, count_include_pad=None):
    """With `lax`'s windows; count_include_pad None: the maximum."""
    windows = (1, size, size, 1), (1, stride, stride, 1), ((0, 0), *padding, (0, 0))
    if count_include_pad is None:
        return lax.reduce_window(x, -np.inf, lax.max, *windows)
    inside = lax.reduce_window(jnp.ones_like(x), 0.0, lax.add, *windows)
    return lax.reduce_window(x, 0.0, lax.add, *windows) / (size**2 if count_include_pad else inside)


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradient(function, x, dy):
    out, backward = jax.vjp(function, x)
    return out, *backward(dy)


def assert_same(pool, slow, x):
    dy = normal(1, *jax.eval_shape(slow, x).shape)
    for got, wanted in zip(value_and_gradient(pool, x, dy), value_and_gradient(slow, x, dy), strict=True):
        np.testing.assert_allclose(got, wanted, atol=2e-6)


@pytest.mark.parametrize("size, stride, padding", CASES)
def test_maximum_is_that_of_lax_with_its_gradient_among_equals_too(size, stride, padding):
    settings = {"size": size, "stride": stride, "padding": padding}
    x = jnp.maximum(normal(0, 2, 9, 8, 3), 0) - 1  # many are equal, and none is as high as a padding with 0
    assert_same(functools.partial(max_pool, **settings), functools.partial(slow_pool, **settings), x)


@pytest.mark.parametrize("count_include_pad", [True, False])
@pytest.mark.parametrize("size, stride, padding", CASES)
def test_mean_is_that_of_lax_with_its_gradient(size, stride, padding, count_include_pad):
    settings = {"size": size, "stride": stride, "padding": padding, "count_include_pad": count_include_pad}
    x = normal(0, 2, 9, 8, 3)
    assert_same(functools.partial(avg_pool, **settings), functools.partial(slow_pool, **settings), x)


def test_half_precision_goes_in_and_comes_out():
    x = normal(0, 1, 6, 6, 2).astype(jnp.bfloat16)
    for pool in (max_pool, avg_pool):
        function = functools.partial(pool, size=3, stride=2, padding=((1, 1), (1, 1)))
        got = value_and_gradient(function, x, jnp.ones((1, 3, 3, 2), x.dtype))
        assert {a.dtype for a in got} == {jnp.dtype(jnp.bfloat16)}


def test_a_large_window_counts_its_taps_right():
    x = normal(0, 1, 13, 13, 1)
    settings = {"size": 13, "stride": 1, "padding": ((0, 0), (0, 0))}
    assert_same(functools.partial(max_pool, **settings), functools.partial(slow_pool, **settings), x)


@pytest.mark.parametrize("kind, name", [("max", n) for n in MAX_GOLDENS] + [("avg", n) for n in AVG_GOLDENS])
def test_torch(shared_data, kind, name):
    """Windows of torch's ceil_mode reach past the image at the bottom and right, which is padding there."""
    with np.load(shared_data / "golden" / "ops.npz", allow_pickle=False) as file:
        meta = json.loads(str(file["meta"]))[f"{kind}_{name}"]
        x, y, dx = (jnp.asarray(file[f"{kind}_{name}/{key}"].transpose(0, 2, 3, 1)) for key in ("x", "y", "gx"))
        dy = jnp.ones_like(y) if name == "ties" else jnp.asarray(file[f"{kind}_{name}/dy"].transpose(0, 2, 3, 1))
    size, stride, before = meta["kernel_size"], meta["stride"], meta.get("padding", 0)
    padding = tuple(
        (before, (outputs - 1) * stride + size - before - length if meta.get("ceil_mode") else before)
        for length, outputs in zip(x.shape[1:3], y.shape[1:3])
    )
    counting = {} if kind == "max" else {"count_include_pad": meta.get("count_include_pad", True)}
    pool = functools.partial({"max": max_pool, "avg": avg_pool}[kind], size=size, stride=stride, padding=padding)
    got = value_and_gradient(functools.partial(pool, **counting), x, dy)
    np.testing.assert_allclose(got[0], y, atol=2e-6)
    np.testing.assert_allclose(got[1], dx, atol=2e-6)


def test_a_sharded_batch_stays_on_its_devices():
    def loss(x):
        x = max_pool(x, size=3, stride=2, padding=((1, 1), (1, 1)))
        return jnp.square(avg_pool(x, size=3, stride=1, padding=((1, 1), (1, 1)))).sum()

    x = normal(0, 8, 9, 9, 2)
    placed = jax.device_put(x, by_rows(make_mesh()))
    sharded = jax.jit(jax.grad(loss)).lower(placed).compile()
    np.testing.assert_allclose(sharded(placed), jax.jit(jax.grad(loss))(x), atol=1e-5)
    for moving in ("all-gather", "all-to-all", "collective-permute"):
        assert moving not in sharded.as_text()
