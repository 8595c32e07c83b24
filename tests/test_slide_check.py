"""A slide tried out: two readers agree on its tissue, or the check says how they do not."""

import pytest

from data_pipelines import slide_check
from data_pipelines.readers import OpenSlideReader
from data_pipelines.slide_check import check_slide, reader_versions
from data_pipelines.slides import SlideError
from tests.programs import tissue
from tests.tiff_files import overwrite, tile_bytes, write_tiff


@pytest.fixture
def slide(tmp_path):
    """0.5 µm per px, LZW: tifffile reads it, OpenSlide is the second."""
    return write_tiff(tmp_path / "a.tiff", tissue(1024), compression="lzw", levels=2)


def test_two_readers_agree_on_regions_with_tissue(slide, monkeypatch):
    seen = []
    read = OpenSlideReader.read
    monkeypatch.setattr(OpenSlideReader, "read", lambda self, *region: seen.append(region) or read(self, *region))
    check = check_slide(slide, regions=6)
    assert (check.backend, check.second, check.levels, check.mpp, check.mpp_source) == (
        "tifffile",
        "openslide",
        2,
        0.5,
        "file",
    )
    assert check.differences == (0.0,) * 6 and check.agrees and not check.unreadable
    compared = [region for region in seen if region[3:] == (256, 256)]
    assert len(set(compared)) == 6 and all(0 <= x <= 768 and 0 <= y <= 768 for _, x, y, _, _ in compared)


def test_readers_that_differ_are_told(slide, monkeypatch):
    class Darker(OpenSlideReader):
        def read(self, *region):
            return super().read(*region) // 2

    monkeypatch.setattr(slide_check, "second_reader", lambda path, backend: ("darker", Darker(path)))
    check = check_slide(slide)
    assert check.second == "darker" and not check.agrees and min(check.differences) > 30


def test_damaged_regions_are_told_and_not_compared(tmp_path):
    slide = write_tiff(tmp_path / "a.tiff", tissue(1024), compression="jpeg", levels=2)
    for position, length in tile_bytes(slide):
        overwrite(slide, position, bytes(length))
    check = check_slide(slide, regions=3)
    assert len(check.unreadable) == 3 and check.differences == () and "region at" in check.unreadable[0]


def test_slide_that_only_one_reader_knows(tmp_path):
    slide = write_tiff(tmp_path / "a.tiff", tissue(300), compression="webp")
    check = check_slide(slide)
    assert (check.second, check.differences, check.agrees) == ("", (), True)
    with pytest.raises(SlideError, match="no such file"):
        check_slide(tmp_path / "absent.svs")


def test_real_slides_agree(shared_data):
    for name in ("CMU-1-Small-Region.svs", "P2_0039_section1_x2.tiff"):
        check = check_slide(shared_data / "slides" / name, mpp_override=0.5)
        assert check.agrees and (len(check.differences) == 4 or check.backend == "openslide")


def test_versions_of_all_readers(monkeypatch):
    assert list(reader_versions()) == ["OpenSlide", "cuCIM", "tifffile", "imagecodecs", "pillow"]
    monkeypatch.setattr(slide_check, "openslide", None)
    monkeypatch.setattr(slide_check, "CuImage", None)
    assert reader_versions()["OpenSlide"] == reader_versions()["cuCIM"] == ""
