"""Trains a slide classifier (Kanavati et al. 2021): fully supervised, weakly supervised, or one after the other.

    python -m experiments.slide_classification --cohort=cohort.csv --workdir=runs/ws --mode=ws --pretrained=efficientnet_b1.pth

The cohort table needs slide_id, path and label; patient_id, split, mpp and annotation are read where they are given. The run goes on
where it was when the same command is given again. What predict_slides needs is written to the work directory at the end.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import jax
from absl import flags

from data_pipelines.cohort import Cohort, assign_splits, check_two_classes, read_cohort
from data_pipelines.exports import write_table
from data_pipelines.shelf import Shelf
from data_pipelines.tiles import Grid
from data_pipelines.weights import read_weights
from experiments.run import settings as settings_module
from experiments.run.model import Model
from experiments.run.program import Stop, run, start_devices
from experiments.run.settings import config_from_flags, define_flags
from experiments.run.slides import SlideSet, prepare_slides
from experiments.run.training import Study, train_supervised, train_weakly
from experiments.run.workdir import Workdir, file_hash, versions
from srcc_jax.methods.slide_classification import Config
from srcc_jax.models import pretrained
from srcc_jax.models.efficientnet import SOURCES, Architecture, architecture, init
from srcc_jax.parallel import make_mesh, start_distributed

define_flags(Config)
flags.adopt_module_key_flags(settings_module)  # so that --help lists the method's numbers, not --helpfull alone
_COHORT = flags.DEFINE_string("cohort", None, "cohort table (CSV)", required=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "folder for checkpoints, log and the finished model", required=True)
_PRETRAINED = flags.DEFINE_string(
    "pretrained", None, "ImageNet weights (.pth, .safetensors, .npz, .h5); none: random start (w/o TL)"
)
_SOURCE = flags.DEFINE_enum(
    "pretrained_source", None, list(SOURCES), "who published --pretrained, where its names do not tell"
)
_START = flags.DEFINE_string(
    "start_from", None, "work directory of a finished model to go on from (FS+WS without a second FS)"
)
_MPP_OVERRIDE = flags.DEFINE_float(
    "mpp_override", None, "µm per pixel of level 0 for slides that do not say it themselves"
)
_DTYPE = flags.DEFINE_enum(
    "dtype", "auto", ["auto", "float32", "bfloat16"], "arithmetic; auto: bfloat16 on GPU and TPU"
)
_THREADS = flags.DEFINE_integer("threads", 2, "threads that read slides")
_COORDINATOR = flags.DEFINE_string("coordinator", None, "host:port of process 0, for training in several processes")
_PROCESSES = flags.DEFINE_integer("processes", 1, "number of processes")
_PROCESS = flags.DEFINE_integer("process", 0, "number of this process, from 0")

MODE_NAMES = {"fs": "FS", "ws": "WS", "fs_ws": "FS+WS"}


def read_split_cohort(config: Config) -> Cohort:
    """The cohort table with a split for every slide, checked for what training needs."""
    cohort = read_cohort(_COHORT.value)
    for note in cohort.notes:
        print(note)
    if not cohort.has_splits:
        cohort = assign_splits(cohort, seed=config.seed)
    for split in ("train", "validation"):
        check_two_classes(cohort.split(split), config.positive, where=f"{_COHORT.value}: the {split} split")
    return cohort


def starting_model(config: Config) -> tuple[Architecture, dict[str, Any]]:
    """The network and its variables before training, with pretrained weights where they are given."""
    dtype = _DTYPE.value
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    changes: dict[str, Any] = {"dropout": config.dropout, "drop_path": config.drop_path, "dtype": dtype}
    if config.bn_momentum is not None:
        changes["bn_momentum"] = config.bn_momentum
    if _START.value:
        start = Model.load(_START.value)
        return dataclasses.replace(start.architecture, **changes), dict(start.variables)
    key = jax.random.fold_in(jax.random.key(config.seed), 1)
    if not _PRETRAINED.value:
        net = architecture(config.backbone, source="keras", classes=1, **changes)
        return net, init(net, key)
    arrays = read_weights(_PRETRAINED.value)
    published = pretrained.source_conventions(arrays, config.backbone, source=_SOURCE.value, classes=1)
    net = dataclasses.replace(published, **changes)
    return net, pretrained.load(arrays, net, init(net, key), replace_head=True)


def model_name(config: Config) -> str:
    """As the paper's table names it, with the scale in µm per pixel."""
    mode = "FS+WS" if _START.value and config.mode == "ws" else MODE_NAMES[config.mode]
    annotations = "" if config.annotations or config.mode == "fs" else "-noanno"
    transfer = "" if _PRETRAINED.value or _START.value else " w/o TL"
    return f"{mode}{annotations}{transfer} {config.mpp:g} µm/px"


def settings(config: Config) -> dict[str, Any]:
    """Everything that decides the result: another value of any of it needs another work directory."""
    return {
        **dataclasses.asdict(config),
        "cohort": file_hash(pathlib.Path(_COHORT.value)),
        "pretrained": file_hash(pathlib.Path(_PRETRAINED.value)) if _PRETRAINED.value else None,
        "pretrained_source": _SOURCE.value,
        "start_from": file_hash(pathlib.Path(_START.value) / "weights.npz") if _START.value else None,
        "mpp_override": _MPP_OVERRIDE.value,
    }


def split_slides(cohort: Cohort, split: str, config: Config, workdir: Workdir) -> SlideSet:
    """The slides of a split with their tiles; those that cannot be used are written to failed_<split>.csv and printed."""
    found = prepare_slides(
        cohort.split(split).records,
        Grid(tile=config.tile, stride=config.stride, mpp=config.mpp, flush=config.flush),
        min_tissue=config.min_tissue,
        mpp_override=_MPP_OVERRIDE.value,
        annotated=split == "train" and (config.mode != "ws" or config.annotations),
        cache=workdir.path / "tiles",
        threads=_THREADS.value,
    )
    columns = {
        "slide_id": [record.slide_id for record, _ in found.failed],
        "reason": [reason for _, reason in found.failed],
    }
    write_table(workdir.path / f"failed_{split}.csv", columns)
    for record, reason in found.failed:
        print(f"left out of {split}: {record.slide_id}: {reason}")
    return found


def main() -> None:
    """Trains the stages of --mode one after the other and writes the finished model."""
    config = config_from_flags(Config)
    start_devices()
    if _PROCESSES.value > 1:
        start_distributed(_COORDINATOR.value, processes=_PROCESSES.value, process=_PROCESS.value)
    cohort = read_split_cohort(config)
    workdir = Workdir.open(_WORKDIR.value, settings(config))
    train, validation = (split_slides(cohort, split, config, workdir) for split in ("train", "validation"))
    net, variables = starting_model(config)
    shelf = Shelf([*train.records, *validation.records], mpp_override=_MPP_OVERRIDE.value)
    study = Study(config, net, make_mesh(), workdir, shelf, train, validation, threads=_THREADS.value, stop=Stop())
    result = None
    if config.mode in ("fs", "fs_ws"):
        result = train_supervised(study, variables)
        variables = result.variables
    if config.mode in ("ws", "fs_ws"):
        result = train_weakly(study, variables, fresh_head=config.mode == "ws" and not _START.value)
    assert result is not None
    name = model_name(config)
    about = {
        "name": name,
        "step": result.step,
        "validation_loss": result.loss,
        "settings": settings(config),
        "versions": versions(),
    }
    model = Model(net, result.variables, train.tiles.grid, config.min_tissue, config.positive, about)
    if jax.process_index() == 0:
        model.save(workdir.path)
    shelf.close()
    print(f"finished: {name}, step {result.step}, validation loss {result.loss:.4f}: {workdir.path}")


if __name__ == "__main__":
    run(main)
