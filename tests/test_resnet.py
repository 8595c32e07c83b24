"""ResNets against the frameworks' own numbers, and what their options do."""

import jax
import numpy as np
import pytest

from data_pipelines.weights import read_weights
from srcc_jax.kernels.pooling import max_pool
from srcc_jax.models import layers, pretrained, resnet, zoo
from srcc_jax.models.architecture import normalize
from tests import golden, golden_networks

GOLDEN = [
    ("torchvision_resnet18", "resnet18", "torchvision"),
    ("timm_resnet18", "resnet18", "timm"),
    ("torchvision_resnet34", "resnet34", "torchvision"),
    ("torchvision_resnet50", "resnet50", "torchvision"),
    ("torchvision_wide_resnet50_2", "wide_resnet50_2", "torchvision"),
]


@pytest.mark.parametrize("file, variant, source", GOLDEN, ids=[case[0] for case in GOLDEN])
def test_matches_the_golden_numbers(shared_data, file, variant, source):
    gold, arch, variables = golden_networks.load(shared_data, file, variant, source)
    out = golden_networks.evaluate(arch, variables, golden.image(gold["input_hw"]))
    golden_networks.check_ends(gold, out)
    stem, *rest = map(str, gold["stages"])
    pooled = max_pool(out["stem"], size=3, stride=2, padding=((1, 1), (1, 1)))
    maps = [np.asarray(pooled), *(out[f"stage{stage}"] for stage in (1, 2, 3, 4))]
    golden_networks.check_stages(gold, {stem: out["stem"], **dict(zip(rest, maps, strict=True))})
    np.testing.assert_array_equal(out["maps"], out["stage4"])

    odd = golden_networks.evaluate(arch, variables, golden.image(gold["input_hw2"]))
    golden_networks.check_ends(gold, odd, prefix="hw2/")


def test_training_step_matches_torchvision(shared_data):
    gold, arch, variables = golden_networks.load(shared_data, "torchvision_resnet18", "resnet18", "torchvision")
    golden_networks.check_training(gold, arch, variables, "torchvision")


def test_keras_weights_up_to_stage_4_see_a_real_image_as_keras_does(shared_data):
    """Keras counts the stem as stage 1. The expected values were computed in torch from the same half-precision kernels."""
    folder = shared_data / "weights"
    weights = read_weights(folder / "resnet50_imagenet_keras_conv1_to_stage4_fp16kernels.npz")
    arch = pretrained.source_conventions(weights, "resnet50", classes=0, stages=3)
    assert (arch.source, arch.channels, arch.bn_epsilon) == ("keras_caffe", "bgr", 1e-3)
    variables = pretrained.load(weights, arch, layers.variable_shapes(resnet.build(arch)), replace_head=False)
    with np.load(folder / "imagenet_golden_20.npz") as file:
        pixels, expected = file["crop224_uint8"][:1], {key: file[key] for key in file if "image0" in key}

    out = golden_networks.evaluate(arch, variables, normalize(pixels, arch))
    assert set(out) == {"stem", "stage1", "stage2", "stage3", "maps", "features"}
    stages = [out[f"stage{stage}"][0] for stage in (1, 2, 3)]
    for number, stage, channels in zip((2, 3, 4), stages, (8, 16, 64), strict=True):
        ours = stage.transpose(2, 0, 1)[:channels]
        assert golden.difference(ours, expected[f"resnet50_image0_stage{number}_ch0to{channels - 1}"]) <= 1e-3
    pooled = np.concatenate([stage.mean((0, 1)) for stage in stages])
    assert golden.difference(pooled, expected["resnet50_image0_gap"]) <= 1e-3


@pytest.mark.parametrize(
    "name, source, with_classes, trunk",
    [
        ("resnet18", "torchvision", 11_689_512, 11_176_512),
        ("resnet34", "torchvision", 21_797_672, 21_284_672),
        ("resnet50", "torchvision", 25_557_032, 23_508_032),
        ("resnet50", "keras", 25_583_592, 23_534_592),
        ("wide_resnet50_2", "torchvision", 68_883_240, 66_834_240),
    ],
)
def test_parameter_counts(name, source, with_classes, trunk):
    for classes, expected in ((1000, with_classes), (0, trunk)):
        shapes = layers.variable_shapes(zoo.build(zoo.architecture(name, source=source, classes=classes)))
        assert sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) == expected


def test_stride_of_a_bottleneck_is_where_the_source_has_it():
    torch, keras = (resnet.architecture("resnet50", source=source, classes=1) for source in ("torchvision", "keras"))
    assert [block.strides for block in torch.blocks()[2:5]] == [(1, 1), (1, 2), (1, 1)]
    assert [block.strides for block in keras.blocks()[2:5]] == [(1, 1), (2, 1), (1, 1)]
    assert [block.projected for block in torch.blocks()] == [b.number == 1 for b in torch.blocks()]
    basic = resnet.architecture("resnet18", source="torchvision", classes=1).blocks()
    assert [(block.strides, block.projected) for block in basic[:3]] == [
        ((1, 1), False),
        ((1, 1), False),
        ((2, 1), True),
    ]


def test_names_as_keras_writes_them():
    expected = {
        "keras": {
            "conv1_conv/bias": (64,),
            "conv1_bn/gamma": (64,),
            "conv2_block1_0_conv/kernel": (1, 1, 64, 256),
            "conv3_block4_2_bn/moving_variance": (128,),
            "conv5_block3_3_conv/kernel": (1, 1, 512, 2048),
            "predictions/kernel": (2048, 1000),
        },
        "keras_caffe": {
            "conv1/kernel": (7, 7, 3, 64),
            "bn_conv1/beta": (64,),
            "res2a_branch1/bias": (256,),
            "bn4f_branch2c/moving_mean": (1024,),
            "res5c_branch2b/kernel": (3, 3, 512, 512),
            "fc1000/bias": (1000,),
        },
    }
    for source, shapes in expected.items():
        arch = resnet.architecture("resnet50", source=source, classes=1000)
        fresh = jax.tree.map(lambda leaf: np.broadcast_to(0, leaf.shape), layers.variable_shapes(resnet.build(arch)))
        file = pretrained.export(fresh, arch, source)
        assert len(file) == 53 * 6 + 2
        assert {name: file[name].shape for name in shapes} == shapes


def test_number_of_stages_is_checked():
    with pytest.raises(ValueError, match="stages is 5: resnet18 has 1 to 4"):
        resnet.architecture("resnet18", source="torchvision", classes=1, stages=5)
