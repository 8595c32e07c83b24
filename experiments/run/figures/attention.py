"""Where models look: Grad-CAM of several models on the same patches side by side, as in Figure 6 of Lee et al. 2023."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from PIL import Image

from data_pipelines.contact_sheets import Picture, contact_sheet
from data_pipelines.exports import write_image
from data_pipelines.overlays import map_colours
from srcc_jax.kernels.grad_cam import grad_cam
from srcc_jax.models.architecture import Architecture, normalize
from srcc_jax.models.layers import fold_batch_norm
from srcc_jax.models.zoo import build

SIDE = 168  # ours: of a picture of the figure, px
ALPHA, COLORMAP = 0.45, "turbo"  # ours


def make_attention(
    architecture: Architecture, *, index: int
) -> Callable[[Mapping[str, Any], np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """(variables as trained, image uint8 [B, H, W, 3]) -> Grad-CAM of class `index` float32 [B, h, w], and its probability [B].

    The probability is the softmax's, or the sigmoid's of a network of one class. Compiled once for a size of the batch.
    """
    network = build(architecture, folded=True)

    @jax.jit
    def attend(variables: Mapping[str, Any], image: jax.Array) -> tuple[jax.Array, jax.Array]:
        folded = fold_batch_norm(dict(variables), epsilon=architecture.bn_epsilon)
        out: Any = network.apply(folded, normalize(image, architecture), train=False)
        head, logits = folded["params"]["classifier"], out["logits"].astype(np.float32)
        maps = grad_cam(lambda maps: maps.mean((1, 2)) @ head["kernel"] + head["bias"][None], out["maps"], index=index)
        sigmoid = logits.shape[1] == 1
        return maps, jax.nn.sigmoid(logits[:, 0]) if sigmoid else jax.nn.softmax(logits)[:, index]

    return lambda variables, image: jax.device_get(attend(variables, image))


def draw_attention(
    path: str | os.PathLike,
    images: np.ndarray,
    captions: Sequence[str],
    maps: Mapping[str, tuple[np.ndarray, np.ndarray]],
) -> None:
    """Writes a PNG with a row for each patch: the patch under its caption, then each model's map over it with its probability.

    images uint8 [N, H, W, 3]; maps: model -> what `make_attention` gives, [N, h, w] and [N]. Maps are scaled to their own maximum,
    for display alone; one that is 0 everywhere leaves the patch as it is.
    """
    rows = []
    for number, (image, caption) in enumerate(zip(images, captions, strict=True)):
        seen = [
            Picture(painted(image, values[number]), f"{name} {probability[number]:.2f}")
            for name, (values, probability) in maps.items()
        ]
        rows.append([Picture(image, caption), *seen])
    write_image(path, contact_sheet(rows, side=SIDE))


def painted(image: np.ndarray, values: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3]: the map float [h, w] >= 0, enlarged bilinearly, in colours over the image uint8 [H, W, 3]."""
    greatest = float(values.max())
    if greatest <= 0:
        return image
    size = image.shape[1], image.shape[0]
    large = np.asarray(Image.fromarray(np.float32(values) / greatest).resize(size, Image.Resampling.BILINEAR))
    colours = map_colours(large.ravel(), COLORMAP, (0.0, 1.0)).reshape(image.shape)
    return np.rint((1 - ALPHA) * image + ALPHA * colours).astype(np.uint8)
