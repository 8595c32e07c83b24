"""evaluate_camelyon: the same lesions and numbers from shapes, masks and maps; what is missing is named."""

import csv
import json

import numpy as np
import pytest
import tifffile
from PIL import Image

from data_pipelines.annotations import AnnotationError, write_asap_xml
from data_pipelines.cohort import SlideRecord
from data_pipelines.detections import DetectionsError, read_detections
from data_pipelines.exports import write_map
from data_pipelines.polygons import Shape
from data_pipelines.pyramids import write_pyramid
from data_pipelines.tumour_masks import tumour_mask
from srcc_jax.kernels.heat_maps import HeatMap
from tests import programs
from tests.programs import one_line

SIDE = 4096  # level-0 px at 0.25 µm
SQUARES = ((500, 500, 2000, 2000), (2600, 2600, 3900, 3900), (3000, 500, 3300, 800))  # the last is ITC: 75 µm a side


@pytest.fixture(scope="module")
def evaluating():
    with programs.imported("evaluate_camelyon") as module:
        yield module


def box(x0, y0, x1, y1, group="Tumor"):
    return Shape("polygon", np.asarray([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], float), name="t", group=group)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """Two slides with tumour, one of them with a hole in it, and one without; detections of each."""
    root = tmp_path_factory.mktemp("camelyon")
    for name in ("a", "b", "c", "test_114"):
        write_pyramid(root / f"{name}.tiff", np.full((SIDE, SIDE, 3), 200, np.uint8), mpp=0.25, levels=1)
    write_asap_xml(root / "a.xml", [box(*square) for square in SQUARES])
    write_asap_xml(root / "b.xml", [box(*SQUARES[0], group="_0"), box(1000, 1000, 1200, 1200, group="_2")])
    lines = [
        f"{name},{name}.tiff,{label},{note}"
        for name, label, note in (("a", "tumour", "a.xml"), ("b", "tumour", "b.xml"), ("c", "normal", ""))
    ]
    (root / "cohort.csv").write_text("\n".join(["slide_id,path,label,annotation", *lines]))
    found = {"a": "score,x,y\n0.9,1000,1000\n0.8,3100,600\n0.4,2500,300\n", "b": "0.7,600,600\n", "c": "0.6,100,100\n"}
    for name, text in found.items():
        (root / "found").mkdir(exist_ok=True)
        (root / "found" / f"{name}.csv").write_text(text)
    return root


def evaluate(module, root, **values):
    return programs.start(module, cohort=root / "cohort.csv", out=root / "table", **values)


def test_lesions_and_numbers(evaluating, cohort):
    outcome = evaluate(evaluating, cohort, detections=cohort / "found")
    assert outcome.status == 0, outcome.err
    with open(cohort / "table" / "slides.csv", newline="") as file:
        rows = {row["slide_id"]: row for row in csv.DictReader(file)}
    assert [rows["a"][name] for name in ("lesions", "lesions_found", "itc", "false_positives")] == ["2", "1", "1", "1"]
    assert [rows["b"][name] for name in ("lesions", "lesions_found", "itc", "false_positives")] == ["1", "1", "0", "0"]
    metrics = json.loads((cohort / "table" / "metrics.json").read_text())
    assert metrics["lesions"] == 3
    assert metrics["slide ROC AUC"]["value"] == 1
    # of 3 lesions 2 are found above the first false positive (0.6, a third per slide)
    assert metrics["lesion FROC"]["value"] == pytest.approx(2 / 3)
    assert "lesion FROC 0.6667" in outcome.out and (cohort / "table" / "report.html").exists()


def test_maps_of_ours_are_detections(evaluating, cohort):
    for name, hot in (("a", (10, 10)), ("b", (6, 6)), ("c", (20, 20))):
        values = np.full((64, 64), 0.1, np.float32)
        values[hot] = 0.9 if name != "c" else 0.7
        values[0, 0] = np.nan
        slide_map = HeatMap(values, np.isnan(values), 64.0, (0.0, 0.0), 16.0)
        write_map(cohort / "maps" / "slides" / name / "probability.npz", slide_map, unit="probability")
    outcome = evaluate(evaluating, cohort, maps=cohort / "maps")
    assert outcome.status == 0, outcome.err
    with open(cohort / "table" / "slides.csv", newline="") as file:
        assert [row["lesions_found"] for row in csv.DictReader(file)] == ["1", "1", "0"]


def test_slides_of_classifiers_are_ranked_by_their_probability(evaluating, cohort):
    """The map of c has the highest cell of all, its slide the lowest probability."""
    for name, hot, probability in (("a", 0.8, 0.9), ("b", 0.7, 0.6), ("c", 0.95, 0.1)):
        values = np.full((64, 64), 0.1, np.float32)
        values[10, 10] = hot
        slide_map = HeatMap(values, np.isnan(values), 64.0, (0.0, 0.0), 16.0)
        folder = cohort / "classified" / "slides" / name
        write_map(folder / "probability.npz", slide_map, unit="probability")
        (folder / "slide.json").write_text(json.dumps({"probability": probability}))
    assert evaluate(evaluating, cohort, maps=cohort / "classified").status == 0
    assert json.loads((cohort / "table" / "metrics.json").read_text())["slide ROC AUC"]["value"] == 1
    with open(cohort / "table" / "slides.csv", newline="") as file:
        assert [float(row["score"]) for row in csv.DictReader(file)] == [0.9, 0.6, 0.1]


def test_logits_are_scores(evaluating, cohort, tmp_path):
    """As probabilities they give the same numbers; a slide without a detection is the last."""
    (tmp_path / "a.csv").write_text("2.2,1000,1000\n1.4,3100,600\n-0.4,2500,300\n")
    (tmp_path / "b.csv").write_text("-0.1,600,600\n")
    (tmp_path / "c.csv").write_text("")
    outcome = evaluate(evaluating, cohort, detections=tmp_path)
    assert outcome.status == 0, outcome.err
    metrics = json.loads((cohort / "table" / "metrics.json").read_text())
    assert metrics["slide ROC AUC"]["value"] == 1 and metrics["lesion FROC"]["value"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("variant, mpp, found", [("camelyon16", 7.776, 2), ("monai", 15.552, 1)])
def test_variants_have_their_own_scale_and_radius(evaluating, cohort, variant, mpp, found):
    """Two peaks 20 cells of 16 µm apart: MONAI clears 23 of them around the higher one, He & Li's code 6."""
    for name in "abc":
        values = np.zeros((64, 64), np.float32)
        values[20, 20], values[20, 40] = 0.9, 0.8
        slide_map = HeatMap(values, np.isnan(values), 64.0, (0.0, 0.0), 16.0)
        write_map(cohort / "peaks" / "slides" / name / "probability.npz", slide_map, unit="probability")
    assert evaluate(evaluating, cohort, maps=cohort / "peaks", variant=variant).status == 0
    metrics = json.loads((cohort / "table" / "metrics.json").read_text())
    assert (metrics["variant"], metrics["mask_mpp"]) == (variant, [pytest.approx(mpp)])
    with open(cohort / "table" / "slides.csv", newline="") as file:
        assert {row["detections"] for row in csv.DictReader(file)} == {str(found)}


@pytest.mark.parametrize("pixels, used, said", [(1024, 8.0, False), (64, 16.0, True)])
def test_the_scale_of_masks_is_the_one_used(evaluating, cohort, pixels, used, said):
    """A finer mask is thinned out to the official scale; a coarser one is said to be."""
    shapes = tumour_mask(SlideRecord("a", cohort / "a.tiff", "tumour", "a", annotation=cohort / "a.xml"), mpp=1.0)
    mask = shapes.mask[:: 1024 // pixels, :: 1024 // pixels]
    Image.fromarray(mask.astype(np.uint8)).save(cohort / "mask.png")
    lines = (cohort / "cohort.csv").read_text().replace("a.xml", "mask.png").replace("b.xml", "mask.png")
    (cohort / "masks.csv").write_text(lines)
    outcome = programs.start(evaluating, cohort=cohort / "masks.csv", detections=cohort / "found", out=cohort / "masks")
    assert outcome.status == 0, outcome.err
    metrics = json.loads((cohort / "masks" / "metrics.json").read_text())
    assert metrics["mask_mpp"] == [used] and metrics["mask_mpp_wanted"] == pytest.approx(7.776)
    assert metrics["lesions"] == 4  # the third square of both is ITC
    assert ("Masks at 16 µm per pixel, not at 7.776" in outcome.out) == said


def test_masks_of_other_slides_are_refused_and_large_ones_read(cohort, tmp_path, monkeypatch):
    record = SlideRecord("a", cohort / "a.tiff", "tumour", "a", annotation=tmp_path / "m.png")
    Image.fromarray(np.zeros((200, 512), np.uint8)).save(tmp_path / "m.png")
    with pytest.raises(AnnotationError, match=r"m.png: has 512 × 200 pixels, the slide 4096 × 4096: it is the mask of"):
        tumour_mask(record, mpp=8.0)
    for height in (511, 512, 513):  # rounded down, or up
        Image.fromarray(np.zeros((height, 512), np.uint8)).save(tmp_path / "m.png")
        assert tumour_mask(record, mpp=8.0).mask.shape == (height, 512)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert tumour_mask(record, mpp=8.0).mask.shape == (513, 512) and Image.MAX_IMAGE_PIXELS == 1000


def test_known_exceptions_are_left_out_and_said(evaluating, cohort):
    text = (cohort / "cohort.csv").read_text()
    (cohort / "with_exception.csv").write_text(f"{text}\ntest_114,test_114.tiff,tumour,a.xml\n")
    outcome = programs.start(
        evaluating, cohort=cohort / "with_exception.csv", detections=cohort / "found", out=cohort / "t"
    )
    assert outcome.status == 0 and "left out: test_114 (not annotated exhaustively)" in outcome.out


def test_what_is_missing_is_named(evaluating, cohort, tmp_path):
    (tmp_path / "a.csv").write_text("0.9,1,1\n")
    line = one_line(evaluate(evaluating, cohort, detections=tmp_path))
    assert "b, c" in line and "empty table" in line
    assert "one of --maps" in one_line(evaluate(evaluating, cohort))
    lines = (cohort / "cohort.csv").read_text().replace("a.xml", "")
    (cohort / "bare.csv").write_text(lines)
    outcome = programs.start(evaluating, cohort=cohort / "bare.csv", detections=cohort / "found", out=cohort / "t")
    assert "a is tumour but has no annotation" in one_line(outcome)


@pytest.mark.parametrize("kind, value", [("tiff", 255), ("tiff", 1), ("png", 1)])
def test_masks_are_images_of_any_kind(cohort, tmp_path, kind, value):
    shapes = tumour_mask(SlideRecord("a", cohort / "a.tiff", "tumour", "a", annotation=cohort / "a.xml"), mpp=8.0)
    image = np.where(shapes.mask, np.uint8(value), 0).repeat(4, 0).repeat(4, 1)
    path = tmp_path / f"mask.{kind}"
    if kind == "png":
        Image.fromarray(image).save(path)
    else:
        with tifffile.TiffWriter(path) as writer:
            writer.write(image, tile=(64, 64), subifds=2, metadata=None)
            for step in (2, 4):
                writer.write(image[::step, ::step], tile=(64, 64), subfiletype=1, metadata=None)
    found = tumour_mask(SlideRecord("a", cohort / "a.tiff", "tumour", "a", annotation=path), mpp=8.0)
    if kind == "tiff":
        assert (found.mpp, found.downsample) == (8.0, 32.0)
        np.testing.assert_array_equal(found.mask, shapes.mask)
    else:
        assert (found.mpp, found.downsample) == (2.0, 8.0)
    gone = SlideRecord("a", tmp_path / "gone.tiff", "tumour", "a", mpp=1.0, annotation=path)
    assert tumour_mask(gone, mpp=4.0 if kind == "tiff" else 1.0).downsample == (4.0 if kind == "tiff" else 1.0)


def test_values_of_normal_tissue_are_no_tumour_and_others_are_refused(cohort, tmp_path):
    mask = np.zeros((64, 64), np.uint8)
    mask[:8], mask[8:16] = 1, 2
    Image.fromarray(mask).save(tmp_path / "m.png")
    record = SlideRecord("a", cohort / "a.tiff", "tumour", "a", annotation=tmp_path / "m.png")
    assert tumour_mask(record, mpp=16.0).mask.sum() == 8 * 64
    Image.fromarray(mask + 7).save(tmp_path / "m.png")
    with pytest.raises(ValueError, match=r"m.png: values \[7, 8, 9\]"):
        tumour_mask(record, mpp=16.0)


def test_tables_of_detections(tmp_path):
    path = tmp_path / "d.csv"
    path.write_text("x,y,confidence\n10,20,0.5\n")
    found = read_detections(path)
    assert (found.score.tolist(), found.x.tolist(), found.y.tolist()) == ([0.5], [10], [20])
    path.write_text("")
    assert len(read_detections(path)) == 0
    path.write_text("prob,x\n1,2\n")
    with pytest.raises(DetectionsError, match="no column y among prob, x"):
        read_detections(path)
    path.write_text("0.5,1,2\n0.4,one,2\n")
    with pytest.raises(DetectionsError, match="line 2: 'one' is no number"):
        read_detections(path)
