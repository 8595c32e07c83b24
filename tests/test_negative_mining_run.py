"""The command that a user runs: trained on drawn patches, killed and continued; tiles from folders and slides; ablations; refusals."""

import csv
import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from data_pipelines.annotations import write_asap_xml
from data_pipelines.patch_names import LABELLED, UNLABELLED, read_images, read_named
from data_pipelines.patches import PatchesError, read_patches
from data_pipelines.pyramids import write_pyramid
from experiments.run import model
from experiments.run.mining import program
from experiments.run.mining.ablation import run_ablation, settings_of
from experiments.run.mining.features import FeatureTable, Part
from experiments.run.mining.report import judge, write_results
from experiments.run.mining.sources import Sources, holds_slides
from experiments.run.mining.stages import Arm
from experiments.run.starting import pretrained_network
from experiments.run.workdir import Workdir
from srcc_jax.methods.negative_mining import Config
from srcc_jax.models.architecture import normalize
from srcc_jax.models.zoo import build
from srcc_jax.parallel import make_mesh
from tests import programs, small_networks

SIDE = 32
COMMON = {
    "backbone": "resnet18", "positive": "pos", "tile": SIDE, "batch": 8, "scoring_batch": 8, "epochs": 2, "learning_rate": 3e-3,
    "alpha": 3, "threads": 1, "views": False, "mpp": 4.0,
}  # fmt: skip


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the program expects it, and it writes nothing."""


def drawn(random, *, positive, alike=False):
    """Noise; of a positive patch broad stripes; of a negative one that is alike, fainter ones."""
    image = random.integers(60, 200, (SIDE, SIDE, 3))
    if positive or alike:
        share = 3 if positive else 2
        image = image * (4 - share) // 4 + (120 if positive else 60) * (np.arange(SIDE) // 8 % 2)[:, None, None]
    return image.astype(np.uint8)


def save(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two patches from each slide of 15, one of label pos; 60 weak ones, of which every third is alike; and a cache."""
    folder, random = tmp_path_factory.mktemp("runs"), np.random.default_rng(0)
    lines = ["path,label,slide_id"]
    for number in range(45):
        label = "pos" if number % 3 == 0 else "neg"
        image = drawn(random, positive=label == "pos", alike=number % 3 == 1)
        save(folder / "hard" / f"{number}.png", image)
        lines.append(f"hard/{number}.png,{label},s{number // 3}")
    (folder / "hard.csv").write_text("\n".join(lines) + "\n")
    for number in range(60):
        save(folder / "weak" / f"{number:02d}.png", drawn(random, positive=False, alike=number % 3 == 0))
    (folder / "weak" / "07.png").write_text("no image")
    net = small_networks.architecture("resnet18", source="torchvision")
    model.save(model.Network(net, small_networks.variables(net), {}), folder / "small")
    with programs.several_runs(folder / "compiled"):
        yield folder


def start(runs, workdir, **changes):
    files = {"hard": runs / "hard.csv", "weak": runs / "weak", "pretrained": runs / "small", "workdir": runs / workdir}
    values = {**files, **COMMON, **changes}
    with programs.imported("negative_mining") as module:
        return programs.start(module, **{name: value for name, value in values.items() if value is not None})


@pytest.fixture(scope="module")
def whole(runs):
    outcome = start(runs, "whole")
    assert outcome.status == 0, outcome.err
    return runs / "whole", outcome


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_leaves_models_mined_tiles_metrics_and_report(whole):
    workdir, outcome = whole
    assert outcome.out.splitlines()[-1].startswith("finished: ")
    assert outcome.err.count("left out: ") == 1 and "07.png" in outcome.err
    metrics = json.loads((workdir / "metrics.json").read_text())
    false_positives, mined = (table(workdir / "seed_42" / name) for name in ("false_positives.csv", "mined_l2_3.csv"))
    assert metrics["false_positives"] == len(false_positives) > 0
    assert len(mined) == 3 * len(false_positives) and metrics["searched"] == 59
    new = [row for row in mined if row["new"] == "1"]
    assert metrics["mined"] == len(new) == len({row["weak_row"] for row in mined})
    assert "07" not in {row["path"][-6:-4] for row in mined}
    for query in range(len(false_positives)):
        values = [float(row["value"]) for row in mined if row["query"] == str(query)]
        assert values == sorted(values)
    assert set(metrics["weak"]) == set(metrics["strong"]) and 0 <= metrics["strong"]["AUROC"]["value"] <= 1
    assert metrics["patches"]["train"]["negative"] == 18 and metrics["patches"]["test"]["positive"] == 3
    assert Image.open(workdir / "mined_l2_3.png").size[0] > 400
    page = (workdir / "report.html").read_text()
    assert (
        "mined_l2_3.png" in page and "59 searched" in page and "0.9738" not in page
    )  # the paper has no row of alpha 3


def test_the_strong_fit_has_the_mined_tiles_in_training_alone(whole):
    workdir, _ = whole
    history = Workdir(workdir).history("seed_42/strong_l2_3")
    mined = json.loads((workdir / "metrics.json").read_text())["mined"]
    assert history[-1]["step"] == 2 * -(-(27 + mined) // 8)
    rows = table(workdir / "test.csv")
    assert len(rows) == 9 and len({row["slide_id"] for row in rows}) == 3 and set(rows[0]) > {"weak", "strong"}


def test_the_test_patches_are_judged_once(whole, runs):
    outcome = start(runs, "whole")
    assert outcome.status == 0 and "finished before" in outcome.out


@pytest.fixture(scope="module")
def bench(runs, whole):
    """What the program makes of the same settings; its fits share one compiled step."""
    config = Config(**{name: value for name, value in COMMON.items() if name != "threads"})
    key = jax.random.fold_in(jax.random.key(42), 1)
    changes = {"dtype": "float32"}
    net, variables = pretrained_network(
        runs / "small", backbone="resnet18", source=None, classes=2, key=key, changes=changes
    )
    trainer = program.trainer_of(config, net, make_mesh(), threads=1, stop=lambda: False)
    sources = Sources(config, runs / "bench", threads=1)
    hard, weak_set = sources.hard(str(runs / "hard.csv")), sources.weak(str(runs / "weak"), trainer)
    begin = program.Start(net, lambda seed: variables)
    return program.Bench(config, begin, trainer, hard, weak_set, Workdir(runs / "bench"), make_mesh(), {})


def at(bench, folder, **changes):
    """The same bench in another work directory, with other settings."""
    folder.mkdir(parents=True, exist_ok=True)
    return dataclasses.replace(bench, workdir=Workdir(folder), config=dataclasses.replace(bench.config, **changes))


@pytest.mark.parametrize("stage, step", [("seed_42/weak", 6), ("seed_42/strong_l2_3", 5)])
def test_a_killed_run_mines_the_same_tiles_and_ends_bit_for_bit(whole, bench, tmp_path, monkeypatch, stage, step):
    log, arm, mine = Workdir.log, Arm("l2", 3), at(bench, tmp_path)

    def log_until_killed(self, at, number, row):
        log(self, at, number, row)
        if (at, number) == (stage, step):
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(Workdir, "log", log_until_killed)
        with pytest.raises(Killed):
            mine.run(seed=42).strong(arm)
    again = mine.run(seed=42)
    again.strong(arm)
    write_results(again, arm, judge(again, arm), settings={})
    for file in ("seed_42/mined_l2_3.csv", "seed_42/strong_l2_3/weights.npz", "test.csv", "mined_l2_3.png"):
        assert (tmp_path / file).read_bytes() == (whole[0] / file).read_bytes(), file
    ours, theirs = (json.loads((folder / "metrics.json").read_text()) for folder in (tmp_path, whole[0]))
    assert {**ours, "settings": 0} == {**theirs, "settings": 0}


def test_one_device_and_four_mine_the_same_tiles(whole, bench, tmp_path):
    mesh = make_mesh(jax.devices()[:1])
    trainer = program.trainer_of(bench.config, bench.start.architecture, mesh, threads=1, stop=lambda: False)
    shutil.copytree(whole[0] / "seed_42" / "weak", tmp_path / "seed_42" / "weak")
    weak_set = dataclasses.replace(bench.weak_set, trainer=trainer)
    alone = dataclasses.replace(at(bench, tmp_path), trainer=trainer, weak_set=weak_set, mesh=mesh)
    found = alone.run(seed=42).mined(Arm("l2", 3))
    rows = table(whole[0] / "seed_42" / "mined_l2_3.csv")
    assert found.weak.tolist() == [int(row["weak_row"]) for row in rows]
    np.testing.assert_allclose(found.value, [float(row["value"]) for row in rows], rtol=1e-4)


def test_the_random_arm_adds_as_many_tiles_as_the_search(whole, bench, tmp_path):
    shutil.copytree(whole[0] / "seed_42", tmp_path / "seed_42")
    run = at(bench, tmp_path).run(seed=42)
    searched, drawn = run.mined(Arm("l2", 3)), run.mined(Arm("random", 3, "l2"))
    assert drawn.new.all() and len(drawn.weak) == searched.new.sum() == len(set(drawn.weak.tolist()))
    assert set(drawn.weak.tolist()) != set(searched.weak[searched.new].tolist()) and np.isnan(drawn.value).all()
    plain = run.mined(Arm("random", 3))
    assert len(plain.weak) == 3 * len(run.false_positives.row) and (plain.rank < 3).all()
    assert len(run.mined_patches(Arm("random", 3))) == plain.new.sum() == len(set(plain.weak.tolist()))


def test_without_false_positives_the_strong_model_is_the_weak_one(whole, bench, tmp_path):
    shutil.copytree(whole[0] / "seed_42" / "weak", tmp_path / "seed_42" / "weak")
    run, arm = at(bench, tmp_path, threshold=0.9999).run(seed=42), Arm("l2", 3)
    assert run.strong(arm) is run.weak
    write_results(run, arm, judge(run, arm), settings={})
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["mined"] == 0 and metrics["weak"] == metrics["strong"]
    assert "nothing was mined" in (tmp_path / "report.html").read_text()


def test_false_positives_out_of_fold(whole, bench, tmp_path):
    shutil.copytree(whole[0] / "seed_42" / "weak", tmp_path / "seed_42" / "weak")
    run = at(bench, tmp_path, false_positives="out_of_fold", folds=2).run(seed=42)
    assert len(run.false_positives.row) and set(run.false_positives.row) <= set(run.rows["train"])
    assert (run.label[run.false_positives.row] == 0).all() and (tmp_path / "seed_42" / "fold_1" / "model.json").exists()


def test_tables_of_the_paper_with_and_without_the_leak(whole, bench, tmp_path):
    shutil.copytree(whole[0] / "seed_42", tmp_path / "seed_42")
    mine, options = at(bench, tmp_path), {"query": "l2", "alpha": 3, "alphas": [3, 5], "shares": [0.5]}
    run_ablation(mine, list(settings_of("alpha", **options)), [42, 43], leak=True)
    rows = table(tmp_path / "ablation.csv")
    assert [(row["setting"], row["model"], row["seed"]) for row in rows[:4]] == [
        ("l2, α 3", "weak", "42"), ("l2, α 3", "weak", "43"), ("l2, α 3", "strong", "42"), ("l2, α 3", "strong", "43"),
    ]  # fmt: skip
    assert len(rows) == 2 * 3 * 2
    text = (tmp_path / "tables.md").read_text()
    assert "| Table 3 | l2, α 5 | strong |" in text and "0.9601" in text and "±" in text
    leaked = next(line for line in text.splitlines() if "leaked" in line)
    assert leaked.count("–") == 5  # the paper's numbers are of no such row
    run_ablation(mine, list(settings_of("limited", **options)), [42], leak=False)
    weak = table(tmp_path / "ablation.csv")[0]
    assert (weak["table"], weak["setting"]) == ("Table 4", "50% of all")
    assert (tmp_path / "seed_42_positive_0.5_negative_0.5" / "weak" / "model.json").exists()


def test_the_rows_of_the_ablations():
    options = {"query": "l2", "alpha": 20, "alphas": [5, 20], "shares": [0.1, 1.0]}
    found = list(settings_of("all", **options))
    assert [setting.name for setting in found] == [
        "l2, α 20", "cosine, α 20", "random, α 20", "l2, α 5", "l2, α 20", "10% of all", "100% of all",
        "10% of the positives", "100% of the positives",
    ]  # fmt: skip
    papers = [setting.paper.strong[0] if setting.paper else None for setting in found]
    assert papers == [0.9738, 0.9682, None, 0.9601, 0.9738, 0.8506, 0.9738, 0.9071, 0.9738]


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    """Three slides with tissue, one of which nobody can read; 'marked' has an annotation."""
    folder = tmp_path_factory.mktemp("slides")
    for number, name in enumerate(("marked", "clean")):
        write_pyramid(folder / f"{name}.tiff", programs.tissue(2560, seed=number), mpp=1.0)
    (folder / "broken.tiff").write_bytes(b"no slide")
    write_asap_xml(folder / "marked.xml", [programs.square(500, 500, side=900.0)])
    return folder


def write_cohort(folder, name, *lines):
    (folder / name).write_text("\n".join(lines) + "\n")
    return folder / name


def test_tiles_of_slides_are_searched_and_cut(whole, bench, slides, tmp_path, capsys):
    cohort = write_cohort(
        slides, "weak.csv", "slide_id,path,label,patient_id,mpp",
        "clean,clean.tiff,neg,a,", "again,marked.tiff,neg,s1,", "broken,broken.tiff,neg,c,",
    )  # fmt: skip
    shutil.copytree(whole[0] / "seed_42" / "weak", tmp_path / "seed_42" / "weak")
    mine = at(bench, tmp_path, mpp=2.0, weak_share=0.5)
    weak_set = Sources(mine.config, tmp_path, threads=1).weak(str(cohort), bench.trainer)
    assert "left out of --weak: broken" in capsys.readouterr().out
    run = dataclasses.replace(mine, weak_set=weak_set).run(seed=42)
    run.mined_patches(Arm("l2", 3))
    rows = table(tmp_path / "seed_42" / "mined_l2_3.csv")
    for row in rows[:3]:
        x, y = float(row["x"]), float(row["y"])
        assert x % 64 == y % 64 == 0 and row["path"].endswith(".tiff")
        tile = np.asarray(Image.open(tmp_path / "mined_tiles" / f"{row['slide_id']}_{x:.0f}_{y:.0f}.png"))
        source = np.asarray(Image.open(row["path"]).convert("RGB"))[int(y) : int(y) + 64, int(x) : int(x) + 64]
        assert abs(tile.mean((0, 1)) - source.mean((0, 1))).max() < 2 and tile.shape == (SIDE, SIDE, 3)


def test_the_strong_model_says_of_slides_what_it_says_of_patches(whole, slides, tmp_path):
    workdir, _ = whole
    found = model.Model.load(workdir)
    rows = table(workdir / "test.csv")
    images = np.stack([np.asarray(Image.open(row["path"]).convert("RGB")) for row in rows])
    outputs = build(found.architecture).apply(found.variables, normalize(images, found.architecture), train=False)
    np.testing.assert_allclose(
        jax.nn.sigmoid(outputs["logits"][:, 0]), [float(row["strong"]) for row in rows], atol=1e-5
    )
    with programs.imported("predict_slides") as module:
        outcome = programs.start(module, workdir=workdir, slides=slides / "clean.tiff", out=tmp_path, gradcam=False)
    assert outcome.status == 0, outcome.err
    (row,) = table(tmp_path / "slides.csv")
    assert row["status"] == "done" and 0 < float(row["probability"]) < 1


def test_weak_tiles_of_patients_of_the_test_are_not_searched(runs, bench, slides):
    config = Config(tile=SIDE, mpp=2.0)
    cohort = write_cohort(
        slides, "few.csv", "slide_id,path,label,patient_id", "clean,clean.tiff,neg,a", "m,marked.tiff,neg,s1"
    )
    found = Sources(config, runs / "sources").weak(str(cohort), bench.trainer)
    hard = read_patches(runs / "hard.csv")
    shared = found.shared_with(hard.take(np.flatnonzero(hard.slide_id == "s1")))
    names = np.array(found.places(np.arange(len(found)))["slide_id"])
    assert set(names[shared]) == set() and not shared.any()  # s1 is a slide there, a patient here
    known = dataclasses.replace(hard.take(np.arange(3)), patient_id=np.array(["s1", "x", "y"]))
    shared = found.shared_with(known)
    assert set(names[shared]) == {"m"} and set(names[~shared]) == {"clean"}
    both = Sources(Config(tile=SIDE, mpp=2.0, weak_share=1.0), runs / "sources").weak(str(cohort), bench.trainer)
    assert abs(len(found) - len(both) / 3) < 1  # rounded slide by slide


def test_patches_are_cut_from_an_annotated_cohort(runs, slides):
    cohort = write_cohort(
        slides, "hard.csv", "slide_id,path,label,annotation", "marked,marked.tiff,pos,marked.xml", "clean,clean.tiff,neg,"
    )  # fmt: skip
    config = Config(tile=64, mpp=1.0, positive_spots=4, negative_spots=5)
    patches = Sources(config, runs / "cut").hard(str(cohort))
    kinds = sorted(zip(patches.slide_id, patches.label))
    assert kinds == [("clean", "negative")] * 5 + [("marked", "negative")] * 5 + [("marked", "pos")] * 4
    assert set(patches.split) == {""}


def test_what_is_given_is_recognised(runs, slides):
    assert holds_slides(slides) and holds_slides(write_cohort(slides, "c.csv", "slide_id,path", "a,clean.tiff"))
    assert not holds_slides(runs / "weak") and not holds_slides(runs / "hard.csv")
    with pytest.raises(PatchesError, match="there is no such folder"):
        holds_slides(runs / "nowhere")


def test_patches_whose_names_tell_all(tmp_path):
    for name in ("pos_12_3_a.png", "neg_12_4_b_c.png", "neg_7_1_x.png"):
        save(tmp_path / "hard" / name, np.zeros((8, 8, 3), np.uint8))
    found = read_named(tmp_path / "hard", LABELLED)
    assert found.label.tolist() == ["neg", "neg", "pos"]
    assert found.patient_id.tolist() == ["12", "7", "12"] and found.slide_id.tolist() == ["12_4", "7_1", "12_3"]
    save(tmp_path / "weak" / "9_x_2_4.jpg", np.zeros((8, 8, 3), np.uint8))
    assert read_named(tmp_path / "weak", UNLABELLED).slide_id.tolist() == ["9_2"]
    save(tmp_path / "weak" / "odd.jpg", np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(PatchesError, match=r"names of another form.*odd\.jpg"):
        read_named(tmp_path / "weak", UNLABELLED)
    assert len(read_images(tmp_path / "weak")) == 2
    (tmp_path / "list.csv").write_text("path,slide_id\nweak/odd.jpg,s\nweak/gone.jpg,s\n")
    with pytest.raises(PatchesError, match=r"there is no file .*gone\.jpg"):
        read_images(tmp_path / "list.csv")
    (tmp_path / "empty").mkdir()
    with pytest.raises(PatchesError, match="no image"):
        read_images(tmp_path / "empty")


def test_features_go_on_part_by_part(tmp_path):
    """Killed in the second of three parts: the first is not made again; another network's are all made again."""
    values, made = np.arange(20, dtype=np.float32).reshape(10, 2), []
    parts = [np.arange(0, 4), np.arange(4, 8), np.arange(8, 10)]

    def make(rows, *, killed=False):
        made.append(rows[0])
        yield Part(rows[:2], values[rows[:2]])
        if killed and rows[0] == 4:
            raise Killed
        yield Part(rows[3:], values[rows[3:]])  # the third of each part cannot be read

    features = FeatureTable(tmp_path, 10, 2, "a")
    with pytest.raises(Killed):
        features.fill(parts, lambda rows: make(rows, killed=True))
    features.fill(parts, make)
    features.fill(parts, make)
    assert made == [0, 4, 4, 8]
    assert np.flatnonzero(~features.readable).tolist() == [2, 6]
    chosen = features.chosen(np.arange(10) != 1)
    assert chosen.rows.tolist() == [0, 3, 4, 5, 7, 8, 9] and chosen.shape == (7, 2)
    np.testing.assert_array_equal(chosen[1:3], values[[3, 4]])
    np.testing.assert_array_equal(chosen[np.array([0, 6])], values[[0, 9]])
    FeatureTable(tmp_path, 10, 2, "b").fill(parts, make)
    assert made == [0, 4, 4, 8, 0, 4, 8]


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"learning_rate": 0.1}, "learning_rate: 0.003 there, 0.1 asked for"),
        ({"positive": "LI", "workdir": "other"}, "no positive hard patch in the train split; labels are neg, pos"),
        ({"backbone": "unet", "workdir": "other"}, "--backbone=unet is no classifier"),
        ({"scoring_batch": 6, "workdir": "other"}, "--scoring_batch=6 cannot be split over 4 devices"),
        ({"weak": "nowhere", "workdir": "other"}, "there is no such folder, list or cohort table"),
        ({"ablation": "alpha", "alphas": "5,x", "workdir": "whole"}, "--alphas=5,x: numbers with commas"),
        ({"ablation": "limited", "fractions": "2", "workdir": "whole"}, "at most 1"),
    ],
)
def test_wrong_flags_are_refused_in_one_line(whole, runs, changes, words):
    workdir = changes.pop("workdir", "whole")
    assert words in programs.one_line(start(runs, workdir, **changes))
    shutil.rmtree(runs / "other", ignore_errors=True)


def test_positive_slides_are_no_weak_set(runs, slides):
    cohort = write_cohort(slides, "wrong.csv", "slide_id,path,label", "a,clean.tiff,neg", "b,marked.tiff,pos")
    words = programs.one_line(start(runs, "other", weak=cohort))
    assert "what is known negative is asked for; positive are b" in words
    save(runs / "classes" / "pos" / "a.png", np.zeros((8, 8, 3), np.uint8))
    words = programs.one_line(start(runs, "other", weak=runs / "classes"))
    assert "what is known negative is asked for; positive are" in words and "a.png" in words
