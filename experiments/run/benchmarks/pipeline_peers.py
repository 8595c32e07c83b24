"""Whole pipelines over the same tiles of one slide, each as a process of its own: ours as a user runs it, and its peers.

All of them read the slide, score the tiles with an untrained EfficientNet-B1 and write a table x,y,probability.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import json
import os
import pathlib
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines.cohort import SlideRecord
from data_pipelines.exports import write_table
from data_pipelines.prepare import PreparedSlide, prepare_slide
from data_pipelines.tiles import Tiles
from experiments.run.benchmarks import pipeline_torch
from experiments.run.benchmarks.peers import HUGE_PAGES, TORCH_MALLOC
from experiments.run.model import Model
from experiments.run.program import UsageError

Options = Mapping[str, Any]

# What is tried once, to go on with the fastest. optimize: torch.jit.optimize_for_inference besides freezing.
TORCH_OPTIONS: tuple[Options, ...] = (
    {"batch": 16, "workers": 1, "optimize": False},
    {"batch": 32, "workers": 1, "optimize": False},
    {"batch": 16, "workers": 2, "optimize": False},
    {"batch": 16, "workers": 1, "optimize": True},
)
TIATOOLBOX_SHIPPED: Options = {"batch": 8, "workers": 0, "tuned": False}
TIATOOLBOX_OPTIONS: tuple[Options, ...] = (
    {"batch": 16, "workers": 0, "tuned": True},
    {"batch": 32, "workers": 0, "tuned": True},
    {"batch": 16, "workers": 1, "tuned": True},
    {"batch": 16, "workers": 2, "tuned": True},
)


@dataclasses.dataclass(frozen=True)
class Measured:
    """A whole process: wall time, CPU time of it and its children, resident memory of the largest of them at its peak, and tiles
    a second without start-up and compilation."""

    seconds: float
    cpu_seconds: float
    gigabytes: float
    tiles_per_second: float


class Trial:
    """One slide and its tiles, which every pipeline is handed; `folder` is for what they read and leave.

    Raises UsageError where the slide has no level of the model's scale: reading would differ from program to program.
    """

    def __init__(self, folder: pathlib.Path, model: Model, slide: str, *, mpp_override: float | None):
        record = SlideRecord("slide", pathlib.Path(slide), None, "slide")
        prepared = prepare_slide(record, model.grid, min_tissue=model.min_tissue, mpp_override=mpp_override)
        prepared.slide.close()
        _check_level(prepared, slide)
        self._folder, self._slide, self._mpp_override = folder, slide, mpp_override
        self._slide_mpp, self.tiles = prepared.slide.mpp, prepared.tiles
        self._traced: set[int] = set()  # batches that torch's network was traced for
        model.save(folder / "model")
        hand_over(self.tiles, folder / "tiles.csv")

    def ours(self, *, cold: bool = False) -> Measured:
        """predict_slides, probabilities only. cold: nothing compiled is found from an earlier start."""
        out, cache = self._folder / "ours", self._folder / ("cold_cache" if cold else "cache")
        values = {
            "workdir": self._folder / "model",
            "slides": self._slide,
            "out": out,
            "mpp_override": self._mpp_override,
            "formats": "csv",
            "gradcam": "false",
            "compilation_cache": cache,
        }
        shutil.rmtree(out, ignore_errors=True)
        if cold:
            shutil.rmtree(cache, ignore_errors=True)
        flags = [f"--{name}={value}" for name, value in values.items() if value is not None]
        seconds, usage = run_process([sys.executable, "-m", "experiments.predict_slides", *flags], HUGE_PAGES)
        (table,) = out.glob("slides/*/tiles.csv")
        check_same_tiles(table, self.tiles)
        summary = json.loads((out / "summary.json").read_text())
        return _measured(seconds, usage, summary["tiles_per_second"])

    def torch(self, options: Options) -> Measured:
        """The hand-tuned pipeline of `pipeline_torch.frozen`."""
        weights = self._folder / f"b1_{options['batch']}.pt"
        if options["batch"] not in self._traced:
            self._run(sys.executable, {"kind": "trace", "weights": str(weights), **options}, TORCH_MALLOC)
            self._traced.add(options["batch"])
        return self._scored(sys.executable, {"kind": "frozen", "weights": str(weights), **options}, TORCH_MALLOC)

    def tiatoolbox(self, python: str, options: Options) -> Measured:
        """TIAToolbox's PatchPredictor in its own environment; torch's malloc settings where it is tuned."""
        shutil.rmtree(self._folder / "tiatoolbox", ignore_errors=True)
        malloc = TORCH_MALLOC if options["tuned"] else {}
        return self._scored(python, {"kind": "tiatoolbox", **options}, malloc)

    def _scored(self, python: str, job: Options, malloc: Mapping[str, str]) -> Measured:
        seconds, usage = self._run(python, job, malloc)
        out = self._out(job)
        check_same_tiles(out, self.tiles)
        return _measured(seconds, usage, json.loads(out.with_suffix(".json").read_text())["tiles_per_second"])

    def _run(self, python: str, job: Options, malloc: Mapping[str, str]) -> tuple[float, resource.struct_rusage]:
        whole = {
            "slide": self._slide,
            "slide_mpp": self._slide_mpp,
            "tiles": str(self._folder / "tiles.csv"),
            **{name: getattr(self.tiles, name) for name in ("tile", "stride", "mpp")},
            "out": str(self._out(job)),
            **job,
        }
        return run_process(
            [python, str(pathlib.Path(pipeline_torch.__file__)), json.dumps(whole)], {**HUGE_PAGES, **malloc}
        )

    def _out(self, job: Options) -> pathlib.Path:
        return self._folder / f"{job['kind']}.csv"


def fastest(measure: Callable[[Options], Measured], candidates: Sequence[Options]) -> Options:
    """The options with most tiles a second, of one measurement each."""
    return max(candidates, key=lambda options: measure(options).tiles_per_second)


@dataclasses.dataclass(frozen=True)
class PipelinePeer:
    """Another pipeline with its options, and what ours is to be of it: rate and wall time as ratios."""

    name: str
    measure: Callable[[], Measured]
    steady_target: str = ""
    wall_target: str = ""


def tuned_peers(trial: Trial, tiatoolbox_python: str | None) -> list[PipelinePeer]:
    """Each with its fastest options. Says so where TIAToolbox is left out, because no environment of it is given."""
    tuned = fastest(trial.torch, TORCH_OPTIONS)
    frozen = PipelinePeer(f"frozen torch {_named(tuned)}", functools.partial(trial.torch, tuned), "≥ 1.15", "≤ 0.9")
    if not tiatoolbox_python:
        print("TIAToolbox is not measured: --tiatoolbox_python names no environment of it")
        return [frozen]
    measure = functools.partial(trial.tiatoolbox, tiatoolbox_python)
    tuned = fastest(measure, TIATOOLBOX_OPTIONS)
    return [
        frozen,
        PipelinePeer(f"TIAToolbox {_named(tuned)}", functools.partial(measure, tuned), "≥ 1.8"),
        PipelinePeer("TIAToolbox as shipped", functools.partial(measure, TIATOOLBOX_SHIPPED)),
    ]


def _named(options: Options) -> str:
    return f"({', '.join(f'{name} {value}' for name, value in options.items())})"


def hand_over(tiles: Tiles, path: pathlib.Path) -> None:
    """The table that peers read: u, v in model pixels, x, y in level-0 pixels."""
    write_table(path, {name: getattr(tiles, name) for name in ("u", "v", "x", "y")})


def check_same_tiles(path: pathlib.Path, tiles: Tiles) -> None:
    """Raises UsageError where a table of results lacks a probability, or is of other tiles."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = [(float(row["x"]), float(row["y"]), row["probability"]) for row in csv.DictReader(file)]
    found = sorted((round(x), round(y)) for x, y, probability in rows if probability)
    wanted = sorted(zip(np.rint(tiles.x).astype(int).tolist(), np.rint(tiles.y).astype(int).tolist()))
    if found != wanted:
        raise UsageError(
            f"{path.name}: {len(found)} probabilities, not of the {len(wanted)} tiles that were handed over"
        )


def run_process(line: Sequence[str], environment: Mapping[str, str]) -> tuple[float, resource.struct_rusage]:
    """Wall seconds and use of a process that is heard only where it fails. Raises UsageError then, with its last lines."""
    began = time.perf_counter()
    process = subprocess.Popen(
        line, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout
    said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - began
    if status:
        raise UsageError(f"{' '.join(line[:3])} failed: {' | '.join(said.splitlines()[-3:])}")
    return seconds, usage


def _measured(seconds: float, usage: resource.struct_rusage, tiles_per_second: float) -> Measured:
    unit = 1e9 if platform.system() == "Darwin" else 1e6
    return Measured(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / unit, tiles_per_second)


def _check_level(prepared: PreparedSlide, slide: str) -> None:
    scale = prepared.tiles.mpp / prepared.slide.mpp
    levels = [level.downsample for level in prepared.slide.levels]
    if min(abs(level / scale - 1) for level in levels) > 0.01:
        raise UsageError(
            f"{slide}: no level has {prepared.tiles.mpp:g} µm per pixel (downsamples {levels}): give another --slide, or its "
            "--mpp_override"
        )
