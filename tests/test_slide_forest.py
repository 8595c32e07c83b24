"""Numbers of probability maps against worked ones, the published features of Camelyon16's test slides, and the program that learns."""

import csv
import json

import numpy as np
import pytest
from sklearn.ensemble import RandomForestClassifier
from sklearn.model_selection import cross_val_predict

from data_pipelines.exports import write_map
from srcc_jax.kernels.heat_maps import HeatMap
from srcc_jax.map_features import NAMES, map_features
from srcc_jax.metrics import roc_auc
from tests import programs
from tests.programs import one_line


def worked_map():
    """A bar of 1 × 4 cells at 0.95, a cell of 0.92 beside a cell of 0.6, tissue of 0.1 and glass."""
    values = np.full((8, 10), np.nan)
    values[:, :8] = 0.1
    values[1, 1:5] = 0.95
    values[5, 2], values[5, 3] = 0.92, 0.6
    return values


def test_the_features_of_a_worked_map():
    found = map_features(worked_map(), mpp=10.0)
    assert list(found) == list(NAMES) and len(NAMES) == 31
    assert (found["regions"], found["tumour_area_um2"], found["max_area"]) == (2, 500, 400)
    assert found["tumour_share_of_tissue"] == pytest.approx(5 / 64)
    assert found["mean_prediction"] == pytest.approx((4 * 0.95 + 0.92) / 5)
    assert (found["mean_area"], found["variance_area"]) == (250, 150**2)
    assert (found["skewness_area"], found["kurtosis_area"]) == pytest.approx((0, -2))
    assert found["max_eccentricity"] == pytest.approx(1, abs=0.01) and found["mean_extent"] == 1
    assert found["largest_area_um2"] == 400
    assert found["largest_axis_um"] == pytest.approx(
        10 * 4 * np.sqrt(15 / 12), rel=1e-6
    )  # of the ellipse: 4 √(variance)
    assert map_features(worked_map(), mpp=10.0, low=0.05)["largest_area_um2"] == 6400


def test_a_corner_joins_cells_and_nothing_at_all_gives_zeros():
    values = np.full((4, 4), 0.2)
    values[0, 0] = values[1, 1] = 0.99
    assert map_features(values, mpp=1.0)["regions"] == 1
    for empty in (np.full((4, 4), 0.2), np.full((4, 4), np.nan)):
        assert set(map_features(empty, mpp=1.0).values()) == {0.0}


def test_a_forest_over_the_published_features_tells_tumour_slides(shared_data):
    """31 features of each of Camelyon16's 130 test slides by another program: ten folds of them."""
    with open(shared_data / "reference" / "camelyon16_test_heatmap_features_arjun.csv", newline="") as file:
        features = np.array([[float(cell) for cell in line] for line in list(csv.reader(file))[1:]])
    with open(shared_data / "reference" / "camelyon16_test_GT.csv", newline="") as file:
        label = np.array([line[1] == "Tumor" for line in csv.reader(file)]).astype(int)
    forest = RandomForestClassifier(100, class_weight="balanced", random_state=0)
    score = cross_val_predict(forest, features, label, cv=10, method="predict_proba")[:, 1]
    assert features.shape == (130, len(NAMES)) and roc_auc(label, score) > 0.83


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """Thirty slides' maps: tumour slides hold a block of high values, the others scattered cells."""
    root, random = tmp_path_factory.mktemp("forest"), np.random.default_rng(0)
    lines = ["slide_id,path,label,split"]
    for number in range(30):
        tumour = number % 2 == 0
        values = random.uniform(0, 0.4, (12, 12)).astype(np.float32)
        if tumour:
            row, column = random.integers(0, 9, 2)
            values[row : row + 3, column : column + 3] = 0.95
        else:
            values[random.integers(0, 12, 2), random.integers(0, 12, 2)] = 0.97
        found = HeatMap(values, np.zeros_like(values, bool), 64.0, (0.0, 0.0), 16.0)
        (root / "out" / "slides" / f"s{number}").mkdir(parents=True)
        write_map(root / "out" / "slides" / f"s{number}" / "probability.npz", found, unit="probability")
        lines.append(
            f"s{number},s{number}.tiff,{'tumour' if tumour else 'normal'},{'train' if number < 18 else 'test'}"
        )
    (root / "cohort.csv").write_text("\n".join(lines) + "\n")
    (root / "plain.csv").write_text("\n".join(line.rsplit(",", 1)[0] for line in lines) + "\n")
    return root


def start(root, **changes):
    values = {"cohort": root / "cohort.csv", "maps": root / "out", "out": root / "table", "trees": 30, **changes}
    with programs.imported("slide_forest") as module:
        return programs.start(module, **values)


@pytest.mark.parametrize("table, scored", [("cohort.csv", 12), ("plain.csv", 30)])
def test_test_slides_are_scored_or_all_by_other_folds(cohort, table, scored):
    outcome = start(cohort, cohort=cohort / table, folds=3)
    assert outcome.status == 0, outcome.err
    with open(cohort / "table" / "slides.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert sum(row["probability"] != "" for row in rows) == scored
    metrics = json.loads((cohort / "table" / "metrics.json").read_text())
    assert metrics["ROC AUC"]["slide"]["value"] > 0.95
    assert "largest_area_um2" in (cohort / "table" / "report.html").read_text()
    with open(cohort / "table" / "features.csv", newline="") as file:
        assert next(csv.reader(file)) == ["slide_id", *NAMES]


def test_what_is_missing_is_named(cohort):
    assert "has no anomaly map of s0, s1" in one_line(start(cohort, map="anomaly"))
    assert "--folds=20: a class has only 15 slides" in one_line(start(cohort, cohort=cohort / "plain.csv", folds=20))


@pytest.mark.parametrize(
    "patient, words",
    [
        (lambda n: n % 3, "--folds=5: the slides are of 3 patients: give fewer folds"),
        (lambda n: n * (n % 2), "--folds=5: the slides to learn from in one of them are all of one class"),
    ],
)
def test_folds_that_patients_do_not_allow_are_refused(cohort, patient, words):
    """Of three patients; of one with all slides that hold tumour, and others."""
    lines = (cohort / "plain.csv").read_text().splitlines()
    lines = [f"{lines[0]},patient_id", *(f"{line},p{patient(n)}" for n, line in enumerate(lines[1:]))]
    (cohort / "patients.csv").write_text("\n".join(lines) + "\n")
    assert words in one_line(start(cohort, cohort=cohort / "patients.csv", folds=5))
