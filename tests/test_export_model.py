"""export_model: ONNX that agrees in onnxruntime, safetensors that come back, and clear refusals."""

import collections
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from data_pipelines.tiles import Grid
from data_pipelines.weights import read_texts, read_weights
from experiments.run.model import Model, Network, flat_arrays, save
from srcc_jax.kernels.convolution import conv_transpose
from srcc_jax.kernels.pooling import avg_pool, max_pool
from srcc_jax.kernels.resize import resize_bilinear, upsample_nearest, upsample_transposed
from srcc_jax.onnx_export import to_onnx
from srcc_jax.onnx_graph import ExportError
from tests import programs, small_networks
from tests.programs import one_line

onnx = pytest.importorskip("onnx", reason="python -m pip install -r requirements-export.txt")
onnxruntime = pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def exporting():
    with programs.imported("export_model") as module:
        yield module


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A finished model."""
    return programs.save_model(tmp_path_factory.mktemp("trained") / "run", grid=Grid(tile=32, stride=16, mpp=1.0))


def session(content):
    return onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])


def apart(ours, theirs):
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


# The program


def test_onnx_of_a_trained_model(exporting, workdir, tmp_path):
    """As a user starts it; then as a user of onnxruntime sees it: pixels in, for any batch, with all that is to be known."""
    path = tmp_path / "model.onnx"
    line = ["-m", "experiments.export_model", f"--workdir={workdir}", f"--out={path}", "--compilation_cache="]
    done = subprocess.run([sys.executable, *line], env={**os.environ}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "batch of 3: differs by" in done.stdout and f"{path}: tiny with 1 classes" in done.stdout

    found = session(path.read_bytes())
    (image,) = found.get_inputs()
    assert (image.name, image.type, image.shape) == ("image", "tensor(uint8)", ["batch", 32, 32, 3])
    assert {o.name: o.shape for o in found.get_outputs()} == {"logits": ["batch", 1], "features": ["batch", 256]}
    pixels = np.random.default_rng(5).integers(0, 256, (5, 32, 32, 3), np.uint8)
    wanted = jax.jit(exporting.inference(Model.load(workdir)))(pixels)
    for name, values in zip(("logits", "features"), found.run(["logits", "features"], {"image": pixels})):
        assert apart(values, wanted[name]) <= 1e-4
    card = json.loads(found.get_modelmeta().custom_metadata_map["srcc_jax"])
    assert card["grid"] == {"tile": 32, "stride": 16, "mpp": 1.0, "flush": False} and card["positive"] == "srcc"
    assert card["architecture"]["name"] == "tiny" and card["about"]["settings"] == {"mode": "fs"}

    counts = collections.Counter(node.op_type for node in onnx.load(path).graph.node)
    # 1 stem, 1 top; per block expansion (but the first), depthwise, two of squeeze-excite, projection.
    stages = Model.load(workdir).architecture.blocks()
    assert counts["Conv"] == 2 + sum(4 + (block.expand != 1) for block in stages)
    assert "BatchNormalization" not in counts and "Slice" not in counts


def test_safetensors_of_a_trained_model(exporting, workdir, tmp_path):
    path = tmp_path / "model.safetensors"
    outcome = programs.start(exporting, workdir=workdir, out=path, format="safetensors")
    assert outcome.status == 0, outcome.err
    card = json.loads(read_texts(path)["srcc_jax"])
    assert card == json.loads((workdir / "model.json").read_text())
    arrays, wanted = read_weights(path), flat_arrays(Model.load(workdir))
    assert arrays.keys() == wanted.keys()
    for name, values in wanted.items():
        np.testing.assert_array_equal(arrays[name], values)
    safetensors = pytest.importorskip(
        "safetensors.numpy", reason="the file is read by the library too where it is there"
    )
    assert safetensors.load_file(path).keys() == wanted.keys()


def test_mistakes_are_one_line(exporting, workdir, tmp_path, monkeypatch):
    def mistake(**values):
        return one_line(programs.start(exporting, **{"workdir": workdir, "out": tmp_path / "m.onnx", **values}))

    net = small_networks.architecture("tiny")
    save(Network(net, small_networks.variables(net), {}), tmp_path / "ckpt")
    assert "--side must say how large the images are" in mistake(workdir=tmp_path / "ckpt")
    assert "holds no finished model" in mistake(workdir=tmp_path / "none")
    monkeypatch.setattr(exporting, "TOLERANCE", 0.0)
    assert "not written" in mistake()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert "onnxruntime, which is not installed: python -m pip install -r requirements-export.txt" in mistake()
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert "ONNX files need a package that is not installed" in mistake()
    assert not (tmp_path / "m.onnx").exists()


# Every family


@pytest.mark.parametrize(
    "name, changes",
    [
        ("resnet50", {"source": "keras"}),  # B, G, R; biases; stride in the first convolution
        ("densenet121", {}),
        ("res2net50_26w_4s", {}),
        ("dla34", {}),
        ("fcn_resnet50", {}),
        ("unet", {"source": "original"}),
        ("dla34_dense", {}),
        ("tiny", {"source": "keras", "dtype": "bfloat16"}),  # trained in bfloat16, exported in float32
    ],
)
def test_every_family_agrees(exporting, name, changes):
    net = small_networks.architecture(name, **changes)
    content = exporting.onnx_model(Network(net, small_networks.variables(net), {}), 32)
    outputs = {output.name for output in session(content).get_outputs()}
    assert outputs >= ({"dense"} if name in ("unet", "fcn_resnet50", "dla34_dense") else {"logits", "features"})


def test_deformable_convolutions_are_refused(exporting):
    net = small_networks.architecture("dla34_dense", nodes="deformable")
    with pytest.raises(ExportError, match="has no translation to ONNX here"):
        exporting.onnx_model(Network(net, small_networks.variables(net), {}), 32)


# Operators

KERNEL = np.random.default_rng(1).normal(size=(4, 4, 6, 5)).astype(np.float32)
CHANNELS = np.random.default_rng(2).normal(size=(4, 4, 6, 1)).astype(np.float32)


def pad_and_cut(x):
    padded = jnp.pad(x, ((0, 0), (1, 2), (0, 0), (0, 0)), constant_values=2.0)
    return lax.slice(padded, (0, 1, 0, 0), (x.shape[0], 12, 8, 6), (1, 1, 2, 1))


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda x: max_pool(x, size=3, stride=2, padding=((1, 1), (0, 1))), id="largest"),
        pytest.param(lambda x: avg_pool(x, size=3, stride=2, padding=((1, 0), (1, 1))), id="mean"),
        pytest.param(
            lambda x: avg_pool(x, size=3, stride=1, padding=((1, 1),) * 2, count_include_pad=False), id="mean-inside"
        ),
        pytest.param(lambda x: conv_transpose(x, KERNEL, stride=2, padding=1), id="transposed"),
        pytest.param(lambda x: conv_transpose(x, KERNEL, stride=3, padding=0, output_padding=2), id="transposed-more"),
        pytest.param(lambda x: upsample_transposed(x, jnp.asarray(CHANNELS)), id="transposed-by-channel"),
        pytest.param(lambda x: resize_bilinear(x, (13, 10), align_corners=False), id="resize"),
        pytest.param(lambda x: upsample_nearest(x, 2), id="repeat"),
        pytest.param(lambda x: jnp.concatenate(jnp.split(x, 3, axis=3)[::-1], axis=3)[..., ::-1], id="split-and-turn"),
        pytest.param(lambda x: jnp.where(x > 0.1, jnp.clip(x, -0.5, 0.5), x**3), id="choose"),
        pytest.param(pad_and_cut, id="pad-cut"),
        pytest.param(lambda x: x.transpose(0, 3, 1, 2).max((2, 3)) - jnp.arange(6.0)[None], id="reduce"),
        pytest.param(lambda x: jnp.ones((x.shape[0], 1, 1, 6)) * 2 + x, id="one-for-the-batch"),
    ],
)
def test_operators_are_what_jax_computes(function):
    x = np.random.default_rng(0).normal(size=(3, 9, 8, 6)).astype(np.float32)
    content = to_onnx(lambda x: {"y": function(x)}, "x", x.shape[1:], np.float32, metadata={})
    (found,) = session(content).run(None, {"x": x})
    wanted = jax.jit(function)(x)
    assert found.shape == wanted.shape and apart(found, wanted) <= 1e-6


def test_what_has_no_translation_is_named():
    with pytest.raises(ExportError, match="sort has no translation to ONNX here"):
        to_onnx(lambda x: {"y": jnp.sort(x)}, "x", (4,), np.float32, metadata={})
    with pytest.raises(ExportError, match="padding between pixels"):
        to_onnx(lambda x: {"y": lax.pad(x, 0.0, ((0, 0, 0), (0, 0, 1)))}, "x", (4,), np.float32, metadata={})
