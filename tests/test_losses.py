"""Losses against hand-worked numbers, padding, and the modes a model is run in."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srcc_jax import losses
from tests.small_training import Net, batch_of, prepare, variables

KEY = jax.random.key(0)


class Given(nn.Module):
    """Gives logits that are its parameters, [B, K], whatever the image."""

    logits: tuple

    @nn.compact
    def __call__(self, x, *, train):
        return {"logits": self.param("logits", lambda key: jnp.array(self.logits))}


def loss_of(factory, logits, label, weight):
    """(loss, metrics, gradient by the logits) of given logits."""
    model = Given(tuple(map(tuple, logits)))
    loss_fn = factory(model, prepare=lambda image, key: image)
    batch = {"image": jnp.zeros((len(logits), 1, 1, 3)), "label": jnp.array(label), "weight": jnp.array(weight)}
    params = model.init(KEY, batch["image"], train=False)["params"]
    (loss, (_, metrics)), grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(params, {}, batch, KEY)
    return float(loss), metrics, np.asarray(grads["logits"])


def logit(p):
    return float(np.log(p / (1 - p)))


def test_binary_cross_entropy_of_the_worked_buffer():
    logits = [[logit(p)] for p in (0.9, 0.2, 0.8, 0.6)]  # a buffer of four selected tiles, as in Kanavati 2021 §2.3
    loss, metrics, grad = loss_of(losses.binary_cross_entropy, logits, [1, 0, 1, 0], [1.0] * 4)
    assert loss == pytest.approx(0.36698, abs=5e-6)
    assert [float(x) for x in metrics["accuracy"]] == [3, 4]
    np.testing.assert_allclose(grad[:, 0], np.array([-0.1, 0.2, -0.2, 0.6]) / 4, atol=1e-6)  # (p - y) / B


def test_softmax_cross_entropy_by_hand():
    loss, metrics, grad = loss_of(losses.softmax_cross_entropy, np.log([[1, 2, 5], [4, 4, 2]]), [2, 0], [1.0, 1.0])
    assert loss == pytest.approx(-(np.log(5 / 8) + np.log(0.4)) / 2, abs=1e-6)
    assert [float(x) for x in metrics["accuracy"]] == [2, 2]
    np.testing.assert_allclose(grad, np.array([[1 / 8, 2 / 8, -3 / 8], [-0.6, 0.4, 0.2]]) / 2, atol=1e-6)


@pytest.mark.parametrize("factory, columns", [(losses.binary_cross_entropy, 1), (losses.softmax_cross_entropy, 3)])
def test_padding_counts_for_nothing(factory, columns):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(5, columns)).tolist()
    label = rng.integers(0, max(columns, 2), 5).tolist()
    loss, metrics, grad = loss_of(factory, logits, label, [1.0, 1.0, 1.0, 0.0, 0.0])
    alone, _, grad_alone = loss_of(factory, logits[:3], label[:3], [1.0] * 3)
    assert loss == pytest.approx(alone, abs=1e-6) and metrics["accuracy"][1] == 3
    np.testing.assert_allclose(grad[:3], grad_alone, atol=1e-6)
    assert not grad[3:].any()


def test_extreme_logits_and_nothing_but_padding_stay_finite():
    loss, _, grad = loss_of(losses.binary_cross_entropy, [[200.0], [-200.0]], [0, 1], [1.0, 1.0])
    assert loss == pytest.approx(200) and np.isfinite(grad).all()
    loss, _, grad = loss_of(losses.binary_cross_entropy, [[3.0], [-3.0]], [0, 1], [0.0, 0.0])
    assert loss == 0 and not grad.any()


def test_two_logits_are_not_one():
    with pytest.raises(ValueError, match=r"logits \[B, 1\].*\(2, 2\)"):
        loss_of(losses.binary_cross_entropy, [[0.0, 1.0]] * 2, [0, 1], [1.0, 1.0])


@functools.cache
def small_loss(dropout, **mode):
    """The loss of the small network, compiled, and the variables it starts from."""
    return jax.jit(losses.binary_cross_entropy(Net(dropout=dropout), prepare=prepare, **mode)), variables()


def run(key=KEY, dropout=0.3, **mode):
    """(loss, statistics after) of the small network on a batch."""
    loss_fn, start = small_loss(dropout, **mode)
    loss, (stats, _) = loss_fn(start["params"], {"batch_stats": start["batch_stats"]}, batch_of(0), key)
    return float(loss), stats["batch_stats"]["norm"]["mean"]


def test_key_reaches_augmentation_and_dropout():
    assert run()[0] == run()[0]
    assert run()[0] != run(jax.random.key(1))[0]
    assert run(dropout=0.0)[0] != run(jax.random.key(1), dropout=0.0)[0]  # augmentation alone


def test_freeze_norm_leaves_statistics_and_keeps_dropout():
    trained, frozen = run(), run(freeze_norm=True)
    assert trained[1].any() and not frozen[1].any()
    assert trained[0] != frozen[0] != run(freeze_norm=True, dropout=0.0)[0]
