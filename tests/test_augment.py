"""Views of tiles against slow, obvious twins; and what they may depend on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srcc_jax import augment as views
from srcc_jax import parallel
from srcc_jax.augment import AugmentConfig, recolour, turn

augment = jax.jit(views.augment, static_argnums=2)

NOTHING = {"flips": False, "rotations": False, "brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}


def images(count, side=5, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), np.uint8)


def only(**changes):
    return AugmentConfig(**{**NOTHING, **changes})


def recolour_twin(image, brightness, contrast, saturation, hue):
    """Pixel by pixel, one change after the other, in float64: the textbook's way."""
    x = image.astype(np.float64) + 255 * brightness
    x = (x - x.mean((0, 1))) * contrast + x.mean((0, 1))
    out = np.empty_like(x)
    for row, column in np.ndindex(x.shape[:2]):
        r, g, b = x[row, column]
        grey = 0.299 * r + 0.587 * g + 0.114 * b
        r, g, b = (grey + saturation * (value - grey) for value in (r, g, b))
        i, q = 0.5959 * r - 0.2746 * g - 0.3213 * b, 0.2115 * r - 0.5227 * g + 0.3112 * b
        turned = (i + 1j * q) * np.exp(2j * np.pi * hue)
        out[row, column] = np.linalg.solve(
            [[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]],
            [0.299 * r + 0.587 * g + 0.114 * b, turned.real, turned.imag],
        )
    return np.clip(out, 0, 255)


def test_turn_is_rot90_then_mirrors_for_all_sixteen_choices():
    image = images(16)
    turns, rows, columns = np.arange(16) % 4, np.arange(16) % 8 > 3, np.arange(16) > 7
    got = jax.jit(turn)(image, turns, rows, columns)
    for view, pixels, k, flip_rows, flip_columns in zip(got, image, turns, rows, columns):
        expected = np.rot90(pixels, k)
        expected = expected[::-1] if flip_rows else expected
        np.testing.assert_array_equal(view, expected[:, ::-1] if flip_columns else expected)


@pytest.mark.parametrize(
    "change",
    [
        {"brightness": 0.3},
        {"contrast": 0.6},
        {"contrast": 1.7},
        {"saturation": 0.0},
        {"saturation": 1.5},
        {"hue": 0.2},
        {"brightness": -0.07, "contrast": 1.08, "saturation": 0.93, "hue": -0.02},
    ],
)
def test_recolour_equals_its_twin(change):
    values = {"brightness": 0.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.0} | change
    image = images(3)
    got = jax.jit(recolour)(image, **{name: jnp.full(3, value) for name, value in values.items()})
    assert got.dtype == jnp.float32
    for view, pixels in zip(got, image):
        np.testing.assert_allclose(view, recolour_twin(pixels, **values), atol=1e-3)  # of 255: float32 against float64


def test_nothing_asked_for_changes_nothing():
    image = images(4)
    np.testing.assert_allclose(augment(image, jax.random.key(0), only()), image, atol=1e-4)


@pytest.mark.parametrize("flips, rotations, views", [(True, True, 8), (True, False, 4), (False, True, 4)])
def test_all_symmetries_come_equally_often(flips, rotations, views):
    image = np.broadcast_to(images(1), (2000, 5, 5, 3))
    seen = np.asarray(augment(image, jax.random.key(3), only(flips=flips, rotations=rotations))).round().astype(int)
    _, counts = np.unique(seen.reshape(2000, -1), axis=0, return_counts=True)
    assert len(counts) == views
    spread = np.sqrt(2000 / views * (1 - 1 / views))  # of a binomial
    assert abs(counts - 2000 / views).max() < 4 * spread


@pytest.mark.parametrize("name, limit", [("brightness", 0.1), ("contrast", 0.1), ("saturation", 0.1), ("hue", 0.02)])
def test_shifts_fill_their_range_both_ways(name, limit):
    image = np.broadcast_to(images(1, side=4), (300, 4, 4, 3)) // 2 + 60  # away from the clip
    got = np.asarray(augment(image, jax.random.key(1), only(**{name: limit})))
    middle = {"brightness": 0.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.0}
    low, high = (recolour_twin(image[0], **(middle | {name: middle[name] + end})) for end in (-limit, limit))
    direction = high - low
    along = ((got - low) * direction).sum((1, 2, 3)) / (direction**2).sum()  # 0 at one end of the range, 1 at the other
    assert 0 <= along.min() < 0.05 and 0.95 < along.max() <= 1 and abs(along.mean() - 0.5) < 0.1


def test_a_view_depends_on_key_and_place_alone():
    image, key = images(8), jax.random.key(9)
    whole = augment(image, key, AugmentConfig())
    np.testing.assert_array_equal(whole, augment(image, key, AugmentConfig()))
    np.testing.assert_allclose(whole[:3], augment(image[:3], key, AugmentConfig()), atol=1e-4)
    assert (np.asarray(whole) != augment(image, jax.random.key(10), AugmentConfig())).any()
    same = augment(np.broadcast_to(image[0], image.shape), key, AugmentConfig())
    assert len({view.tobytes() for view in np.asarray(same)}) == 8


def test_split_over_devices_the_views_are_the_same_and_nothing_is_exchanged():
    mesh = parallel.make_mesh()
    split = jax.jit(
        lambda image, key: views.augment(image, key, AugmentConfig()), in_shardings=(parallel.by_rows(mesh), None)
    )
    image, key = images(8), jax.random.key(2)
    np.testing.assert_allclose(split(image, key), augment(image, key, AugmentConfig()), atol=1e-4)
    assert "all-" not in split.lower(image, key).compile().as_text()


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="hue must be"):
        AugmentConfig(hue=-0.1)
    with pytest.raises(ValueError, match=r"square.*4 x 6.*rotations"):
        augment(np.zeros((2, 4, 6, 3), np.uint8), jax.random.key(0), AugmentConfig())
    assert augment(np.zeros((2, 4, 6, 3), np.uint8), jax.random.key(0), only(flips=True)).shape == (2, 4, 6, 3)
