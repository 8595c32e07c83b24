"""The stage `refine`: what pathologists outlined, cut to the stained tissue, kept as a mask of each slide."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from data_pipelines.annotations import AnnotationError
from data_pipelines.cohort import SlideRecord, read_columns
from data_pipelines.exports import write_json, write_table
from data_pipelines.lesion_masks import Refinement, read_mask, refine, write_mask
from data_pipelines.scan import work_ahead
from data_pipelines.slides import RegionError, SlideError
from data_pipelines.tumour_masks import tumour_mask
from experiments.run.progress import progress
from experiments.run.workdir import file_hash

PROPOSAL = "proposal"  # column of a cohort table: what a model proposed before the annotation was corrected
_PROPOSED = ("proposed_mm2", "dice_with_proposal")


@dataclasses.dataclass(frozen=True)
class RefinedMask:
    """A mask on disk: its file and level-0 pixels of the slide per cell."""

    path: pathlib.Path
    downsample: float

    def load(self) -> np.ndarray:
        """bool [H, W]."""
        return read_mask(self.path)


@dataclasses.dataclass(frozen=True)
class MaskFolder:
    """masks/<slide_id>.tiff beside masks/<slide_id>.json, which says of which annotation it is and at which scale. proposals: slide ->
    the file that its annotation was corrected from."""

    folder: pathlib.Path
    mpp: float
    mpp_override: float | None = None
    proposals: Mapping[str, pathlib.Path] = dataclasses.field(default_factory=dict)

    def refine(self, records: Sequence[SlideRecord], *, positive: str, threads: int) -> dict[str, RefinedMask]:
        """The masks of all annotated slides; those of the same annotation stand. An annotation that was corrected is refined again, and
        the change against the mask before it is told, and that against what was proposed. refine.csv lists all, with what could not be
        done and why, and what is worth a look (see `doubt_of`). positive: the label of slides with lesion."""
        annotated = [record for record in records if record.annotation]
        rows: list[dict[str, object]] = []
        with progress(len(annotated), "refining masks", unit="slides") as bar:
            for row in work_ahead(annotated, self._one, threads=threads, ahead=threads, name="refine"):
                rows.append(row)
                bar.update()
        names = (
            "slide_id",
            "mpp",
            "outlined_mm2",
            "kept_mm2",
            "dice",
            "earlier_mm2",
            "dice_with_earlier",
            *_PROPOSED,
            "reason",
            "note",
        )
        for record, row in zip(annotated, rows):
            row["note"] = "" if row["reason"] else doubt_of(record, row, positive)
        write_table(self.folder.parent / "refine.csv", {name: [row.get(name) for row in rows] for name in names})
        for row in rows:
            if row["reason"]:
                print(f"not refined: {row['slide_id']}: {row['reason']}", flush=True)
            if row["note"]:
                print(f"look at: {row['slide_id']}: {row['note']}", flush=True)
        as_proposed = sum(row.get("annotation") == row.get("proposal") for row in rows if row.get("proposal"))
        if as_proposed:
            print(
                f"{as_proposed} of {len(annotated)} annotations are proposals that nobody changed: see that somebody looked at them"
            )
        return self.masks(records)

    def masks(self, records: Sequence[SlideRecord]) -> dict[str, RefinedMask]:
        """The masks that are there for these slides and their annotations as they are."""
        found = {}
        for record in records:
            about = self._about(record)
            if record.annotation and about and about["annotation"] == file_hash(record.annotation):
                found[record.slide_id] = RefinedMask(self._mask(record), float(about["downsample"]))
        return found

    def _one(self, record: SlideRecord) -> dict[str, object]:
        about = self._about(record)
        assert record.annotation is not None
        proposal = self.proposals.get(record.slide_id)
        proposed = None if proposal is None else file_hash(proposal)
        if about and (about["annotation"], about.get("proposal")) == (file_hash(record.annotation), proposed):
            return {**about, "reason": ""}
        try:
            found = refine(record, mpp=self.mpp, mpp_override=self.mpp_override)
            correction = {} if proposal is None else self._correction(record, proposal)
        except (AnnotationError, SlideError, RegionError) as error:
            return {"slide_id": record.slide_id, "reason": str(error)}
        described = {
            "slide_id": record.slide_id,
            "annotation": file_hash(record.annotation),
            "mpp": found.mask.mpp,
            "downsample": found.mask.downsample,
            "outlined_mm2": found.outlined_mm2,
            "kept_mm2": found.kept_mm2,
            "dice": found.dice,
            **(self._change(record, found) if about else {}),
            **correction,
        }
        write_mask(self._mask(record), found.mask.mask)
        write_json(self._mask(record).with_suffix(".json"), described)
        return {**described, "reason": ""}

    def _correction(self, record: SlideRecord, proposal: pathlib.Path) -> dict[str, object]:
        """Area that was proposed, and the Dice coefficient of the two outlines, both before they are cut to the tissue; without it where
        the annotation is a mask image of another scale."""
        masks = []
        for annotation in (proposal, record.annotation):
            found = tumour_mask(
                dataclasses.replace(record, annotation=annotation), mpp=self.mpp, mpp_override=self.mpp_override
            )
            assert found is not None
            masks.append(found)
        before, after = masks
        area = float(before.mask.sum()) * (before.mpp / 1000) ** 2
        dice = _dice(before.mask, after.mask) if before.mask.shape == after.mask.shape else None
        return {"proposal": file_hash(proposal), **dict(zip(_PROPOSED, (area, dice)))}

    def _change(self, record: SlideRecord, found: Refinement) -> dict[str, object]:
        """Area of the mask that was there before, and its Dice coefficient with the one that replaces it."""
        before, after = read_mask(self._mask(record)), found.mask.mask
        if before.shape != after.shape:
            return {}
        return {
            "earlier_mm2": float(before.sum()) * (found.mask.mpp / 1000) ** 2,
            "dice_with_earlier": _dice(before, after),
        }

    def _mask(self, record: SlideRecord) -> pathlib.Path:
        return self.folder / f"{record.slide_id}.tiff"

    def _about(self, record: SlideRecord) -> dict | None:
        file = self._mask(record).with_suffix(".json")
        return json.loads(file.read_text()) if file.exists() else None


def doubt_of(record: SlideRecord, row: Mapping[str, object], positive: str) -> str:
    """Why the annotation of a slide, refined as its row of refine.csv says, may not be what was meant; empty where nothing tells."""
    if not row["kept_mm2"]:
        return "none of its outlines is on stained tissue" if row["outlined_mm2"] else "nothing is outlined"
    if record.label not in (None, positive):
        return f"outlined, but its label is {record.label}: the outlines are ignored, its tiles count as benign"
    return ""


def proposals_of(table: pathlib.Path) -> dict[str, pathlib.Path]:
    """Slide -> file of the column `proposal` of a cohort table, where it has one. Paths are relative to the table's folder."""
    cells = read_columns(table, (PROPOSAL,))
    return {slide_id: table.parent / found[PROPOSAL] for slide_id, found in cells.items() if found.get(PROPOSAL)}


def _dice(one: np.ndarray, other: np.ndarray) -> float:
    """Dice coefficient of two masks bool [H, W]; 1 where both are empty."""
    total = int(one.sum()) + int(other.sum())
    return 2 * int((one & other).sum()) / total if total else 1.0
