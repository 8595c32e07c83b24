"""Supervised patch classifiers over grids: lists of grids, views, the loss, and the program from patches and slides to predicted maps."""

import csv
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from data_pipelines.annotations import write_asap_xml
from data_pipelines.cohort import Cohort, SlideRecord
from data_pipelines.patch_grids import read_grids, write_grids
from data_pipelines.patches import PatchesError, patch_table
from data_pipelines.pyramids import write_pyramid
from data_pipelines.spots import MASK_MPP, Regions
from experiments.run import model
from experiments.run.grids import cutting, training
from experiments.run.grids.model import GridModel
from experiments.run.model import Network
from experiments.run.workdir import Workdir, WorkdirError
from srcc_jax.methods.patch_grids import Config, fold, grid_variables, make_loss, make_middle_logit, views
from srcc_jax.models import resnet, zoo
from tests import programs, small_networks
from tests.programs import one_line

SETTINGS = {"tile": 32, "batch": 8, "epochs": 4, "learning_rate": 0.05, "threads": 1, "backbone": "resnet18"}


@pytest.fixture(scope="module", autouse=True)
def fast_compile(tmp_path_factory):
    """What runs once here takes longer to optimise than to run, and what one run compiled, the next need not."""
    with programs.several_runs(tmp_path_factory.mktemp("compiled")):
        yield


def draw(tumour, random, side=32):
    """Fine noise; tumour has broad stripes."""
    image = random.integers(60, 200, (side, side, 3))
    return (image // 4 + 120 * (np.arange(side) // 8 % 2)[:, None, None] if tumour else image).astype(np.uint8)


def draw_grid(cells, random):
    rows = [np.concatenate([draw(cell, random) for cell in cells[3 * row : 3 * row + 3]], axis=1) for row in range(3)]
    return np.concatenate(rows)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Single patches by split and class, and a list of 3 × 3 grids; a backbone that was "pretrained"."""
    root, random = tmp_path_factory.mktemp("grids"), np.random.default_rng(0)
    (root / "grids").mkdir()
    lines = ["path,label,split,cells"]
    for split, count in (("train", 12), ("val", 4), ("test", 5)):
        for tumour in (False, True):
            label = "tumour" if tumour else "normal"
            (root / "patches" / split / label).mkdir(parents=True)
            for number in range(count):
                Image.fromarray(draw(tumour, random)).save(root / "patches" / split / label / f"{number}.png")
                cells = random.random(9) < (0.7 if tumour else 0.2)
                cells[4] = tumour
                name = f"grids/{split}_{label}_{number}.png"
                Image.fromarray(draw_grid(cells, random)).save(root / name)
                lines.append(f"{name},{label},{split},{''.join(str(int(cell)) for cell in cells)}")
    (root / "grids.csv").write_text("\n".join(lines) + "\n")
    net = resnet.architecture("resnet18", source="torchvision", classes=1, width=4, depths=(1, 1, 1, 1))
    model.save(Network(net, zoo.init(net, jax.random.key(0)), {}), root / "pretrained")
    return root


def start(folder, workdir, **changes):
    values = {
        "patches": folder / "patches",
        "workdir": folder / workdir,
        "pretrained": folder / "pretrained",
        **SETTINGS,
        **changes,
    }
    with programs.imported("patch_classification") as module:
        return programs.start(module, **{name: value for name, value in values.items() if value is not None})


def test_lists_of_grids_are_read_and_written(folder, tmp_path):
    patches, cells = read_grids(folder / "grids.csv", side=3)
    assert cells.shape == (42, 9) and (cells[:, 4] == (patches.label == "tumour")).all()
    write_grids(tmp_path / "again.csv", patches, cells)
    again, same = read_grids(tmp_path / "again.csv", side=3)
    np.testing.assert_array_equal(same, cells)
    assert [path.resolve() for path in again.path] == [path.resolve() for path in patches.path]
    with pytest.raises(PatchesError, match=r"line 2: the column cells must hold 25 digits"):
        read_grids(folder / "grids.csv", side=5)
    with pytest.raises(PatchesError, match="grids need a list"):
        read_grids(folder / "patches", side=3)


def test_labels_turn_with_their_patches():
    """Every patch has a grey value of its own, which the colours do not change."""
    config = Config(side=3, tile=32, brightness=0, contrast=0, saturation=0, hue=0)
    values = np.arange(9).reshape(3, 3)
    image = np.broadcast_to(values.repeat(4, 0).repeat(4, 1)[None, ..., None] * 20, (16, 12, 12, 3)).astype(np.uint8)
    label = np.broadcast_to(values.reshape(1, 9), (16, 9)).astype(np.float32)
    seen, cells = jax.jit(lambda i, c, k: views(i, c, k, config))(image, label, jax.random.key(3))
    np.testing.assert_allclose(np.asarray(seen)[:, 1::4, 1::4, 0] / 20, np.asarray(cells).reshape(-1, 3, 3), atol=1e-4)
    assert len({tuple(row) for row in np.asarray(cells)}) == 8


def test_the_loss_is_the_mean_cross_entropy_of_all_patches_of_a_grid():
    """At zero logits it is ln 2 whatever the labels; rows of weight 0 count for nothing."""
    net = small_networks.architecture("tiny", classes=1)
    variables = small_networks.variables(net)
    variables["params"]["classifier"] = jax.tree.map(np.zeros_like, variables["params"]["classifier"])
    nested = grid_variables(variables, side=3, crf=True)
    batch = {
        "image": np.random.default_rng(0).integers(0, 256, (2, 96, 96, 3)).astype(np.uint8),
        "label": np.float32([[1, 0, 0, 1, 1, 0, 1, 0, 1], [0] * 9]),
        "weight": np.float32([1, 0]),
    }
    loss = make_loss(net, Config(side=3, tile=32))
    stats = {"batch_stats": nested["batch_stats"]}
    value, (_, metrics) = jax.jit(loss)(nested["params"], stats, batch, jax.random.key(0))
    assert float(value) == pytest.approx(np.log(2), rel=1e-6)
    assert float(metrics["accuracy"][0]) == pytest.approx(4 / 9) and float(metrics["accuracy"][1]) == 1


def test_the_crop_is_the_middle_of_each_patch():
    net = small_networks.architecture("tiny", classes=1)
    nested = grid_variables(small_networks.variables(net), side=1, crf=False)
    image = np.random.default_rng(1).integers(0, 256, (2, 48, 48, 3)).astype(np.uint8)
    cropped, whole = (make_middle_logit(net, side=1, crf=False, crop=crop) for crop in (32, None))
    folded = fold(nested, net)
    got = jax.jit(lambda x: (cropped(folded, x), whole(folded, x[:, 8:40, 8:40])))(jnp.asarray(image))
    np.testing.assert_allclose(*got, rtol=1e-6)


@pytest.fixture(scope="module")
def trained(folder):
    outcome = start(folder, "ncrf", patches=folder / "grids.csv", side=3)
    assert outcome.status == 0, outcome.err
    return folder / "ncrf"


def test_a_run_over_grids_leaves_a_model_with_its_crf(trained):
    metrics = json.loads((trained / "metrics.json").read_text())
    assert metrics["ROC AUC"]["patch"]["value"] > 0.6 and metrics["thresholds"]["fixed"] == 0.5
    found = GridModel.load(trained)
    assert (found.side, found.crf, found.tile, found.positive) == (3, True, 32, "tumour")
    assert np.abs(found.variables["params"]["crf"]["weight"]).max() > 0
    with open(trained / "patches.csv", newline="") as file:
        assert sum(1 for _ in csv.DictReader(file)) == 10
    with pytest.raises(WorkdirError, match="no model of patch classification"):
        GridModel.load(trained.parent / "pretrained")


def test_a_killed_run_ends_as_one_that_was_not(trained, folder, monkeypatch):
    class Killed(BaseException):
        """Stands for SIGKILL."""

    log = Workdir.log

    def log_until_killed(self, stage, step, row):
        log(self, stage, step, row)
        if step == 5:
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(Workdir, "log", log_until_killed)
        with pytest.raises(Killed):
            start(folder, "killed", patches=folder / "grids.csv", side=3)
    assert start(folder, "killed", patches=folder / "grids.csv", side=3).status == 0
    assert (folder / "killed" / "weights.npz").read_bytes() == (trained / "weights.npz").read_bytes()


def test_single_patches_need_no_cells(folder):
    outcome = start(folder, "single", normal_patches=10, tumour_patches=8)
    assert outcome.status == 0, outcome.err
    assert not GridModel.load(folder / "single").crf
    assert "finished before" in start(folder, "single", normal_patches=10, tumour_patches=8).out


@pytest.mark.parametrize("selection, metric", [("accuracy", "validation_accuracy"), ("auc", "validation_auc")])
def test_the_setting_says_what_selects(folder, monkeypatch, selection, metric):
    class Asked(BaseException):
        """What training was asked to keep."""

    def ask(*_, keep, **__):
        raise Asked(keep.metric, keep.mode)

    monkeypatch.setattr(training, "fit_to_best", ask)
    with pytest.raises(Asked) as asked:
        start(folder, f"by_{selection}", selection=selection)
    assert asked.value.args == (metric, "max")


@pytest.fixture(scope="module")
def cohort(folder):
    """One slide of noise with a striped square, which is annotated, in every split."""
    random = np.random.default_rng(1)
    image = np.full((1200, 1200, 3), 243, np.uint8)
    tissue = np.stack([random.integers(*limits, (900, 900)) for limits in ((150, 230), (60, 140), (140, 200))], -1)
    image[150:1050, 150:1050] = tissue
    image[300:700, 300:700] = tissue[150:550, 150:550] // 2 + 60 * (np.arange(400) // 8 % 2)[:, None, None]
    lines = ["slide_id,path,label,split,annotation"]
    write_asap_xml(folder / "square.xml", [programs.square(300, 300, side=400.0)])
    for split in ("train", "validation", "test"):
        write_pyramid(folder / f"{split}.tiff", image, mpp=1.0)
        lines.append(f"{split},{split}.tiff,tumour,{split},square.xml")
    (folder / "cohort.csv").write_text("\n".join(lines) + "\n")
    return folder / "cohort.csv"


def test_from_slides_to_grids_with_their_labels_and_to_a_map(cohort, folder):
    spots = {"normal_spots": 8, "tumour_spots": 6, "validation_spots": 3, "test_spots": 3}
    outcome = start(folder, "cut", patches=None, cohort=cohort, side=3, mpp=1.0, epochs=1, **spots)
    assert outcome.status == 0, outcome.err
    patches, cells = read_grids(folder / "cut" / "patches" / "grids.csv", side=3)
    assert (cells[:, 4] == (patches.label == "tumour")).all() and len(patches) > 10
    for path, row in zip(patches.path, cells):
        x, y = (float(number) for number in path.stem.rsplit("_", 2)[1:])
        for place, cell in enumerate(row):
            at = np.array([x + 32 * (place % 3 - 1), y + 32 * (place // 3 - 1)])
            edge = np.abs(at - np.array([[300], [700]])).min()
            assert edge < 16 or cell == ((at > 300) & (at < 700)).all()
    shutil.rmtree(folder / "out", ignore_errors=True)
    with programs.imported("predict_slides") as module:
        values = {"workdir": folder / "cut", "slides": cohort, "split": "test", "out": folder / "out", "formats": "npz"}
        outcome = programs.start(module, **values)
    assert outcome.status == 0, outcome.err
    with np.load(folder / "out" / "slides" / "test" / "probability.npz") as file:
        known = np.isfinite(file["values"])
        assert known.sum() > 100 and ((file["values"][known] >= 0) & (file["values"][known] <= 1)).all()


def test_cells_are_those_of_the_spot_before_its_name_was_rounded(monkeypatch):
    """Spots are at multiples of a downsample that is no whole number; a neighbour a pixel of the mask away can be another."""
    random = np.random.default_rng(0)
    mask, downsample = random.random((80, 80)) < 0.5, MASK_MPP / 0.9
    row, column = random.integers(10, 70, (2, 500))
    files = tuple(Path(f"s_{x * downsample:.0f}_{y * downsample:.0f}.png") for x, y in zip(column, row))
    patches = patch_table(files, np.where(mask[row, column], "tumour", "normal"), slide_id=["s"] * 500)
    monkeypatch.setattr(cutting, "find_regions", lambda record, **_: Regions(mask, mask, downsample, True))
    cohort = Cohort((SlideRecord("s", Path("s.tiff"), "tumour", "s"),))
    cells = cutting._cells(patches, cohort, Config(side=3, tile=64, mpp=MASK_MPP / 32), None)
    np.testing.assert_array_equal(cells[:, 4], mask[row, column])
    np.testing.assert_array_equal(cells[:, 0], mask[row - 2, column - 2])


def test_slides_left_out_are_told_again_and_reported(cohort, folder):
    lines = (folder / "cohort.csv").read_text()
    shutil.copy(folder / "train.tiff", folder / "bare.tiff")
    (folder / "more.csv").write_text(f"{lines}bare,bare.tiff,tumour,train,\n")
    spots = {"normal_spots": 8, "tumour_spots": 6, "validation_spots": 3, "test_spots": 3}
    given = {"patches": None, "cohort": folder / "more.csv", "mpp": 1.0, "epochs": 1, **spots}
    assert start(folder, "lacking", **given).status == 0
    failed = json.loads((folder / "lacking" / "metrics.json").read_text())["failed_slides"]
    assert list(failed) == ["bare"] and "bare: it is tumour" in (folder / "lacking" / "report.html").read_text()
    (folder / "lacking" / "metrics.json").unlink()
    assert "left out: bare: it is tumour but has no annotation" in start(folder, "lacking", **given).out


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"side": 2}, "--side=2 must be odd"),
        ({"crop": 40}, "--crop=40 must be at most --tile=32"),
        ({"positive": "cancer"}, "the train split needs normal and tumour patches"),
        ({"tumour_patches": 50}, "--tumour_patches=50: there are 12"),
        ({"cohort": "cohort.csv"}, "give one of --patches"),
        ({"batch": 6}, "--batch=6 cannot be split over 4 devices"),
    ],
)
def test_wrong_flags_are_refused_in_one_line(folder, changes, words):
    assert words in one_line(start(folder, "other", **changes))
    shutil.rmtree(folder / "other", ignore_errors=True)
