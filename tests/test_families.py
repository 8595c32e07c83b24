"""What ResNet, DenseNet, Res2Net and FCN promise alike, on small networks of each."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srcc_jax.models import layers, zoo
from tests import golden, small_networks
from tests.golden_networks import FAST_COMPILE

SMALL = {
    "resnet": zoo.architecture("resnet18", source="torchvision", classes=3, depths=(1, 1), stages=2, width=8),
    "resnet, keras": zoo.architecture("resnet50", source="keras", classes=3, depths=(1, 1), stages=2, width=8),
    "densenet": zoo.architecture("densenet121", source="torchvision", classes=3, depths=(2, 1), growth=8, width=16),
    "res2net": zoo.architecture("res2net50_26w_4s", source="timm", classes=3, depths=(2,), stages=1, width=16),
    "fcn": zoo.architecture(
        "fcn_resnet50", source="torchvision", classes=3, class_head=2, depths=(1, 1, 1, 1), width=8
    ),
}
families = pytest.mark.parametrize("arch", SMALL.values(), ids=SMALL)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(1).standard_normal((4, 32, 40, 3), dtype=np.float32)


@functools.partial(jax.jit, static_argnames=("arch", "folded"), compiler_options=FAST_COMPILE)
def evaluate(arch, variables, images, *, folded=False):
    return zoo.build(arch, folded=folded).apply(variables, images, train=False)


@functools.partial(jax.jit, static_argnames="arch", compiler_options=FAST_COMPILE)
def train(arch, variables, images):
    """Outputs and running statistics of two training passes, with the batch's statistics and with frozen ones."""

    def forward(*, freeze_norm):
        return zoo.build(arch).apply(variables, images, train=True, freeze_norm=freeze_norm, mutable=["batch_stats"])

    return forward(freeze_norm=False), forward(freeze_norm=True)


@functools.partial(jax.jit, static_argnames="arch", compiler_options=FAST_COMPILE)
def gradients(arch, variables, images):
    """Of a training pass, and its running statistics."""

    def loss(params):
        out, stats = zoo.build(arch).apply({**variables, "params": params}, images, train=True, mutable=["batch_stats"])
        return (out["logits"] ** 2).mean(), stats

    return jax.grad(loss, has_aux=True)(variables["params"])


def assert_close(ours, expected, tolerance):
    """Relative to an array's largest value, or to 1: a bias that BatchNorm takes away has a gradient of rounding alone."""
    bound = jax.tree.map(lambda b: tolerance * max(1.0, float(np.abs(b).max())), expected)
    jax.tree.map(lambda a, b, atol: np.testing.assert_allclose(a, b, rtol=0, atol=atol), ours, expected, bound)


@families
def test_folded_batch_norm_is_the_same_function(arch, images):
    variables = small_networks.variables(arch)
    folded = layers.fold_batch_norm(variables, epsilon=arch.bn_epsilon)
    expected_shapes = jax.eval_shape(lambda: zoo.build(arch, folded=True).init(jax.random.key(0), images, train=False))
    assert jax.tree.map(np.shape, folded) == jax.tree.map(np.shape, expected_shapes)
    assert len(jax.tree.leaves(folded)) < len(jax.tree.leaves(variables))
    assert_close(evaluate(arch, folded, images, folded=True), evaluate(arch, variables, images), 1e-5)
    with pytest.raises(ValueError, match="folded=False"):
        zoo.build(arch, folded=True).apply(folded, images, train=True)


@families
def test_training_uses_the_batch_unless_norms_are_frozen(arch, images):
    variables = small_networks.variables(arch)
    evaluated = evaluate(arch, variables, images)
    (trained, updated), (frozen, kept) = train(arch, variables, images)
    assert golden.difference(trained["features"], evaluated["features"]) > 0.1
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), updated["batch_stats"], variables["batch_stats"])
    assert all(jax.tree.leaves(changed))
    assert_close(frozen, evaluated, 1e-6)
    jax.tree.map(np.testing.assert_array_equal, kept["batch_stats"], variables["batch_stats"])


def test_rematerialised_training_is_the_same(images):
    arch = SMALL["densenet"]
    variables, lean = small_networks.variables(arch), dataclasses.replace(arch, remat=True)
    assert_close(gradients(lean, variables, images), gradients(arch, variables, images), 1e-4)


@families
def test_rematerialisation_is_used_where_asked(arch, images):
    variables = small_networks.variables(arch)
    for remat in (False, True):
        traced = gradients.trace(dataclasses.replace(arch, remat=remat), variables, images)
        assert ("remat" in str(traced.jaxpr)) == remat


@families
def test_bfloat16_keeps_float32_outside(arch, images):
    half = zoo.build(dataclasses.replace(arch, dtype="bfloat16"))
    variables = small_networks.variables(arch)
    out = jax.eval_shape(functools.partial(half.apply, train=False), variables, images)
    exact = {name for name, value in out.items() if value.dtype == jnp.float32}
    assert exact == {"logits", "features", "dense"} & set(out)


def test_bfloat16_computes_nearly_the_same(images):
    arch = SMALL["densenet"]
    exact, out = (
        evaluate(each, small_networks.variables(arch), images)
        for each in (arch, dataclasses.replace(arch, dtype="bfloat16"))
    )
    assert golden.difference(out["features"], np.asarray(exact["features"])) < 0.05


def test_init_draws_kernels_and_leaves_the_rest_fresh():
    variables = zoo.init(SMALL["densenet"], jax.random.key(0))
    assert jax.tree.map(np.shape, variables) == jax.tree.map(np.shape, small_networks.variables(SMALL["densenet"]))
    for path, leaf in jax.tree.leaves_with_path(variables):
        assert (leaf.std() > 0) == (path[-1].key == "kernel")


@families
def test_architecture_travels_as_json(arch):
    assert zoo.from_dict(json.loads(json.dumps(arch.as_dict()))) == arch


@families
def test_unknown_variants_and_sources_are_named(arch):
    family = zoo.family(arch.name)
    with pytest.raises(ValueError, match=arch.name):
        family.architecture("vgg", source=arch.source, classes=1)
    with pytest.raises(ValueError, match=arch.source):
        family.architecture(arch.name, source="caffe2", classes=1)
