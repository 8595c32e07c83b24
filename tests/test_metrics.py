"""Metrics against scikit-learn, stored golden numbers, real slide scores, and the bootstrap against a loop."""

import csv
import json
from functools import partial

import numpy as np
import pytest
import sklearn.metrics

from srcc_jax import metrics

WORKED_LABEL, WORKED_SCORE = np.array([1, 1, 0, 0, 0]), np.array([0.8, 0.4, 0.5, 0.4, 0.1])


@pytest.fixture(scope="module")
def golden(shared_data):
    return json.loads((shared_data / "golden" / "metrics.json").read_text())


def tied_scores(seed, count=200):
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 2, count)
    return label, np.round(np.clip(0.3 * label + rng.random(count) * 0.7, 0, 1), 1)


def test_worked_example_with_a_tie_between_the_classes():
    assert metrics.roc_auc(WORKED_LABEL, WORKED_SCORE) == pytest.approx(0.75, abs=1e-12)
    assert metrics.log_loss(WORKED_LABEL, WORKED_SCORE) == pytest.approx(0.48975352, abs=5e-9)


def test_golden_numbers_with_and_without_weights(golden):
    for case in golden["binary"]:
        label, score, weight = np.array(case["y"]), np.array(case["p"]), np.array(case["weights"])
        assert metrics.roc_auc(label, score) == pytest.approx(case["roc_auc"], abs=1e-12)
        assert metrics.roc_auc(label, score, weight=weight) == pytest.approx(case["roc_auc_weighted"], abs=1e-12)
        assert metrics.average_precision(label, score) == pytest.approx(case["average_precision"], abs=1e-12)
        assert metrics.log_loss(label, score) == pytest.approx(case["log_loss"], abs=1e-12)
        assert metrics.log_loss(label, score, weight=weight) == pytest.approx(case["log_loss_weighted"], abs=1e-12)
        counts = metrics.confusion(label, score, threshold=0.5)
        assert [counts.tn, counts.fp, counts.fn, counts.tp] == case["confusion_tn_fp_fn_tp"]
        assert metrics.sensitivity(label, score, threshold=0.5) == pytest.approx(case["recall_at_0_5"], abs=1e-12)
        curve = metrics.roc_curve(label, score)
        np.testing.assert_allclose(curve.fpr, case["roc_fpr"], atol=1e-12)
        np.testing.assert_allclose(curve.tpr, case["roc_tpr"], atol=1e-12)


def test_scores_of_129_real_slides(shared_data):
    folder = shared_data / "reference"
    with (folder / "didsr_camelyon16_test_slide_predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    expected = json.loads((folder / "didsr_expected_auc.json").read_text())
    label = np.array([int(row["truth"]) for row in rows])
    assert (len(label), label.sum()) == (expected["n"], expected["n_pos"])
    for name, auc in expected["auc_mannwhitney_half_ties"].items():
        score = np.array([float(row[name]) for row in rows])
        assert metrics.roc_auc(label, score) == pytest.approx(auc, abs=5e-7)
        assert metrics.roc_curve(label, score).area == pytest.approx(auc, abs=5e-7)


@pytest.mark.parametrize("seed", range(4))
def test_equal_to_scikit_learn_on_ties_and_weights(seed):
    label, score = tied_scores(seed)
    weight = np.random.default_rng(seed + 10).integers(0, 4, len(label))
    for ours, theirs in [
        (metrics.roc_auc, sklearn.metrics.roc_auc_score),
        (metrics.average_precision, sklearn.metrics.average_precision_score),
        (metrics.log_loss, sklearn.metrics.log_loss),
    ]:
        assert ours(label, score) == pytest.approx(theirs(label, score), abs=1e-12)
        assert ours(label, score, weight=weight) == pytest.approx(theirs(label, score, sample_weight=weight), abs=1e-12)
    fpr, tpr, threshold = sklearn.metrics.roc_curve(label, score, drop_intermediate=False)
    curve = metrics.roc_curve(label, score)
    for a, b in [(curve.fpr, fpr), (curve.tpr, tpr), (curve.threshold, threshold)]:
        np.testing.assert_allclose(a, b, atol=1e-12)


def test_saturated_scores_pay_what_the_clip_says():
    label, score = np.array([1, 0, 0]), np.array([0.0, 1.0, 0.0])
    for clip in (metrics.LOG_LOSS_CLIP, 1e-15, 1e-7):
        assert metrics.log_loss(label, score, clip=clip) == pytest.approx(-2 * np.log(clip) / 3)
    assert metrics.log_loss(label, score) == pytest.approx(sklearn.metrics.log_loss(label, score))


def test_a_score_at_the_threshold_is_called_positive():
    counts = metrics.confusion(WORKED_LABEL, WORKED_SCORE, threshold=0.4)
    assert [counts.tn, counts.fp, counts.fn, counts.tp] == [1, 2, 0, 2]
    assert metrics.specificity(WORKED_LABEL, WORKED_SCORE, threshold=0.4) == pytest.approx(1 / 3)


def slow_bootstrap(metric, label, score, unit, iterations, seed):
    """Percentiles and number dropped, one resample at a time, with slides really repeated."""
    rng, units, values = np.random.default_rng(seed), np.unique(unit), []
    for _ in range(iterations):
        drawn = units[rng.integers(len(units), size=len(units))]
        rows = np.concatenate([np.flatnonzero(unit == one) for one in drawn])
        if len(set(label[rows])) == 2:
            values.append(metric(label[rows], score[rows]))
    return *np.percentile(values, [2.5, 97.5]), iterations - len(values)


@pytest.mark.parametrize("patients", [False, True])
@pytest.mark.parametrize(
    "ours, theirs",
    [
        (metrics.roc_auc, sklearn.metrics.roc_auc_score),
        (metrics.average_precision, sklearn.metrics.average_precision_score),
        (metrics.log_loss, sklearn.metrics.log_loss),
        (partial(metrics.sensitivity, threshold=0.5), lambda y, s: sklearn.metrics.recall_score(y, s >= 0.5)),
    ],
)
def test_bootstrap_equals_a_loop_over_repeated_slides(ours, theirs, patients):
    label, score = tied_scores(0, count=14)
    label[2:12] = 0  # few positives, so that some resamples have none
    label[:2] = 1
    unit = np.array([f"patient {i // 2}" for i in range(14)]) if patients else np.arange(14)
    interval = metrics.bootstrap(ours, label, score, units=unit if patients else None, iterations=200, seed=3)
    low, high, dropped = slow_bootstrap(theirs, label, score, unit, 200, 3)
    assert interval.value == pytest.approx(theirs(label, score), abs=1e-12)
    assert (interval.low, interval.high) == (pytest.approx(low, abs=1e-12), pytest.approx(high, abs=1e-12))
    assert interval.dropped == dropped > 0


def test_bootstrap_is_the_same_whatever_the_chunk(monkeypatch):
    label, score = tied_scores(1, count=50)
    whole = metrics.bootstrap(metrics.roc_auc, label, score, seed=0)
    monkeypatch.setattr(metrics, "_CHUNK", 50 * 7)
    assert metrics.bootstrap(metrics.roc_auc, label, score, seed=0) == whole
    assert metrics.bootstrap(metrics.roc_auc, label, score, seed=1) != whole


def test_bootstrap_agrees_with_delong(golden):
    for case in (c for c in golden["delong"] if "ci95_auc_1" in c):
        score = np.array(case["score_1"])
        interval = metrics.bootstrap(metrics.roc_auc, np.array(case["y"]), score, iterations=4000, seed=0)
        assert interval.value == pytest.approx(case["auc_1"], abs=1e-12)
        width = case["ci95_auc_1"][1] - case["ci95_auc_1"][0]
        assert interval.high - interval.low == pytest.approx(width, rel=0.1)


def test_bootstrap_widens_when_patients_have_many_alike_slides():
    rng = np.random.default_rng(0)
    label, effect = np.arange(40) % 2, rng.normal(size=40)
    label, score, patient = np.repeat(label, 5), np.repeat(label + effect, 5), np.repeat(np.arange(40), 5)
    by_slide = metrics.bootstrap(metrics.roc_auc, label, score, seed=0)
    by_patient = metrics.bootstrap(metrics.roc_auc, label, score, units=patient, seed=0)
    assert by_patient.high - by_patient.low > 1.7 * (by_slide.high - by_slide.low)  # sqrt(5) = 2.2 times expected


@pytest.mark.parametrize(
    "label, score, message",
    [
        ([1, 1], [0.2, 0.3], "both classes are needed, but all 2 slides are labelled 1"),
        ([0, 2], [0.2, 0.3], r"labels are 0 or 1; found \[2\]"),
        ([0, 1], [0.2, np.nan], "1 of 2 scores are not finite"),
        ([0, 1], [0.2], "one number per slide"),
        ([], [], "at least one"),
    ],
)
def test_what_cannot_be_scored_is_refused(label, score, message):
    with pytest.raises(ValueError, match=message):
        metrics.roc_auc(np.array(label), np.array(score))


def test_log_loss_of_logits_and_units_of_another_cohort_are_refused():
    with pytest.raises(ValueError, match=r"probabilities in \[0, 1\]; scores reach -1.5 to 2"):
        metrics.log_loss(np.array([0, 1]), np.array([-1.5, 2.0]))
    with pytest.raises(ValueError, match="3 units for 5 slides"):
        metrics.bootstrap(metrics.roc_auc, WORKED_LABEL, WORKED_SCORE, units=["a", "b", "c"], seed=0)


def test_one_class_has_a_log_loss_but_no_interval():
    interval = metrics.bootstrap(metrics.log_loss, np.zeros(4, int), np.full(4, 0.5), iterations=10, seed=0)
    assert interval.value == pytest.approx(np.log(2))
    assert np.isnan([interval.low, interval.high]).all() and interval.dropped == 10
