"""The few-shot study of reverse distillation: its splits, its plan, the baselines, the tables, and one row trained by the real command."""

import csv
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from data_pipelines.cohort import read_cohort
from data_pipelines.patches import Patches, PatchesError, read_patches
from experiments.run import model
from experiments.run.distillation import mosaic_slides
from experiments.run.distillation.baselines import baseline_scores
from experiments.run.distillation.few_shot import (
    DISTANCE,
    LOGISTIC,
    MAIN,
    SUPERVISED,
    Row,
    divide,
    name_slides,
    plan,
)
from experiments.run.distillation.few_shot_table import Result, mean_auc
from experiments.run.distillation.mosaic_slides import predict_and_score, write_cohort
from experiments.run.model import Network
from experiments.run.workdir import WorkdirError
from srcc_jax.metrics import Interval, roc_auc
from srcc_jax.models import resnet, zoo
from tests import programs


def table(names, label, split=None):
    empty = np.full(len(names), "")
    return Patches(
        tuple(Path(f"{name}.png") for name in names),
        np.array(label),
        empty,
        empty,
        empty if split is None else np.array(split),
    )


def many():
    names = [f"{'t' if n % 2 else 'n'}_s{n % 5}_{n}" for n in range(40)]
    return table(names, ["tumour" if n % 2 else "normal" for n in range(40)])


def test_the_splits_have_the_numbers_asked_for_and_are_those_of_the_seed():
    patches = many()
    tumour = patches.label == "tumour"
    found = divide(patches, tumour, validation=(3, 4), test=(5, 6))
    counts = {
        (s, k): int(((found.split == s) & (tumour == k)).sum()) for s in ("train", "validation", "test") for k in (0, 1)
    }
    assert counts == {
        ("train", 0): 12, ("train", 1): 10, ("validation", 0): 3, ("validation", 1): 4, ("test", 0): 5, ("test", 1): 6,
    }  # fmt: skip
    again = divide(patches, tumour, validation=(3, 4), test=(5, 6))
    assert (again.split == found.split).all()
    assert (divide(patches, tumour, validation=(3, 4), test=(5, 6), seed=1).split != found.split).any()
    assert (divide(found, tumour, validation=(1, 1), test=(1, 1)).split == found.split).all()
    with pytest.raises(PatchesError, match="21 normal patches for validation and test: there are 20"):
        divide(patches, tumour, validation=(10, 1), test=(11, 1))


def test_the_patches_of_test_slides_are_the_test_patches():
    patches = name_slides(many(), r"_(s\d)_")
    assert set(patches.slide_id) == {f"s{n}" for n in range(5)}
    found = divide(patches, patches.label == "tumour", validation=(2, 2), test=(0, 0), test_slides=["s3"])
    assert set(found.slide_id[found.split == "test"]) == {"s3"} and "s3" not in found.slide_id[found.split != "test"]
    assert (found.split == "validation").sum() == 4
    with pytest.raises(PatchesError, match=r"finds no slide in n_s0_0\.png"):
        name_slides(many(), r"slide(\d)")


def test_the_larger_questions_are_answered_first():
    rows = plan([0, 5, 100], seeds=2, arms=["plain, flat"], arm_counts=[100], arm_seeds=1)
    assert [(row.arm, row.tumour, row.seed) for row in rows] == [
        (MAIN, 100, 0), (MAIN, 0, 0), (MAIN, 5, 0), ("plain, flat", 100, 0), (MAIN, 100, 1), (MAIN, 0, 1), (MAIN, 5, 1),
    ]  # fmt: skip
    assert rows[0].settings == {"loss": "focal", "similarity": "flat"} and rows[0].name == "focal_flat_100_0"
    assert rows[1].settings["loss"] == "plain"
    rows = plan([0, 5], seeds=1, arms=[SUPERVISED], arm_counts=[0, 5], arm_seeds=2)
    assert [row.name for row in rows] == ["focal_flat_0_0", "focal_flat_5_0", "supervised_5_0", "supervised_5_1"]


def features(random, count, shift):
    return random.normal(0, 1, (count, 30)) + shift * (np.arange(30) < 3)


def test_the_baselines_rank_what_they_can_tell_apart():
    """Logistic regression on two shifted clouds, and the distance to normal, which knows no tumour; validation rows are not fitted."""
    random = np.random.default_rng(0)
    data = np.concatenate([features(random, 150, 0.0), features(random, 150, 2.0)])
    tumour = np.arange(300) // 150
    part = np.arange(300) % 150
    train, validation, test = (part < 60), (part >= 60) & (part < 90), part >= 90
    score = baseline_scores(data, tumour, np.flatnonzero(train), np.flatnonzero(validation))
    assert score.min() >= 0 and score.max() <= 1
    assert roc_auc(tumour[test], score[test]) > 0.95
    normal_only = np.flatnonzero(train & (tumour == 0))
    distance = baseline_scores(data, tumour, normal_only, np.flatnonzero(validation))
    assert roc_auc(tumour[test], distance[test]) > 0.8
    moved = data.copy()
    moved[validation] += 100
    np.testing.assert_array_equal(
        baseline_scores(moved, tumour, normal_only, np.flatnonzero(validation))[test], distance[test]
    )


def test_the_mean_over_seeds_is_of_their_areas_and_differences_are_paired():
    random = np.random.default_rng(1)
    label = np.arange(60) % 2
    runs = [
        Result(Row(MAIN, 5, seed), label, random.random(60) + label * 0.4, {}, Interval(0, 0, 0)) for seed in range(3)
    ]
    mean = mean_auc(runs)
    assert mean.value == pytest.approx(np.mean([roc_auc(label, run.score) for run in runs]))
    assert mean.low < mean.value < mean.high
    zero = mean_auc(runs, minus=runs)
    assert (zero.value, zero.low, zero.high) == (0, 0, 0)


def test_accuracy_counts_both_kinds_equally():
    result = Result(
        Row(MAIN, 5, 0),
        np.array([0, 1, 1, 1, 1]),
        np.array([0.1, 0.2, 0.6, 0.7, 0.8]),
        {"fixed": 0.5},
        Interval(0, 0, 0),
    )
    assert result.accuracy("fixed") == pytest.approx((1 + 0.75) / 2)
    assert np.isnan(result.accuracy("validation"))


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Drawn patches and a teacher of a few thousand weights; the study over one number of tumour patches."""
    folder = tmp_path_factory.mktemp("study")
    teacher = resnet.architecture("resnet18", source="torchvision", classes=7, width=4, depths=(1, 1, 1, 1))
    model.save(Network(teacher, zoo.init(teacher, jax.random.key(5)), {"name": "small"}), folder / "teacher")
    random = np.random.default_rng(0)
    for label, count in (("normal", 18), ("tumour", 14)):
        (folder / "patches" / label).mkdir(parents=True)
        for number in range(count):
            image = random.integers(60, 200, (32, 32, 3))
            if label == "tumour":
                image = image // 4 + 120 * (np.arange(32) // 8 % 2)[:, None, None]
            Image.fromarray(image.astype(np.uint8)).save(folder / "patches" / label / f"{number}.png")
    return folder


def start(folder, **changes):
    values = {
        "patches": folder / "patches", "teacher": folder / "teacher", "workdir": folder / "out", "tile": 32, "batch": 8,
        "normal_patches": 10, "tumour_patches": "0,3", "arm_tumour_patches": "3", "seeds": 1, "epochs": 1, "validation": "3,3",
        "test": "4,5", "threads": 1, "learning_rate": 3e-3, **changes,
    }  # fmt: skip
    with programs.imported("distillation_study") as module:
        return programs.start(module, **values)


@pytest.fixture(scope="module")
def finished(study):
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")  # of the processes that it starts
        outcome = start(study, arms="supervised")
    assert outcome.status == 0, outcome.err
    return study / "out"


def lines_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_a_study_leaves_its_tables_and_curve(finished):
    found = {(line["arm"], line["tumour_patches"]) for line in lines_of(finished / "results.csv")}
    assert found == {(MAIN, "0"), (MAIN, "3"), (LOGISTIC, "3"), (DISTANCE, "0"), (SUPERVISED, "3")}
    text = (finished / "table.md").read_text()
    assert "He & Li, Table 3 (Camelyon16) | 0.646 |" in text and f"{MAIN} less baseline" in text
    summary = json.loads((finished / "summary.json").read_text())
    assert set(summary["mean ROC AUC"][MAIN]) == {"0", "3"}
    assert Image.open(finished / "curve.png").size[0] > 800
    patches = read_patches(finished / "patches.csv")
    assert [len(patches.rows(split)) for split in ("validation", "test")] == [6, 9]
    judged = [
        lines_of(finished / "runs" / name / "patches.csv") for name in ("focal_flat_3_0", "logistic_regression_3_0")
    ]
    assert sorted(line["path"] for line in judged[0]) == sorted(line["path"] for line in judged[1])
    assert json.loads((finished / "runs" / "focal_flat_0_0" / "settings.json").read_text())["loss"] == "plain"
    assert "Selected by ROC AUC" in (finished / "runs" / "focal_flat_3_0" / "report.html").read_text()
    assert not (finished / "runs" / "focal_flat_3_0" / "checkpoints").exists()


def test_mosaic_slides_show_test_patches_alone(finished, tmp_path):
    patches = read_patches(finished / "patches.csv")
    cohort = read_cohort(write_cohort(tmp_path, patches, ("tumour",), slides=(2, 1), side=32, mpp=1.0))
    assert sorted((record.label, record.split) for record in cohort) == [("normal", "test"), *[("tumour", "test")] * 2]
    assert all((record.annotation is not None) == (record.label == "tumour") for record in cohort)
    before = (tmp_path / "cohort.csv").stat().st_mtime_ns
    write_cohort(tmp_path, patches, ("tumour",), slides=(5, 5), side=32, mpp=1.0)
    assert (tmp_path / "cohort.csv").stat().st_mtime_ns == before


def test_a_finished_study_trains_nothing_again(finished, study):
    before = {path: path.stat().st_mtime_ns for path in (finished / "runs").rglob("*") if path.is_file()}
    outcome = start(study)  # the arm is not asked for again, and stays in the table
    assert "supervised less baseline" in (finished / "table.md").read_text()
    assert outcome.status == 0 and "$ python" not in outcome.out
    assert {path: path.stat().st_mtime_ns for path in (finished / "runs").rglob("*") if path.is_file()} == before


def test_the_supervised_arm_begins_as_the_teacher_and_is_selected_by_area(finished):
    """It sees what distillation sees: the same splits, as many patches; its difference from the baseline is in the table."""
    folder = finished / "runs" / "supervised_3_0"
    settings = json.loads((folder / "settings.json").read_text())
    assert (settings["selection"], settings["epochs"], settings["tumour_patches"]) == ("auc", 1, 3)
    assert (settings["architecture"]["stages"], settings["seed"], settings["normal_patches"]) == (3, 0, 10)
    assert "Selected by the ROC AUC of the validation patches" in (folder / "report.html").read_text()
    ours, theirs = (
        sorted(line["path"] for line in lines_of(finished / "runs" / name / "patches.csv"))
        for name in ("supervised_3_0", "logistic_regression_3_0")
    )
    assert ours == theirs and not (folder / "checkpoints").exists()
    assert "supervised less baseline, same seeds" in (finished / "table.md").read_text()
    assert set(json.loads((finished / "summary.json").read_text())["ROC AUC, supervised less baseline"]) == {"3"}
    teacher, start_net = Network.load(finished.parent / "teacher"), Network.load(finished / "teacher")
    stem = [network.variables["params"]["stem"] for network in (teacher, start_net)]
    jax.tree.map(np.testing.assert_array_equal, *stem)
    assert "classifier" not in start_net.variables["params"] and "stage4_block1" not in start_net.variables["params"]


def test_other_settings_and_unknown_arms_are_refused(finished, study):
    assert "learning_rate: 0.003 there, 0.1 asked for" in programs.one_line(start(study, learning_rate=0.1))
    assert "--arms: sharp, flat: give some of" in programs.one_line(start(study, arms="sharp_flat"))
    wanted = {"arms": "supervised", "supervised_epochs": 2}
    assert "was trained for 1 epochs, not 2" in programs.one_line(start(study, **wanted))
    wanted = {"arms": "supervised", "arm_tumour_patches": "3,7"}
    assert "7 is none of --tumour_patches=0,3" in programs.one_line(start(study, **wanted))
    mosaic = {"section": "mosaic", "mosaic_model": "none"}
    assert "holds no finished model" in programs.one_line(start(study, **mosaic, mosaic_slides="1,1"))
    refused = programs.one_line(start(study, **mosaic, mosaic_slides="2,1"))
    assert "mosaic_slides: [1, 1] there, [2, 1] asked for" in refused


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"patches": "elsewhere"}, "patches: "),
        ({"validation": "2,3"}, "validation: [3, 3] there, [2, 3] asked for"),
        ({"test": "4,4"}, "test: [4, 5] there, [4, 4] asked for"),
        ({"slide_pattern": r"(\d)"}, "slide_pattern: None there"),
        ({"test_slides": "3"}, "test_slides: [] there, ['3'] asked for"),
    ],
)
def test_other_splits_are_refused(finished, study, changes, words):
    assert words in programs.one_line(start(study, **changes))


def test_a_study_without_a_record_of_its_splits_goes_on(finished, study):
    record = (finished / "splits.json").read_bytes()
    (finished / "splits.json").unlink()
    assert start(study, arms="supervised", validation="2,3").status == 0 and not (finished / "splits.json").exists()
    (finished / "splits.json").write_bytes(record)


def test_maps_of_another_stride_are_refused(tmp_path, monkeypatch):
    def write(program, *, out, **_):
        if program == "predict_slides":
            out.mkdir()
            (out / "summary.json").write_text("{}")

    monkeypatch.setattr(mosaic_slides, "command", write)
    (tmp_path / "model.json").touch()
    (tmp_path / "metrics.json").write_text('{"thresholds": {"validation": 0.4}}')
    for stride in (48, 48):
        predict_and_score(tmp_path, tmp_path / "cohort.csv", tmp_path / "out", positive="tumour", stride=stride)
    with pytest.raises(WorkdirError, match="stride: 48 there, 24 asked for"):
        predict_and_score(tmp_path, tmp_path / "cohort.csv", tmp_path / "out", positive="tumour", stride=24)
