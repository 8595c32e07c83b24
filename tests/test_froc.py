"""Lesion FROC against the official evaluation's numbers."""

import json

import numpy as np
import pytest

from srcc_jax.froc import (
    ITC_UM,
    JOIN_UM,
    Lesions,
    SlideHits,
    bootstrap_froc,
    candidates,
    find_lesions,
    froc,
    score_slide,
)
from tests import programs

MPP = 0.243 * 32  # of Camelyon16 masks at level 5


@pytest.fixture(scope="module")
def golden(shared_data):
    return json.loads((shared_data / "golden" / "metrics.json").read_text())["lesion_froc"]


def hits_of(slide):
    """The slide of a golden set, through our functions."""
    mask = np.zeros(slide["size"], bool)
    for row, start, end in slide["tumour_runs"] or ():
        mask[row, start:end] = True
    lesions = find_lesions(mask, mpp=MPP, downsample=32) if mask.any() else None
    score, x, y = np.asarray(slide["detections"], float).reshape(-1, 3).T
    return lesions, score_slide(lesions, score, x, y)


def detections(false, true):
    return SlideHits(np.asarray(false, float), np.asarray(true, float), len(true), np.zeros(0, int))


def test_lesions_and_hits_are_the_official_ones(golden):
    for case in golden["sets"]:
        for slide in case["slides"]:
            lesions, hits = hits_of(slide)
            expected = slide["expected"]
            if lesions is not None:
                assert lesions.label.max() == expected["n_labels"]
                np.testing.assert_array_equal(lesions.area, expected["areas"])
                np.testing.assert_allclose(lesions.major_axis, expected["major_axis"], rtol=1e-9)
                np.testing.assert_array_equal(np.flatnonzero(lesions.itc) + 1, expected["itc_labels"])
            np.testing.assert_array_equal(hits.label, expected["hit_label"])
            missed = np.isneginf(hits.true)  # the official evaluation has 0 there
            np.testing.assert_array_equal(np.where(missed, 0, hits.true), expected["tp_scores"])
            np.testing.assert_array_equal(np.sort(hits.false), np.sort(expected["fp_scores"]))
            assert hits.lesions == expected["n_lesions"]


@pytest.mark.parametrize("variant, growth, itc", [("camelyon16", 4.8225, 35.365), ("monai", 2.411, 17.683)])
def test_the_scales_give_the_official_pixels_and_those_of_monai(golden, variant, growth, itc):
    with programs.imported("evaluate_camelyon") as module:
        mpp = module.VARIANTS[variant]
    assert (JOIN_UM / mpp, ITC_UM / mpp) == pytest.approx((growth, itc), abs=1e-3)
    if variant == "camelyon16":
        assert (JOIN_UM / mpp, ITC_UM / mpp) == pytest.approx((golden["growth_px"], golden["itc_px"]), rel=1e-12)


def test_curves_are_the_official_ones(golden):
    for case in golden["sets"]:
        curve = froc([hits_of(slide)[1] for slide in case["slides"]])
        np.testing.assert_allclose(curve.fp_per_slide, case["points_fp_per_slide"], rtol=1e-12)
        np.testing.assert_allclose(curve.sensitivity, case["points_sensitivity"], rtol=1e-12)
        np.testing.assert_allclose(curve.sensitivity_at, case["sensitivity_at"], rtol=1e-12)
        assert curve.score == pytest.approx(case["score"], rel=1e-12)


def test_worked_example():
    lesions = Lesions(
        np.asarray([[1, 2, 3, 0]], np.int32), np.ones(3), np.ones(3), np.asarray([False, True, False]), 32
    )
    score, x = np.asarray([0.9, 0.4, 0.5, 0.8, 0.3]), np.asarray([0, 33, 95.9, 96, 4000])
    tumour = score_slide(lesions, score, x, np.zeros(5))
    np.testing.assert_array_equal(tumour.true, [0.9, -np.inf, 0.5])
    np.testing.assert_array_equal(tumour.false, [0.8, 0.3])
    normal = score_slide(None, np.asarray([0.6, 0.2]), np.zeros(2), np.zeros(2))
    curve = froc([tumour, normal])
    np.testing.assert_allclose(curve.fp_per_slide, [2, 1.5, 1, 1, 0.5, 0, 0])
    np.testing.assert_allclose(curve.sensitivity, [1, 1, 1, 0.5, 0.5, 0.5, 0])
    np.testing.assert_allclose(curve.sensitivity_at, [0.5, 0.5, 1, 1, 1, 1])
    assert curve.score == pytest.approx(5 / 6)


def test_lowest_score_gives_no_point(golden):
    expected = golden["nothing_missed"]
    slides = [detections(f, t) for f, t in zip(expected["fp_scores"], expected["tp_scores"])]
    curve = froc(slides)
    np.testing.assert_allclose(curve.fp_per_slide, expected["points_fp_per_slide"])
    np.testing.assert_allclose(curve.sensitivity, expected["points_sensitivity"])
    assert curve.score == expected["score"]


def test_bootstrap_counts_slides_as_often_as_they_are_drawn():
    rng = np.random.default_rng(0)
    slides = [detections(rng.uniform(0.1, 1, rng.integers(0, 9)), rng.uniform(0.1, 1, n % 3)) for n in range(12)]
    interval = bootstrap_froc(slides, iterations=50, seed=3)
    rng, values = np.random.default_rng(3), []
    for _ in range(50):
        drawn = [slides[n] for n in rng.integers(len(slides), size=len(slides))]
        values.append(froc(drawn).score)
    np.testing.assert_allclose([interval.low, interval.high], np.quantile(values, [0.025, 0.975]))
    assert interval.value == froc(slides).score and interval.low < interval.value < interval.high


def test_resamples_without_a_lesion_are_counted():
    slides = [detections([0.5], [0.9]), detections([0.4], []), detections([], [])]
    assert 0 < bootstrap_froc(slides, iterations=200, seed=0).dropped < 120


def test_logits_give_the_curve_of_their_probabilities():
    lesions = Lesions(np.asarray([[1, 2, 3, 0]], np.int32), np.ones(3), np.ones(3), np.zeros(3, bool), 32)
    probability, x = np.asarray([0.9, 0.4, 0.1, 0.5, 0.3]), np.asarray([0, 33, 34, 96, 4000])
    curves = [
        froc([score_slide(lesions, score, x, np.zeros(5)), score_slide(None, score[:2], x[:2], np.zeros(2))])
        for score in (probability, np.log(probability / (1 - probability)))
    ]
    assert curves[0].score == curves[1].score and curves[0].score < 1
    np.testing.assert_array_equal(curves[0].fp_per_slide, curves[1].fp_per_slide)
    np.testing.assert_array_equal(curves[0].sensitivity, curves[1].sensitivity)


def test_infinite_scores_and_cohorts_without_lesions_are_refused():
    with pytest.raises(ValueError, match="finite"):
        score_slide(None, np.full(1, np.inf), np.zeros(1), np.zeros(1))
    with pytest.raises(ValueError, match="none of 1 slides"):
        froc([detections([0.5], [])])


@pytest.mark.parametrize("radius, expected", [(2, [0.9, 0.7]), (1, [0.9, 0.8, 0.7])])
def test_candidates_of_the_worked_map(radius, expected):
    values = np.zeros((6, 6))
    values[1, 1], values[1, 2], values[4, 4], values[5, 0] = 0.9, 0.8, 0.7, 0.5
    score, x, y = candidates(values, downsample=64, radius=radius, stop=0.5)
    np.testing.assert_array_equal(score, expected)
    assert (x[0], y[0]) == (96, 96) and (x[-1], y[-1]) == (288, 288)
    if radius == 1:
        assert (x[1], y[1]) == (160, 96)  # column 2, row 1: the cleared square is half open


def test_candidates_are_those_of_clearing_the_largest_again_and_again():
    values = np.random.default_rng(1).integers(0, 50, (40, 30)) / 50
    values[3, 4] = np.nan
    left, expected = np.where(np.isnan(values), -1, values), []
    while left.max() > 0.3:
        row, column = np.unravel_index(left.argmax(), left.shape)
        expected.append((left[row, column], (column + 0.5) * 8, (row + 0.5) * 8))
        left[max(row - 3, 0) : row + 3, max(column - 3, 0) : column + 3] = -1
    np.testing.assert_array_equal(np.stack(candidates(values, downsample=8, radius=3, stop=0.3), 1), expected)
