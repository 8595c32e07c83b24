"""Measures the table of BENCHMARKS.md on this machine: every figure is a ratio of two things measured in turn.

python -m experiments.benchmark --slide=slide.tiff --mpp_override=0.5 [--sections=model,networks,reading,predict,memory]

Section pipelines, asked for by name, sets whole programs against each other: --tiatoolbox_python names an environment of TIAToolbox.
"""

from __future__ import annotations

import atexit
import dataclasses
import datetime
import functools
import os
import pathlib
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
import openslide
from absl import flags

from data_pipelines.cohort import SlideRecord
from data_pipelines.prepare import prepare_slide
from data_pipelines.scan import ScanBatch, ScanJob, ScanShape, scan
from data_pipelines.slides import open_slide
from data_pipelines.synthetic import large_slide
from data_pipelines.tiles import Grid
from experiments.run.benchmarks.cells import cells_section
from experiments.run.benchmarks.distillation import distillation_section
from experiments.run.benchmarks.peers import Peer, interleaved
from experiments.run.benchmarks.pipeline_peers import Measured, Trial, tuned_peers
from experiments.run.benchmarks.rows import Row, ratio
from experiments.run.benchmarks.screening import screening_section
from experiments.run.benchmarks.search import large_search_section, search_section
from experiments.run.model import Model
from experiments.run.program import UsageError, run, start_devices
from experiments.run.scoring import classifier_scorer
from experiments.run.slide_outputs import SlideCollector
from experiments.run.workdir import versions
from srcc_jax.models.zoo import architecture, init
from srcc_jax.parallel import make_mesh
from srcc_jax.report import markdown_table

_SLIDE = flags.DEFINE_string("slide", None, "a slide for the sections reading and predict; none: a drawn one")
_MPP_OVERRIDE = flags.DEFINE_float("mpp_override", None, "µm per pixel of the slide, where it does not say it")
_SECTIONS = flags.DEFINE_list(
    "sections", ["model", "networks", "reading", "predict", "memory"], "which parts to measure"
)
_ROUNDS = flags.DEFINE_integer("rounds", 10, "times that each pair is measured")
_NETWORKS = flags.DEFINE_list("networks", None, "networks of section networks; none: all")
_TASKS = flags.DEFINE_list("tasks", ["infer", "train"], "tasks of section networks")
_SIDES = flags.DEFINE_list("sides", ["15000", "30000", "60000"], "sides of the slides of section memory, in pixels")
_TIATOOLBOX_PYTHON = flags.DEFINE_string(
    "tiatoolbox_python", None, "section pipelines: the Python of an environment with TIAToolbox; none: without it"
)

# network, side of its images in pixels, batch, target for inference
NETWORKS = (
    ("resnet18", 224, 16, "≤ 1.1"),
    ("resnet34", 224, 16, ""),
    ("resnet50", 224, 16, ""),
    ("wide_resnet50_2", 256, 8, "≤ 1.0"),
    ("densenet121", 224, 16, ""),
    ("res2net50_26w_4s", 224, 16, ""),
    ("b4", 380, 8, ""),
    ("dla34", 512, 4, "≤ 1.2"),
    ("unet", 512, 2, "≤ 1.2"),
)
GRID = Grid(tile=224, stride=112, mpp=1.0)


def model_section() -> Iterator[Row]:
    """EfficientNet-B1 at 224², float32, against torch with its malloc settings."""
    yield _against_torch("infer", "b1", 224, 16, "≤ 0.95")
    yield _against_torch("infer", "b1", 224, 64, "≤ 0.85")
    yield _against_torch("train", "b1", 224, 16, "≤ 2.5, aim 1.5")


def networks_section() -> Iterator[Row]:
    """The other networks in the same way: inference, and a training step."""
    for network, side, batch, inference in NETWORKS:
        for task, target in (("infer", inference), ("train", "≤ 2")):
            if task in _TASKS.value and (_NETWORKS.value is None or network in _NETWORKS.value):
                yield _against_torch(task, network, side, batch, target)


def _against_torch(task: str, network: str, side: int, batch: int, target: str) -> Row:
    ours, theirs = (Peer(framework, task, network, side, batch) for framework in ("jax", "torch"))
    measured = interleaved(ours.seconds, theirs.seconds, rounds=_ROUNDS.value)
    ours.close()
    theirs.close()
    what = {"infer": "inference", "train": "training step"}[task]
    return ratio(f"{network} {side}² {what}, batch {batch}: time / torch", *measured, target)


def reading_section() -> Iterator[Row]:
    """All windows of a slide at stride 112, by super-tiles, against OpenSlide window by window; one thread each."""
    tile, stride, block = GRID.tile, GRID.stride, 8
    extent = (block - 1) * stride + tile

    def ours() -> float:
        began = time.perf_counter()
        with open_slide(_slide(), mpp_override=_MPP_OVERRIDE.value) as slide:
            for y in range(0, slide.height - extent, block * stride):
                for x in range(0, slide.width - extent, block * stride):
                    region = slide.read(x, y, extent, extent, slide.mpp)
                    for i in range(block**2):
                        top, left = i // block * stride, i % block * stride
                        np.ascontiguousarray(region[top : top + tile, left : left + tile])
        return time.perf_counter() - began

    def theirs() -> float:
        began = time.perf_counter()
        with openslide.OpenSlide(_slide()) as slide:
            width, height = slide.dimensions
            for y in range(0, height - extent, block * stride):
                for x in range(0, width - extent, block * stride):
                    for i in range(block**2):
                        at = (x + i % block * stride, y + i // block * stride)
                        np.asarray(slide.read_region(at, 0, (tile, tile)).convert("RGB"))
        return time.perf_counter() - began

    measured = interleaved(theirs, ours, rounds=max(3, _ROUNDS.value // 3))
    yield ratio(f"windows of {pathlib.Path(_slide()).name}, stride 112: OpenSlide's time / ours", *measured, "≥ 6")


def predict_section() -> Iterator[Row]:
    """A slide from opening to its files, against the network alone over the same tiles held in memory."""
    model = _untrained_model("b1")
    scorer = classifier_scorer(model.architecture, tile=GRID.tile, mesh=make_mesh(), cam=True)
    folded, record = scorer.fold(model.variables), SlideRecord("slide", pathlib.Path(_slide()), None, "slide")

    def jobs(collectors: list[SlideCollector]) -> Iterator[ScanJob]:
        prepared = prepare_slide(record, GRID, min_tissue=0.5, mpp_override=_MPP_OVERRIDE.value)
        collectors.append(SlideCollector(prepared, first_row=0))
        yield ScanJob.of_open(prepared.slide, prepared.tiles, collectors[0].rows)

    def whole() -> float:
        began, collectors = time.perf_counter(), list[SlideCollector]()
        with tempfile.TemporaryDirectory() as folder:
            for scored in scorer.score(folded, scan(jobs(collectors), ScanShape.of(GRID))):
                collectors[0].add(scored)
            collectors[0].write(pathlib.Path(folder))
        return time.perf_counter() - began

    held: list[ScanBatch] = list(scan(jobs([]), ScanShape.of(GRID)))

    def network() -> float:
        began = time.perf_counter()
        for _ in scorer.score(folded, held):
            pass
        return time.perf_counter() - began

    whole()
    measured = interleaved(whole, network, rounds=max(3, _ROUNDS.value // 3))
    tiles = sum(batch.count for batch in held)
    yield ratio(f"predicting {pathlib.Path(_slide()).name} ({tiles} tiles): whole / network alone", *measured, "≤ 1.15")


def memory_section() -> Iterator[Row]:
    """Peak memory of predict_slides, B1, on slides of growing side."""
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        _untrained_model("b1").save(root / "model")
        for side in map(int, _SIDES.value):
            slide = large_slide(root / f"large_{side}.tiff", side_px=side)
            size = slide.stat().st_size / 1e6
            line = ["-m", "experiments.predict_slides", f"--workdir={root / 'model'}", f"--slides={slide}"]
            began = time.perf_counter()
            process = subprocess.Popen([sys.executable, *line, f"--out={root / f'out_{side}'}"])
            _, status, usage = os.wait4(process.pid, 0)
            if status:
                raise UsageError(f"predicting {slide} failed: see what it printed above")
            name = f"predicting {side} × {side} ({size:.0f} MB): peak memory"
            yield name, f"{_gigabytes(usage):.2f} GB", "≤ 2.5 GB, flat", f"{time.perf_counter() - began:.0f} s"


def pipelines_section() -> Iterator[Row]:
    """Whole programs over the same tiles of one slide, B1, in turn: ours, frozen torch, and TIAToolbox tuned and as shipped."""
    model = dataclasses.replace(_untrained_model("b1"), min_tissue=0.1)
    with tempfile.TemporaryDirectory() as folder:
        trial = Trial(pathlib.Path(folder), model, _slide(), mpp_override=_MPP_OVERRIDE.value)
        yield f"ours, {len(trial.tiles)} tiles, first start (compiles)", *_described(trial.ours(cold=True))
        trial.ours()  # fills the cache of the warm ones
        peers = tuned_peers(trial, _TIATOOLBOX_PYTHON.value)
        rounds = [(trial.ours(), *(peer.measure() for peer in peers)) for _ in range(_ROUNDS.value)]
    ours, *theirs = zip(*rounds)
    yield _peak("ours", ours, "≤ 0.8 GB")
    for peer, measured in zip(peers, theirs):
        rates = _columns(ours, measured, "tiles_per_second")
        yield ratio(f"ours / {peer.name}: steady rate", *rates, peer.steady_target, "tiles/s")
        yield ratio(f"ours / {peer.name}: wall time", *_columns(ours, measured, "seconds"), peer.wall_target)
        yield _peak(peer.name, measured, "")


def _columns(ours: Sequence[Measured], theirs: Sequence[Measured], name: str) -> tuple[np.ndarray, np.ndarray]:
    first, second = (np.asarray([getattr(one, name) for one in side]) for side in (ours, theirs))
    return first, second


def _described(measured: Measured) -> tuple[str, str, str]:
    rate, used = f"{measured.tiles_per_second:.0f} tiles/s", f"CPU {measured.cpu_seconds:.1f} s"
    return f"{measured.seconds:.1f} s, {measured.gigabytes:.2f} GB", "", f"{rate}, {used}"


def _peak(name: str, measured: Sequence[Measured], target: str) -> Row:
    used = np.median([one.cpu_seconds for one in measured])
    return f"{name}: peak memory", f"{max(one.gigabytes for one in measured):.2f} GB", target, f"CPU {used:.1f} s"


def _gigabytes(usage: resource.struct_rusage) -> float:
    return usage.ru_maxrss / (1e9 if platform.system() == "Darwin" else 1e6)


@functools.cache
def _slide() -> str:
    """The slide of the flag; without it a drawn one of 12,000² pixels, a third of it tissue."""
    if _SLIDE.value:
        return _SLIDE.value
    folder = tempfile.mkdtemp(prefix="srcc_jax_")
    atexit.register(shutil.rmtree, folder)
    return str(large_slide(pathlib.Path(folder) / "drawn.tiff", side_px=12_000, tissue=0.33))


def _untrained_model(name: str) -> Model:
    """Speed and memory do not depend on what the weights are."""
    net = architecture(name, source="torchvision", classes=1)
    about = {"name": f"untrained {name}", "settings": {}}
    return Model(net, init(net, jax.random.key(0)), GRID, 0.5, "positive", about)


SECTIONS: dict[str, Callable[[], Iterator[Row]]] = {
    "model": model_section,
    "networks": networks_section,
    "reading": reading_section,
    "predict": predict_section,
    "memory": memory_section,
    "pipelines": pipelines_section,
    "screening": lambda: screening_section(_ROUNDS.value),
    "cells": lambda: cells_section(_ROUNDS.value),
    "distillation": lambda: distillation_section(_ROUNDS.value),
    "search": lambda: search_section(_ROUNDS.value),
    "large_search": lambda: large_search_section(_ROUNDS.value),
}


def main() -> None:
    """Prints the table as Markdown, under the machine and the versions."""
    unknown = set(_SECTIONS.value) - set(SECTIONS)
    if unknown:
        raise UsageError(f"--sections: {', '.join(sorted(unknown))} is none of {', '.join(SECTIONS)}")
    start_devices()
    rows: list[Row] = []
    for section in _SECTIONS.value:
        for row in SECTIONS[section]():
            print(" | ".join(row), flush=True)
            rows.append(row)
    found = versions()
    print(
        f"\n{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores, jax {found['jax']}, Python {found['python']}"
    )
    print(markdown_table(rows, ["what", "measured", "target", "seconds"]))


if __name__ == "__main__":
    run(main)
