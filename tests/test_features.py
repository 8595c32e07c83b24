"""Features of images: each pooling of each kind of network has the width that is foretold, and is what its name says."""

import jax
import numpy as np
import pytest

from srcc_jax.models import zoo
from srcc_jax.models.features import pooled, widths
from srcc_jax.models.layers import variable_shapes
from tests import small_networks


@pytest.mark.parametrize("name", small_networks.CHANGES)
def test_widths_are_those_of_the_pooled_outputs(name):
    net = small_networks.architecture(name)
    network, image = zoo.build(net), jax.ShapeDtypeStruct((2, 64, 64, 3), np.float32)

    def every(variables, image):
        outputs = network.apply(variables, image, train=False)
        return {pooling: pooled(outputs, pooling) for pooling in found}

    found = widths(net, side=64)
    assert {"mean", "max", "mean_max", "maps"} <= set(found) and "dense" not in found
    shapes = {pooling: out.shape for pooling, out in jax.eval_shape(every, variable_shapes(network), image).items()}
    assert shapes == {pooling: (2, width) for pooling, width in found.items()}


def test_poolings_by_hand():
    maps = np.arange(24.0, dtype=np.float16).reshape(2, 2, 2, 3)
    outputs = {"features": np.full((2, 3), 7.0, np.float16), "maps": maps, "stage1": maps[..., :1]}
    assert pooled(outputs, "mean").tolist() == [[7, 7, 7]] * 2
    assert pooled(outputs, "max").tolist() == [[9, 10, 11], [21, 22, 23]]
    assert pooled(outputs, "mean_max").tolist() == [[7, 7, 7, 9, 10, 11], [7, 7, 7, 21, 22, 23]]
    assert pooled(outputs, "stage1").tolist() == [[4.5], [16.5]] and pooled(outputs, "stage1").dtype == np.float32


def test_sides_that_a_network_does_not_take_are_refused():
    with pytest.raises(ValueError, match="multiples of 32"):
        widths(small_networks.architecture("dla34"), side=48)
