"""The command that a user runs: every stage on drawn slides, killed and continued, judged; lists of patches; its refusals."""

import csv
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from data_pipelines.annotations import write_asap_xml
from data_pipelines.lesion_masks import read_mask
from data_pipelines.polygons import Shape
from data_pipelines.pyramids import write_pyramid
from data_pipelines.slides import open_slide
from experiments.run.screening import fitting, gates
from experiments.run.screening.judging import read_results
from experiments.run.screening.model import ScreeningModel
from experiments.run.workdir import Workdir, WorkdirError
from srcc_jax.methods.gastric_screening import MODELS, Config
from srcc_jax.models import zoo
from srcc_jax.train import fit
from tests import programs
from tests.small_training import assert_same_bits

SPLITS = {"train": (3, 3), "validation": (2, 2), "test": (2, 3)}  # malignant and benign slides
SIDE, MPP = 384, 1.0
SETTINGS = {
    "model": "tiny", "tile": 64, "stride": 64, "mpp": MPP, "mask_mpp": 2.0, "top_k": 8, "width": 16, "thumbnail": 64,
    "foreground_epochs": 2, "multitask_epochs": 4, "screening_epochs": 20, "blur_epochs": 2, "foreground_batch": 4,
    "multitask_batch": 8, "screening_batch": 4, "blur_batch": 8, "blur_side": 32, "blur_patches": 3, "threads": 1,
    "learning_rate": 3e-3, "noise": 2, "contrast": 0.05, "plateau_patience": 0,
}  # fmt: skip


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the program expects it, and it writes nothing."""


def draw_slide(path, random, *, lesion, tissue=SIDE - 64):
    """Pink tissue with fine noise; lesion is dark, with a hole in it. Returns its outline, drawn too wide, over the glass."""
    rgb = np.full((SIDE, SIDE, 3), 243, np.uint8)
    rgb[:tissue, :tissue] = random.integers((170, 90, 150), (230, 140, 210), (tissue, tissue, 3))
    if lesion:
        rgb[200:tissue, 200:tissue] = random.integers((60, 20, 90), (110, 60, 150), (tissue - 200, tissue - 200, 3))
    write_pyramid(path, rgb, mpp=MPP, compression="lzw")
    outline = np.array([(200, 200), (350, 200), (350, 350), (200, 350)], float)
    hole = np.array([(210, 210), (230, 210), (230, 230), (210, 230)], float)
    return Shape("polygon", outline, (hole,), name="lesion", group="lesion")


def draw_cohort(folder):
    random, rows = np.random.default_rng(0), []
    for split, counts in SPLITS.items():
        for label, count in zip(("malignant", "benign"), counts):
            for number in range(count):
                name = f"{split}_{label}_{number}"
                shape = draw_slide(folder / f"{name}.tiff", random, lesion=label == "malignant")
                annotation = ""
                if label == "malignant":
                    annotation = f"{name}.xml"
                    write_asap_xml(folder / annotation, [shape])
                rows.append(
                    f"{name},{name}.tiff,{label},{name},{split},{annotation},{'AB'[number % 2]},2018,{label[:3]}"
                )
    header = "slide_id,path,label,patient_id,split,annotation,site,year,subtype"
    white = np.full((SIDE, SIDE, 3), 243, np.uint8)
    write_pyramid(folder / "empty.tiff", white, mpp=MPP)
    rows.append("empty,empty.tiff,benign,empty,test,,A,2018,ben")
    (folder / "cohort.csv").write_text("\n".join([header, *rows]) + "\n")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What every run starts from, and a cache so that the second compiles nothing."""
    folder = tmp_path_factory.mktemp("runs")
    draw_cohort(folder)
    with programs.several_runs(folder / "compiled"):
        yield folder


def start(runs, workdir, **changes):
    values = {"cohort": runs / "cohort.csv", "workdir": runs / workdir, **SETTINGS, **changes}
    with programs.imported("gastric_screening") as module:
        return programs.start(module, **{name: value for name, value in values.items() if value is not None})


@pytest.fixture(scope="module")
def whole(runs):
    outcome = start(runs, "whole")
    assert outcome.status == 0, outcome.err
    return runs / "whole", outcome


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_leaves_a_model_and_tables(whole):
    workdir, outcome = whole
    assert outcome.out.splitlines()[-1] == f"finished: {workdir}"
    result = read_results(workdir / "metrics.json")
    slides = result["slides"]
    assert (slides["slides"], slides["positive"]) == (5, 2)  # the empty one has no verdict
    assert slides["fixed"]["threshold"] == 0.74 and slides["ROC AUC"].value == 1
    assert result["patches"]["Dice of pixels"] > 0.5 and result["patches"]["ROC AUC"].value > 0.9
    assert [(row["site"], row["total"]) for row in result["sites"]] == [("A", 3), ("B", 2)]
    assert {row["column"] for row in result["errors"]} == {"site", "year", "subtype"}
    table = rows_of(workdir / "slides.csv")
    assert {row["label"] for row in table} == {"malignant", "benign"} and table[0]["site"] in "AB"
    largest = result["largest patch"]  # the baseline: no second network
    logits = {}
    for name in (row["slide_id"] for row in table):
        with np.load(workdir / "features" / f"{name}.npz") as file:
            logits[name] = float(file["logit"].max())
    highest = sorted(table, key=lambda row: logits[row["slide_id"]])[-2:]
    assert {row["label"] for row in highest} == {"malignant"} and largest["ROC AUC"].value == 1
    text = (workdir / "tables.md").read_text()
    assert "| largest patch alone, tiny, here at the validation threshold |" in text
    for words in ("here at 0.74", "ResNet-34, paper", "0.8331 ± 0.0101", "SGH, paper", "falsely called"):
        assert words in text
    page = (workdir / "report.html").read_text()
    for words in ("sensitivity at the fixed threshold", "average precision", "Receiver operating", "empty: no tile"):
        assert words in page
    assert (workdir / "failed_slides.csv").read_text().count("empty,") == 1


def test_refined_masks_are_the_stained_part_of_the_outline(whole):
    workdir, _ = whole
    rows = rows_of(workdir / "refine.csv")
    assert len(rows) == 7
    tissue, hole = (SIDE - 64 - 200) ** 2, 20**2
    for row in rows:
        assert float(row["outlined_mm2"]) == pytest.approx((150**2 - hole) * 1e-6, rel=1e-3)
        assert float(row["kept_mm2"]) == pytest.approx((tissue - hole) * 1e-6, rel=0.03)
        assert read_mask(workdir / "masks" / f"{row['slide_id']}.tiff").shape == (SIDE // 2, SIDE // 2)


def test_the_screening_network_is_that_of_the_last_epoch_and_others_of_the_least_loss(whole):
    workdir, _ = whole
    kept = json.loads((workdir / "model.json").read_text())["about"]["steps"]
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    of = {name: [row for row in rows if row["stage"] == name and fitting.METRIC in row] for name in kept}
    assert kept["screening"] == of["screening"][-1]["step"]
    assert kept["multitask"] == min(of["multitask"], key=lambda row: row[fitting.METRIC])["step"]


def test_the_learning_rate_follows_the_recorded_losses(whole):
    workdir, _ = whole
    plateau = Config(learning_rate=3e-3, plateau_patience=0).plateau
    for stage in ("foreground", "multitask", "screening", "blur"):
        rows = [row for row in Workdir(workdir).history(stage) if "validation_loss" in row]
        losses = [row["validation_loss"] for row in rows]
        for number, row in enumerate(rows):
            assert row["learning_rate"] == pytest.approx(plateau.rate(losses[:number]), rel=1e-6)


def test_features_are_those_of_the_most_malignant_patches(whole):
    workdir, _ = whole
    for name, lesion in (("test_malignant_0", True), ("test_benign_0", False)):
        with np.load(workdir / "features" / f"{name}.npz") as file:
            assert len(file["logit"]) == min(8, int(file["tiles"])) and file["features"].shape[1] == 16
            assert (np.diff(file["logit"]) <= 0).all()
            if lesion:
                assert file["x"][0] >= 192 and file["y"][0] >= 192


def test_the_model_on_disk_is_the_trained_networks(whole, tmp_path):
    workdir, _ = whole
    model = ScreeningModel.load(workdir)
    assert set(model.variables) == {"patches", "screening", "foreground", "blur"}
    assert model.architecture.name == MODELS["tiny"][0] and (model.positive, model.grid.tile) == ("malignant", 64)
    assert (model.screening.threshold, model.screening.features, model.gates.blur_side) == (0.74, 16, 32)
    thresholds = json.loads((workdir / "metrics.json").read_text())["thresholds"]
    assert thresholds == {"fixed": 0.74, "validation": model.screening.validation_threshold}
    found = zoo.build(model.architecture).apply(model.variables["patches"], np.zeros((1, 64, 64, 3)), train=False)
    assert found["dense"].shape == (1, 64, 64, 1)
    shutil.copytree(workdir, tmp_path / "other", ignore=shutil.ignore_patterns("masks", "features", "tiles"))
    card = json.loads((tmp_path / "other" / "model.json").read_text())
    (tmp_path / "other" / "model.json").write_text(json.dumps({**card, "checksum": "0"}))
    with pytest.raises(WorkdirError, match="their checksum differs"):
        ScreeningModel.load(tmp_path / "other")
    with pytest.raises(WorkdirError, match="holds no model of gastric screening"):
        ScreeningModel.load(workdir / "blur")


def test_the_same_command_again_does_nothing_new(runs, whole):
    workdir, first = whole
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("weights.npz")}
    log = (workdir / "metrics.jsonl").read_bytes()
    again = start(runs, "whole")
    assert again.status == 0 and (workdir / "metrics.jsonl").read_bytes() == log
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("weights.npz")} == before
    assert [line for line in again.out.splitlines() if line.startswith("|")] == [
        line for line in first.out.splitlines() if line.startswith("|")
    ]


def test_killed_at_any_place_a_run_ends_with_the_same_bits(runs, whole, monkeypatch):
    """Killed twice within epochs, once while features are made, stage by stage and all together."""
    moments = iter([3, 17, 40])
    moment = next(moments)
    steps = 0

    def dying(step_fn, *rest, **options):
        def step(state, batch):
            nonlocal steps
            steps += 1
            if steps == moment:
                raise Killed
            return step_fn(state, batch)

        return fit(step, *rest, **options)

    monkeypatch.setattr(fitting, "fit", dying)
    kills = 0
    for _ in range(4):
        try:
            outcome = start(runs, "killed")
        except Killed:
            kills, moment = kills + 1, next(moments, -1)
            steps = moment if moment < 0 else steps
            continue
        break
    assert kills == 3 and outcome.status == 0, outcome.err
    mine, theirs = (ScreeningModel.load(runs / name) for name in ("killed", "whole"))
    assert_same_bits(mine.variables, theirs.variables)
    assert (runs / "killed" / "slides.csv").read_bytes() == (runs / "whole" / "slides.csv").read_bytes()


def test_stages_go_one_by_one(runs, whole):
    workdir = runs / "stages"
    early = programs.one_line(start(runs, "stages", stage="features"))
    assert "run --stage=multitask first" in early
    written = start(runs, "stages", stage="blur").out
    assert f"blur: {workdir / 'blur' / 'weights.npz'}: step " in written and "validation auc" in written
    shutil.copytree(runs / "whole" / "multitask", workdir / "multitask")
    shutil.copytree(runs / "whole" / "masks", workdir / "masks")
    assert start(runs, "stages", stage="features").status == 0
    assert start(runs, "stages", stage="screening").status == 0
    mine, theirs = (np.load(runs / name / "screening" / "weights.npz") for name in ("stages", "whole"))
    for name in theirs:
        np.testing.assert_array_equal(mine[name], theirs[name])
    assert not (workdir / "model.json").exists() and not (workdir / "metrics.json").exists()


def test_a_corrected_annotation_is_refined_again_and_not_mixed_with_the_old(runs, whole):
    shutil.copytree(runs / "whole", runs / "corrected")
    (runs / "corrected" / "metrics.json").unlink()
    annotation = runs / "train_malignant_0.xml"
    before = annotation.read_bytes()
    try:
        smaller = np.array([(240, 240), (350, 240), (350, 350), (240, 350)], float)
        write_asap_xml(annotation, [Shape("polygon", smaller, name="a", group="lesion")])
        assert start(runs, "corrected", stage="refine").status == 0
        row = next(row for row in rows_of(runs / "corrected" / "refine.csv") if row["slide_id"] == "train_malignant_0")
        assert float(row["earlier_mm2"]) > float(row["kept_mm2"]) and 0.5 < float(row["dice_with_earlier"]) < 0.9
        refused = programs.one_line(start(runs, "corrected", stage="multitask"))
        assert "begun on other examples" in refused and "give another --workdir" in refused
    finally:
        annotation.write_bytes(before)


def files_of(workdir, *names):
    return {name: (workdir / name).read_bytes() for name in names}


def same_networks(workdir, *names):
    """The saved model's networks are those that the stages left."""
    with np.load(workdir / "weights.npz") as saved:
        for name in names:
            with np.load(workdir / name / "weights.npz") as stage:
                prefix = "patches" if name == "multitask" else name
                for leaf in stage:
                    np.testing.assert_array_equal(saved[f"{prefix}/{leaf}"], stage[leaf])


def test_what_another_network_made_is_made_again(runs, whole):
    """Annotations are corrected, and what the errors advise to remove is removed."""
    workdir = runs / "remade"
    shutil.copytree(whole[0], workdir)
    names = ("features/test_malignant_0.npz", "weights.npz", "metrics.json")
    before = files_of(workdir, *names)
    annotations = {runs / f"train_malignant_{number}.xml" for number in range(3)}
    kept = {path: path.read_bytes() for path in annotations}
    try:
        smaller = np.array([(240, 240), (350, 240), (350, 350), (240, 350)], float)
        for path in annotations:
            write_asap_xml(path, [Shape("polygon", smaller, name="a", group="lesion")])
        assert start(runs, "remade", stage="refine").status == 0
        shutil.rmtree(workdir / "multitask")
        alone = start(runs, "remade", stage="multitask")
        assert "metrics.json and weights.npz are of another multitask network: --stage=all" in alone.out
        assert "run --stage=features first" in programs.one_line(start(runs, "remade", stage="screening"))
        refused = start(runs, "remade")
        assert "15 files are of another multi-task network" in refused.out, refused
        assert "screening: the stage was begun on other examples" in programs.one_line(refused)
        shutil.rmtree(workdir / "screening")
        outcome = start(runs, "remade")
    finally:
        for path, content in kept.items():
            path.write_bytes(content)
    assert outcome.status == 0 and "of another multitask and screening network: judged again" in outcome.out
    after = files_of(workdir, *names)
    assert all(after[name] != before[name] for name in names)
    same_networks(workdir, "multitask", "screening", "foreground", "blur")


def test_pairs_are_sorted_by_hand_before_the_foreground_network_learns(runs, whole):
    workdir = runs / "sorted"
    assert start(runs, "sorted", stage="pairs").status == 0 and not (workdir / "foreground").exists()
    shutil.copytree(whole[0], workdir, dirs_exist_ok=True)
    before = files_of(workdir, "weights.npz", "slides.csv")
    wrong = [workdir / "pairs" / kind / "train_malignant_0.png" for kind in ("tissue", "thumbnails")]
    for file in wrong:
        file.unlink()
    assert "begun on other examples" in programs.one_line(start(runs, "sorted", stage="foreground"))
    shutil.rmtree(workdir / "foreground")
    outcome = start(runs, "sorted")
    assert outcome.status == 0 and f"pairs: 14 in {workdir / 'pairs'}" in outcome.out, outcome
    assert not any(file.exists() for file in wrong)
    after = files_of(workdir, "weights.npz", "slides.csv")
    assert after["weights.npz"] != before["weights.npz"] and after["slides.csv"] == before["slides.csv"]
    same_networks(workdir, "foreground", "multitask")


def test_a_run_of_an_older_version_stands(runs, whole):
    """It has no record of its networks, and its pairs are in the folder of the stage."""
    workdir = runs / "older"
    shutil.copytree(whole[0], workdir)
    for file in (workdir / "made_from.json", workdir / "features" / "made_from.json", workdir / "pairs" / "pairs.csv"):
        file.unlink()
    for kind in ("tissue", "thumbnails"):
        shutil.move(workdir / "pairs" / kind, workdir / "foreground" / kind)
    (workdir / "pairs").rmdir()
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*.npz")}
    outcome = start(runs, "older")
    assert outcome.status == 0 and outcome.out.count("of an older version, taken to be") == 2, outcome
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*.npz")} == before
    assert not (workdir / "pairs").exists() and (workdir / "made_from.json").exists()
    again = start(runs, "older")
    assert again.status == 0 and "older version" not in again.out


def test_refining_needs_no_labels_and_tells_what_is_worth_a_look(runs, tmp_path):
    outside = np.array([(330, 330), (380, 330), (380, 380), (330, 380)], float)
    write_asap_xml(tmp_path / "glass.xml", [Shape("polygon", outside, name="a", group="lesion")])
    Image.fromarray(np.zeros((96, 96), np.uint8)).save(tmp_path / "empty.png")
    xml = runs / "train_malignant_0.xml"
    rows = [("good", "", xml), ("glass", "", "glass.xml"), ("empty", "malignant", "empty.png"), ("odd", "benign", xml)]
    slides, table = sorted(runs.glob("*_malignant_*.tiff"))[:4], tmp_path / "new.csv"
    lines = [f"{name},{slide},{label},{file}" for slide, (name, label, file) in zip(slides, rows)]
    table.write_text("\n".join(["slide_id,path,label,annotation", *lines]) + "\n")
    outcome = start(runs, "new", cohort=table, stage="refine")
    assert outcome.status == 0, outcome.err
    notes = {row["slide_id"]: row["note"] for row in rows_of(runs / "new" / "refine.csv")}
    assert notes == {
        "good": "",
        "glass": "none of its outlines is on stained tissue",
        "empty": "nothing is outlined",
        "odd": "outlined, but its label is benign: the outlines are ignored, its tiles count as benign",
    }
    assert "look at: odd: outlined" in outcome.out and "look at: good" not in outcome.out
    table.write_text("\n".join(["slide_id,path,label,annotation", f"good,{slides[0]},malignant,{xml}"]) + "\n")
    assert start(runs, "positive", cohort=table, stage="refine").status == 0


def write_patches(folder):
    """Dark squares are lesion; a malignant patch without any, and one whose mask is empty, are among them."""
    random, rows = np.random.default_rng(5), []
    for number in range(24):
        image = random.integers((170, 90, 150), (230, 140, 210), (32, 32, 3)).astype(np.uint8)
        mask = np.zeros((32, 32), np.uint8)
        malignant = number % 2 == 0
        if malignant and number not in (0, 2):
            mask[8:24, 8:24] = 1
            image[8:24, 8:24] //= 3
        Image.fromarray(image).save(folder / f"p{number}.png")
        Image.fromarray(mask).save(folder / f"m{number}.png")
        name = "" if number == 0 else f"m{number}.png"
        rows.append(f"p{number}.png,{'malignant' if malignant else 'benign'},{name},s{number // 2}_{number % 2}")
    (folder / "patches.csv").write_text("\n".join(["path,label,mask,slide_id", *rows]) + "\n")
    return folder / "patches.csv"


@pytest.mark.parametrize("model", ["tiny", "tiny_single"])
def test_patches_with_masks_are_enough_for_the_multi_task_network(runs, tmp_path, model):
    listing = write_patches(tmp_path)
    shape = {"model": model, "tile": 32, "multitask_epochs": 3, "repeats": 2}
    outcome = start(runs, f"patches_{model}", cohort=None, patches=listing, **shape)
    assert outcome.status == 0, outcome.err
    found = [read_results(runs / f"patches_{model}" / f"repeat_{number}" / "metrics.json") for number in (0, 1)]
    for result in found:
        assert sum(sum(kinds.values()) for kinds in result["examples"].values()) == 24
        assert ("Dice of pixels" in result["patches"]) == (model == "tiny")
    assert found[0]["examples"].keys() == {"train", "validation", "test"}
    assert "±" in (runs / f"patches_{model}" / "tables.md").read_text()


def test_what_does_not_fit_is_one_line(runs, tmp_path):
    listing = write_patches(tmp_path)
    for changes, words in (
        ({"patches": listing}, "give one of --cohort (slides) and --patches"),
        ({"cohort": None, "patches": listing, "stage": "blur"}, "--stage=blur needs slides"),
        ({"tile": 50}, "--tile=50 must be a multiple of 32"),
        ({"positive": "srcc"}, "has no positive slide"),
        ({"screening_batch": 6}, "every batch must be a multiple of 4"),
        ({"pretrained": listing}, "patches.csv"),
    ):
        assert words in programs.one_line(start(runs, "refused", **changes))


def test_the_foreground_network_finds_tissue_on_a_slide(runs, whole):
    model = ScreeningModel.load(whole[0])
    truth = np.zeros((48, 48), bool)
    truth[:40, :40] = True
    finder = gates.ForegroundFinder(model.variables["foreground"], model.gates)
    with open_slide(runs / "test_benign_0.tiff") as slide:
        rows = gates.tissue_agreement(finder, slide, truth)
        assert finder.mask(slide, shape=(7, 9)).shape == (7, 9)
    found = {row["method"]: row["IoU"] for row in rows}
    assert found["otsu threshold"] > 0.9 and set(found) == {
        "foreground network", "otsu threshold", "stain threshold", "saturation threshold",
    }  # fmt: skip
