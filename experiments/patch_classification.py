"""Trains a supervised patch classifier, alone or over 3 × 3 grids with a neural CRF (Li & Ping 2018), and judges it on its test patches.

    python -m experiments.patch_classification --patches=patches.csv --workdir=runs/patches --pretrained=resnet18.pth
    python -m experiments.patch_classification --cohort=cohort.csv --workdir=runs/ncrf --side=3 --pretrained=resnet18.pth

--patches is a folder <class>/<image> or a list (CSV: path, label and, where known, slide_id, patient_id, split); for --side=3 a list of
images of 3 × 3 patches with the column cells (000010000: which of them are tumour, row by row). --cohort cuts patches or grids from
slides, with their labels from the annotations. The run goes on where it was when the same command is given again. Leaves the model
(weights.npz, model.json), which predict_slides takes, metrics.json, patches.csv and report.html in the work directory.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np
from absl import flags

from data_pipelines.cohort import assign_splits, read_cohort
from data_pipelines.exports import write_json, write_table, write_text
from data_pipelines.patch_grids import read_grids
from data_pipelines.patches import Patches, read_patches, split_patches
from experiments.run import settings as settings_module
from experiments.run.distillation.report import PATCHES, lost, measure
from experiments.run.distillation.spot_patches import failed_slides
from experiments.run.grids.cutting import cut_grids
from experiments.run.grids.model import GridModel
from experiments.run.grids.training import AUC, METRIC, STAGE, GridStudy
from experiments.run.program import Stop, UsageError, run, start_devices
from experiments.run.settings import config_from_flags, define_flags
from experiments.run.starting import arithmetic, pretrained_hash, pretrained_network, random_network
from experiments.run.workdir import Workdir, file_hash, versions
from srcc_jax.methods import reverse_distillation
from srcc_jax.methods.patch_grids import Config, grid_variables
from srcc_jax.metrics import roc_curve
from srcc_jax.models.architecture import Architecture
from srcc_jax.models.zoo import CLASSIFIERS, SOURCES
from srcc_jax.parallel import make_mesh
from srcc_jax.report import Report, render
from srcc_jax.train import BestCheckpoint

define_flags(Config)
flags.adopt_module_key_flags(settings_module)  # so that --help lists the method's numbers, not --helpfull alone
_PATCHES = flags.DEFINE_string("patches", None, "folder or list of labelled patches, or list of grids")
_COHORT = flags.DEFINE_string("cohort", None, "cohort table (CSV) of slides to cut patches from")
_WORKDIR = flags.DEFINE_string("workdir", None, "folder for checkpoints, log, model and results", required=True)
_BACKBONE = flags.DEFINE_enum("backbone", "resnet18", list(CLASSIFIERS), "network that sees each patch")
_PRETRAINED = flags.DEFINE_string("pretrained", None, "its weights: a folder of import_weights or a file; none: random")
_SOURCE = flags.DEFINE_enum(
    "pretrained_source", None, list(SOURCES), "who published the file, where its names do not tell"
)
_MPP_OVERRIDE = flags.DEFINE_float("mpp_override", None, "µm per pixel of slides that do not say it themselves")
_DTYPE = flags.DEFINE_enum(
    "dtype", "auto", ["auto", "float32", "bfloat16"], "arithmetic; auto: bfloat16 on GPU and TPU"
)
_THREADS = flags.DEFINE_integer("threads", 2, "threads that read patches or slides", lower_bound=1)


def listed_patches(config: Config) -> tuple[Patches, np.ndarray] | None:
    """The patches of --patches with splits, and bool [N, side²], which of each grid are tumour; None for a cohort."""
    if bool(_PATCHES.value) == bool(_COHORT.value):
        raise UsageError("give one of --patches (labelled images) and --cohort (slides to cut them from)")
    if _PATCHES.value is None:
        return None
    if config.side > 1:
        patches, cells = read_grids(_PATCHES.value, side=config.side)
    else:
        patches = read_patches(_PATCHES.value)
        cells = patches.is_one_of(config.positives)[:, None]
    return split_patches(patches, seed=config.split_seed), cells


def cut_cohort(config: Config, workdir: Workdir) -> tuple[Patches, np.ndarray]:
    """The same from slides, cut into the work directory."""
    cohort = assign_splits(read_cohort(str(_COHORT.value)), seed=config.split_seed)
    for note in cohort.notes:
        print(note)
    folder = workdir.path / PATCHES
    return cut_grids(cohort, config, folder, mpp_override=_MPP_OVERRIDE.value, threads=_THREADS.value)


def used_rows(config: Config, patches: Patches, tumour: np.ndarray) -> dict[str, np.ndarray]:
    """Split -> rows; of the training split as many of each kind as the settings ask for. UsageError where there are too few."""
    rows = {split: patches.rows(split) for split in ("train", "validation", "test")}
    draw = reverse_distillation.Config(
        seed=config.seed, normal_patches=config.normal_patches, tumour_patches=config.tumour_patches
    )
    try:
        rows["train"] = rows["train"][reverse_distillation.training_rows(tumour[rows["train"]], draw)]
    except ValueError as error:
        raise UsageError(str(error)) from error
    return rows


def start_network(config: Config) -> tuple[Architecture, dict[str, Any]]:
    """The backbone with a fresh head of one class, and the variables of the network over grids."""
    key = jax.random.fold_in(jax.random.key(config.seed), 1)
    given: dict[str, Any] = {"classes": 1, "key": key, "changes": {"dtype": arithmetic(_DTYPE.value)}}
    if _PRETRAINED.value:
        net, variables = pretrained_network(_PRETRAINED.value, backbone=_BACKBONE.value, source=_SOURCE.value, **given)
    else:
        net, variables = random_network(backbone=_BACKBONE.value, **given)
    return net, grid_variables(variables, side=config.side, crf=config.with_crf)


def settings(config: Config, net: Architecture, patches: Patches | None) -> dict[str, Any]:
    """Everything that decides the result: another value of any of it needs another work directory."""
    return {
        **dataclasses.asdict(config),
        "architecture": net.as_dict(),
        "pretrained": pretrained_hash(_PRETRAINED.value),
        "patches": patches.digest() if patches else None,
        "cohort": file_hash(pathlib.Path(_COHORT.value)) if _COHORT.value else None,
        "mpp_override": _MPP_OVERRIDE.value,
    }


def write_results(
    study: GridStudy, trained: BestCheckpoint, thresholds: dict[str, float], decisive: dict[str, Any]
) -> None:
    """patches.csv, report.html and, last, metrics.json: where it is, the test patches have been looked at."""
    folder, patches = study.workdir.path, study.patches
    row, label, score = study.scored(trained.variables, "test")
    merit = measure(label, score, patches.unit[row], thresholds, seed=study.config.seed)
    columns = {
        "path": [str(patches.path[n]) for n in row],
        "slide_id": patches.slide_id[row],
        "label": patches.label[row],
        "score": score,
    }
    write_table(folder / "patches.csv", columns)
    history = study.workdir.history(STAGE)
    curves = {
        name: (np.array([line["step"] for line in found]), np.array([line[name] for line in found]))
        for name in ("loss", METRIC, AUC)
        if (found := [line for line in history if name in line])
    }
    report = Report(
        title="Patch classification",
        subtitle=f"{study.architecture.name}, {study.config.side} × {study.config.side} patches"
        + (", CRF" if study.config.with_crf else ""),
        summary=merit,
        notes=[_selected_by(study.config, trained)],
        warnings=lost(folder, study.feed),
        roc={study.architecture.name: roc_curve(label, score)},
        training=curves,
        configuration=decisive,
        versions=versions(),
    )
    write_text(folder / "report.html", render(report))
    about = {"thresholds": thresholds, "validation": dict(trained.metrics), "step": trained.step}
    lacking = {"failed_slides": failed_slides(folder / PATCHES)}
    write_json(folder / "metrics.json", {**merit, **about, **lacking, "settings": decisive, "versions": versions()})
    auc = merit["ROC AUC"]["patch"]
    print(f"finished: step {trained.step}, test AUC {auc.value:.4f} [{auc.low:.4f}, {auc.high:.4f}]: {folder}")


def _selected_by(config: Config, trained: BestCheckpoint) -> str:
    name, metric = ("ROC AUC", AUC) if config.selection == "auc" else ("accuracy at 0.5", METRIC)
    return f"Selected by the {name} of the validation patches: step {trained.step}, {trained.metrics[metric]:.4f}."


def main() -> None:
    """Trains, writes the model, and judges it once on the test patches."""
    config = config_from_flags(Config)
    start_devices(batch=config.batch)
    mesh = make_mesh()
    if config.batch % mesh.size:
        raise UsageError(
            f"--batch={config.batch} cannot be split over {mesh.size} devices: give a multiple of {mesh.size}"
        )
    listed = listed_patches(config)
    net, variables = start_network(config)
    decisive = settings(config, net, listed[0] if listed else None)
    workdir = Workdir.open(_WORKDIR.value, decisive)
    if (workdir.path / "metrics.json").exists():
        print(f"finished before: {workdir.path / 'metrics.json'}; the test patches are judged once")
        return
    patches, cells = listed or cut_cohort(config, workdir)
    rows = used_rows(config, patches, cells[:, config.side**2 // 2])
    study = GridStudy(config, net, mesh, workdir, patches, cells, rows, _THREADS.value, Stop())
    trained = study.train(variables)
    thresholds = {"fixed": 0.5, "validation": trained.metrics["threshold"]}
    about = {"step": trained.step, "validation": trained.metrics, "settings": decisive, "versions": versions()}
    model = GridModel(
        net,
        trained.variables,
        side=config.side,
        crf=config.with_crf,
        crop=config.crop,
        tile=config.tile,
        mpp=config.mpp,
        positive=config.positives[0],
        thresholds=thresholds,
        about=about,
    )
    model.save(workdir.path)
    write_results(study, trained, thresholds, decisive)


if __name__ == "__main__":
    run(main)
