"""Regions cut from the slides of a cohort into a folder of images in DigestPath's layout, with a folder of unlabelled ones beside."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import zlib

import numpy as np

from data_pipelines.annotations import AnnotationError
from data_pipelines.boxes import Boxes, read_boxes, write_boxes
from data_pipelines.cell_images import NEGATIVE, POSITIVE
from data_pipelines.cell_regions import draw_regions, regions_around
from data_pipelines.cohort import Cohort, SlideRecord
from data_pipelines.exports import write_image, write_json
from data_pipelines.prepare import TISSUE_MPP
from data_pipelines.scan import work_ahead
from data_pipelines.slides import RegionError, Slide, SlideError, open_slide
from data_pipelines.tissue import tissue_mask
from experiments.run.progress import progress
from srcc_jax.methods.cell_detection import Config

_REGIONS = 3  # purpose that a run's seed is folded with


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
        return self.folder / "unlabelled"

    def cut(self, cohort: Cohort, *, threads: int) -> dict[str, dict[str, str]]:
        """image -> slide, patient and split. Once regions.json lists all regions, it is read. Slides that cannot be used are told and
        listed, too. Raises SlideError where none has an annotated region."""
        listing = self.folder / "regions.json"
        if not listing.exists():
            groups: dict[str, dict[str, str]] = {}
            failed: dict[str, str] = {}
            with progress(len(cohort), "cutting regions", unit="slides") as bar:
                results = work_ahead(cohort.records, self._cut_slide, threads=threads, ahead=threads, name="regions")
                for record, found in zip(cohort, results):
                    if isinstance(found, str):
                        failed[record.slide_id] = found
                        print(f"left out: {record.slide_id}: {found}", flush=True)
                    else:
                        group = {
                            "slide_id": record.slide_id,
                            "patient_id": record.patient_id,
                            "split": record.split or "",
                        }
                        groups |= dict.fromkeys(found, group)
                    bar.update()
            if not (self.folder / POSITIVE).is_dir():
                raise SlideError(
                    f"none of {len(cohort)} slides has an annotated region; the first: {next(iter(failed.items()), '')}"
                )
            write_json(listing, {"groups": groups, "failed": failed})
        return json.loads(listing.read_text())["groups"]

    def _cut_slide(self, record: SlideRecord) -> list[str] | str:
        """Names of the regions of a slide, or why there is none."""
        try:
            with open_slide(record.path, mpp_cohort=record.mpp, mpp_override=self.mpp_override) as slide:
                boxes = read_boxes(record.annotation).box if record.annotation else np.zeros((0, 4))
                side = self.config.region_px * self.config.mpp / slide.mpp
                around = regions_around(boxes, side)
                places: dict[str, np.ndarray] = {POSITIVE: around}
                drawn = "unlabelled" if record.label == self.positive else NEGATIVE
                if len(boxes) and drawn == NEGATIVE:
                    return f"it has boxes and is {record.label}, not {self.positive}: say with --positive which label has cells"
                places[drawn] = self._drawn(slide, record.slide_id, around, side)
                names = [
                    self._write(slide, record.slide_id, kind, x, y, boxes)
                    for kind, found in places.items()
                    for x, y in found
                ]
        except (SlideError, RegionError, AnnotationError) as error:
            return str(error)
        return names or "no box, and too little tissue for a region"

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
