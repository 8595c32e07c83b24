"""The rules of hard negative mining against numbers worked by hand: neighbours, false positives, splits, weights, metrics."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from srcc_jax.kernels.neighbours import nearest
from srcc_jax.methods.negative_mining import (
    METRICS,
    Config,
    false_positive_rows,
    folds_of,
    implied_prevalence,
    merit,
    random_neighbours,
    random_union,
    split_sizes,
    split_units,
    subset,
    union,
)
from srcc_jax.methods.negative_mining_paper import COLUMNS, TABLES
from srcc_jax.models.features import pooled

REFERENCES = np.array([[1, 0], [0, 1]], np.float32)
CANDIDATES = np.array([[0.9, 0.1], [0.5, 0.5], [0, 2], [2, 0], [-1, 0]], np.float32)


def mined(metric, alpha):
    return union(nearest(REFERENCES, CANDIDATES, k=alpha, metric=metric).index)


def test_distances_of_the_card():
    found = nearest(REFERENCES, CANDIDATES, k=5)
    wanted = [[0.141421, 0.707107, 2.236068, 1, 2], [1.272792, 0.707107, 1, 2.236068, 1.414214]]
    np.testing.assert_allclose(np.take_along_axis(np.array(wanted), found.index, 1), found.value, atol=1e-6)
    found = nearest(REFERENCES, CANDIDATES, k=5, metric="cosine")
    wanted = [[0.993884, 0.707107, 0, 1, -1], [0.110432, 0.707107, 1, 0, 0]]
    np.testing.assert_allclose(np.take_along_axis(np.array(wanted), found.index, 1), found.value, atol=1e-6)


def test_the_most_similar_are_mined_each_once():
    assert mined("l2", 1).row.tolist() == [0, 1]
    assert mined("cosine", 1).row.tolist() == [3, 2]  # the sign of the released code would take 4 and 3
    found = mined("l2", 2)
    assert found.row.tolist() == [0, 1, 2]  # of four neighbours one was found before
    assert found.query.tolist() == [0, 0, 1] and found.rank.tolist() == [0, 1, 1]


def test_equal_neighbours_stand_in_the_order_of_their_rows():
    assert nearest(REFERENCES, CANDIDATES, k=4, metric="cosine").index[1].tolist() == [2, 1, 0, 3]  # 3 and 4 are both 0


def test_a_union_keeps_the_order_of_discovery():
    found = union(np.array([[7, 3], [3, 9], [7, 1]]))
    assert found.row.tolist() == [7, 3, 9, 1]
    assert found.query.tolist() == [0, 0, 1, 2] and found.rank.tolist() == [0, 1, 1, 1]
    assert union(np.zeros((0, 5), int)).row.tolist() == []


def test_false_positives_are_negative_and_at_or_above_the_threshold():
    label, probability = np.array([0, 0, 0, 1, 0]), np.array([0.05, 0.1, 0.4, 0.9, np.nan])
    assert false_positive_rows(label, probability, threshold=0.1).tolist() == [1, 2]


def test_metrics_of_a_confusion_by_hand():
    """TP 5, FN 1, TN 10, FP 2: accuracy .8333, F1 10/13."""
    label = np.array([1] * 6 + [0] * 12)
    probability = np.array([0.9] * 5 + [0.2] + [0.05] * 10 + [0.6] * 2)
    found = merit(label, probability)
    assert found["accuracy at 0.5"] == pytest.approx(0.8333, abs=5e-5)
    assert found["F1 at 0.5"] == pytest.approx(10 / 13)
    assert found["sensitivity at 0.5"] == found["specificity at 0.5"] == pytest.approx(0.8333, abs=5e-5)
    assert found["sensitivity at 0.1"] == 1 and found["F1 at 0.1"] == pytest.approx(12 / 14)
    assert set(found) == set(METRICS) and set(COLUMNS) <= set(METRICS)


def test_the_macro_average_precision_is_of_both_classes():
    label, probability = np.array([1, 0, 1, 0]), np.array([0.9, 0.8, 0.7, 0.1])
    positive = (1 + 2 / 3) / 2  # ranks 1 and 3
    negative = (1 + 2 / 3) / 2  # ranks 1 and 3 from below
    found = merit(label, probability)
    assert found["AP, positive"] == pytest.approx(positive)
    assert found["AP, macro"] == pytest.approx((positive + negative) / 2)
    label = np.array([1, 0, 0, 0])
    assert merit(label, probability)["AP, macro"] == pytest.approx(1.0)
    assert math.isnan(METRICS["F1 at 0.5"](label, np.zeros(4), weight=np.array([0, 1.0, 0, 0])))


def test_the_prevalence_that_the_paper_s_f1_implies():
    found = implied_prevalence(specificity=0.9012, sensitivity=0.8393, accuracy=0.8821)
    assert found == pytest.approx(0.309, abs=5e-4)


def test_the_strong_models_of_table_3_were_measured_on_ever_easier_sets():
    def implied(row):
        _, _, accuracy, sensitivity, specificity = row.strong
        return implied_prevalence(specificity=specificity, sensitivity=sensitivity, accuracy=accuracy)

    found = [implied(row) for row in TABLES["Table 3"]]
    assert [row.alpha for row in TABLES["Table 3"]] == [5, 10, 20, 50, 100]
    np.testing.assert_allclose(found, [0.248, 0.235, 0.203, 0.159, 0.156], atol=6e-4)


@pytest.mark.parametrize("units, sizes", [(48, (30, 8, 10)), (54, (34, 9, 11)), (59, (37, 10, 12))])
def test_split_sizes_of_the_released_code(units, sizes):
    assert split_sizes(units) == sizes


def test_splits_and_folds_keep_units_whole_and_depend_on_the_seed_alone():
    unit = np.array([f"p{number % 48}" for number in range(200)])
    split = split_units(unit, seed=42)
    by_unit = dict(zip(unit, split))
    assert all(by_unit[name] == of for name, of in zip(unit, split))
    assert [list(by_unit.values()).count(name) for name in ("train", "validation", "test")] == [30, 8, 10]
    order = np.random.default_rng(0).permutation(200)
    np.testing.assert_array_equal(split_units(unit[order], seed=42), split[order])
    assert (split_units(unit, seed=43) != split).any()
    fold = folds_of(unit, 5, seed=1)
    assert sorted(np.unique(list(dict(zip(unit, fold)).values()), return_counts=True)[1]) == [9, 9, 10, 10, 10]
    assert all(len(set(fold[unit == name])) == 1 for name in set(unit))


def test_smaller_subsets_are_parts_of_larger_ones():
    label = np.array([0] * 60 + [1] * 30)
    kept = [set(subset(label, positive=share, negative=share, seed=3)) for share in (0.1, 0.3, 0.7, 1)]
    assert [len(rows) for rows in kept] == [9, 27, 63, 90]
    assert kept[0] < kept[1] < kept[2] < kept[3]
    imbalanced = subset(label, positive=0.1, seed=3)
    assert (label[imbalanced] == 0).sum() == 60 and (label[imbalanced] == 1).sum() == 3
    assert len(subset(label[:61], positive=0.01, seed=3)) == 61  # at least one of each


def test_the_random_control():
    found = random_neighbours(4, 1000, alpha=20, seed=1)
    assert found.shape == (4, 20) and all(len(set(row)) == 20 for row in found.tolist())
    np.testing.assert_array_equal(random_neighbours(4, 1000, alpha=20, seed=1), found)
    np.testing.assert_array_equal(random_neighbours(2, 1000, alpha=20, seed=1), found[:2])
    assert (random_neighbours(4, 1000, alpha=20, seed=2) != found).any()
    assert random_neighbours(3, 5, alpha=20, seed=1).shape == (3, 5)
    assert random_neighbours(0, 5, alpha=20, seed=1).size == 0
    drawn = random_union(4, 1000, size=30, seed=1)
    assert len(set(drawn.row.tolist())) == 30
    assert drawn.query.tolist() == [0, 1, 2, 3] * 7 + [0, 1] and drawn.rank[-1] == 7
    assert len(random_union(4, 10, size=30, seed=1).row) == 10


def test_features_are_means_over_the_map():
    """Channels [[1, 2], [3, 4]] and [[0, 0], [0, 4]] -> [2.5, 1]."""
    maps = jnp.asarray(np.stack([[[1, 2], [3, 4]], [[0, 0], [0, 4]]], -1)[None], jnp.float32)
    np.testing.assert_allclose(pooled({"stage4": maps}, "stage4"), [[2.5, 1.0]])


def test_settings():
    config = Config(positive="AC, S")
    assert config.positives == ("AC", "S") and config.mpp == pytest.approx(4.5714, abs=1e-4)
    assert (config.backbone, config.alpha, config.threshold, config.epochs, config.batch) == (
        "resnet18",
        20,
        0.1,
        30,
        32,
    )
    with pytest.raises(ValueError, match="--tile=40 must be a multiple of 32"):
        Config(tile=40)
    with pytest.raises(ValueError, match="--query=l1 must be one of"):
        Config(query="l1")
