"""Slides: pixels at a wanted scale, the source of the scale, and what is refused."""

import logging
import os
import threading
from pathlib import Path

import numpy as np
import openslide
import PIL.Image
import pytest

from data_pipelines import readers, slides
from data_pipelines.slides import RegionError, SlideError, open_slide
from tests.tiff_files import halved, overwrite, picture, tile_bytes, write_tiff

FAST = "openslide" if readers.CuImage is None else "cucim"


@pytest.fixture(scope="module")
def pyramid(tmp_path_factory):
    """A JPEG pyramid of three levels, 0.5 µm per px, and its picture."""
    image = picture(700, 500)
    return write_tiff(tmp_path_factory.mktemp("slides") / "pyramid.tiff", image, levels=3, compression="jpeg"), image


@pytest.fixture
def lossless(tmp_path):
    """Two lossless levels, 0.5 µm per px, and the picture."""
    image = picture(700, 500)
    return write_tiff(tmp_path / "lossless.tiff", image, levels=2, compression="lzw"), image


def grey_distance(a: np.ndarray, b: np.ndarray) -> float:
    assert a.shape == b.shape and a.dtype == b.dtype == np.uint8
    return float(np.abs(a.astype(float) - b).mean())


# Pixels


def test_native_scale_returns_the_stored_pixels(lossless):
    path, image = lossless
    with open_slide(path) as slide:
        assert (slide.width, slide.height, slide.mpp, slide.mpp_source) == (700, 500, 0.5, "file")
        assert [level.downsample for level in slide.levels] == [1, 2]
        np.testing.assert_array_equal(slide.read(101, 67, 224, 150, 0.5), image[67:217, 101:325])


def test_fast_reader_and_openslide_agree_at_every_level_and_origin(pyramid):
    path, _ = pyramid
    with open_slide(path) as slide, openslide.OpenSlide(path) as reference:
        assert slide.backend == FAST and slide.checked == (FAST == "cucim")
        for level, step in enumerate((1, 2, 4)):
            for x, y in ((0, 0), (13, 7), (64, 33)):
                expected = np.asarray(reference.read_region((x * step, y * step), level, (90, 80)))[..., :3]
                np.testing.assert_array_equal(slide.read(x * step, y * step, 90, 80, 0.5 * step), expected)


def test_coarser_scale_reads_the_matching_level(lossless):
    path, image = lossless
    with open_slide(path) as slide:
        np.testing.assert_array_equal(slide.read(40, 20, 100, 60, 1.0), halved(image)[10:70, 20:120])


def test_scale_between_levels_is_area_reduced(lossless):
    path, image = lossless
    quarter = halved(halved(image))
    with open_slide(path) as slide:  # the lowest level is 1 µm per px: 2 µm per px is made of it
        found = slide.read(80, 40, 60, 50, 2.0)
    assert np.abs(found.astype(int) - quarter[10:60, 20:80]).max() <= 1


def test_fractional_ratio_keeps_place_and_mean(tmp_path):
    image = np.repeat(np.linspace(0, 255, 600).astype(np.uint8)[None, :, None], 400, 0).repeat(3, 2)
    with open_slide(write_tiff(tmp_path / "ramp.tiff", image, compression="zlib")) as slide:
        found = slide.read(100, 50, 200, 100, 0.65)  # 1.3 px of the slide to one
    expected = np.interp(100 + 1.3 * (np.arange(200) + 0.5) - 0.5, np.arange(600), np.linspace(0, 255, 600))
    assert np.abs(found[10:-10, 10:-10].mean((0, 2)) - expected[10:-10]).max() < 1.5


def test_scales_within_one_percent_are_not_resampled(lossless):
    path, image = lossless
    with open_slide(path) as slide:
        np.testing.assert_array_equal(slide.read(3, 5, 400, 300, 0.504), image[5:305, 3:403])
        np.testing.assert_array_equal(slide.read(0, 0, 300, 200, 0.992), halved(image)[:200, :300])


def test_finer_scale_is_enlarged(lossless):
    path, image = lossless
    with open_slide(path) as slide:
        found = slide.read(80, 40, 200, 160, 0.25)
    assert grey_distance(halved(found), image[40:120, 80:180]) < 8


@pytest.mark.parametrize("ratio", [1, 2, 4])
def test_windows_of_a_super_tile_equal_windows_read_alone(pyramid, ratio):
    path, _ = pyramid
    mpp, step = 0.5 * ratio, ratio
    with open_slide(path) as slide:
        region = slide.read(8 * step, 0, 32 * 3 + 64, 96, mpp)
        for i in range(4):
            alone = slide.read((8 + 32 * i) * step, 32 * step, 64, 64, mpp)
            np.testing.assert_array_equal(region[32:96, 32 * i : 32 * i + 64], alone)


def test_outside_is_white(lossless):
    path, image = lossless
    with open_slide(path) as slide:
        found = slide.read(-10, -20, 720, 540, 0.5)
        assert (slide.read(5000, 0, 30, 20, 0.5) == 255).all()
    np.testing.assert_array_equal(found[20:520, 10:710], image)
    assert (found[:20] == 255).all() and (found[520:] == 255).all() and (found[:, :10] == 255).all()


def test_slide_smaller_than_a_tile(tmp_path):
    image = picture(50, 30)
    for name, options in {"jpeg": {"compression": "jpeg"}, "raw": {}, "strips": {"tile": None}}.items():
        with open_slide(write_tiff(tmp_path / f"{name}.tiff", image, **options)) as slide:
            found = slide.read(0, 0, 224, 224, 0.5)
        assert grey_distance(found[:30, :50], image) < 8
        assert (found[30:] == 255).all() and (found[:, 50:] == 255).all()


def test_thumbnail_covers_the_slide_and_blocks_do_not_show(lossless, monkeypatch):
    path, image = lossless
    with open_slide(path) as slide:
        whole = slide.thumbnail(5.0)
        assert whole.shape == (50, 70, 3)
        expected = image.reshape(50, 10, 70, 10, 3).mean((1, 3))
        assert np.abs(whole - expected).mean() < 1.5
        assert slide.thumbnail(3.3).shape == (76, 107, 3)  # rounded up: the last pixels reach past the slide's edge
        monkeypatch.setattr(slides, "_BLOCK_PX", 128)
        assert grey_distance(slide.thumbnail(5.0), whole) < 1
        np.testing.assert_array_equal(slide.read(-30, 0, 700, 400, 0.5)[:, 30:], image[:400, :670])


@pytest.mark.parametrize("wrong", [{"width": 0}, {"height": -1}, {"mpp": 0.0}, {"mpp": float("nan")}])
def test_nonsense_regions_are_refused(lossless, wrong):
    with open_slide(lossless[0]) as slide, pytest.raises(ValueError, match="must"):
        slide.read(**({"x": 0, "y": 0, "width": 10, "height": 10, "mpp": 0.5} | wrong))


# Handles


def test_threads_read_the_same_pixels_with_bounded_handles(pyramid, monkeypatch):
    path, _ = pyramid
    opened, wrong = [], []
    make = readers.CucimReader if FAST == "cucim" else readers.OpenSlideReader
    original = make.__init__
    monkeypatch.setattr(make, "__init__", lambda self, *args: (opened.append(1), original(self, *args))[1])
    with open_slide(path) as slide:
        whole = slide.read(0, 0, 700, 500, 0.5)

        def work(seed: int) -> None:
            for x, y in np.random.default_rng(seed).integers(0, 400, (30, 2)):
                if not np.array_equal(slide.read(int(x), int(y), 90, 80, 0.5), whole[y : y + 80, x : x + 90]):
                    wrong.append((x, y))

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(12)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    assert not wrong and len(opened) <= 8


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts file descriptors in /proc")
def test_closing_gives_every_handle_back(pyramid):
    path, _ = pyramid
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        with open_slide(path) as slide:
            slide.read(0, 0, 64, 64, 0.5)
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(SlideError, match="closed"):
        slide.read(0, 0, 64, 64, 0.5)


# Scale


def test_scale_comes_from_the_file_then_the_table_then_the_flag(tmp_path):
    image = picture(80, 80)
    known, unknown = write_tiff(tmp_path / "known.tiff", image), write_tiff(tmp_path / "unknown.tiff", image, mpp=None)

    def opened(path: Path, **given: float) -> tuple[float, str]:
        with open_slide(path, **given) as slide:
            return slide.mpp, slide.mpp_source

    assert opened(known, mpp_cohort=0.25, mpp_override=1.0) == (0.5, "file")
    assert opened(unknown, mpp_cohort=0.25, mpp_override=1.0) == (0.25, "cohort")
    assert opened(unknown, mpp_override=1.0) == (1.0, "flag")
    with pytest.raises(SlideError, match=r"unknown\.tiff.*no µm per pixel.*`mpp` of the cohort table.*--mpp_override"):
        open_slide(unknown)


def test_contradiction_between_file_and_table_is_warned_of(tmp_path, caplog):
    path = write_tiff(tmp_path / "known.tiff", picture(80, 80))
    with caplog.at_level(logging.WARNING), open_slide(path, mpp_cohort=0.25):
        assert "0.5 µm per pixel by the file, 0.25 by the cohort table" in caplog.text


@pytest.mark.parametrize("given", [{"mpp_cohort": 0.0}, {"mpp_override": 250.0}, {"mpp_override": float("nan")}])
def test_nonsense_scales_are_refused(tmp_path, given):
    path = write_tiff(tmp_path / "unknown.tiff", picture(80, 80), mpp=None)
    with pytest.raises(SlideError, match=r"outside 0\.05 to 20"):
        open_slide(path, **given)


def test_wrong_resolution_tag_is_not_trusted(shared_data):
    path = shared_data / "slides" / "CMU-1-Small-Region.jpeg.tiff"
    with pytest.raises(SlideError, match=r"says 0\.00499 µm per pixel.*--mpp_override"):
        open_slide(path)
    with open_slide(path, mpp_cohort=0.499, mpp_override=0.5) as slide:
        assert (slide.mpp, slide.mpp_source) == (0.499, "cohort")


def test_scale_that_contradicts_the_objective_is_not_trusted(tmp_path):
    description = "Aperio Image Library v1\r\n80x80 (64x64) JPEG|AppMag = 40|MPP = {}|"
    right = write_tiff(tmp_path / "a.svs", picture(80, 80), mpp=None, description=description.format(0.2525))
    wrong = write_tiff(tmp_path / "b.svs", picture(80, 80), mpp=None, description=description.format(2.525))
    with open_slide(right) as slide:
        assert slide.mpp == 0.2525
    with pytest.raises(SlideError, match=r"2\.525 µm per pixel but an objective of ×40"):
        open_slide(wrong)


def test_pixels_must_be_square(tmp_path):
    with pytest.raises(SlideError, match="not square"):
        open_slide(write_tiff(tmp_path / "flat.tiff", picture(80, 80), mpp=(0.5, 0.53)))
    with open_slide(write_tiff(tmp_path / "nearly.tiff", picture(80, 80), mpp=(0.5, 0.51))) as slide:
        assert slide.mpp == pytest.approx(0.505)


# Real slides


def test_real_slide_without_scale(shared_data):
    path = shared_data / "slides" / "TCGA-CR-7395-01A-01-TS1.svs"
    with pytest.raises(SlideError, match="Aperio header states no µm per pixel"):
        open_slide(path)
    with open_slide(path, mpp_override=0.25) as slide, openslide.OpenSlide(path) as reference:
        assert (slide.backend, slide.checked, len(slide.levels)) == (FAST, FAST == "cucim", 2)
        expected = np.asarray(reference.read_region((2000, 1500), 0, (200, 150)))[..., :3]
        found = slide.read(2000, 1500, 200, 150, 0.25)
    assert np.abs(found.astype(int) - expected).max() <= 1  # two builds of OpenJPEG


def test_real_dicom_series_is_the_real_svs(shared_data):
    folder = shared_data / "slides" / "CMU-1-Small-Region_dicom"
    with open_slide(folder) as dicom, open_slide(folder.parent / "CMU-1-Small-Region.svs") as svs:
        assert (dicom.width, dicom.height, dicom.backend) == (svs.width, svs.height, "openslide")
        assert dicom.mpp == svs.mpp == 0.499
        a, b = (slide.read(300, 300, 400, 400, 0.5) for slide in (dicom, svs))
    assert grey_distance(a, b) < 2  # the series was compressed once more


def test_real_webp_slide(shared_data):
    folder = shared_data / "slides"
    with open_slide(folder / "CMU-1-Small-Region.webp.tiff", mpp_override=0.499) as webp:
        assert webp.backend == "tifffile"
        found = webp.read(300, 300, 400, 400, 0.499)
    with open_slide(folder / "CMU-1-Small-Region.svs") as svs:
        assert grey_distance(found, svs.read(300, 300, 400, 400, 0.499)) < 6


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("broken_truncated.svs", "cannot be read as a slide"),
        ("unopenable.tiff", "compression 52479"),
        ("boxes.tiff", "352.8"),
    ],
)
def test_real_broken_files_are_refused(shared_data, name, problem):
    with pytest.raises(SlideError, match=problem) as error:
        open_slide(shared_data / "slides" / "openslide_fixtures" / name)
    assert name in str(error.value)


def test_real_unreadable_region(shared_data):
    with open_slide(shared_data / "slides" / "openslide_fixtures" / "unreadable.svs") as slide:
        with pytest.raises(RegionError, match=r"unreadable\.svs: region at \(0, 0\)"):
            slide.read(0, 0, 16, 16, 0.499)
        assert (slide.read(100, 100, 16, 16, 0.499) == 255).all()  # outside it there is nothing to decode


# Refused


def test_files_that_are_no_slides(tmp_path):
    (tmp_path / "empty.svs").touch()
    (tmp_path / "text.svs").write_text("not a slide at all, only its name says so")
    (tmp_path / "folder").mkdir()
    for name, problem in {
        "missing.svs": "no such file",
        "empty.svs": "0 bytes",
        "text.svs": "cannot be read as a slide",
        "folder": "folder without DICOM",
    }.items():
        with pytest.raises(SlideError, match=problem) as error:
            open_slide(tmp_path / name)
        assert name in str(error.value)


def test_truncated_files_are_refused(tmp_path):
    whole = write_tiff(tmp_path / "whole.tiff", picture(400, 300), compression="jpeg")
    data = whole.read_bytes()
    for cut in (7, 200, len(data) // 2, len(data) - 5):
        path = tmp_path / f"cut_{cut}.tiff"
        path.write_bytes(data[:cut])
        with pytest.raises(SlideError, match="truncated"):
            open_slide(path)


def test_images_that_are_not_8_bit_rgb_are_refused(tmp_path):
    image = picture(100, 80)
    wide = image.astype(np.uint16) * 257
    gray = {"photometric": "minisblack"}
    for name, path in {
        "gray": write_tiff(tmp_path / "gray.tiff", image[..., 0], **gray),
        "uint16": write_tiff(tmp_path / "wide.tiff", wide),
        "stack of 3": write_tiff(tmp_path / "stack.tiff", np.stack([image] * 3)),
    }.items():
        with pytest.raises(SlideError, match=name):
            open_slide(path)
    PIL.Image.fromarray(image[..., 0]).save(tmp_path / "gray.png")
    with pytest.raises(SlideError, match="mode L"):
        open_slide(tmp_path / "gray.png")


def test_plain_images(tmp_path):
    image = picture(100, 80)
    PIL.Image.fromarray(image).save(tmp_path / "plain.png")
    PIL.Image.fromarray(image).save(tmp_path / "scaled.png", dpi=(50_800, 50_800))
    transparent = np.dstack([image, np.full((80, 100), 255, np.uint8)])
    transparent[:10, :, 3] = 0
    PIL.Image.fromarray(transparent).save(tmp_path / "alpha.png")
    with pytest.raises(SlideError, match="no µm per pixel"):
        open_slide(tmp_path / "plain.png")
    with open_slide(tmp_path / "plain.png", mpp_override=0.5) as slide:
        assert slide.backend == "pillow"
        np.testing.assert_array_equal(slide.read(10, 20, 30, 40, 0.5), image[20:60, 10:40])
    with open_slide(tmp_path / "scaled.png") as slide:
        assert slide.mpp == pytest.approx(0.5, rel=1e-3)
    with open_slide(tmp_path / "alpha.png", mpp_override=0.5) as slide:
        assert (slide.read(0, 0, 100, 10, 0.5) == 255).all()
    (tmp_path / "half.png").write_bytes((tmp_path / "plain.png").read_bytes()[:300])
    with pytest.raises(SlideError, match="cannot be decoded as a plain image"):
        open_slide(tmp_path / "half.png", mpp_override=0.5)


# Damage


def test_damaged_tile_does_not_spoil_the_rest(pyramid, tmp_path):
    source, _ = pyramid
    path = tmp_path / "damaged.tiff"
    path.write_bytes(source.read_bytes())
    position, length = tile_bytes(path)[14]  # row 1, column 3 of 11
    overwrite(path, position + length // 2, bytes(length // 2))
    with open_slide(source) as sound, open_slide(path) as slide:
        for _ in range(2):
            with pytest.raises(RegionError, match=r"damaged\.tiff: region at \(150, 50\).*row 1, column 3"):
                slide.read(150, 50, 100, 100, 0.5)
            np.testing.assert_array_equal(slide.read(0, 128, 200, 200, 0.5), sound.read(0, 128, 200, 200, 0.5))
