"""The page of a slide: the highest tiles that do not overlap, as pictures of what was scored, and small pictures that stay small."""

import io

import numpy as np
import pytest
from PIL import Image

from data_pipelines.cohort import SlideRecord
from data_pipelines.exports import write_image
from data_pipelines.prepare import prepare_slide
from data_pipelines.slides import RegionError
from data_pipelines.tiles import Grid
from experiments.run import slide_quality
from experiments.run.slide_quality import (
    highest_apart,
    preview,
    slide_flags,
    top_tiles,
    write_slide_page,
    write_top_tiles,
)
from tests.programs import tissue
from tests.test_report import Page
from tests.tiff_files import write_tiff

GRID = Grid(tile=32, stride=16, mpp=1.0)


@pytest.fixture
def prepared(tmp_path):
    path = write_tiff(tmp_path / "a.tiff", tissue(512), mpp=0.5, compression="lzw")
    prepared = prepare_slide(SlideRecord("a", path, "srcc", "p"), GRID, min_tissue=0.5)
    yield prepared
    prepared.slide.close()


def rising(prepared):
    """Probabilities that grow from tile to tile; the two highest are unknown."""
    values = np.linspace(0.1, 0.9, len(prepared.tiles)).astype(np.float32)
    values[-2:] = np.nan
    return values


def test_highest_tiles_leave_out_those_that_overlap_a_higher_one():
    x, y = np.array([0.0, 16, 32, 48, 0, 64]), np.array([0.0, 0, 0, 0, 32, 64])
    values = np.array([0.5, 0.9, 0.8, 0.7, 0.9, np.nan])
    assert highest_apart(values, x, y, side=32, count=9) == [1, 4, 3]  # 0 and 2 overlap 1; ties in order
    assert highest_apart(values, x, y, side=32, count=1) == [1]
    assert highest_apart(np.full(2, np.nan), x[:2], y[:2], side=32, count=3) == []


def test_pictures_of_the_top_tiles_are_the_tiles_that_were_scored(prepared, tmp_path):
    values, tiles = rising(prepared), prepared.tiles
    top = list(write_top_tiles(tmp_path, prepared, values))
    assert top == top_tiles(prepared, values)
    assert [tile.file for tile in top] == [f"top_tiles/{n}.png" for n in range(1, len(top) + 1)]
    rows = [int(np.flatnonzero((tiles.x == tile.x) & (tiles.y == tile.y))[0]) for tile in top]
    assert rows[0] == len(tiles) - 3 and [values[row] for row in rows] == [tile.value for tile in top]
    for tile in top:
        with Image.open(tmp_path / tile.file) as image:
            np.testing.assert_array_equal(np.asarray(image), prepared.slide.read(tile.x, tile.y, 32, 32, 1.0))


def test_a_tile_that_cannot_be_read_any_more_is_left_out(prepared, tmp_path, monkeypatch):
    read, count = prepared.slide.read, iter(range(99))

    def once_broken(*region):
        if next(count) == 0:
            raise RegionError("gone")
        return read(*region)

    monkeypatch.setattr(prepared.slide, "read", once_broken)
    top = list(write_top_tiles(tmp_path, prepared, rising(prepared)))
    assert top == top_tiles(prepared, rising(prepared))[1:] and not (tmp_path / "top_tiles" / "1.png").exists()


def test_flags_count_what_could_not_be_read(prepared):
    values = rising(prepared)
    assert slide_flags(prepared, values) == ["little tissue: 0.037 mm²", f"not readable: 2 of {len(values)} tiles"]
    assert slide_flags(prepared, np.nan_to_num(values)) == ["little tissue: 0.037 mm²"]


def test_page_has_maps_tiles_flags_and_facts_and_needs_no_other_file(prepared, tmp_path):
    write_image(tmp_path / "probability.png", tissue(300))
    pictures = {"probability": "probability.png", "Grad-CAM": "absent.png"}
    values = rising(prepared)
    write_slide_page(tmp_path, prepared, values, pictures=pictures)
    page = Page((tmp_path / "report.html").read_text())
    top = top_tiles(prepared, values)
    for words in [
        f"a probability {np.nanmax(values):.4f} To look at",
        f"little tissue: 0.037 mm² not readable: 2 of {len(values)} tiles",
        f"1. {top[0].value:.4f} at ({top[0].x:.0f}, {top[0].y:.0f})",
        "of which a tile is 64 wide",
        "0.5 µm per pixel, from the file reader tifffile",
    ]:
        assert words in page.text
    sources = [attributes["src"] for tag, attributes in page.elements if tag == "img"]
    assert len(sources) == 1 + len(top)
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources)
    assert sorted(path.name for path in (tmp_path / "preview").iterdir()) == ["probability.jpg", "top_tiles.jpg"]


def test_slide_without_a_known_tile_has_a_page_without_tiles(prepared, tmp_path):
    write_slide_page(tmp_path, prepared, np.full(len(prepared.tiles), np.nan, np.float32), pictures={})
    text = Page((tmp_path / "report.html").read_text()).text
    assert "no tile could be read" in text and "Highest tiles" not in text and not (tmp_path / "preview").exists()


def test_previews_stay_below_their_size_whatever_they_show():
    noise = np.random.default_rng(0).integers(0, 256, (900, 1200, 3), dtype=np.uint8)
    data = preview(Image.fromarray(noise))
    assert len(data) <= slide_quality.PREVIEW_BYTES
    plain = preview(Image.fromarray(np.full((900, 1200, 3), 200, np.uint8)))
    with Image.open(io.BytesIO(plain)) as image:
        assert image.format == "JPEG" and image.size == (640, 480)
