"""Frozen teachers from what a user has: an imported folder, a file of published weights, or nothing at all."""

from __future__ import annotations

import dataclasses
import pathlib
import textwrap
from typing import Any

import jax

from data_pipelines.weights import WeightsError, read_weights
from experiments.run.model import CARD, Network, save
from experiments.run.program import UsageError
from experiments.run.workdir import WorkdirError
from srcc_jax.methods.reverse_distillation import Teacher
from srcc_jax.models import pretrained, zoo
from srcc_jax.models.layers import variable_shapes
from srcc_jax.models.teachers import cut


def load_teacher(
    path: pathlib.Path, *, arch: str, source: str | None = None, dtype: str = "float32"
) -> tuple[Teacher, dict[str, Any]]:
    """The network up to its third map, and its variables. path: a folder of import_weights or of a training, whose card says what
    network it is of; or a file of weights of `arch`, published by `source` where its names do not tell. The file may end
    behind the third map. Raises UsageError, WeightsError or WorkdirError."""
    try:
        return _imported(path, dtype) if path.is_dir() else _published(path, arch, source, dtype)
    except (WeightsError, WorkdirError):
        raise
    except ValueError as error:  # PretrainedError among them, which can name hundreds of arrays
        problem = textwrap.shorten(str(error), 300, placeholder=" ...")
        raise UsageError(f"--teacher={path} cannot be used with --teacher_arch={arch}: {problem}") from error


def keep_teacher(path: pathlib.Path, folder: pathlib.Path, *, arch: str, source: str | None = None) -> Teacher:
    """The network up to its third map, as a folder from which another training starts (--pretrained). Written once."""
    if not (folder / CARD).exists():
        teacher, variables = load_teacher(path, arch=arch, source=source)
        save(Network(teacher, variables, {"name": f"{teacher.name}, up to its third map", "file": path.name}), folder)
    return cut(Network.load(folder).architecture)


def random_teacher(arch: str, *, seed: int, dtype: str = "float32") -> tuple[Teacher, dict[str, Any]]:
    """One that knows nothing, to see that shapes fit."""
    source = next(iter(zoo.family(arch).sources))
    teacher = cut(zoo.architecture(arch, source=source, classes=1, dtype=dtype))
    return teacher, zoo.init(teacher, jax.random.fold_in(jax.random.key(seed), 2))


def _imported(folder: pathlib.Path, dtype: str) -> tuple[Teacher, dict[str, Any]]:
    network = Network.load(folder)
    teacher = cut(dataclasses.replace(network.architecture, dtype=dtype))
    return teacher, pretrained.transfer(network.variables, variable_shapes(zoo.build(teacher)), teacher)


def _published(file: pathlib.Path, arch: str, source: str | None, dtype: str) -> tuple[Teacher, dict[str, Any]]:
    arrays = read_weights(file)
    published = pretrained.source_conventions(arrays, arch, source=source, classes=1, dtype=dtype)
    teacher = cut(published)
    return teacher, pretrained.load_trunk(arrays, published, variable_shapes(zoo.build(teacher)))
