"""predict_slides over several starts: what is kept, what is done again and why, policies for errors, shards; in one process."""

import csv
import json
import os
import re

import jax
import pytest

from data_pipelines.exports import read_map
from data_pipelines.slides import Slide
from data_pipelines.tiles import Grid
from experiments.run.slide_result import TIMES
from tests import programs
from tests.programs import one_line, tissue
from tests.tiff_files import overwrite, tile_bytes, write_tiff

GRID = Grid(tile=32, stride=16, mpp=1.0)


@pytest.fixture(scope="module")
def predicting(tmp_path_factory):
    """The program; what it compiles is kept between its starts."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    with programs.imported("predict_slides") as module:
        yield module
    jax.config.update("jax_compilation_cache_dir", None)


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A model; slides a and b that say their scale, c that does not."""
    root = tmp_path_factory.mktemp("template")
    for n, name in enumerate("abc"):
        write_tiff(root / f"{name}.tiff", tissue(seed=n), mpp=None if name == "c" else 0.5)
    table(root, {"a": "srcc", "b": "normal", "c": "normal"})
    programs.save_model(root / "model", grid=GRID)
    programs.save_model(root / "other", grid=GRID, seed=1)
    return root


def table(root, labels):
    lines = [f"{name},{root / name}.tiff,{label},p{name}" for name, label in labels.items()]
    (root / "cohort.csv").write_text("\n".join(["slide_id,path,label,patient_id", *lines]) + "\n")


@pytest.fixture
def predict(predicting, template, tmp_path):
    """predict(name=value): a start with these flags over the three slides; they are not to be changed."""

    def start(**values):
        defaults = {"workdir": template / "model", "slides": template / "cohort.csv", "out": tmp_path / "out"}
        return programs.start(predicting, **{**defaults, "mpp_override": 0.5, "formats": "png,npz,csv", **values})

    return start


def rows_of(out, *, without=TIMES):
    with open(out / "slides.csv", newline="", encoding="utf-8") as file:
        return [{name: cell for name, cell in row.items() if name not in without} for row in csv.DictReader(file)]


def files_of(folder):
    """Path below `folder` -> bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def made(out):
    """slide -> when its files were made."""
    return {folder.name: folder.stat().st_ino for folder in (out / "slides").iterdir()}


def redone(before, after):
    return {name for name in after if before.get(name) != after[name]}


def open_files(ending):
    """Files with this ending that this process holds open, where the system tells."""
    names = (
        [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
        if os.path.exists("/proc")
        else []
    )
    return [name for name in names if name.endswith(ending)]


def now(outcome):
    """How many slides and tiles this start did, by its last lines."""
    slides, tiles = re.search(r"slides done \((\d+) of them now\), (\d+) tiles in", outcome.out).groups()
    return int(slides), int(tiles)


# Starts after the first


def test_what_is_finished_is_not_done_again(predict, tmp_path):
    first = predict()
    assert first.status == 0 and now(first)[0] == 3 and now(first)[1] > 50
    assert not open_files(".tiff")
    before, inodes = files_of(tmp_path / "out" / "slides"), made(tmp_path / "out")
    second = predict()
    assert second.status == 0 and now(second) == (0, 0)
    assert made(tmp_path / "out") == inodes and files_of(tmp_path / "out" / "slides") == before


def test_another_model_or_stride_does_every_slide_again_and_says_so(predict, template, tmp_path):
    first = predict(stride=32)
    again = predict(stride=16)
    assert "is done again, because of another stride (32, now 16)" in again.out and again.out.count("done again") == 1
    assert now(again)[0] == 3 and now(again)[1] > now(first)[1]
    other = predict(stride=16, workdir=template / "other")
    assert "because of another model (" in other.out and now(other) == now(again)
    fresh = predict(stride=16, workdir=template / "other", out=tmp_path / "fresh")
    assert "again" not in fresh.out
    assert files_of(tmp_path / "fresh" / "slides") == files_of(tmp_path / "out" / "slides")


def test_other_files_are_written_from_kept_scores(predict, tmp_path):
    predict()
    before, inodes = files_of(tmp_path / "out" / "slides"), made(tmp_path / "out")
    less = predict(gradcam="false", formats="npz,csv")
    assert "Grad-CAM (True, now False), formats (png,npz,csv, now npz,csv)" in less.out and now(less) == (3, 0)
    names = {"tiles.csv", "slide.json", "probability.npz"}
    assert (
        set(files_of(tmp_path / "out" / "slides" / "a")) == names and len(redone(inodes, made(tmp_path / "out"))) == 3
    )
    assert now(predict()) == (3, 0) and files_of(tmp_path / "out" / "slides") == before


def test_grad_cam_that_was_never_made_needs_the_model(predict, tmp_path):
    without = predict(gradcam="false")
    probabilities = [row["probability"] for row in rows_of(tmp_path / "out")]
    outcome = predict()
    assert "Grad-CAM (False, now True)" in outcome.out and now(outcome) == now(without)
    assert [float(row["probability"]) for row in rows_of(tmp_path / "out")] == pytest.approx(
        [float(value) for value in probabilities], abs=1e-6
    )
    assert read_map(tmp_path / "out" / "slides" / "a" / "gradcam.npz").unit == "Grad-CAM"


def test_only_slides_without_a_scale_rest_on_the_override(predict, tmp_path):
    predict()
    inodes = made(tmp_path / "out")
    outcome = predict(mpp_override=0.6)
    assert redone(inodes, made(tmp_path / "out")) == {"c"} and "mpp (0.5, now 0.6)" in outcome.out


def test_labels_and_the_seed_change_the_summary_alone(predict, template, tmp_path):
    def summary():
        return json.loads((tmp_path / "out" / "summary.json").read_text())["metrics"]["ROC AUC"]["slide"]

    predict()
    inodes, before = made(tmp_path / "out"), summary()
    try:
        table(template, {"a": "normal", "b": "srcc", "c": "srcc"})
        assert now(predict(seed=1)) == (0, 0)
    finally:
        table(template, {"a": "srcc", "b": "normal", "c": "normal"})
    assert made(tmp_path / "out") == inodes and summary()["value"] == pytest.approx(1 - before["value"])


def test_a_slide_that_changes_is_done_again_and_one_that_is_archived_is_kept(predicting, template, tmp_path):
    for n, name in enumerate("ab"):
        write_tiff(tmp_path / f"{name}.tiff", tissue(seed=n), mpp=0.5)
    values = {
        "workdir": template / "model",
        "slides": tmp_path / "cohort.csv",
        "out": tmp_path / "out",
        "formats": "csv",
    }
    table(tmp_path, {"a": "srcc", "b": "normal"})
    programs.start(predicting, **values)
    inodes = made(tmp_path / "out")
    write_tiff(tmp_path / "a.tiff", tissue(seed=5), mpp=0.5)
    (tmp_path / "b.tiff").unlink()
    outcome = programs.start(predicting, **values)
    assert outcome.status == 0 and "a, and every slide" in outcome.out and "another slide file" in outcome.out
    assert redone(inodes, made(tmp_path / "out")) == {"a"}


def test_a_failed_slide_is_tried_again_by_the_next_start(predicting, template, tmp_path):
    (tmp_path / "a.tiff").write_bytes(b"II*\0")
    values = {"workdir": template / "model", "slides": tmp_path / "a.tiff", "out": tmp_path / "out", "formats": "csv"}
    assert programs.start(predicting, **values).status == 1
    assert not (tmp_path / "out" / "slides").exists()
    write_tiff(tmp_path / "a.tiff", tissue(), mpp=0.5)
    assert programs.start(predicting, **values).status == 0
    assert [row["status"] for row in rows_of(tmp_path / "out")] == ["done"]


# Shards


def test_shards_divide_the_cohort_and_the_last_makes_the_table(predict, tmp_path):
    predict(out=tmp_path / "whole")
    first = predict(shard="1/2")
    assert first.status == 0 and sorted(made(tmp_path / "out")) == ["a", "c"]
    assert "1 slides of other shards are not finished" in first.out and not (tmp_path / "out" / "slides.csv").exists()
    early = predict(summary_only="true")
    assert [row["status"] for row in rows_of(tmp_path / "out")] == ["done", "unfinished", "done"] and early.status == 1
    assert "unfinished: b: not predicted yet" in early.err
    assert predict(shard="2/2").status == 0
    assert rows_of(tmp_path / "out") == rows_of(tmp_path / "whole")
    assert files_of(tmp_path / "out" / "slides") == files_of(tmp_path / "whole" / "slides")


@pytest.mark.parametrize("shard", ["0/2", "3/2", "2", "a/b", "-1/2"])
def test_a_shard_that_is_none_is_refused(predict, shard):
    assert f"--shard={shard}: give <i>/<n> with i from 1 to n" in one_line(predict(shard=shard))


def test_formats_and_thresholds_that_are_none_are_refused(predict):
    assert "--formats=png,bmp: 'bmp' is none of png, npz, csv, " in one_line(predict(formats="png,bmp"))
    assert "--thresholds=0.5,2: give probabilities between 0 and 1" in one_line(predict(thresholds="0.5,2"))
    assert "--thresholds=a: give probabilities" in one_line(predict(thresholds="a"))


# Policies


@pytest.fixture
def damaged(template, tmp_path):
    """Slides a, sound, and b, of which four tiles cannot be decoded."""
    (tmp_path / "slides").mkdir()
    write_tiff(tmp_path / "slides" / "a.tiff", tissue(), mpp=1.0)
    path = write_tiff(tmp_path / "slides" / "b.tiff", tissue(512), mpp=1.0, levels=5, compression="jpeg")
    position, length = tile_bytes(path)[27]
    overwrite(path, position, bytes(length))
    return {
        "workdir": template / "model",
        "slides": tmp_path / "slides",
        "out": tmp_path / "out",
        "stride": 32,
        "formats": "npz",
    }


@pytest.mark.parametrize("policy, status", [("skip", 1), ("mask", 0), ("stop", 2)])
def test_regions_that_cannot_be_decoded(predicting, damaged, tmp_path, policy, status):
    outcome = programs.start(predicting, **damaged, on_error=policy)
    assert outcome.status == status
    if policy == "stop":
        assert "b.tiff: region at " in one_line(outcome) and outcome.err.endswith("(--on_error=stop)\n")
        outcome = programs.start(predicting, **damaged)
    rows = {row["slide_id"]: row for row in rows_of(tmp_path / "out")}
    assert [rows[name]["status"] for name in "ab"] == ["done", "done"] and rows["b"]["unreadable"] == "4"
    assert "incomplete: b: " in outcome.err and "; 4 of 144 tiles could not be read: " in outcome.err
    assert int(read_map(tmp_path / "out" / "slides" / "b" / "probability.npz").missing.sum()) == 4


def test_stop_ends_at_a_slide_that_cannot_be_opened_and_can_be_gone_on_with(predicting, damaged, tmp_path):
    (tmp_path / "slides" / "0.svs").write_bytes(b"")
    assert "0: " in one_line(programs.start(predicting, **damaged, on_error="stop"))
    outcome = programs.start(predicting, **damaged)
    assert outcome.status == 1 and "failed: 0: " in outcome.err and "2 of 3 slides done" in outcome.out


def test_an_error_that_no_reader_announces_costs_the_slide_and_leaves_its_traceback(predict, tmp_path, monkeypatch):
    def surprise(slide, mpp):
        if slide.path.stem == "b":
            raise MemoryError("cannot allocate 1 TiB")
        return thumbnail(slide, mpp)

    thumbnail = Slide.thumbnail
    monkeypatch.setattr(Slide, "thumbnail", surprise)
    outcome = predict()
    rows = {row["slide_id"]: row for row in rows_of(tmp_path / "out")}
    assert outcome.status == 1 and "2 of 3 slides done" in outcome.out
    assert rows["b"]["reason"].endswith("b.tiff: MemoryError: cannot allocate 1 TiB")
    assert rows["b"]["traceback"] == "errors/b.txt" and not rows["a"]["traceback"]
    assert "MemoryError" in (tmp_path / "out" / "errors" / "b.txt").read_text().splitlines()[-1]
    assert "(traceback: errors/b.txt)" in outcome.err
    monkeypatch.undo()
    assert predict().status == 0 and not os.listdir(tmp_path / "out" / "errors")


def test_an_error_in_one_region_costs_the_region(predict, tmp_path, monkeypatch):
    def surprise(slide, x, y, width, height, mpp):
        if slide.path.stem == "b" and x <= 128 < x + 2 * width and y <= 128 < y + 2 * height:
            raise KeyError("no such table")
        return read(slide, x, y, width, height, mpp)

    read = Slide.read
    monkeypatch.setattr(Slide, "read", surprise)
    outcome = predict()
    rows = {row["slide_id"]: row for row in rows_of(tmp_path / "out")}
    assert outcome.status == 1 and 0 < int(rows["b"]["unreadable"]) < int(rows["b"]["tiles"])
    assert "KeyError: 'no such table'" in rows["b"]["reason"] and rows["b"]["traceback"] == "errors/b.txt"
