"""Paired comparison of arms against a slow twin, and the study on drawn patches, cut off and continued."""

import csv

import numpy as np
import pytest
from PIL import Image

from experiments.run import model
from experiments.run.mining import program
from experiments.run.mining.comparison import Result, difference_rows, paired, spread, table_rows
from srcc_jax.metrics import roc_auc
from tests import programs, small_networks


def result(seed, arm, quality, *, share=1.0, alpha=20, n=60):
    """Probabilities that are the better the higher the quality."""
    random = np.random.default_rng([seed, 7])
    label = np.arange(n) % 2
    noise = random.normal(0, 1, n)
    return Result(seed, share, arm, alpha, label, 1 / (1 + np.exp(-(quality * label + noise))), mined=11)


def test_paired_differences_against_a_slow_twin():
    ours, theirs = (
        [result(seed, arm, quality) for seed in range(5)] for arm, quality in (("l2", 1.5), ("random", 0.8))
    )
    found = paired(ours, theirs[::-1], "AUROC")
    each = [roc_auc(a.label, a.probability) - roc_auc(b.label, b.probability) for a, b in zip(ours, theirs)]
    assert found.interval.value == pytest.approx(np.mean(each)) and (found.seeds, found.ahead) == (5, 5)
    random, means = np.random.default_rng(9), []
    for _ in range(1500):  # seeds, then in each the patches, the same for both
        total = []
        for seed in random.integers(5, size=5):
            rows = random.integers(60, size=60)
            total.append(
                roc_auc(ours[seed].label[rows], ours[seed].probability[rows])
                - roc_auc(theirs[seed].label[rows], theirs[seed].probability[rows])
            )
        means.append(np.mean(total))
    low, high = np.quantile(means, [0.025, 0.975])
    assert found.interval.low == pytest.approx(low, abs=0.012) and found.interval.high == pytest.approx(high, abs=0.012)
    assert found.interval.low > 0


def test_only_seeds_that_both_have_are_paired():
    ours, theirs = [result(seed, "l2", 1.0) for seed in (0, 1, 2)], [result(seed, "random", 1.0) for seed in (1, 4)]
    found = paired(ours, theirs, "AUROC")
    assert (
        found.seeds == 1 and found.ahead == 0 and found.interval.value == found.interval.low == found.interval.high == 0
    )
    assert paired(ours, [], "AUROC") is None


def test_rows_of_the_tables():
    results = [result(seed, arm, 1.0) for arm in ("l2", "random") for seed in (0, 1)]
    results += [result(seed, "weak", 0.5, alpha=0) for seed in (0, 1)]
    rows = table_rows(results, ["AUROC"])
    assert [row[:5] for row in rows] == [
        ["100%", "l2", "20", "2", "11"], ["100%", "random", "20", "2", "11"], ["100%", "weak", "", "2", ""],
    ]  # fmt: skip
    values = [r.value("AUROC") for r in results[:2]]
    assert (
        spread(results[:2], "AUROC")
        == rows[0][5]
        == f"{np.mean(values):.4f} ± {abs(values[0] - values[1]) / 2**0.5:.4f}"
    )
    pairs = {"l2 - random": ("l2", "random"), "l2 - weak": ("l2", "weak"), "cosine - weak": ("cosine", "weak")}
    differences = difference_rows(results, pairs, ["AUROC"])
    assert [row[:4] for row in differences] == [["100%", "20", "l2 - random", "2"], ["100%", "20", "l2 - weak", "2"]]
    assert differences[0][4].startswith("+0.0000 [+0.0000, +0.0000], 0 of 2")


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """Patches <split>/<class>: striped ones are positive. And a small network."""
    folder, random = tmp_path_factory.mktemp("study"), np.random.default_rng(0)
    for name, count in (("AC", 14), ("H", 20), ("T", 20)):
        for number in range(count):
            image = random.integers((120, 40, 100), (220, 140, 200), (32, 32, 3))
            if name == "AC":
                image = image // 2 + 60 * (np.arange(32) // 8 % 2)[:, None, None]
            place = folder / "patches" / ("train" if number % 4 else "test") / name
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.astype(np.uint8)).save(place / f"{number}.png")
    net = small_networks.architecture("resnet18", source="torchvision")
    model.save(model.Network(net, small_networks.variables(net), {}), folder / "small")
    with programs.several_runs(folder / "compiled"):
        yield folder


def start(material, **changes):
    values = {
        "kind": "folder", "patches": material / "patches", "pretrained": material / "small", "backbone": "resnet18",
        "workdir": material / "out", "counts": "6,4,4", "pool": 12, "slides": 2, "tissue_patches": "60,70", "tile": 32, "batch": 8,
        "epochs": 1, "epoch_steps": 2, "seeds": 1, "alphas": "2", "shares": "1", "threads": 1,
    }  # fmt: skip
    with programs.imported("mining_study") as module:
        return programs.start(module, **{**values, **changes})


def test_a_study_goes_on_with_more_seeds(material, monkeypatch):
    monkeypatch.setattr(program, "views_of", lambda config, mesh: None)  # they take long to compile
    outcome = start(material)
    assert outcome.status == 0, outcome.err
    with open(material / "out" / "results.csv", newline="") as file:
        first = list(csv.DictReader(file))
    assert [row["arm"] for row in first] == ["weak", "l2", "random as l2", "cosine", "random as cosine"]
    assert first[1]["mined"] == first[2]["mined"] and first[3]["mined"] == first[4]["mined"] != "0"
    assert not list((material / "out").glob("seed_*/strong_*")) and (material / "out" / "summary.json").exists()
    outcome = start(material, seeds=2)
    assert outcome.status == 0 and "l2 - random" in outcome.out
    assert "seed_0_share_1/" not in outcome.out  # nothing of the first seed is trained again
    with open(material / "out" / "results.csv", newline="") as file:
        assert [row for row in csv.DictReader(file) if row["seed"] == "0"] == first


def test_no_patch_is_in_two_places(material):
    out = material / "out" / "seed_0_share_1"
    with open(out / "test_weak.csv", newline="") as file:
        test = {row["path"] for row in csv.DictReader(file)}
    with open(out / "false_positives.csv", newline="") as file:
        assert not test & {row["path"] for row in csv.DictReader(file)}
    assert len(test) == 8


def test_too_few_patches_are_refused(material):
    words = programs.one_line(start(material, counts="6,4,5"))
    assert "14 positive and 40 negative patches; --counts needs 15 of each" in words
