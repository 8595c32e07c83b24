"""import_weights: files, the Hub and our own exports become folders with all conventions, whole or not at all."""

import dataclasses
import json
import os
import pickle
import sys
import types
import zipfile

import jax
import numpy as np
import pytest

from data_pipelines.safetensors_files import write_safetensors
from data_pipelines.tiles import Grid
from experiments.run.model import Model, Network, load, write_exchange
from experiments.run.workdir import WorkdirError, file_sha256
from srcc_jax.models import pretrained, zoo
from srcc_jax.models.architecture import normalize
from tests import programs, small_networks
from tests.programs import one_line


@pytest.fixture(scope="module")
def importing():
    with programs.imported("import_weights") as module:
        yield module


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The smallest network as torchvision would publish it: architecture, variables, a .safetensors file."""
    return small_networks.published(tmp_path_factory.mktemp("published"))


def assert_same(variables, wanted):
    jax.tree.map(np.testing.assert_array_equal, variables, wanted)


def test_a_file_becomes_a_folder_with_its_conventions(importing, published, tmp_path):
    net, variables, path = published
    outcome = programs.start(importing, arch="tiny", source=path, out=tmp_path / "ckpt")
    assert outcome.status == 0, outcome.err
    network = Network.load(tmp_path / "ckpt")
    assert network.architecture == net
    assert_same(network.variables, variables)
    card = json.loads((tmp_path / "ckpt" / "model.json").read_text())
    assert card["about"]["file"] == "tiny.safetensors" and card["about"]["sha256"] == file_sha256(path)
    assert card["about"]["versions"]["jax"] == jax.__version__ and "kernels [k, k, in, out]" in card["layout"]
    wanted = {"padding": "symmetric", "bn_epsilon": 1e-5, "bn_momentum": 0.9, "channels": "rgb"}
    assert {name: card["architecture"][name] for name in wanted} == wanted
    assert f"tiny with 3 classes from torchvision, {len(jax.tree.leaves(variables))} arrays" in outcome.out
    assert card["checksum"][:16] in outcome.out
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt"], "nothing is left beside it"


def test_all_that_does_not_fit_is_one_error_and_no_folder(importing, published, tmp_path):
    net, variables, _ = published
    arrays = pretrained.export(variables, net, "torchvision")
    del arrays["features.0.1.weight"], arrays["classifier.1.weight"]
    path = tmp_path / "w.safetensors"
    write_safetensors(path, {**arrays, "other": np.zeros(2, np.float32)}, {})
    message = one_line(programs.start(importing, arch="tiny", source=path, out=tmp_path / "ckpt"))
    assert "2 missing from the file: features.0.1.weight, classifier.1.weight" in message
    assert "1 without a place in the network: other" in message
    assert [found.name for found in tmp_path.iterdir()] == ["w.safetensors"]


def test_the_head_is_replaced_when_asked(importing, published, tmp_path):
    _, variables, path = published
    start = {"arch": "tiny", "source": path}
    message = one_line(programs.start(importing, **start, out=tmp_path / "a", classes=5))
    assert "classifier.1.bias [3] for [5]" in message and "replace_head" in message
    assert programs.start(importing, "--replace_head", **start, out=tmp_path / "b", classes=5).status == 0
    network = Network.load(tmp_path / "b")
    assert network.variables["params"]["classifier"]["bias"].shape == (5,)
    assert_same(network.variables["params"]["stem"], variables["params"]["stem"])


def test_mistakes_are_one_line(importing, published, tmp_path):
    _, _, path = published
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()

    def mistake(**values):
        return one_line(
            programs.start(importing, **{"arch": "tiny", "source": path, "out": tmp_path / "ckpt", **values})
        )

    assert "there is there already: remove it" in mistake(out=tmp_path / "there")
    assert "there is no such file" in mistake(source=tmp_path / "none.pth")
    assert "none of the" in mistake(arch="resnet18")
    assert "cannot be keras" in mistake(weights_from="keras")
    assert "--stages=2 is for ResNets" in mistake(stages=2)
    assert "'ucbdrive' is no source" in mistake(weights_from="ucbdrive")
    assert "--source and --out are needed" in one_line(programs.start(importing))
    assert "--arch must say" in one_line(programs.start(importing, source=path, out=tmp_path / "ckpt"))
    listed = programs.start(importing, "--list").out
    assert "resnet18, resnet34, resnet50, wide_resnet50_2: torchvision, timm, keras, keras_caffe" in listed
    assert not (tmp_path / "ckpt").exists()


class Payload:
    """Makes a file when it is unpickled by a reader that trusts its input."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def test_nothing_in_a_checkpoint_runs(importing, tmp_path):
    trace, path = tmp_path / "ran", tmp_path / "w.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("w/data.pkl", pickle.dumps({"state_dict": {}, "args": Payload(trace)}, protocol=2))
    message = one_line(programs.start(importing, arch="tiny", source=path, out=tmp_path / "ckpt"))
    assert ".mkdir, and only tensors in plain containers are read" in message
    assert not trace.exists() and not (tmp_path / "ckpt").exists()
    pickle.loads(pickle.dumps(Payload(trace)))  # the payload is a real one
    assert trace.exists()


# The Hub


@pytest.fixture
def hub(monkeypatch, published):
    """huggingface_hub with two repositories, and a note of what was asked for."""
    asked = []

    class EntryNotFoundError(Exception):
        pass

    def list_repo_files(repository):
        files = {"timm/tiny": ["README.md", "model.safetensors"], "timm/many": ["a.pth", "b.bin"]}
        if repository not in files:
            raise ConnectionError("no route to the Hub\nand more")
        return files[repository]

    def hf_hub_download(repository, file):
        asked.append((repository, file))
        if file not in ("model.safetensors", "b.bin"):
            raise EntryNotFoundError("no such entry")
        return str(published[2])

    module = types.ModuleType("huggingface_hub")
    module.list_repo_files, module.hf_hub_download = list_repo_files, hf_hub_download
    module.errors = types.ModuleType("huggingface_hub.errors")
    module.errors.EntryNotFoundError, module.errors.HTTPError = EntryNotFoundError, ConnectionError
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", module.errors)
    return asked


def test_weights_of_the_hub(importing, published, hub, tmp_path):
    outcome = programs.start(importing, arch="tiny", source="hf:timm/tiny", out=tmp_path / "a")
    assert outcome.status == 0, outcome.err
    assert_same(Network.load(tmp_path / "a").variables, published[1])
    assert Network.load(tmp_path / "a").about["source"] == "hf:timm/tiny"
    assert programs.start(importing, arch="tiny", source="hf:timm/many/b.bin", out=tmp_path / "b").status == 0
    assert hub == [("timm/tiny", "model.safetensors"), ("timm/many", "b.bin")]


def test_what_the_hub_does_not_give_is_one_line(importing, hub, tmp_path, monkeypatch):
    def mistake(source):
        return one_line(programs.start(importing, arch="tiny", source=source, out=tmp_path / "ckpt"))

    assert "say which file, hf:timm/many/<file>; the repository has a.pth, b.bin" in mistake("hf:timm/many")
    assert "cannot be fetched: no such entry. Check the name" in mistake("hf:timm/many/c.pth")
    assert "cannot be fetched: no route to the Hub. Check the name" in mistake("hf:timm/none")
    assert "is not of the form hf:owner/name" in mistake("hf:tiny")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "needs the package huggingface_hub" in mistake("hf:timm/tiny")


# Our own files


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished model."""
    return programs.save_model(tmp_path_factory.mktemp("trained") / "run", grid=Grid(tile=32, stride=16, mpp=1.0))


def test_an_exported_model_comes_back_as_it_was(importing, trained, tmp_path):
    path = tmp_path / "model.safetensors"
    write_exchange(load(trained), path)
    assert programs.start(importing, source=path, out=tmp_path / "back").status == 0
    before, after = Model.load(trained), Model.load(tmp_path / "back")
    assert dataclasses.replace(after, variables={}) == dataclasses.replace(before, variables={})
    assert_same(after.variables, before.variables)
    image = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)

    @jax.jit
    def logits(variables, image):
        net = after.architecture
        return zoo.build(net).apply(variables, normalize(image, net), train=False)["logits"]

    np.testing.assert_array_equal(logits(after.variables, image), logits(before.variables, image))
    message = one_line(programs.start(importing, arch="b0", source=path, out=tmp_path / "c"))
    assert "is of tiny, not of --arch=b0" in message
    message = one_line(programs.start(importing, source=path, out=tmp_path / "c", classes=3))
    assert "has a card of its own" in message


def test_imported_weights_are_no_model_of_slides(importing, published, tmp_path):
    assert programs.start(importing, arch="tiny", source=published[2], out=tmp_path / "ckpt").status == 0
    with pytest.raises(WorkdirError, match=r"no model of slides: train one .* --pretrained"):
        Model.load(tmp_path / "ckpt")
    card = json.loads((tmp_path / "ckpt" / "model.json").read_text())
    (tmp_path / "ckpt" / "model.json").write_text(json.dumps({**card, "checksum": "0"}))
    with pytest.raises(WorkdirError, match="checksum differs"):
        Network.load(tmp_path / "ckpt")


def test_keras_resnet50_to_stage_4(importing, shared_data, tmp_path):
    """Through a folder, and the features of a real image are those of the published network: its maps, channels first."""
    weights = shared_data / "weights"
    source = weights / "resnet50_imagenet_keras_conv1_to_stage4_fp16kernels.npz"
    outcome = programs.start(importing, arch="resnet50", source=source, out=tmp_path / "ckpt", stages=3, classes=0)
    assert outcome.status == 0, outcome.err
    network = Network.load(tmp_path / "ckpt")
    net = network.architecture
    assert (net.channels, net.bn_epsilon, net.stages) == ("bgr", 1e-3, 3)
    with np.load(weights / "imagenet_golden_20.npz") as file:
        pixels = file["crop224_uint8"][:1]
        expected = {
            "stage1": file["resnet50_image0_stage2_ch0to7"],
            "stage2": file["resnet50_image0_stage3_ch0to15"],
            "stage3": file["resnet50_image0_stage4_ch0to63"],
        }

    @jax.jit
    def maps(variables, pixels):
        out = zoo.build(net).apply(variables, normalize(pixels, net), train=False)
        return {name: out[name] for name in expected}

    for name, ours in maps(network.variables, pixels).items():
        ours = np.moveaxis(np.asarray(ours[0]), -1, 0)[: len(expected[name])]
        assert np.abs(ours - expected[name]).max() <= 1e-4 * np.abs(expected[name]).max(), name
