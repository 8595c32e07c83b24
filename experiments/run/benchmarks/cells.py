"""Cell detection in the table of BENCHMARKS.md: cells out of probabilities, against the network and against scikit-image."""

from __future__ import annotations

import functools
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from scipy import ndimage
from skimage.segmentation import random_walker as published_walker

from data_pipelines.synthetic import large_slide
from experiments.run.benchmarks.peers import interleaved
from experiments.run.benchmarks.rows import Row, ratio
from experiments.run.cells.inference import CellScorer
from experiments.run.cells.model import CellModel
from experiments.run.program import UsageError
from srcc_jax.instances import find_instances, random_walker
from srcc_jax.methods.cell_detection import Config, target_mask
from srcc_jax.models import zoo
from srcc_jax.parallel import make_mesh

SIDE, CELLS = 2000, 300
SIDES = (5_000, 10_000, 20_000)  # of slides, in pixels
NETWORK = "unet_resnet34"
MPP = 0.25


def cells_section(
    rounds: int, *, side: int = SIDE, cells: int = CELLS, sides: Sequence[int] = SIDES, window: int = Config.window
) -> Iterator[Row]:
    """Instances of a drawn image of side² pixels with so many cells; then peak memory on slides of these sides."""
    probability, config = drawn_probability(side, cells), Config()
    image = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    net = zoo.architecture(NETWORK, source=next(iter(zoo.family(NETWORK).sources)), classes=3)
    scorer = CellScorer(net, window=window, overlap=config.overlap, mesh=make_mesh())
    folded = scorer.fold(zoo.init(net, jax.random.key(0)))
    scorer.probabilities(folded, image[:32, :32])  # compiles
    found = functools.partial(find_instances, probability, threshold=config.threshold, min_area=config.min_area)
    network = functools.partial(scorer.probabilities, folded, image)
    measured = interleaved(_seconds(found), _seconds(network), rounds=min(rounds, 3))
    yield ratio(f"cells of {side}² with {cells} cells / its probabilities by {NETWORK}", *measured, "≤ 1")
    data, markers = _markers(probability, config)
    ours = functools.partial(random_walker, data, markers)
    theirs = functools.partial(
        published_walker, data, markers, beta=config.beta, mode="bf"
    )  # its fastest without pyamg
    measured = interleaved(_seconds(ours), _seconds(theirs), rounds=min(rounds, 3))
    yield ratio(f"random walker on {side}², by pieces / scikit-image on the whole", *measured, "")
    yield from _memory(sides, window)


def _memory(sides: Sequence[int], window: int) -> Iterator[Row]:
    """Of predict_slides with a small network. What grows with the slide is the table of its windows."""
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        small_model(window).save(root / "model")
        for side in sides:
            slide = large_slide(root / f"large_{side}.tiff", side_px=side, mpp=MPP)
            line = ["-m", "experiments.predict_slides", f"--workdir={root / 'model'}", f"--slides={slide}"]
            began = time.perf_counter()
            process = subprocess.Popen([sys.executable, *line, f"--out={root / f'out_{side}'}"])
            _, status, usage = os.wait4(process.pid, 0)
            if status:
                raise UsageError(f"predicting {slide} failed: see what it printed above")
            peak = usage.ru_maxrss / (1e9 if platform.system() == "Darwin" else 1e6)
            name = f"cell detection on a slide of {side} × {side} in windows of {window}: peak memory"
            yield name, f"{peak:.2f} GB", "flat", f"{time.perf_counter() - began:.0f} s"


def small_model(window: int) -> CellModel:
    """Untrained and four channels wide; its threshold is so high that it finds nothing: a kilobyte for each cell would come on top."""
    widths = (4, 4, 8, 8, 8)
    net = zoo.architecture("unet", source="original", classes=3, batch_norm=True, widths=widths)
    return CellModel(
        architecture=net,
        variables=zoo.init(net, jax.random.key(0)),
        mpp=MPP,
        reduce=1,
        window=window,
        overlap=window // 8,
        threshold=0.99,
        min_area=100,
        beta=Config.beta,
        spread=0.25,
        about={"settings": {"positive": "srcc"}},
    )


def drawn_probability(side: int, cells: int) -> np.ndarray:
    """Probabilities float32 [side, side, 3] of cells at random places, 50 to 100 pixels wide, that may touch: targets, smoothed."""
    random = np.random.default_rng(0)
    middle, half = random.uniform(0, side, (cells, 2)), random.uniform(25, 50, (cells, 2))
    mask = target_mask(np.concatenate([middle - half, middle + half], axis=1), side, side, edge_share=0.1, edge_px=3)
    maps = [ndimage.gaussian_filter((mask == index).astype(np.float32), 2) for index in range(3)]
    probability = np.stack(maps, axis=-1)
    return probability / probability.sum(-1, keepdims=True)


def _markers(probability: np.ndarray, config: Config) -> tuple[np.ndarray, np.ndarray]:
    """What the walker is given: data [H, W], and labels with -1 for background."""
    inner = probability[..., 2].astype(np.float64)
    seeds, _ = ndimage.label(inner > config.threshold)
    return inner, np.where(seeds > 0, seeds, np.where(probability.argmax(-1) > 0, 0, -1))


def _seconds(work: Callable[[], object]) -> Callable[[], float]:
    def timed() -> float:
        begun = time.perf_counter()
        work()
        return time.perf_counter() - begun

    return timed
