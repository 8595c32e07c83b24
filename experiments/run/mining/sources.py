"""What --hard and --weak name: patches in files, or slides; told apart by what is there."""

from __future__ import annotations

import csv
import dataclasses
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from data_pipelines.cohort import Cohort, read_cohort
from data_pipelines.cohort_rows import listed
from data_pipelines.mosaics import IMAGES
from data_pipelines.patch_names import LABELLED, UNLABELLED, read_images, read_named
from data_pipelines.patches import Patches, PatchesError, read_patches
from data_pipelines.shelf import Shelf
from data_pipelines.tile_sets import is_tile, is_tile_set
from data_pipelines.tiles import Grid
from experiments.run.distillation.spot_patches import TUMOUR, SpotCutter
from experiments.run.mining.weak_sets import NEGATIVE, WeakPatches, WeakSet, WeakSlides
from experiments.run.patch_training import PatchTrainer
from experiments.run.program import UsageError
from experiments.run.slides import prepare_slides, slide_records
from srcc_jax.methods import reverse_distillation
from srcc_jax.methods.negative_mining import Config

PATCH_PX = 2048  # ours: an image of at most this side is a patch, a larger one a slide


@dataclasses.dataclass(frozen=True)
class Sources:
    """Reads what a run is given. folder: for patches cut from slides and for tables of tiles. named: names of patches tell label,
    patient and slide, as in the published data."""

    config: Config
    folder: pathlib.Path
    named: bool = False
    mpp_override: float | None = None
    threads: int = 2

    def hard(self, path: str) -> Patches:
        """Labelled patches: a folder, a list, a set of tiles, or those cut from the slides of an annotated cohort table. Their splits as
        far as given."""
        if self.named:
            return read_named(path, LABELLED)
        return self._cut(read_cohort(path)) if holds_slides(path) else read_patches(path)

    def weak(self, path: str, trainer: PatchTrainer) -> WeakSet:
        """Tiles known negative: a folder, list or set of patches, or a folder or cohort table of slides. UsageError where something is
        labelled positive."""
        if self.named or not holds_slides(path):
            patches = read_named(path, UNLABELLED) if self.named else read_images(path)
            self._check_negative(path, patches.path, patches.label)
            return WeakPatches(patches, trainer, self.config.tile)
        config, records = self.config, slide_records(path, None)
        self._check_negative(path, [record.slide_id for record in records], [record.label or "" for record in records])
        slides = prepare_slides(
            records,
            Grid(tile=config.tile, stride=config.tile, mpp=config.mpp),
            min_tissue=config.min_tissue,
            mpp_override=self.mpp_override,
            cache=self.folder / "tiles",
            threads=self.threads,
        )
        for record, reason in slides.failed:
            print(f"left out of --weak: {record.slide_id}: {reason}", flush=True)
        shelf = Shelf(slides.records, mpp_override=self.mpp_override)
        share, seed = config.weak_share, config.tile_seed
        return WeakSlides(slides, shelf, trainer.architecture, share=share, seed=seed, threads=self.threads)

    def _check_negative(self, path: str, names: Sequence[Any], labels: Iterable[str]) -> None:
        positive = [str(name) for name, label in zip(names, labels) if label in self.config.positives]
        if positive:
            raise UsageError(f"--weak={path}: what is known negative is asked for; positive are {listed(positive)}")

    def _cut(self, cohort: Cohort) -> Patches:
        """By the rule of the reverse distillation study: from tumour and from tissue outside it, spread over each slide."""
        config = self.config
        rule = reverse_distillation.Config(
            tile=config.tile,
            mpp=config.mpp,
            positive=config.positive,
            normal_spots=config.negative_spots,
            tumour_spots=config.positive_spots,
            seed=config.tile_seed,
        )
        given = {record.slide_id: record.split or "" for record in cohort}
        alike = Cohort(tuple(dataclasses.replace(record, split="train") for record in cohort))  # the same counts of all
        cut = SpotCutter(rule, self.folder / "hard", {}, self.mpp_override).cut(alike, threads=self.threads)
        split = np.array([given[name] for name in cut.slide_id])
        return dataclasses.replace(cut, label=np.where(cut.label == TUMOUR, config.positives[0], NEGATIVE), split=split)


def holds_slides(name: str | pathlib.Path) -> bool:
    """Whether a folder, list or table is of slides, not of patches: by what its first image is. Raises PatchesError."""
    path = pathlib.Path(name)
    if is_tile_set(name):
        return False
    if not path.exists():
        raise PatchesError(f"{path}: there is no such folder, list or cohort table")
    if path.is_file():
        first = _first_listed(path)
    else:
        first = next((file for file in sorted(path.rglob("*")) if file.suffix.lower() in IMAGES), None)
    return first is None or not _is_patch(first)


def _first_listed(table: pathlib.Path) -> pathlib.Path | None:
    """The first file of a list; None of a table of slides, which alone has some columns."""
    with open(table, newline="", encoding="utf-8-sig") as file:
        row: Mapping[str, str] = next(iter(csv.DictReader(file)), {})
    if {"annotation", "mpp"} & set(row) or not {"path", "id"} & set(row):
        return None
    return table.parent / (row["path"] if "path" in row else f"images/{row['id']}.tif")


def _is_patch(file: pathlib.Path) -> bool:
    if is_tile(file):
        return True
    try:
        with Image.open(file) as image:
            return max(image.size) <= PATCH_PX
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return False
