"""From a cohort's row to tiles: tissue, size, annotation, and what is refused."""

import json
import types

import numpy as np
import pytest

from data_pipelines.annotations import AnnotationError, read_annotation, write_asap_xml
from data_pipelines.cohort import SlideRecord, read_cohort
from data_pipelines.polygons import Shape, rasterize
from data_pipelines.prepare import TISSUE_MPP, prepare_slide, read_shapes
from data_pipelines.slides import SlideError
from data_pipelines.synthetic import drawn_cohort
from data_pipelines.tiles import Grid
from tests.tiff_files import write_tiff

GRID = Grid(tile=64, stride=32, mpp=1.0)


def record(path, annotation=None, **fields):
    return SlideRecord("s", path, "srcc", "p", annotation=annotation, **fields)


def spotted(width, height, box):
    """A white slide with coloured tissue in the box (x0, y0, x1, y1)."""
    image = np.full((height, width, 3), 243, np.uint8)
    x0, y0, x1, y1 = box
    image[y0:y1, x0:x1] = np.random.default_rng(0).integers((140, 60, 120), (200, 120, 180), (y1 - y0, x1 - x0, 3))
    return image


def square(x, y, side):
    corners = np.array([(x, y), (x + side, y), (x + side, y + side), (x, y + side)], float)
    return Shape(kind="polygon", exterior=corners, name="a", group="SRCC")


def test_tiles_lie_on_the_tissue_alone(tmp_path):
    path = write_tiff(tmp_path / "a.tiff", spotted(512, 384, (128, 64, 384, 320)), mpp=0.5)
    prepared = prepare_slide(record(path), GRID, min_tissue=0.5)
    with prepared.slide:
        tiles = prepared.tiles
        assert prepared.tissue.shape == (12, 16) and prepared.tissue[2:10, 4:12].all()
        assert prepared.tissue.sum() == 64  # 256 px of 0.5 µm are 8 cells of TISSUE_MPP a side
        over = (tiles.x + 64 >= 128) & (tiles.x + 64 <= 384) & (tiles.y + 64 >= 64) & (tiles.y + 64 <= 320)
        assert TISSUE_MPP == 16 and len(tiles) > 0 and over.all()
        assert (tiles.annotated == 0).all() and (tiles.tissue >= 0.5).all()


def test_a_slide_without_tissue_has_no_tiles(tmp_path):
    path = write_tiff(tmp_path / "white.tiff", np.full((300, 300, 3), 255, np.uint8))
    prepared = prepare_slide(record(path), GRID, min_tissue=0.5)
    with prepared.slide:
        assert len(prepared.tiles) == 0 and not prepared.tissue.any()
        assert prepared.tiles.slides.tolist() == ["s"]


def test_a_slide_smaller_than_a_tile_has_one(tmp_path):
    path = write_tiff(tmp_path / "small.tiff", spotted(100, 72, (0, 0, 80, 72)), mpp=0.5)  # 50 x 36 model pixels
    prepared = prepare_slide(record(path), GRID, min_tissue=0.5)
    with prepared.slide as slide:
        assert (prepared.tiles.x.tolist(), prepared.tiles.y.tolist()) == ([0.0], [0.0])
        pixels = slide.read(0, 0, 64, 64, 1.0)
        assert (pixels[40:, :] == 255).all() and (pixels[:30, :30] < 255).any()


def test_an_annotation_beside_its_slide_is_refused_by_name(tmp_path):
    path = write_tiff(tmp_path / "a.tiff", spotted(256, 256, (0, 0, 200, 200)), mpp=0.5)
    write_asap_xml(tmp_path / "far.xml", [square(5000, 4000, 50)])
    far = record(path, tmp_path / "far.xml")
    with pytest.raises(AnnotationError, match=r"far\.xml: all 1 shapes .* outside the slide of 256 x 256"):
        prepare_slide(far, GRID, min_tissue=0.5, annotated=True)
    prepared = prepare_slide(far, GRID, min_tissue=0.5)  # where it is not asked for, it does no harm
    prepared.slide.close()
    assert len(prepared.tiles)


def test_a_refused_annotation_leaves_no_slide_open(tmp_path, monkeypatch):
    path = write_tiff(tmp_path / "a.tiff", spotted(256, 256, (0, 0, 200, 200)), mpp=0.5)
    write_asap_xml(tmp_path / "far.xml", [square(5000, 4000, 50)])
    closed = []
    monkeypatch.setattr("data_pipelines.slides.Slide.close", lambda slide: closed.append(slide.path))
    with pytest.raises(AnnotationError):
        prepare_slide(record(path, tmp_path / "far.xml"), GRID, min_tissue=0.5, annotated=True)
    assert closed == [path]


def test_scale_comes_from_the_row_or_the_flag_or_is_refused(tmp_path):
    path = write_tiff(tmp_path / "a.tiff", spotted(256, 256, (0, 0, 200, 200)), mpp=None)
    with pytest.raises(SlideError, match=r"`mpp` of the cohort table.*--mpp_override"):
        prepare_slide(record(path), GRID, min_tissue=0.5)
    for options, source in (({"mpp": 0.5}, "cohort"), ({}, "flag")):
        prepared = prepare_slide(record(path, **options), GRID, min_tissue=0.5, mpp_override=0.5)
        prepared.slide.close()
        assert prepared.slide.mpp == 0.5 and prepared.slide.mpp_source == source


def test_annotated_tiles_of_a_drawn_slide_are_those_over_signet_ring_cells(tmp_path):
    table = drawn_cohort(tmp_path, slides={"train": (1, 0)}, side_px=700, mpp=1.0, seed=2)
    (row,) = read_cohort(table)
    prepared = prepare_slide(row, GRID, min_tissue=0.0, annotated=True)
    prepared.slide.close()
    shapes = read_annotation(row.annotation)
    truth = rasterize(shapes, width=700, height=700, downsample=1.0)
    under = [truth[v : v + 64, u : u + 64] for u, v in zip(prepared.tiles.u, prepared.tiles.v)]
    share = np.array([part.mean() for part in under])
    assert 0 < (share > 0).mean() < 1, "the slide must have tiles with and without signet ring cells"
    np.testing.assert_array_equal(prepared.tiles.annotated[share > 0] > 0, True)
    # The share is measured on a raster of 1/16 tile, by the centres of its cells: only cells that an outline cuts can differ.
    cells = [part.reshape(16, 4, 16, 4).mean((1, 3)) for part in under]
    cut = np.array([((part > 0) & (part < 1)).mean() for part in cells])
    assert (np.abs(prepared.tiles.annotated - share) <= cut + 0.5 / 16**2).all()


def test_geojson_counts_from_the_bounds_of_the_slide(tmp_path):
    ring = [[0, 0], [10, 0], [10, 10], [0, 10], [0, 0]]
    path = tmp_path / "a.geojson"
    path.write_text(
        json.dumps({"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]}, "properties": {}})
    )
    slide = types.SimpleNamespace(width=400, height=300, bounds=(100, 50, 200, 200))
    (shape,) = read_shapes(record(tmp_path / "a.tiff", annotation=path), slide)
    assert min(shape.bounds[0], shape.bounds[1]) == 50 and max(shape.bounds[0], shape.bounds[1]) == 100
