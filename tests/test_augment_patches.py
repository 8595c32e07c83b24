"""Views of patches: each operation against SciPy or a slow twin, and how often what is drawn."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from srcc_jax import parallel
from srcc_jax.augment_filters import GAUSSIAN, MEAN, WINDOWS, add_noise, blur, median
from srcc_jax.augment_geometry import (
    LEFT_RIGHT,
    TOP_BOTTOM,
    TRANSPOSITION,
    about_centre,
    elastic_field,
    mirrored,
    pixel_places,
    read_at,
    rotation,
    triangle_map,
)
from srcc_jax.augment_patches import PatchViewConfig, patch_views

NOTHING = {"scale": 0.0, "symmetry": 0.0, "distortion": 0.0, "filtering": 0.0, "lighting": 0.0}
ALL = PatchViewConfig(elastic_affine=3.0, filtering=0.9)  # of small images
views = jax.jit(patch_views, static_argnums=2)
read = jax.jit(read_at)


def images(count, side=16, seed=0):
    """Smooth enough that a wrong place shows, and with no symmetry."""
    noise = np.random.default_rng(seed).uniform(0, 255, (count, side, side, 3))
    return ndimage.gaussian_filter(noise, (0, 0.7, 0.7, 0)).round().astype(np.uint8)


def only(**changes):
    return PatchViewConfig(**{**NOTHING, **changes})


def read_twin(image, y, x):
    """SciPy's bilinear values, its image going on as its mirror image."""
    channels = np.moveaxis(image.astype(float), -1, 0)
    return np.stack([ndimage.map_coordinates(c, [y, x], order=1, mode="mirror") for c in channels], -1)


@pytest.mark.parametrize("shape", [(9, 7), (1, 5), (4, 1)])
def test_pixels_anywhere_are_those_of_the_mirrored_image(shape):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    y, x = (np.random.default_rng(n).uniform(-30, 40, shape).astype(np.float32) for n in (1, 2))
    got = read(image, mirrored((jnp.asarray(y), jnp.asarray(x))))
    np.testing.assert_allclose(got, read_twin(image, y, x), atol=2e-3)  # of 255: places in float32


@pytest.mark.parametrize(
    "linear, expected",
    [
        (TRANSPOSITION, lambda image: image.swapaxes(0, 1)),
        (LEFT_RIGHT, lambda image: image[:, ::-1]),
        (TOP_BOTTOM, lambda image: image[::-1]),
        (rotation(jnp.float32(90)), lambda image: np.rot90(image)),
        (np.eye(2, dtype=np.float32) / 3, lambda image: np.kron(image, np.ones((3, 3, 1)))[9:18, 9:18]),
    ],
)
def test_linear_maps_about_the_centre(linear, expected):
    image = images(1, side=9)[0]
    got = np.asarray(read(image, about_centre(pixel_places(9, 9), jnp.asarray(linear))))
    if linear[0, 0] == np.float32(1 / 3):  # enlarged three times, every third pixel is one of the image
        got, expected_pixels = got[1::3, 1::3], expected(image)[1::3, 1::3]
        np.testing.assert_allclose(got, expected_pixels, atol=1e-3)
    else:
        np.testing.assert_allclose(got, expected(image), atol=1e-3)


def test_the_triangle_goes_where_it_is_sent():
    shift = np.random.default_rng(3).uniform(-4, 4, (3, 2)).astype(np.float32)
    corners = np.array([[17, 17], [17, 3], [3, 3]])  # of 21 x 21: a third either way of the middle, 10
    forward = np.linalg.solve(np.c_[corners, np.ones(3)], corners + shift)  # (y, x, 1) @ forward is the moved place
    linear, offset = forward[:2], forward[2]
    places = np.stack(np.mgrid[:21, :21], -1).reshape(-1, 2)
    expected = (places - offset) @ np.linalg.inv(linear)
    got = np.stack(triangle_map(pixel_places(21, 21), jnp.asarray(shift)), -1).reshape(-1, 2)
    np.testing.assert_allclose(got, expected, atol=1e-3)
    flat = np.array([[0, 0], [2, 2], [4, 4]], np.float32) - corners  # all three on a line
    assert np.isfinite(np.asarray(triangle_map(pixel_places(21, 21), jnp.asarray(flat)))).all()


@pytest.mark.parametrize("sigma", [1.5, 50.0])
def test_the_elastic_field_is_smoothed_as_by_scipy(sigma):
    noise = np.random.default_rng(0).uniform(-1, 1, (2, 12, 20)).astype(np.float32)
    expected = np.stack([3 * ndimage.gaussian_filter(part.astype(float), sigma) for part in noise])
    np.testing.assert_allclose(elastic_field(jnp.asarray(noise), alpha=3, sigma=sigma), expected, atol=1e-6)


@pytest.mark.parametrize("place, side", enumerate(WINDOWS))
def test_blurs_and_median_are_those_of_scipy(place, side):
    image = images(1, side=11)[0]
    mean = ndimage.uniform_filter(image.astype(float), (side, side, 1), mode="mirror")
    np.testing.assert_allclose(jax.jit(blur)(image, MEAN[place]), mean, atol=1e-3)
    weights = np.trim_zeros(GAUSSIAN[place])
    assert len(weights) == side and weights.sum() == 1
    smooth = ndimage.convolve1d(image.astype(float), weights, axis=0, mode="mirror")
    smooth = ndimage.convolve1d(smooth, weights, axis=1, mode="mirror")
    np.testing.assert_allclose(jax.jit(blur)(image, GAUSSIAN[place]), smooth, atol=1e-3)
    expected = ndimage.median_filter(image, (side, side, 1), mode="nearest")
    np.testing.assert_array_equal(jax.jit(median)(image, side), expected)


def test_noise_has_its_variance_and_stays_in_range():
    grey = np.full((200, 200, 3), 128, np.uint8)
    noisy = np.asarray(add_noise(grey, jnp.float32(30), jax.random.key(0))) - 128
    assert abs(noisy.mean()) < 0.1 and abs(noisy.var() - 30) < 0.5
    assert abs(np.corrcoef(noisy[..., 0].ravel(), noisy[..., 1].ravel())[0, 1]) < 0.02  # each channel its own
    assert np.asarray(add_noise(grey * 0, jnp.float32(30), jax.random.key(0))).min() == 0


def test_nothing_asked_for_changes_nothing():
    image = images(3)
    np.testing.assert_array_equal(views(image, jax.random.key(0), only()), image)


def matches(got, candidates):
    """int [B]: which candidate each view is, -1 for none."""
    close = np.array([[np.allclose(view, other, atol=1e-2) for other in candidates] for view in np.asarray(got)])
    return np.where(close.any(1), close.argmax(1), -1)


def assert_frequencies(found, expected):
    """Counts of found [B] within four standard deviations of the expected shares."""
    for value, share in expected.items():
        assert abs((found == value).sum() - len(found) * share) < 4 * np.sqrt(len(found) * share * (1 - share)), value


def test_symmetries_come_as_often_as_they_should():
    image = images(1, side=6)
    got = views(np.broadcast_to(image, (1500, 6, 6, 3)), jax.random.key(1), only(symmetry=0.6))
    same = image[0]
    found = matches(got, [same, same.swapaxes(0, 1), same[:, ::-1], same[::-1]])
    assert_frequencies(found, {0: 0.4, 1: 0.2, 2: 0.2, 3: 0.2})


def test_filters_come_as_often_as_they_should():
    image = images(1, side=8, seed=4)
    got = views(np.broadcast_to(image, (1500, 8, 8, 3)), jax.random.key(2), only(filtering=0.8))
    pairs = [(table, row) for table, row in itertools.product((MEAN, GAUSSIAN), range(3))]
    candidates = [image[0], *(blur(jnp.asarray(image[0]), table[row]) for table, row in pairs)]
    candidates += [median(jnp.asarray(image[0]), side) for side in WINDOWS]
    found = matches(got, [np.asarray(candidate, float) for candidate in candidates])
    third = 0.2 / 3
    shares = [0.2, third, third, third, 0.04, 0.08, 0.08, third, third, third]
    assert_frequencies(found, {-1: 0.2, **dict(enumerate(shares))})
    noise = np.asarray(got, float)[found == -1] - image[0]
    inside = (image[0] > 40) & (image[0] < 215)  # away from the ends of the range
    variance = noise[:, inside].var(1)
    assert 5 < variance.min() < 20 and 40 < variance.max() < 75


def test_scale_fills_its_range_and_keeps_the_centre():
    side = 33
    ramp = np.broadcast_to(np.arange(side, dtype=np.uint8)[:, None, None] * 4 + 50, (300, side, side, 3))
    got = np.asarray(views(ramp, jax.random.key(0), only(scale=0.5)))
    np.testing.assert_allclose(got[:, 16], 50 + 64, atol=1)
    factor = 8 / (got[:, 18, 16, 0] - got[:, 16, 16, 0] + 1e-9)
    assert 0.45 < factor.min() < 0.6 and 1.4 < factor.max() < 2.1


def test_rotations_stay_within_their_degrees_and_deformations_are_affine():
    side = 33
    y, x = np.mgrid[:side, :side]
    ramps = np.stack([100 + 3 * (y - 16), 100 + 3 * (x - 16), 0 * y], -1).astype(np.uint8)
    turned = np.asarray(
        views(np.broadcast_to(ramps, (400, side, side, 3)), jax.random.key(0), only(distortion=1.0, elastic_affine=0.0))
    )
    slope = turned[:, 16, 20, :2] - turned[:, 16, 12, :2]  # of y and x along a row, eight pixels
    degrees = np.rad2deg(np.arctan2(-slope[:, 0], slope[:, 1]))
    assert abs(degrees).max() < 27 and degrees.min() < -20 and degrees.max() > 20
    assert_frequencies(
        abs(degrees) > 2.5, {True: 0.5 * 0.9}
    )  # the other half is an elastic deformation that moves nothing
    moved = np.asarray(
        views(
            np.broadcast_to(ramps, (50, side, side, 3)),
            jax.random.key(1),
            only(distortion=1.0, elastic_affine=4.0, rotation=0.0),
        )
    )
    middle = moved[:, 12:21, 12:21, :2]
    bend = middle[:, 2:] - 2 * middle[:, 1:-1] + middle[:, :-2]
    assert abs(bend).max() <= 2 and (abs(moved - ramps)[..., :2].max((1, 2, 3)) > 3).mean() > 0.3


def test_light_changes_within_its_range():
    grey = np.full((600, 3, 3, 3), 100, np.uint8)
    got = np.asarray(views(grey, jax.random.key(5), only(lighting=0.5)))[:, 0, 0, 0]
    assert_frequencies(got == 100, {True: 0.5})
    assert 30 < got.min() < 50 and 150 < got.max() < 171  # 100 (1 +- 0.2) +- 51


def test_a_view_depends_on_key_and_place_alone():
    image, key = images(8), jax.random.key(9)
    whole, others = views(image, key, ALL), views(np.concatenate([image[:3], image[:5]]), key, ALL)
    np.testing.assert_array_equal(whole[:3], others[:3])
    assert (np.asarray(whole) != views(image, jax.random.key(10), ALL)).any()
    same = views(np.broadcast_to(image[0], image.shape), key, ALL)
    assert len({view.tobytes() for view in np.asarray(same)}) == 8


def test_split_over_devices_the_views_are_the_same_and_nothing_is_exchanged():
    mesh, image, key = parallel.make_mesh(), images(8), jax.random.key(2)
    split = jax.jit(
        lambda image, key: patch_views(image, key, ALL, mesh=mesh), in_shardings=(parallel.by_rows(mesh), None)
    )
    np.testing.assert_array_equal(split(image, key), views(image, key, ALL))
    assert "all-" not in split.lower(image, key).compile().as_text()


def test_all_at_once_and_one_by_one_are_the_same(monkeypatch):
    image, key = images(8), jax.random.key(4)
    one_by_one = views(image, key, ALL)
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *arrays, cpu, default: default(*arrays))
    at_once = jax.jit(lambda image, key: patch_views(image, key, ALL))(image, key)
    assert (
        abs(np.asarray(one_by_one) - at_once) > 1.01
    ).mean() < 0.001  # a value may be rounded to its other neighbour


def test_bad_settings_are_refused():
    for wrong in ({"symmetry": 1.5}, {"scale": 1.0}, {"least_variance": 60.0}):
        with pytest.raises(ValueError, match=next(iter(wrong)).split("_")[-1]):
            PatchViewConfig(**wrong)
    with pytest.raises(ValueError, match=r"square.*4 x 6"):
        patch_views(np.zeros((2, 4, 6, 3), np.uint8), jax.random.key(0), PatchViewConfig())
