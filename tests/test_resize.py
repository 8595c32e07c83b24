"""Bilinear interpolation against torch's own numbers."""

import functools
import json

import jax
import numpy as np
import pytest

from srcc_jax.kernels import resize
from tests import golden

CASES = [
    f"bilinear_{corners}_{what}"
    for corners in ("ac", "hp")
    for what in ("up2", "up4", "odd", "down", "mixed", "to1", "from1", "map")
]


def nhwc(array):
    return array.transpose(0, 2, 3, 1)


@pytest.fixture(scope="module")
def ops(shared_data):
    arrays = golden.read(shared_data, "ops")
    return arrays, json.loads(str(arrays["meta"]))


@functools.partial(jax.jit, static_argnames=("size", "align_corners"))
def values_and_gradient(x, dy, *, size, align_corners):
    y, backward = jax.vjp(lambda x: resize.resize_bilinear(x, size, align_corners=align_corners), x)
    return y, *backward(dy)


@pytest.mark.parametrize("case", CASES)
def test_resize_bilinear_matches_torch(ops, case):
    arrays, meta = ops
    x, y, dy, gx = (nhwc(arrays[f"{case}/{name}"]) for name in ("x", "y", "dy", "gx"))
    options = {"size": tuple(meta[case]["size"]), "align_corners": meta[case]["align_corners"]}
    ours, gradient = values_and_gradient(x, dy, **options)
    assert ours.shape == y.shape
    assert golden.difference(ours, y) <= 2e-6
    assert golden.difference(gradient, gx) <= 2e-6


@pytest.mark.parametrize("case", ["convt_k4s2p1_bilinear", "convt_k8s4p2_bilinear"])
def test_transposed_upsampling_matches_torch(ops, case):
    arrays, meta = ops
    x, y, weight = (arrays[f"{case}/{name}"] for name in ("x", "y", "weight"))
    kernel = resize.bilinear_kernel(meta[case]["stride"], x.shape[1])
    np.testing.assert_array_equal(kernel, weight.transpose(2, 3, 0, 1))
    assert golden.difference(resize.upsample_transposed(nhwc(x), kernel), nhwc(y)) <= 1e-6


@pytest.mark.parametrize(
    "factor, taps",
    [(2, [0.25, 0.75, 0.75, 0.25]), (4, [0.125, 0.375, 0.625, 0.875, 0.875, 0.625, 0.375, 0.125])],
)
def test_bilinear_kernel_by_hand(factor, taps):
    kernel = resize.bilinear_kernel(factor, 3)
    assert kernel.shape == (2 * factor, 2 * factor, 3, 1)
    for channel in range(3):
        np.testing.assert_array_equal(kernel[:, :, channel, 0], np.outer(taps, taps))


def test_transposed_upsampling_interpolates_inside_and_fades_at_the_border():
    x = np.random.default_rng(0).standard_normal((1, 6, 5, 2), dtype=np.float32)
    up = np.asarray(resize.upsample_transposed(x, resize.bilinear_kernel(4, 2)))
    interpolated = np.asarray(resize.resize_bilinear(x, (24, 20), align_corners=False))
    np.testing.assert_allclose(up[:, 2:-2, 2:-2], interpolated[:, 2:-2, 2:-2], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(up[:, 0, 2:-2], 0.625 * interpolated[:, 0, 2:-2], rtol=1e-5, atol=1e-6)


def test_odd_factors_are_refused():
    with pytest.raises(ValueError, match="even"):
        resize.bilinear_kernel(3, 1)


def test_nearest_repeats_pixels():
    x = np.arange(12, dtype=np.float32).reshape(1, 2, 3, 2)
    np.testing.assert_array_equal(resize.upsample_nearest(x, 2), x.repeat(2, 1).repeat(2, 2))
