"""The folder of proposals: a file for each slide to correct, one as it was proposed, an index, and a cohort table."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from data_pipelines.annotations import write_asap_xml
from data_pipelines.cohort import SlideRecord
from data_pipelines.cohort_rows import COLUMNS
from data_pipelines.contours import Region
from data_pipelines.exports import write_table
from data_pipelines.geojson import region_features, write_geojson
from data_pipelines.polygons import Shape
from experiments.run.screening.refining import PROPOSAL

SUFFIXES = {"geojson": ".geojson", "asap": ".xml"}
_COLOUR = (200, 0, 0)


@dataclasses.dataclass(frozen=True)
class ProposalFolder:
    """annotations/ is for pathologists to correct, proposals/ stays as it was written. format: a key of SUFFIXES."""

    path: pathlib.Path
    format: str

    def write(self, slide_id: str, regions: Sequence[Region], *, offset: tuple[float, float]) -> pathlib.Path:
        """Writes the outlines of a slide twice, in the place of those there were, and returns the file to correct. offset: (x, y) of the
        slide's bounds, from which QuPath counts. FileExistsError where that file was corrected."""
        if self.corrected(slide_id) is not None:
            raise FileExistsError(f"the annotation of {slide_id} was corrected")
        for suffix in SUFFIXES.values():
            for file in reversed(
                self._files(slide_id, suffix)
            ):  # an annotation without its proposal counts as corrected
                file.unlink(missing_ok=True)
        colours = {region.shape.group: _COLOUR for region in regions}
        proposal, annotation = self._files(slide_id, SUFFIXES[self.format])
        for file in (proposal, annotation):
            if self.format == "asap":
                write_asap_xml(file, [_named(region, n) for n, region in enumerate(regions, 1)], colours=colours)
            else:
                features = region_features(regions, slide_id=slide_id, colours=colours, offset=offset)
                write_geojson(file, map(_unlocked, features))
        return annotation

    def corrected(self, slide_id: str) -> pathlib.Path | None:
        """The slide's annotation in either format, if it is another than what was proposed."""
        for suffix in SUFFIXES.values():
            proposal, annotation = self._files(slide_id, suffix)
            as_proposed = proposal.exists() and annotation.exists() and annotation.read_bytes() == proposal.read_bytes()
            if annotation.exists() and not as_proposed:
                return annotation
        return None

    def write_cohort(
        self,
        records: Sequence[SlideRecord],
        annotations: Mapping[str, pathlib.Path],
        more: Mapping[str, Mapping[str, str]],
    ) -> pathlib.Path:
        """cohort.csv: the records, those of `annotations` with the file to correct as annotation, and the proposal beside it. more:
        slide_id -> further columns. Returns its path."""
        names = list(dict.fromkeys(name for cells in more.values() for name in cells))
        columns: dict[str, list[Any]] = {name: [] for name in (*COLUMNS, PROPOSAL, *names)}
        for record in records:
            annotation = annotations.get(record.slide_id)
            values = dataclasses.asdict(record) | {"path": record.path.absolute()}
            if annotation is not None:
                proposal = self.path / "proposals" / annotation.name
                values["annotation"] = annotation.relative_to(self.path)
                values[PROPOSAL] = proposal.relative_to(self.path) if proposal.exists() else None
            elif record.annotation is not None:
                values["annotation"] = record.annotation.absolute()
            values |= more.get(record.slide_id, {})
            for name, column in columns.items():
                column.append(values.get(name))
        write_table(self.path / "cohort.csv", columns)
        return self.path / "cohort.csv"

    def _files(self, slide_id: str, suffix: str) -> tuple[pathlib.Path, pathlib.Path]:
        """The proposal and the file to correct."""
        name = f"{slide_id}{suffix}"
        return self.path / "proposals" / name, self.path / "annotations" / name


def _unlocked(feature: Mapping[str, Any]) -> dict[str, Any]:
    return {**feature, "properties": {**feature["properties"], "isLocked": False}}


def _named(region: Region, number: int) -> Shape:
    """Under a name of its own, by which ASAP files give holes to outlines; they hold no numbers, so that the confidence is part of it."""
    return dataclasses.replace(region.shape, name=f"{number}: {region.shape.name}")
