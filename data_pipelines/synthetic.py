"""Cohorts made here, with known truth: drawn slides, and mosaics of real labelled patches. All as real pyramid files.

A cohort is a folder: `slides/*.tiff`, `annotations/*.xml` (ASAP) for the positive slides, and `cohort.csv`, whose paths are
relative to it. The same seed writes the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np

from data_pipelines.annotations import write_asap_xml
from data_pipelines.cohort import SlideRecord, write_cohort
from data_pipelines.drawing import StampSet, draw_slide
from data_pipelines.files import atomic_write
from data_pipelines.mosaics import MosaicPlan, Patches, draw_mosaic
from data_pipelines.polygons import Shape
from data_pipelines.pyramids import write_pyramid

Counts = Mapping[str, tuple[int, int]]
"""split -> how many positive and negative slides."""

Progress = Callable[[int, int], None]
"""Called with how many are done, of how many."""

DEMO_SLIDES: Counts = MappingProxyType({"train": (6, 8), "validation": (2, 3), "test": (6, 8)})


@dataclass(frozen=True)
class _Task:
    number: int
    split: str
    positive: bool
    slide_id: str


Drawing = tuple[np.ndarray, list[Shape]]  # uint8 [H, W, 3] and what is annotated in it


def drawn_cohort(
    folder: Path | str,
    *,
    slides: Counts = DEMO_SLIDES,
    side_px: int = 3000,
    mpp: float = 0.5,
    seed: int = 0,
    labels: tuple[str, str] = ("srcc", "normal"),
    workers: int = 1,
    progress: Progress | None = None,
) -> Path:
    """Write slides drawn like H&E (see `drawing`), each signet ring cell outlined in group "SRCC"; returns cohort.csv.

    mpp: µm per pixel of level 0; cells keep their size in µm.  labels: of positive and negative slides.
    workers: threads, which do not change the result.
    """
    stamps = StampSet(np.random.default_rng([seed, 0]), mpp)

    def draw(task: _Task) -> Drawing:
        rng = np.random.default_rng([seed, 1, task.number])
        drawn = draw_slide(rng, stamps, side_px=side_px, positive=task.positive)
        outlines = drawn.signet_ring_cells
        return drawn.rgb, [_polygon(outline, f"signet ring cell {i}", "SRCC") for i, outline in enumerate(outlines, 1)]

    return _write(Path(folder), _tasks(slides, labels), draw, labels, mpp, workers, progress)


def mosaic_cohort(
    folder: Path | str,
    *,
    patches: Mapping[str, Patches],
    positive_classes: Sequence[str],
    negative_classes: Sequence[str],
    slides: Counts,
    mpp: float,
    plan: MosaicPlan | None = None,
    seed: int = 0,
    labels: tuple[str, str] = ("tumour", "normal"),
    workers: int = 1,
    progress: Progress | None = None,
) -> Path:
    """Write mosaic slides (see `mosaics`), each tumour patch outlined in the group of the positive label; returns cohort.csv.

    patches: split -> class -> files, as `mosaics.folder_patches` and `mosaics.pcam_patches` collect them; a slide shows only
    patches of its own split, and negative slides none of the positive classes.  mpp: µm per pixel of the slides written.
    Raises ValueError where a split or class has no patches, or a file is in two splits.
    """
    plan = plan or MosaicPlan()
    pools = {split: _pools(patches, split, positive_classes, negative_classes) for split in slides}
    _refuse_shared(pools)

    def draw(task: _Task) -> Drawing:
        rng = np.random.default_rng([seed, 2, task.number])
        mosaic = draw_mosaic(rng, *pools[task.split], tumour=task.positive, plan=plan)
        return mosaic.rgb, [_polygon(corners, name, labels[0]) for name, corners in mosaic.tumour]

    return _write(Path(folder), _tasks(slides, labels), draw, labels, mpp, workers, progress)


def large_slide(
    path: Path | str,
    *,
    side_px: int = 60_000,
    island_px: int = 3072,
    tissue: float = 0.04,
    mpp: float = 0.5,
    seed: int = 0,
    progress: Progress | None = None,
) -> Path:
    """Write one slide of side_px x side_px that is background but for islands of drawn tissue; for measuring memory.

    tissue: about the fraction of its area.  island_px: a multiple of 256, the side of the one island that is drawn; it is laid
    down turned and mirrored, so that no more than rows of tiles are in memory beside it.  progress: called with px, row by row.
    """
    if island_px % 256:
        raise ValueError(f"island_px is {island_px}, not a multiple of 256, the side of the file's tiles")
    rng = np.random.default_rng([seed, 3])
    island = min(island_px, side_px)
    rgb = draw_slide(rng, StampSet(rng, mpp), side_px=island, positive=True).rgb
    red, green, blue = (int(value) for value in np.median(rgb[:8], axis=(0, 1)))
    ways = [np.rot90(rgb, turn)[:, ::mirror] for turn in range(4) for mirror in (1, -1)]
    cells = side_px // island
    share = float((rgb.min(axis=-1) < min(red, green, blue) - 20).mean())
    count = int(np.clip(round(tissue / share * (side_px / island) ** 2), 1, cells**2))
    places = {int(place): ways[rng.integers(8)] for place in rng.permutation(cells**2)[:count]}

    def block(x: int, y: int, width: int, height: int) -> np.ndarray | None:
        if progress and not x:
            progress(y + height, side_px)
        row, column = y // island, x // island
        pixels = places.get(row * cells + column) if max(row, column) < cells else None
        if pixels is None:
            return None
        top, left = y - row * island, x - column * island
        return pixels[top : top + height, left : left + width]

    return write_pyramid(path, block, shape=(side_px, side_px), mpp=mpp, background=(red, green, blue))


def _tasks(slides: Counts, labels: tuple[str, str]) -> list[_Task]:
    kinds = [
        (split, kind, place)
        for split, counts in slides.items()
        for kind, count in enumerate(counts)
        for place in range(1, count + 1)
    ]
    if not kinds:
        raise ValueError(
            f"no slides asked for: {dict(slides)}; give each split its number of positive and negative ones"
        )
    return [
        _Task(number, split, kind == 0, f"{split}_{labels[kind]}_{place:03d}")
        for number, (split, kind, place) in enumerate(kinds)
    ]


def _write(
    folder: Path,
    tasks: list[_Task],
    draw: Callable[[_Task], Drawing],
    labels: tuple[str, str],
    mpp: float,
    workers: int,
    progress: Progress | None,
) -> Path:
    """Draw and write every slide, then the table: a folder with a cohort.csv is complete."""

    def write(task: _Task) -> SlideRecord:
        rgb, shapes = draw(task)
        slide, annotation = folder / "slides" / f"{task.slide_id}.tiff", None
        with atomic_write(slide) as part:
            write_pyramid(part, rgb, mpp=mpp)
        if task.positive:
            annotation = folder / "annotations" / f"{task.slide_id}.xml"
            write_asap_xml(annotation, shapes)
        label, patient = labels[not task.positive], f"P{task.number:04d}"
        return SlideRecord(task.slide_id, slide, label, patient, task.split, float(mpp), annotation)

    records = []
    with ThreadPoolExecutor(workers) as pool:
        for record in pool.map(write, tasks):
            records.append(record)
            if progress:
                progress(len(records), len(tasks))
    write_cohort(folder / "cohort.csv", records)
    return folder / "cohort.csv"


def _polygon(exterior: np.ndarray, name: str, group: str) -> Shape:
    return Shape(kind="polygon", exterior=exterior, name=name, group=group)


def _pools(
    patches: Mapping[str, Patches], split: str, positive: Sequence[str], negative: Sequence[str]
) -> tuple[Patches, Patches]:
    if set(positive) & set(negative) or not positive or not negative:
        raise ValueError(f"classes {list(positive)} and {list(negative)}: give both, and no class twice")
    missing = [name for name in (*positive, *negative) if not patches.get(split, {}).get(name)]
    if missing:
        raise ValueError(f"the split {split!r} has no patches of {missing}; it has {sorted(patches.get(split, {}))}")
    return {name: patches[split][name] for name in positive}, {name: patches[split][name] for name in negative}


def _refuse_shared(pools: Mapping[str, tuple[Patches, Patches]]) -> None:
    owner: dict[Path, str] = {}
    for split, both in pools.items():
        for path in (path for classes in both for paths in classes.values() for path in paths):
            if owner.setdefault(path.resolve(), split) != split:
                raise ValueError(
                    f"{path} is in the splits {owner[path.resolve()]!r} and {split!r}; a patch belongs to one"
                )
