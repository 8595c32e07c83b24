"""Trains a detector of signet ring cells from incomplete boxes (Li et al. 2019), and judges it on held-out images.

    python -m experiments.cell_detection --data=digestpath/ --workdir=runs/cells --training=self --pretrained=dla34.pth
    python -m experiments.cell_detection --data=cohort.csv --workdir=runs/cells --training=cooperative

--data is a folder of images with annotation files beside them (in DigestPath's layout sig-train-pos and sig-train-neg, or flat), or
a cohort table (CSV) of slides with box annotations, from which regions are cut. Images of the split test, of the cohort or of --groups,
are held out, or else those of one of --folds. --unlabelled is a folder of regions that nobody annotated; those of a cohort are drawn
from its slides. The run goes on where it was when the same command is given again. Leaves masks by round (rounds/), the model
(weights.npz, model.json), detections/, metrics.json and report.html in the work directory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags
from jax.sharding import Mesh

from data_pipelines.boxes import BoxesError
from data_pipelines.cell_images import (
    ANNOTATED,
    NORMAL,
    CellImage,
    CellImages,
    assign_folds,
    check_groups,
    read_cell_images,
    read_groups,
    read_unlabelled,
)
from data_pipelines.cohort import read_cohort
from data_pipelines.cohort_rows import listed
from experiments.run import settings as settings_module
from experiments.run.cells.evaluation import Scoring
from experiments.run.cells.held_out import HeldOut, write_found
from experiments.run.cells.learner import Learner, Place
from experiments.run.cells.model import CellModel
from experiments.run.cells.regions import RegionCutter
from experiments.run.cells.report import write_results
from experiments.run.cells.rounds import CellData, Rounds
from experiments.run.cells.starting import starting_network
from experiments.run.program import Stop, UsageError, run, start_devices
from experiments.run.settings import config_from_flags, define_flags
from experiments.run.starting import arithmetic, pretrained_hash
from experiments.run.workdir import Workdir, file_hash, versions
from srcc_jax.methods.cell_detection import Config
from srcc_jax.models.zoo import SOURCES
from srcc_jax.parallel import make_mesh

define_flags(Config)
flags.adopt_module_key_flags(settings_module)  # so that --help lists the method's numbers, not --helpfull alone
_DATA = flags.DEFINE_string("data", None, "folder of annotated images, or cohort table (CSV) of slides", required=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "folder for checkpoints, log, masks, model and results", required=True)
_UNLABELLED = flags.DEFINE_string("unlabelled", None, "folder of images that nobody annotated")
_GROUPS = flags.DEFINE_string(
    "groups",
    None,
    "table (CSV: image, and any of slide_id, patient_id, organ, by which folds keep images together, and split: train, or test)",
)
_PRETRAINED = flags.DEFINE_string(
    "pretrained", None, "weights of --network or of its encoder: a folder made by import_weights, or a file"
)
_SECOND = flags.DEFINE_string("second_pretrained", None, "the same for --second_network")
_SOURCE = flags.DEFINE_enum(
    "pretrained_source", None, list(SOURCES), "who published the files, where the names in them do not tell"
)
_POSITIVE = flags.DEFINE_string("positive", "srcc", "of a cohort: the label of slides that hold such cells")
_MPP_OVERRIDE = flags.DEFINE_float("mpp_override", None, "µm per pixel of slides that do not say it themselves")
_DTYPE = flags.DEFINE_enum(
    "dtype", "auto", ["auto", "float32", "bfloat16"], "arithmetic; auto: bfloat16 on GPU and TPU"
)
_THREADS = flags.DEFINE_integer("threads", 2, "threads that read images", lower_bound=1)


@dataclasses.dataclass(frozen=True)
class Given:
    """The images of a run, in two parts, and what is to be told about them."""

    data: CellData
    held_out: tuple[CellImage, ...]
    notes: tuple[str, ...]


def start(config: Config) -> Mesh:
    """The devices. Raises UsageError where a batch does not fit them, or flags do not fit each other."""
    if _SECOND.value and config.training != "cooperative":
        raise UsageError("--second_pretrained is of the second network, which only --training=cooperative has")
    start_devices(batch=config.batch)
    mesh = make_mesh()
    if config.batch % mesh.size:
        raise UsageError(
            f"--batch={config.batch} cannot be split over {mesh.size} devices: give a multiple of {mesh.size}"
        )
    return mesh


def settings(config: Config) -> dict[str, Any]:
    """Everything that decides the result, but the images: another value of any of it needs another work directory."""
    table = pathlib.Path(_DATA.value)
    return {
        **dataclasses.asdict(config),
        "pretrained": [pretrained_hash(path) for path in (_PRETRAINED.value, _SECOND.value)],
        "pretrained_source": _SOURCE.value,
        "cohort": file_hash(table) if table.is_file() else None,
        "groups": file_hash(pathlib.Path(_GROUPS.value)) if _GROUPS.value else None,
        "positive": _POSITIVE.value,
        "mpp_override": _MPP_OVERRIDE.value,
        "dtype": arithmetic(_DTYPE.value),
    }


def read_images(config: Config, workdir: Workdir) -> Given:
    """The images that are trained on, and those held out. Raises BoxesError, CohortError, SlideError, UsageError."""
    folder, told = pathlib.Path(_DATA.value), read_groups(_GROUPS.value) if _GROUPS.value else {}
    unlabelled = pathlib.Path(_UNLABELLED.value) if _UNLABELLED.value else None
    groups: dict[str, dict[str, str]] = {}
    notes: list[str] = []
    if folder.is_file():
        cutter = RegionCutter(config, workdir.path / "regions", _POSITIVE.value, _MPP_OVERRIDE.value)
        cut = cutter.cut(read_cohort(folder), threads=_THREADS.value)
        groups, folder = cut.groups, cutter.folder
        notes += cut.notes
        unlabelled = unlabelled or (cutter.unlabelled if cutter.unlabelled.is_dir() else None)
    found, extra = read_cell_images(folder), read_extra(config, unlabelled)
    if _GROUPS.value:
        notes += check_groups(_GROUPS.value, told, [image.name for image in (*found.images, *extra.images)])
    groups = {name: {**groups.get(name, {}), **told.get(name, {})} for name in {**groups, **told}}
    notes += [*found.notes, *extra.notes]
    notes += [f"left out: {file}: {reason}" for file, reason in {**found.left_out, **extra.left_out}.items()]
    train, held_out = divide(config, found.images, groups)
    regions = usable_regions(config, extra.images, found.images, held_out, groups)
    if not any(image.kind == ANNOTATED for image in train):
        raise BoxesError(f"{_DATA.value}: no annotated image is left to train on: give more images, or fewer folds")
    data = CellData(
        [image for image in train if image.kind == ANNOTATED],
        [image for image in train if image.kind == NORMAL],
        regions,
    )
    return Given(data, held_out, tuple(notes))


def read_extra(config: Config, unlabelled: pathlib.Path | None) -> CellImages:
    """The unlabelled regions, none where the training has no use for them, which is told if they were given. Raises BoxesError,
    UsageError."""
    if not config.uses_unlabelled:
        note = f"--unlabelled={_UNLABELLED.value} is not used: --training={config.training} trains on annotated images"
        return CellImages((), {}, (note,) if _UNLABELLED.value else ())
    if unlabelled is None:
        raise UsageError(
            f"--training={config.training} needs regions that nobody annotated: give --unlabelled=<folder>"
        )
    return read_unlabelled(unlabelled)


def usable_regions(
    config: Config,
    regions: Sequence[CellImage],
    images: Sequence[CellImage],
    held_out: Sequence[CellImage],
    groups: dict[str, dict[str, str]],
) -> list[CellImage]:
    """Unlabelled regions that are no images of --data themselves, nor, where held-out images stand for other slides, of such a slide.

    Raises UsageError where a run that needs some is left without."""
    names = {image.name for image in images}
    slides = {image.slide_id for image in held_out} if config.fold_mode == "hard" or not config.folds else set()
    tested = {name for name, group in groups.items() if group.get("split") == "test"}
    usable = [r for r in regions if r.name not in names | tested and r.slide_id not in slides]
    if config.uses_unlabelled and not usable:
        raise UsageError(
            f"all {len(regions)} unlabelled regions are annotated images or of held-out slides: give others with --unlabelled"
        )
    return usable


def divide(
    config: Config, images: Sequence[CellImage], groups: dict[str, dict[str, str]]
) -> tuple[tuple[CellImage, ...], tuple[CellImage, ...]]:
    """Images to train on, and those held out: of a fold, else of the split `test`. Raises UsageError where both are asked for."""
    test = [groups.get(image.name, {}).get("split") == "test" for image in images]
    if config.folds:
        if any(test):
            names = listed([image.name for image, out in zip(images, test) if out])
            raise UsageError(
                f"--folds={config.folds} would train on images of the split test ({names}): leave --folds away, or the test images"
            )
        fold = assign_folds(
            [image.name for image in images], [image.kind for image in images], groups,
            folds=config.folds, mode=config.fold_mode, seed=config.split_seed,
        )  # fmt: skip
        test = (fold == config.fold).tolist()
    return (
        tuple(image for image, out in zip(images, test) if not out),
        tuple(image for image, out in zip(images, test) if out),
    )


def digest(given: Given) -> str:
    """16 digits that change with any image's name, size, kind, boxes or part."""
    parts = (given.data.annotated, given.data.normal, given.data.unlabelled, given.held_out)
    rows = [[(i.name, i.kind, i.width, i.height, i.boxes.tolist()) for i in images] for images in parts]
    return hashlib.sha256(repr(rows).encode()).hexdigest()[:16]


def begin_learners(config: Config, place: Place, stack: contextlib.ExitStack) -> list[Learner]:
    """The models of a run, as they are before it or where it was; the stack closes them. Raises UsageError, WeightsError."""
    learners = []
    for number, (name, weights) in enumerate(zip(config.networks, (_PRETRAINED.value, _SECOND.value))):
        key = jax.random.fold_in(jax.random.key(config.seed), 1 + number)
        net, variables = starting_network(name, weights, source=_SOURCE.value, dtype=arithmetic(_DTYPE.value), key=key)
        learners.append(stack.enter_context(Learner(number, config, net, variables, place)))
    return learners


def save_model(config: Config, learner: Learner, given: Given, folder: pathlib.Path) -> None:
    """Writes the model, and what it finds on the annotated images to images/detections, over which its spread is measured."""
    found = folder / "images" / "detections"
    spread = write_found(config, found, given.data.annotated, learner.predictor(), what="annotated images")
    about = {"step": learner.step, "data": digest(given), "settings": settings(config), "versions": versions()}
    kept = ("mpp", "reduce", "window", "overlap", "threshold", "min_area", "beta")
    chosen = {name: getattr(config, name) for name in kept}
    CellModel(learner.architecture, learner.variables, spread=spread, about=about, **chosen).save(folder)


def main() -> None:
    """Trains through all rounds, writes the model, and judges it."""
    config = config_from_flags(Config)
    mesh, decisive = start(config), settings(config)
    workdir = Workdir.open(_WORKDIR.value, decisive)
    if (workdir.path / "metrics.json").exists():
        print(f"finished before: {workdir.path / 'metrics.json'}")
        return
    given = read_images(config, workdir)
    for note in given.notes:
        print(note)
    Workdir.open(workdir.path / "images", {"images": digest(given)})  # refuses to go on with others
    place = Place(mesh, workdir, _THREADS.value, Stop())
    held_out = HeldOut(config, given.held_out, Scoring(), workdir.path / "rounds")
    with contextlib.ExitStack() as stack:
        learners = begin_learners(config, place, stack)
        done = Rounds(config, given.data, place, learners, held_out.judge).run()
        save_model(config, learners[0], given, workdir.path)
        write_results(held_out, given.notes, done, workdir=workdir, data=given.data, settings=decisive)
        print(f"finished: {config.training}, step {learners[0].step}: {workdir.path}")


if __name__ == "__main__":
    run(main)
