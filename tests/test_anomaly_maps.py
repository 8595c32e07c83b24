"""Anomaly maps against loops over pixels, and their smoothing against SciPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

from srcc_jax.kernels.anomaly_maps import anomaly_map, cosine_similarity, dihedral_mean, gaussian_filter
from srcc_jax.kernels.resize import resize_bilinear

smooth = jax.jit(gaussian_filter, static_argnames="sigma")


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def test_cosine_similarity_by_hand():
    """Vector g1 of the method's card: C = 2, H = W = 2."""
    a = np.float32([[[1, 0], [1, 3]], [[0, 2], [1, 4]]]).transpose(1, 2, 0)
    b = np.float32([[[1, 0], [1, 4]], [[1, 1], [0, 3]]]).transpose(1, 2, 0)
    np.testing.assert_allclose(cosine_similarity(a, b), [[0.707107, 1], [0.707107, 0.96]], atol=1e-6)
    np.testing.assert_allclose(cosine_similarity(a, b, axis=(0, 1, 2)), 0.919145, atol=1e-6)


def test_zero_vectors_are_like_nothing_and_have_a_gradient():
    a, b = jnp.zeros((2, 3)), jnp.ones((2, 3))
    np.testing.assert_array_equal(cosine_similarity(a, b), [0, 0])
    np.testing.assert_array_equal(cosine_similarity(a, a), [0, 0])
    assert np.isfinite(jax.grad(lambda a: cosine_similarity(a, b).sum())(a)).all()
    np.testing.assert_allclose(jax.grad(lambda b: cosine_similarity(b, b).sum())(b), 0, atol=1e-7)


def slow_anomaly_map(teacher, student, size):
    """Pixel by pixel, from the definition; the centres of the corner pixels stay corners."""
    total = np.zeros((len(teacher[0]), *size))
    for t, s in zip(teacher, student):
        cosine = (t * s).sum(-1) / np.linalg.norm(t, axis=-1) / np.linalg.norm(s, axis=-1)
        rows, columns = (np.linspace(0, old - 1, new) for old, new in zip(t.shape[1:3], size))
        at = np.meshgrid(rows, columns, indexing="ij")
        total += [scipy.ndimage.map_coordinates(image, at, order=1, mode="nearest") for image in 1 - cosine]
    return total


def test_anomaly_map_is_its_definition():
    shapes = [(2, 8, 6, 5), (2, 4, 3, 7), (2, 1, 1, 9)]
    teacher, student = ([normal(seed + i, *shape) for i, shape in enumerate(shapes)] for seed in (0, 9))
    expected = slow_anomaly_map(teacher, student, (16, 11))
    np.testing.assert_allclose(anomaly_map(teacher, student, (16, 11)), expected, atol=2e-6)
    edges = anomaly_map(teacher, student, (16, 11), align_corners=False)
    assert np.abs(edges - expected).max() > 0.01
    np.testing.assert_allclose(anomaly_map(teacher, teacher, (16, 11)), 0, atol=1e-6)
    with pytest.raises(ValueError):
        anomaly_map(teacher, student[:2], (16, 11))


@pytest.mark.parametrize("align_corners, row", [(True, [0, 1 / 3, 2 / 3, 1]), (False, [0, 0.25, 0.75, 1])])
def test_a_level_is_brought_to_size_as_worked(align_corners, row):
    """Vector g4 of the method's card: [[0, 1], [2, 3]] to 4 × 4."""
    small = np.float32([[0, 1], [2, 3]])[None, ..., None]
    large = np.asarray(resize_bilinear(small, (4, 4), align_corners=align_corners))[0, ..., 0]
    np.testing.assert_allclose(large[0], row, atol=1e-6)
    assert large.mean() == pytest.approx(1.5)


@pytest.mark.parametrize("shape, sigma", [((2, 40, 57), 4.0), ((1, 9, 50), 4.0), ((2, 30, 20), 1.3)])
def test_gaussian_filter_is_that_of_scipy(shape, sigma):
    """Also where the map is smaller than the filter's radius."""
    maps = normal(0, *shape)
    expected = np.stack([scipy.ndimage.gaussian_filter(image.astype(np.float64), sigma) for image in maps])
    ours = smooth(maps, sigma=sigma)
    np.testing.assert_allclose(ours, expected, atol=1e-6)
    np.testing.assert_allclose(ours.mean((1, 2)), maps.mean((1, 2)), atol=1e-6)  # mirroring keeps the mean


def test_gaussian_of_an_impulse():
    impulse = np.zeros((1, 65, 65), np.float32)
    impulse[0, 32, 32] = 1
    ours = np.asarray(smooth(impulse, sigma=4.0))[0]
    assert ours[32, 32] == pytest.approx(0.00994789, rel=1e-5)
    assert ours.sum() == pytest.approx(1, rel=1e-5)
    assert np.flatnonzero(ours[32]).tolist() == list(range(16, 49))


def test_the_mean_over_orientations_sees_each_corner_once_in_each_place():
    image = normal(3, 2, 5, 5, 3)
    weight = normal(4, 5, 5)
    found = dihedral_mean(lambda picture: (picture[..., 0] * weight[None]).sum((1, 2)), jnp.asarray(image))
    turned = [np.rot90(weight, quarter) for quarter in range(4)]
    average = np.mean([*turned, *(one[:, ::-1] for one in turned)], axis=0)
    np.testing.assert_allclose(found, (image[..., 0] * average).sum((1, 2)), rtol=1e-5, atol=1e-5)
