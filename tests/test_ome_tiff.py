"""Heat maps as OME-TIFF: the same pixels in every reader, at the right scale and place, what is missing told apart."""

import dataclasses
import tracemalloc
from xml.etree import ElementTree

import numpy as np
import openslide
import pytest
import tifffile

from data_pipelines.ome_tiff import GLASS, write_colour_tiff, write_value_tiff
from data_pipelines.overlays import map_colours

DOWNSAMPLE, SLIDE_MPP = 112.5, 0.2528


@dataclasses.dataclass
class Map:
    values: np.ndarray
    missing: np.ndarray
    downsample: float = DOWNSAMPLE
    origin: tuple[float, float] = (3000.5, 1200.0)
    mpp: float = DOWNSAMPLE * SLIDE_MPP


@pytest.fixture(scope="module")
def slide_map():
    """300 x 531 cells (three levels, the last with odd sides), rows without tiles above, unreadable ones at the left."""
    values = np.random.default_rng(0).random((300, 531), np.float32)
    values[:50] = np.nan
    missing = np.zeros(values.shape, bool)
    missing[20:80, :40] = True  # where there is a value, it shows
    return Map(values, missing)


def maxima(values):
    """Of 2 x 2 cells, one by one; the last row and column may be half."""
    rows, columns = (-(-side // 2) for side in values.shape)
    blocks = [[values[2 * r : 2 * r + 2, 2 * c : 2 * c + 2] for c in range(columns)] for r in range(rows)]
    with np.errstate(invalid="ignore"):
        return np.array([[np.fmax.reduce(block, axis=None) for block in row] for row in blocks])


def read_level(slide, level):
    pixels = np.asarray(slide.read_region((0, 0), level, slide.level_dimensions[level]))
    assert (pixels[..., 3] == 255).all()
    return pixels[..., :3]


def pixels_element(path):
    with tifffile.TiffFile(path) as tif:
        return ElementTree.fromstring(tif.ome_metadata).find(".//{*}Pixels")


@pytest.mark.parametrize("limit", [2**32, 0])  # classic TIFF, BigTIFF
def test_openslide_and_tifffile_see_the_same_levels_at_the_right_scale(tmp_path, slide_map, monkeypatch, limit):
    monkeypatch.setattr("data_pipelines.pyramids._CLASSIC_TIFF_LIMIT", limit)
    path = tmp_path / "a.ome.tiff"
    write_colour_tiff(path, slide_map)
    with openslide.OpenSlide(path) as slide, tifffile.TiffFile(path) as tif:
        assert tif.is_bigtiff == (limit == 0) and tif.is_ome and len(tif.series) == 1
        for axis in "xy":
            assert float(slide.properties[f"openslide.mpp-{axis}"]) == pytest.approx(DOWNSAMPLE * SLIDE_MPP, rel=1e-6)
        assert slide.level_dimensions == ((531, 300), (266, 150), (133, 75))
        assert [level.shape for level in tif.series[0].levels] == [(300, 531, 3), (150, 266, 3), (75, 133, 3)]
        for level in range(slide.level_count):
            np.testing.assert_array_equal(read_level(slide, level), tif.series[0].levels[level].asarray())


def test_cucim_sees_them_too(tmp_path, slide_map):
    cucim = pytest.importorskip("cucim")
    path = tmp_path / "a.ome.tiff"
    write_colour_tiff(path, slide_map)
    image = cucim.CuImage(str(path))
    assert image.metadata["cucim"]["spacing"][:2] == pytest.approx([DOWNSAMPLE * SLIDE_MPP] * 2, rel=1e-6)
    for level, size in enumerate(image.resolutions["level_dimensions"]):
        found = np.asarray(image.read_region((0, 0), size, level))
        np.testing.assert_array_equal(found, tifffile.imread(path, level=level))


def test_values_nothing_and_unreadable_look_different(tmp_path, slide_map):
    write_colour_tiff(tmp_path / "a.ome.tiff", slide_map, limits=(0.0, 0.5))
    picture = tifffile.imread(tmp_path / "a.ome.tiff")
    known = ~np.isnan(slide_map.values)
    expected = np.rint(map_colours(slide_map.values[known], "turbo", (0.0, 0.5)))
    np.testing.assert_array_equal(picture[known], expected)
    unreadable = slide_map.missing & ~known
    assert (picture[~known & ~unreadable] == GLASS).all()
    stripes = picture[unreadable]
    assert np.ptp(stripes, axis=1).max() < 20 and len(np.unique(stripes, axis=0)) == 2  # two grays
    assert (stripes != 0).all() and (stripes != GLASS).any(axis=1).all()


def test_values_come_back_with_nan_and_a_hot_spot_stays_at_every_level(tmp_path, slide_map):
    path = tmp_path / "a.ome.tiff"
    write_value_tiff(path, slide_map, label="Grad-CAM")
    with tifffile.TiffFile(path) as tif:
        expected = slide_map.values
        for level in tif.series[0].levels:
            np.testing.assert_array_equal(level.asarray(), expected)
            expected = maxima(expected)
        assert len(tif.series[0].levels) == 3 and tif.series[0].dtype == np.float32
    pixels = pixels_element(path)
    assert pixels.get("Type") == "float" and pixels.find("{*}Channel").get("Name") == "Grad-CAM"


def test_ome_xml_tells_scale_and_place(tmp_path, slide_map):
    path = tmp_path / "a.ome.tiff"
    write_colour_tiff(path, slide_map)
    pixels = pixels_element(path)
    size = [int(pixels.get(f"Size{axis}")) for axis in "XYCZT"]
    assert size == [531, 300, 3, 1, 1] and pixels.get("Type") == "uint8"
    assert float(pixels.get("PhysicalSizeX")) == float(pixels.get("PhysicalSizeY")) == DOWNSAMPLE * SLIDE_MPP
    plane = pixels.find("{*}Plane")
    place = [float(plane.get(f"Position{axis}")) for axis in "XY"]
    assert place == pytest.approx([3000.5 * SLIDE_MPP, 1200 * SLIDE_MPP])
    units = {value for element in (pixels, plane) for key, value in element.items() if key.endswith("Unit")}
    assert units == {"µm"}
    with tifffile.TiffFile(path) as tif:
        noted = {m.get("K"): m.text for m in ElementTree.fromstring(tif.ome_metadata).iterfind(".//{*}M")}
    assert noted["x of the corner (level-0 px)"] == "3000.5" and noted["pixel (level-0 px)"] == "112.5"
    assert noted["nothing known"] == "RGB (243, 243, 243)" and noted["colours"] == "turbo, 0 to 1"


def test_over_the_whole_slide_a_pixel_lies_where_its_cell_does(tmp_path, slide_map):
    width, height = 70_001, 40_000
    write_value_tiff(tmp_path / "a.ome.tiff", slide_map, slide_size=(width, height), pixel=75.0)
    values = tifffile.imread(tmp_path / "a.ome.tiff")
    assert values.shape == (534, 934)  # rounded up: the slide's edge is on it
    for row, column in np.random.default_rng(1).integers(0, values.shape, (300, 2)):
        x, y = (column + 0.5) * 75 - 3000.5, (row + 0.5) * 75 - 1200
        c, r = int(np.floor(x / DOWNSAMPLE)), int(np.floor(y / DOWNSAMPLE))
        inside = 0 <= r < 300 and 0 <= c < 531
        np.testing.assert_equal(values[row, column], slide_map.values[r, c] if inside else np.float32(np.nan))
    pixels = pixels_element(tmp_path / "a.ome.tiff")
    assert float(pixels.get("PhysicalSizeX")) == pytest.approx(75 * SLIDE_MPP)
    assert pixels.find("{*}Plane").get("PositionX") == pixels.find("{*}Plane").get("PositionY") == "0.0"


def test_pixels_over_a_slide_are_a_quarter_of_a_cell_unless_told(tmp_path, slide_map):
    write_colour_tiff(tmp_path / "a.ome.tiff", slide_map, slide_size=(70_000, 40_000))
    with openslide.OpenSlide(tmp_path / "a.ome.tiff") as slide:
        assert slide.dimensions == (2489, 1423)
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(DOWNSAMPLE * SLIDE_MPP / 4, rel=1e-6)


def test_a_small_map_has_one_level(tmp_path):
    small = Map(np.array([[0.5, np.nan]], np.float32), np.zeros((1, 2), bool))
    write_colour_tiff(tmp_path / "a.ome.tiff", small)
    with openslide.OpenSlide(tmp_path / "a.ome.tiff") as slide:
        assert slide.level_dimensions == ((2, 1),)
        np.testing.assert_array_equal(read_level(slide, 0), tifffile.imread(tmp_path / "a.ome.tiff"))


def test_writing_again_gives_the_same_bytes(tmp_path, slide_map):
    for folder in ("a", "b"):
        write_colour_tiff(tmp_path / folder / "map.ome.tiff", slide_map)
    assert (tmp_path / "a/map.ome.tiff").read_bytes() == (tmp_path / "b/map.ome.tiff").read_bytes()


class Lazy:
    """An array on a disk, of which only slices can be had."""

    def __init__(self, shape, dtype, fill):
        self.shape, self.dtype, self.fill = shape, dtype, fill

    def __getitem__(self, window):
        rows, columns = window
        values = np.full((rows.stop - rows.start, columns.stop - columns.start), self.fill, self.dtype)
        values[(columns.start // 256 + rows.start // 256) % 16 > 0] = np.nan if self.dtype is np.float32 else False
        return values


@pytest.mark.parametrize("side", [2048, 8192])
def test_memory_does_not_follow_the_map(tmp_path, side):
    lazy = Map(Lazy((side, side), np.float32, 0.5), Lazy((side, side), bool, False))
    tracemalloc.start()
    write_colour_tiff(tmp_path / "a.ome.tiff", lazy)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 15e6  # the larger one has 268 MB of values
    with openslide.OpenSlide(tmp_path / "a.ome.tiff") as slide:
        assert slide.dimensions == (side, side)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"limits": (0.5, 0.5)}, "must rise"),
        ({"slide_size": (900, 900), "pixel": 113.0}, "at most a cell"),
        ({"slide_size": (0, 900)}, "at least 1 x 1"),
    ],
)
def test_what_cannot_be_drawn_is_refused(tmp_path, slide_map, options, message):
    with pytest.raises(ValueError, match=message):
        write_colour_tiff(tmp_path / "a.ome.tiff", slide_map, **options)
    assert not list(tmp_path.iterdir())
