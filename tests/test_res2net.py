"""Res2Net-50 against timm's own numbers."""

import jax
import numpy as np

from srcc_jax.kernels.pooling import max_pool
from srcc_jax.models import layers, res2net
from tests import golden, golden_networks


def test_matches_the_golden_numbers(shared_data):
    gold, arch, variables = golden_networks.load(shared_data, "timm_res2net50_26w_4s", "res2net50_26w_4s", "timm")
    out = golden_networks.evaluate(arch, variables, golden.image(gold["input_hw"]))
    golden_networks.check_ends(gold, out)
    pooled = np.asarray(max_pool(out["stem"], size=3, stride=2, padding=((1, 1), (1, 1))))
    stages = {f"layer{stage}": out[f"stage{stage}"] for stage in (1, 2, 3, 4)}
    golden_networks.check_stages(gold, {"act1": out["stem"], "maxpool": pooled, **stages})

    odd = golden_networks.evaluate(arch, variables, golden.image(gold["input_hw2"]))
    golden_networks.check_ends(gold, odd, prefix="hw2/")


def test_parameter_counts():
    for classes, expected in ((1000, 25_699_120), (0, 23_650_120)):
        arch = res2net.architecture("res2net50_26w_4s", source="timm", classes=classes)
        shapes = layers.variable_shapes(res2net.build(arch))
        assert sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) == expected


def test_widths_inside_the_bottlenecks():
    blocks = res2net.architecture("res2net50_26w_4s", source="timm", classes=1).blocks()
    assert sorted({block.inner // 4 for block in blocks}) == [26, 52, 104, 208]
