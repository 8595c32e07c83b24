"""Programs over a cohort in processes of their own that a test may kill, started without importing everything each time."""

import contextlib
import csv
import importlib
import multiprocessing
import os
import pathlib
import signal
import sys
import time

from absl import flags

from experiments.run.journal import Journal
from experiments.run.slide_result import TIMES

PATIENCE_SECONDS = 300.0
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "experiments.run.cells.prediction",
        "experiments.run.cohort_program",
        "experiments.run.distillation.prediction",
        "experiments.run.feature_outputs",
        "experiments.run.screening.prediction",
        "experiments.run.slide_classifier",
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


def results_of(out):
    """Everything that a run leaves and that is no time of a clock: path -> bytes, and the rows."""
    files = {str(p.relative_to(out)): p.read_bytes() for p in sorted((out / "slides").rglob("*")) if p.is_file()}
    with open(out / "slides.csv", newline="", encoding="utf-8") as file:
        rows = [{name: cell for name, cell in row.items() if name not in TIMES} for row in csv.DictReader(file)]
    return files, rows


def wait_for_changes(out, count, process):
    """Waits until the state of the cohort was seen to change `count` times, or the process ended."""
    seen, deadline = None, time.monotonic() + PATIENCE_SECONDS
    while count >= 0 and process.is_alive() and time.monotonic() < deadline:
        found = {(str(path), path.stat().st_mtime_ns) for path in out.glob("state/*/[!.]*")}
        count -= seen != found
        seen = found
        time.sleep(0.001)


def half_done(out):
    journals = [Journal.load(path) for path in out.glob("state/*/scores.npz")]
    return sum(0 < journal.seen.sum() < len(journal.seen) for journal in journals)


def check_kills(root, changes, **values):
    """Predicts slides, of which something cannot be read, into root/whole in peace and into root/killed with a kill after each number
    of changes of the state: both leave the same bytes, and a kill met a slide half done."""

    def begin(name):
        log, cache = root / f"{name}.log", root / "compiled"
        return start(log, out=root / name, compilation_cache=cache, save_seconds=0, **values)

    def end(process, name):
        process.join(PATIENCE_SECONDS)
        assert process.exitcode == 1, (root / f"{name}.log").read_text()

    end(begin("whole"), "whole")
    inside = 0
    for count in changes:
        process = begin("killed")
        wait_for_changes(root / "killed", count, process)
        assert process.is_alive(), (root / "killed.log").read_text()
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        inside += half_done(root / "killed") > 0
    end(begin("killed"), "killed")
    assert inside and " goes on after " in (root / "killed.log").read_text()
    assert results_of(root / "killed") == results_of(root / "whole")
