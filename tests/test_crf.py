"""The neural CRF against numbers worked by hand, a slow twin, and what it is at zero weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srcc_jax.models import zoo
from srcc_jax.models.crf import CRF, GridClassifier, split_grid
from tests import small_networks


@pytest.fixture(scope="module", autouse=True)
def fast_compile():
    """What runs once here takes longer to optimise than to run."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def apply(weight, features, logits, iterations=10):
    variables = {"params": {"weight": jnp.asarray(weight, jnp.float32)}}
    return np.asarray(jax.jit(CRF(iterations).apply)(variables, jnp.asarray(features), jnp.asarray(logits)))


def twin(weight, features, logits, iterations):
    """The released code's loop in NumPy, with its probabilities; one grid at a time."""
    result = []
    for f, own in zip(features.astype(np.float64), logits.astype(np.float64)):
        norm = np.linalg.norm(f, axis=1)
        potential = f @ f.T / np.outer(norm, norm) * (weight + weight.T) / 2
        now = own
        for _ in range(iterations):
            p = 1 / (1 + np.exp(-now))
            now = own + np.array(
                [sum(p[j] * row[j] - (1 - p[j]) * row[j] for j in range(len(row))) for row in potential]
            )
        result.append(now)
    return np.array(result)


@pytest.mark.parametrize("iterations, expected", [(1, 0.6732338), (2, 0.7705765)])
def test_two_patches_worked_by_hand(iterations, expected):
    """cos = 1/√2, symmetric weight 1, own logits ±1: 1 - tanh(0.5)/√2, then 1 - tanh(0.6732338 / 2)/√2."""
    features = np.array([[[1.0, 0.0], [1.0, 1.0]]], np.float32)
    got = apply([[0, 2], [0, 0]], features, np.array([[1.0, -1.0]], np.float32), iterations)
    np.testing.assert_allclose(got, [[expected, -expected]], rtol=1e-6)


def test_a_patch_supports_itself():
    """The diagonal counts: with weight 1 a lone patch of logit 1 gains tanh(0.5)."""
    assert apply([[1.0]], np.ones((1, 1, 3), np.float32), np.ones((1, 1), np.float32), 1)[0, 0] == pytest.approx(
        1.4621172, rel=1e-6
    )


def test_the_crf_is_its_slow_twin():
    random = np.random.default_rng(0)
    weight, features, logits = random.normal(0, 0.5, (9, 9)), random.random((4, 9, 16)), random.normal(0, 2, (4, 9))
    got = apply(weight, features.astype(np.float32), logits.astype(np.float32))
    np.testing.assert_allclose(got, twin(weight, features, logits, 10), rtol=1e-5, atol=1e-5)


def test_at_zero_weights_the_logits_are_the_patches_own_and_the_weights_have_a_gradient():
    random = np.random.default_rng(1)
    features, logits = (
        jnp.asarray(random.random((2, 4, 8)), jnp.float32),
        jnp.asarray(random.normal(size=(2, 4)), jnp.float32),
    )
    fresh = {"params": {"weight": jnp.zeros((4, 4))}}

    @jax.jit
    def both(variables, features):
        value = CRF().apply(variables, features, logits)
        return value, *jax.grad(lambda v, f: CRF().apply(v, f, logits).sum(), argnums=(0, 1))(variables, features)

    value, of_weight, of_features = both(fresh, features)
    np.testing.assert_array_equal(value, logits)
    assert (np.asarray(of_weight["params"]["weight"]) != 0).all() and not of_features.any()
    ones = {"params": {"weight": jnp.ones((4, 4))}}
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(both(ones, jnp.zeros_like(features))))


def test_a_grid_is_divided_row_by_row():
    image = np.arange(2 * 6 * 9 * 1).reshape(2, 6, 9, 1)
    parts = np.asarray(split_grid(jnp.asarray(image), 3)).reshape(2, 3, 3, 2, 3, 1)
    for row in range(3):
        for column in range(3):
            np.testing.assert_array_equal(
                parts[:, row, column], image[:, 2 * row : 2 * row + 2, 3 * column : 3 * column + 3]
            )
    with pytest.raises(ValueError, match="6 × 9 pixels cannot be divided into 4 × 4"):
        split_grid(jnp.asarray(image), 4)


def test_a_grid_classifier_sees_each_patch_by_itself_before_the_crf():
    backbone = small_networks.architecture("resnet18", classes=1)
    image = jnp.asarray(np.random.default_rng(2).normal(size=(2, 64, 64, 3)), jnp.float32)
    network, alone = GridClassifier(zoo.build(backbone), 2, True), small_networks.variables(backbone)
    weight = np.random.default_rng(3).normal(size=(4, 4)).astype(np.float32)
    params = {"backbone": alone["params"], "crf": {"weight": weight}}
    variables = {"params": params, "batch_stats": {"backbone": alone["batch_stats"]}}

    @jax.jit
    def both(image):
        each = zoo.build(backbone).apply(alone, split_grid(image, 2), train=False)
        return (
            network.apply(variables, image, train=False),
            each["logits"].reshape(2, 4),
            each["features"].reshape(2, 4, -1),
        )

    out, logits, features = both(image)
    np.testing.assert_allclose(out["features"], features, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        out["logits"], twin(weight, np.asarray(features), np.asarray(logits), 10), rtol=1e-4, atol=1e-4
    )
