"""Rows of BENCHMARKS.md for reverse distillation: networks against torch, and the memory that maps of slides take."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence

import jax

from data_pipelines.synthetic import large_slide
from experiments.run.benchmarks.peers import Peer, interleaved
from experiments.run.benchmarks.rows import Row, ratio
from experiments.run.distillation.model import DistillationModel
from experiments.run.program import UsageError
from srcc_jax.models import distillation, zoo
from srcc_jax.models.teachers import cut, student_architecture

PEERS = "experiments.run.benchmarks.distillation_peers"
SIDES = (15_000, 30_000, 60_000)  # of the slides, in pixels
TILE, STRIDE, MPP = 64, 32, 0.5


@dataclasses.dataclass(frozen=True)
class Case:
    """A teacher, the side of its patches in pixels, how many go in a batch, and what is asked of the time against torch's."""

    teacher: str
    side: int
    batch: int
    target: str = ""


CASES = (Case("wide_resnet50_2", 256, 8, "≤ 1.2"), Case("resnet18", 256, 8))


def distillation_section(rounds: int, *, cases: Sequence[Case] = CASES, sides: Sequence[int] = SIDES) -> Iterator[Row]:
    """Map inference and training step of teacher, bottleneck and student; then peak memory on slides of these sides."""
    for case in cases:
        for task in ("infer", "train"):
            yield _against_torch(task, case, rounds)
    yield from _memory(sides)


def _against_torch(task: str, case: Case, rounds: int) -> Row:
    ours, theirs = (
        Peer(framework, task, case.teacher, case.side, case.batch, module=PEERS) for framework in ("jax", "torch")
    )
    measured = interleaved(ours.seconds, theirs.seconds, rounds=rounds)
    ours.close()
    theirs.close()
    what = {"infer": "map inference", "train": "training step"}[task]
    name = f"reverse distillation, {case.teacher} {case.side}² {what}, batch {case.batch}: time / torch"
    return ratio(name, *measured, case.target)


def _memory(sides: Sequence[int]) -> Iterator[Row]:
    """Of predict_slides with a small teacher: what grows with the slide is the map and the table of tiles, not the network."""
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        small_model().save(root / "model")
        for side in sides:
            slide = large_slide(root / f"large_{side}.tiff", side_px=side, mpp=MPP)
            line = ["-m", "experiments.predict_slides", f"--workdir={root / 'model'}", f"--slides={slide}"]
            began = time.perf_counter()
            process = subprocess.Popen([sys.executable, *line, f"--stride={STRIDE}", f"--out={root / f'out_{side}'}"])
            _, status, usage = os.wait4(process.pid, 0)
            if status:
                raise UsageError(f"predicting {slide} failed: see what it printed above")
            peak = usage.ru_maxrss / (1e9 if platform.system() == "Darwin" else 1e6)
            name = f"anomaly map of {side} × {side} at stride {STRIDE}: peak memory"
            yield name, f"{peak:.2f} GB", "flat", f"{time.perf_counter() - began:.0f} s"


def small_model() -> DistillationModel:
    """Untrained, four channels wide: the pixels of a slide, not the network, take the memory."""
    changes = {"width": 4, "depths": (1, 1, 1, 1)}
    teacher = cut(zoo.architecture("resnet18", source="torchvision", classes=1, **changes))
    student = student_architecture(teacher, shortcut="3x3", depths=(1, 1, 1), embedding_blocks=1)
    keys = jax.random.split(jax.random.key(0))
    return DistillationModel(
        teacher=teacher,
        student=student,
        variables={**distillation.init(student, keys[0]), "teacher": zoo.init(teacher, keys[1])},
        tile=TILE,
        mpp=MPP,
        positive="tumour",
        thresholds={"fixed": 2.0},
        slide_threshold=2.01,
        about={"settings": {"teacher": "untrained"}},
    )
