"""Programs over a cohort in processes of their own that a test may kill, started without importing everything each time."""

import contextlib
import importlib
import multiprocessing
import os
import pathlib
import sys

from absl import flags

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "experiments.run.cohort_program",
        "experiments.run.cohort_report",
        "experiments.run.feature_outputs",
        "tests.prediction_process",
    ]
)


def start(log: pathlib.Path, program: str = "predict_slides", **values: object) -> multiprocessing.Process:
    """A process with these flags; what it prints goes to the end of `log`."""
    line = [program, *(f"--{name}={value}" for name, value in values.items())]
    process = _CONTEXT.Process(target=_run, args=(str(log), line))
    process.start()
    return process


def _run(log: str, line: list[str]) -> None:
    from experiments.run.program import guarded

    module = importlib.import_module(f"experiments.{line[0]}")  # not at the top: its flags would meet those of others
    with open(log, "a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        flags.FLAGS(line)
        status = guarded(module.main)
    sys.stdout.flush()
    os._exit(status)
