"""What is kept of each slide between starts: its row, what the row rests on, and where its files stand.

out/slides/<slide_id>/            results, for users
out/state/<slide_id>/state.json   the row of slides.csv and its basis
                     scores.npz   the journal: scores of the tiles so far
                     claim.<n>    who is at work on it (--claim)
out/errors/<slide_id>.txt         traceback of an error that no reader announces
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import time
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import numpy as np

from data_pipelines.cohort import SlideRecord
from data_pipelines.exports import write_json
from data_pipelines.prepare import TISSUE_MPP, PreparedSlide, prepare_slide
from data_pipelines.scan import ScanShape
from data_pipelines.tiles import Grid
from experiments.run.slide_result import SlideResult
from srcc_jax.models.architecture import Architecture

VERSION = 1  # of the way in which results are made: a higher number makes those of older programs again
UNFINISHED = ".outputs."  # how the names of folders begin that are being filled in a slide's state folder


@dataclasses.dataclass(frozen=True, kw_only=True)
class TileSettings:
    """What the results of every slide rest on, whatever is made of it, and nothing else. files_alone: names in the basis of what
    the files of a slide rest on, but not the scores of its tiles."""

    files_alone: ClassVar[tuple[str, ...]] = ()
    grid: Grid
    min_tissue: float
    mpp_override: float | None
    model: str  # `model_hash`

    @property
    def shape(self) -> ScanShape:
        """Of the batches in which tiles are scored."""
        return ScanShape.of(self.grid)

    @property
    def digest(self) -> str:
        """16 hexadecimal digits for all but the model."""
        values = {**dataclasses.asdict(self), "model": None, "version": VERSION, "tissue": TISSUE_MPP}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]

    def prepare(self, record: SlideRecord) -> PreparedSlide:
        """The open slide with its tissue and its tiles. Raises SlideError or RegionError."""
        return prepare_slide(record, self.grid, min_tissue=self.min_tissue, mpp_override=self.mpp_override)

    def basis(self, record: SlideRecord) -> dict[str, Any]:
        """Name -> value of everything that the slide's results rest on, but for its scale, which is known once it is open."""
        return {
            "slide file": file_identity(record.path),
            "model": self.model,
            "tile": self.grid.tile,
            "stride": self.grid.stride,
            "µm per pixel": self.grid.mpp,
            "flush": self.grid.flush,
            "min_tissue": self.min_tissue,
            "tissue µm per pixel": TISSUE_MPP,
            "version": VERSION,
        }

    def scores_basis(self, basis: Mapping[str, Any], slide_mpp: float) -> dict[str, Any]:
        """The part that the scores of the tiles rest on, with the slide's scale."""
        return {
            **{name: value for name, value in basis.items() if name not in self.files_alone},
            "slide mpp": slide_mpp,
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(TileSettings):
    """What predictions of a slide classifier rest on."""

    files_alone = ("Grad-CAM", "formats", "thresholds")
    cam: bool
    formats: tuple[str, ...]
    thresholds: tuple[float, ...]

    def basis(self, record: SlideRecord) -> dict[str, Any]:
        return super().basis(record) | {
            "Grad-CAM": self.cam,
            "formats": ",".join(self.formats),
            "thresholds": ",".join(map(str, self.thresholds)),
        }


def model_hash(architecture: Architecture, variables: Mapping[str, Any], *others: Architecture) -> str:
    """16 hexadecimal digits for the network, others whose weights are among the variables, and the weights."""
    digest = hashlib.sha256()
    for network in (architecture, *others):
        digest.update(json.dumps(network.as_dict(), sort_keys=True).encode())
    for path, leaf in jax.tree_util.tree_flatten_with_path(variables)[0]:
        array = np.ascontiguousarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()[:16]


def file_identity(path: pathlib.Path) -> str | None:
    """Number, bytes and time of the latest change of the slide's files (with the folder of an .mrxs file); None: not there."""
    try:
        folders = [path] if path.is_dir() else [path.with_suffix("")] if path.suffix.lower() == ".mrxs" else []
        files = [file for folder in folders for file in sorted(folder.glob("*")) if file.is_file()]
        found = [file.stat() for file in files + [path] * path.is_file()]
    except OSError:
        return None
    if not found:
        return None
    return f"{len(found)} files, {sum(s.st_size for s in found)} bytes, {max(s.st_mtime_ns for s in found)} ns"


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the files of one slide stand below `out`."""

    out: pathlib.Path
    slide_id: str

    @property
    def outputs(self) -> pathlib.Path:
        return self.out / "slides" / self.slide_id

    @property
    def folder(self) -> pathlib.Path:
        return self.out / "state" / self.slide_id

    @property
    def state(self) -> pathlib.Path:
        return self.folder / "state.json"

    @property
    def scores(self) -> pathlib.Path:
        return self.folder / "scores.npz"

    @property
    def traceback(self) -> pathlib.Path:
        return self.out / "errors" / f"{self.slide_id}.txt"


@dataclasses.dataclass(frozen=True)
class SlideState:
    """The end of one slide: its row, the basis it rests on, and when that was (seconds since 1970)."""

    result: SlideResult
    basis: Mapping[str, Any]
    time: float

    def save(self, place: Place) -> None:
        write_json(place.state, self)

    @classmethod
    def load(cls, place: Place) -> SlideState | None:
        """None where there is none that this version can read: the slide is then done again."""
        try:
            values = json.loads(place.state.read_text())
            return cls(SlideResult(**values["result"]), values["basis"], values["time"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None

    @classmethod
    def now(cls, result: SlideResult, basis: Mapping[str, Any]) -> SlideState:
        return cls(result, basis, time.time())

    def changes(self, record: SlideRecord, settings: TileSettings) -> list[str]:
        """What the results rest on and is another now, in words; empty: they hold. Results outlive their slide's file."""
        basis = settings.basis(record)
        gone = basis["slide file"] is None
        names = [name for name in basis if not (gone and name == "slide file")]
        changed = [
            name if name == "slide file" else f"{name} ({self.basis.get(name)}, now {basis[name]})"
            for name in names
            if self.basis.get(name) != basis[name]
        ]
        scale = {"cohort": record.mpp, "flag": settings.mpp_override if record.mpp is None else None}
        given = scale.get(self.result.mpp_source, self.result.mpp)
        return changed if given == self.result.mpp else [*changed, f"mpp ({self.result.mpp}, now {given})"]
