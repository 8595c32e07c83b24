"""Tiles known negative, to be searched: patches in files, or the tiles of slides; their features, and the files of those that are mined."""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import jax
import numpy as np

from data_pipelines.exports import write_image
from data_pipelines.patches import Patches, PatchReader
from data_pipelines.scan import ScanShape, prefetch, scan
from data_pipelines.shelf import Shelf
from experiments.run.mining.features import Part
from experiments.run.patch_training import PatchTrainer
from experiments.run.scoring import TileScorer, classifier_scorer
from experiments.run.slides import SlideSet
from srcc_jax.models.architecture import Architecture
from srcc_jax.parallel import make_mesh

NEGATIVE = "negative"  # the label of tiles that are known negative
PART_PATCHES = 4096  # ours: after so many patches, or slides, their features are kept for a restart
PART_SLIDES = 8
_KEPT = 0  # purpose that a seed is folded with


class WeakSet(Protocol):
    """M tiles. digest: changes with what they are. parts: rows int [m] each, together all M in order, after each of which features
    may be kept."""

    @property
    def digest(self) -> str: ...

    @property
    def parts(self) -> list[np.ndarray]: ...

    def __len__(self) -> int: ...

    def shared_with(self, patches: Patches) -> np.ndarray:
        """bool [M]: tiles of a patient, a slide or a file that patches are of, too."""

    def features(self, variables: Mapping[str, Any], rows: np.ndarray) -> Iterator[Part]:
        """Pooled features of the tiles of a part, a batch at a time; tiles that cannot be read are left out."""

    def places(self, rows: np.ndarray) -> dict[str, list]:
        """Where tiles are, as columns of a table: slide_id, x, y (level-0 px), path; "" where there is no such thing."""

    def files(self, rows: np.ndarray, folder: pathlib.Path) -> Patches:
        """The tiles as patches in files, in this order, without label and split; those of slides are cut into the folder."""


@dataclasses.dataclass(frozen=True, eq=False)
class WeakPatches:
    """Patches in files, resized to `side` px."""

    patches: Patches
    trainer: PatchTrainer
    side: int

    def __len__(self) -> int:
        return len(self.patches)

    @property
    def digest(self) -> str:
        return self.patches.digest()

    def shared_with(self, patches: Patches) -> np.ndarray:
        files = {path.resolve() for path in patches.path}
        same_file = np.array([path.resolve() in files for path in self.patches.path])
        return same_file | _same_owner(self.patches.slide_id, self.patches.patient_id, patches)

    @property
    def parts(self) -> list[np.ndarray]:
        return np.split(np.arange(len(self)), np.arange(PART_PATCHES, len(self), PART_PATCHES))

    def features(self, variables: Mapping[str, Any], rows: np.ndarray) -> Iterator[Part]:
        reader = PatchReader(self.patches, np.zeros(len(self), np.float32), self.side)
        for found in self.trainer.outputs(variables, reader, rows):
            yield Part(found.row, found.features)

    def places(self, rows: np.ndarray) -> dict[str, list]:
        return {
            "slide_id": self.patches.slide_id[rows].tolist(),
            "x": [None] * len(rows),
            "y": [None] * len(rows),
            "path": [str(self.patches.path[row]) for row in rows],
        }

    def files(self, rows: np.ndarray, folder: pathlib.Path) -> Patches:
        return self.patches.take(rows)


class WeakSlides:
    """The tiles of slides on a grid without overlap, of each slide the share that a seed keeps. Compiles one inference."""

    def __init__(
        self, slides: SlideSet, shelf: Shelf, architecture: Architecture, *, share: float, seed: int, threads: int
    ):
        self.kept = np.flatnonzero(kept_tiles(slides, share=share, seed=seed))
        self._slides, self._shelf, self._threads = slides, shelf, threads
        self._scorer: TileScorer = classifier_scorer(
            architecture,
            tile=slides.tiles.tile,
            mesh=make_mesh(jax.local_devices()),
            cam=False,
            logit=False,
            pooling="mean",
        )

    def __len__(self) -> int:
        return len(self.kept)

    @property
    def digest(self) -> str:
        tiles = self._slides.tiles.take(self.kept)
        digest = hashlib.sha256("\n".join(tiles.slides).encode())
        for column in (tiles.slide, tiles.u, tiles.v):
            digest.update(np.ascontiguousarray(column).data)
        return digest.hexdigest()[:16]

    def shared_with(self, patches: Patches) -> np.ndarray:
        records = self._slides.records
        slide_id, patient_id = np.array([[record.slide_id, record.patient_id] for record in records]).T
        return _same_owner(slide_id, patient_id, patches)[self._slides.slide[self.kept]]

    @property
    def parts(self) -> list[np.ndarray]:
        number = self._slides.slide[self.kept]
        begins = np.arange(PART_SLIDES, len(self._slides.records), PART_SLIDES)
        return np.split(np.arange(len(self)), np.searchsorted(number, begins))

    def features(self, variables: Mapping[str, Any], rows: np.ndarray) -> Iterator[Part]:
        allowed = np.zeros(len(self._slides.tiles), bool)
        allowed[self.kept[rows]] = True
        numbers = np.unique(self._slides.slide[self.kept[rows]])
        jobs = self._slides.jobs(self._shelf, numbers, allowed=allowed)
        batches = prefetch(scan(jobs, ScanShape.of(self._slides.tiles.grid), threads=self._threads))
        for scored in self._scorer.score(self._scorer.fold(variables), batches):
            yield Part(np.searchsorted(self.kept, scored.row), scored.outputs["features"])

    def places(self, rows: np.ndarray) -> dict[str, list]:
        tiles = self._slides.tiles.take(self.kept[rows])
        records = [self._slides.records[number] for number in self._slides.slide[self.kept[rows]]]
        return {
            "slide_id": tiles.slide_id.tolist(),
            "x": tiles.x.tolist(),
            "y": tiles.y.tolist(),
            "path": [str(record.path) for record in records],
        }

    def files(self, rows: np.ndarray, folder: pathlib.Path) -> Patches:
        tiles, records = self._slides.tiles.take(self.kept[rows]), self._slides.records
        numbers = self._slides.slide[self.kept[rows]]
        found = []
        for name, x, y in zip(tiles.slide_id, tiles.x, tiles.y):
            file = folder / f"{name}_{x:.0f}_{y:.0f}.png"
            if not file.exists():
                with self._shelf.lend(str(name)) as slide:
                    write_image(file, slide.read(x, y, tiles.tile, tiles.tile, tiles.mpp))
            found.append(file)
        patient, unknown = np.array([records[number].patient_id for number in numbers], np.str_), np.full(len(rows), "")
        return Patches(tuple(found), unknown, tiles.slide_id, patient, unknown)


def _same_owner(slide_id: np.ndarray, patient_id: np.ndarray, patches: Patches) -> np.ndarray:
    """bool [M]: whether one of the patches is of the same slide or patient; "" is of none."""
    known = [
        np.isin(ours, theirs) & (ours != "")
        for ours, theirs in ((slide_id, patches.slide_id), (patient_id, patches.patient_id))
    ]
    return known[0] | known[1]


def kept_tiles(slides: SlideSet, *, share: float, seed: int) -> np.ndarray:
    """bool [N]: tiles that are kept, of each slide this share, at least one; a slide's do not depend on the other slides."""
    kept = np.zeros(len(slides.tiles), bool)
    for number, record in enumerate(slides.records):
        rows = slides.rows(number)
        random = np.random.default_rng([seed, _KEPT, zlib.crc32(record.slide_id.encode())])
        kept[random.permutation(rows)[: max(1, round(share * len(rows)))]] = True
    return kept
