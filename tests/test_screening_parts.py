"""Parts of gastric screening without a run: top patches, both gates' tables, GlaS as a list of crops, numbers by hand."""

import jax
import numpy as np
import pytest
from PIL import Image

from data_pipelines.cohort import SlideRecord
from data_pipelines.lesion_masks import read_mask
from data_pipelines.masked_patches import read_masks
from data_pipelines.patches import PatchBatch, read_patches
from experiments.run.program import UsageError
from experiments.run.screening import gates
from experiments.run.screening.features import top_patches
from experiments.run.screening.glas import write_glas
from experiments.run.screening.judging import JudgedSlides, judge_patches
from experiments.run.screening.model import PICTURE
from experiments.run.screening.tables import write_tables
from srcc_jax.methods.gastric_screening import Config
from srcc_jax.models.blur import BlurNet
from srcc_jax.models.layers import init_variables


def test_few_patches_are_all_taken_and_those_unread_are_not():
    logit = np.array([0.1, np.nan, 3.0, 3.0, -1.0], np.float32)
    assert top_patches(logit, k=3).tolist() == [2, 3, 0]
    assert top_patches(logit, k=64).tolist() == [2, 3, 0, 4]


class Radii:
    """Patches whose every pixel tells how far out of focus they are."""

    def __init__(self, radius):
        self.radius = radius

    def read(self, rows, *, size):
        image = np.zeros((size, 16, 16, 3), np.uint8)
        image[: len(rows)] = (20 * self.radius[rows]).astype(np.uint8)[:, None, None, None]
        weight = np.zeros(size, np.float32)
        weight[: len(rows)] = 1
        return PatchBatch({"image": image, "weight": weight}, {})


def test_the_blur_gate_is_judged_by_radius():
    radius = np.tile([0.0, 2.0, 4.0, 6.0], 3)
    variables = init_variables(BlurNet(), jax.random.key(0), PICTURE)
    table = gates.blur_by_radius(variables, Radii(radius), radius, np.arange(12))
    assert [row["radius_um"] for row in table] == [0, 2, 4, 6] and "ROC AUC" not in table[0]
    areas = {row["ROC AUC"] for row in table[1:]}
    assert areas <= {0.0, 1.0} and all(row["patches"] == 3 for row in table)
    rows = [{"radius_um": r, "called": c} for r, c in ((0.0, 0.1), (1.0, 0.4), (3.0, 0.8), (5.0, 0.9))]
    assert gates.turning_radius(rows) == pytest.approx(1.5)
    assert gates.turning_radius(rows[:2]) is None


def test_glas_becomes_a_list_of_crops_with_masks(tmp_path):
    source = tmp_path / "glas"
    source.mkdir()
    random = np.random.default_rng(0)
    mask = np.zeros((60, 90), np.uint8)
    mask[:, 45:] = 3
    for name in ("train_1", "testA_2"):
        Image.fromarray(random.integers(0, 255, (60, 90, 3), np.uint8)).save(source / f"{name}.png")
        Image.fromarray(mask).save(source / f"{name}_anno.png")
    header = "name,patient ID,grade (GlaS),grade (Sirinukunwattana et al. 2015)"
    (source / "Grade.csv").write_text(f"{header}\ntrain_1,1, benign,x\ntestA_2,2, malignant,y\nabsent,3,benign,z\n")
    listing = write_glas(source, tmp_path / "out", reduce=2, side=24)
    patches = read_patches(listing)
    assert len(patches) == 2 * 2 and sorted(set(patches.label.tolist())) == ["benign", "malignant"]
    assert set(patches.slide_id) == {"train_1", "testA_2"}
    masks = [read_mask(path) for path in read_masks(listing, patches)]
    assert [found.mean() for found in masks[:2]] == pytest.approx([1 / 24, 1], abs=0.06)
    with pytest.raises(UsageError, match="hold no crop of 64"):
        write_glas(source, tmp_path / "other", reduce=2, side=64)


def test_judged_patches_and_slides_by_hand(tmp_path):
    found = {
        "label": np.array([1, 0, 1, 0]),
        "logit": np.array([2.0, 1.0, 0.0, -1.0]),
        "tp": np.array([6, 0, 0, 0]),
        "fp": np.array([2, 0, 0, 0]),
        "fn": np.array([3, 0, 4, 0]),
    }
    merit = judge_patches(found, np.array(["a", "b", "c", "b"]), seed=0)
    assert merit["Dice of pixels"] == pytest.approx(12 / 21) and merit["Dice of units"] == pytest.approx(12 / 17 / 2)
    assert merit["average precision"].value == pytest.approx(5 / 6) and merit["ROC AUC"].value == 0.75
    one_class = {name: values[[1, 3]] for name, values in found.items()}
    assert "ROC AUC" not in judge_patches(one_class, np.array(["b", "b"]), seed=0)
    given = {f"s{n}": {"site": "AAB"[n], "year": ("2018", "2019", "2018")[n]} for n in range(3)}
    records = [SlideRecord(name, None, "malignant", name) for name in given]
    sites = JudgedSlides.of(records, np.ones(3), np.array([9.0, -9.0, 9.0]), given).sites(0.74)
    assert [(row["site"], row["year"], row["total"], row["sensitivity"].value) for row in sites] == [
        ("A", "2018", 1, 1), ("A", "2019", 1, 0), ("A", "all", 2, 0.5), ("B", "2018", 1, 1),
    ]  # fmt: skip
    write_tables(tmp_path, Config(model="tiny"), [{"sites": sites}, {"sites": sites}])
    text = (tmp_path / "tables.md").read_text()
    assert "| repeat | site |" in text and "| 0 | A | all | 2 |" in text and "| 1 | A | all | 2 |" in text
    slides = JudgedSlides.of([], np.zeros(0), np.zeros(0), {})
    assert slides.sites(0.74) == [] and slides.errors(0.74) == []
