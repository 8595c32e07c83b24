"""The small networks of Yu et al. 2019, eq. 1, its numbers of merit, the learning rate and the views, with the card's worked numbers."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from srcc_jax import losses, metrics, train
from srcc_jax.augment_masks import ViewConfig, random_views
from srcc_jax.methods.gastric_screening import MODELS, Config, Verdicts, patch_architecture, youden_threshold
from srcc_jax.methods.gastric_screening_paper import (
    NEGATIVE_SLIDES,
    POSITIVE_SLIDES,
    ROWS,
    SCREENING,
    SEGMENTATION,
    SITES,
)
from srcc_jax.models import zoo
from srcc_jax.models.architecture import TORCH
from srcc_jax.models.blur import BlurNet
from srcc_jax.models.foreground import ForegroundNet
from srcc_jax.models.heads import ClassHead
from srcc_jax.models.layers import init_variables, variable_shapes
from srcc_jax.models.screening import ScreeningNet
from srcc_jax.parallel import make_mesh
from srcc_jax.plateau import Plateau, adjustable_adam, rate_of, with_rate


def size(variables):
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


def test_the_screening_network_has_the_parameters_of_the_paper():
    shapes = variable_shapes(ScreeningNet(512), (1, 64, 512), (1, 64))
    assert size(shapes) == 263_169


def worked_net():
    """W = I, b = 0; w = [.5, .25], b = -.5."""
    return {
        "params": {
            "instance": {"kernel": jnp.eye(2), "bias": jnp.zeros(2)},
            "classifier": {"kernel": jnp.asarray([[0.5], [0.25]]), "bias": jnp.asarray([-0.5])},
        }
    }


def test_the_screening_network_gives_the_worked_number():
    patches = jnp.asarray([[[1.0, -1.0], [0.0, 2.0]]])
    logit = ScreeningNet(2).apply(worked_net(), patches, jnp.ones((1, 2), bool), train=False)["logits"]
    np.testing.assert_allclose(logit, [[0.5]], rtol=1e-6)
    assert jax.nn.sigmoid(logit[0, 0]) == pytest.approx(0.62246, abs=1e-5)
    assert Verdicts.at([1], [0.62246], 0.74).fn == 1


def test_places_that_are_not_valid_change_nothing():
    """Bias lets zeros speak: padding must be masked, not only zero."""
    net, rng = ScreeningNet(4), np.random.default_rng(0)
    variables = init_variables(net, jax.random.key(0), (1, 3, 2), (1, 3))
    variables["params"]["instance"]["bias"] = jnp.full(4, 5.0)
    few = rng.normal(size=(1, 2, 2)).astype(np.float32) - 4
    alone = net.apply(variables, few, np.ones((1, 2), bool), train=False)["logits"]
    for filling in (0.0, 100.0):
        padded = np.concatenate([few, np.full((1, 3, 2), filling, np.float32)], axis=1)
        valid = np.array([[True, True, False, False, False]])
        np.testing.assert_array_equal(net.apply(variables, padded, valid, train=False)["logits"], alone)
    nothing = net.apply(variables, padded, np.zeros((1, 5), bool), train=False)["logits"]
    np.testing.assert_allclose(nothing[0], variables["params"]["classifier"]["bias"])


@pytest.mark.parametrize(("net", "out"), [(ForegroundNet(), (2, 16, 24, 1)), (BlurNet(), (2, 1))])
def test_the_small_networks_take_pictures(net, out):
    variables = init_variables(net, jax.random.key(1), (1, 16, 24, 3))
    found = net.apply(variables, jnp.ones((2, 16, 24, 3)), train=True)
    assert found["dense" if len(out) == 4 else "logits"].shape == out


def test_the_foreground_network_is_four_convolutions_and_an_upsampling():
    shapes = flatten_dict(variable_shapes(ForegroundNet(), (1, 64, 64, 3))["params"])
    kernels = {path: leaf.shape for path, leaf in shapes.items() if leaf.ndim == 4}
    assert sorted(kernels.values()) == [(3, 3, 3, 16), (3, 3, 16, 32), (3, 3, 32, 1), (3, 3, 32, 32)]
    with pytest.raises(ValueError, match="multiples of 4"):
        ForegroundNet().init(jax.random.key(0), jnp.ones((1, 10, 12, 3)), train=False)


def test_the_class_branch_has_about_two_thousand_parameters():
    net = patch_architecture(Config(model="dla_dcn"))
    alone = dataclasses.replace(net, class_head=0)
    branched, bare = (size(variable_shapes(zoo.build(architecture))) for architecture in (net, alone))
    assert branched - bare == 2050


@pytest.mark.parametrize("model", MODELS)
def test_every_model_judges_patches(model):
    config = Config(model=model)
    net = patch_architecture(config)
    out = jax.eval_shape(
        lambda variables, image: zoo.build(net).apply(variables, image, train=False),
        variable_shapes(zoo.build(net)),
        jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32),
    )
    assert out["logits"].shape == (2, 2) and out["features"].shape[0] == 2
    assert ("dense" in out) == config.dense
    if config.dense:
        assert out["dense"].shape == (2, 64, 64, 1)


class Constant(nn.Module):
    """Gives the worked map and class scores whatever it sees."""

    @nn.compact
    def __call__(self, x, *, train):
        probability = jnp.asarray([[0.9, 0.2], [0.6, 0.4]])
        shift = self.param("shift", nn.initializers.zeros, ())
        dense = jnp.log(probability / (1 - probability))[None, ..., None] + shift
        return {"dense": dense, "logits": jnp.log(jnp.asarray([[0.2, 0.8]])) + shift}


def test_equation_1_gives_the_worked_number():
    batch = {
        "image": np.zeros((1, 2, 2, 3), np.uint8),
        "mask": np.array([[[1, 0], [0, 1]]], np.uint8),
        "label": np.ones(1, np.float32),
        "weight": np.ones(1, np.float32),
    }
    loss = losses.multi_task(Constant(), prepare=lambda image, mask, key: (image, mask), class_weight=0.01)
    params = {"shift": jnp.zeros(())}
    value, (_, found) = loss(params, {}, batch, jax.random.key(0))
    assert value == pytest.approx(0.542503, abs=1e-6)
    assert found["pixel_loss"][0] == pytest.approx(0.540271, abs=1e-6)
    assert found["class_loss"][0] == pytest.approx(0.223144, abs=1e-6)
    gradient = jax.grad(lambda params: loss(params, {}, batch, jax.random.key(0))[0])(params)
    assert np.isfinite(gradient["shift"]) and gradient["shift"] != 0
    padded = {**batch, "weight": np.zeros(1, np.float32)}
    assert loss(params, {}, padded, jax.random.key(0))[0] == 0


def test_dice_gives_the_worked_numbers():
    assert metrics.dice(6, 2, 3) == pytest.approx(12 / 17)
    called, truth = np.array([[0.9, 0.2], [0.6, 0.4]]) > 0.5, np.array([[1, 0], [0, 1]]) > 0
    assert metrics.dice((called & truth).sum(), (called & ~truth).sum(), (~called & truth).sum()) == 0.5
    np.testing.assert_array_equal(metrics.dice([0, 0], [0, 3], [0, 0]), [1, 0])


def test_wilson_intervals_are_those_of_the_paper():
    sensitivity, specificity = metrics.wilson_interval(99, 102), metrics.wilson_interval(777, 838)
    assert (sensitivity.low, sensitivity.high) == (pytest.approx(0.910206, abs=1e-6), pytest.approx(0.992374, abs=1e-6))
    assert (specificity.low, specificity.high) == (pytest.approx(0.90694, abs=1e-5), pytest.approx(0.94344, abs=1e-5))
    assert abs(sensitivity.low - 0.91707) > 1e-3 and abs(sensitivity.low - 0.91645) > 1e-3  # without; Clopper-Pearson
    none, all_of_them = metrics.wilson_interval(0, 5), metrics.wilson_interval(5, 5)
    assert (none.value, none.low) == (0, 0) and (all_of_them.value, all_of_them.high) == (1, 1)
    assert none.high == pytest.approx(1 - all_of_them.low)
    assert np.isnan(metrics.wilson_interval(0, 0).value)


def test_areas_under_the_precision_recall_curve_are_average_precisions():
    label, score = np.array([1, 0, 1, 0]), np.array([0.9, 0.8, 0.7, 0.6])
    assert metrics.average_precision(label, score) == pytest.approx(0.833333, abs=1e-6)
    recall, precision = np.array([0, 0.5, 0.5, 1, 1]), np.array([1, 1, 0.5, 2 / 3, 0.5])
    assert np.trapezoid(precision, recall) == pytest.approx(0.791667, abs=1e-6)  # another number, which is not reported
    assert metrics.roc_auc(label, score) == 0.75


def test_the_papers_table_follows_from_its_counts():
    for sensitivity, specificity, _, tp, tn in SCREENING.values():
        for printed, share in ((sensitivity, tp / POSITIVE_SLIDES), (specificity, tn / NEGATIVE_SLIDES)):
            assert abs(share - printed) < 1.1e-4
    assert sum(site[2] for site in SITES) == 10_315 and sum(site[3] for site in SITES) == 456
    assert all(total == positive + negative for _, _, total, positive, negative, *_ in SITES)
    assert set(ROWS) == set(MODELS) - {"tiny", "tiny_single"}
    assert {row for row, _ in ROWS.values()} >= set(SCREENING)
    assert {row for _, row in ROWS.values() if row} == set(SEGMENTATION)


def test_a_slide_is_positive_above_the_threshold_not_at_it():
    found = Verdicts.at(np.array([1, 1, 0, 0]), np.array([0.75, 0.74, 0.74, 0.75]), 0.74)
    assert (found.tp, found.fn, found.tn, found.fp) == (1, 1, 1, 1)
    assert found.sensitivity.value == found.specificity.value == 0.5


def test_youdens_threshold_divides_best():
    label, score = np.array([0, 0, 1, 0, 1, 1]), np.array([0.1, 0.2, 0.3, 0.35, 0.8, 0.9])
    chosen = youden_threshold(label, score)
    assert chosen == pytest.approx(0.575)
    gains = [
        found.sensitivity.value + found.specificity.value
        for found in (Verdicts.at(label, score, t) for t in np.linspace(0, 1, 101))
    ]
    best = Verdicts.at(label, score, chosen)
    assert best.sensitivity.value + best.specificity.value == pytest.approx(max(gains))
    assert youden_threshold(np.array([1, 0]), np.array([0.5, 0.5])) == 0.5


def test_the_rate_is_halved_as_torch_halves_it():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(3)
    recorded = np.concatenate([[1, 0.9, 0.89995, 0.95, 0.9, 0.9, 0.9], 0.9 + 0.01 * rng.normal(size=30)])
    parameter = torch.zeros(1, requires_grad=True)
    adam = torch.optim.Adam([parameter], 1e-3)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(adam, factor=0.5, patience=3, threshold=1e-4)
    rule, seen = Plateau(base=1e-3), []
    for number, loss in enumerate(recorded.tolist()):
        assert rule.rate(recorded[:number].tolist()) == pytest.approx(adam.param_groups[0]["lr"], rel=1e-12)
        seen.append(adam.param_groups[0]["lr"])
        schedule.step(loss)
    assert len(set(seen)) >= 3


def test_another_rate_is_another_step_and_no_other_program():
    mesh = make_mesh(jax.devices()[:1])
    tx = adjustable_adam(1e-3)
    traced = []

    def loss_fn(params, stats, batch, key):
        traced.append(1)
        return (params["w"] * batch["x"].sum(0)).sum(), (stats, {})

    step = train.make_train_step(loss_fn, tx, mesh)
    state = train.init_state({"params": {"w": np.ones(3, np.float32)}}, tx, 0, mesh)
    moved = []
    for rate in (1e-3, 1e-3, 5e-4):
        state = with_rate(state, rate, mesh)
        before = np.asarray(state.params["w"])
        state, _ = step(state, {"x": np.ones((1, 3), np.float32)})
        moved.append(before - np.asarray(state.params["w"]))
        assert rate_of(state) == pytest.approx(rate)
    np.testing.assert_allclose(moved, [[1e-3] * 3, [1e-3] * 3, [5e-4] * 3], rtol=1e-3)
    assert len(traced) == 1


def stripes(count=6, side=16):
    """Images whose red channel says what the mask is."""
    mask = (np.random.default_rng(1).random((count, side // 4, side // 4)) < 0.5).repeat(4, 1).repeat(4, 2)
    image = np.stack([np.where(mask, 220, 40), np.full(mask.shape, 90), np.full(mask.shape, 60)], axis=-1)
    return image.astype(np.uint8), mask.astype(np.uint8)


def test_a_view_moves_image_and_mask_alike():
    image, mask = stripes()
    config = ViewConfig(contrast=0, noise=0)
    views, masks = jax.jit(lambda image, mask, key: random_views(image, mask, key, config))(
        image, mask, jax.random.key(2)
    )
    assert set(np.unique(masks)) == {0, 1} and views.dtype == masks.dtype == np.float32
    np.testing.assert_array_equal(np.asarray(views[..., 0]) >= 130, np.asarray(masks) > 0)
    assert (np.asarray(masks) != mask).any(axis=(1, 2)).all()


def test_views_without_any_change_are_the_images():
    image, mask = stripes()
    still = ViewConfig(flips=False, rotations=False, crop=1, aspect=0, contrast=0, noise=0)
    views, masks = random_views(image, mask, jax.random.key(0), still)
    np.testing.assert_allclose(views, image, atol=1e-4)
    np.testing.assert_array_equal(masks, mask)


def test_noise_and_contrast_leave_the_mask_alone():
    image, mask = stripes()
    coloured = ViewConfig(flips=False, rotations=False, crop=1, aspect=0, contrast=0.3, noise=20)
    views, masks = random_views(image, mask, jax.random.key(0), coloured)
    np.testing.assert_array_equal(masks, mask)
    assert np.abs(np.asarray(views) - image).mean() > 2 and views.min() >= 0 and views.max() <= 255


def test_the_density_of_a_view_is_another_but_glass_stays_white():
    """Of a stain of optical density d the view has f · d, one f for all channels."""
    image, mask = stripes()
    image[:, 0] = 255
    denser = ViewConfig(flips=False, rotations=False, crop=1, aspect=0, contrast=0, noise=0, density=0.6)
    views, masks = random_views(image, mask, jax.random.key(0), denser)
    np.testing.assert_array_equal(masks, mask)
    np.testing.assert_allclose(views[:, 0], 255, rtol=1e-6)
    factor = np.log(np.asarray(views[:, 1:]) / 255) / np.log(image[:, 1:] / 255)
    np.testing.assert_allclose(factor, np.broadcast_to(factor[:, :1, :1, :1], factor.shape), rtol=1e-4)
    assert 0.4 <= factor.min() < 0.9 and 1.1 < factor.max() <= 1.6


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="contrast and density"):
        ViewConfig(density=1.0)
    for values, words in (
        ({"tile": 500}, "multiple of 32"),
        ({"blur_most": 1.0}, "--blur_most=1"),
        ({"model": "vgg"}, "--model=vgg must be one of"),
    ):
        with pytest.raises(ValueError, match=words):
            Config(**values)
    with pytest.raises(ValueError, match="--remat has no meaning for --model=efficientnet_b4"):
        patch_architecture(Config(model="efficientnet_b4", remat=True))


@pytest.mark.parametrize("scale, normal", [(0.5, -1.0), (-0.5, 1.0)])
def test_the_class_branch_is_normalised_and_leaky(scale, normal):
    """Vector g9 of the card: x̂ = -1, γ = .5, β = 0. A γ below 0 is used as it is, without the absolute value by which InPlace-ABN can be
    inverted: x̂ = 1 gives the same."""
    head = ClassHead(1, TORCH)
    variables = head.init(jax.random.key(0), jnp.zeros((1, 1)), train=False)
    leaves = {("norm", "scale"): scale, ("dense", "kernel"): 1.0}
    params = {
        path: jnp.full(leaf.shape, leaves.get(path[-2:], 0.0))
        for path, leaf in flatten_dict(variables["params"]).items()
    }
    logits = head.apply({**variables, "params": unflatten_dict(params)}, jnp.full((1, 1), normal), train=False)
    assert float(logits[0, 0]) == pytest.approx(-0.005, rel=1e-4)
