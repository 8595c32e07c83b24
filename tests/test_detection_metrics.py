"""Boxes against boxes: stored results of an independent implementation, and the cards' worked numbers."""

import json

import numpy as np
import pytest

from data_pipelines.annotations import read_annotation
from srcc_jax.detection_metrics import (
    Matches,
    bootstrap_images,
    challenge_false_positives,
    collective_recall,
    instance_recall,
    intersection_over_union,
    match,
    normal_false_positives,
    precise_recall,
    recall_at_rates,
)


@pytest.fixture(scope="module")
def golden(shared_data):
    return json.loads((shared_data / "golden" / "metrics.json").read_text())["box_froc"]


def read(case, *, steal=False):
    """Matches of a golden set, and the scores on its normal images."""
    images = []
    for image in case["positives"]:
        found = np.asarray(image["pred"], float).reshape(-1, 5)
        images.append(match(image["gt"], found[:, 1:], found[:, 0], steal=steal))
    return images, [np.asarray(boxes, float).reshape(-1, 5)[:, 0] for boxes in case["negatives"]]


def hits(score, hit, truths):
    return Matches(np.asarray(score, float), np.asarray(hit, bool), np.zeros(truths))


@pytest.mark.parametrize("steal, key", [(False, "best_unused"), (True, "best_any")])
def test_matching_and_recall_are_the_stored_ones(golden, steal, key):
    for case in golden["sets"]:
        images, normal = read(case, steal=steal)
        expected = case["expected"][key]
        for image, wanted in zip(images, expected["hits"], strict=True):
            np.testing.assert_array_equal(image.hit, np.asarray(wanted, bool))
        assert instance_recall(images) == pytest.approx(expected["instance_recall"])
        for rule, name in (("above_next", "strictly_above_next_fp"), ("at_kth", "at_kth_fp")):
            found = recall_at_rates(images, normal, rule=rule)
            np.testing.assert_allclose(found, expected[f"recall_{name}"])
            assert found.mean() == pytest.approx(expected[f"froc_{name}"])


def test_coverage_and_false_positives_are_the_stored_ones(golden):
    for case in golden["sets"]:
        (images, normal), expected = read(case), case["expected"]
        for image, coverage in zip(images, expected["coverage"], strict=True):
            np.testing.assert_allclose(image.coverage, coverage, atol=1e-12)
        for covered, recall in expected["collective_recall"].items():
            assert collective_recall(images, covered=float(covered)) == pytest.approx(recall)
        assert normal_false_positives(normal) == pytest.approx(expected["normal_fps"])
        assert challenge_false_positives(normal) == pytest.approx(expected["challenge_fp_score"])


def test_third_partys_detections_of_real_cells(shared_data):
    """YOLOv3's boxes on three images of DigestPath, matched in descending confidence."""
    root = shared_data / "patches" / "digestpath_signet_ring"
    counts = json.loads((shared_data / "reference" / "digestpath_yolov3_greedy_match_counts.json").read_text())
    for name, expected in counts.items():
        truth, found = read_annotation(root / "gt" / name), read_annotation(root / "predicted_yolov3" / name)
        box = np.asarray([[*s.exterior.min(0), *s.exterior.max(0)] for s in found])
        gt = np.asarray([[*s.exterior.min(0), *s.exterior.max(0)] for s in truth])
        for key, wanted in expected.items():
            result = match(gt, box, np.asarray([s.score for s in found]), min_iou=float(key.removeprefix("iou")))
            assert (len(gt), len(box), int(result.hit.sum())) == (wanted["gt"], wanted["pred"], wanted["tp"])


def test_worked_boxes():
    truth = np.asarray([(0, 0, 10, 10), (20, 0, 30, 10), (40, 0, 50, 10)], float)
    box = np.asarray([(0, 0, 10, 8), (22, 3, 32, 13), (44, 0, 54, 10), (1, 0, 11, 10)], float)
    np.testing.assert_allclose(intersection_over_union(box, truth).max(1), [0.8, 56 / 144, 60 / 140, 90 / 110])
    found = match(truth, box, np.asarray([0.9, 0.8, 0.7, 0.6]))
    np.testing.assert_array_equal(found.hit, [True, True, True, False])
    np.testing.assert_allclose(found.coverage, [0.98, 0.56, 0.60])
    assert (collective_recall([found]), collective_recall([found], covered=0.58)) == (1, pytest.approx(2 / 3))


def test_worked_froc():
    images = [hits([0.95, 0.9, 0.7, 0.4, 0.3], [1, 1, 1, 0, 1], 5)]
    normal = [np.asarray([0.92, 0.8, 0.6]), np.asarray([0.5, 0.35])]
    best, public = (recall_at_rates(images, normal, rule=rule) for rule in ("above_next", "at_kth"))
    np.testing.assert_allclose(best, [0.6, 0.6, 0.8, 0.8, 0.8, 0.8])
    np.testing.assert_allclose(public, [0.4, 0.6, 0.8, 0.8, 0.8, 0.8])
    assert (best.mean(), public.mean()) == (pytest.approx(0.7333, abs=5e-5), pytest.approx(0.7))


def test_worked_false_positives():
    normal = [np.full(3, 0.9), np.zeros(0), np.full(1, 0.2)]
    assert normal_false_positives(normal) == pytest.approx(1.333, abs=5e-4)
    assert challenge_false_positives(normal) == pytest.approx(98.667, abs=5e-4)


def test_no_false_positive_allowed():
    images, normal = [hits([0.9, 0.5], [1, 1], 2)], [np.asarray([0.6])]
    assert recall_at_rates(images, normal, rates=[0]) == [0.5]
    assert recall_at_rates(images, normal, rates=[0], rule="at_kth") == [0]


def test_challenge_counts_recall_only_above_a_precision():
    assert precise_recall([hits([0.9] * 5, [1, 0, 0, 0, 0], 2)]) == 0.5
    assert precise_recall([hits([0.9] * 6, [1, 0, 0, 0, 0, 0], 2)]) == 0


def test_images_without_boxes_or_detections():
    nothing = match(np.zeros((0, 4)), np.zeros((0, 4)), np.zeros(0))
    only_truth = match(np.asarray([[0, 0, 4, 4], [5, 5, 5, 9]]), np.zeros((0, 4)), np.zeros(0))
    assert instance_recall([nothing, only_truth]) == 0 and only_truth.coverage.tolist() == [0, 0]
    only_boxes = match(np.zeros((0, 4)), np.asarray([[0, 0, 4, 4]]), np.ones(1))
    assert not only_boxes.hit.any()
    with pytest.raises(ValueError, match="none of 2 images"):
        instance_recall([nothing, only_boxes])
    with pytest.raises(ValueError, match="there is none"):
        normal_false_positives([])


def test_bootstrap_holds_the_value_and_counts_what_it_dropped():
    rng = np.random.default_rng(0)
    images = [hits(rng.random(4), rng.random(4) < 0.6, 5) for _ in range(10)] + [hits([], [], 0)]
    normal = [rng.random(rng.integers(0, 5)) for _ in range(8)]
    interval = bootstrap_images(mean_recall, images, normal, iterations=100, seed=0)
    assert interval.low < interval.value < interval.high and interval.dropped == 0
    assert bootstrap_images(mean_recall, [images[0], images[-1]], normal, iterations=100, seed=0).dropped > 0


def mean_recall(images, normal):
    return recall_at_rates(images, normal).mean()
