"""Regions cut from the slides of a cohort into a folder of images in DigestPath's layout, with a folder of unlabelled ones beside."""

from __future__ import annotations

import dataclasses
import glob
import json
import pathlib
import zlib
from collections.abc import Mapping

import numpy as np

from data_pipelines.annotations import AnnotationError
from data_pipelines.boxes import Boxes, shape_boxes, write_boxes
from data_pipelines.cell_images import NEGATIVE, POSITIVE, clip_boxes
from data_pipelines.cell_regions import draw_regions, regions_around
from data_pipelines.cohort import Cohort, SlideRecord
from data_pipelines.exports import write_image, write_json
from data_pipelines.prepare import TISSUE_MPP, read_shapes
from data_pipelines.scan import work_ahead
from data_pipelines.slides import RegionError, Slide, SlideError, open_slide
from data_pipelines.tissue import tissue_mask
from experiments.run.progress import progress
from srcc_jax.methods.cell_detection import Config

_REGIONS = 3  # purpose that a run's seed is folded with
_UNLABELLED = "unlabelled"


@dataclasses.dataclass(frozen=True)
class Regions:
    """What is in a folder of regions. groups: image -> slide, patient and split; failed: slide -> why it has no regions."""

    groups: dict[str, dict[str, str]]
    failed: Mapping[str, str]

    @property
    def notes(self) -> list[str]:
        """What is to be told of slides without regions."""
        cure = ["to try the slides left out again, take regions/regions.json away"] if self.failed else []
        return [*(f"left out: slide {slide_id}: {reason}" for slide_id, reason in self.failed.items()), *cure]


@dataclasses.dataclass(frozen=True)
class RegionCutter:
    """Cuts regions of `region_px` pixels at `mpp` into `folder`: around the boxes of annotated slides; from tissue away from those, as
    unlabelled ones, of slides with the label `positive`; from the tissue of all others, as images without cells."""

    config: Config
    folder: pathlib.Path
    positive: str
    mpp_override: float | None = None

    @property
    def unlabelled(self) -> pathlib.Path:
        """The folder of unlabelled regions."""
        return self.folder / _UNLABELLED

    def cut(self, cohort: Cohort, *, threads: int) -> Regions:
        """Once regions.json lists all regions, and slides that cannot be used, it is read: to try those again, take it away. Raises
        SlideError where no slide has an annotated region."""
        listing = self.folder / "regions.json"
        if not listing.exists():
            found = self._cut_slides(cohort, threads)
            if not any((self.folder / POSITIVE).glob("*.png")):
                first = next((f"; the first: {note}" for note in found.notes), "")
                raise SlideError(f"none of {len(cohort)} slides has an annotated region{first}")
            write_json(listing, dataclasses.asdict(found))
        return Regions(**json.loads(listing.read_text()))

    def _cut_slides(self, cohort: Cohort, threads: int) -> Regions:
        groups: dict[str, dict[str, str]] = {}
        failed: dict[str, str] = {}
        with progress(len(cohort), "cutting regions", unit="slides") as bar:
            results = work_ahead(cohort.records, self._cut_slide, threads=threads, ahead=threads, name="regions")
            for record, found in zip(cohort, results):
                if isinstance(found, str):
                    failed[record.slide_id] = found
                else:
                    group = {
                        "slide_id": record.slide_id,
                        "patient_id": record.patient_id,
                        "split": record.split or "",
                    }
                    groups |= dict.fromkeys(found, group)
                bar.update()
        return Regions(groups, failed)

    def _cut_slide(self, record: SlideRecord) -> list[str] | str:
        """Names of the regions of a slide, or why there is none."""
        try:
            with open_slide(record.path, mpp_cohort=record.mpp, mpp_override=self.mpp_override) as slide:
                boxes = self._cells(record, slide)
                side = self.config.region_px * self.config.mpp / slide.mpp
                around = regions_around(boxes, side)
                places: dict[str, np.ndarray] = {POSITIVE: around}
                drawn = _UNLABELLED if record.label == self.positive else NEGATIVE
                if len(boxes) and drawn == NEGATIVE:
                    return f"it has boxes and is {record.label}, not {self.positive}: say with --positive which label has cells"
                places[drawn] = self._drawn(slide, record.slide_id, around, side)
                names = [
                    self._write(slide, record.slide_id, kind, x, y, boxes)
                    for kind, found in places.items()
                    for x, y in found
                ]
        except (SlideError, RegionError, AnnotationError) as error:
            self._take_away(record.slide_id)
            return str(error)
        return names or "no box, and too little tissue for a region"

    def _cells(self, record: SlideRecord, slide: Slide) -> np.ndarray:
        """Boxes [N, 4] of the slide's annotation in its level-0 pixels, cut to the slide. Raises AnnotationError, too where one cannot be
        of a cell, because no crop holds it."""
        boxes = clip_boxes(shape_boxes(read_shapes(record, slide)).box, slide.width, slide.height)
        crop_um = min(self.config.crop * self.config.reduce, self.config.region_px) * self.config.mpp
        sides_um = (boxes[:, 2:] - boxes[:, :2]).max(axis=1, initial=0) * slide.mpp
        if (sides_um > crop_um).any():
            raise AnnotationError(
                f"{record.annotation}: {(sides_um > crop_um).sum()} of {len(boxes)} shapes are larger than a training crop of "
                f"{crop_um:.0f} µm, up to {sides_um.max():.0f} µm: boxes of single cells are needed, take outlines of tissue out"
            )
        return boxes

    def _take_away(self, slide_id: str) -> None:
        """The regions that were written of a slide before it failed: no table knows their split."""
        for kind in (POSITIVE, NEGATIVE, _UNLABELLED):
            for path in (self.folder / kind).glob(f"{glob.escape(slide_id)}-lv0-*"):
                path.unlink()

    def _drawn(self, slide: Slide, slide_id: str, avoid: np.ndarray, side: float) -> np.ndarray:
        random = np.random.default_rng([self.config.seed, _REGIONS, zlib.crc32(slide_id.encode())])
        tissue, downsample = tissue_mask(slide.thumbnail(TISSUE_MPP)), TISSUE_MPP / slide.mpp
        return draw_regions(
            tissue, downsample=downsample, side=side, count=self.config.regions, avoid=avoid, random=random
        )

    def _write(self, slide: Slide, slide_id: str, kind: str, x: float, y: float, boxes: np.ndarray) -> str:
        """The image and, of an annotated region, its boxes, in pixels of the region."""
        side = self.config.region_px
        name = f"{slide_id}-lv0-{x:.0f}-{y:.0f}-{side}-{side}"
        folder = self.folder / kind
        if kind == POSITIVE:
            scale = slide.mpp / self.config.mpp
            moved = (boxes - np.array([x, y, x, y])) * scale
            middle = (moved[:, :2] + moved[:, 2:]) / 2
            inside = moved[((middle >= 0) & (middle < side)).all(axis=1)]
            found = Boxes(np.clip(inside, 0, side), np.full(len(inside), np.nan))
            write_boxes(folder / f"{name}.xml", found, image=f"{name}.png", width=side, height=side)
        if not (folder / f"{name}.png").exists():
            write_image(folder / f"{name}.png", slide.read(x, y, side, side, self.config.mpp))
        return name
