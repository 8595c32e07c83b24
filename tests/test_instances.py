"""The random walker against stored results and scikit-image, and cells from probabilities."""

import json

import numpy as np
import pytest
from scipy import ndimage
from skimage.segmentation import random_walker as published_walker

from srcc_jax import instances
from srcc_jax.instances import find_instances, random_walker, walker_probabilities


def scene(cells, side=120, *, seed=0):
    """Probabilities [side, side, 3] of round cells (x, y, radius): an inner region, an edge of a quarter of the radius, noise."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side] + 0.5
    inner, classes = np.zeros((side, side)), np.zeros((side, side), int)
    for cx, cy, radius in cells:
        away = np.hypot(x - cx, y - cy) / radius
        inner = np.maximum(inner, np.clip(3 * (1 - away), 0, 0.95))
        classes = np.maximum(classes, np.select([away < 0.75, away < 1], [2, 1], 0))
    inner = np.clip(inner + random.normal(0, 0.02, inner.shape), 0.01, 0.98)
    inner = np.select(
        [classes == 2, classes == 1], [np.maximum(inner, 0.6), np.minimum(inner, 0.4)], np.minimum(inner, 0.1)
    )
    rest = 1 - inner
    edge = np.where(classes == 1, 0.95, 0.05) * rest
    return np.stack([rest - edge, edge, inner], axis=-1).astype(np.float32)


TOUCHING = [(40, 40, 18), (70, 42, 17), (55, 68, 16), (100, 100, 14)]


@pytest.fixture(scope="module")
def golden(shared_data):
    return json.loads((shared_data / "golden" / "metrics.json").read_text())["random_walker"]


def test_labels_and_probabilities_are_the_stored_ones(golden):
    for case in golden["cases"]:
        data, labels = np.array(case["data"]), np.array(case["labels"])
        expected, probability = np.maximum(case["result"], 0), np.array(case["probabilities"])
        found = random_walker(data, labels)
        np.testing.assert_array_equal(found, expected, case["title"])
        undecided = (labels == 0) & (expected > 0)
        scale = golden["beta"] / (10 * data.std())
        touched, ours = walker_probabilities(data, undecided, np.maximum(labels, 0), scale)
        np.testing.assert_allclose(ours.T, probability[touched - 1][:, undecided], atol=1e-6)


def test_the_worked_row():
    data, labels = np.array([[1, 0.9, 0.8, 0.3, 0.9, 1]]), np.array([[1, 0, 0, 0, 0, 2]])
    np.testing.assert_array_equal(random_walker(data, labels), [[1, 1, 1, 1, 2, 2]])
    _, probability = walker_probabilities(data, labels == 0, labels, 130 / (10 * data.std()))
    assert probability[2, 0] == pytest.approx(0.99729, abs=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_pieces_give_what_the_whole_image_gives(seed):
    """scikit-image solves for all labels over the whole image at once."""
    probability = scene(TOUCHING, seed=seed)
    inner = probability[..., 2].astype(np.float64)
    seeds, _ = ndimage.label(inner > 0.5)
    markers = np.where(seeds > 0, seeds, np.where(probability.argmax(-1) > 0, 0, -1))
    whole = published_walker(inner, markers, beta=130, mode="bf")
    np.testing.assert_array_equal(random_walker(inner, markers), np.maximum(whole, 0))


def test_a_part_of_a_map_has_the_cells_of_the_whole():
    """With the whole map's spread, which a part alone does not have."""
    probability = scene([(40, 40, 18), (70, 42, 17), (100, 100, 14)])
    spread = float(probability[..., 2].astype(np.float64).std())
    whole = find_instances(probability, threshold=0.5, min_area=20)
    part = find_instances(probability[10:75, 12:100], threshold=0.5, min_area=20, spread=spread)
    np.testing.assert_array_equal(part.box + np.array([12, 10, 12, 10]), whole.box[:2])
    np.testing.assert_array_equal(part.label > 0, whole.label[10:75, 12:100] > 0)
    np.testing.assert_allclose(part.score, whole.score[:2], rtol=1e-12)


def test_cells_have_boxes_scores_and_areas():
    cells = [(30, 30, 18), (80, 42, 17), (50, 90, 16)]
    found = find_instances(scene(cells), threshold=0.5, min_area=20)
    assert len(found) == 3 and found.label.dtype == np.int32
    for (x, y, radius), box in zip(cells, found.box):
        np.testing.assert_allclose(box, [x - radius, y - radius, x + radius, y + radius], atol=1.5)
    assert ((found.score > 0.6) & (found.score < 1)).all()
    np.testing.assert_array_equal(found.area, np.bincount(found.label.ravel())[1:])
    assert not found.seed[found.label == 0].any()


def test_small_seeds_are_no_cells():
    probability = scene([(40, 40, 18), (90, 90, 4)])
    assert len(find_instances(probability, threshold=0.5, min_area=5)) == 2
    assert len(find_instances(probability, threshold=0.5, min_area=100)) == 1


def test_seeds_are_where_the_inner_region_is_most_probable():
    """Card f.4: argmax, which a threshold below one half (cooperative training's 0.33) does not give by itself."""
    probability = np.full((20, 41, 3), (0.1, 0.1, 0.8))
    probability[:, 20] = 0.15, 0.45, 0.40
    assert len(find_instances(probability, threshold=0.33, min_area=20)) == 2


def test_edges_without_a_seed_are_background():
    probability = scene([(40, 40, 18), (90, 90, 10)])
    away = np.hypot(*(np.mgrid[:120, :120] - 90)) < 12
    probability[away, 2] = 0.1
    found = find_instances(probability, threshold=0.5, min_area=20)
    assert len(found) == 1 and not found.label[away].any()


@pytest.mark.parametrize("classes", [0, 1, 2])
def test_constant_maps(classes):
    """Their spread is 0, by which scikit-image would divide."""
    probability = np.full((16, 16, 3), 0.1, np.float32)
    probability[..., classes] = 0.8
    found = find_instances(probability, threshold=0.5, min_area=100)
    assert len(found) == (classes == 2) and np.isfinite(found.score).all()
    data, labels = np.ones((1, 5)), np.array([[1, 0, 0, 0, 2]])
    np.testing.assert_array_equal(random_walker(data, labels), [[1, 1, 1, 2, 2]])  # the middle is a draw: the lowest


def test_a_large_piece_is_flooded(monkeypatch):
    probability = scene(TOUCHING)
    monkeypatch.setattr(instances, "_LARGEST", 10)
    flooded = find_instances(probability, threshold=0.5, min_area=20)
    again = find_instances(probability, threshold=0.5, min_area=20)
    np.testing.assert_array_equal(flooded.label, again.label)
    monkeypatch.undo()
    solved = find_instances(probability, threshold=0.5, min_area=20)
    np.testing.assert_array_equal(flooded.label > 0, solved.label > 0)
    np.testing.assert_array_equal(flooded.label[flooded.seed], solved.label[solved.seed])
