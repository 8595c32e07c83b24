"""Convolutions: the CPU formulations against `lax` convolutions and a loop over pixels, values and gradients."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from srcc_jax.kernels.convolution import conv, depthwise_conv, pointwise_conv, silu
from srcc_jax.parallel import by_rows, make_mesh, whole

PADDINGS = [((0, 0), (0, 0)), ((1, 2), (0, 3)), ((3, 3), (2, 1))]
SIZES = [(9, 8), (7, 7)]


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def slow_depthwise(x, kernel, stride, padding):
    """Pixel by pixel, from the definition."""
    x, kernel = np.pad(x, ((0, 0), *padding, (0, 0))), np.asarray(kernel)
    k = kernel.shape[0]
    rows, columns = ((length - k) // stride + 1 for length in x.shape[1:3])
    out = np.zeros((x.shape[0], rows, columns, x.shape[3]))
    for i, j in itertools.product(range(rows), range(columns)):
        window = x[:, i * stride : i * stride + k, j * stride : j * stride + k]
        out[:, i, j] = (window * kernel[:, :, 0]).sum((1, 2))
    return out


def lax_conv(x, kernel, *, stride, padding):
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[3] // kernel.shape[2],
        precision="highest",
    )


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(function, x, kernel):
    """The output, and the gradients of x and kernel of its sum, weighted with random numbers."""
    out, backward = jax.vjp(function, x, kernel)
    return out, *backward(normal(3, *out.shape).astype(out.dtype))


def assert_all_close(got, wanted, tolerance):
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("k", range(1, 8))
def test_depthwise_is_its_definition_with_the_gradients_of_lax(k, stride):
    settings = {"stride": stride, "padding": PADDINGS[(k + stride) % 3]}
    x, kernel = normal(0, 2, *SIZES[k // 2 % 2], 5), normal(1, k, k, 1, 5)
    got = value_and_gradients(functools.partial(depthwise_conv, **settings), x, kernel)
    np.testing.assert_allclose(got[0], slow_depthwise(x, kernel, **settings), atol=1e-5)
    assert_all_close(got, value_and_gradients(functools.partial(lax_conv, **settings), x, kernel), 1e-5)


@pytest.mark.parametrize(
    "k, stride, padding", [(1, 2, PADDINGS[0]), (3, 1, PADDINGS[1]), (3, 2, PADDINGS[1]), (7, 2, PADDINGS[2])]
)
def test_dense_convolution_is_that_of_lax_with_its_gradients(k, stride, padding):
    x, kernel = normal(0, 2, 9, 8, 3), normal(1, k, k, 3, 4)
    settings = {"stride": stride, "padding": padding}
    got = value_and_gradients(functools.partial(conv, **settings), x, kernel)
    assert_all_close(got, value_and_gradients(functools.partial(lax_conv, **settings), x, kernel), 1e-5)


@pytest.mark.parametrize("inputs, outputs", [(3, 8), (8, 3)])
def test_pointwise_is_a_1x1_convolution(inputs, outputs):
    x, kernel = normal(0, 2, 5, 4, inputs), normal(1, 1, 1, inputs, outputs)
    reference = functools.partial(lax_conv, stride=1, padding=((0, 0), (0, 0)))
    got = value_and_gradients(pointwise_conv, x, kernel)
    assert_all_close(got, value_and_gradients(reference, x, kernel), 1e-5)


def test_silu_and_its_gradient():
    x = jnp.linspace(-30, 30, 601)
    np.testing.assert_allclose(silu(x), jax.nn.silu(x), atol=2e-6)  # the last bit of x: silu(-20) is a difference
    slope = jax.vmap(jax.grad(silu))
    np.testing.assert_allclose(slope(x), jax.vmap(jax.grad(jax.nn.silu))(x), atol=2e-6)
    np.testing.assert_array_equal(slope(jnp.asarray([-1e30, 1e30])), [0, 1])


def test_half_precision_goes_in_and_comes_out():
    x, kernel = normal(0, 2, 6, 6, 4), normal(1, 3, 3, 1, 4)
    function = functools.partial(depthwise_conv, stride=2, padding=((1, 1), (1, 1)))
    got = value_and_gradients(function, x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16))
    assert {a.dtype for a in got} == {jnp.dtype(jnp.bfloat16)}
    assert_all_close([a.astype(jnp.float32) for a in got], value_and_gradients(function, x, kernel), 0.1)


def test_a_batch_of_batches():
    x, kernel = normal(0, 3, 2, 6, 6, 4), normal(1, 3, 3, 1, 4)
    function = functools.partial(depthwise_conv, stride=1, padding=((1, 1), (1, 1)))
    together = jax.vmap(functools.partial(value_and_gradients, function), (0, None))(x, kernel)
    for i, images in enumerate(x):
        assert_all_close([a[i] for a in together], value_and_gradients(function, images, kernel), 1e-5)


def small_network(x, kernels):
    """All convolutions, one after the other: [B, 16, 16, 3] -> scalar."""
    x = silu(conv(x, kernels[0], stride=2, padding=((0, 1), (0, 1))))
    x = silu(pointwise_conv(x, kernels[1]))
    x = depthwise_conv(x, kernels[2], stride=2, padding=((2, 2), (2, 2)))
    x = depthwise_conv(x, kernels[3], stride=1, padding=((1, 1), (1, 1)))
    return jnp.square(pointwise_conv(x, kernels[4])).mean()


def test_a_sharded_batch_stays_on_its_devices_and_gives_the_same_gradients():
    shapes = [(3, 3, 3, 8), (1, 1, 8, 16), (5, 5, 1, 16), (3, 3, 1, 16), (1, 1, 16, 4)]
    kernels, x = [normal(i, *shape) for i, shape in enumerate(shapes)], normal(9, 8, 16, 16, 3)
    step = jax.value_and_grad(small_network, argnums=(0, 1))
    mesh = make_mesh()
    sharded = jax.jit(step, in_shardings=(by_rows(mesh), whole(mesh)))
    assert mesh.size == 4
    for got, wanted in zip(
        jax.tree.leaves(sharded(x, kernels)), jax.tree.leaves(jax.jit(step)(x, kernels)), strict=True
    ):
        np.testing.assert_allclose(got, wanted, atol=1e-5 * np.abs(wanted).max())
    compiled = sharded.lower(x, kernels).compile().as_text()
    assert "all-reduce" in compiled
    for gathering in ("all-gather", "all-to-all", "collective-permute"):
        assert gathering not in compiled
