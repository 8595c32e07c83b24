"""DenseNet-121 against torchvision's own numbers."""

import jax
import numpy as np

from srcc_jax.kernels.pooling import max_pool
from srcc_jax.models import densenet, layers, pretrained
from tests import golden, golden_networks


def test_matches_the_golden_numbers(shared_data):
    gold, arch, variables = golden_networks.load(shared_data, "torchvision_densenet121", "densenet121", "torchvision")
    modules = ["transition1", "transition2", "transition3", "norm"]
    out = golden_networks.evaluate(arch, variables, golden.image(gold["input_hw"]), modules)
    golden_networks.check_ends(gold, out)
    stages = {
        "features.relu0": out["stem"],
        "features.pool0": np.asarray(max_pool(out["stem"], size=3, stride=2, padding=((1, 1), (1, 1)))),
        "features.norm5": out["norm"],
        **{f"features.denseblock{block}": out[f"stage{block}"] for block in (1, 2, 3, 4)},
        **{f"features.{name}": out[name] for name in modules[:3]},
    }
    golden_networks.check_stages(gold, stages)
    np.testing.assert_array_equal(out["maps"], np.maximum(out["norm"], 0))

    odd = golden_networks.evaluate(arch, variables, golden.image(gold["input_hw2"]))
    golden_networks.check_ends(gold, odd, prefix="hw2/")


def test_published_files_have_the_old_names(shared_data):
    gold = golden.read(shared_data, "torchvision_densenet121")
    arch = densenet.architecture("densenet121", source="torchvision", classes=1000)
    fresh = jax.tree.map(lambda leaf: np.broadcast_to(0, leaf.shape), layers.variable_shapes(densenet.build(arch)))
    for naming, names in (("torchvision", gold["names"]), ("torchvision_old", gold["names_old"])):
        named = {str(name) for name in names if not str(name).endswith("num_batches_tracked")}
        assert set(pretrained.export(fresh, arch, naming)) == named
        assert pretrained.detect_naming(dict.fromkeys(named, np.zeros(1)), arch) == naming


def test_parameter_counts():
    for classes, expected in ((1000, 7_978_856), (0, 6_953_856)):
        arch = densenet.architecture("densenet121", source="torchvision", classes=classes)
        shapes = layers.variable_shapes(densenet.build(arch))
        assert sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) == expected


def test_folding_keeps_the_norms_that_no_convolution_precedes():
    arch = densenet.architecture("densenet121", source="torchvision", classes=1, depths=(1, 1))
    shapes = layers.variable_shapes(densenet.build(arch, folded=True))
    assert set(shapes["batch_stats"]) == {"stage1_layer1", "transition1", "stage2_layer1", "norm"}
    assert set(shapes["params"]["stage1_layer1"]) == {"norm", "squeeze", "grow"}
    assert set(shapes["params"]["stage1_layer1"]["squeeze"]) == {"conv"}
