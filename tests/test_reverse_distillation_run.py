"""The command that a user runs: trained on drawn patches, killed and continued, judged; patches cut from slides; its refusals."""

import csv
import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from data_pipelines.annotations import write_asap_xml
from data_pipelines.cohort import Cohort, SlideRecord
from data_pipelines.pyramids import write_pyramid
from data_pipelines.spots import Spots, SpotsError
from experiments.run import model
from experiments.run.distillation.model import DistillationModel
from experiments.run.distillation.report import RANDOM_TEACHER
from experiments.run.distillation.spot_patches import SpotCutter
from experiments.run.distillation.teachers import load_teacher
from experiments.run.model import Model, Network
from experiments.run.program import UsageError
from experiments.run.workdir import Workdir, WorkdirError
from srcc_jax.methods.reverse_distillation import Config
from srcc_jax.models import resnet, zoo
from srcc_jax.models.teachers import taps
from tests import programs
from tests.small_training import assert_same_bits

SPLITS = {"train": (13, 6), "validation": (5, 5), "test": (6, 6)}  # normal and tumour patches
SETTINGS = {"tile": 32, "batch": 8, "epochs": 4, "learning_rate": 3e-3, "tumour_patches": 5, "threads": 1}
STEPS, EPOCH = 9, 2  # of 13 + 5 patches: 2.25 steps are an epoch


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the program expects it, and it writes nothing."""


def draw_patches(folder):
    """Normal patches have fine noise, those of tumour broad stripes. Two come from each slide; one is not readable."""
    random, rows = np.random.default_rng(0), []
    for split, counts in SPLITS.items():
        for label, count in zip(("normal", "tumour"), counts):
            for number in range(count):
                image = random.integers(60, 200, (32, 32, 3))
                if label == "tumour":
                    image = image // 4 + 120 * (np.arange(32) // 8 % 2)[:, None, None]
                name = f"{split}_{label}_{number}.png"
                Image.fromarray(image.astype(np.uint8)).save(folder / name)
                rows.append(f"{name},{label},{split}_{label}_{number // 2},{split}")
    (folder / "test_normal_0.png").write_text("no image")
    (folder / "list.csv").write_text("\n".join(["path,label,slide_id,split", *rows]) + "\n")
    return folder / "list.csv"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What every run starts from, and a cache so that the second compiles nothing."""
    folder = tmp_path_factory.mktemp("runs")
    teacher = resnet.architecture("resnet18", source="torchvision", classes=7, width=4, depths=(1, 1, 1, 1))
    model.save(Network(teacher, zoo.init(teacher, jax.random.key(5)), {"name": "small"}), folder / "teacher")
    draw_patches(folder)
    with programs.several_runs(folder / "compiled"):
        yield folder


def start(runs, workdir, **changes):
    values = {
        "patches": runs / "list.csv",
        "teacher": runs / "teacher",
        "workdir": runs / workdir,
        **SETTINGS,
        **changes,
    }
    with programs.imported("reverse_distillation") as module:
        return programs.start(module, **{name: value for name, value in values.items() if value is not None})


@pytest.fixture(scope="module")
def whole(runs):
    outcome = start(runs, "whole")
    assert outcome.status == 0, outcome.err
    return runs / "whole", outcome


def without_time(rows):
    return [{name: value for name, value in row.items() if name != "time"} for row in rows]


def test_a_run_leaves_model_metrics_and_report(whole):
    workdir, outcome = whole
    assert outcome.out.splitlines()[-1].startswith("finished: step ")
    assert outcome.err.count("left out: ") == 1 and "test_normal_0.png" in outcome.err
    metrics = json.loads((workdir / "metrics.json").read_text())
    assert metrics["patches"] == {
        "train": {"normal": 13, "tumour": 5}, "validation": {"normal": 5, "tumour": 5}, "test": {"normal": 6, "tumour": 6},
    }  # fmt: skip
    assert metrics["thresholds"] == {"fixed": 2.0, "validation": metrics["validation"]["threshold"]}
    assert set(metrics["ROC AUC"]) == {"patch", "patient"} and metrics["ROC AUC"]["patch"]["value"] > 0.8
    for where in ("fixed", "validation"):
        assert 0 <= metrics[f"accuracy at the {where} threshold"]["patch"]["value"] <= 1
    history = Workdir(workdir).history("train")
    assert [row["step"] for row in history] == list(range(1, STEPS + 1))
    judged = [row for row in history if "validation_accuracy" in row]
    assert [row["step"] for row in judged] == [*range(EPOCH, STEPS, EPOCH), STEPS]
    best = max(judged, key=lambda row: row["validation_accuracy"])
    assert (metrics["step"], metrics["validation"]["threshold"]) == (best["step"], best["threshold"])
    page = (workdir / "report.html").read_text()
    assert "Reverse distillation" in page and "test_normal_0.png" in page and RANDOM_TEACHER not in page


def test_the_test_scores_give_the_metrics(whole):
    workdir, _ = whole
    with open(workdir / "patches.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    metrics = json.loads((workdir / "metrics.json").read_text())
    threshold = metrics["thresholds"]["validation"]
    right = [(float(row["score"]) >= threshold) == (row["label"] == "tumour") for row in rows]
    assert len(rows) == 11 and np.mean(right) == pytest.approx(
        metrics["accuracy at the validation threshold"]["patch"]["value"]
    )


def test_the_model_comes_back_with_its_teacher_untouched(whole, runs, tmp_path):
    found = DistillationModel.load(whole[0])
    teacher = Network.load(runs / "teacher")
    assert (found.tile, found.positive, found.slide_threshold) == (32, "tumour", 2.01)
    assert found.teacher.stages == 3 and found.teacher.classes == 0 and "threshold" in found.about["validation"]
    kept = found.variables["teacher"]
    assert not any("stage4" in name or "classifier" in name for name in kept["params"])
    for collection, modules in kept.items():
        for name, arrays in modules.items():
            assert_same_bits(arrays, teacher.variables[collection][name])
    with pytest.raises(WorkdirError, match="one of reverse distillation"):
        Model.load(whole[0])
    with pytest.raises(WorkdirError, match="no model of reverse distillation"):
        DistillationModel.load(runs / "teacher")
    copy = shutil.copytree(whole[0], tmp_path / "copy")
    card = json.loads((copy / "model.json").read_text())
    (copy / "model.json").write_text(json.dumps({**card, "checksum": "0"}))
    with pytest.raises(WorkdirError, match="checksum differs"):
        DistillationModel.load(copy)


def test_a_killed_run_ends_bit_for_bit_as_one_that_was_not(whole, runs, monkeypatch):
    """Between two checkpoints, where two steps are lost and done again."""
    log = Workdir.log

    def log_until_killed(self, stage, step, row):
        log(self, stage, step, row)
        if step == 5:
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(Workdir, "log", log_until_killed)
        with pytest.raises(Killed):
            start(runs, "killed")
    assert not (runs / "killed" / "model.json").exists()
    assert start(runs, "killed").status == 0
    for file in ("weights.npz", "model.json", "patches.csv", "metrics.json"):
        assert (runs / "killed" / file).read_bytes() == (whole[0] / file).read_bytes(), file
    histories = [without_time(Workdir(folder).history("train")) for folder in (runs / "killed", whole[0])]
    assert histories[0] == histories[1]


def test_the_test_patches_are_judged_once(whole, runs):
    before = {path.name: path.read_bytes() for path in whole[0].iterdir() if path.is_file()}
    outcome = start(runs, "whole")
    assert outcome.status == 0 and "finished before" in outcome.out
    assert {path.name: path.read_bytes() for path in whole[0].iterdir() if path.is_file()} == before


def test_a_random_teacher_says_so(whole, runs, monkeypatch):
    """Of the same shape as the others', so that nothing is compiled again."""
    small = Network.load(runs / "teacher").architecture
    monkeypatch.setattr(zoo, "architecture", lambda name, **changes: small)
    outcome = start(runs, "random", teacher=None, random_teacher=True, teacher_arch="resnet18")
    assert outcome.status == 0 and RANDOM_TEACHER in outcome.out
    assert json.loads((runs / "random" / "metrics.json").read_text())["random_teacher"] is True
    assert RANDOM_TEACHER in (runs / "random" / "report.html").read_text()
    assert DistillationModel.load(runs / "random").about["settings"]["teacher"] == "random"


def test_a_file_that_ends_behind_the_third_map_is_a_teacher(shared_data):
    """Keras's ResNet-50 without its last stage: every array is filled, under Keras's conventions."""
    file = shared_data / "weights" / "resnet50_imagenet_keras_conv1_to_stage4_fp16kernels.npz"
    teacher, variables = load_teacher(file, arch="resnet50")
    assert (teacher.stages, teacher.classes, teacher.source, teacher.channels) == (3, 0, "keras_caffe", "bgr")
    assert list(taps(teacher).values()) == [256, 512, 1024]
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(variables))
    with pytest.raises(UsageError, match=r"cannot be used with --teacher_arch=resnet18: \d+ of \d+ weights unmatched"):
        load_teacher(file, arch="resnet18")


def test_an_imported_efficientnet_is_a_teacher(tmp_path):
    net = zoo.architecture("tiny", source="keras", classes=3)
    model.save(Network(net, zoo.init(net, jax.random.key(0)), {}), tmp_path)
    teacher, variables = load_teacher(tmp_path, arch="wide_resnet50_2")
    assert (teacher.name, list(taps(teacher).values())) == ("tiny", [24, 40, 64])
    assert "classifier" not in variables["params"] and all(isinstance(v, jax.Array) for v in jax.tree.leaves(variables))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"learning_rate": 0.1}, "learning_rate: 0.003 there, 0.1 asked for"),
        ({"tumour_patches": 7, "workdir": "other"}, "--tumour_patches=7: there are 6 tumour patches"),
        (
            {"positive": "cancer", "workdir": "other"},
            "no cancer patch in the validation split; labels are normal, tumour",
        ),
        ({"teacher": None}, "give --teacher=<weights>, or --random_teacher"),
        ({"cohort": "cohort.csv"}, "give one of --patches"),
        ({"tumour_list": "list.txt"}, "--tumour_list are places on the slides of a --cohort"),
        ({"tile": 40}, "--tile=40 must be a multiple of 32"),
        ({"batch": 6}, "--batch=6 cannot be split over 4 devices"),
    ],
)
def test_wrong_flags_are_refused_in_one_line(whole, runs, changes, words):
    workdir = changes.pop("workdir", "whole")
    assert words in programs.one_line(start(runs, workdir, **changes))
    shutil.rmtree(runs / "other", ignore_errors=True)


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    """A tumour slide for training, one that nobody annotated, and a normal slide for the test."""
    folder = tmp_path_factory.mktemp("slides")
    image = np.full((1600, 1600, 3), 243, np.uint8)
    image[300:1300, 300:1300] = np.random.default_rng(0).integers((180, 80, 140), (230, 130, 190), (1000, 1000, 3))
    write_pyramid(folder / "a.tiff", image, mpp=1.0)
    write_asap_xml(folder / "a.xml", [programs.square(400, 500, side=500.0)])
    annotation = folder / "a.xml"
    return (
        SlideRecord("marked", folder / "a.tiff", "tumour", "p", "train", annotation=annotation),
        SlideRecord("unmarked", folder / "a.tiff", "tumour", "q", "train"),
        SlideRecord("clean", folder / "a.tiff", "normal", "r", "test"),
    )


def test_patches_are_cut_from_slides_by_the_rule(slides, tmp_path, capsys):
    config = Config(tile=64, mpp=1.0, normal_spots=9, tumour_spots=7, test_normal_spots=5)
    patches = SpotCutter(config, tmp_path / "a", {}).cut(Cohort(slides), threads=2)
    assert "left out: unmarked: it is tumour but has no annotation" in capsys.readouterr().out
    kinds = sorted(zip(patches.slide_id, patches.split, patches.label))
    assert kinds == [
        *[("clean", "test", "normal")] * 5, *[("marked", "train", "normal")] * 9, *[("marked", "train", "tumour")] * 7,
    ]  # fmt: skip
    for path, slide, label in zip(patches.path, patches.slide_id, patches.label):
        x, y = map(int, path.stem.split("_")[1:])
        assert (400 <= x < 900 and 500 <= y < 1000) == (label == "tumour") or slide == "clean"
        assert Image.open(path).size == (64, 64) and min(x, y) >= 270 and max(x, y) < 1330
    SpotCutter(config, tmp_path / "a", {}).cut(Cohort(slides), threads=1)  # read again: what failed is told again
    assert "left out: unmarked: it is tumour but has no annotation" in capsys.readouterr().out
    again = SpotCutter(config, tmp_path / "b", {}).cut(Cohort(slides), threads=1)
    assert [path.name for path in again.path] == [path.name for path in patches.path]
    other = SpotCutter(Config(tile=64, mpp=1.0, seed=1), tmp_path / "c", {}).cut(Cohort(slides[:1]), threads=1)
    assert {path.name for path in other.path} != {path.name for path in patches.path[:16]}
    assert SpotCutter(config, tmp_path / "a", {}).cut(Cohort(()), threads=1).digest() == patches.digest()


def test_listed_places_come_before_the_rule(slides, tmp_path):
    places = Spots(np.array(["UNMARKED", "unmarked"]), np.array([500.0, 700]), np.array([600.0, 610]))
    cutter = SpotCutter(Config(tile=64, mpp=1.0), tmp_path, {"tumour": places})
    patches = cutter.cut(Cohort(slides[1:2]), threads=1)
    assert [path.name for path in patches.path] == ["unmarked_500_600.png", "unmarked_700_610.png"]
    assert patches.label.tolist() == ["tumour"] * 2


def test_slides_are_not_drawn_from_where_no_label_means_tumour(slides, tmp_path):
    spelt = Cohort(tuple(dataclasses.replace(record, label="tumor") for record in slides[1:2]))
    with pytest.raises(UsageError, match="--positive=tumour is no label of the cohort, whose labels are tumor"):
        SpotCutter(Config(tile=64, mpp=1.0), tmp_path, {}).cut(spelt, threads=1)
    places = Spots(np.array(["unmarked"]), np.array([500.0]), np.array([600.0]))
    listed = SpotCutter(Config(tile=64, mpp=1.0), tmp_path, {"tumour": places}).cut(spelt, threads=1)
    assert len(listed) == 1  # the lists say what is tumour


def test_lists_of_other_slides_and_places_off_the_slide_are_told(slides, tmp_path, capsys):
    config, cohort = Config(tile=64, mpp=1.0, normal_spots=3, tumour_spots=2), Cohort(slides[:1])
    names, x, y = np.array(["marked", "Tumor-001"]), np.array([500.0, 64]), np.array([600.0, 64])
    with pytest.raises(UsageError, match="--tumour_list names Tumor-001, and the cohort has marked: name them alike"):
        SpotCutter(config, tmp_path, {"tumour": Spots(names[1:], x[1:], y[1:])}).cut(cohort, threads=1)
    SpotCutter(config, tmp_path, {"tumour": Spots(names, x, y)}).cut(cohort, threads=1)
    told = capsys.readouterr().out
    assert "--tumour_list: slides that the cohort does not have: Tumor-001" in told
    assert "no normal patches of marked: their places are those of --tumour_list alone" in told
    off = Spots(names[:1], np.array([1600.0]), y[:1])
    with pytest.raises(SpotsError, match="normal place 1600,600 is not on marked, which has 1600 × 1600 pixels"):
        SpotCutter(config, tmp_path / "off", {"normal": off}).cut(cohort, threads=1)


def test_a_run_from_slides(whole, runs, slides):
    """Patches of one slide for each split, cut where the masks allow; the networks are those compiled before."""
    folder = runs / "cohort"
    folder.mkdir()
    lines = ["slide_id,path,label,split,annotation"]
    for split in SPLITS:
        shutil.copy(slides[0].path, folder / f"{split}.tiff")
        lines.append(f"{split},{split}.tiff,tumour,{split},{slides[0].annotation}")
    shutil.copy(slides[0].path, folder / "bare.tiff")
    lines.append("bare,bare.tiff,tumour,train,")
    (folder / "cohort.csv").write_text("\n".join(lines) + "\n")
    spots = {
        "normal_spots": 6,
        "tumour_spots": 5,
        "validation_spots": 4,
        "test_normal_spots": 6,
        "test_tumour_spots": 3,
    }
    outcome = start(runs, "cut", patches=None, cohort=folder / "cohort.csv", mpp=1.0, epochs=1, **spots)
    assert outcome.status == 0, outcome.err
    metrics = json.loads((runs / "cut" / "metrics.json").read_text())
    assert metrics["patches"] == {
        "train": {"normal": 6, "tumour": 5}, "validation": {"normal": 4, "tumour": 4}, "test": {"normal": 6, "tumour": 3},
    }  # fmt: skip
    assert DistillationModel.load(runs / "cut").mpp == 1.0
    assert list(metrics["failed_slides"]) == ["bare"] and "has no annotation" in metrics["failed_slides"]["bare"]
    assert "bare: it is tumour but has no annotation" in (runs / "cut" / "report.html").read_text()
    assert len(list((runs / "cut" / "patches").rglob("*.png"))) == 28
