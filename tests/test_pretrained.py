"""Published weights: names of every library, and one error for all that does not fit."""

import dataclasses

import jax
import numpy as np
import pytest

from data_pipelines.weights import read_weights
from srcc_jax.models import efficientnet, layers, pretrained
from srcc_jax.models.architecture import IMAGENET_MEAN, IMAGENET_STD, normalize
from srcc_jax.models.efficientnet_names import NAMINGS
from tests import golden


def small(source, **changes):
    stages = (efficientnet.Stage(1, 3, 16, 1, 1), efficientnet.Stage(4, 3, 24, 2, 2))
    return efficientnet.architecture("tiny", source=source, classes=4, **{"stages": stages, "head": 32, **changes})


@pytest.fixture(scope="module")
def variables():
    """Of the small network; every array with values of its own."""
    fresh = efficientnet.init(small("torchvision"), jax.random.key(0))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: leaf + rng.random(leaf.shape, np.float32), fresh)


@pytest.fixture
def weights(variables):
    """As torchvision would have them."""
    return pretrained.export(variables, small("torchvision"), "torchvision")


def zeros(variables):
    return jax.tree.map(np.zeros_like, variables)


@pytest.mark.parametrize("naming", NAMINGS)
def test_what_is_exported_loads_again(variables, naming):
    arch = small(NAMINGS[naming].sources[0])
    file = pretrained.export(variables, arch, naming)
    assert pretrained.detect_naming(file, arch) == naming
    loaded = pretrained.load(file, arch, zeros(variables), replace_head=False)
    jax.tree.map(np.testing.assert_array_equal, loaded, variables)


def test_names_and_layouts_as_the_libraries_write_them(variables):
    shapes = {
        "torchvision": {
            "features.1.0.block.0.0.weight": (16, 1, 3, 3),
            "features.1.0.block.1.fc1.weight": (4, 16, 1, 1),
            "features.2.1.block.0.0.weight": (96, 24, 1, 1),
            "features.2.1.block.3.1.running_var": (24,),
            "classifier.1.weight": (4, 32),
        },
        "timm": {
            "blocks.0.0.conv_pw.weight": (16, 16, 1, 1),
            "blocks.1.1.conv_pwl.weight": (24, 96, 1, 1),
            "blocks.1.1.se.conv_expand.bias": (96,),
            "classifier.weight": (4, 32),
        },
        "lukemelas": {"_blocks.2._bn0.running_mean": (96,), "_fc.bias": (4,)},
        "keras": {
            "block2b_dwconv/kernel": (3, 3, 96, 1),
            "block2b_se_reduce/kernel": (1, 1, 96, 6),
            "block1a_bn/moving_variance": (16,),
            "predictions/kernel": (32, 4),
        },
    }
    for naming, expected in shapes.items():
        file = pretrained.export(variables, small("torchvision"), naming)
        assert {name: file[name].shape for name in expected} == expected


def test_old_spelling_of_keras_is_the_same(variables):
    arch = small("keras")
    file = pretrained.export(variables, arch, "keras")
    old = {f"{name.replace('dwconv/kernel', 'dwconv/depthwise_kernel')}:0": array for name, array in file.items()}
    assert "block1a_dwconv/depthwise_kernel:0" in old
    loaded = pretrained.load(old, arch, zeros(variables), replace_head=False)
    jax.tree.map(np.testing.assert_array_equal, loaded, variables)
    with pytest.raises(pretrained.PretrainedError, match="twice"):
        pretrained.load(file | old, arch, variables, replace_head=False)


def test_golden_names_of_keras_are_all_known(shared_data):
    gold = golden.read(shared_data, "keras_efficientnet_b1")
    table = NAMINGS["keras"].table(efficientnet.architecture("b1", source="keras", classes=1000))
    for key in ("names", "legacy_names"):
        names = pretrained._canonical(dict.fromkeys(map(str, gold[key])))
        assert set(names) - set(table) == {"normalization/mean", "normalization/variance", "normalization/count"}
        assert set(table) <= set(names)


def test_one_error_lists_everything_that_does_not_fit(weights, variables):
    del weights["features.0.1.running_mean"]
    weights["features.9.0.weight"] = np.zeros(3)
    weights["features.0.0.weight"] = np.zeros((16, 3, 5, 5))
    with pytest.raises(pretrained.PretrainedError) as caught:
        pretrained.load(weights, small("torchvision"), variables, replace_head=False)
    message = str(caught.value)
    assert message.startswith(f"3 of {len(weights)} weights unmatched")
    assert "1 missing from the file: features.0.1.running_mean" in message
    assert "1 without a place in the network: features.9.0.weight" in message
    assert "1 of another shape: features.0.0.weight [16, 3, 5, 5] for [3, 3, 3, 16]" in message
    assert "replace_head" not in message


def test_counters_of_torch_are_ignored(weights, variables):
    weights["features.0.1.num_batches_tracked"] = np.int64(3)
    pretrained.load(weights, small("torchvision"), variables, replace_head=False)


def test_head_is_replaced_only_when_asked(weights, variables):
    arch = dataclasses.replace(small("torchvision"), classes=2)
    fresh = efficientnet.init(arch, jax.random.key(1))
    with pytest.raises(pretrained.PretrainedError, match=r"classifier.1.bias \[4\] for \[2\].*replace_head=True"):
        pretrained.load(weights, arch, fresh, replace_head=False)
    loaded = pretrained.load(weights, arch, fresh, replace_head=True)
    jax.tree.map(np.testing.assert_array_equal, loaded["params"]["classifier"], fresh["params"]["classifier"])
    np.testing.assert_array_equal(
        loaded["params"]["stem"]["conv"]["kernel"], variables["params"]["stem"]["conv"]["kernel"]
    )

    trunk = {name: array for name, array in weights.items() if not name.startswith("classifier")}
    with pytest.raises(pretrained.PretrainedError, match=r"2 missing.*classifier.1.weight.*replace_head=True"):
        pretrained.load(trunk, small("torchvision"), variables, replace_head=False)
    jax.tree.map(
        np.testing.assert_array_equal,
        pretrained.load(trunk, arch, fresh, replace_head=True)["params"],
        loaded["params"],
    )


def test_weights_of_another_library_than_the_architecture_are_refused(weights, variables):
    with pytest.raises(pretrained.PretrainedError, match=r"torchvision's names.*keras.*source_conventions"):
        pretrained.load(weights, small("keras"), variables, replace_head=False)
    with pytest.raises(pretrained.PretrainedError, match=r"first names are a, b"):
        pretrained.load(dict.fromkeys("ba", np.zeros(1)), small("keras"), variables, replace_head=False)


def fake(names, classes=7):
    """A file of which only the names and the classifier's bias matter."""
    return {name: np.zeros(classes) for name in names}


def test_conventions_follow_the_source():
    torchvision = fake(["features.0.0.weight", "classifier.1.bias"])
    arch = pretrained.source_conventions(torchvision, "b1")
    assert (arch.source, arch.classes, arch.padding, arch.bn_epsilon) == ("torchvision", 7, "symmetric", 1e-5)
    assert pretrained.source_conventions(torchvision, "b5").bn_epsilon == 1e-3
    assert pretrained.source_conventions(torchvision, "b1", classes=1).classes == 1

    timm = fake(["conv_stem.weight", "classifier.bias"])
    with pytest.raises(pretrained.PretrainedError, match="timm_tf_ap"):
        pretrained.source_conventions(timm, "b1")
    assert pretrained.source_conventions(timm, "b1", source="timm").padding == "symmetric"
    assert pretrained.source_conventions(timm, "b1", source="timm_tf").padding == "same"
    assert pretrained.source_conventions(timm, "b1", source="timm_tf_ap").mean == (127.5,) * 3
    with pytest.raises(pretrained.PretrainedError, match="cannot be keras"):
        pretrained.source_conventions(timm, "b1", source="keras")

    lite = pretrained.source_conventions(fake(["_conv_stem.weight", "_fc.bias"]), "lite1")
    assert (lite.padding, lite.mean, lite.std) == ("same", (127.0,) * 3, (128.0,) * 3)
    with pytest.raises(pretrained.PretrainedError, match=r"no classifier \(_fc.bias\)"):
        pretrained.source_conventions(fake(["_conv_stem.weight"]), "lite1")


@pytest.mark.parametrize("power", [1, 2], ids=["published", "variance"])
def test_normalization_layer_of_keras_becomes_mean_and_std(variables, power):
    """Published files have the standard deviation where the variance belongs."""
    std = np.float32([0.229, 0.224, 0.225])
    layer = {"normalization/mean": np.float32([0.485, 0.456, 0.406]), "normalization/variance": std**power}
    file = pretrained.export(variables, small("keras"), "keras") | layer | {"normalization/count": np.int64(0)}
    arch = pretrained.source_conventions(file, "tiny")
    np.testing.assert_allclose(arch.mean, IMAGENET_MEAN, rtol=1e-6)
    np.testing.assert_allclose(arch.std, IMAGENET_STD, rtol=1e-6)
    pretrained.load(file, small("keras"), variables, replace_head=False)
    with pytest.raises(pretrained.PretrainedError, match="Normalization layer has mean"):
        pretrained.load(file, small("keras", mean=(0.0, 0.0, 0.0)), variables, replace_head=False)


def test_untrained_normalization_layer_of_keras_only_scales():
    layer = {"normalization/mean": np.zeros(3), "normalization/variance": np.ones(3)}
    arch = pretrained.source_conventions(fake(["predictions/bias"]) | layer, "b0")
    assert (arch.mean, arch.std) == ((0.0,) * 3, (255.0,) * 3)


def test_lite1_recognises_real_images(shared_data):
    weights = read_weights(shared_data / "weights" / "efficientnet-lite1-77cc7160.pth")
    arch = pretrained.source_conventions(weights, "lite1")
    shapes = layers.variable_shapes(efficientnet.build(arch))
    variables = pretrained.load(weights, arch, shapes, replace_head=False)
    with np.load(shared_data / "weights" / "imagenet_golden_20.npz") as file:
        pixels, expected, truth = (
            file[k] for k in ("crop240_uint8", "efficientnet_lite1_logits_crop240", "class_index")
        )

    @jax.jit
    def logits(variables, pixels):
        return efficientnet.build(arch).apply(variables, normalize(pixels, arch), train=False)["logits"]

    ours = np.concatenate([logits(variables, pixels[i : i + 5]) for i in range(0, 20, 5)])
    assert (ours.argmax(1) == truth).sum() == 18
    np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=1e-3)
