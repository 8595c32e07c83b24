"""Dense DLA and the U-Nets against plain loops that read the weights by the names in others' files."""

import dataclasses
import itertools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from srcc_jax.models import dla, dla_dense, layers, pretrained, unet, unet_encoders, zoo
from tests import golden, golden_networks

WIDTHS = (4, 6, 8, 10, 12, 14)
IMAGE = np.random.default_rng(0).standard_normal((2, 64, 32, 3), dtype=np.float32)


def dense_dla(*, source="ucbdrive", **changes):
    return dla_dense.architecture("dla34_dense", source=source, classes=2, widths=WIDTHS, **changes)


class Pyramid(nn.Module):
    """In the place of an encoder, of which nothing is to be compiled: maps without parameters, each half as large."""

    architecture: dla.DLAArchitecture
    folded: bool

    @nn.compact
    def __call__(self, x, *, train, freeze_norm):
        levels = {}
        for level, width in enumerate(self.architecture.widths):
            b, h, w, _ = x.shape
            small = x.reshape(b, h >> level, 1 << level, w >> level, 1 << level, 3).mean((2, 4))
            levels[f"level{level}"] = jnp.sin(small @ jnp.arange(3.0 * width).reshape(3, width))
        return levels | layers.classify(levels["level5"], classes=0)


@pytest.fixture
def pyramid(monkeypatch):
    """The networks on DLA-34 stand on a Pyramid."""
    monkeypatch.setattr(dla, "DLA", Pyramid)
    encoder = dataclasses.replace(unet_encoders.ENCODERS["unet_dla34"], network=Pyramid)
    monkeypatch.setitem(unet_encoders.ENCODERS, "unet_dla34", encoder)
    forget_shapes()
    yield
    forget_shapes()


def forget_shapes():
    """What is kept of the networks' variables, which are others with and without an encoder."""
    layers._flat_shapes.cache_clear()
    pretrained._table.cache_clear()


def parameters(arch):
    return sum(leaf.size for leaf in jax.tree.leaves(layers.variable_shapes(zoo.build(arch))["params"]))


def trained(arch):
    """Variables in which no BatchNorm is the identity."""
    rng = np.random.default_rng(1)

    def change(path, leaf):
        name = path[-1].key
        if name in ("scale", "bias", "mean", "var"):
            return leaf + 0.3 * rng.random(leaf.shape, np.float32)
        return leaf

    return jax.tree_util.tree_map_with_path(change, zoo.init(arch, jax.random.key(0)))


class Twin:
    """The modules of a torch file by their names, on NHWC arrays."""

    def __init__(self, weights):
        self.weights = weights

    def __contains__(self, name):
        return f"{name}.weight" in self.weights

    def conv(self, name, x):
        kernel = self.weights[f"{name}.weight"].transpose(2, 3, 1, 0)
        same = [(kernel.shape[0] // 2,) * 2] * 2
        x = lax.conv_general_dilated(x, kernel, (1, 1), same, dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return x + self.weights.get(f"{name}.bias", np.zeros(kernel.shape[3])).reshape(1, 1, 1, -1)

    def conv_norm_relu(self, conv, norm, x):
        x = self.conv(conv, x)
        scale, bias, mean, var = (
            self.weights[f"{norm}.{leaf}"].reshape(1, 1, 1, -1)
            for leaf in ("weight", "bias", "running_mean", "running_var")
        )
        return jnp.maximum((x - mean) / np.sqrt(var + 1e-5) * scale + bias, 0)

    def up(self, name, x, *, padding):
        """Transposed convolution, each channel by itself where the file's kernel has one output; pixel by pixel."""
        kernel = self.weights[f"{name}.weight"].transpose(2, 3, 0, 1)
        stride = kernel.shape[0] - 2 * padding
        each = "bhwc,c->bhwc" if kernel.shape[3] == 1 else "bhwc,cf->bhwf"
        b, h, w, c = x.shape
        out = np.zeros((b, stride * h + 2 * padding, stride * w + 2 * padding, kernel.shape[3] if "f" in each else c))
        for i, j in itertools.product(range(kernel.shape[0]), range(kernel.shape[1])):
            tap = kernel[i, j, :, 0] if kernel.shape[3] == 1 else kernel[i, j]
            out[:, i : i + stride * h : stride, j : j + stride * w : stride] += np.einsum(each, x, tap)
        inside = slice(padding, -padding or None)
        return (out + self.weights.get(f"{name}.bias", 0))[:, inside, inside].astype(np.float32)


def ida_up(twin, prefix, maps, *, centernet):
    """The authors' IDAUp; CenterNet's adds where theirs concatenates. Offsets are zero, so nothing is deformed."""
    maps = list(maps)
    for i in range(1, len(maps)):
        project, up = f"{prefix}.proj_{i}", f"{prefix}.up_{i}"
        if f"{project}.0" in twin:
            maps[i] = twin.conv_norm_relu(f"{project}.0", f"{project}.1", maps[i])
        maps[i] = twin.up(up, maps[i], padding=twin.weights[f"{up}.weight"].shape[2] // 4)
    results, x = [], maps[0]
    for i in range(1, len(maps)):
        x = x + maps[i] if centernet else jnp.concatenate([x, maps[i]], -1)
        x = twin.conv_norm_relu(f"{prefix}.node_{i}.0", f"{prefix}.node_{i}.1", x)
        results.append(x)
    return results


def decode(twin, maps, *, centernet):
    """The authors' DLAUp and their head, or CenterNet's; scores at the size of the first map."""
    maps, results = list(maps), [maps[-1]]
    for i in range(len(maps) - 1):
        maps[-i - 1 :] = ida_up(twin, f"dla_up.ida_{i}", maps[-i - 2 :], centernet=centernet)
        results.insert(0, maps[-1])
    if not centernet:
        return twin.conv("fc.0", maps[-1])
    x = ida_up(twin, "ida_up", results[:3], centernet=True)[-1]
    return twin.conv("fc.2", jnp.maximum(twin.conv("fc.0", x), 0))


@pytest.mark.parametrize(
    "changes",
    [{}, {"nodes": "deformable", "down_ratio": 4}, {"decoder": "centernet"}],
    ids=["ucbdrive", "deformable", "centernet"],
)
def test_dense_dla_is_its_authors_network(pyramid, changes):
    arch = dense_dla(**changes)
    variables = without_offsets(trained(arch))
    out = golden_networks.evaluate(arch, variables, IMAGE)
    twin = Twin(pretrained.export(variables, arch, "ucbdrive"))
    centernet = arch.decoder == "centernet"
    scores = decode(twin, [np.asarray(out[f"level{level}"]) for level in range(arch.finest, 6)], centernet=centernet)
    taps = (
        [0.125, 0.375, 0.625, 0.875, 0.875, 0.625, 0.375, 0.125] if arch.down_ratio == 4 else [0.25, 0.75, 0.75, 0.25]
    )
    twin.weights["up.weight"] = np.broadcast_to(np.outer(taps, taps), (2, 1, len(taps), len(taps)))
    expected = twin.up("up", scores, padding=arch.down_ratio // 2)
    assert out["dense"].shape == (*IMAGE.shape[:3], 2)
    assert golden.difference(out["dense"], expected) <= 1e-5


def without_offsets(variables):
    """The same with fresh offset convolutions."""

    def zero(path, leaf):
        return jnp.zeros_like(leaf) if any(getattr(key, "key", None) == "offset" for key in path) else leaf

    return jax.tree_util.tree_map_with_path(zero, variables)


def test_sizes_of_dense_dla(pyramid):
    """Millions of the card. They include the encoder (counted in test_dla.py) and the fixed taps of the last upsampling."""

    def millions(*, taps, **changes):
        arch = dla_dense.architecture("dla34_dense", source="ucbdrive", classes=1, **changes)
        return round((15_270_832 + parameters(arch) + taps) / 1e6, 2)

    assert millions(taps=16) == 17.58
    assert millions(taps=64, down_ratio=4) == 17.50
    assert millions(taps=16, nodes="deformable") == 17.85
    assert millions(taps=0, decoder="centernet") == 19.15
    assert parameters(dense_dla(class_head=2)) - parameters(dense_dla()) == 2 * 14 + 14 * 2 + 2


@pytest.mark.parametrize(
    "source, batch_norm, expected", [("original", False, 31_031_810), ("milesial", True, 31_037_698)]
)
def test_size_of_the_original_unet(source, batch_norm, expected):
    arch = unet.architecture("unet", source=source, classes=2)
    assert (arch.batch_norm, parameters(arch)) == (batch_norm, expected)


def test_sizes_of_unets_on_classifiers():
    """24,436,369: segmentation_models_pytorch's Unet("resnet34") of one class."""
    assert parameters(zoo.architecture("unet_resnet34", source="torchvision", classes=1)) == 24_436_369
    heads = (zoo.architecture("unet_dla34", source="timm", classes=3, class_head=head) for head in (0, 2))
    without, with_head = map(parameters, heads)
    assert with_head - without == 2_050


@pytest.mark.parametrize("source", unet.SOURCES)
def test_unet_is_the_plain_loop(source):
    arch = unet.architecture("unet", source=source, classes=2, widths=(4, 6, 8), class_head=3)
    variables = trained(arch)
    out = golden_networks.evaluate(arch, variables, IMAGE)
    twin = Twin(pretrained.export(variables, arch, source))

    def double_conv(name, x):
        if source == "milesial":
            x = twin.conv_norm_relu(f"{name}.double_conv.0", f"{name}.double_conv.1", x)
            return twin.conv_norm_relu(f"{name}.double_conv.3", f"{name}.double_conv.4", x)
        return jnp.maximum(twin.conv(f"{name}.double_conv.2", jnp.maximum(twin.conv(f"{name}.double_conv.0", x), 0)), 0)

    def halve(x):
        b, h, w, c = x.shape
        return x.reshape(b, h // 2, 2, w // 2, 2, c).max((2, 4))

    first = double_conv("inc", IMAGE)
    second = double_conv("down1.maxpool_conv.1", halve(first))
    third = double_conv("down2.maxpool_conv.1", halve(second))
    x = double_conv("up1.conv", jnp.concatenate([second, twin.up("up1.up", np.asarray(third), padding=0)], -1))
    x = double_conv("up2.conv", jnp.concatenate([first, twin.up("up2.up", np.asarray(x), padding=0)], -1))
    assert golden.difference(out["dense"], twin.conv("outc.conv", x)) <= 1e-5
    assert golden.difference(out["features"], third.mean((1, 2))) <= 1e-5

    norm = {leaf: twin.weights[f"class_head.norm.{leaf}"] for leaf in ("weight", "bias", "running_mean", "running_var")}
    z = (third.mean((1, 2)) - norm["running_mean"][None]) / np.sqrt(norm["running_var"][None] + 1e-5)
    z = z * norm["weight"][None] + norm["bias"][None]
    weights, bias = (twin.weights[f"class_head.dense.{leaf}"] for leaf in ("weight", "bias"))
    assert golden.difference(out["logits"], np.where(z > 0, z, 0.01 * z) @ weights.T + bias[None]) <= 1e-5


def test_unet_on_a_classifier_is_the_plain_loop(pyramid):
    arch = zoo.architecture("unet_dla34", source="timm", classes=3, widths=(10, 8, 6, 4, 4))
    variables = trained(arch)
    out = golden_networks.evaluate(arch, variables, IMAGE)
    *skips, x = (np.asarray(out[f"level{level}"]) for level in range(1, 6))
    assert [skip.shape[1] for skip in skips] == [32, 16, 8, 4]
    twin = Twin(pretrained.export(variables, arch, "timm"))
    for block, skip in enumerate([*reversed(skips), None]):
        x = np.asarray(x).repeat(2, 1).repeat(2, 2)
        x = x if skip is None else np.concatenate([x, skip], -1)
        for conv in (f"decoder.blocks.{block}.conv1", f"decoder.blocks.{block}.conv2"):
            x = twin.conv_norm_relu(f"{conv}.0", f"{conv}.1", x)
    assert golden.difference(out["dense"], twin.conv("segmentation_head.0", x)) <= 1e-5


def test_a_training_step_of_the_multi_task_network():
    """The network of Yu et al.: a finite loss, a gradient for every parameter, statistics of all norms."""
    arch = dense_dla(stem="3x3", activation="leaky", nodes="deformable", class_head=2, remat=True, down_ratio=16)
    variables = zoo.init(arch, jax.random.key(0))

    def loss_fn(params, stats, image):
        net = zoo.build(arch)
        out, stats = net.apply({"params": params, "batch_stats": stats}, image, train=True, mutable=["batch_stats"])
        return jnp.abs(out["dense"]).mean() + (out["logits"] ** 2).mean(), stats["batch_stats"]

    args = variables["params"], variables["batch_stats"], IMAGE
    step = jax.jit(jax.value_and_grad(loss_fn, has_aux=True), compiler_options=golden_networks.FAST_COMPILE)
    (loss, stats), grads = step(*args)
    assert np.isfinite(loss)
    assert all(np.isfinite(leaf).all() and np.any(leaf) for leaf in jax.tree.leaves(grads))
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), stats, variables["batch_stats"])
    assert all(jax.tree.leaves(changed))


def test_folded_batch_norm_is_the_same_function(pyramid):
    arch = dense_dla(decoder="centernet", class_head=2)
    variables = without_offsets(trained(arch))
    folded = layers.fold_batch_norm(variables, epsilon=arch.bn_epsilon)
    assert set(folded["batch_stats"]) == {"class_head"}
    expected, ours = (
        golden_networks.evaluate(arch, variables, IMAGE),
        golden_networks.evaluate(arch, folded, IMAGE, folded=True),
    )
    for key in ("dense", "logits", "features"):
        assert golden.difference(ours[key], expected[key]) <= 1e-5, key


@pytest.mark.parametrize("name, changes", [("dla34_dense", {"widths": WIDTHS}), ("unet_dla34", {})])
def test_a_classifiers_weights_fill_the_encoder(name, changes):
    classifier = dla.architecture("dla34", source="timm", classes=5, **changes)
    file = pretrained.export(zoo.init(classifier, jax.random.key(1)), classifier, "timm")
    arch = zoo.architecture(name, source="timm", classes=1, **changes)
    assert arch.trunk == dataclasses.replace(classifier, classes=0)
    variables = zoo.init(arch, jax.random.key(2))
    filled = pretrained.load_trunk(file, classifier, variables, module="trunk")
    named = pretrained.export(filled, arch, "timm")
    prefix = "base." if name == "dla34_dense" else "encoder."
    for key, array in file.items():
        if not key.startswith("fc."):
            np.testing.assert_array_equal(named[prefix + key], array)
    jax.tree.map(np.testing.assert_array_equal, filled["params"]["classifier"], variables["params"]["classifier"])


def test_a_stem_of_another_shape_stays_fresh():
    classifier = dla.architecture("dla34", source="timm", classes=5, widths=WIDTHS)
    file = pretrained.export(zoo.init(classifier, jax.random.key(1)), classifier, "timm")
    arch = dense_dla(stem="3x3", source="timm")
    variables = zoo.init(arch, jax.random.key(2))
    with pytest.raises(pretrained.PretrainedError, match="base_layer/conv1"):
        pretrained.load_trunk(file, classifier, variables, module="trunk")
    filled = pretrained.load_trunk(file, classifier, variables, module="trunk", keep=["base_layer"])
    stem, fresh = (v["params"]["trunk"]["base_layer"] for v in (filled, variables))
    jax.tree.map(np.testing.assert_array_equal, stem, fresh)
    kernel = filled["params"]["trunk"]["level0"]["conv"]["kernel"]
    np.testing.assert_array_equal(kernel, file["level0.0.weight"].transpose(2, 3, 1, 0))


@pytest.mark.parametrize("name", ["dla34_dense", *unet.VARIANTS, *unet_encoders.VARIANTS])
def test_architectures_travel_as_json(name):
    source = next(iter(zoo.family(name).sources))
    arch = zoo.architecture(name, source=source, classes=3, class_head=2, remat=True)
    assert zoo.from_dict(json.loads(json.dumps(arch.as_dict()))) == arch


@pytest.mark.parametrize(
    "changes, named", [({"decoder": "fpn"}, "centernet"), ({"nodes": "dcn"}, "deformable"), ({"down_ratio": 3}, "16")]
)
def test_wrong_options_are_named(changes, named):
    with pytest.raises(ValueError, match=named):
        dense_dla(**changes)


def test_wrong_sources_and_sizes_are_named():
    with pytest.raises(ValueError, match="torchvision"):
        zoo.architecture("unet_resnet34", source="ucbdrive", classes=1)
    with pytest.raises(ValueError, match="multiples of 16"):
        layers.variable_shapes(zoo.build(unet.architecture("unet", source="original", classes=1)), (1, 24, 32, 3))
