"""Flags for slides: pen marks in the colours of ink, tissue in the colours of stain."""

import colorsys

import numpy as np
import pytest
from PIL import Image

from data_pipelines import quality
from data_pipelines.prepare import TISSUE_MPP
from data_pipelines.quality import pen_marks, slide_quality
from data_pipelines.slides import open_slide
from data_pipelines.tissue import tissue_mask

GLASS, EOSIN, HEMATOXYLIN = (243, 243, 243), (214, 132, 176), (112, 78, 150)
INK = {"green": (40, 140, 90), "blue": (40, 70, 190), "black": (25, 25, 30)}


def drawn(*, ink=None):
    """A thumbnail of 200 x 300 px: glass, a piece of tissue and, with `ink`, a stroke of 4 x 60 px beside it."""
    rgb = np.full((200, 300, 3), GLASS, np.uint8)
    rgb[40:160, 60:200] = EOSIN
    rgb[80:120, 100:160] = HEMATOXYLIN
    if ink is not None:
        rgb[90:94, 220:280] = ink
    return rgb


def assess(rgb):
    return slide_quality(rgb, tissue_mask(rgb), mpp=TISSUE_MPP)


@pytest.mark.parametrize("colour", INK)
def test_drawn_ink_is_found_with_its_colour_and_area(colour):
    found = assess(drawn(ink=INK[colour]))
    assert found.pen_mm2 == {name: pytest.approx(240 * 0.016**2 * (name == colour)) for name in INK}
    assert found.flags() == [f"pen marks: {colour} 0.061 mm²"]


def test_stained_tissue_and_glass_are_no_ink():
    found = assess(drawn())
    assert set(found.pen_mm2.values()) == {0.0} and found.flags() == []
    assert found.tissue_share == pytest.approx(120 * 140 / 60_000)
    assert found.tissue_mm2 == pytest.approx(120 * 140 * 0.016**2)


def test_specks_are_no_marks_and_little_tissue_is_told():
    rgb = drawn()
    rgb[::10, ::10] = INK["green"]  # 600 specks of one pixel
    assert assess(rgb).pen_mm2["green"] == 0
    rgb[40:160, 60:200] = GLASS
    rgb[40:50, 60:80] = EOSIN
    rgb[::10, ::10] = GLASS
    assert assess(rgb).flags() == ["little tissue: 0.051 mm²"]


def test_hues_are_those_of_colorsys():
    rgb = np.random.default_rng(0).integers(0, 256, (20, 10, 3), dtype=np.uint8)
    expected = np.array([colorsys.rgb_to_hsv(*pixel) for pixel in rgb.reshape(-1, 3).tolist()]).reshape(20, 10, 3)
    hue, saturation, value = quality._hsv(rgb)
    np.testing.assert_allclose(np.stack([hue / 360, saturation, value], axis=-1), expected, atol=1e-5)


def test_green_ink_on_a_real_slide_and_none_on_others(shared_data):
    def real(name, **scale):
        with open_slide(shared_data / "slides" / name, **scale) as slide:
            return assess(slide.thumbnail(TISSUE_MPP))

    inked = real("P2_0039_section1_x2.tiff", mpp_override=0.5)
    assert inked.pen_mm2["blue"] == inked.pen_mm2["black"] == 0 and inked.flags() == ["pen marks: green 0.018 mm²"]
    for clean in (
        real("CMU-1-Small-Region.svs"),
        real("TCGA-CR-7395-01A-01-TS1.svs", mpp_override=0.25),
    ):
        assert sum(clean.pen_mm2.values()) < quality.PEN_MM2 / 4


def test_stains_of_real_patches_are_no_ink(shared_data):
    """Patches of 224 x 224 px, taken as 1 µm per px, averaged to 16."""
    files = sorted((shared_data / "patches" / "colorectal_5class_224").rglob("*.jp*g"))[::50]
    assert len(files) > 10
    for file in files:
        with Image.open(file) as image:
            small = np.asarray(image.convert("RGB").reduce(16))
        assert not any(mask.sum() > 1 for mask in pen_marks(small).values()), file.name
