"""predict_slides in processes of their own that a test may kill, started without importing everything each time."""

import contextlib
import multiprocessing
import os
import pathlib
import sys

from absl import flags

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["experiments.predict_slides", "tests.prediction_process"])


def start(log: pathlib.Path, **values: object) -> multiprocessing.Process:
    """A process with these flags; what it prints goes to the end of `log`."""
    line = ["predict_slides", *(f"--{name}={value}" for name, value in values.items())]
    process = _CONTEXT.Process(target=_run, args=(str(log), line))
    process.start()
    return process


def _run(log: str, line: list[str]) -> None:
    from experiments import predict_slides  # not at the top: in a test's process its flags would meet those of others
    from experiments.run.program import guarded

    with open(log, "a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        flags.FLAGS(line)
        status = guarded(predict_slides.main)
    sys.stdout.flush()
    os._exit(status)
