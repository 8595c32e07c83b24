"""Targets, loss, merging and epochs of Li et al. 2019: the card's worked numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srcc_jax.instances import Instances
from srcc_jax.losses import one_against_rest, soft_intersection_over_union
from srcc_jax.methods.cell_detection import (
    BACKGROUND,
    EDGE,
    IGNORED,
    INNER,
    Agreement,
    Config,
    cell_loss,
    instance_mask,
    make_loss,
    merge_masks,
    random_symmetry,
    steps_per_epoch,
    target_mask,
)
from srcc_jax.methods.cell_detection_paper import COLUMNS, TABLE
from tests import small_networks

loss_of = jax.jit(cell_loss, static_argnames="smoothing")


def mask_of(**pixels):
    mask = np.zeros((3, 3), np.uint8)
    for name, places in pixels.items():
        for place in places:
            mask[place] = {"inner": INNER, "edge": EDGE}[name]
    return mask


def test_the_worked_ellipse():
    mask = target_mask(np.array([[1, 1, 9, 7]]), 8, 10, edge_share=0.01, edge_px=1)
    assert ((mask > 0).sum(), (mask == INNER).sum(), (mask == EDGE).sum()) == (36, 20, 16)
    inner = {2: range(3, 7), 3: range(2, 8), 4: range(2, 8), 5: range(3, 7)}
    for y, row in enumerate(mask):
        assert np.flatnonzero(row == INNER).tolist() == list(inner.get(y, []))


def test_the_edge_widens_with_the_box_from_a_least_width():
    mask = target_mask(np.array([[0, 0, 100, 100]]), 100, 100, edge_share=0.1, edge_px=3)
    assert mask[50, 9] == EDGE and mask[50, 10] == INNER
    mask = target_mask(np.array([[0, 0, 20, 20]]), 20, 20, edge_share=0.1, edge_px=3)
    assert mask[10, 2] == EDGE and mask[10, 3] == INNER


def test_where_cells_overlap_the_inner_region_wins_in_any_order():
    boxes = np.array([[0, 0, 20, 20], [10, 0, 30, 20]])
    both = [target_mask(order, 20, 30, edge_share=0.1, edge_px=3) for order in (boxes, boxes[::-1])]
    np.testing.assert_array_equal(*both)
    alone = [target_mask(box[None], 20, 30, edge_share=0.1, edge_px=3) for box in boxes]
    np.testing.assert_array_equal(both[0], np.maximum(*alone))
    np.testing.assert_array_equal(target_mask(boxes[[0, 0]], 20, 30, edge_share=0.1, edge_px=3), alone[0])


@pytest.mark.parametrize(
    "box", [(-10, -10, 10, 10), (12, 12, 40, 40), (50, 50, 60, 60), (-9, 3, -2, 9), (4, 4, 4, 9), (3, 3, 5, 5)]
)
def test_boxes_at_borders_outside_or_tiny(box):
    mask = target_mask(np.array([box]), 16, 16, edge_share=0.1, edge_px=3)
    y, x = np.mgrid[:16, :16] + 0.5
    x1, y1, x2, y2 = box
    with np.errstate(divide="ignore"):
        inside = np.square((2 * x - x1 - x2) / (x2 - x1)) + np.square((2 * y - y1 - y2) / (y2 - y1)) <= 1
    np.testing.assert_array_equal(mask > 0, inside)


def test_the_worked_merge():
    predicted = mask_of(inner=[(0, 0)], edge=[(1, 1), (2, 2)])
    annotated = mask_of(edge=[(0, 0), (0, 1)], inner=[(1, 1)])
    expected = mask_of(inner=[(0, 0), (1, 1)], edge=[(0, 1), (2, 2)])
    np.testing.assert_array_equal(merge_masks(predicted, annotated), expected)


def test_instances_become_seeds_with_rings():
    label = np.array([[1, 1, 0], [2, 2, 0], [0, 0, 0]], np.int32)
    seed = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 0]], bool)
    found = Instances(label, np.zeros((2, 4)), np.ones(2), np.ones(2, int), seed)
    np.testing.assert_array_equal(instance_mask(found), mask_of(inner=[(0, 0), (1, 1)], edge=[(0, 1), (1, 0)]))


def test_agreement_is_of_all_images_together():
    agreement = Agreement()
    assert agreement.iou == 1
    agreement.add(mask_of(inner=[(0, 0)], edge=[(0, 1)]), mask_of(edge=[(0, 0)]))
    agreement.add(mask_of(inner=[(1, 1)]), mask_of(inner=[(1, 1)]))
    assert agreement.iou == pytest.approx(2 / 3)


def pixels(values):
    return jnp.asarray(values, jnp.float32)[None, None]


def logits(edge, inner):
    edge, inner = np.asarray(edge), np.asarray(inner)
    return jnp.log(pixels(np.stack([1 - edge - inner, edge, inner], axis=-1)))


def test_the_worked_loss():
    """The card's probabilities are of each class by itself: pixels where edge and inner region exceed 1 cannot be of one softmax."""
    inner, edge, one = [0.9, 0.6, 0.2, 0.1], [0.05, 0.3, 0.7, 0.1], jnp.ones((1, 1, 4))
    y_inner, y_edge = pixels([1, 1, 0, 0]), pixels([0, 0, 1, 0])
    dense = logits(edge, inner)
    inner_xent = float(one_against_rest(dense, y_inner, one, index=INNER))
    edge_xent = float(one_against_rest(dense, y_edge, one, index=EDGE))
    assert (inner_xent, edge_xent) == (pytest.approx(0.236173, abs=1e-6), pytest.approx(0.217501, abs=1e-6))
    overlap = [
        1 - float(soft_intersection_over_union(pixels(p), y, one, smoothing=0))
        for p, y in ((inner, y_inner), (edge, y_edge))
    ]
    assert overlap == [pytest.approx(0.347826, abs=1e-6), pytest.approx(0.517241, abs=1e-6)]
    mask = jnp.asarray([[[INNER, INNER, EDGE, BACKGROUND]]])
    loss, parts = cell_loss(dense, mask, jnp.ones(1), smoothing=0)
    assert float(loss) == pytest.approx(1.318741, abs=1e-5)
    assert float(parts["inner_iou_loss"]) == pytest.approx(overlap[0], abs=1e-6)


def test_an_empty_crop_costs_nothing_and_has_a_finite_gradient():
    empty = logits([1e-9] * 4, [1e-9] * 4)
    mask = jnp.zeros((1, 1, 4), jnp.uint8)
    loss, parts = cell_loss(empty, mask, jnp.ones(1), smoothing=1)
    assert float(loss) == pytest.approx(0, abs=1e-6) and float(parts["edge_iou_loss"]) == pytest.approx(0, abs=1e-6)
    sure = jnp.asarray([[[[-200.0, 0, 200]] * 4]])  # as wrong as can be
    gradient = jax.grad(lambda dense: cell_loss(dense, mask, jnp.ones(1), smoothing=1)[0])(sure)
    assert np.isfinite(gradient).all()


def test_padding_counts_for_nothing():
    dense = np.random.default_rng(0).normal(size=(2, 4, 4, 3)).astype(np.float32)
    mask = np.random.default_rng(0).integers(0, 3, (2, 4, 4)).astype(np.uint8)
    first = jnp.asarray([1.0, 0])
    alone = loss_of(dense, mask, first, smoothing=1)[0]
    other = dense.copy()
    other[1] = 7
    assert float(loss_of(other, mask, first, smoothing=1)[0]) == float(alone)
    beyond = mask.copy()
    beyond[1] = IGNORED
    np.testing.assert_allclose(loss_of(dense, beyond, jnp.ones(2), smoothing=1)[0], alone, rtol=1e-6)
    assert np.isfinite(loss_of(dense, mask, jnp.zeros(2), smoothing=1)[0])


def test_image_and_mask_turn_together():
    image = np.arange(2 * 4 * 4).reshape(2, 4, 4, 1)
    turned = np.asarray(random_symmetry(jnp.asarray(np.concatenate([image, image], axis=-1)), jax.random.key(3)))
    np.testing.assert_array_equal(turned[..., 0], turned[..., 1])
    for ours, original in zip(turned[..., 0], image[..., 0]):
        views = [np.rot90(view, k) for view in (original, original.T) for k in range(4)]
        assert any(np.array_equal(ours, view) for view in views)


def test_the_loss_function_gives_a_finite_gradient():
    net = small_networks.architecture("unet", classes=3, widths=(4, 8))
    variables = small_networks.variables(net)
    random = np.random.default_rng(0)
    batch = {
        "image": random.integers(0, 256, (2, 32, 32, 3), dtype=np.uint8),
        "mask": random.integers(0, 3, (2, 32, 32)).astype(np.uint8),
        "weight": np.ones(2, np.float32),
    }
    params, stats = variables["params"], {k: v for k, v in variables.items() if k != "params"}
    loss = make_loss(net, Config())
    (value, (_, metrics)), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(
        params, stats, batch, jax.random.key(0)
    )
    parts = sum(float(total / count) for total, count in metrics.values())
    assert float(value) == pytest.approx(parts, rel=1e-5)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_epochs_repeat_the_rarer_kind():
    config = Config()
    assert steps_per_epoch(config, annotated=77, unlabelled=0, negative=378) == round(2 * 378 / 16)
    assert steps_per_epoch(config, annotated=32, unlabelled=32, negative=0) == 4
    assert steps_per_epoch(config, annotated=1, unlabelled=0, negative=0) == 1
    assert steps_per_epoch(Config(epoch_steps=7), annotated=1, unlabelled=0, negative=0) == 7


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"crop": 100}, "--crop=100 must be a multiple of 32"),
        ({"overlap": 1024}, "--overlap=1024 must be below --window=1024"),
        ({"folds": 3, "fold": 3}, "--fold=3 of --folds=3"),
        ({"folds": 1}, "give at least 2 folds"),
        ({"self_threshold": 1.0}, "--self_threshold=1.0 must be below 1"),
    ],
)
def test_settings_that_cannot_be(changes, words):
    with pytest.raises(ValueError, match=words):
        Config(**changes)


def test_the_papers_table_is_consistent():
    """The text says 0.14 and 0.07 between cooperative and self-training."""
    froc = COLUMNS.index("FROC (mean recall)")
    assert TABLE["hard", "cooperative"][froc] - TABLE["hard", "self"][froc] == pytest.approx(0.14)
    assert TABLE["easy", "cooperative"][froc] - TABLE["easy", "self"][froc] == pytest.approx(0.075)
