"""Convolutions: the CPU formulations against `lax` convolutions and a loop over pixels, values and gradients."""

import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from srcc_jax.kernels.convolution import conv, conv_transpose, depthwise_conv, pointwise_conv, silu
from srcc_jax.kernels.winograd import winograd_conv
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


def lax_conv(x, kernel, *, stride, padding, dilation=1):
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        padding,
        rhs_dilation=(dilation, dilation),
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
    "size, channels, k, stride, dilation, padding",
    [
        # blocks of columns as channels: few channels
        ((9, 8), (3, 4), 3, 1, 1, PADDINGS[1]),
        ((9, 8), (3, 32), 3, 2, 1, PADDINGS[1]),
        ((7, 9), (3, 16), 7, 1, 1, PADDINGS[2]),
        ((9, 8), (3, 5), 7, 2, 1, PADDINGS[2]),
        ((3, 2), (1, 1), 3, 3, 1, PADDINGS[1]),
        ((9, 8), (3, 4), 1, 2, 1, PADDINGS[0]),
        # one product of all taps: small maps, and kernels of one pixel
        ((9, 8), (5, 6), 3, 2, 1, PADDINGS[2]),
        ((9, 8), (6, 5), 3, 1, 2, PADDINGS[2]),
        ((27, 27), (5, 6), 1, 2, 1, PADDINGS[0]),
        # lax
        ((27, 27), (5, 6), 3, 2, 1, PADDINGS[1]),
        ((19, 17), (5, 6), 3, 1, 4, ((4, 4), (4, 4))),
        ((15, 13), (3, 40), 3, 1, 1, PADDINGS[1]),
        # Winograd
        ((15, 14), (32, 33), 3, 1, 1, PADDINGS[1]),
        ((13, 13), (33, 32), 3, 1, 1, ((1, 1), (1, 1))),
    ],
)
def test_dense_convolution_is_that_of_lax_with_its_gradients(size, channels, k, stride, dilation, padding):
    x, kernel = normal(0, 2, *size, channels[0]), normal(1, k, k, *channels)
    settings = {"stride": stride, "padding": padding, "dilation": dilation}
    got = value_and_gradients(functools.partial(conv, **settings), x, kernel)
    for a, b in zip(got, value_and_gradients(functools.partial(lax_conv, **settings), x, kernel), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6 * np.abs(b).max())


@pytest.mark.parametrize("padding", [((1, 1), (1, 1)), ((3, 0), (2, 4))])
def test_winograd_is_exact_in_double_precision_with_its_gradients(padding):
    with jax.enable_x64(True):
        x, kernel = normal(0, 2, 6, 5, 3).astype(jnp.float64), normal(1, 3, 3, 3, 4).astype(jnp.float64)
        got = value_and_gradients(functools.partial(winograd_conv, padding=padding), x, kernel)
        wanted = value_and_gradients(functools.partial(lax_conv, stride=1, padding=padding), x, kernel)
        assert_all_close(got, wanted, 1e-12)


def slow_conv_transpose(x, kernel, stride, padding, output_padding):
    """Pixel by pixel: each lays the kernel, weighted, on the output."""
    x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    k = kernel.shape[0]
    rows, columns = ((n - 1) * stride + k + output_padding for n in x.shape[1:3])
    out = np.zeros((x.shape[0], rows, columns, kernel.shape[3]))
    for i, j in itertools.product(range(x.shape[1]), range(x.shape[2])):
        top, left = i * stride, j * stride
        out[:, top : top + k, left : left + k] += np.einsum("bc,ijcf->bijf", x[:, i, j], kernel)
    return out[:, padding : rows - padding, padding : columns - padding]


@pytest.mark.parametrize("depthwise", [False, True])
@pytest.mark.parametrize(
    "k, stride, padding, output_padding",
    [(2, 2, 0, 0), (4, 2, 1, 0), (3, 2, 1, 1), (3, 2, 0, 1), (3, 1, 1, 0), (3, 3, 0, 0), (2, 3, 0, 1), (8, 4, 2, 0)],
)
def test_transposed_convolution_is_its_definition_with_the_gradients_of_lax(
    k, stride, padding, output_padding, depthwise
):
    x, kernel = normal(0, 2, 4, 3, 5), normal(1, k, k, 5, 1 if depthwise else 4)
    settings = {"stride": stride, "padding": padding, "output_padding": output_padding}

    def slow(x, kernel):
        full = kernel * jnp.eye(5)[None, None] if depthwise else kernel
        around = (k - 1 - padding, k - 1 - padding + output_padding)
        return lax.conv_general_dilated(
            x,
            full[::-1, ::-1],
            (1, 1),
            (around, around),
            lhs_dilation=(stride, stride),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    got = value_and_gradients(functools.partial(conv_transpose, depthwise=depthwise, **settings), x, kernel)
    assert_all_close(got, value_and_gradients(slow, x, kernel), 1e-5)
    full = kernel * jnp.eye(5)[None, None] if depthwise else kernel
    np.testing.assert_allclose(got[0], slow_conv_transpose(x, full, **settings), atol=1e-5)


@pytest.mark.parametrize(
    "name", ["k2s2", "k4s2p1", "k3s2p1op1", "k4s2p1_bilinear", "k4s2p1_grouped", "k8s4p2_bilinear"]
)
def test_transposed_convolution_of_torch(shared_data, name):
    with np.load(shared_data / "golden" / "ops.npz", allow_pickle=False) as file:
        meta = json.loads(str(file["meta"]))[f"convt_{name}"]
        x, y, dy, dx = (
            jnp.asarray(file[f"convt_{name}/{key}"].transpose(0, 2, 3, 1)) for key in ("x", "y", "dy", "gx")
        )
        kernel, dkernel = (
            jnp.asarray(file[f"convt_{name}/{key}"].transpose(2, 3, 0, 1)) for key in ("weight", "gweight")
        )
    settings = {key: meta.get(key, 0) for key in ("stride", "padding", "output_padding")}
    function = functools.partial(conv_transpose, depthwise="groups" in meta, **settings)
    gradients = jax.jit(lambda x, kernel, dy: jax.vjp(function, x, kernel)[1](dy))
    for got, wanted in zip((function(x, kernel), *gradients(x, kernel, dy)), (y, dx, dkernel), strict=True):
        np.testing.assert_allclose(got, wanted, atol=2e-6 * max(1, np.abs(wanted).max()))


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
    """All convolutions, one after the other: [B, 28, 28, 3] -> scalar."""
    x = silu(conv(x, kernels[0], stride=2, padding=((0, 1), (0, 1))))
    x = silu(conv(x, kernels[1], stride=1, padding=((1, 1), (1, 1))))
    x = silu(pointwise_conv(x, kernels[2]))
    x = depthwise_conv(x, kernels[3], stride=2, padding=((2, 2), (2, 2)))
    x = depthwise_conv(x, kernels[4], stride=1, padding=((1, 1), (1, 1)))
    x = conv(x, kernels[5], stride=1, padding=((1, 1), (1, 1)))
    x = conv_transpose(x, kernels[6], stride=2, padding=0)
    x = conv_transpose(x, kernels[7], stride=2, padding=1, depthwise=True)
    return jnp.square(pointwise_conv(x, kernels[8])).mean()


def test_a_sharded_batch_stays_on_its_devices_and_gives_the_same_gradients():
    shapes = [(3, 3, 3, 32), (3, 3, 32, 32), (1, 1, 32, 16), (5, 5, 1, 16), (3, 3, 1, 16)]
    shapes += [(3, 3, 16, 8), (2, 2, 8, 8), (4, 4, 8, 1), (1, 1, 8, 4)]
    kernels, x = [normal(i, *shape) for i, shape in enumerate(shapes)], normal(9, 8, 28, 28, 3)
    step = jax.value_and_grad(small_network, argnums=(0, 1))
    mesh = make_mesh()
    placed = jax.device_put(x, by_rows(mesh)), jax.device_put(kernels, whole(mesh))
    sharded = jax.jit(step).lower(*placed).compile()
    assert mesh.size == 4
    for got, wanted in zip(jax.tree.leaves(sharded(*placed)), jax.tree.leaves(jax.jit(step)(x, kernels)), strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-5 * np.abs(wanted).max())
    compiled = sharded.as_text()
    assert "all-reduce" in compiled
    for gathering in ("all-gather", "all-to-all", "collective-permute"):
        assert gathering not in compiled
