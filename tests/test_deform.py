"""Deformable convolution against torchvision's stored numbers, a loop over pixels, and the ordinary convolution."""

import functools
import itertools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srcc_jax.kernels import deform
from srcc_jax.kernels.convolution import conv
from srcc_jax.kernels.deform import deform_conv
from srcc_jax.models.deform import DeformConv
from srcc_jax.models.layers import init_variables
from srcc_jax.parallel import by_rows, make_mesh, whole
from tests import golden

FAST_COMPILE = {"xla_backend_optimization_level": 0}
SAME = ((1, 1), (1, 1))
CASES = ["basic", "zero", "stride2", "rect", "dil2", "og2", "og4_g2", "1x1", "far", "allout", "half", "integer", "c64"]


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32))


@functools.partial(jax.jit, static_argnames="padding", compiler_options=FAST_COMPILE)
def forward(x, offsets, kernel, *, padding=((0, 0), (0, 0))):
    return deform_conv(x, offsets, kernel, padding=padding)


def value_and_gradients(function, dy, *arrays, **options):
    """The function's output, and the gradients of all arrays where dy is that of the output."""

    def both(dy, *arrays):
        out, backward = jax.vjp(function, *arrays)
        return out, *backward(dy)

    return jax.jit(both, compiler_options=FAST_COMPILE, **options)(dy, *arrays)


def read(shared_data, case):
    """Arguments of the case, and its arrays in our layout."""
    ops = golden.read(shared_data, "ops")
    name = f"deform_{case}"
    arrays = {key.removeprefix(f"{name}/"): value for key, value in ops.items() if key.startswith(f"{name}/")}
    weights = {key: arrays[key].transpose(2, 3, 1, 0) for key in ("weight", "gweight")}
    images = {key: value.transpose(0, 2, 3, 1) for key, value in arrays.items() if value.ndim == 4}
    return json.loads(str(ops["meta"]))[name], arrays | images | weights


def difference(ours, expected):
    """Relative to the largest value; where all are 0, the largest of ours."""
    return golden.difference(ours, expected) if expected.any() else float(np.abs(ours).max())


@pytest.mark.parametrize("case", CASES)
def test_matches_torchvision_with_all_gradients(shared_data, case):
    arguments, gold = read(shared_data, case)
    function = functools.partial(
        deform_conv,
        padding=tuple((pad, pad) for pad in arguments["padding"]),
        stride=tuple(arguments["stride"]),
        dilation=tuple(arguments["dilation"]),
        offset_groups=arguments["offset_groups"],
        groups=arguments["groups"],
    )
    y, dx, doffsets, dkernel = value_and_gradients(function, gold["dy"], gold["x"], gold["offset"], gold["weight"])
    assert difference(y + gold.get("bias", np.zeros(y.shape[-1])).reshape(1, 1, 1, -1), gold["y"]) <= 2e-6
    assert difference(dx, gold["gx"]) <= 2e-6
    assert difference(dkernel, gold["gweight"]) <= 2e-6
    if not arguments["kinks"]:
        assert difference(doffsets, gold["goffset"]) <= 2e-6


def test_around_the_border(shared_data):
    """Of an image of ones: 1 inside, fading to 0 within the pixel around it, 0 beyond."""
    ops = golden.read(shared_data, "ops")
    coords, expected = (ops[f"deform_border_rows/{key}"] for key in ("coords", "y"))
    down = coords.reshape(-1, 1, 1, 1) - np.arange(4).reshape(1, 4, 1, 1)
    offsets = np.concatenate([np.broadcast_to(down, (len(coords), 4, 4, 1)), np.zeros((len(coords), 4, 4, 1))], -1)
    ours = forward(jnp.ones((len(coords), 4, 4, 1)), jnp.asarray(offsets), jnp.ones((1, 1, 1, 1)))
    np.testing.assert_allclose(ours[..., 0], expected, atol=1e-6)


def test_by_hand():
    """Vectors g6 and g7 of the method's card: the numbers 0 to 8 under a kernel of ones."""
    x = jnp.arange(9.0).reshape(1, 3, 3, 1)
    offsets = np.zeros((2, 3, 3, 9, 2), np.float32)
    offsets[1, ..., 0] = 0.5
    sums = forward(jnp.repeat(x, 2, 0), offsets.reshape(2, 3, 3, 18), jnp.ones((3, 3, 1, 1)), padding=SAME)
    np.testing.assert_allclose(sums[:, 1, 1, 0], [36, 34.5])
    reads = [(1.5, 0.25, 4.75), (-0.5, 1, 0.5), (2.5, 2.5, 2), (-1, 0, 0), (3, 1, 0), (0, 2.75, 0.5)]
    at = np.zeros((len(reads), 3, 3, 2), np.float32)
    at[:, 0, 0] = [place[:2] for place in reads]
    values = forward(jnp.repeat(x, len(reads), 0), at, jnp.ones((1, 1, 1, 1)))
    np.testing.assert_allclose(values[:, 0, 0, 0], [place[2] for place in reads], atol=1e-6)


def slow_deform_conv(x, offsets, kernel, mask, *, stride, top, left):
    """Tap by tap and corner by corner, from the definition; one group."""
    height, width, _, features = kernel.shape
    b, rows, columns, _ = offsets.shape
    out = np.zeros((b, rows, columns, features))
    for n, i, j, u, v in itertools.product(*map(range, (b, rows, columns, height, width))):
        tap = u * width + v
        y = i * stride - top + u + offsets[n, i, j, 2 * tap]
        x_ = j * stride - left + v + offsets[n, i, j, 2 * tap + 1]
        for row, column in itertools.product((np.floor(y), np.floor(y) + 1), (np.floor(x_), np.floor(x_) + 1)):
            if 0 <= row < x.shape[1] and 0 <= column < x.shape[2]:
                share = (1 - abs(y - row)) * (1 - abs(x_ - column)) * mask[n, i, j, tap]
                out[n, i, j] += share * (x[n, int(row), int(column)] @ kernel[u, v])
    return out


@pytest.fixture
def small_pieces(monkeypatch):
    """Seven pixels of the arrays below at a time, so that the last piece is not full."""
    monkeypatch.setattr(deform, "_PIECE", 7 * 2 * 3)


def test_pieces_asymmetric_padding_and_a_mask(small_pieces):
    x, offsets, kernel = normal(0, 2, 6, 7, 3), 2 * normal(1, 2, 4, 4, 12), normal(2, 2, 3, 3, 4)
    mask = jax.nn.sigmoid(normal(3, 2, 4, 4, 6))
    settings = {"stride": 2, "padding": ((2, 1), (1, 2))}
    out, *gradients = value_and_gradients(
        lambda x, o, k, m: deform_conv(x, o, k, mask=m, **settings), normal(4, 2, 4, 4, 4), x, offsets, kernel, mask
    )
    expected = slow_deform_conv(*map(np.asarray, (x, offsets, kernel, mask)), stride=2, top=2, left=1)
    np.testing.assert_allclose(out, expected, atol=1e-5)

    def projected(*arrays):
        slow = slow_deform_conv(*arrays, stride=2, top=2, left=1)
        return (slow * np.asarray(normal(4, 2, 4, 4, 4))).sum()

    arrays = [np.asarray(a, np.float64) for a in (x, offsets, kernel, mask)]
    for i, gradient in enumerate(gradients):
        direction = np.random.default_rng(5).standard_normal(arrays[i].shape)
        ahead, behind = (
            projected(*arrays[:i], arrays[i] + step * direction, *arrays[i + 1 :]) for step in (1e-6, -1e-6)
        )
        assert (gradient * direction).sum() == pytest.approx((ahead - behind) / 2e-6, rel=1e-4, abs=1e-3)


def test_offsets_that_are_no_numbers_harm_nothing_else():
    x, kernel = normal(0, 1, 5, 5, 2), normal(1, 1, 1, 2, 3)
    offsets = np.zeros((1, 5, 5, 2), np.float32)
    offsets[0, 1, 2], offsets[0, 3, 3] = (np.nan, 0), (np.inf, -np.inf)
    out = forward(x, offsets, kernel)
    expected = np.array(x @ kernel[0, 0])
    expected[0, 1, 2], expected[0, 3, 3] = np.nan, 0
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_half_precision_goes_in_and_comes_out():
    x, offsets, kernel = normal(0, 2, 6, 6, 4), normal(1, 2, 6, 6, 18), normal(2, 3, 3, 4, 5)
    half = x.astype(jnp.bfloat16), offsets, kernel.astype(jnp.bfloat16)
    out = forward(*half, padding=SAME)
    assert out.dtype == jnp.bfloat16
    assert golden.difference(out.astype(jnp.float32), np.asarray(forward(x, offsets, kernel, padding=SAME))) < 0.02
    gradients = jax.eval_shape(jax.grad(lambda *arrays: deform_conv(*arrays, padding=SAME).sum(), (0, 1, 2)), *half)
    assert [gradient.dtype for gradient in gradients] == [array.dtype for array in half]


def test_a_sharded_batch_stays_on_its_devices_and_gives_the_same_gradients():
    arrays = normal(0, 8, 8, 8, 4), normal(1, 8, 8, 8, 18), normal(2, 3, 3, 4, 6)
    dy, mesh = normal(3, 8, 8, 8, 6), make_mesh()
    function = functools.partial(deform_conv, padding=SAME)

    def step(dy, *arrays):
        out, backward = jax.vjp(function, *arrays)
        return out, *backward(dy)

    rows = by_rows(mesh)
    sharded = jax.jit(step, in_shardings=(rows, rows, rows, whole(mesh)), out_shardings=(rows, rows, rows, whole(mesh)))
    assert mesh.size == 4
    compiled = sharded.lower(dy, *arrays).compile()
    for got, wanted in zip(compiled(dy, *arrays), value_and_gradients(function, dy, *arrays), strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-5)
    text = compiled.as_text()
    assert text.count(" all-reduce(") == 1
    for gathering in ("all-gather", "all-to-all", "collective-permute"):
        assert gathering not in text


@pytest.mark.parametrize("size", [(2, 64, 64, 64), (1, 128, 128, 128)])
def test_temporary_memory(size):
    """All columns side by side would be 19 and 75 MB, and as much again for each corner and gradient."""

    def step(*arrays):
        out, backward = jax.vjp(functools.partial(deform_conv, padding=SAME), *arrays)
        return backward(out)

    shapes = size, (*size[:3], 18), (3, 3, size[3], size[3])
    lowered = jax.jit(step).lower(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))
    assert lowered.compile(FAST_COMPILE).memory_analysis().temp_size_in_bytes < 64e6


@pytest.mark.parametrize(
    "shapes, options, named",
    [
        (((1, 4, 4, 6), (1, 4, 4, 18), (3, 3, 4, 8)), {}, "6 channels"),
        (((1, 4, 4, 6), (1, 4, 4, 18), (3, 3, 6, 8)), {"stride": 2}, r"offsets.*\(1, 2, 2, 18\)"),
        (((1, 4, 4, 6), (1, 4, 4, 18), (3, 3, 6, 8)), {"offset_groups": 4}, "4 groups of offsets"),
        (((1, 4, 4, 6), (1, 4, 4, 18), (3, 3, 6, 8)), {"mask": jnp.ones((1, 4, 4, 18))}, r"mask.*\(1, 4, 4, 9\)"),
    ],
)
def test_shapes_that_disagree_are_named(shapes, options, named):
    with pytest.raises(ValueError, match=named):
        deform_conv(*map(jnp.ones, shapes), padding=SAME, **options)


class Network(nn.Module):
    """The layer alone, with the arguments of a network."""

    @nn.compact
    def __call__(self, x, *, train):
        return DeformConv(8, size=3, stride=2, use_bias=True, name="layer")(x)


def test_a_fresh_layer_is_an_ordinary_convolution_that_can_learn_where_to_look():
    x = normal(0, 2, 9, 8, 4)
    params = init_variables(Network(), jax.random.key(0), x.shape)["params"]["layer"]
    assert jax.tree.map(jnp.shape, params) == {
        "offset": {"zero_kernel": (3, 3, 4, 18), "bias": (18,)},
        "kernel": (3, 3, 4, 8),
        "bias": (8,),
    }
    assert not params["offset"]["zero_kernel"].any()
    assert not params["offset"]["bias"].any()

    @functools.partial(jax.jit, compiler_options=FAST_COMPILE)
    def step(params):
        def loss(params):
            y = Network().apply({"params": {"layer": params}}, x, train=True)
            return jnp.square(y).sum(), y

        gradient, y = jax.grad(loss, has_aux=True)(params)
        return gradient, y, conv(x, params["kernel"], stride=2, padding=SAME)

    gradient, y, expected = step(params)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    assert jnp.abs(gradient["offset"]["zero_kernel"]).max() > 0
