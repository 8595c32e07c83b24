"""Trains the three networks of gastric screening and the blur gate (Yu et al. 2019), stage by stage, and judges them.

    python -m experiments.gastric_screening --cohort=cohort.csv --workdir=runs/gastric --stage=all
    python -m experiments.gastric_screening --patches=patches.csv --workdir=runs/patches --model=dla

The cohort table is as for every program; annotations may be outlines of any format or mask images, and columns subtype, site and
year, where it has them, are reviewed. --stage is one of refine, pairs, foreground, multitask, features, screening, blur, or all: what
an earlier stage left is used, and what a killed one left is continued. The stage pairs writes what the foreground network learns
from, pairs/thumbnails and pairs/tissue of the work directory, and nothing else: delete the masks that are wrong before --stage=all.
refine and pairs need neither labels nor splits. --patches is a list (CSV) with the columns path, label and
mask (of pixels; may be empty), for the multi-task network alone. Where the table has no splits, patients are drawn anew for each of
--repeats, each in a folder of its own.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
from typing import Any

from absl import flags
from jax.sharding import Mesh

from data_pipelines.cohort import Cohort, assign_splits, check_two_classes, read_cohort
from data_pipelines.patches import read_patches, split_patches
from experiments.run import settings as settings_module
from experiments.run.program import Stop, UsageError, run, start_devices
from experiments.run.screening.chain import SHARED, STAGES, SlideRun
from experiments.run.screening.patch_chain import PatchRun
from experiments.run.screening.starting import starting_network
from experiments.run.screening.tables import write_tables
from experiments.run.settings import config_from_flags, define_flags
from experiments.run.starting import arithmetic, pretrained_hash
from experiments.run.workdir import Workdir, file_hash
from srcc_jax.methods.gastric_screening import Config
from srcc_jax.models import zoo
from srcc_jax.parallel import make_mesh

define_flags(Config)
flags.adopt_module_key_flags(settings_module)  # so that --help lists the method's numbers, not --helpfull alone
_COHORT = flags.DEFINE_string("cohort", None, "cohort table (CSV)")
_PATCHES = flags.DEFINE_string("patches", None, "list of patches with masks (CSV), for the multi-task network alone")
_WORKDIR = flags.DEFINE_string("workdir", None, "folder for masks, checkpoints, models and results", required=True)
_STAGE = flags.DEFINE_enum("stage", "all", ["all", *STAGES], "what to do; all: one after the other, then judge")
_PRETRAINED = flags.DEFINE_string(
    "pretrained",
    None,
    "ImageNet weights of the encoder: a folder made by import_weights, or a file; none: random start",
)
_SOURCE = flags.DEFINE_enum(
    "pretrained_source", None, list(zoo.SOURCES), "who published --pretrained, where its names do not tell"
)
_MPP_OVERRIDE = flags.DEFINE_float("mpp_override", None, "µm per pixel of slides that do not say it themselves")
_DTYPE = flags.DEFINE_enum(
    "dtype", "auto", ["auto", "float32", "bfloat16"], "arithmetic of the patches' network; auto: bfloat16 on GPU, TPU"
)
_THREADS = flags.DEFINE_integer("threads", 2, "threads that read slides", lower_bound=1)


def start(config: Config) -> Mesh:
    """The devices. Raises UsageError where a batch does not fit them, or flags do not fit each other."""
    if bool(_COHORT.value) == bool(_PATCHES.value):
        raise UsageError("give one of --cohort (slides) and --patches (labelled images with masks)")
    if _PATCHES.value and _STAGE.value not in ("all", "multitask"):
        raise UsageError(f"--stage={_STAGE.value} needs slides: --patches serves the multi-task network alone")
    sizes = [config.foreground_batch, config.multitask_batch, config.screening_batch, config.blur_batch]
    start_devices(batch=math.gcd(*sizes))
    mesh = make_mesh()
    if math.gcd(*sizes) % mesh.size:
        raise UsageError(f"every batch must be a multiple of {mesh.size}, the number of devices; they are {sizes}")
    return mesh


def settings(config: Config, table: pathlib.Path) -> dict[str, Any]:
    """Everything that decides the result: another value of any of it needs another work directory."""
    return {
        **dataclasses.asdict(config),
        "table": file_hash(table),
        "pretrained": pretrained_hash(_PRETRAINED.value),
        "pretrained_source": _SOURCE.value,
        "mpp_override": _MPP_OVERRIDE.value,
        "dtype": arithmetic(_DTYPE.value),
    }


def repeats(cohort: Cohort, config: Config) -> list[Cohort]:
    """The cohort with splits: as the table gives them, or one sub-sampling of patients for each repeat (§5.2)."""
    if cohort.has_splits:
        return [cohort]
    shares = {"test": config.test_share, "validation": config.validation_share}
    return [assign_splits(cohort, seed=config.split_seed + number, **shares) for number in range(config.repeats)]


def run_slides(config: Config, mesh: Mesh) -> pathlib.Path:
    """All repeats over a cohort of slides, or what they share, once. Returns the work directory."""
    table, training = pathlib.Path(str(_COHORT.value)), _STAGE.value not in SHARED
    cohort = read_cohort(table, require_labels=training)
    if training:
        check_two_classes(cohort, config.positive, where=str(table))
    divided = repeats(cohort, config) if training else [cohort]
    network = starting_network(config, _PRETRAINED.value, _SOURCE.value, dtype=arithmetic(_DTYPE.value))
    decisive = settings(config, table)
    workdir, stop, finished = Workdir.open(str(_WORKDIR.value), decisive), Stop(), []
    for number, split in enumerate(divided):
        for note in split.notes:
            print(note)
        folder = workdir.path if len(divided) == 1 else workdir.path / f"repeat_{number}"
        slide_run = SlideRun(
            config,
            network,
            mesh,
            Workdir.open(folder, decisive),
            shared=workdir.path,
            cohort=split,
            table=table,
            settings=decisive,
            mpp_override=_MPP_OVERRIDE.value,
            threads=_THREADS.value,
            stop=stop,
        )
        found = slide_run.run(_STAGE.value)
        finished += [found] if found else []
    if finished:
        write_tables(workdir.path, config, finished)
    return workdir.path


def run_patches(config: Config, mesh: Mesh) -> pathlib.Path:
    """All repeats over a list of patches. Returns the work directory."""
    listing = pathlib.Path(str(_PATCHES.value))
    patches = read_patches(listing)
    network = starting_network(config, _PRETRAINED.value, _SOURCE.value, dtype=arithmetic(_DTYPE.value))
    decisive = settings(config, listing)
    workdir, stop, finished = Workdir.open(str(_WORKDIR.value), decisive), Stop(), []
    count = 1 if (patches.split != "").all() else config.repeats
    for number in range(count):
        shares = {"test": config.test_share, "validation": config.validation_share}
        split = split_patches(patches, seed=config.split_seed + number, **shares)
        folder = Workdir.open(workdir.path if count == 1 else workdir.path / f"repeat_{number}", decisive)
        finished.append(PatchRun(config, network, mesh, folder, listing, split, _THREADS.value, stop).run())
    write_tables(workdir.path, config, finished)
    return workdir.path


def main() -> None:
    """Runs the stages that --stage asks for."""
    config = config_from_flags(Config)
    mesh = start(config)
    folder = run_slides(config, mesh) if _COHORT.value else run_patches(config, mesh)
    print(f"finished: {folder}")


if __name__ == "__main__":
    run(main)
