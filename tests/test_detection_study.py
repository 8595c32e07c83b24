"""The study of cell detection: which runs it makes of which images, and its tables of what they leave."""

import csv
import json
import pathlib

import numpy as np
import pytest
from PIL import Image

from data_pipelines.boxes import Boxes, read_box_folder, write_boxes
from data_pipelines.cell_images import read_cell_images, read_groups
from experiments.run.cells.study_data import mask_boxes, read_truth
from tests import programs
from tests.programs import one_line

ROUNDS = ("00_boxes", "01_self", "02_extra")


@pytest.fixture
def images(tmp_path):
    """Eight images with masks of instances: squares of 10 pixels, one of them a crumb."""
    for number in range(8):
        mask = np.zeros((40, 50), np.uint8)
        for place, (x, y) in enumerate([(2, 2), (20, 4), (36, 20), (5, 25)], start=1):
            mask[y : y + 10, x : x + 10] = place
        mask[38:, 48:] = 9
        folder = tmp_path / "glas"
        folder.mkdir(exist_ok=True)
        Image.fromarray(np.full((40, 50, 3), 200, np.uint8)).save(folder / f"train_{number}.png")
        Image.fromarray(mask).save(folder / f"train_{number}_anno.png")
    return tmp_path


def save(folder, found):
    folder.mkdir(parents=True, exist_ok=True)
    for name, boxes in found.items():
        given = Boxes(np.asarray(boxes, float).reshape(-1, 4), np.linspace(0.9, 0.5, len(boxes)))
        write_boxes(folder / f"{name}.xml", given, image=name, width=50, height=40)


def trained(calls):
    """In the place of a training: what it was asked for, and detections that find two of four cells, then three, and a false one."""

    def command(module, **values):
        calls.append((module, values))
        workdir = pathlib.Path(values["workdir"])
        groups = read_groups(values["groups"])
        truth = {name: boxes for name, (_, boxes) in read_truth(workdir.parents[3] / "glas").items()}
        for number, name in enumerate(ROUNDS):
            folder = workdir / "rounds" / name
            (folder / "0_net").mkdir(parents=True)
            kinds = {
                split: [n for n, group in groups.items() if group["split"] == split] for split in ("train", "test")
            }
            if number:
                count = 1 + number
                save(
                    folder / "0_net",
                    {n: [*truth[n][:count], (45, 1, 49, 5)] for n in kinds["train"]} if number < 2 else {},
                )
                save(folder / "0_net_held_out", {n: truth[n][:count] for n in kinds["test"]})
                numbers = {"step": 1, "instance recall": {"value": count / 4, "low": 0, "high": 1}}
                (folder / "0_net_held_out.json").write_text(json.dumps(numbers))
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "0_net.json").write_text(json.dumps({"iou": number / 4 or None}))
        (workdir / "metrics.json").write_text("{}")

    return command


def test_withheld_boxes_are_recovered_by_round(images, monkeypatch):
    calls: list = []
    with programs.imported("detection_study") as module:
        monkeypatch.setattr(module, "command", trained(calls))
        given = {"glas": images / "glas", "workdir": images / "study", "seeds": 2}
        outcome = programs.start(module, **given)
        assert outcome.status == 0, outcome.err
        again = programs.start(module, **given)
    assert again.status == 0 and len(calls) == 4  # two trainings by two seeds, and none a second time
    assert {(values["training"], values["seed"]) for _, values in calls} == {
        (t, s) for t in ("self_extra", "cooperative") for s in range(2)
    }
    found = read_cell_images(calls[0][1]["data"])
    assert len(found.images) == 6 and len(list((images / "study" / "glas" / "seed0" / "unlabelled").iterdir())) == 2
    split = {name: group["split"] for name, group in read_groups(calls[0][1]["groups"]).items()}
    assert all(len(image.boxes) == (4 if split[image.name] == "test" else 2) for image in found.images)
    with open(images / "study" / "rounds.csv", newline="") as file:
        rows = {
            row["round"]: row for row in csv.DictReader(file) if row["seed"] == "0" and "self_extra" in row["model"]
        }
    assert float(rows["01_self"]["precision on training images"]) == pytest.approx(2 / 3)
    truth = {name: boxes for name, (_, boxes) in read_truth(images / "glas").items()}
    shown = read_box_folder(calls[0][1]["data"] / "sig-train-pos")
    hidden = [
        [(box == kept).all(axis=1).any() for box in truth[name]] for name, kept in ((n, shown[n].box) for n in shown)
    ]
    first_two = [not known for name, flags in zip(shown, hidden) if split[name] == "train" for known in flags[:2]]
    assert float(rows["01_self"]["withheld boxes recovered"]) == pytest.approx(sum(first_two) / 8)
    assert float(rows["02_extra"]["held-out recall"]) == 0.75 and float(rows["02_extra"]["held-out precision"]) == 1
    table = (images / "study" / "table.md").read_text()
    assert "| glas | self_extra, 0_net | 01_self | 2 | 0.500 (0.500 to 0.500) |" in table


def test_digestpath_holds_out_each_crop_and_scores_the_third_party(shared_data, tmp_path, monkeypatch):
    calls: list = []

    def command(module, **values):
        calls.append(values)
        pathlib.Path(values["workdir"]).mkdir(parents=True)
        (pathlib.Path(values["workdir"]) / "metrics.json").write_text("{}")

    with programs.imported("detection_study") as module:
        monkeypatch.setattr(module, "command", command)
        root = shared_data / "patches" / "digestpath_signet_ring"
        outcome = programs.start(module, digestpath=root, workdir=tmp_path, seeds=1)
    assert outcome.status == 0, outcome.err
    images = read_cell_images(calls[0]["data"]).images
    assert len(calls) == 6 and len(images) == 5
    assert {image.width for image in images if image.kind == "normal"} == {1000}
    tested = [{n for n, g in read_groups(values["groups"]).items() if g["split"] == "test"} for values in calls]
    assert all(
        len(names) == 2 and any(n.startswith("18-36771A") and n.endswith("-right") for n in names) for names in tested
    )
    assert len(set.union(*tested)) == 4 and len(list((tmp_path / "digestpath" / "unlabelled").iterdir())) == 2
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["rows"][0]["model"] == "predicted_yolov3"
    assert summary["rows"][0]["instance recall"][0] == pytest.approx(147 / 154)
    assert summary["rows"][0]["false positives per normal image"][0] == 0


def test_masks_of_one_value_are_parts(tmp_path):
    mask = np.zeros((9, 9, 2), np.uint8)
    mask[1:3, 1:4, 0] = mask[5:8, 5:9, 0] = 255
    Image.fromarray(mask, mode="LA").save(tmp_path / "m.png")
    np.testing.assert_array_equal(mask_boxes(tmp_path / "m.png"), [[1, 1, 4, 3], [5, 5, 9, 8]])


def test_what_cannot_be_studied_is_refused(images):
    with programs.imported("detection_study") as module:
        assert "give one or more" in one_line(programs.start(module, workdir=images / "x"))
        few = images / "few"
        few.mkdir()
        for name in ("train_0.png", "train_0_anno.png"):
            (few / name).write_bytes((images / "glas" / name).read_bytes())
        outcome = programs.start(module, glas=few, workdir=images / "x")
        assert "holds 1 images: three are needed" in one_line(outcome)
        assert "--epochs takes four" in one_line(programs.start(module, glas=few, workdir=images / "x", epochs="1,2"))
