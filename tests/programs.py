"""Programs of experiments/ started inside the test's process, one module at a time, and small things to start them on."""

import contextlib
import importlib
import io
import sys
from dataclasses import dataclass

import jax
import numpy as np
from absl import flags
from absl.testing import flagsaver

from data_pipelines.polygons import Shape
from experiments.run import program
from experiments.run.model import Model
from srcc_jax.models.zoo import architecture, init


@dataclass(frozen=True)
class Outcome:
    """What a start left: its exit status, and what it printed."""

    status: int
    out: str
    err: str


@contextlib.contextmanager
def imported(name):
    """The module experiments.<name>. Programs share names of flags, so no two can be there at once."""
    before = set(flags.FLAGS)
    module = importlib.import_module(f"experiments.{name}")
    try:
        yield module
    finally:
        for flag in set(flags.FLAGS) - before:
            delattr(flags.FLAGS, flag)
        del sys.modules[f"experiments.{name}"]


def start(module, *line, **values):
    """`python -m module *line --name=value ...`, up to the devices, which are those of the tests."""
    line = [*line, *(f"--{name}={value}" for name, value in values.items())]
    out, err = io.StringIO(), io.StringIO()
    devices, program.set_cpu_devices = program.set_cpu_devices, lambda count: None
    try:
        with flagsaver.flagsaver(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            flags.FLAGS([module.__name__, *line, "--compilation_cache="])
            status = program.guarded(module.main)
    finally:
        program.set_cpu_devices = devices
    return Outcome(status, out.getvalue(), err.getvalue())


def save_model(folder, *, grid, seed=0):
    """A finished model that was never trained: the smallest network with fresh weights."""
    net = architecture("tiny", source="keras", classes=1)
    folder.mkdir(parents=True, exist_ok=True)
    about = {"name": "tiny", "settings": {"mode": "fs"}}
    Model(net, init(net, jax.random.key(seed)), grid, 0.5, "srcc", about).save(folder)
    return folder


def tissue(side=256, *, seed=0):
    """uint8 [side, side, 3]: coloured noise in the middle of white glass."""
    image = np.full((side, side, 3), 243, np.uint8)
    middle = image[side // 8 : -side // 8, side // 8 : -side // 8]
    middle[:] = np.random.default_rng(seed).integers((120, 40, 100), (220, 140, 200), middle.shape)
    return image


def square(x, y, side=60.0):
    """An annotation: a square with this corner, level-0 px."""
    corners = np.array([(x, y), (x + side, y), (x + side, y + side), (x, y + side)], float)
    return Shape(kind="polygon", exterior=corners, name="a", group="SRCC")


def one_line(outcome):
    """The only line of an error, without its prefix."""
    assert outcome.status == 2 and outcome.err.startswith("error: ") and outcome.err.count("\n") == 1, outcome
    return outcome.err.removeprefix("error: ")
