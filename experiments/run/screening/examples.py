"""What the multi-task network learns from: tiles of slides with refined masks, or labelled patches with masks."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping

import numpy as np

from data_pipelines.cohort import Cohort, CohortError
from data_pipelines.exports import write_table
from data_pipelines.lesion_masks import TileMasks, cut_masks
from data_pipelines.masked_patches import MaskedPatchReader, MaskedTileReader, read_masks
from data_pipelines.patches import BatchReader, Patches, PatchReader, ShuffledRows, WeightedRows, class_weights
from data_pipelines.shelf import Shelf
from data_pipelines.tiles import Grid
from experiments.run.screening.fitting import digest_of
from experiments.run.screening.refining import RefinedMask
from experiments.run.slides import SlideSet, prepare_slides
from srcc_jax.methods.gastric_screening import Config

SPLITS = ("train", "validation", "test")
_VALIDATION = 3  # purpose that the seed of the splits is folded with


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """reader: of rows in a table of patches. label: int [N], 1: malignant. rows: split -> rows that may be used. unit: str [N], whose
    each is: a slide or an image. lesion [N]: what tells their masks apart, a share or a file."""

    reader: BatchReader
    label: np.ndarray
    rows: Mapping[str, np.ndarray]
    unit: np.ndarray
    lesion: np.ndarray

    def digest(self) -> str:
        """16 digits that change with the patches that are used, their labels and the lesion on them."""
        return digest_of(self.unit, self.label, self.lesion, *(self.rows[split] for split in SPLITS))

    def sampler(self, config: Config) -> Callable[[int], np.ndarray]:
        """The rows of each training step: every patch once in an epoch, or both classes equally often."""
        rows, size = self.rows["train"], config.multitask_batch
        if not config.balanced:
            return ShuffledRows(rows, size, config.seed)
        return WeightedRows(rows, class_weights(self.label[rows]), size, config.seed)

    def counts(self) -> dict[str, dict[str, int]]:
        """Split -> kind -> patches."""
        kinds = {split: self.label[rows] for split, rows in self.rows.items()}
        return {
            split: {"malignant": int(found.sum()), "benign": int((1 - found).sum())} for split, found in kinds.items()
        }

    def check(self) -> None:
        """Raises CohortError where a kind of patch is missing from the splits that training needs."""
        for split in ("train", "validation"):
            missing = [kind for kind, count in self.counts()[split].items() if not count]
            if missing:
                raise CohortError(
                    f"no {' and no '.join(missing)} patch in the {split} split: look at --positive, at the annotations (refine.csv) "
                    "and at --min_lesion, or give more patients"
                )


def listed_examples(listing: pathlib.Path, patches: Patches, config: Config) -> Examples:
    """Of a list of patches with splits. A patch without a mask, or with an empty one, has no lesion, whatever its label."""
    masks = read_masks(listing, patches)
    label = patches.is_one_of([config.positive]).astype(int)
    reader = MaskedPatchReader(PatchReader(patches, label.astype(np.float32), config.tile), masks)
    rows = {split: patches.rows(split) for split in SPLITS}
    named = np.asarray([mask.name if mask else "" for mask in masks])
    return Examples(reader, label, {**rows, "validation": _drawn(rows["validation"], config)}, patches.unit, named)


@dataclasses.dataclass(frozen=True, eq=False)
class TiledCohort:
    """The slides of a cohort with their tiles, the lesion on these, and a shelf to read from."""

    slides: SlideSet
    masks: TileMasks
    shelf: Shelf
    config: Config

    @property
    def label(self) -> np.ndarray:
        """int [S]: 1 where the slide is positive."""
        return np.asarray([record.label == self.config.positive for record in self.slides.records], int)

    def numbers(self, split: str) -> np.ndarray:
        """int [s]: the slides of a split."""
        return np.flatnonzero([record.split == split for record in self.slides.records])

    def examples(self) -> Examples:
        """Malignant: tiles with more lesion than `min_lesion`. Benign: tiles of negative slides. A positive slide's other tiles are
        neither, because nobody says that its annotation is exhaustive."""
        slide = self.slides.slide
        lesion = (self.label[slide] == 1) & (self.masks.share > self.config.min_lesion)
        usable = lesion | (self.label[slide] == 0)
        split = np.asarray([record.split for record in self.slides.records])[slide]
        rows = {name: np.flatnonzero(usable & (split == name)) for name in SPLITS}
        rows["validation"] = _drawn(rows["validation"], self.config)
        label = lesion.astype(int)
        reader = MaskedTileReader(self.slides.tiles, self.shelf, self.masks, label.astype(np.float32))
        return Examples(reader, label, rows, self.slides.tiles.slide_id, self.masks.share)


def tile_cohort(
    cohort: Cohort,
    masks: Mapping[str, RefinedMask],
    config: Config,
    *,
    cache: pathlib.Path,
    mpp_override: float | None,
    threads: int,
) -> TiledCohort:
    """Lays the tiles of all slides of a cohort, and finds the lesion on them. Slides that cannot be used are told, and written to
    failed_slides.csv beside `cache`."""
    grid = Grid(tile=config.tile, stride=config.stride, mpp=config.mpp)
    slides = prepare_slides(
        cohort.records, grid, min_tissue=config.min_tissue, mpp_override=mpp_override, cache=cache, threads=threads
    )
    for record, reason in slides.failed:
        print(f"left out: {record.slide_id}: {reason}", flush=True)
    failed = {record.slide_id: reason for record, reason in slides.failed}
    write_table(cache.parent / "failed_slides.csv", {"slide_id": list(failed), "reason": list(failed.values())})
    side = max(1, round(config.tile * config.mpp / config.mask_mpp))
    parts = []
    for number, record in enumerate(slides.records):
        found = masks.get(record.slide_id) if record.label == config.positive else None
        tiles = slides.tiles.take(slides.rows(number))
        lesion = (found.load(), found.downsample) if found else (None, 1.0)
        parts.append(cut_masks(tiles, lesion[0], downsample=lesion[1], side=side))
    shelf = Shelf(slides.records, mpp_override=mpp_override)
    return TiledCohort(slides, TileMasks.concatenate(parts), shelf, config)


def _drawn(rows: np.ndarray, config: Config) -> np.ndarray:
    """As many validation rows as the settings ask for, always the same ones."""
    if config.validation_patches is None or len(rows) <= config.validation_patches:
        return rows
    random = np.random.default_rng([config.split_seed, _VALIDATION])
    return np.sort(random.choice(rows, config.validation_patches, replace=False))
