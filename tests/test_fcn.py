"""The fully convolutional network: its scores by hand, and its size."""

import functools

import jax
import numpy as np
import pytest

from srcc_jax.models import fcn, layers, resnet
from tests import golden, small_networks
from tests.golden_networks import FAST_COMPILE


def interpolated(scores, size):
    """[h, w] -> [*size], bilinear with the edges of both images on one another, one axis after the other."""
    rows, columns = (
        np.clip((np.arange(new) + 0.5) * (old / new) - 0.5, 0, old - 1) for old, new in zip(scores.shape, size)
    )
    along = np.stack([np.interp(columns, np.arange(scores.shape[1]), row) for row in scores])
    return np.stack([np.interp(rows, np.arange(scores.shape[0]), column) for column in along.T], axis=1)


@pytest.fixture(scope="module")
def case():
    """Variables of a small network, its outputs for an image of odd sides, and those of its trunk alone."""
    arch = small_networks.architecture("fcn_resnet50", class_head=3)
    variables = small_networks.variables(arch)
    image = np.random.default_rng(1).standard_normal((1, 61, 90, 3), dtype=np.float32)

    @functools.partial(jax.jit, compiler_options=FAST_COMPILE)
    def outputs(variables, image):
        trunk = {collection: modules["trunk"] for collection, modules in variables.items()}
        taps = resnet.build(arch.trunk).apply(trunk, image, train=False)
        return fcn.build(arch).apply(variables, image, train=False), taps

    out, taps = jax.tree.map(np.asarray, outputs(variables, image))
    return variables, out, taps


def test_scores_of_three_stages_are_added_at_the_size_of_the_image(case):
    variables, out, taps = case
    scores = {}
    for stage in (2, 3, 4):
        head = variables["params"][f"score{stage}"]
        scores[stage] = taps[f"stage{stage}"][0] @ head["score_kernel"][0, 0] + head["bias"]
    assert out["dense"].shape == (1, 61, 90, 2)
    for channel in (0, 1):
        total = scores[4][..., channel]
        for stage in (3, 2):
            total = scores[stage][..., channel] + interpolated(total, scores[stage].shape[:2])
        assert golden.difference(out["dense"][0, ..., channel], interpolated(total, (61, 90))) <= 1e-5


def test_class_branch_judges_the_pooled_features_of_the_trunk(case):
    variables, out, taps = case
    for name, values in taps.items():
        assert golden.difference(out[name], values) <= 1e-6
    head, stats = variables["params"]["class_head"], variables["batch_stats"]["class_head"]["norm"]
    scaled = (taps["features"] - stats["mean"]) / np.sqrt(stats["var"] + 1e-5)
    scaled = scaled * head["norm"]["scale"] + head["norm"]["bias"]
    expected = np.where(scaled > 0, scaled, 0.01 * scaled) @ head["dense"]["kernel"] + head["dense"]["bias"]
    assert out["logits"].shape == (1, 3)
    assert golden.difference(out["logits"], expected) <= 1e-5


def test_parameter_counts():
    """24 million (Yu et al. 2019): ResNet-50's trunk, 1×1 score layers on three stages, and the class branch."""
    arch = fcn.architecture("fcn_resnet50", source="torchvision", classes=1, class_head=2)
    params = layers.variable_shapes(fcn.build(arch))["params"]
    count = {part: sum(leaf.size for leaf in jax.tree.leaves(tree)) for part, tree in params.items()}
    assert count == {
        "trunk": 23_508_032,
        "score2": 512 + 1,
        "score3": 1024 + 1,
        "score4": 2048 + 1,
        "class_head": 2 * 2048 + 2 * 2048 + 2,
    }
