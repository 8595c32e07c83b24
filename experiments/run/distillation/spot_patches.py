"""Patches cut from the slides of a cohort into a folder: drawn by He & Li's rule from each slide, or at listed places."""

from __future__ import annotations

import csv
import dataclasses
import pathlib
import zlib
from collections.abc import Mapping

import numpy as np

from data_pipelines.annotations import AnnotationError
from data_pipelines.cohort import Cohort, CohortError, SlideRecord
from data_pipelines.cohort_rows import listed
from data_pipelines.exports import write_image, write_table
from data_pipelines.patches import Patches, read_patches, write_patches
from data_pipelines.scan import work_ahead
from data_pipelines.slides import RegionError, Slide, SlideError, open_slide
from data_pipelines.spots import MASK_MPP, Spots, SpotsError, cut_patch, find_regions, sample_spots
from experiments.run.program import UsageError
from experiments.run.progress import progress
from srcc_jax.methods.reverse_distillation import Config

NORMAL, TUMOUR = "normal", "tumour"
_FAILED = "failed_slides.csv"
_SPOTS = 1  # purpose that a seed is folded with


@dataclasses.dataclass(frozen=True)
class SpotCutter:
    """Cuts the patches of slides into `folder`. lists: kind -> places; a slide that one of them names takes its patches from them
    alone. The places drawn on training slides depend on the run's seed, the others on the seed of the splits."""

    config: Config
    folder: pathlib.Path
    lists: Mapping[str, Spots]
    mpp_override: float | None = None

    def cut(self, cohort: Cohort, *, threads: int) -> Patches:
        """The patches of all slides, also written as patches.csv; once that is there, it is read. Slides that cannot be used are
        told, each time, and written to failed_slides.csv. Raises SlideError where none can, UsageError or SpotsError where
        cohort, --positive and lists do not fit each other."""
        listing = self.folder / "patches.csv"
        if listing.exists():
            tell_failed_slides(self.folder)
            return read_patches(listing)
        self._check_lists(cohort)
        self._check_labels(cohort)
        rows: list[tuple[pathlib.Path, str, SlideRecord]] = []
        failed: dict[str, str] = {}
        with progress(len(cohort), "cutting patches", unit="slides") as bar:
            results = work_ahead(cohort.records, self._cut_slide, threads=threads, ahead=threads, name="patches")
            for record, found in zip(cohort, results):
                if isinstance(found, str):
                    failed[record.slide_id] = found
                    print(f"left out: {record.slide_id}: {found}", flush=True)
                else:
                    rows += [(file, kind, record) for file, kind in found]
                bar.update()
        write_table(self.folder / _FAILED, {"slide_id": list(failed), "reason": list(failed.values())})
        if not rows:
            raise SlideError(f"none of {len(cohort)} slides gave a patch; the first: {next(iter(failed.items()), '')}")
        columns = ([r.slide_id for *_, r in rows], [r.patient_id for *_, r in rows], [str(r.split) for *_, r in rows])
        label = np.array([kind for _, kind, _ in rows])
        patches = Patches(tuple(file for file, *_ in rows), label, *map(np.array, columns))
        write_patches(listing, patches)
        return patches

    def _cut_slide(self, record: SlideRecord) -> list[tuple[pathlib.Path, str]] | str:
        """(file, kind) of each patch of one slide, or why there is none."""
        try:
            places = self._listed(record) or self._drawn(record)
            with open_slide(record.path, mpp_cohort=record.mpp, mpp_override=self.mpp_override) as slide:
                found = []
                for kind, spots in places.items():
                    _check_inside(slide, record, kind, spots)
                    for x, y in zip(spots.x, spots.y):
                        file = self.folder / str(record.split) / kind / f"{record.slide_id}_{x:.0f}_{y:.0f}.png"
                        if not file.exists():
                            write_image(file, cut_patch(slide, x, y, side=self.config.tile, mpp=self.config.mpp))
                        found.append((file, kind))
        except (SlideError, RegionError, AnnotationError, CohortError) as error:
            return str(error)
        return found or "no place for a patch: too little tissue, or none of its spots is free of tumour"

    def _check_lists(self, cohort: Cohort) -> None:
        """Tells which slides of the lists the cohort does not have, and which of its slides are listed for tumour alone. UsageError
        for a list without any of its slides."""
        known = {record.slide_id.lower() for record in cohort}
        named = {kind: {str(name).lower(): str(name) for name in spots.slide_id} for kind, spots in self.lists.items()}
        for kind, names in named.items():
            absent = [name for key, name in names.items() if key not in known]
            if len(absent) == len(names):
                ours = listed([record.slide_id for record in cohort])
                raise UsageError(f"--{kind}_list names {listed(absent)}, and the cohort has {ours}: name them alike")
            if absent:
                print(f"--{kind}_list: slides that the cohort does not have: {listed(absent)}", flush=True)
        normal = named.get(NORMAL, {})
        alone = [name for key, name in named.get(TUMOUR, {}).items() if key in known and key not in normal]
        if alone:
            print(f"no normal patches of {listed(alone)}: their places are those of --tumour_list alone", flush=True)

    def _check_labels(self, cohort: Cohort) -> None:
        """Refuses slides to draw places on where no label of the cohort means tumour: tumour would be drawn as normal."""
        labels = sorted({str(record.label) for record in cohort})
        if not set(labels) & set(self.config.positives) and not all(self._listed(record) for record in cohort):
            raise UsageError(
                f"--positive={self.config.positive} is no label of the cohort, whose labels are {', '.join(labels)}: name the labels "
                "of slides with tumour"
            )

    def _listed(self, record: SlideRecord) -> dict[str, Spots]:
        """Kind -> the listed places on a slide; empty where no list names it."""
        found = {kind: spots.of(record.slide_id) for kind, spots in self.lists.items()}
        return found if any(map(len, found.values())) else {}

    def _drawn(self, record: SlideRecord) -> dict[str, Spots]:
        """Kind -> places by the sampling rule. CohortError for a slide with tumour of which nobody says where."""
        regions = find_regions(record, mpp_override=self.mpp_override)
        if record.label in self.config.positives and not regions.annotated:
            raise CohortError(f"it is {record.label} but has no annotation: fill the column `annotation`")
        seed = self.config.seed if record.split == "train" else self.config.split_seed
        random = np.random.default_rng([seed, _SPOTS, zlib.crc32(record.slide_id.encode())])
        spacing = self.config.tile / 2 * self.config.mpp * regions.downsample / MASK_MPP  # level-0 pixels
        counts = zip((NORMAL, TUMOUR), (regions.normal, regions.tumour), self._counts(str(record.split)))
        places = {}
        for kind, mask, count in counts:
            x, y = sample_spots(mask, count, downsample=regions.downsample, spacing=spacing, random=random)
            places[kind] = Spots(np.full(len(x), record.slide_id), x, y)
        return places

    def _counts(self, split: str) -> tuple[int, int]:
        """Normal and tumour patches of a slide."""
        config = self.config
        return {
            "train": (config.normal_spots, config.tumour_spots),
            "validation": (config.validation_spots, config.validation_spots),
            "test": (config.test_normal_spots, config.test_tumour_spots),
        }[split]


def _check_inside(slide: Slide, record: SlideRecord, kind: str, spots: Spots) -> None:
    """SpotsError for a place off the slide, where a patch would be white."""
    outside = (spots.x < 0) | (spots.y < 0) | (spots.x >= slide.width) | (spots.y >= slide.height)
    for row in np.flatnonzero(outside)[:1]:
        raise SpotsError(
            f"{kind} place {spots.x[row]:g},{spots.y[row]:g} is not on {record.slide_id}, which has {slide.width} × {slide.height} "
            f"pixels ({outside.sum()} places are not): lists hold level-0 pixels of the slides of the cohort"
        )


def failed_slides(folder: pathlib.Path) -> dict[str, str]:
    """Slide -> why no patch was cut from it, as `SpotCutter.cut` wrote it into this folder; empty where no slides were cut."""
    file = folder / _FAILED
    if not file.exists():
        return {}
    with open(file, newline="", encoding="utf-8") as lines:
        return {row["slide_id"]: row["reason"] for row in csv.DictReader(lines)}


def tell_failed_slides(folder: pathlib.Path) -> None:
    """Prints them."""
    failed = failed_slides(folder)
    for slide_id, reason in failed.items():
        print(f"left out: {slide_id}: {reason}", flush=True)
    if failed:
        print("Which patches there are is fixed now: to try these slides again, give another --workdir", flush=True)
