"""Bottleneck and student of reverse distillation against stored outputs of the same in torch."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from srcc_jax.kernels.anomaly_maps import anomaly_map, gaussian_filter
from srcc_jax.models import distillation, layers, resnet
from srcc_jax.models.names import TORCH_LEAVES, ModuleNaming
from srcc_jax.models.teachers import cut
from tests import golden
from tests.golden_networks import FAST_COMPILE, check_stages

WIDE = resnet.architecture("wide_resnet50_2", source="torchvision", classes=0)
STUDENT_STAGES = {"deep": "stage3", "mid": "stage2", "shallow": "stage1"}
FUSION = {"shallow1": "f1a", "shallow2": "f1b", "middle1": "f2a"}

# Every kind of layer, and little to compute.
SMALL = distillation.architecture(
    dataclasses.replace(WIDE, width=4), shortcut="3x3", depths=(1, 1, 1), embedding_blocks=1
)
SMALL_BASIC = dataclasses.replace(SMALL, bottleneck=False, widths=(4, 6, 8), shortcut="1x1", remat=True)


def golden_module(architecture, path):
    """The golden files' name of the module whose arrays lie at our path."""
    *block, layer, kind = path
    norm = kind == "norm"
    if block == ["fusion"]:
        return f"fusion.{FUSION[layer]}" + ("_bn" if norm else "")
    if block[0].startswith("block"):
        name, shortcut, second = f"block{int(block[0].removeprefix('block')) - 1}", "short_conv", "conv2"
    else:
        stage, number = block[0].split("_block")
        name = f"{ {ours: theirs for theirs, ours in STUDENT_STAGES.items()}[stage] }.{int(number) - 1}"
        shortcut, second = "short_up", "up" if number == "1" else "conv2"
    if layer == "shortcut":
        return f"{name}.{'short_bn' if norm else shortcut}"
    return f"{name}.{layer.replace('conv', 'bn') if norm else layer.replace('conv2', second)}"


def load(shared_data, file, model, *inputs):
    """Golden numbers and the model's variables."""
    gold = golden.read(shared_data, file)
    weights = {name: w for name, w in golden.torch_weights(gold).items() if not name.endswith("num_batches_tracked")}
    shapes = layers.variable_shapes(model, *inputs)
    naming = ModuleNaming((), "", lambda _: shapes, golden_module, TORCH_LEAVES)
    table = naming.table(model.architecture)
    assert set(table) == set(weights)
    return gold, unflatten_dict({entry.target: jnp.asarray(entry.read(weights[name])) for name, entry in table.items()})


def draw(seed, *nchw):
    return np.random.default_rng(seed).standard_normal(nchw, dtype=np.float32).transpose(0, 2, 3, 1)


def teacher_maps():
    return [draw(k, 2, c, side, side) for k, c, side in ((1, 256, 64), (2, 512, 32), (3, 1024, 16))]


@jax.jit
def anomalies(teacher, student):
    """The map of a patch as the method has it, and smoothed."""
    anomaly = anomaly_map(teacher, student, (256, 256))
    return anomaly, gaussian_filter(anomaly, sigma=4.0)


@pytest.fixture(scope="module")
def student(shared_data):
    """Golden numbers, and the compiled student with its weights."""
    model = distillation.Student(distillation.architecture(WIDE, shortcut="3x3"))
    gold, variables = load(shared_data, "rd_student", model, (1, 8, 8, 2048))
    apply = jax.jit(functools.partial(model.apply, train=False), compiler_options=FAST_COMPILE)
    return gold, functools.partial(apply, variables)


def test_student_matches_the_golden_numbers(student):
    gold, apply = student
    maps = apply(draw(4, 2, 2048, 8, 8))
    check_stages(gold, {theirs: np.asarray(maps[ours]) for theirs, ours in STUDENT_STAGES.items()})
    for theirs, ours in STUDENT_STAGES.items():
        corner = maps[ours][:, :2, :2].transpose(0, 3, 1, 2)
        assert golden.difference(corner, gold[f"output/{theirs}/corner"]) <= 2e-5


@pytest.mark.parametrize("shortcut", distillation.SHORTCUTS)
def test_bottleneck_and_what_the_student_makes_of_it_match_the_golden_numbers(shared_data, student, shortcut):
    model = distillation.Bottleneck(distillation.architecture(WIDE, shortcut=shortcut))
    maps = teacher_maps()
    gold, variables = load(shared_data, f"rd_bottleneck_{shortcut}", model, *(x.shape for x in maps))

    def apply(variables, *maps):
        def inner(module, _):
            return len(module.path) == 1

        return model.apply(variables, *maps, train=False, capture_intermediates=inner, mutable=["intermediates"])

    output, captured = jax.jit(apply, compiler_options=FAST_COMPILE)(variables, *maps)
    stages = {name: np.asarray(call["__call__"][0]) for name, call in captured["intermediates"].items()}
    numbered = {"fusion": stages["fusion"]} | {f"block{i}": stages[f"block{i + 1}"] for i in range(3)}
    check_stages(gold, numbered)
    assert golden.difference(output.transpose(0, 3, 1, 2), gold["output"]) <= 2e-5
    tail = stages["fusion"][:1, :, :, [0, 1023, 1024, 2047, 2048, 3071]].transpose(0, 3, 1, 2)
    assert golden.difference(tail, gold["fusion/tail_chan"]) <= 2e-5

    made = student[1](output)
    means = [np.asarray(made[name]).mean((0, 1, 2)) for name in ("stage1", "stage2", "stage3")]
    assert golden.difference(np.concatenate(means), gold["chain/student_chan_mean"]) <= 2e-5
    anomaly, smoothed = anomalies([np.maximum(x, 0) for x in maps], [made[f"stage{i}"] for i in (1, 2, 3)])
    for ours, key in ((anomaly, "anomaly"), (smoothed, "anomaly_smoothed")):
        assert golden.difference(ours[:, ::8, ::8], gold[f"chain/{key}"]) <= 2e-5
        assert golden.difference(ours.mean((1, 2)), gold[f"chain/{key}_mean"]) <= 2e-6
    assert golden.difference(smoothed.max((1, 2)), gold["chain/anomaly_smoothed_max"]) <= 2e-5


def count(shapes):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize("shortcut, embedding", [("3x3", 98_594_816), ("1x1", 48_263_168)])
def test_parameter_counts(shortcut, embedding):
    arch = distillation.architecture(WIDE, shortcut=shortcut)
    shapes = layers.variable_shapes(distillation.build(arch), *distillation.map_shapes(arch, side=8))["params"]
    assert count(shapes["bottleneck"].pop("fusion")) == 10_621_952
    assert count(shapes["bottleneck"]) == embedding
    assert count(shapes["student"]) == 24_917_504


def test_the_teacher_has_as_many_parameters_as_the_card_counts():
    net = cut(resnet.architecture("wide_resnet50_2", source="torchvision", classes=1000))
    assert count(layers.variable_shapes(resnet.build(net))["params"]) == 24_862_528


@pytest.mark.parametrize("teacher", ["resnet18", "wide_resnet50_2"])
def test_the_student_makes_maps_of_its_teachers_shapes(teacher):
    net = resnet.architecture(teacher, source="torchvision", classes=0, stages=3)

    def both(image):
        taps = resnet.build(net).init_with_output(jax.random.key(0), image, train=False)[0]
        model = distillation.build(distillation.architecture(net, shortcut="1x1"))
        maps = [taps[f"stage{i}"] for i in (1, 2, 3)]
        return taps, model.init_with_output(jax.random.key(0), *maps, train=False)[0]

    taps, made = jax.eval_shape(both, jax.ShapeDtypeStruct((2, 64, 96, 3), jnp.float32))
    assert {made[name].shape == taps[name].shape for name in ("stage1", "stage2", "stage3")} == {True}
    deepest = taps["stage3"].shape
    assert made["embedding"].shape == (2, deepest[1] // 2, deepest[2] // 2, 2 * deepest[3])


def small_case(arch):
    """Variables with running statistics that are not fresh, and maps to apply them to."""
    variables, rng = distillation.init(arch, jax.random.key(0)), np.random.default_rng(0)
    stats = jax.tree.map(lambda s: s + 0.3 * rng.random(s.shape, np.float32), variables["batch_stats"])
    maps = [np.maximum(draw(i, 2, c, h, w), 0) for i, (_, h, w, c) in enumerate(distillation.map_shapes(arch, side=16))]
    return variables | {"batch_stats": stats}, maps


def test_folded_batch_norm_is_the_same_function():
    variables, maps = small_case(SMALL)
    folded = layers.fold_batch_norm(variables, epsilon=SMALL.bn_epsilon)

    @functools.partial(jax.jit, compiler_options=FAST_COMPILE)
    def run(variables, folded):
        return (
            distillation.build(SMALL).apply(variables, *maps, train=False),
            distillation.build(SMALL, folded=True).apply(folded, *maps, train=False),
        )

    expected, ours = run(variables, folded)
    assert sorted(expected) == ["embedding", "stage1", "stage2", "stage3"]
    for name, values in expected.items():
        assert golden.difference(ours[name], values) <= 1e-5, name
    transposed = flatten_dict(folded["batch_stats"])  # where the BatchNorm stays: mean and var, two layers a stage
    assert len(transposed) == 2 * 2 * 3


def test_every_parameter_learns_and_every_statistic_moves():
    variables, maps = small_case(SMALL_BASIC)

    @functools.partial(jax.jit, compiler_options=FAST_COMPILE)
    def gradients(params):
        def loss(params):
            made, stats = distillation.build(SMALL_BASIC).apply(
                {**variables, "params": params}, *maps, train=True, mutable=["batch_stats"]
            )
            return anomaly_map(maps, [made[f"stage{i}"] for i in (1, 2, 3)], (16, 16)).mean(), stats["batch_stats"]

        return jax.grad(loss, has_aux=True)(params)

    grads, stats = gradients(variables["params"])
    for path, gradient in flatten_dict(grads).items():
        assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0, path
    moved = jax.tree.map(lambda new, old: bool((new != old).any()), stats, variables["batch_stats"])
    assert all(jax.tree.leaves(moved))


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"'2x2'.*3x3"):
        distillation.architecture(WIDE, shortcut="2x2")
    with pytest.raises(ValueError, match="3 levels"):
        dataclasses.replace(SMALL, widths=(4, 8))
    with pytest.raises(ValueError, match=r"\(16, 32, 65\)"):
        layers.variable_shapes(distillation.build(SMALL), (1, 8, 8, 16), (1, 4, 4, 32), (1, 2, 2, 65))
    with pytest.raises(ValueError, match="12"):
        layers.variable_shapes(distillation.build(SMALL), (1, 12, 12, 16), (1, 6, 6, 32), (1, 3, 3, 64))


def test_architecture_travels_as_json():
    assert distillation.DistillationArchitecture.from_dict(SMALL.as_dict()) == SMALL
