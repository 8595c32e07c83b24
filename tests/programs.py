"""Programs of experiments/ started inside the test's process, one module at a time, and small things to start them on."""

import contextlib
import importlib
import io
import signal
import sys
from dataclasses import dataclass

import jax
import numpy as np
from absl import flags
from absl.testing import flagsaver
from jax.experimental.compilation_cache import compilation_cache

from data_pipelines.polygons import Shape
from data_pipelines.tiles import Grid
from experiments.run import program
from experiments.run.distillation.model import DistillationModel
from experiments.run.model import Model
from experiments.run.screening.model import PICTURE, GateSpec, ScreeningModel, ScreeningSpec, fresh_screening
from srcc_jax.methods.gastric_screening import Config, patch_architecture
from srcc_jax.models import distillation, resnet
from srcc_jax.models.blur import BlurNet
from srcc_jax.models.features import widths
from srcc_jax.models.foreground import ForegroundNet
from srcc_jax.models.layers import init_variables
from srcc_jax.models.teachers import cut, student_architecture
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


@contextlib.contextmanager
def several_runs(folder):
    """What programs compile meanwhile, hardly optimised, is kept in the folder, so that a second run compiles nothing; afterwards
    signals do what they did before."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    names = (
        "jax_disable_most_optimizations",
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
    )
    before = {name: jax.config.values[name] for name in names}
    for name, value in zip(names, (True, str(folder), 0.0)):
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # it looks for its folder once
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        for number, handler in handlers.items():
            signal.signal(number, handler)


def save_model(folder, *, grid, seed=0):
    """A finished model that was never trained: the smallest network with fresh weights."""
    net = architecture("tiny", source="keras", classes=1)
    folder.mkdir(parents=True, exist_ok=True)
    about = {"name": "tiny", "settings": {"mode": "fs"}}
    Model(net, init(net, jax.random.key(seed)), grid, 0.5, "srcc", about).save(folder)
    return folder


def save_distillation(folder, *, tile=32, mpp=1.0, seed=0, threshold=1.2):
    """A finished model of reverse distillation that was never trained: four channels wide, with fresh weights.

    threshold: the one said to be the best on the validation patches, and the lowest that counts in a slide's score.
    """
    teacher = cut(resnet.architecture("resnet18", source="torchvision", classes=0, width=4, depths=(1, 1, 1, 1)))
    student = student_architecture(teacher, shortcut="3x3", depths=(1, 1, 1), embedding_blocks=1)
    keys = jax.random.split(jax.random.key(seed))
    variables = {**distillation.init(student, keys[0]), "teacher": init(teacher, keys[1])}
    folder.mkdir(parents=True, exist_ok=True)
    DistillationModel(
        teacher=teacher,
        student=student,
        variables=variables,
        tile=tile,
        mpp=mpp,
        positive="tumour",
        thresholds={"fixed": 2.0, "validation": threshold},
        slide_threshold=threshold,
        about={"settings": {"teacher": "random"}},
    ).save(folder)
    return folder


def save_screening(folder, *, model="tiny", tile=64, stride=None, top_k=8, seed=0, without=()):
    """A finished model of gastric screening that was never trained, at 1 µm per pixel: fresh networks of a few channels, but for two.

    The foreground network takes everything for tissue; what is brighter than gray 180 on the whole is out of focus to the blur gate.
    without: those of "foreground" and "blur" that it does not have.
    """
    config = Config(model=model, tile=tile, stride=stride or tile, mpp=1.0, top_k=top_k, blur_side=32, thumbnail=64)
    net, keys = patch_architecture(config), jax.random.split(jax.random.key(seed), 4)
    features = widths(net, side=tile)["mean"]
    variables = {
        "patches": init(net, keys[0]),
        "screening": fresh_screening(config.width, (1, top_k, features), keys[1]),
        "foreground": init_variables(ForegroundNet(), keys[2], PICTURE),
        "blur": jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), init_variables(BlurNet(), keys[3], PICTURE)),
    }
    variables["foreground"]["params"]["classifier"]["bias"] = np.full(1, 1e3, np.float32)
    gray = np.full(PICTURE, 180 / 127.5 - 1, np.float32)
    limit = BlurNet().apply(variables["blur"], gray, train=False)["logits"]
    variables["blur"]["params"]["classifier"]["bias"] = 1 - np.asarray(limit)[0]
    spec = ScreeningSpec(top_k, features, config.width, config.threshold, 0.5)
    gates = GateSpec(config.thumbnail, config.thumbnail_mpp, config.blur_side, config.blur_radius)
    kept = {name: leaves for name, leaves in variables.items() if name not in without}
    grid = Grid(tile=tile, stride=config.stride, mpp=1.0)
    folder.mkdir(parents=True, exist_ok=True)
    about = {"name": "gastric screening, tiny", "settings": {"model": model}}
    ScreeningModel(net, kept, grid, config.min_tissue, "malignant", spec, gates, about).save(folder)
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
