"""Tissue masks: the thresholds' exact definitions, known pictures, and a real slide against its mask."""

import json

import numpy as np
import pytest
from PIL import Image

from data_pipelines.tissue import METHODS, clean_up, hed, otsu_threshold, tissue_mask, white_padding

PINK, PURPLE, GLASS = (225, 150, 190), (110, 60, 140), (242, 241, 243)


@pytest.fixture(scope="module")
def golden(shared_data):
    return json.loads((shared_data / "golden/metrics.json").read_text())


def gray(values):
    return np.repeat(np.array(values, np.uint8)[..., None], 3, axis=-1)


def picture(background=GLASS, size=60, noise=2.0, nuclei=PURPLE):
    """A rectangle of tissue with a dark part on glass, and where it is."""
    rng = np.random.default_rng(0)
    tissue = np.zeros((size, size), bool)
    tissue[20:45, 15:50] = True
    rgb = np.where(tissue[..., None], PINK, background).astype(float)
    rgb[25:30, 20:40] = nuclei
    rgb += noise * rng.standard_normal(rgb.shape)
    return np.clip(np.round(rgb), 0, 255).astype(np.uint8), tissue


def slow_otsu(values):
    """One bin per value; the first that separates best."""
    levels = np.arange(values.min(), values.max() + 1)
    best, found = -1.0, values.min()
    for level in levels[:-1]:
        low, high = values[values <= level], values[values > level]
        between = len(low) * len(high) * (low.mean() - high.mean()) ** 2
        if between > best * (1 + 1e-12):
            best, found = between, level
    return found


def test_otsu_of_the_worked_example():
    values = np.array([10, 10, 12, 200, 210])
    assert otsu_threshold(values) == 12
    np.testing.assert_array_equal(tissue_mask(gray([values]))[0], [True, True, True, False, False])


def test_otsu_equals_the_golden_numbers(golden):
    assert len(golden["otsu"]) == 5
    for case in golden["otsu"]:
        image = np.array(case["image"], case["dtype"])
        assert otsu_threshold(image) == pytest.approx(case["threshold"], abs=1e-9), case["title"]


@pytest.mark.parametrize("seed", range(5))
def test_otsu_equals_the_slow_twin(seed):
    rng = np.random.default_rng(seed)
    values = rng.choice([rng.normal(80, 15, 200), rng.normal(200, 20, 200)]).round().clip(0, 255).astype(np.uint8)
    assert otsu_threshold(values) == slow_otsu(values.astype(float))


def test_colour_deconvolution_of_the_worked_examples(golden):
    found = hed(np.array([[0.5, 0.25, 0.75], [0.4, 0.2, 0.6], [1, 1, 1]]))
    np.testing.assert_allclose(
        found, [[0.07507450, 0.05330198, 0], [0.09462072, 0.04759459, 0.00551202], [0, 0, 0]], atol=1e-8
    )
    numbers = golden["hed"]
    np.testing.assert_allclose(hed(np.array(numbers["rgb_uint8"], np.uint8)), numbers["hed"], atol=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_finds_the_tissue(method):
    # Density is a logarithm: beside nuclei this dark, pale eosin falls below the one threshold of the stain method.
    rgb, tissue = picture(nuclei=(190, 110, 160)) if method == "stain" else picture()
    found = tissue_mask(rgb, method)
    assert (found & tissue).sum() / (found | tissue).sum() > 0.95


def test_the_saturation_rule_is_camelyons():
    rgb = np.array([[[200, 100, 150], [250, 250, 250], [240, 245, 250], [40, 20, 60], [90, 60, 80]]], np.uint8)
    np.testing.assert_array_equal(tissue_mask(rgb, "saturation")[0], [True, False, False, False, True])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [255, 243, 0])
def test_a_slide_of_one_colour_has_no_tissue(method, value):
    assert not tissue_mask(np.full((9, 11, 3), value, np.uint8), method).any()


@pytest.mark.parametrize("method", METHODS)
def test_empty_glass_with_noise_has_no_tissue(method):
    rng = np.random.default_rng(0)
    glass = np.clip(np.round(240 + 2 * rng.standard_normal((50, 50, 3))), 0, 255).astype(np.uint8)
    assert not tissue_mask(glass, method).any()
    padded = np.full((100, 100, 3), 255, np.uint8)
    padded[:50, :50] = glass
    assert not tissue_mask(padded, method).any()


@pytest.mark.parametrize("method", METHODS)
def test_white_that_was_never_scanned_changes_nothing(method):
    """A thousandth of tissue, half glass, half padding: the best cut of all values lies between glass and white."""
    rgb, _ = picture(size=220)
    alone = tissue_mask(rgb, method)
    padded = np.full((220, 700, 3), 255, np.uint8)
    padded[:, 200:420] = rgb
    found = tissue_mask(padded, method)
    np.testing.assert_array_equal(found[:, 200:420], alone)
    assert not found[:, :200].any() and not found[:, 420:].any()


def test_white_glass_stays_a_part_of_the_picture():
    rgb, tissue = picture(background=(255, 255, 255), noise=0.0)
    assert not white_padding(rgb).any()
    np.testing.assert_array_equal(tissue_mask(rgb), tissue)


def test_a_given_mask_of_what_was_scanned_is_kept_to():
    rgb, tissue = picture()
    scanned = np.zeros_like(tissue)
    scanned[:, :30] = True
    found = tissue_mask(rgb, scanned=scanned)
    assert found[20:45, 15:30].mean() > 0.95 and not found[:, 30:].any()
    assert not tissue_mask(rgb, scanned=np.zeros_like(tissue)).any()


def test_what_is_no_thumbnail_is_refused():
    with pytest.raises(ValueError, match="otsu, saturation, stain"):
        tissue_mask(np.zeros((4, 4, 3), np.uint8), "hue")
    with pytest.raises(ValueError, match=r"uint8 \[H, W, 3\]"):
        tissue_mask(np.zeros((4, 4)))


def test_clean_up_drops_specks_and_closes_gaps():
    mask = np.zeros((60, 60), bool)
    mask[20:40, 20:40] = True
    mask[30, 25:35] = False  # a crack
    mask[5, 5] = mask[50:55, 50:55] = True  # dust, and a part below 64 pixels
    found = clean_up(mask)
    assert found[20:40, 20:40].all() and found.sum() == 400
    assert not clean_up(np.zeros((8, 8), bool)).any()
    assert clean_up(np.ones((9, 9), bool)).all()


def test_tissue_of_a_real_slide(shared_data):
    """IoU 0.76 at 16 and 0.68 at 8 µm per pixel: the mask fills lumens and pale stroma, which a plain threshold leaves out."""
    openslide = pytest.importorskip("openslide")
    with openslide.OpenSlide(shared_data / "slides/P2_0039_section1_x2.tiff") as slide:
        level = slide.read_region((0, 0), 3, slide.level_dimensions[3])
    mask = Image.open(shared_data / "slides/P2_0039_section1_tissue_mask_ds8.png").crop((0, 0, *level.size))
    for factor, least in ((4, 0.75), (2, 0.67)):  # level 3 is 4 µm per pixel, if level 0 is 0.5
        rgb = np.asarray(level.convert("RGB").reduce(factor))
        truth = np.asarray(mask.convert("L").reduce(factor)) > 127
        found = tissue_mask(rgb)
        assert (found & truth).sum() / (found | truth).sum() > least
        assert (found & ~truth).sum() < 0.08 * found.sum()
