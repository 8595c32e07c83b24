"""A finished model, or imported weights, as a file for other programs.

    python -m experiments.export_model --workdir=runs/ws --format=onnx --out=model.onnx

onnx: takes images as they are, uint8 [batch, side, side, 3], R, G, B: scaling, channel order and BatchNorm are inside, so that
nobody can mix them up. Before it is written it has to agree with the model here in onnxruntime. safetensors: the arrays, and
the card that says what they are for; import_weights makes the model of it again. Either holds the card under the name srcc_jax.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping

import jax
import numpy as np
from absl import flags

from data_pipelines.files import atomic_write
from experiments.run.model import Model, Network, card_text, load, write_exchange
from experiments.run.program import UsageError, run, start_devices
from srcc_jax.models import zoo
from srcc_jax.models.architecture import normalize
from srcc_jax.models.layers import fold_batch_norm
from srcc_jax.onnx_export import to_onnx
from srcc_jax.onnx_graph import ExportError

_WORKDIR = flags.DEFINE_string(
    "workdir", None, "work directory of a finished model, or a folder of import_weights", required=True
)
_FORMAT = flags.DEFINE_enum("format", "onnx", ["onnx", "safetensors"], "kind of file")
_OUT = flags.DEFINE_string("out", None, "file to be written", required=True)
_SIDE = flags.DEFINE_integer("side", None, "onnx: side of the images in pixels; none: the model's tile", lower_bound=1)

INPUT = "image"
OUTPUTS = ("logits", "dense", "features")
TOLERANCE = 1e-4  # largest difference from the model here, relative to the largest value
_BATCHES = (1, 3)

Function = Callable[[jax.Array], dict[str, jax.Array]]


def inference(stored: Network | Model) -> Function:
    """uint8 [B, H, W, 3] -> the outputs among OUTPUTS that the network has, in float32 with BatchNorm folded."""
    net = dataclasses.replace(stored.architecture, dtype="float32")
    variables = fold_batch_norm(stored.variables, epsilon=net.bn_epsilon)
    network = zoo.build(net, folded=True)

    def outputs(image: jax.Array) -> dict[str, jax.Array]:
        found = network.apply(variables, normalize(image, net), train=False)
        assert isinstance(found, Mapping)
        return {name: found[name] for name in OUTPUTS if name in found}

    return outputs


def onnx_model(stored: Network | Model, side: int) -> bytes:
    """The checked ONNX model. Raises ExportError where it cannot be made, or does not agree with the model here."""
    function = inference(stored)
    content = to_onnx(function, INPUT, (side, side, 3), np.uint8, metadata={"srcc_jax": card_text(stored)})
    for batch in _BATCHES:
        image = np.random.default_rng(batch).integers(0, 256, (batch, side, side, 3), np.uint8)
        apart = difference(content, function, image)
        if not apart <= TOLERANCE:
            raise ExportError(
                f"the exported model differs from this one by {apart:.1e}, more than {TOLERANCE:g}: not written"
            )
        print(f"batch of {batch}: differs by {apart:.1e} of the largest value in onnxruntime")
    return content


def difference(content: bytes, function: Function, image: np.ndarray) -> float:
    """Largest difference of any output for these images, relative to that output's largest value."""
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise ExportError(
            "what is exported is checked in onnxruntime, which is not installed: python -m pip install -r requirements-export.txt"
        ) from error
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    found = dict(zip(names, session.run(names, {INPUT: image}), strict=True))
    wanted = jax.device_get(jax.jit(function)(image))
    return max(float(np.abs(found[name] - value).max() / np.abs(value).max()) for name, value in wanted.items())


def main() -> None:
    """Exports, and says what it wrote."""
    start_devices()
    stored, out = load(str(_WORKDIR.value)), pathlib.Path(str(_OUT.value))
    if _FORMAT.value == "safetensors":
        write_exchange(stored, out)
    else:
        side = _SIDE.value or (stored.grid.tile if isinstance(stored, Model) else None)
        if side is None:
            raise UsageError(f"{_WORKDIR.value} has no tiles of its own: --side must say how large the images are")
        content = onnx_model(stored, side)
        with atomic_write(out) as temporary:
            temporary.write_bytes(content)
    print(f"{out}: {stored.architecture.name} with {stored.architecture.classes} classes, {out.stat().st_size:,} bytes")


if __name__ == "__main__":
    run(main)
