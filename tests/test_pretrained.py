"""Published weights: names of every library, and one error for all that does not fit."""

import dataclasses

import jax
import numpy as np
import pytest

from data_pipelines.weights import read_weights
from srcc_jax.models import efficientnet, layers, pretrained, zoo
from srcc_jax.models.architecture import IMAGENET_MEAN, IMAGENET_STD, normalize
from srcc_jax.models.efficientnet_names import NAMINGS
from tests import golden, small_networks


def small(source, **changes):
    stages = (efficientnet.Stage(1, 3, 16, 1, 1), efficientnet.Stage(4, 3, 24, 2, 2))
    return efficientnet.architecture("tiny", source=source, classes=4, **{"stages": stages, "head": 32, **changes})


@pytest.fixture(scope="module")
def variables():
    """Of the small network; every array with values of its own."""
    fresh = zoo.init(small("torchvision"), jax.random.key(0))
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
    fresh = zoo.init(arch, jax.random.key(1))
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


# Every family


def every_naming():
    """One variant of each family under every naming that it has (torchvision has no DLA-34)."""
    for name in [name for name in small_networks.CHANGES if name not in ("resnet50", "unet_resnet34")]:
        for key in zoo.family(name).namings:
            if (name, key) != ("unet_dla34", "torchvision"):
                yield pytest.param(name, key, id=f"{name}-{key}")


def test_every_family_is_among_the_small_networks():
    assert all(set(family.variants) & set(small_networks.CHANGES) for family in zoo.FAMILIES)


@pytest.mark.parametrize("name, key", every_naming())
def test_what_any_network_exports_loads_again(name, key):
    arch = small_networks.architecture(name, source=zoo.family(name).namings[key].sources[0])
    ours = small_networks.variables(arch)
    file = pretrained.export(ours, arch, key)
    assert len(file) == len(jax.tree.leaves(ours))
    loaded = pretrained.load(file, arch, zeros(ours), replace_head=False)
    jax.tree.map(np.testing.assert_array_equal, loaded, ours)
    dropped = dict(list(file.items())[:-1])
    with pytest.raises(pretrained.PretrainedError, match="1 missing from the file"):
        pretrained.load(dropped, arch, ours, replace_head=False)


# Parts of networks


@pytest.fixture(scope="module")
def resnet():
    """A small ResNet-50 as torchvision would have it: architecture, variables, file."""
    arch = small_networks.architecture("resnet50", classes=5)
    ours = small_networks.variables(arch)
    return arch, ours, pretrained.export(ours, arch, "torchvision")


def test_sources_that_differ_in_nothing_need_not_be_named(resnet):
    _, _, file = resnet
    assert pretrained.source_conventions(file, "resnet50").source == "torchvision"
    assert pretrained.source_conventions(file, "resnet50", source="timm", classes=0, stages=3).stages == 3


def test_a_trunk_that_ends_early_is_filled_from_the_whole_file(resnet):
    arch, ours, file = resnet
    cut = dataclasses.replace(arch, classes=0, stages=3)
    fresh = zeros(small_networks.variables(cut))
    loaded = pretrained.load_trunk(file, arch, fresh)
    jax.tree.map(np.testing.assert_array_equal, loaded, pretrained.transfer(ours, fresh, cut))
    assert "stage4_block1" not in loaded["params"] and "classifier" not in loaded["params"]
    np.testing.assert_array_equal(loaded["params"]["stem"]["conv"]["kernel"], ours["params"]["stem"]["conv"]["kernel"])
    with pytest.raises(pretrained.PretrainedError, match=r"without a place in the network: extra.weight"):
        pretrained.load_trunk(file | {"extra.weight": np.zeros(3)}, arch, fresh)
    del file["layer2.0.conv1.weight"]
    with pytest.raises(pretrained.PretrainedError, match=r"1 missing from the file: layer2.0.conv1.weight"):
        pretrained.load_trunk(file, arch, fresh)
    file["layer2.0.conv1.weight"] = np.asarray(ours["params"]["stage2_block1"]["conv1"]["conv"]["kernel"]).transpose(
        3, 2, 0, 1
    )


def test_a_file_that_ends_early_is_whole_where_the_architecture_ends_there(resnet):
    arch, ours, _ = resnet
    cut = dataclasses.replace(arch, classes=0, stages=3)
    short = pretrained.transfer(ours, zeros(small_networks.variables(cut)), cut)
    file = pretrained.export(short, cut, "torchvision")
    loaded = pretrained.load(file, cut, zeros(short), replace_head=False)
    jax.tree.map(np.testing.assert_array_equal, loaded, short)
    with pytest.raises(pretrained.PretrainedError, match=r"missing from the file: .*layer4.0.conv1.weight"):
        pretrained.load(file, arch, zeros(ours), replace_head=False)


def test_the_encoder_of_a_dense_network_takes_a_classifier(resnet):
    _, _, file = resnet
    shape = small_networks.CHANGES["resnet50"]
    arch = small_networks.architecture("resnet50", classes=5)
    dense = small_networks.architecture("fcn_resnet50", **shape)
    fresh = zeros(small_networks.variables(dense))
    loaded = pretrained.load_trunk(file, arch, fresh, module="trunk")
    wanted = pretrained.load(file, dataclasses.replace(arch, classes=0), zeros(loaded_trunk(loaded)), replace_head=True)
    jax.tree.map(np.testing.assert_array_equal, loaded_trunk(loaded), wanted)
    assert not np.any(loaded["params"]["score4"]["score_kernel"])
    with pytest.raises(pretrained.PretrainedError, match="is not that of resnet50"):
        pretrained.load_trunk(file, arch, fresh, module="encoder")


def loaded_trunk(variables):
    return {collection: modules["trunk"] for collection, modules in variables.items()}


def test_transfer_names_what_is_not_there(resnet):
    arch, ours, _ = resnet
    wider = dataclasses.replace(arch, width=16)
    with pytest.raises(pretrained.PretrainedError, match=r"arrays of resnet50 are not among the weights: .*stem"):
        pretrained.transfer(ours, small_networks.variables(wider), wider)
