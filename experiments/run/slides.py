"""Which slides a program is given, and the tiles of many in one table; what could not be used is listed with its reason."""

from __future__ import annotations

import collections
import dataclasses
import functools
import pathlib
import struct
import zlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import PIL.Image

from data_pipelines.annotations import AnnotationError
from data_pipelines.cohort import SlideRecord, read_cohort
from data_pipelines.prepare import prepare_slide
from data_pipelines.scan import ScanJob
from data_pipelines.shelf import Shelf
from data_pipelines.slides import RegionError, SlideError, find_slides
from data_pipelines.tiles import Grid, Tiles
from experiments.run.program import UsageError
from experiments.run.progress import progress

NO_TISSUE = "no tile with enough tissue (--min_tissue; for a model that of its training) was found: look at the slide"
NOT_ANNOTATED = (
    "none of its tiles with tissue is annotated: look at its annotation, lower --min_annotated, "
    "or take its tiles from anywhere with --mode=ws --noannotations"
)

# What readers have been seen to raise, or may, on files that nobody thought of. Memory too: one slide's headers may ask for all.
UNEXPECTED = (
    ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, OSError, RuntimeError, TypeError, ValueError,
    struct.error, zlib.error, PIL.Image.DecompressionBombError,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class SlideSet:
    """records [S] that can be used; tiles: the table of all their tiles, slide by slide; slide int [N]: the record of each tile.
    failed: (record, reason) of those that cannot be used."""

    records: tuple[SlideRecord, ...]
    tiles: Tiles
    slide: np.ndarray
    failed: tuple[tuple[SlideRecord, str], ...]

    def rows(self, number: int) -> np.ndarray:
        """Rows of the tiles of record `number`; they follow each other in the table."""
        begin, end = np.searchsorted(self.slide, [number, number + 1])
        return np.arange(begin, end)

    def jobs(self, shelf: Shelf, numbers: Iterable[int], *, allowed: np.ndarray | None = None) -> Iterator[ScanJob]:
        """Scanning jobs for the records `numbers`, over all their tiles or those that `allowed` (bool [N]) admits."""
        for number in numbers:
            rows = self.rows(number)
            rows = rows if allowed is None else rows[allowed[rows]]
            if len(rows):
                lend = functools.partial(shelf.lend, self.records[number].slide_id)
                yield ScanJob(lend, self.tiles.take(rows), rows)


def prepare_slides(
    records: Sequence[SlideRecord],
    grid: Grid,
    *,
    min_tissue: float,
    mpp_override: float | None,
    cache: pathlib.Path,
    annotated: Collection[str] = (),
    min_annotated: float | None = None,
    threads: int = 2,
) -> SlideSet:
    """Opens every slide once and lays its tiles, which are kept in `cache` for the next start.

    annotated: identifiers of the slides whose annotation is read. min_annotated: each of them needs a tile that is annotated
    beyond this share; None: none does.
    A slide that cannot be opened, has no tissue or a wrong annotation is listed in `failed`; the others go on.
    """

    def tiles_of(record: SlideRecord) -> Tiles | str:
        path = cache / f"{record.slide_id}.npz"
        if path.exists():
            return Tiles.load(path)
        read = record.slide_id in annotated
        try:
            prepared = prepare_slide(record, grid, min_tissue=min_tissue, mpp_override=mpp_override, annotated=read)
        except (SlideError, RegionError, AnnotationError) as error:
            return str(error)
        prepared.slide.close()
        if not len(prepared.tiles):
            return NO_TISSUE
        needs = read and min_annotated is not None
        if needs and not (prepared.tiles.annotated > min_annotated).any():
            return NOT_ANNOTATED
        cache.mkdir(parents=True, exist_ok=True)
        prepared.tiles.save(path)
        return prepared.tiles

    found: list[Tiles | str] = []
    with ThreadPoolExecutor(threads) as pool, progress(len(records), "finding tissue", unit="slides") as bar:
        for tiles in pool.map(tiles_of, records):
            found.append(tiles)
            bar.update()
    usable = [(record, tiles) for record, tiles in zip(records, found) if isinstance(tiles, Tiles)]
    failed = tuple((record, reason) for record, reason in zip(records, found) if isinstance(reason, str))
    if not usable:
        raise SlideError(
            f"none of {len(records)} slides can be used; the first: {failed[0][0].slide_id}: {failed[0][1]}"
        )
    slide = np.repeat(np.arange(len(usable)), [len(tiles) for _, tiles in usable])
    return SlideSet(tuple(r for r, _ in usable), Tiles.concatenate([t for _, t in usable]), slide, failed)


def slide_records(slides: str, split: str | None) -> tuple[SlideRecord, ...]:
    """The slides that --slides names, with their labels where it is a cohort table."""
    path = pathlib.Path(slides)
    if path.suffix.lower() == ".csv":
        cohort = read_cohort(path, require_files=False, require_labels=False)
        records = cohort.split(split).records if split else cohort.records
        if not records:
            raise UsageError(
                f"{path} has no slide in the split {split!r}: where training made the splits, they are in its --workdir, "
                "in cohort.csv"
            )
        return records
    if split:
        raise UsageError("--split needs --slides to be a cohort CSV")
    found = find_slides(path)
    names = slide_names(found, path if path.is_dir() else path.parent)
    return tuple(SlideRecord(name, file, None, name) for name, file in zip(names, found))


def slide_names(found: Sequence[pathlib.Path], root: pathlib.Path) -> list[str]:
    """A name for each slide below `root`, which its folder of results gets: that of the file, with the folders above it where two
    would be the same (on any system: capitals do not tell them apart)."""
    names = [path.stem if path.is_file() and path.stem.strip(".") else path.name for path in found]
    times = collections.Counter(name.casefold() for name in names)
    names = [
        name if times[name.casefold()] == 1 else "__".join(path.relative_to(root).parts or (path.name,))
        for name, path in zip(names, found)
    ]
    twice = [name for name, count in collections.Counter(map(str.casefold, names)).items() if count > 1]
    if twice:
        raise UsageError(f"{root}: two slides would be named {twice[0]}: name them in a cohort CSV (slide_id,path)")
    return names
