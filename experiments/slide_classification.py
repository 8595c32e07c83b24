"""Trains a slide classifier (Kanavati et al. 2021): fully supervised, weakly supervised, or one after the other.

    python -m experiments.slide_classification --cohort=cohort.csv --workdir=runs/ws --mode=ws --pretrained=efficientnet_b1.pth

The cohort table needs slide_id, path and label; patient_id, split, mpp and annotation are read where they are given. The run goes on
where it was when the same command is given again. What predict_slides needs is written to the work directory at the end.
"""

from __future__ import annotations

import csv
import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
from absl import flags
from jax.sharding import Mesh

from data_pipelines.cohort import Cohort, CohortError, assign_splits, check_two_classes, read_cohort, write_cohort
from data_pipelines.cohort_rows import listed
from data_pipelines.exports import write_table
from data_pipelines.shelf import Shelf
from data_pipelines.tiles import Grid
from experiments.run import settings as settings_module
from experiments.run.mined_tiles import read_mined, rows_on_slides
from experiments.run.model import Model
from experiments.run.program import Stop, UsageError, run, start_devices
from experiments.run.settings import config_from_flags, define_flags
from experiments.run.slides import SlideSet, prepare_slides
from experiments.run.starting import arithmetic, pretrained_hash, pretrained_network
from experiments.run.training import Study, train_supervised, train_weakly
from experiments.run.workdir import Workdir, WorkdirError, file_hash, versions
from srcc_jax.methods.slide_classification import Config
from srcc_jax.models import efficientnet
from srcc_jax.models.architecture import Architecture
from srcc_jax.models.zoo import SOURCES, architecture, family, init
from srcc_jax.parallel import make_mesh, start_distributed

define_flags(Config)
flags.adopt_module_key_flags(settings_module)  # so that --help lists the method's numbers, not --helpfull alone
_COHORT = flags.DEFINE_string("cohort", None, "cohort table (CSV)", required=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "folder for checkpoints, log and the finished model", required=True)
_PRETRAINED = flags.DEFINE_string(
    "pretrained",
    None,
    "ImageNet weights: a folder made by import_weights, or a file (.pth, .safetensors, .npz, .h5); none: random start (w/o TL)",
)
_SOURCE = flags.DEFINE_enum(
    "pretrained_source", None, list(SOURCES), "who published --pretrained, where its names do not tell"
)
_START = flags.DEFINE_string(
    "start_from", None, "work directory of a finished model to go on from (FS+WS without a second FS)"
)
_MINED = flags.DEFINE_string(
    "mine_negatives",
    None,
    "WS: a finished work directory of negative_mining; of the tiles of its slides those that were mined join the buffer",
)
_MPP_OVERRIDE = flags.DEFINE_float(
    "mpp_override", None, "µm per pixel of level 0 for slides that do not say it themselves"
)
_DTYPE = flags.DEFINE_enum(
    "dtype", "auto", ["auto", "float32", "bfloat16"], "arithmetic; auto: bfloat16 on GPU and TPU"
)
_THREADS = flags.DEFINE_integer("threads", 2, "threads that read slides", lower_bound=1)
_COORDINATOR = flags.DEFINE_string("coordinator", None, "host:port of process 0, for training in several processes")
_PROCESSES = flags.DEFINE_integer("processes", 1, "number of processes", lower_bound=1)
_PROCESS = flags.DEFINE_integer("process", 0, "number of this process, from 0", lower_bound=0)

MODE_NAMES = {"fs": "FS", "ws": "WS", "fs_ws": "FS+WS"}


def start(config: Config) -> Mesh:
    """Joins the other processes, and gives the devices of all of them. Raises UsageError where a batch does not fit them."""
    if _MINED.value and config.mode == "fs":
        raise UsageError("--mine_negatives is of the buffer of WS: give --mode=ws or --mode=fs_ws")
    if config.batch % _PROCESSES.value:
        raise UsageError(f"--batch={config.batch} must be a multiple of --processes={_PROCESSES.value}")
    if _PROCESSES.value > 1 and not (_COORDINATOR.value and _PROCESS.value < _PROCESSES.value):
        raise UsageError(
            f"--processes={_PROCESSES.value} needs --coordinator=<host:port of process 0> and a --process below it"
        )
    start_devices(batch=config.batch // _PROCESSES.value)
    if _PROCESSES.value > 1:
        start_distributed(_COORDINATOR.value, processes=_PROCESSES.value, process=_PROCESS.value)
    mesh = make_mesh()
    if config.batch % mesh.size:
        fits = -(-config.batch // mesh.size) * mesh.size
        raise UsageError(
            f"--batch={config.batch} cannot be split evenly over {mesh.size} devices: give --batch={fits}, or another "
            f"multiple of {mesh.size} (and --buffer a multiple of that)"
        )
    return mesh


def read_split_cohort(config: Config) -> Cohort:
    """The cohort table with a split for every slide, checked for what training needs."""
    cohort = assign_splits(read_cohort(_COHORT.value), seed=config.seed)
    for note in cohort.notes:
        print(note)
    for split in ("train", "validation"):
        check_two_classes(cohort.split(split), config.positive, where=f"{_COHORT.value}: the {split} split")
    bare = [r.slide_id for r in cohort.split("train") if r.label == config.positive and not r.annotation]
    if bare and config.reads_annotations:
        raise CohortError(
            f"{_COHORT.value}: {len(bare)} positive slides of the train split have no annotation: {listed(bare)}. Fill the "
            "column `annotation`, or train without: --mode=ws --noannotations"
        )
    return cohort


def starting_model(config: Config) -> tuple[Architecture, dict[str, Any]]:
    """The network and its variables before training, with pretrained weights where they are given."""
    changes = architecture_changes(config)
    if _START.value:
        begun = Model.load(_START.value)
        if begun.architecture.name != config.backbone or _PRETRAINED.value:
            raise UsageError(
                f"--start_from={_START.value} is a model of --backbone={begun.architecture.name} with weights of its own: "
                "give that backbone, and no --pretrained"
            )
        return dataclasses.replace(begun.architecture, **changes), dict(begun.variables)
    key = jax.random.fold_in(jax.random.key(config.seed), 1)
    if not _PRETRAINED.value:
        # Keras's conventions are the paper's; it has no other network than an EfficientNet.
        source = "keras" if config.backbone in efficientnet.VARIANTS else next(iter(family(config.backbone).sources))
        net = architecture(config.backbone, source=source, classes=1, **changes)
        return net, init(net, key)
    return pretrained_network(
        _PRETRAINED.value, backbone=config.backbone, source=_SOURCE.value, classes=1, key=key, changes=changes
    )


def architecture_changes(config: Config) -> dict[str, Any]:
    """What the settings change of the network. Raises UsageError for one that a network of this kind does not have."""
    fields = {field.name for field in dataclasses.fields(family(config.backbone).kind)}
    changes: dict[str, Any] = {"dtype": arithmetic(_DTYPE.value)}
    for name in ("dropout", "drop_path", "bn_momentum"):
        value = getattr(config, name)
        if value is not None and name not in fields:
            raise UsageError(
                f"--{name}={value} has no meaning for --backbone={config.backbone}, which has none: leave it out"
            )
        if value is not None:
            changes[name] = value
    return changes


def model_name(config: Config) -> str:
    """As the paper's table names it, with the scale in µm per pixel."""
    mode = "FS+WS" if _START.value and config.mode == "ws" else MODE_NAMES[config.mode]
    annotations = "" if config.annotations or config.mode == "fs" else "-noanno"
    transfer = "" if _PRETRAINED.value or _START.value else " w/o TL"
    return f"{mode}{annotations}{transfer} {config.mpp:g} µm/px"


def settings(config: Config, net: Architecture) -> dict[str, Any]:
    """Everything that decides the result: another value of any of it needs another work directory."""
    return {
        **dataclasses.asdict(config),
        "cohort": file_hash(pathlib.Path(_COHORT.value)),
        "pretrained": pretrained_hash(_PRETRAINED.value),
        "pretrained_source": _SOURCE.value,
        "start_from": file_hash(pathlib.Path(_START.value) / "weights.npz") if _START.value else None,
        "mpp_override": _MPP_OVERRIDE.value,
        "dtype": net.dtype,
        "mine_negatives": read_mined(_MINED.value).digest if _MINED.value else None,
    }


def split_slides(cohort: Cohort, split: str, config: Config, workdir: Workdir) -> SlideSet:
    """The slides of a split with their tiles; those that cannot be used are written to failed_<split>.csv and printed.

    Raises CohortError where what is left has one class, WorkdirError where a run that goes on would have other slides.
    """
    records = cohort.split(split).records
    training, positives = split == "train", [record for record in records if record.label == config.positive]
    if training:
        annotated = {record.slide_id for record in positives if config.reads_annotations}
    else:
        annotated = {record.slide_id for record in positives if record.annotation and config.selection != "slide"}
    found = prepare_slides(
        records,
        Grid(tile=config.tile, stride=config.stride, mpp=config.mpp, flush=config.flush),
        min_tissue=config.min_tissue,
        mpp_override=_MPP_OVERRIDE.value,
        cache=workdir.path / "tiles",
        annotated=annotated,
        min_annotated=config.min_annotated if training else None,
        threads=_THREADS.value,
    )
    for record, reason in found.failed:
        print(f"left out of {split}: {record.slide_id}: {reason}")
    check_two_classes(Cohort(found.records), config.positive, where=f"what can be used of the {split} split")
    _note_failed(workdir, split, {record.slide_id: reason for record, reason in found.failed})
    return found


def _note_failed(workdir: Workdir, split: str, failed: Mapping[str, str]) -> None:
    """Writes the table; once training has begun, rows of tiles count on the same slides being there."""
    table = workdir.path / f"failed_{split}.csv"
    if workdir.begun:
        with open(table, newline="", encoding="utf-8") as file:
            before = {row["slide_id"] for row in csv.DictReader(file)}
        changed = sorted(before ^ set(failed))
        if changed:
            raise WorkdirError(
                f"{workdir.path}: the run began with other slides: {listed(changed)} could not be used in one of {split}'s "
                "starts and could in the other. Make them as they were, or give another --workdir"
            )
    write_table(table, {"slide_id": list(failed), "reason": list(failed.values())})


def main() -> None:
    """Trains the stages of --mode one after the other and writes the finished model."""
    config = config_from_flags(Config)
    mesh = start(config)
    cohort = read_split_cohort(config)
    net, variables = starting_model(config)
    decisive = settings(config, net)
    workdir = Workdir.open(_WORKDIR.value, decisive)
    write_cohort(workdir.path / "cohort.csv", cohort)
    train, validation = (split_slides(cohort, split, config, workdir) for split in ("train", "validation"))
    shelf = Shelf([*train.records, *validation.records], mpp_override=_MPP_OVERRIDE.value)
    study = Study(config, net, mesh, workdir, shelf, train, validation, threads=_THREADS.value, stop=Stop())
    if _MINED.value:
        study.mined = rows_on_slides(read_mined(_MINED.value), train, study.labels == 0)
    if config.mode != "ws":
        result = train_supervised(study, variables)
        variables = result.variables
    if config.mode != "fs":
        result = train_weakly(study, variables, fresh_head=config.mode == "ws" and not _START.value)
    name = model_name(config)
    about = {
        "name": name,
        "step": result.step,
        "validation_loss": result.loss,
        "settings": decisive,
        "versions": versions(),
    }
    model = Model(net, result.variables, train.tiles.grid, config.min_tissue, config.positive, about)
    if jax.process_index() == 0:
        model.save(workdir.path)
    shelf.close()
    print(f"finished: {name}, step {result.step}, validation loss {result.loss:.4f}: {workdir.path}")


if __name__ == "__main__":
    run(main)
