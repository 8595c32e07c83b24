"""evaluate_detection: a third party's detections of real cells, and what is refused or taken for granted."""

import csv
import json
import shutil

import pytest

from data_pipelines.boxes import BoxesError, read_box_folder, read_box_table
from tests import programs
from tests.programs import one_line

BOX = "<bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox>"
VOC = "<annotation><object><name>cell</name>{}" + BOX + "</object></annotation>"


@pytest.fixture(scope="module")
def evaluating():
    with programs.imported("evaluate_detection") as module:
        yield module


@pytest.fixture
def small(tmp_path):
    """One annotated image with one box, two normal ones, and a table of detections."""
    (tmp_path / "truth").mkdir()
    (tmp_path / "truth" / "with space.xml").write_text(VOC.format("", 10, 10, 50, 50))
    (tmp_path / "normal.txt").write_text("n1.jpeg\nn2.jpeg\n")
    lines = ["image,x1,y1,x2,y2,score", "img/with space.jpeg,12,12,50,50,0.8", "n1.jpeg,0,0,9,9,0.9", "n2.jpeg,,,,,"]
    (tmp_path / "found.csv").write_text("\n".join(lines))
    return tmp_path


def evaluate(module, root, **values):
    given = {
        "truth": root / "truth",
        "detections": root / "found.csv",
        "normal": root / "normal.txt",
        "out": root / "out",
    }
    return programs.start(module, **{**given, **values})


def test_yolov3_on_digestpath(evaluating, shared_data, tmp_path):
    root = shared_data / "patches" / "digestpath_signet_ring"
    outcome = programs.start(evaluating, truth=root / "gt", detections=root / "predicted_yolov3", out=tmp_path)
    assert outcome.status == 0, outcome.err
    expected = json.loads((shared_data / "reference" / "digestpath_yolov3_greedy_match_counts.json").read_text())
    with open(tmp_path / "images.csv", newline="") as file:
        rows = {f"{row['image']}.xml": row for row in csv.DictReader(file)}
    for name, counts in expected.items():
        found = {"gt": rows[name]["annotated"], "pred": rows[name]["detected"], "tp": rows[name]["matched"]}
        assert found == {key: str(counts["iou0.3"][key]) for key in found}
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["instance recall"]["value"] == pytest.approx(147 / 154)
    assert "not scored" in outcome.out  # a fourth file of detections has no annotation


def test_numbers_with_normal_images(evaluating, small):
    outcome = evaluate(evaluating, small, challenge=True)
    assert outcome.status == 0, outcome.err
    metrics = json.loads((small / "out" / "metrics.json").read_text())
    assert metrics["instance recall"]["value"] == 1
    assert metrics["false positives per normal image"]["value"] == 0.5
    assert metrics["100 - false positives"]["value"] == 99.5
    assert metrics["FROC (mean recall)"]["value"] == 1  # at one per image, two are allowed, and there is one
    assert (small / "out" / "report.html").exists()


def test_what_was_not_detected_is_said(evaluating, small):
    (small / "found.csv").write_text("image,x1,y1,x2,y2,score\nwith space,12,12,50,50,0.8\nother,1,1,2,2,0.5\n")
    outcome = evaluate(evaluating, small)
    assert outcome.status == 0
    assert "no detections are given for n1, n2: taken as none found" in outcome.out
    assert "detections in other are not scored" in outcome.out


def test_what_cannot_be_scored_is_refused(evaluating, small):
    (small / "normal.txt").write_text("with space.jpeg\n")
    assert "only one" in one_line(evaluate(evaluating, small))
    (small / "normal.txt").write_text("n1\n")
    (small / "found.csv").write_text("image,x1,y1,x2,y2,score\nx,1,1,2,2,1\n")
    assert "no image of --truth" in one_line(evaluate(evaluating, small))
    shutil.rmtree(small / "truth")
    (small / "truth").mkdir()
    (small / "truth" / "e.xml").write_text("<annotation></annotation>")
    assert "no annotated box" in one_line(evaluate(evaluating, small))


def test_names_with_two_endings_and_corners_in_any_order(evaluating, small):
    """case1.svs.xml, as some programs call it, is of case1; a table whose corners are the other way round holds the same boxes."""
    (small / "truth" / "case1.svs.xml").write_text(VOC.format("", 10, 10, 50, 50))
    lines = ["image,x1,y1,x2,y2,score", "case1,50,50,12,12,0.8", "with space,50,12,12,50,0.8"]
    (small / "found.csv").write_text("\n".join(lines))
    outcome = evaluate(evaluating, small)
    assert outcome.status == 0, outcome.err
    assert json.loads((small / "out" / "metrics.json").read_text())["instance recall"]["value"] == 1
    assert read_box_table(small / "found.csv")["case1"].box.tolist() == [[12, 12, 50, 50]]
    (small / "truth" / "case1.xml").write_text(VOC.format("", 10, 10, 50, 50))
    assert "two files for the image case1, case1.svs.xml and case1.xml" in one_line(evaluate(evaluating, small))


def test_groups_of_other_images_are_told(evaluating, small):
    (small / "truth" / "other.xml").write_text(VOC.format("", 10, 10, 50, 50))
    given = {"folds": 2, "fold_mode": "easy", "groups": small / "groups.csv"}
    (small / "groups.csv").write_text("image,organ\nother.png,colon\nstrange.png,colon\n")
    outcome = evaluate(evaluating, small, **given)
    assert outcome.status == 0 and "groups.csv: 1 of 2 rows are of no image: strange" in outcome.out
    (small / "groups.csv").write_text("image,organ\nstrange.png,colon\n")
    assert "groups.csv: none of its 1 rows is of an image" in one_line(evaluate(evaluating, small, **given))


def test_tables_and_folders(tmp_path):
    table = tmp_path / "t.csv"
    table.write_text("image,x1,y1,x2,y2\n")
    with pytest.raises(BoxesError, match="no column score"):
        read_box_table(table)
    table.write_text("image,x1,y1,x2,y2,confidence\na,1,2,3,nan,0.5\n")
    with pytest.raises(BoxesError, match="line 2: y2 is 'nan'"):
        read_box_table(table)
    for ending in ("xml", "json"):
        (tmp_path / f"a.{ending}").write_text("<annotation></annotation>")
    with pytest.raises(BoxesError, match=r"two files for the image a, a.json and a.xml: keep one"):
        read_box_folder(tmp_path)


def test_detections_without_scores_are_refused(evaluating, small):
    (small / "found").mkdir()
    (small / "found" / "with space.xml").write_text(VOC.format("", 12, 12, 50, 50))
    assert "have no score" in one_line(evaluate(evaluating, small, detections=small / "found"))
    (small / "found" / "with space.xml").write_text(VOC.format("<confidence>0.5</confidence>", 12, 12, 50, 50))
    assert evaluate(evaluating, small, detections=small / "found").status == 0


def test_folds_as_the_paper_averages_them(evaluating, tmp_path):
    """Six slides of two images each; every other cell is found, on the last slide both, by three programs' files together."""
    truth, lines = tmp_path / "truth", {number: ["image,x1,y1,x2,y2,score"] for number in range(3)}
    truth.mkdir()
    for number in range(12):
        name = f"s{number // 2}-lv0-{number}"
        item = "<object>" + BOX.format(10, 10, 50, 50) + "</object>"
        (truth / f"{name}.xml").write_text(
            f"<annotation>{item}<object>{BOX.format(60, 60, 90, 90)}</object></annotation>"
        )
        lines[number % 3].append(f"{name},10,10,50,50,0.8")
        if number >= 10:
            lines[number % 3].append(f"{name},60,60,90,90,0.7")
    for number, table in lines.items():
        (tmp_path / f"{number}.csv").write_text("\n".join(table))
    given = {
        "truth": truth,
        "detections": ",".join(str(tmp_path / f"{n}.csv") for n in range(3)),
        "out": tmp_path / "out",
    }
    for mode in ("easy", "hard"):
        outcome = programs.start(evaluating, folds=3, fold_mode=mode, **given)
        assert outcome.status == 0, outcome.err
        folds = json.loads((tmp_path / "out" / "metrics.json").read_text())["folds"]
        values = sorted(fold["instance recall"] for fold in folds["folds"])
        assert len(values) == 3 and folds["mean"]["instance recall"] == pytest.approx(7 / 12)
        if mode == "hard":
            assert values == pytest.approx([0.5, 0.5, 0.75])  # the last slide is whole in one of them
        assert f"mean of 3 folds ({mode}) 0.5833" in outcome.out
    assert "--folds=1 divides nothing" in one_line(programs.start(evaluating, folds=1, **given))
    assert "12 folds of 12 images from 6" in one_line(programs.start(evaluating, folds=12, **given))
    twice = {**given, "detections": f"{tmp_path / '0.csv'},{tmp_path / '0.csv'}"}
    assert "give each image's once" in one_line(programs.start(evaluating, **twice))
