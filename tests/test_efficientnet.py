"""EfficientNet against the frameworks' own numbers, and what training does to it."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from srcc_jax.models import efficientnet, layers, pretrained, zoo
from srcc_jax.models.architecture import normalize
from tests import golden

# Golden file, variant, source, tolerance (ReLU6 lets rounding through).
GOLDEN = [
    ("torchvision_efficientnet_b0", "b0", "torchvision", 2e-5),
    ("torchvision_efficientnet_b1", "b1", "torchvision", 2e-5),
    ("torchvision_efficientnet_b4", "b4", "torchvision", 2e-5),
    ("timm_efficientnet_b1", "b1", "timm", 2e-5),
    ("timm_tf_efficientnet_b1", "b1", "timm_tf", 2e-5),
    ("timm_efficientnet_lite0", "lite0", "timm", 8e-5),
    ("timm_tf_efficientnet_lite1", "lite1", "timm_tf", 8e-5),
    ("keras_efficientnet_b1", "b1", "keras", 2e-5),
]
FAST_COMPILE = {"xla_backend_optimization_level": 0}


# Every kind of block there is, and little to compile.
STAGES = (efficientnet.Stage(1, 3, 16, 1, 1), efficientnet.Stage(4, 3, 24, 2, 2))
SMALL = efficientnet.architecture("tiny", source="torchvision", classes=3, stages=STAGES, stem=16, head=32)


@pytest.fixture(scope="module")
def variables():
    """Of the small network, with running statistics that are not fresh."""
    fresh = zoo.init(SMALL, jax.random.key(0))
    rng = np.random.default_rng(0)
    return {
        **fresh,
        "batch_stats": jax.tree.map(lambda s: s + 0.3 * rng.random(s.shape, np.float32), fresh["batch_stats"]),
    }


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(1).standard_normal((8, 32, 32, 3), dtype=np.float32)


@functools.partial(jax.jit, static_argnames=("arch", "folded"))
def evaluate(arch, variables, images, *, folded=False):
    return efficientnet.build(arch, folded=folded).apply(variables, images, train=False)


@functools.partial(jax.jit, static_argnames=("arch", "freeze_norm"))
def train(arch, variables, images, *, key=0, freeze_norm=False):
    """Outputs of a training pass, and the running statistics after it."""
    out, stats = efficientnet.build(arch).apply(
        variables,
        images,
        train=True,
        freeze_norm=freeze_norm,
        mutable=["batch_stats"],
        rngs={"dropout": jax.random.key(key)},
    )
    return out, stats["batch_stats"]


def stage_modules(arch):
    """The modules whose outputs the golden files call stages: stem, last block of each stage, top."""
    last = {block.stage: block.name for block in arch.blocks()}
    return ["stem", *last.values(), "top"]


def forward(arch, variables, image, stages=()):
    """Outputs, and those of the modules named in `stages`, compiled for a single run."""

    def apply(variables, image):
        return efficientnet.build(arch).apply(
            variables,
            image,
            train=False,
            capture_intermediates=lambda module, _: len(module.path) == 1 and module.path[0] in stages,
            mutable=["intermediates"],
        )

    compiled = jax.jit(apply).lower(variables, image).compile(compiler_options=FAST_COMPILE)
    out, captured = compiled(variables, image)
    return out, [captured["intermediates"][name]["__call__"][0] for name in stages]


def golden_case(shared_data, file, variant, source):
    """Golden numbers, architecture, variables, and images by the key of their size."""
    gold = golden.read(shared_data, file)
    keras = source == "keras"
    weights = golden.keras_weights(gold) if keras else golden.torch_weights(gold)
    arch = pretrained.source_conventions(weights, variant, source=source)
    shapes = layers.variable_shapes(efficientnet.build(arch))
    variables = pretrained.load(weights, arch, shapes, replace_head=False)

    image = golden.keras_image if keras else golden.image
    return gold, arch, variables, {key: image(gold[key]) for key in ("input_hw", "input_hw2")}


@pytest.mark.parametrize("file, variant, source, tolerance", GOLDEN, ids=[case[0] for case in GOLDEN])
def test_matches_the_golden_numbers(shared_data, file, variant, source, tolerance):
    gold, arch, variables, images = golden_case(shared_data, file, variant, source)
    assert arch.bn_epsilon == gold["bn_eps"][0]
    momentum = gold["bn_momentum_keras"][0] if source == "keras" else 1 - gold["bn_momentum_torch"][0]
    assert arch.bn_momentum == pytest.approx(momentum)

    out, stages = forward(arch, variables, images["input_hw"], stage_modules(arch))
    odd, _ = forward(arch, variables, images["input_hw2"])
    for key in ("logits", "features"):
        assert golden.difference(out[key], gold[key]) <= tolerance
        assert golden.difference(odd[key], gold[f"hw2/{key}"]) <= tolerance
    names = [key.split("/")[1] for key in gold if key.startswith("stage/") and key.endswith("/slice")]
    for name, stage in zip(names, map(np.asarray, stages), strict=True):
        layout = stage if source == "keras" else stage.transpose(0, 3, 1, 2)
        assert layout.shape == tuple(gold[f"stage/{name}/shape"])
        corner = layout[:1, :, :, :4] if source == "keras" else layout[:1, :4]
        assert golden.difference(corner, gold[f"stage/{name}/slice"]) <= 2e-4, name
        assert golden.difference(stage.mean((0, 1, 2)), gold[f"stage/{name}/chan_mean"]) <= 2e-4, name
        assert golden.difference(stage.std((0, 1, 2)), gold[f"stage/{name}/chan_std"]) <= 2e-4, name


def test_training_step_matches_torchvision(shared_data):
    gold, arch, variables, images = golden_case(shared_data, "torchvision_efficientnet_b1", "b1", "torchvision")
    arch = dataclasses.replace(arch, dropout=0.0, drop_path=0.0)

    def loss_fn(params, stats, image):
        variables = {"params": params, "batch_stats": stats}
        out, stats = efficientnet.build(arch).apply(variables, image, train=True, mutable=["batch_stats"])
        return (out["logits"] ** 2).mean(), (out["logits"], stats["batch_stats"])

    args = variables["params"], variables["batch_stats"], images["input_hw"]
    step = jax.jit(jax.value_and_grad(loss_fn, has_aux=True)).lower(*args).compile(compiler_options=FAST_COMPILE)
    (loss, (logits, stats)), grads = step(*args)
    assert loss == pytest.approx(float(gold["train/loss"]), rel=1e-5)
    assert golden.difference(logits, gold["train/logits"]) <= 2e-5
    for which, module in (("first", "stem"), ("last", "top")):
        norm = stats[module]["norm"]
        assert golden.difference(norm["mean"], gold[f"train/bn_{which}/running_mean_after"]) <= 2e-5
        assert golden.difference(norm["var"], gold[f"train/bn_{which}/running_var_after"]) <= 2e-5
    named = pretrained.export({"params": grads, "batch_stats": stats}, arch, "torchvision")
    norms = [np.linalg.norm(named[str(name)]) for name in gold["train/grad_param_names"]]
    # A shift that the next BatchNorm takes away has no gradient: 1e-8 in both, of rounding. All others are above 1e-4.
    np.testing.assert_allclose(norms, gold["train/grad_param_norms"], rtol=2e-3, atol=1e-7)


@pytest.mark.parametrize(
    "name, with_classes, trunk",
    [
        ("b0", 5_288_548, 4_007_548),
        ("b1", 7_794_184, 6_513_184),
        ("b2", 9_109_994, 7_700_994),
        ("b3", 12_233_232, 10_696_232),
        ("b4", 19_341_616, 17_548_616),
        ("b5", 30_389_784, 28_340_784),
        ("b6", 43_040_704, 40_735_704),
        ("b7", 66_347_960, 63_786_960),
        ("lite0", 4_652_008, 3_371_008),
        ("lite1", 5_416_680, 4_135_680),
        ("lite2", 6_092_072, 4_811_072),
        ("lite3", 8_197_096, 6_916_096),
        ("lite4", 13_006_568, 11_725_568),
    ],
)
def test_parameter_counts(name, with_classes, trunk):
    shapes = layers.variable_shapes(efficientnet.build(efficientnet.architecture(name, source="keras", classes=1000)))
    count = {part: sum(leaf.size for leaf in jax.tree.leaves(tree)) for part, tree in shapes["params"].items()}
    assert sum(count.values()) == with_classes
    assert sum(count.values()) - count["classifier"] == trunk


def test_blocks_of_b1():
    blocks = efficientnet.architecture("b1", source="keras", classes=1).blocks()
    assert len(blocks) == 23
    assert [block.drop_path for block in blocks] == pytest.approx([0.2 * b / 23 for b in range(23)])
    assert [block.name for block in blocks[:4]] == ["block1a", "block1b", "block2a", "block2b"]
    assert sum(block.residual for block in blocks) == 16


def test_lite_keeps_stem_head_and_end_stages():
    arch = efficientnet.architecture("lite4", source="timm", classes=1)
    repeats = [sum(block.stage == stage for block in arch.blocks()) for stage in range(1, 8)]
    assert (arch.stem_filters, arch.head_filters, repeats) == (32, 1280, [1, 4, 4, 6, 6, 8, 1])


def test_padding():
    assert layers.explicit_padding("same", (224, 224), 3, 2) == ((0, 1), (0, 1))
    assert layers.explicit_padding("same", (224, 225), 5, 2) == ((1, 2), (2, 2))
    assert layers.explicit_padding("same", (7, 8), 3, 1) == ((1, 1), (1, 1))
    assert layers.explicit_padding("symmetric", (224, 225), 5, 2) == ((2, 2), (2, 2))
    with pytest.raises(ValueError, match="'same'"):
        efficientnet.architecture("b0", source="keras", classes=1, padding="valid")


@pytest.mark.parametrize("lite", [False, True], ids=["b", "lite"])
def test_folded_batch_norm_is_the_same_function(variables, images, lite):
    arch = dataclasses.replace(SMALL, lite=lite, padding="same")
    if lite:
        params = {
            name: {part: leaf for part, leaf in module.items() if part != "squeeze_excite"}
            for name, module in variables["params"].items()
        }
        variables = {**variables, "params": params}
    folded = layers.fold_batch_norm(variables, epsilon=arch.bn_epsilon)
    assert set(folded) == {"params"}
    expected, ours = evaluate(arch, variables, images), evaluate(arch, folded, images, folded=True)
    for key, values in expected.items():
        assert golden.difference(ours[key], values) <= 1e-5
    with pytest.raises(ValueError, match="folded=False"):
        efficientnet.build(arch, folded=True).apply(folded, images, train=True)


def test_training_uses_the_batch_and_evaluation_the_running_statistics(variables, images):
    still = dataclasses.replace(SMALL, dropout=0.0, drop_path=0.0)
    evaluated = evaluate(still, variables, images)
    trained, stats = train(still, variables, images)
    assert golden.difference(trained["logits"], evaluated["logits"]) > 0.1
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a != b).any()), stats, variables["batch_stats"])))

    frozen, stats = train(still, variables, images, freeze_norm=True)
    np.testing.assert_allclose(frozen["logits"], evaluated["logits"], rtol=1e-6, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, stats, variables["batch_stats"])


def test_dropout_and_stochastic_depth_follow_the_key(variables, images):
    first, again, other = (train(SMALL, variables, images, key=key, freeze_norm=True)[0] for key in (0, 0, 1))
    np.testing.assert_array_equal(first["logits"], again["logits"])
    assert golden.difference(other["logits"], first["logits"]) > 1e-3

    paths = dataclasses.replace(SMALL, dropout=0.0, drop_path=0.9)
    other, _ = train(paths, variables, images, freeze_norm=True)
    assert golden.difference(other["features"], first["features"]) > 1e-3


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    layer = layers.DropPath(0.25)
    y = layer.apply({}, jnp.ones((4000, 2, 2, 1)), train=True, rngs={"dropout": jax.random.key(0)})
    per_sample = np.asarray(y).reshape(4000, -1)
    assert set(np.unique(per_sample)) == {np.float32(0), np.float32(1 / 0.75)}
    assert (per_sample == per_sample[:, :1]).all()
    assert per_sample[:, 0].mean() == pytest.approx(1, abs=0.03)
    np.testing.assert_array_equal(layer.apply({}, jnp.ones((3, 1)), train=False), np.ones((3, 1)))


@pytest.mark.parametrize("source, expected", [("torchvision", 0.9 + 0.1 * 5 / 3), ("keras", 0.99 + 0.01 * 1.25)])
def test_running_variance_by_hand(source, expected):
    """Values 0, 1, 2, 3: variance 5/4, unbiased 5/3; the running variance starts at 1."""
    layer = layers.BatchNorm(efficientnet.SOURCES[source])
    x = jnp.arange(4.0).reshape(4, 1, 1, 1)
    y, variables = layer.init_with_output(jax.random.key(0), x, train=True)
    y, updated = layer.apply(variables, x, train=True, mutable=["batch_stats"])
    assert updated["batch_stats"]["var"][0] == pytest.approx(expected)
    epsilon = efficientnet.SOURCES[source].bn_epsilon
    np.testing.assert_allclose(y[:, 0, 0, 0], (np.arange(4) - 1.5) / np.sqrt(1.25 + epsilon), rtol=1e-6)


def test_statistics_are_those_of_the_global_batch(variables, images):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    sharded = jax.device_put(images, NamedSharding(mesh, PartitionSpec("data")))
    one, one_stats = train(SMALL, variables, images)
    four, four_stats = train(SMALL, variables, sharded)
    assert golden.difference(four["logits"], one["logits"]) <= 1e-5
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), one_stats, four_stats)


def test_bfloat16_computes_in_it_and_keeps_float32_outside(variables, images):
    half = dataclasses.replace(SMALL, dtype="bfloat16")
    exact, out = evaluate(SMALL, variables, images), evaluate(half, variables, images)
    assert (out["maps"].dtype, out["features"].dtype, out["logits"].dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)
    assert golden.difference(out["features"], exact["features"]) < 0.05
    assert {leaf.dtype for leaf in jax.tree.leaves(zoo.init(half, jax.random.key(0)))} == {jnp.dtype("float32")}


def test_init_draws_from_the_distributions_of_the_modules():
    ours = zoo.init(SMALL, jax.random.key(3))
    args = jax.random.key(4), jnp.zeros((1, 32, 32, 3))
    fresh = jax.jit(functools.partial(efficientnet.build(SMALL).init, train=False)).lower(*args)
    theirs = fresh.compile(compiler_options=FAST_COMPILE)(*args)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(map(np.asarray, jax.tree.leaves(ours)), map(np.asarray, jax.tree.leaves(theirs))):
        assert a.shape == b.shape
        error = 6 / np.sqrt(a.size)  # six standard errors of a mean, and more than that of a standard deviation
        assert a.std() == pytest.approx(b.std(), rel=error, abs=1e-6)
        assert a.mean() == pytest.approx(b.mean(), abs=error * float(b.std()) + 1e-6)
    depthwise = ours["params"]["block2a"]["depthwise"]["conv"]["kernel"]
    assert float(depthwise.std()) == pytest.approx(np.sqrt(2 / 9), rel=0.1)
    bound = np.sqrt(6 / (SMALL.head_filters + SMALL.classes))
    assert 0.9 * bound < np.abs(ours["params"]["classifier"]["kernel"]).max() <= bound


def test_normalize():
    arch = efficientnet.architecture("lite1", source="lukemelas", classes=1)
    pixels = np.asarray([0, 127, 255], np.uint8).reshape(1, 1, 1, 3)
    np.testing.assert_allclose(normalize(pixels, arch).reshape(3), [-127 / 128, 0, 1])
    keras = efficientnet.architecture("b1", source="keras", classes=1)
    white = np.full((1, 1, 1, 3), 255, np.uint8)
    expected = (1 - np.asarray([0.485, 0.456, 0.406])) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(normalize(white, keras).reshape(3), expected, rtol=1e-6)


def test_architecture_travels_as_json():
    arch = efficientnet.architecture("lite2", source="timm_tf", classes=7, dropout=0.1, dtype="bfloat16")
    text = json.dumps(arch.as_dict())
    assert efficientnet.EfficientNetArchitecture.from_dict(json.loads(text)) == arch
    with pytest.raises(ValueError, match="bn_epsilon"):
        efficientnet.EfficientNetArchitecture.from_dict({k: v for k, v in arch.as_dict().items() if k != "bn_epsilon"})


@pytest.mark.parametrize("name, source, named", [("b8", "keras", "b7"), ("b1", "jax", "torchvision")])
def test_unknown_variants_and_sources_are_named(name, source, named):
    with pytest.raises(ValueError, match=named):
        efficientnet.architecture(name, source=source, classes=1)
