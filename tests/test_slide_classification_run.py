"""The commands that a user runs, as real processes: trained, killed, continued, predicted; and what they leave."""

import csv
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from data_pipelines.cohort import read_cohort
from data_pipelines.synthetic import drawn_cohort
from data_pipelines.tiles import Tiles
from experiments.run.workdir import Workdir
from srcc_jax.metrics import roc_auc
from tests import programs

ROOT = pathlib.Path(__file__).resolve().parents[1]
STEPS, EPOCH, ROUNDS = (
    72,
    12,
    18,
)  # of each stage: 6 epochs of 3 positive and 3 negative slides, 32 tiles of each, 16 in a batch
# FS and WS have equal numbers, so that both compile to the same step and the second finds it in the cache.
SETTINGS = {
    "mode": "fs_ws", "backbone": "tiny", "mpp": 1.0, "tile": 32, "stride": 32, "tiles_per_slide": 32, "top_k": 32,
    "buffer": 64, "batch": 16, "learning_rate": 3e-3, "frozen_epochs": 0, "bn_momentum": 0.9, "max_epochs": 6,
}  # fmt: skip


class Runs:
    """Starts programs over one drawn cohort; they share compiled programs."""

    def __init__(self, folder):
        self.folder = folder
        slides = {"train": (3, 3), "validation": (1, 1), "test": (1, 1)}
        self.cohort = drawn_cohort(folder / "cohort", slides=slides, side_px=800, mpp=1.0, seed=1, workers=2)

    def training(self, name, **changes):
        """Flags of slide_classification in the work directory `name`."""
        return {"cohort": self.cohort, "workdir": self.folder / name, **SETTINGS, **changes}

    def start(self, module, *, environment=None, **values):
        line = [sys.executable, "-m", f"experiments.{module}", *(f"--{name}={value}" for name, value in values.items())]
        line.append(f"--compilation_cache={self.folder / 'compiled'}")
        environment = {**os.environ, **(environment or {})}
        return subprocess.Popen(
            line, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def train_until(self, name, reached, number):
        """Starts the training `name` and sends it the signal as soon as `reached()`; returns its status and output."""
        process = self.start("slide_classification", **self.training(name))
        while process.poll() is None and not reached():
            time.sleep(0.002)
        process.send_signal(number)
        out, err = process.communicate(timeout=300)
        return process.returncode, out, err


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def whole(runs):
    """The work directory of a run that nobody disturbed, and what it printed."""
    process = runs.start("slide_classification", environment={"JAX_LOG_COMPILES": "1"}, **runs.training("whole"))
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err[-3000:]
    return runs.folder / "whole", out, err


def logged(workdir, stage):
    """Lines of the log about a stage."""
    file = workdir / "metrics.jsonl"
    return file.read_text().count(f'"stage": "{stage}"') if file.exists() else 0


def without_time(rows):
    return [{name: value for name, value in row.items() if name != "time"} for row in rows]


def test_a_run_leaves_a_finished_model_and_its_history(whole):
    workdir, out, _ = whole
    assert out.splitlines()[-1].startswith("finished: FS+WS w/o TL 1 µm/px, step ")
    card = json.loads((workdir / "model.json").read_text())
    assert card["grid"] == {"tile": 32, "stride": 32, "mpp": 1.0, "flush": False} and card["positive"] == "srcc"
    assert card["about"]["settings"]["cohort"] and card["about"]["settings"]["dtype"] == "float32"
    for stage in ("fs", "ws"):
        rows = Workdir(workdir).history(stage)
        assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
        assert [row["step"] for row in rows if "validation_loss" in row] == list(range(EPOCH, STEPS + 1, EPOCH))
    best = min((row["validation_loss"], row["step"]) for row in rows if "validation_loss" in row)
    assert (card["about"]["validation_loss"], card["about"]["step"]) == best


def test_rounds_run_on_steps_that_are_compiled_once(whole):
    """Eighteen rounds of selection and training: one scan, and one step for each stage."""
    _, _, err = whole
    assert err.count("Compiling jit(all_devices)") == 1 and err.count("Compiling jit(step_fn)") == 2


def test_rounds_choose_annotated_tiles_of_positives(whole, runs):
    workdir, _, _ = whole
    files = sorted((workdir / "ws" / "rounds").iterdir())
    assert len(files) == ROUNDS
    annotated = {path.stem: Tiles.load(path) for path in (workdir / "tiles").glob("train_*.npz")}
    for file in files:
        with open(file, newline="") as table:
            rows = list(csv.DictReader(table))
        by_slide = {}
        for row in rows:
            by_slide.setdefault(row["slide_id"], []).append(float(row["probability"]))
            tiles = annotated[row["slide_id"]]
            here = (tiles.x == float(row["x"])) & (tiles.y == float(row["y"]))
            assert here.sum() == 1 and row["label"] == str(int("srcc" in row["slide_id"]))
            assert row["label"] == "0" or tiles.annotated[here] > 0
        assert {slide.split("_")[1] for slide in by_slide} == {"srcc", "normal"}
        assert all(len(p) <= 32 and p == sorted(p, reverse=True) for p in by_slide.values())


def test_a_run_killed_three_times_ends_bit_for_bit_as_one_that_was_not(whole, runs):
    """SIGKILL at a random moment of FS and of WS, SIGTERM later in WS; each time the same command goes on."""
    workdir = runs.folder / "killed"
    lines, number, more = random.randint(8, 70), random.randint(1, 5), random.randint(8, 40)
    moments = f"killed after {lines} lines of fs, in round {number} of ws, terminated {more} lines later"

    status, _, err = runs.train_until("killed", lambda: logged(workdir, "fs") >= lines, signal.SIGKILL)
    assert status == -signal.SIGKILL and not (workdir / "ws").exists(), f"{moments}: {err[:3000]}"
    round_file = workdir / "ws" / "rounds" / f"{number:05d}.csv"
    status, _, err = runs.train_until("killed", round_file.exists, signal.SIGKILL)
    assert status == -signal.SIGKILL and not (workdir / "model.json").exists(), f"{moments}: {err[:3000]}"
    before = logged(workdir, "ws")
    status, _, err = runs.train_until("killed", lambda: logged(workdir, "ws") >= before + more, signal.SIGTERM)
    assert status == 130 and not (workdir / "model.json").exists(), f"{moments}: {err[:3000]}"
    assert "SIGTERM: finishing this step, then saving a checkpoint" in err
    assert "the checkpoint is written: the same command continues" in err and "Traceback" not in err

    process = runs.start("slide_classification", **runs.training("killed"))
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, f"{moments}: {err[:3000]}"
    for stage in ("fs", "ws"):
        histories = [Workdir(folder).history(stage) for folder in (workdir, whole[0])]
        assert without_time(histories[0]) == without_time(histories[1]), moments
    for file in ("weights.npz", *(f"ws/rounds/{n:05d}.csv" for n in range(ROUNDS))):
        assert (workdir / file).read_bytes() == (whole[0] / file).read_bytes(), f"{moments}: {file} differs"


def test_the_same_command_after_the_end_trains_nothing_more(whole, runs, tmp_path):
    """Also what happens where a run was killed between its last step and its model."""
    copy = shutil.copytree(whole[0], tmp_path / "copy")
    for file in ("weights.npz", "model.json"):
        (copy / file).unlink()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    with programs.imported("slide_classification") as module:
        outcome = programs.start(module, **runs.training("", workdir=copy))
    for number, handler in handlers.items():
        signal.signal(number, handler)
    assert outcome.status == 0, outcome.err
    for file in ("weights.npz", "metrics.jsonl"):
        assert (copy / file).read_bytes() == (whole[0] / file).read_bytes()
    assert len(list((copy / "ws" / "rounds").iterdir())) == ROUNDS


def test_another_configuration_is_refused_in_one_line(whole, runs, tmp_path):
    table = tmp_path / "cohort.csv"
    table.write_text(runs.cohort.read_text().replace("slides/", f"{runs.cohort.parent}/slides/"))
    table.write_text(table.read_text().replace("annotations/", f"{runs.cohort.parent}/annotations/"))
    before = (whole[0] / "settings.json").read_bytes()
    with programs.imported("slide_classification") as module:
        for change, words in (
            ({"learning_rate": 0.1}, "learning_rate: 0.003 there, 0.1"),
            ({"cohort": table}, "cohort: "),
        ):
            message = programs.one_line(programs.start(module, **runs.training("whole", **change)))
            assert words in message and "asked for" in message and "--workdir" in message
    assert (whole[0] / "settings.json").read_bytes() == before


@pytest.fixture(scope="module")
def predicted(whole, runs):
    """The whole cohort and a slide that is not there, predicted by the trained model in a process of its own."""
    table = runs.cohort.with_name("more.csv")
    table.write_text(runs.cohort.read_text() + "gone,slides/gone.tiff,srcc,PX,test,,\n")
    process = runs.start("predict_slides", workdir=whole[0], slides=table, out=runs.folder / "out")
    out, err = process.communicate(timeout=300)
    return runs.folder / "out", process.returncode, out, err


def test_prediction_ends_with_1_where_a_slide_failed(predicted):
    folder, status, out, err = predicted
    assert status == 1 and "10 of 11 slides done" in out and "failed: gone: " in err
    with open(folder / "slides.csv", newline="") as file:
        rows = {row["slide_id"]: row for row in csv.DictReader(file)}
    assert rows["gone"]["status"] == "failed" and "no such file" in rows["gone"]["reason"]
    assert sum(row["status"] == "done" for row in rows.values()) == 10
    assert list(json.loads((folder / "summary.json").read_text())["failed"]) == ["gone"]


def test_the_trained_model_beats_chance(predicted, whole, runs):
    """By slide, and by tile: annotated tiles of positive slides against all tiles of negative ones."""
    folder, _, _, _ = predicted
    auc = json.loads((folder / "summary.json").read_text())["slide_auc"]
    assert auc["value"] > 0.75
    label, score = [], []
    for record in read_cohort(runs.cohort).split("train"):
        with open(folder / "slides" / record.slide_id / "tiles.csv", newline="") as file:
            probability = np.array([float(row["probability"]) for row in csv.DictReader(file)])
        positive = record.label == "srcc"
        tiles = Tiles.load(whole[0] / "tiles" / f"{record.slide_id}.npz")
        used = tiles.annotated > 0.1 if positive else np.ones(len(tiles), bool)
        label.append(np.full(used.sum(), int(positive)))
        score.append(probability[used])
    assert roc_auc(np.concatenate(label), np.concatenate(score)) > 0.7


def test_prediction_ends_with_0_where_every_slide_is_done(whole, runs, tmp_path):
    with programs.imported("predict_slides") as module:
        outcome = programs.start(
            module, workdir=whole[0], slides=runs.cohort, split="test", out=tmp_path, gradcam="false"
        )
    assert outcome.status == 0 and outcome.err == "" and "2 of 2 slides done" in outcome.out
