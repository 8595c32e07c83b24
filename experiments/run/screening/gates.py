"""The two small networks at work: tissue of a slide by the foreground network, and focus of patches by the blur gate."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from PIL import Image

from data_pipelines.patches import BatchReader
from data_pipelines.prepare import TISSUE_MPP
from data_pipelines.slides import Slide
from data_pipelines.tissue import tissue_mask
from experiments.run.screening.foreground import square_thumbnail
from experiments.run.screening.model import GateSpec
from srcc_jax.methods.gastric_screening import unit_range
from srcc_jax.metrics import roc_auc
from srcc_jax.models.blur import BlurNet
from srcc_jax.models.foreground import ForegroundNet

_BATCH = 32


@dataclasses.dataclass(frozen=True, eq=False)
class ForegroundFinder:
    """variables: of the foreground network; gates: how it sees a slide."""

    variables: Mapping[str, Any]
    gates: GateSpec

    def mask(self, slide: Slide, *, shape: tuple[int, int]) -> np.ndarray:
        """Tissue on a whole slide, bool [height, width] of `shape`, at probability 0.5."""
        pixels = square_thumbnail(slide.thumbnail(self.gates.thumbnail_mpp), self.gates.thumbnail)
        logit = np.array(_foreground(self.variables, pixels[None])[0, ..., 0])
        return np.asarray(Image.fromarray(logit).resize(shape[::-1], Image.Resampling.BILINEAR)) > 0


@jax.jit
def _foreground(variables: Mapping[str, Any], image: jax.Array) -> jax.Array:
    out: Any = ForegroundNet().apply(variables, unit_range(image), train=False)
    return out["dense"]


@jax.jit
def blur_logits(variables: Mapping[str, Any], image: jax.Array) -> jax.Array:
    """float32 [B]: above 0 a patch uint8 [B, side, side, 3] is out of focus."""
    out: Any = BlurNet().apply(variables, unit_range(image), train=False)
    return out["logits"][:, 0]


def blur_by_radius(
    variables: Mapping[str, Any], reader: BatchReader, radius_um: np.ndarray, rows: np.ndarray
) -> list[dict[str, float]]:
    """For each radius of defocus above 0 among the rows [n] of a FocusReader: ROC AUC against the same places as they are (radius 0),
    and the share called out of focus; radius 0 has the share alone."""
    logit = np.full(len(rows), np.nan)
    for begin in range(0, len(rows), _BATCH):
        part = rows[begin : begin + _BATCH]
        batch = reader.read(part, size=_BATCH)
        found = np.asarray(blur_logits(variables, batch.arrays["image"]))[: len(part)]
        logit[begin : begin + len(part)] = np.where(batch.arrays["weight"][: len(part)] > 0, found, np.nan)
    radius, known = radius_um[rows], np.isfinite(logit)
    clear = logit[known & (radius == 0)]
    table = []
    for value in np.unique(radius):
        mine = logit[known & (radius == value)]
        row = {"radius_um": float(value), "patches": len(mine), "called": float((mine > 0).mean())}
        if value > 0:
            label = np.repeat([0, 1], [len(clear), len(mine)])
            row["ROC AUC"] = float(roc_auc(label, np.concatenate([clear, mine])))
        table.append(row)
    return table


def turning_radius(table: Sequence[Mapping[str, float]]) -> float | None:
    """The radius in µm at which half of the patches are called out of focus, between the rows of `blur_by_radius`; None where that
    is at none of them."""
    for before, after in itertools.pairwise(table):
        if before["called"] < 0.5 <= after["called"]:
            part = (0.5 - before["called"]) / (after["called"] - before["called"])
            return before["radius_um"] + part * (after["radius_um"] - before["radius_um"])
    return None


def tissue_agreement(finder: ForegroundFinder, slide: Slide, truth: np.ndarray) -> list[dict[str, Any]]:
    """Of the foreground network and of the thresholds of `tissue_mask`: intersection over union with a mask of the slide's tissue,
    bool [h, w], and seconds from the open slide to the mask (the second of two runs: compiling is left out)."""

    def by_network() -> np.ndarray:
        return finder.mask(slide, shape=truth.shape)

    def by_threshold(method: str) -> np.ndarray:
        found = Image.fromarray(tissue_mask(slide.thumbnail(TISSUE_MPP), method))
        return np.asarray(found.resize(truth.shape[::-1], Image.Resampling.NEAREST))

    ways = {"foreground network": by_network} | {
        f"{method} threshold": lambda method=method: by_threshold(method) for method in ("otsu", "stain", "saturation")
    }
    rows = []
    for name, find in ways.items():
        find()
        began = time.perf_counter()
        found = find()
        seconds = time.perf_counter() - began
        rows.append({"method": name, "IoU": float((found & truth).sum() / (found | truth).sum()), "seconds": seconds})
    return rows
