"""Pyramid files: the same pixels in every reader, levels that are means, memory that does not follow the slide."""

import tracemalloc

import numpy as np
import openslide
import pytest

from data_pipelines.pyramids import BACKGROUND, write_pyramid
from data_pipelines.textures import smooth_noise


@pytest.fixture(scope="module")
def picture():
    """Random blocks of colour with odd sides: uint8 [557, 831, 3]."""
    blocks = np.random.default_rng(1).integers(0, 256, (70, 104, 3), dtype=np.uint8)
    return blocks.repeat(8, axis=0).repeat(8, axis=1)[:557, :831]


def halved(pixels):
    height, width = pixels.shape[0] // 2, pixels.shape[1] // 2
    blocks = pixels[: 2 * height, : 2 * width].astype(int).reshape(height, 2, width, 2, 3)
    return ((blocks.sum((1, 3)) + 2) // 4).astype(np.uint8)


def read_level(slide, level):
    return np.asarray(slide.read_region((0, 0), level, slide.level_dimensions[level]))[..., :3]


def test_lossless_levels_are_means_of_the_level_above(tmp_path, picture):
    path = write_pyramid(tmp_path / "a.tiff", picture, mpp=0.25, tile=64, compression="lzw")
    with openslide.OpenSlide(path) as slide:
        assert slide.level_dimensions == ((831, 557), (415, 278), (207, 139), (103, 69), (51, 34))
        expected = picture
        for level in range(slide.level_count):
            np.testing.assert_array_equal(read_level(slide, level), expected)
            expected = halved(expected)


def test_blocks_and_arrays_write_the_same_file(tmp_path, picture):
    whole = write_pyramid(tmp_path / "a.tiff", picture, mpp=0.25, tile=64)
    blocks = write_pyramid(
        tmp_path / "b.tiff",
        lambda x, y, width, height: picture[y : y + height, x : x + width],
        shape=picture.shape[:2],
        mpp=0.25,
        tile=64,
    )
    assert whole.read_bytes() == blocks.read_bytes()


def test_background_blocks_are_background_at_every_level(tmp_path):
    black = np.zeros((64, 64, 3), np.uint8)
    path = write_pyramid(
        tmp_path / "a.tiff",
        lambda x, y, width, height: black if (x, y) == (128, 192) else None,
        shape=(256, 320),
        mpp=1.0,
        tile=64,
        compression="lzw",
    )
    expected = np.full((256, 320, 3), BACKGROUND, np.uint8)
    expected[192:256, 128:192] = 0
    with openslide.OpenSlide(path) as slide:
        for level in range(slide.level_count):
            np.testing.assert_array_equal(read_level(slide, level), expected)
            expected = halved(expected)


@pytest.mark.parametrize("subsampling", ["444", "420"])
def test_both_readers_agree_on_jpeg(tmp_path, subsampling):
    cucim = pytest.importorskip("cucim")
    smooth = 128 + 30 * np.stack([smooth_noise(np.random.default_rng(i), (300, 500), 60) for i in range(3)], axis=-1)
    pixels = smooth.clip(0, 255).astype(np.uint8)
    path = write_pyramid(tmp_path / "a.tiff", pixels, mpp=0.2528, tile=128, quality=95, subsampling=subsampling)
    with openslide.OpenSlide(path) as slide:
        other = cucim.CuImage(str(path))
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(0.2528, rel=1e-6)
        assert float(slide.properties["openslide.mpp-y"]) == pytest.approx(0.2528, rel=1e-6)
        assert other.metadata["cucim"]["spacing"][:2] == pytest.approx([0.2528, 0.2528], rel=1e-6)
        assert other.metadata["cucim"]["spacing_units"][:2] == ["micrometer", "micrometer"]
        assert other.resolutions["level_count"] == slide.level_count == 3
        for level, size in enumerate(slide.level_dimensions):
            np.testing.assert_array_equal(np.asarray(other.read_region((0, 0), size, level)), read_level(slide, level))
        error = np.abs(read_level(slide, 0).astype(int) - pixels)
    assert error.mean() < 3


@pytest.mark.parametrize("side", [4096, 16384])
def test_memory_does_not_follow_the_slide(tmp_path, side):
    tissue = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    tracemalloc.start()
    write_pyramid(
        tmp_path / "a.tiff", lambda x, y, *_: tissue if x == y and x % 2048 == 0 else None, shape=(side, side), mpp=0.5
    )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12e6  # the larger one has 805 MB of pixels
    with openslide.OpenSlide(tmp_path / "a.tiff") as slide:
        assert slide.dimensions == (side, side)


@pytest.mark.parametrize(
    "source, options, message",
    [
        (np.zeros((4, 4), np.uint8), {}, "uint8 .height, width, 3."),
        (np.zeros((4, 4, 3)), {}, "float64"),
        (np.zeros((4, 4, 3), np.uint8), {"mpp": 0.0}, "mpp is 0.0"),
        (np.zeros((4, 4, 3), np.uint8), {"tile": 100}, "multiple of 16"),
        (lambda *_: None, {}, "needs its shape"),
        (lambda *_: np.zeros((5, 5, 3), np.uint8), {"shape": (64, 64)}, r"block at \(0, 0\)"),
    ],
)
def test_what_is_no_slide_is_refused(tmp_path, source, options, message):
    with pytest.raises(ValueError, match=message):
        write_pyramid(tmp_path / "a.tiff", source, **{"mpp": 0.5, **options})
