"""Trains reverse distillation on a few tumour patches (He & Li 2023), and judges it on its test patches.

    python -m experiments.reverse_distillation --patches=patches.csv --workdir=runs/rd --teacher=wide_resnet50_2.pth
    python -m experiments.reverse_distillation --cohort=cohort.csv --workdir=runs/rd --teacher=ckpt

--patches is a folder <class>/<image> (with <split>/ above or not) or a list (CSV: path, label and, where known, slide_id, patient_id,
split). --cohort cuts them from slides: label `tumour` with an annotation, any other label without; or at the places of lists
<slide>,<x>,<y>. The run goes on where it was when the same command is given again. Leaves the model (weights.npz, model.json),
metrics.json, patches.csv and report.html in the work directory.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh

from data_pipelines.cohort import assign_splits, read_cohort
from data_pipelines.patch_names import join_patches
from data_pipelines.patches import Patches, read_patches, split_patches
from data_pipelines.spots import Spots, read_spots
from experiments.run import settings as settings_module
from experiments.run.distillation.model import DistillationModel
from experiments.run.distillation.report import PATCHES, RANDOM_TEACHER, judge, thresholds, write_results
from experiments.run.distillation.spot_patches import NORMAL, TUMOUR, SpotCutter
from experiments.run.distillation.teachers import load_teacher, random_teacher
from experiments.run.distillation.training import DistillationStudy
from experiments.run.mined_tiles import read_mined
from experiments.run.model import CARD
from experiments.run.program import Stop, UsageError, run, start_devices
from experiments.run.settings import config_from_flags, define_flags
from experiments.run.workdir import Workdir, file_hash, versions
from srcc_jax.methods.reverse_distillation import SLIDE_THRESHOLD, Config, Teacher
from srcc_jax.models import distillation, zoo
from srcc_jax.models.teachers import TEACHERS, student_architecture
from srcc_jax.parallel import make_mesh

define_flags(Config)
flags.adopt_module_key_flags(settings_module)  # so that --help lists the method's numbers, not --helpfull alone
_PATCHES = flags.DEFINE_string("patches", None, "folder or list of labelled patches")
_COHORT = flags.DEFINE_string("cohort", None, "cohort table (CSV) of slides to cut patches from")
_WORKDIR = flags.DEFINE_string("workdir", None, "folder for checkpoints, log, model and results", required=True)
_TEACHER = flags.DEFINE_string(
    "teacher", None, "the teacher's weights: a folder made by import_weights, or a file (.pth, .safetensors, .npz, .h5)"
)
_ARCH = flags.DEFINE_enum(
    "teacher_arch", "wide_resnet50_2", list(TEACHERS), "the network of a file (§3.1: WideResNet-50-2)"
)
_SOURCE = flags.DEFINE_enum(
    "teacher_source", None, list(zoo.SOURCES), "who published the file, where the names in it do not tell"
)
_RANDOM = flags.DEFINE_bool(
    "random_teacher", False, "a teacher with random weights, to see that shapes fit; no results"
)
_NORMAL_LIST = flags.DEFINE_string("normal_list", None, "of --cohort: places of normal patches, lines <slide>,<x>,<y>")
_TUMOUR_LIST = flags.DEFINE_string("tumour_list", None, "of --cohort: places of tumour patches, lines <slide>,<x>,<y>")
_MINED = flags.DEFINE_string(
    "mine_negatives",
    None,
    "a finished work directory of negative_mining: its mined tiles join the normal training patches",
)
_MPP_OVERRIDE = flags.DEFINE_float("mpp_override", None, "µm per pixel of slides that do not say it themselves")
_DTYPE = flags.DEFINE_enum(
    "dtype", "auto", ["auto", "float32", "bfloat16"], "arithmetic; auto: bfloat16 on GPU and TPU"
)
_THREADS = flags.DEFINE_integer("threads", 2, "threads that read patches or slides", lower_bound=1)


def start(config: Config) -> Mesh:
    """The devices. Raises UsageError where a batch does not fit them, or flags do not fit each other."""
    if bool(_PATCHES.value) == bool(_COHORT.value):
        raise UsageError("give one of --patches (labelled images) and --cohort (slides to cut them from)")
    if bool(_TEACHER.value) == _RANDOM.value:
        raise UsageError("give --teacher=<weights>, or --random_teacher to see that shapes fit")
    if (_NORMAL_LIST.value or _TUMOUR_LIST.value) and not _COHORT.value:
        raise UsageError("--normal_list and --tumour_list are places on the slides of a --cohort")
    # One device on CPU, whose operations use all cores: each of several would update all of the student's parameters.
    start_devices(batch=1)
    mesh = make_mesh()
    if config.batch % mesh.size:
        raise UsageError(
            f"--batch={config.batch} cannot be split over {mesh.size} devices: give a multiple of {mesh.size}"
        )
    return mesh


def read_teacher(config: Config) -> tuple[Teacher, dict[str, Any]]:
    """The teacher that the flags ask for, and its variables. Raises UsageError, WeightsError or WorkdirError."""
    dtype = _DTYPE.value
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if _TEACHER.value is None:
        return random_teacher(_ARCH.value, seed=config.seed, dtype=dtype)
    return load_teacher(pathlib.Path(_TEACHER.value), arch=_ARCH.value, source=_SOURCE.value, dtype=dtype)


def settings(config: Config, teacher: Teacher, patches: Patches | None) -> dict[str, Any]:
    """Everything that decides the result: another value of any of it needs another work directory."""
    path = pathlib.Path(_TEACHER.value) if _TEACHER.value else None
    files = {"cohort": _COHORT.value, "normal_list": _NORMAL_LIST.value, "tumour_list": _TUMOUR_LIST.value}
    return {
        **dataclasses.asdict(config),
        "teacher": file_hash(path / CARD if path.is_dir() else path) if path else "random",
        "teacher_arch": teacher.name,
        "teacher_source": teacher.source,
        "patches": patches.digest() if patches else None,
        **{name: file_hash(pathlib.Path(file)) if file else None for name, file in files.items()},
        "mpp_override": _MPP_OVERRIDE.value,
        "dtype": teacher.dtype,
        "mine_negatives": read_mined(_MINED.value).digest if _MINED.value else None,
    }


def cut_cohort(table: str, config: Config, workdir: Workdir) -> Patches:
    """The patches of the slides of a cohort table, cut into the work directory."""
    cohort = assign_splits(read_cohort(table), seed=config.split_seed)
    for note in cohort.notes:
        print(note)
    files = {NORMAL: _NORMAL_LIST.value, TUMOUR: _TUMOUR_LIST.value}
    lists: dict[str, Spots] = {kind: read_spots(file) for kind, file in files.items() if file}
    cutter = SpotCutter(config, workdir.path / PATCHES, lists, _MPP_OVERRIDE.value)
    patches = cutter.cut(cohort, threads=_THREADS.value)
    label = np.where(patches.label == TUMOUR, config.positives[0], NORMAL)
    return dataclasses.replace(patches, label=label)


def main() -> None:
    """Trains, writes the model, and judges it once on the test patches."""
    config = config_from_flags(Config)
    mesh = start(config)
    listed = split_patches(read_patches(_PATCHES.value), seed=config.split_seed) if _PATCHES.value else None
    teacher, taught = read_teacher(config)
    decisive = settings(config, teacher, listed)
    workdir = Workdir.open(_WORKDIR.value, decisive)
    if (workdir.path / "metrics.json").exists():
        print(f"finished before: {workdir.path / 'metrics.json'}; the test patches are judged once")
        return
    if _RANDOM.value:
        print(RANDOM_TEACHER)
    patches = cut_cohort(str(_COHORT.value), config, workdir) if listed is None else listed
    if _MINED.value:
        judged_rows = np.concatenate([patches.rows("validation"), patches.rows("test")])
        tiles = read_mined(_MINED.value).patches(label=NORMAL, apart=patches.take(judged_rows))
        patches = join_patches([patches, tiles])
    student = student_architecture(teacher, shortcut=config.shortcut)
    try:
        study = DistillationStudy(config, teacher, student, mesh, workdir, patches, _THREADS.value, Stop())
    except ValueError as error:
        raise UsageError(str(error)) from error
    fresh = distillation.init(student, jax.random.fold_in(jax.random.key(config.seed), 1))
    trained = study.train({**fresh, "teacher": taught})
    about = {"step": trained.step, "validation": trained.metrics, "settings": decisive, "versions": versions()}
    model = DistillationModel(
        teacher=teacher,
        student=student,
        variables=trained.variables,
        tile=config.tile,
        mpp=config.mpp,
        positive=config.positives[0],
        thresholds=thresholds(trained),
        slide_threshold=SLIDE_THRESHOLD,
        about=about,
    )
    model.save(workdir.path)
    judged = judge(study, trained)
    write_results(study, trained, judged, settings=decisive, random=_RANDOM.value)
    auc = judged.merit["ROC AUC"]["patch"]
    print(f"finished: step {trained.step}, test AUC {auc.value:.4f} [{auc.low:.4f}, {auc.high:.4f}]: {workdir.path}")


if __name__ == "__main__":
    run(main)
