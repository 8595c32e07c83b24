"""Regions with boxes, and unlabelled ones, cut from the slides of a cohort: where they lie, and what cannot be cut."""

import numpy as np
import pytest

from data_pipelines.annotations import AnnotationWarning
from data_pipelines.boxes import Boxes, write_boxes
from data_pipelines.cell_images import read_cell_images
from data_pipelines.cohort import Cohort, SlideRecord
from data_pipelines.geojson import shape_feature, write_geojson
from data_pipelines.pyramids import write_pyramid
from data_pipelines.slides import RegionError, SlideError, open_slide
from experiments.run.cells import regions
from experiments.run.cells.regions import RegionCutter
from srcc_jax.methods.cell_detection import Config
from tests import programs


def test_regions_are_cut_from_slides(tmp_path):
    """A slide of 0.25 µm per pixel with boxes, one without cells; a third cannot be opened."""
    for name in ("with", "without"):
        write_pyramid(tmp_path / f"{name}.tiff", programs.tissue(1024, seed=len(name)), mpp=0.25, levels=2)
    boxes = np.array([[300, 310, 340, 350], [700, 720, 740, 760]], float)
    write_boxes(tmp_path / "with.xml", Boxes(boxes, np.full(2, np.nan)), image="with", width=1024, height=1024)
    (tmp_path / "bad.tiff").write_bytes(b"no slide")
    cohort = Cohort((
        SlideRecord("with", tmp_path / "with.tiff", "srcc", "p1", "train", annotation=tmp_path / "with.xml"),
        SlideRecord("without", tmp_path / "without.tiff", "benign", "p2", "test"),
        SlideRecord("bad", tmp_path / "bad.tiff", "srcc", "p3", "train"),
    ))  # fmt: skip
    cutter = RegionCutter(Config(region_px=256, regions=2), tmp_path / "regions", "srcc")
    cut = cutter.cut(cohort, threads=1)
    assert cut == cutter.cut(cohort, threads=1)  # read again
    assert {group["split"] for group in cut.groups.values()} == {"train", "test"}
    assert list(cut.failed) == ["bad"] and cut.notes[0].startswith("left out: slide bad: ")
    found = read_cell_images(cutter.folder)
    assert sum(len(image.boxes) for image in found.images) == 2 and {i.slide_id for i in found.images} == {
        "with",
        "without",
    }
    x, y = (float(part) for part in found.images[0].name.split("-")[2:4])
    np.testing.assert_allclose(found.images[0].boxes[0], boxes[0] - [x, y, x, y], atol=1)
    for path in cutter.unlabelled.glob("*.png"):
        at = np.array([float(part) for part in path.stem.split("-")[2:4]])
        assert (np.abs(boxes[:, :2] - at - 128).max(axis=1) > 100).all()
    with pytest.raises(SlideError, match="none of 1 slides has an annotated region"):
        RegionCutter(Config(), tmp_path / "other", "srcc").cut(Cohort(cohort.records[2:]), threads=1)


SQUARES = [(300.0, 310.0), (700.0, 720.0)]  # cells of 40 px


@pytest.fixture
def annotated(tmp_path):
    """(squares (x, y, side) in level-0 px, bounds) -> a slide of 1024 px whose GeoJSON counts from its bounds."""

    def make(squares, bounds=(0, 0)):
        write_pyramid(tmp_path / "s.tiff", programs.tissue(1024), mpp=0.25, levels=2)
        features = [shape_feature(programs.square(*given), slide_id="s", offset=bounds) for given in squares]
        write_geojson(tmp_path / "s.geojson", features)
        return SlideRecord("s", tmp_path / "s.tiff", "srcc", "p", annotation=tmp_path / "s.geojson")

    return make


def cut_one(record, folder):
    return RegionCutter(Config(region_px=256, regions=2), folder, "srcc").cut(Cohort((record,)), threads=1)


def test_geojson_of_a_slide_with_bounds_counts_from_them(annotated, tmp_path, monkeypatch):
    def with_bounds(path, **given):
        slide = open_slide(path, **given)
        slide.bounds = (200, 100, 800, 900)
        return slide

    monkeypatch.setattr(regions, "open_slide", with_bounds)
    cut_one(annotated([(*place, 40.0) for place in SQUARES], (200, 100)), tmp_path / "regions")
    found = [image for image in read_cell_images(tmp_path / "regions").images if len(image.boxes)]
    corners = [np.array([float(part) for part in image.name.split("-")[2:4]]) for image in found]
    assert sorted(tuple((image.boxes[0, :2] + at).round(-1)) for image, at in zip(found, corners)) == SQUARES


def test_annotations_outside_the_slide_give_no_regions(annotated, tmp_path):
    with pytest.raises(SlideError, match=r"all 1 shapes .* lie outside the slide of 1024 x 1024 pixels"):
        cut_one(annotated([(5000.0, 5000.0, 40.0)]), tmp_path / "none")
    with pytest.warns(AnnotationWarning, match="1 of 2 shapes lie outside the slide"):
        cut_one(annotated([(5000.0, 5000.0, 40.0), (300.0, 310.0, 40.0)]), tmp_path / "one")
    (image,) = (image for image in read_cell_images(tmp_path / "one").images if len(image.boxes))
    assert image.name.startswith("s-lv0-192-202")


def test_outlines_of_tissue_are_no_cells(annotated, tmp_path):
    with pytest.raises(
        SlideError, match="1 of 2 shapes are larger than a training crop of 64 µm, up to 200 µm: boxes of single"
    ):
        cut_one(annotated([(100.0, 100.0, 800.0), (300.0, 310.0, 40.0)]), tmp_path / "regions")


def test_a_slide_that_fails_half_way_leaves_no_region(annotated, tmp_path, monkeypatch):
    """No table would know the split of what it left."""
    write, written = regions.write_image, []

    def fail_at_the_second(path, pixels):
        written.append(path)
        if len(written) == 2:
            raise RegionError("a broken tile")
        write(path, pixels)

    monkeypatch.setattr(regions, "write_image", fail_at_the_second)
    with pytest.raises(
        SlideError, match="none of 1 slides has an annotated region; the first: left out: slide s: a broken tile"
    ):
        cut_one(annotated([(*place, 40.0) for place in SQUARES]), tmp_path / "regions")
    assert not list((tmp_path / "regions").rglob("s-*"))
