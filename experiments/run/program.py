"""How a program starts and ends: devices, signals, one clear line for every expected error."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from types import FrameType

import jax
from absl import app, flags, logging

from data_pipelines.annotations import AnnotationError
from data_pipelines.boxes import BoxesError
from data_pipelines.cohort import CohortError
from data_pipelines.detections import DetectionsError
from data_pipelines.files import OutputError
from data_pipelines.patches import PatchesError
from data_pipelines.slides import SlideError
from data_pipelines.spots import SpotsError
from data_pipelines.tile_sets import TileSetError
from data_pipelines.tiles import TilesError
from data_pipelines.weights import WeightsError
from experiments.run.workdir import WorkdirError
from srcc_jax.checkpoints import CheckpointError
from srcc_jax.models.pretrained import PretrainedError
from srcc_jax.onnx_graph import ExportError
from srcc_jax.parallel import set_cpu_devices
from srcc_jax.train import Interrupted, TrainingDiverged

EXPECTED = (
    AnnotationError,
    BoxesError,
    CheckpointError,
    CohortError,
    DetectionsError,
    ExportError,
    OutputError,
    PatchesError,
    PretrainedError,
    SlideError,
    SpotsError,
    TileSetError,
    TilesError,
    TrainingDiverged,
    WeightsError,
    WorkdirError,
)


class UsageError(ValueError):
    """Flags that do not fit together, or name something that is not there."""


class Stop:
    """Becomes true at the first SIGTERM or SIGINT; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self._asked = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._asked = True
        print(f"\n{signal.Signals(number).name}: finishing this step, then saving a checkpoint", file=sys.stderr)

    def __call__(self) -> bool:
        return self._asked


_CACHE = flags.DEFINE_string(
    "compilation_cache", "~/.cache/srcc_jax", "folder that keeps compiled programs for the next start; empty: none"
)


def prefer_wide_vectors() -> None:
    """On CPU vectors of 512 bits, which XLA does not take by itself: inference 7 % faster where the CPU has them. XLA reads this
    when the first device starts; a setting of the user's own is left alone."""
    given = os.environ.get("XLA_FLAGS", "")
    if "xla_cpu_prefer_vector_width" not in given:
        os.environ["XLA_FLAGS"] = f"{given} --xla_cpu_prefer_vector_width=512".strip()


def start_devices(*, batch: int = 0) -> None:
    """On CPU one JAX device for each core that this process may use. Call before anything touches a device.

    batch: rows of this process that have to be split evenly: then as many devices as that allows. 0: any number does.
    """
    prefer_wide_vectors()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    set_cpu_devices(max(count for count in range(1, cores + 1) if batch % count == 0))
    if _CACHE.value:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(_CACHE.value))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def command(module: str, **values: object) -> None:
    """Runs a program of ours as a user would, and prints its command. A value of None leaves its flag out.

    Raises UsageError where it fails.
    """
    line = [
        "-m",
        f"experiments.{module}",
        *(f"--{name}={value}" for name, value in values.items() if value is not None),
    ]
    print(f"$ python {' '.join(line)}", flush=True)
    status = subprocess.run([sys.executable, *line]).returncode
    if status:
        raise UsageError(f"python {' '.join(line)} ended with status {status}: see what it printed above")


def run(main: Callable[[], int | None]) -> None:
    """Runs `main` under absl and exits with what `guarded` gives."""

    def start(argv: list[str]) -> None:
        if len(argv) > 1:
            raise app.UsageError(f"not understood: {' '.join(argv[1:])}")
        logging.set_verbosity(logging.WARNING)
        sys.exit(guarded(main))

    app.run(start)


def guarded(main: Callable[[], int | None]) -> int:
    """The exit status of `main`. Expected errors become one line and status 2; an interrupted run says how to go on."""
    try:
        return main() or 0
    except (*EXPECTED, UsageError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.filename is None:
            raise
        print(f"error: {os.fsdecode(error.filename)}: {error.strerror}", file=sys.stderr)
        return 2
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
