"""What slide_classification trains from: any classifier of the zoo, fresh, or with weights of a file or of import_weights."""

import dataclasses

import jax
import numpy as np
import pytest

from data_pipelines.scan import ScanBatch
from experiments.run.model import Network, save
from experiments.run.scoring import classifier_scorer
from srcc_jax.losses import binary_cross_entropy
from srcc_jax.models import zoo
from srcc_jax.models.architecture import normalize
from srcc_jax.parallel import make_mesh
from tests import programs, small_networks
from tests.programs import one_line


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The smallest network as torchvision would publish it: architecture, variables, a .safetensors file."""
    return small_networks.published(tmp_path_factory.mktemp("published"))


def assert_same(variables, wanted):
    jax.tree.map(np.testing.assert_array_equal, variables, wanted)


@pytest.fixture(scope="module")
def training():
    with programs.imported("slide_classification") as module:
        yield module


def starting(module, **values):
    """starting_model under these flags, as the program would call it."""
    found = []

    def main():
        found.append(module.starting_model(module.config_from_flags(module.Config)))

    original, module.main = module.main, main
    try:
        outcome = programs.start(module, **{"cohort": "c.csv", "workdir": "w", "backbone": "tiny", **values})
    finally:
        module.main = original
    return found[0] if found else one_line(outcome)


@pytest.fixture(scope="module")
def folder(published, tmp_path_factory):
    net, variables, _ = published
    folder = tmp_path_factory.mktemp("folder")
    save(Network(net, variables, {}), folder)
    return folder


def test_training_starts_from_a_folder_under_its_conventions(training, published, folder):
    net, variables, path = published
    ours, start = starting(training, pretrained=folder)
    assert ours == dataclasses.replace(net, classes=1)
    assert_same(start["batch_stats"], variables["batch_stats"])
    assert_same(start["params"]["stem"], variables["params"]["stem"])
    assert start["params"]["classifier"]["kernel"].shape[1] == 1
    from_file, same = starting(training, pretrained=path)
    assert from_file == ours
    assert_same(same, start)


def test_a_folder_of_another_network_is_refused(training, folder):
    assert "is of --backbone=tiny with the conventions of its card" in starting(
        training, pretrained=folder, backbone="b0"
    )
    assert "no --pretrained_source" in starting(training, pretrained=folder, pretrained_source="timm")


def test_settings_that_a_network_does_not_have_are_refused(training):
    assert "--dropout=0.3 has no meaning for --backbone=resnet18" in starting(
        training, backbone="resnet18", dropout=0.3
    )
    net, _ = starting(training, dropout=0.3, bn_momentum=0.9)
    assert (net.dropout, net.drop_path, net.bn_momentum, net.source) == (0.3, 0.2, 0.9, "keras")


def test_any_classifier_may_be_the_backbone(training):
    net, start = starting(training, backbone="resnet18")
    assert net.source == "torchvision" and start["params"]["classifier"]["kernel"].shape == (512, 1)
    choices = training.flags.FLAGS["backbone"].parser.enum_values
    assert {"b1", "resnet18", "densenet121", "dla34"} <= set(choices) and not {"unet", "fcn_resnet50"} & set(choices)


# What training and prediction ask of any backbone

BACKBONES = [name for name in small_networks.CHANGES if name in zoo.CLASSIFIERS]


@pytest.mark.parametrize("name", BACKBONES)
def test_any_backbone_trains_with_and_without_its_norms(name):
    """Only traced: the loss of a batch of one logit, and new statistics of the same shape."""
    net = small_networks.architecture(name, classes=1)
    start = small_networks.variables(net)
    batch = {
        "image": np.zeros((2, 32, 32, 3), np.uint8),
        "label": np.zeros(2, np.int32),
        "weight": np.ones(2, np.float32),
    }
    for freeze_norm in (False, True):
        loss = binary_cross_entropy(zoo.build(net), prepare=lambda x, key: normalize(x, net), freeze_norm=freeze_norm)
        stats = {"batch_stats": start["batch_stats"]}
        value, (new, _) = jax.eval_shape(loss, start["params"], stats, batch, jax.random.key(0))
        assert value.shape == () and jax.tree.structure(new) == jax.tree.structure(stats)


def test_a_backbone_that_folds_in_part_is_scored_as_it_is():
    """A DenseNet keeps most of its BatchNorms; logits and Grad-CAM are those of the plain network."""
    net = small_networks.architecture("densenet121", classes=1)
    variables = small_networks.variables(net)
    image = np.random.default_rng(0).integers(0, 256, (2, 40, 40, 3), np.uint8)
    window = np.asarray([[0, 0, 0], [1, 8, 5], [0, 3, 8], [1, 0, 1]], np.int32)
    scorer = classifier_scorer(net, tile=32, mesh=make_mesh(jax.devices()[:1]), cam=True)
    batch = ScanBatch(image, window, np.arange(4, dtype=np.int32), 4, ())
    (scored,) = scorer.score(scorer.fold(variables), [batch])
    tiles = np.stack([image[region, top : top + 32, left : left + 32] for region, top, left in window])
    plain = jax.jit(lambda tiles: zoo.build(net).apply(variables, normalize(tiles, net), train=False))(tiles)
    np.testing.assert_allclose(scored.outputs["logit"], plain["logits"][:, 0], rtol=1e-4, atol=1e-4)
    wanted = (
        np.maximum(plain["maps"] @ variables["params"]["classifier"]["kernel"][:, 0], 0)
        / plain["maps"][0, :, :, 0].size
    )
    np.testing.assert_allclose(scored.outputs["cam"], wanted, rtol=1e-4, atol=1e-4)
