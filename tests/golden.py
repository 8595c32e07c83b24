"""Weights made from their own names, as the golden files were (see the README beside them)."""

import json
import math
import pathlib
import zlib

import numpy as np

KERAS_KINDS = {"gamma": "g", "beta": "B", "bias": "b", "moving_mean": "m", "moving_variance": "v"}
IMAGENET = {
    "normalization/mean": np.float32([0.485, 0.456, 0.406]),
    "normalization/variance": np.float32([0.229, 0.224, 0.225]) ** 2,
    "normalization/count": np.int64(0),
}


def read(folder: pathlib.Path, name: str) -> dict[str, np.ndarray]:
    with np.load(folder / "golden" / f"{name}.npz", allow_pickle=False) as file:
        return dict(file)


def torch_weights(golden: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The state_dict of a torch-named net, checked against the stored sums."""
    shapes, gain = json.loads(str(golden["shapes"])), float(golden["gain"])
    weights = {
        str(name): _value(str(name), tuple(shape), str(kind), gain, math.prod(shape[1:]))
        for name, shape, kind in zip(golden["names"], shapes, golden["kinds"], strict=True)
    }
    _check_sums(weights, golden)
    return weights


def keras_weights(golden: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The weights of a Keras-named net, drawn in Keras's layout, checked against the stored sums."""
    weights = {}
    for name, shape in zip(map(str, golden["names"]), json.loads(str(golden["shapes"])), strict=True):
        kind = KERAS_KINDS.get(name.rsplit("/", 1)[-1], "w")
        fan_in = math.prod(shape[:2] if "dwconv" in name else shape[:-1])
        weights[name] = IMAGENET.get(name)
        if name not in IMAGENET:
            weights[name] = _value(name, tuple(shape), kind, float(golden["gain"]), fan_in)
    _check_sums(weights, golden)
    return weights


def image(hw: np.ndarray) -> np.ndarray:
    """The input [2, H, W, 3] of a torch-named net."""
    return np.random.default_rng(0).standard_normal((2, 3, *hw), dtype=np.float32).transpose(0, 2, 3, 1)


def keras_image(hw: np.ndarray) -> np.ndarray:
    """The input [2, H, W, 3] of the Keras-named net behind its layers that scale the image.

    The file's outputs are those of pixels / 255 alone: values assigned to a Normalization layer's variables, as its makers
    did, are only taken up when the layer is built or loaded, so the stored mean and variance were without effect.
    """
    return np.random.default_rng(0).integers(0, 256, (2, *hw, 3), dtype=np.uint8) / np.float32(255)


def difference(ours: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference relative to the largest value."""
    return float(np.abs(np.asarray(ours) - expected).max() / np.abs(expected).max())


def _value(name: str, shape: tuple[int, ...], kind: str, gain: float, fan_in: int) -> np.ndarray:
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if kind == "n":
        return np.zeros(shape, np.int64)
    if kind == "v":
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    z = rng.standard_normal(shape, dtype=np.float32)
    scale = {"w": gain * math.sqrt(2 / fan_in), "b": 0.05, "g": 0.1, "B": 0.1, "m": 0.1}[kind]
    return np.float32(kind == "g") + z * np.float32(scale)


def _check_sums(weights: dict[str, np.ndarray], golden: dict[str, np.ndarray]) -> None:
    sums = [(np.sum(w, dtype=np.float64), np.abs(w).sum(dtype=np.float64)) for w in weights.values()]
    np.testing.assert_allclose(sums, golden["param_sums"], rtol=1e-6, atol=1e-6)
