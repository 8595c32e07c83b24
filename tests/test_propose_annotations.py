"""Proposals of annotations: outlines of maps, their order, and the way there and back through a corrected file."""

import csv
import json
import signal

import numpy as np
import pytest

from data_pipelines.annotations import file_offset, read_annotation, write_asap_xml
from data_pipelines.cohort import read_cohort
from data_pipelines.exports import StoredMap, write_json, write_map, write_table
from data_pipelines.lesion_masks import read_mask
from data_pipelines.polygons import Shape, rasterize
from data_pipelines.pyramids import write_pyramid
from experiments.run.proposals.folder import ProposalFolder
from experiments.run.proposals.outlines import OutlineRule, find_outlines
from experiments.run.proposals.usefulness import Doubt, nearness, order, usefulness
from tests import programs

SIDE, CELL = 512, 8  # level-0 px of 1 µm
RULE = OutlineRule(threshold=0.5, label="lesion", least_mm2=0.001, smooth_um=0, simplify_um=0)
LESIONS = {"sure": 0.95, "unsure": 0.55, "at_odds": 0.9, "healthy": 0.1}
SCORES = {"sure": 0.99, "unsure": 0.7, "at_odds": 0.05, "healthy": 0.02}


def lesion_map(value, *, unit="lesion probability"):
    """A square of 160 µm with a hole of 40 and, far from it, one of 16; unknown at the right edge."""
    values = np.full((SIDE // CELL, SIDE // CELL), 0.05, np.float32)
    values[10:30, 10:30] = value
    values[16:21, 16:21] = 0.05
    values[50:52, 50:52] = value
    values[:, -4:] = np.nan
    return StoredMap(values, np.zeros(values.shape, bool), float(CELL), (0.0, 0.0), float(CELL), unit)


def write_predictions(folder, *, stem="lesion", unit="lesion probability"):
    """What predict_slides leaves of four slides, and of one that is out of focus."""
    rows = [(name, f"{name}.tiff", "done", "", score) for name, score in SCORES.items()]
    rows.append(("blurred", "blurred.tiff", "blurred", "out of focus", None))
    names = ("slide_id", "path", "status", "reason", "probability")
    write_table(folder / "slides.csv", dict(zip(names, map(list, zip(*rows)))))
    for name, value in LESIONS.items():
        write_map(folder / "slides" / name / f"{stem}.npz", lesion_map(value, unit=unit), unit=unit)
        about = {"bounds": [0, 0, SIDE, SIDE], "verdict_thresholds": {"verdict": 0.74}}
        write_json(folder / "slides" / name / "slide.json", about)
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Slides whose left three quarters are stained, in a cohort table of which one has an annotation, and their predictions."""
    root = tmp_path_factory.mktemp("proposals")
    lines = ["slide_id,path,label,split,annotation,site"]
    random = np.random.default_rng(0)
    for name in (*LESIONS, "blurred", "annotated"):
        rgb = np.full((SIDE, SIDE, 3), 243, np.uint8)
        rgb[:, : 3 * SIDE // 4] = random.integers((150, 70, 140), (210, 120, 190), (SIDE, 3 * SIDE // 4, 3))
        write_pyramid(root / f"{name}.tiff", rgb, mpp=1.0, compression="lzw")
        label = "benign" if name == "healthy" else "malignant"
        lines.append(f"{name},{name}.tiff,{label},train,{'own.xml' if name == 'annotated' else ''},A")
    write_asap_xml(root / "own.xml", [programs.square(50, 50)])
    (root / "cohort.csv").write_text("\n".join(lines) + "\n")
    write_predictions(root / "out")
    return root


def propose(root, out, **values):
    given = {
        "predictions": root / "out",
        "cohort": root / "cohort.csv",
        "out": root / out,
        "smooth_um": 0,
        "least_mm2": 0.001,
        **values,
    }
    with programs.imported("propose_annotations") as module:
        return programs.start(module, **{name: value for name, value in given.items() if value is not None})


def rows_of(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def drawn(shapes):
    return rasterize(shapes, width=SIDE, height=SIDE, downsample=1)


def test_outlines_are_the_cells_with_their_holes_and_confidence():
    found = lesion_map(0.8)
    (region,) = find_outlines(found, RULE)  # the small square is below 0.001 mm²
    wanted = np.kron(found.values >= 0.5, np.ones((CELL, CELL))) > 0
    wanted[400:] = False
    assert (drawn([region.shape]) == wanted).all()
    assert region.shape.score == region.measurements["confidence"] == pytest.approx(0.8)
    assert region.shape.name == "confidence 0.80" and region.shape.group == "lesion"
    rule = OutlineRule(threshold=0.5, label="lesion", least_mm2=0.002, smooth_um=0, simplify_um=0)
    assert not find_outlines(found, rule)[0].shape.holes


def test_simplified_outlines_move_by_less_than_they_may():
    y, x = np.mgrid[:64, :64]
    values = (0.9 * (np.hypot(x - 31.5, y - 31.5) < 25)).astype(np.float32)
    found = StoredMap(values, np.zeros(values.shape, bool), 8.0, (0.0, 0.0), 8.0, "probability")
    plain, simple = (
        find_outlines(found, OutlineRule(threshold=0.5, label="a", least_mm2=0, smooth_um=0, simplify_um=um))[0].shape
        for um in (0, 8)
    )
    assert len(simple.exterior) < len(plain.exterior) / 2
    one, other = drawn([plain]), drawn([simple])
    assert 2 * (one & other).sum() / (one.sum() + other.sum()) > 0.97
    smooth = find_outlines(found, OutlineRule(threshold=0.5, label="a", least_mm2=0, smooth_um=16, simplify_um=0))
    assert 0 < smooth[0].measurements["confidence"] < 0.9


def test_doubt_by_hand():
    given = {"slide_threshold": 0.74, "map_threshold": 0.5, "limits": (0.25, 0.75)}
    assert nearness(0.74, 0.74) == 1 and nearness(0, 0.74) == 0 and nearness(0.87, 0.74) == pytest.approx(0.5)
    maps = {name: lesion_map(value) for name, value in LESIONS.items()}
    doubts = [Doubt.of(name, found, SCORES[name], find_outlines(found, RULE), **given) for name, found in maps.items()]
    sure, unsure, at_odds, healthy = doubts
    assert (sure.disagreement, healthy.disagreement) == (0, 0)
    assert at_odds.disagreement == pytest.approx(0.8)  # surely negative, and a sure lesion
    assert unsure.disagreement == pytest.approx(min(0.04 / 0.74, 0.1))
    cells = 20**2 - 5**2 + 2**2
    assert unsure.uncertain_mm2 == pytest.approx(cells * 64e-6) and sure.uncertain_mm2 == 0
    assert usefulness(doubts)[1] == pytest.approx((1 - 0.04 / 0.74 + 0.04 / 0.74 + 1) / 3)
    assert [doubts[n].slide_id for n in order(doubts, "usefulness")] == ["unsure", "at_odds", "sure", "healthy"]
    assert [doubts[n].slide_id for n in order(doubts, "disagreement")][:2] == ["at_odds", "unsure"]
    alone = Doubt.of("a", lesion_map(0.8), None, [], **given)
    assert (alone.score, alone.peak, alone.disagreement) == (pytest.approx(0.8), 0, pytest.approx(0.06 / 0.26))
    assert usefulness([]).shape == (0,)


@pytest.mark.parametrize("form, suffix", [("geojson", ".geojson"), ("asap", ".xml")])
def test_there_and_back_through_a_corrected_file(root, form, suffix):
    outcome = propose(root, form, format=form)
    assert outcome.status == 0, outcome.err
    assert "1 slides of" in outcome.out and "no proposal: blurred: blurred: out of focus" in outcome.out
    index = rows_of(root / form / "index.csv")
    assert [row["slide_id"] for row in index] == ["unsure", "at_odds", "sure", "healthy"]
    assert [int(row["outlines"]) for row in index] == [1, 1, 1, 0] and index[0]["corrected"] == "0"
    cohort = root / form / "cohort.csv"
    records = {record.slide_id: record for record in read_cohort(cohort).records}
    assert records["annotated"].annotation == root / "own.xml" and records["blurred"].annotation is None
    file = root / form / "annotations" / f"sure{suffix}"
    assert records["sure"].annotation == file
    correct(file)
    again = propose(root, form, format=form)
    assert "1 of them corrected before" in again.out
    refined = refine(root / form, cohort)
    assert "3 of 5 annotations are proposals that nobody changed" in refined.out, refined
    table = {row["slide_id"]: row for row in rows_of(root / form / "workdir" / "refine.csv")}
    check_refined(table, read_mask(root / form / "workdir" / "masks" / "sure.tiff"))
    assert rows_of(cohort)[0]["site"] == "A"


def correct(file):
    """What a pathologist does: moves the right border of the outline by 40 px, over the glass, and takes the hole out."""
    (shape,) = read_annotation(file)
    assert len(shape.holes) == 1
    moved = shape.exterior.copy()
    moved[moved[:, 0] > 200, 0] += 200
    if file.suffix == ".xml":
        write_asap_xml(file, [Shape("polygon", moved, name="mine", group="lesion")])
    else:
        content = json.loads(file.read_text())
        assert content["features"][0]["properties"]["isLocked"] is False
        assert content["features"][0]["properties"]["measurements"]["confidence"] == pytest.approx(0.95)
        content["features"][0]["geometry"]["coordinates"] = [[*moved.tolist(), moved[0].tolist()]]
        file.write_text(json.dumps(content))


def refine(folder, cohort):
    """The stage of experiments.gastric_screening that takes corrected files back in."""
    settings = {"stage": "refine", "model": "tiny", "tile": 64, "threads": 1}
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    with programs.imported("gastric_screening") as module:
        outcome = programs.start(module, cohort=cohort, workdir=folder / "workdir", **settings)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return outcome


def check_refined(table, mask):
    """Proposed: 160 px square without 40; corrected: 360 wide, of which the glass from 384 on is cut off."""
    proposed, corrected = 160**2 - 40**2, 360 * 160
    row = table["sure"]
    assert float(row["proposed_mm2"]) == pytest.approx(proposed * 1e-6, rel=0.01)
    assert float(row["outlined_mm2"]) == pytest.approx(corrected * 1e-6, rel=0.01)
    assert float(row["dice_with_proposal"]) == pytest.approx(2 * proposed / (proposed + corrected), rel=0.01)
    assert float(row["kept_mm2"]) == pytest.approx(304 * 160 * 1e-6, rel=0.02)
    assert mask[41:119, 41:191].mean() > 0.98 and not mask[:, 193:].any() and not mask[121:].any()
    assert float(table["unsure"]["dice_with_proposal"]) == 1  # nobody changed it
    assert table["annotated"]["proposed_mm2"] == "" and float(table["healthy"]["outlined_mm2"]) == 0


def test_a_corrected_file_is_never_written_over(root, tmp_path):
    folder = ProposalFolder(tmp_path, "geojson")
    regions = find_outlines(lesion_map(0.8), RULE)
    file = folder.write("a", regions, offset=(0, 0))
    assert folder.corrected("a") is None and file.read_bytes() == (tmp_path / "proposals" / file.name).read_bytes()
    other = ProposalFolder(tmp_path, "asap")
    xml = other.write("a", regions, offset=(0, 0))
    assert not file.exists() and xml.suffix == ".xml"
    xml.write_text(xml.read_text() + "\n")
    assert folder.corrected("a") == xml
    with pytest.raises(FileExistsError):
        folder.write("a", regions, offset=(0, 0))


def test_qupath_counts_from_the_bounds_there_and_back(tmp_path):
    regions = find_outlines(lesion_map(0.8), RULE)
    file = ProposalFolder(tmp_path, "geojson").write("a", regions, offset=(30, 50))
    bounds = (30, 50, 400, 400)
    (back,) = read_annotation(file, offset=file_offset(file, bounds))
    assert (drawn([back]) == drawn([regions[0].shape])).all()
    assert read_annotation(file)[0].bounds[:2] == (50, 30) and file_offset("a.xml", bounds) == (0, 0)


def test_maps_of_other_models_serve_without_a_cohort(root, tmp_path):
    predictions = write_predictions(tmp_path / "other", stem="probability", unit="probability")
    outcome = propose(
        root, "other", predictions=predictions, cohort=None, order="nearness", slide_threshold=0.5, label="tumour"
    )
    assert outcome.status == 0 and not (root / "other" / "cohort.csv").exists(), outcome.err
    index = rows_of(root / "other" / "index.csv")
    assert [float(row["nearness"]) for row in index] == sorted((float(row["nearness"]) for row in index), reverse=True)
    assert {shape.group for shape in read_annotation(root / "other" / "annotations" / "sure.geojson")} == {"tumour"}


def test_what_does_not_fit_is_one_line(root, tmp_path):
    anomaly = write_predictions(tmp_path / "anomaly", stem="anomaly", unit="anomaly score")
    for changes, words in (
        ({"predictions": root}, "slides.csv is missing"),
        ({"predictions": anomaly}, "holds no lesion.npz and no probability.npz"),
        ({"predictions": anomaly, "map": "anomaly"}, "is a map of anomaly score"),
        ({"uncertain": "0.7,0.2"}, "give two probabilities such as 0.25,0.75"),
        ({"label": "Exclusion"}, "give another"),
    ):
        assert words in programs.one_line(propose(root, "refused", **changes))
