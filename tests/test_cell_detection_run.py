"""The command that a user runs: rounds on drawn cells, killed and continued, with one model and with two; its refusals."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from data_pipelines.boxes import Boxes, read_boxes, write_boxes
from data_pipelines.cell_images import read_cell_images
from data_pipelines.cell_masks import read_mask
from data_pipelines.cohort import SlideRecord, write_cohort
from data_pipelines.pyramids import write_pyramid
from experiments.run.cells import rounds, starting
from experiments.run.cells.inference import CellScorer
from experiments.run.cells.learner import Learner
from experiments.run.cells.model import CellModel
from experiments.run.model import Model
from experiments.run.program import UsageError
from experiments.run.workdir import Workdir, WorkdirError
from srcc_jax.instances import INNER
from srcc_jax.methods.cell_detection import Config, make_probability, target_mask
from srcc_jax.models import pretrained, zoo
from srcc_jax.parallel import make_mesh
from tests import programs, small_networks
from tests.programs import one_line
from tests.small_training import assert_same_bits

SETTINGS = {
    "crop": 32, "batch": 4, "window": 32, "overlap": 8, "epochs": 10, "epoch_steps": 4, "self_rounds": 2, "self_epochs": 1,
    "extra_rounds": 2, "first_extra_epochs": 1, "extra_epochs": 1, "min_area": 5, "edge_px": 1, "learning_rate": 1e-2, "threads": 1,
    "stop_iou": 1, "folds": 2, "fold_mode": "easy", "network": "unet", "second_network": "unet",
}  # fmt: skip
FIRST, ROUND = 40, 4  # steps on the boxes, and of each round after it


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the program expects it, and it writes nothing."""


def draw(path, *, cells, seed):
    """Dark discs on light noise, 48 x 56; most of them are annotated."""
    random = np.random.default_rng(seed)
    image, boxes = random.integers(180, 230, (48, 56, 3)), []
    y, x = np.mgrid[:48, :56] + 0.5
    for cx, cy in [(10, 10), (30, 12), (46, 30), (14, 36)][:cells]:
        image[np.hypot(x - cx, y - cy) < 7] = (90, 40, 120)
        boxes.append((cx - 7, cy - 7, cx + 7, cy + 7))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image.astype(np.uint8)).save(path)
    return boxes


def annotate(path, boxes):
    write_boxes(path, Boxes(np.array(boxes, float), np.full(len(boxes), np.nan)), image=path.stem, width=56, height=48)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Images for every run, and a network that compiles in seconds."""
    folder = tmp_path_factory.mktemp("runs")
    for number in range(4):
        boxes = draw(folder / "data" / "sig-train-pos" / f"pos {number}.png", cells=4, seed=number)
        annotate(folder / "data" / "sig-train-pos" / f"pos {number}.xml", boxes[: 3 + number % 2])
        draw(folder / "data" / "sig-train-neg" / f"neg {number}.png", cells=0, seed=9 + number)
    for number in range(2):
        draw(folder / "unlabelled" / f"region {number}.png", cells=4, seed=20 + number)
    patch = pytest.MonkeyPatch()
    patch.setattr(starting, "random_network", small_network)
    with programs.several_runs(folder / "compiled"):
        yield folder
    patch.undo()


def small_network(*, backbone, classes, key, changes):
    net = zoo.architecture("unet", source="original", classes=classes, widths=(4, 8), batch_norm=True, **changes)
    return net, zoo.init(net, key)


def start(runs, workdir, **changes):
    values = {"data": runs / "data", "workdir": runs / workdir, **SETTINGS, **changes}
    with programs.imported("cell_detection") as module:
        return programs.start(module, **{name: value for name, value in values.items() if value is not None})


@pytest.fixture(scope="module")
def cooperative(runs):
    """A cooperative run, and what its models did in which order."""
    events, steps, train, predictor = [], {}, Learner.train, Learner.predictor

    def noted_train(self, sources, until):
        events.append(("train", self.name, self.step, until))
        train(self, sources, until)
        steps.setdefault(self.name, set()).add(self._step._cache_size())

    def noted_predictor(self):
        events.append(("predict", self.name, self.step))
        return predictor(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Learner, "train", noted_train)
        patch.setattr(Learner, "predictor", noted_predictor)
        outcome = start(runs, "cooperative", training="cooperative", unlabelled=runs / "unlabelled")
    assert outcome.status == 0, outcome.err
    assert all(len(sizes) == 1 for sizes in steps.values())  # no round compiles again
    return runs / "cooperative", events, outcome


def listed(workdir, number, kind, model):
    return json.loads((workdir / "rounds" / f"{number:02d}_{kind}" / f"{model}.json").read_text())


def test_a_run_leaves_model_masks_numbers_and_report(cooperative, runs):
    workdir, _, outcome = cooperative
    end = FIRST + 4 * ROUND
    assert f"finished: cooperative, step {end}" in outcome.out
    for model in ("0_unet", "1_unet"):
        found = [listed(workdir, n, k, model) for n, k in enumerate(["boxes", "self", "self", "extra", "extra"])]
        assert [r["until"] for r in found] == [FIRST, *range(FIRST + ROUND, end + 1, ROUND)]
        assert [r["begin"] for r in found] == [0, *(r["until"] for r in found[:-1])]
        assert found[0]["iou"] is None and 0 < found[1]["iou"] <= 1
        assert set(found[3]["cells"]) == {"region 0", "region 1"}
        for r, (number, kind) in zip(found, enumerate(["boxes", "self", "self", "extra", "extra"])):
            masks = (workdir / "rounds" / f"{number:02d}_{kind}" / model).glob("*.png")
            assert r["inner"] == pytest.approx(np.mean([read_mask(path) == INNER for path in masks]))
            assert kind == "boxes" or f"{model}, {number:02d}_{kind}: {r['inner']:.1%} of the masks" in outcome.out
    metrics = json.loads((workdir / "metrics.json").read_text())
    assert metrics["images"]["annotated"] == metrics["images"]["normal"] == 2 and metrics["images"]["held out"] == 4
    assert metrics["instance recall"]["value"] > 0.5 and "FROC (mean recall)" in metrics
    assert len(list((workdir / "detections").glob("*.xml"))) == 4
    page = (workdir / "report.html").read_text()
    assert metrics["rounds"]["1_unet"][4]["inner"] == found[4]["inner"]
    assert (
        f"04_extra {found[4]['inner']:.1%}" in page
        and "paper, CT (easy)" in page
        and "pictures/held_out/pos" in page
        and "Cell detection" in page
    )


def test_masks_are_merged_with_the_boxes(cooperative, runs):
    workdir, _, _ = cooperative
    images = {image.name: image for image in read_cell_images(runs / "data").images}
    for path in (workdir / "rounds" / "02_self" / "0_unet").glob("*.png"):
        image, mask = images[path.stem], read_mask(path)
        annotated = target_mask(image.boxes, 48, 56, edge_share=0.1, edge_px=1)
        assert (mask[annotated == INNER] == INNER).all() and (mask[annotated > 0] > 0).all()
        assert len(read_boxes(path.with_suffix(".xml"))) >= 2


def test_both_models_predict_before_either_is_trained(cooperative):
    _, events, _ = cooperative
    together = FIRST + 2 * ROUND
    alone = max(n for n, event in enumerate(events) if event[0] == "train" and event[3] == together)
    expected = [("predict", "1_unet", together)]  # held-out images, after the last round that each does by itself
    for begin in (together, together + ROUND):
        expected += [("predict", "1_unet", begin), ("predict", "0_unet", begin)]  # each learns from the other
        for model in ("0_unet", "1_unet"):
            expected += [("train", model, begin, begin + ROUND), ("predict", model, begin + ROUND)]
    assert events[alone + 1 :] == [*expected, ("predict", "0_unet", together + 2 * ROUND)]


def test_a_killed_run_ends_bit_for_bit_as_one_that_was_not(cooperative, runs, monkeypatch):
    """While masks are written, and inside a round of exchange, when one model has been trained and the other begun."""
    log, write, written = Workdir.log, rounds.write_boxes, []

    def log_until_killed(self, stage, step, row):
        log(self, stage, step, row)
        if stage == "1_unet" and step == FIRST + 2 * ROUND + 2:
            raise Killed

    def write_until_killed(path, *boxes, **about):
        written.append(path)
        if len(written) == 2:
            raise Killed
        write(path, *boxes, **about)

    for place, name, killer in ((rounds, "write_boxes", write_until_killed), (Workdir, "log", log_until_killed)):
        with monkeypatch.context() as patched:
            patched.setattr(place, name, killer)
            with pytest.raises(Killed):
                start(runs, "killed", training="cooperative", unlabelled=runs / "unlabelled")
    assert not (runs / "killed" / "model.json").exists()
    before = {path: path.stat().st_mtime_ns for path in (runs / "killed" / "rounds").rglob("*.png")}
    assert start(runs, "killed", training="cooperative", unlabelled=runs / "unlabelled").status == 0
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())  # no round was repeated
    whole = cooperative[0]
    for file in [
        "weights.npz",
        "model.json",
        "metrics.json",
        *(p.relative_to(whole) for p in (whole / "rounds").rglob("*.*")),
    ]:
        assert (runs / "killed" / file).read_bytes() == (whole / file).read_bytes(), file


def test_the_model_comes_back(cooperative, runs, tmp_path):
    workdir, _, _ = cooperative
    found = CellModel.load(workdir)
    assert (found.window, found.overlap, found.threshold, found.min_area) == (32, 8, 0.5, 5) and 0 < found.spread < 1
    with pytest.raises(WorkdirError, match="one of cell detection"):
        Model.load(workdir)
    copy = shutil.copytree(workdir, tmp_path / "copy", ignore=shutil.ignore_patterns("models", "rounds"))
    card = json.loads((copy / "model.json").read_text())
    (copy / "model.json").write_text(json.dumps({**card, "checksum": "0"}))
    with pytest.raises(WorkdirError, match="checksum differs"):
        CellModel.load(copy)
    (copy / "model.json").write_text(json.dumps({**card, "kind": "another"}))
    with pytest.raises(WorkdirError, match="no model of cell detection"):
        CellModel.load(copy)


def test_windows_are_averaged_where_they_overlap(cooperative):
    model = CellModel.load(cooperative[0])
    scorer = CellScorer(model.architecture, window=32, overlap=8, mesh=make_mesh())
    folded = scorer.fold(model.variables)
    image = np.random.default_rng(0).integers(0, 256, (40, 72, 3), dtype=np.uint8)
    probability = jax.jit(make_probability(model.architecture))
    total, count = np.zeros((40, 72, 3)), np.zeros((40, 72, 1))
    for top in (0, 8):
        for left in (0, 24, 40):
            total[top : top + 32, left : left + 32] += probability(
                folded, image[None, top : top + 32, left : left + 32]
            )[0]
            count[top : top + 32, left : left + 32] += 1
    np.testing.assert_allclose(scorer.probabilities(folded, image), total / count, atol=1e-5)
    small = scorer.probabilities(folded, image[:20, :10])
    assert small.shape == (20, 10, 3) and np.isfinite(small).all()


def test_a_finished_run_is_left_alone(cooperative, runs):
    outcome = start(runs, "cooperative", training="cooperative", unlabelled=runs / "unlabelled")
    assert outcome.status == 0 and "finished before" in outcome.out


def test_self_training_stops_when_masks_stop_growing(runs, monkeypatch):
    """And masks that are cells all over are told; of rounds that an older version listed, their share is found again."""
    monkeypatch.setattr(rounds, "MOST_INNER", 0.0)
    given = {"training": "self_extra", "unlabelled": runs / "unlabelled", "stop_iou": 0.01}
    outcome = start(runs, "stopped", **given)
    assert outcome.status == 0, outcome.err
    metrics = json.loads((runs / "stopped" / "metrics.json").read_text())
    assert "cells, or most cells had no box. Look at rounds/01_self/0_unet" in outcome.out
    assert any(note.startswith("0_unet, 01_self: ") for note in metrics["notes"])
    for listing in (runs / "stopped" / "rounds").glob("*/0_unet.json"):
        kept = {name: value for name, value in json.loads(listing.read_text()).items() if name != "inner"}
        listing.write_text(json.dumps(kept))
    (runs / "stopped" / "metrics.json").unlink()
    assert start(runs, "stopped", **given).status == 0
    assert json.loads((runs / "stopped" / "metrics.json").read_text()) == metrics
    found = listed(runs / "stopped", 1, "self", "0_unet")
    assert found["stopped"] and found["until"] == found["begin"] == FIRST
    assert not (runs / "stopped" / "rounds" / "02_self").exists()
    assert listed(runs / "stopped", 3, "extra", "0_unet")["begin"] == FIRST


def test_masks_that_are_cells_all_over_or_nowhere_are_told(tmp_path):
    def found(*inner):
        parts = [f"{n:02d}_self" for n in range(len(inner))]
        return [rounds.Round(tmp_path / p / "a", 0, 1, None, False, {}, share) for p, share in zip(parts, inner)]

    assert rounds.doubts("a", found(0.1, 0.3, 0.31, 0.1)) == [
        "a, 02_self: 31.0% of the masks is inner region, 10.0% where the boxes are: it takes too much for cells, or most cells had no "
        "box. Look at rounds/02_self/a"
    ]
    (nothing,) = rounds.doubts("a", found(0.1, 0.0))
    assert nothing == "a, 01_self: no image holds a cell by the masks: all are trained on as background"
    assert len(rounds.doubts("a", found(0.4, 0.5, 0.51))) == 1 and not rounds.doubts("a", found(0.9))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"training": "self", "workdir": "cooperative"}, "training: 'cooperative' there, 'self' asked for"),
        ({"training": "cooperative"}, "needs regions that nobody annotated: give --unlabelled"),
        ({"training": "self", "second_pretrained": "x.pth"}, "--second_pretrained is of the second network"),
        ({"training": "self_extra", "unlabelled": "nowhere"}, "nowhere: no such folder of unlabelled images"),
        ({"training": "full", "data": "nowhere"}, "nowhere: no such folder"),
        ({"training": "full", "folds": 9}, "9 folds of 8 images from 8 independent groups"),
        ({"training": "full", "crop": 40}, "--crop=40 must be a multiple of 32"),
        ({"training": "full", "batch": 6}, "--batch=6 cannot be split over 4 devices"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(cooperative, runs, changes, words):
    changes = {"workdir": f"refused {list(changes)[-1]}", **changes}
    assert words in one_line(start(runs, **changes))


def test_tables_of_groups_that_do_not_fit_are_refused(runs):
    """Of other images; with a split test, which folds would train on."""
    for row, words in (
        ("i1.png,test", "groups.csv: none of its 1 rows is of an image, the first of which is pos 0"),
        ("pos 1.png,test", "--folds=2 would train on images of the split test (pos 1): leave --folds away"),
    ):
        (runs / "groups.csv").write_text(f"image,split\n{row}\n")
        assert words in one_line(start(runs, f"refused {row[:2]}", training="full", groups=runs / "groups.csv"))


def test_other_images_need_another_work_directory(cooperative, runs, tmp_path):
    """Even where the flags are the same."""
    copy = shutil.copytree(cooperative[0], tmp_path / "run")
    (copy / "metrics.json").unlink()
    data = shutil.copytree(runs / "data", tmp_path / "data")
    annotate(data / "sig-train-pos" / "pos 0.xml", [(1, 1, 9, 9)])
    outcome = start(runs, copy, data=data, training="cooperative", unlabelled=runs / "unlabelled")
    assert "images: " in one_line(outcome)


def test_published_weights_of_the_whole_network(tmp_path, monkeypatch):
    """The last layer is made anew; files of other networks are refused."""
    unet = small_networks.architecture("unet", source="milesial", classes=3)
    variables = small_networks.variables(unet)
    file = tmp_path / "unet.npz"
    np.savez(file, **pretrained.export(variables, unet, "milesial"))
    monkeypatch.setattr(pretrained, "source_conventions", lambda *_, **__: unet)
    given = {"source": "milesial", "dtype": "float32", "key": jax.random.key(0)}
    net, found = starting.starting_network("unet", str(file), **given)
    assert net == unet
    ours, theirs = ({k: v for k, v in tree["params"].items() if k != "classifier"} for tree in (found, variables))
    assert_same_bits(ours, theirs)
    np.savez(file, **{"strange.weight": np.zeros(3)})
    with pytest.raises(UsageError, match="is not weights for unet: "):
        starting.starting_network("unet", str(file), **given)


def test_held_out_slides_lend_no_unlabelled_regions(runs):
    """Of a cohort's split, of a fold of slides; a fold of images stands for no slide."""
    images = read_cell_images(runs / "data").images
    regions = [
        dataclasses.replace(images[0], name=name, kind="unlabelled") for name in ("pos 0-lv0-1", "new-lv0-1", "pos 1")
    ]
    groups = {"pos 0": {"split": "test"}, "new-lv0-1": {"split": "test"}}
    with programs.imported("cell_detection") as module:
        train, held_out = module.divide(Config(), images, groups)
        assert [image.name for image in held_out] == ["pos 0"] and len(train) == len(images) - 1

        def usable(config, groups):
            return [image.name for image in module.usable_regions(config, regions, images, held_out, groups)]

        assert usable(Config(training="full"), groups) == []
        assert usable(Config(training="full"), {}) == ["new-lv0-1"]
        assert usable(Config(folds=2, fold_mode="easy"), {}) == ["pos 0-lv0-1", "new-lv0-1"]
        with pytest.raises(UsageError, match="all 3 unlabelled regions are annotated images or of held-out slides"):
            usable(Config(), groups)


SQUARES = [(300.0, 310.0), (700.0, 720.0)]  # corners of drawn cells, level-0 pixels


def test_a_cohort_of_slides_is_trained_on(runs, tmp_path):
    """Three slides, the last of them held out by its split; a fourth cannot be opened, which the report says."""
    records = []
    for number, (name, label, split) in enumerate(
        [("with", "srcc", "train"), ("without", "benign", "train"), ("held", "srcc", "test"), ("bad", "srcc", "train")]
    ):
        path, annotation = tmp_path / f"{name}.tiff", None
        if name == "bad":
            path.write_bytes(b"no slide")
        else:
            write_pyramid(path, programs.tissue(1024, seed=number), mpp=0.25, levels=2)
        if label == "srcc":
            annotation = tmp_path / f"{name}.xml"
            annotate(annotation, [(x, y, x + 14, y + 14) for x, y in SQUARES])
        records.append(SlideRecord(name, path, label, f"p{number}", split, annotation=annotation))
    write_cohort(tmp_path / "cohort.csv", records)
    given = {
        "data": tmp_path / "cohort.csv",
        "training": "full",
        "epochs": 1,
        "folds": 0,
        "region_px": 64,
        "regions": 2,
    }
    outcome = start(runs, tmp_path / "run", unlabelled=runs / "unlabelled", **given)
    assert outcome.status == 0, outcome.err
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["images"] == {"annotated": 2, "boxes": 2, "normal": 2, "unlabelled": 0, "held out": 2}
    page = (tmp_path / "run" / "report.html").read_text()
    for words in ("left out: slide bad: ", "is not used: --training=full trains on annotated images"):
        assert words in outcome.out and words in page and any(words in note for note in metrics["notes"])
