"""Tile features and scores as HDF5 files in the layouts of CLAM and TRIDENT, written by chunks of rows, and read back.

Both keep two files a slide: where the tiles lie, and their features with the places again. Places are (x, y), the top-left
corner of a tile in level-0 pixels, rounded to int64. Keys and attributes are those that the two tools write and read;
what neither knows (µm per pixel and where it comes from) stands in the attributes of the files as a whole, where it
disturbs no reader.
"""

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from data_pipelines.files import atomic_write
from data_pipelines.tile_table import Grid

CHUNK_ROWS = 256  # ours: 1.3 MB of 1280 float32 features
MAGNIFICATION_MPP = 10.0  # magnification times µm per pixel, as TRIDENT has it: x40 is 0.25


@dataclasses.dataclass(frozen=True, kw_only=True)
class TiledSlide:
    """What the files tell about their slide. width, height: level-0 px; slide_mpp: µm per level-0 px, mpp_source: from where;
    about: further attributes of the files as a whole."""

    slide_id: str
    grid: Grid
    slide_mpp: float
    mpp_source: str
    width: int
    height: int
    about: Mapping[str, str | int] = dataclasses.field(default_factory=dict)

    @property
    def side(self) -> int:
        """A tile's side in level-0 px, rounded."""
        return round(self.grid.tile * self.grid.mpp / self.slide_mpp)


@dataclasses.dataclass(frozen=True)
class StoredTiles:
    """Rows of a file: coords int64 [N, 2] (x, y); columns [N, ...] by name ("features", ...); attributes by dataset.

    The attributes of the file itself are under "".
    """

    coords: np.ndarray
    columns: Mapping[str, np.ndarray]
    attributes: Mapping[str, Mapping[str, Any]]


@contextlib.contextmanager
def write_clam(
    folder: str | os.PathLike[str],
    slide: TiledSlide,
    *,
    features: int,
    scores: Sequence[str] = (),
    dtype: Any = np.float32,
) -> Iterator["TileRows"]:
    """CLAM: patches/<slide>.h5 with coords, h5_files/<slide>.h5 with features [N, features], coords and scores [N, 1].

    Rows are appended in the block; both files take their names when it ends without an error. CLAM reads a tile as
    patch_size pixels of a level: that is level 0 here, so that its field of view is ours. CLAM's heat maps look for
    scores called "attention_scores".
    """
    folder = Path(folder)
    size = np.array([slide.width, slide.height])
    placed = {
        "patch_size": slide.side,
        "patch_level": 0,
        "downsample": np.array([1.0, 1.0]),
        "downsampled_level_dim": size,
        "level_dim": size,
        "name": slide.slide_id,
        "save_path": str(folder / "patches"),
    }
    columns = _columns(features, scores, dtype)
    places, values = clam_files(folder, slide)
    with _create(slide, places, values, columns, {"coords": placed}, {}) as rows:
        yield rows


def clam_files(folder: str | os.PathLike[str], slide: TiledSlide) -> tuple[Path, Path]:
    """The two files that `write_clam` makes: places, features."""
    return Path(folder) / "patches" / f"{slide.slide_id}.h5", Path(folder) / "h5_files" / f"{slide.slide_id}.h5"


@contextlib.contextmanager
def write_trident(
    folder: str | os.PathLike[str],
    slide: TiledSlide,
    *,
    encoder: str,
    features: int,
    scores: Sequence[str] = (),
    dtype: Any = np.float32,
) -> Iterator["TileRows"]:
    """TRIDENT: patches/<slide>_patches.h5 with coords, features_<encoder>/<slide>.h5 with features, coords and scores.

    Both lie below `trident_folder(slide.grid)` in `folder`. Rows are appended in the block; the files take their names
    when it ends without an error. Magnifications are 10 / (µm per pixel): whole numbers only where the µm are such, but
    their ratio, by which TRIDENT finds a tile's side at level 0, is right on every scanner.
    """
    places, values = trident_files(folder, slide, encoder)
    folder = Path(folder) / trident_folder(slide.grid)
    placed = {
        "patch_size": slide.grid.tile,
        "patch_size_level0": slide.side,
        "level0_magnification": _magnification(slide.slide_mpp),
        "target_magnification": _magnification(slide.grid.mpp),
        "overlap": slide.grid.tile - slide.grid.stride,
        "name": slide.slide_id,
        "savetodir": str(folder),
        "level0_width": slide.width,
        "level0_height": slide.height,
    }
    encoded = {"name": slide.slide_id, "savetodir": str(folder / f"features_{encoder}"), "encoder": encoder}
    columns = _columns(features, scores, dtype)
    with _create(slide, places, values, columns, {"coords": placed}, {"coords": placed, "features": encoded}) as rows:
        yield rows


def trident_files(folder: str | os.PathLike[str], slide: TiledSlide, encoder: str) -> tuple[Path, Path]:
    """The two files that `write_trident` makes: places, features."""
    folder = Path(folder) / trident_folder(slide.grid)
    return folder / "patches" / f"{slide.slide_id}_patches.h5", folder / f"features_{encoder}" / f"{slide.slide_id}.h5"


def trident_folder(grid: Grid) -> str:
    """The name that TRIDENT gives to results on this grid: "10x_224px_112px_overlap"."""
    return f"{MAGNIFICATION_MPP / grid.mpp:.4g}x_{grid.tile}px_{grid.tile - grid.stride}px_overlap"


class TileRows:
    """Rows of one slide on the way to its files, a chunk at a time: the bytes do not depend on how they come in batches."""

    def __init__(self, files: Sequence[h5py.File], columns: Mapping[str, "_Column"]):
        self._files, self._columns = files, columns
        self._waiting: dict[str, list[np.ndarray]] = {name: [] for name in columns}
        self._count = 0

    def append(self, coords: np.ndarray, **columns: np.ndarray) -> None:
        """coords [n, 2] (x, y) level-0 px, rounded here; features [n, D] and each score [n].

        Raises ValueError for a column that is missing, unknown or of another shape.
        """
        given = {"coords": np.rint(coords), **columns}
        wanted = {name: (len(coords), *column.shape) for name, column in self._columns.items()}
        given |= {name: values[:, None] for name, values in columns.items() if np.ndim(values) == 1}
        shapes = {name: np.shape(values) for name, values in given.items()}
        if shapes != wanted:
            raise ValueError(f"{self._files[-1].filename}: rows need {wanted}, got {shapes}")
        for name, values in given.items():
            self._waiting[name].append(np.asarray(values, self._columns[name].dtype))
        self._count += len(coords)
        if self._count >= CHUNK_ROWS:
            self._write(self._count - self._count % CHUNK_ROWS)

    def flush(self) -> None:
        """Writes what is left over of whole chunks. Nothing may be appended after it."""
        self._write(self._count)

    def _write(self, count: int) -> None:
        """The first rows that wait, chunk by chunk through all columns, so that chunks always follow in the same order."""
        rows = {name: np.concatenate(parts) for name, parts in self._waiting.items() if parts}
        for first in range(0, count, CHUNK_ROWS):
            for name, values in rows.items():
                self._extend(name, values[first : min(first + CHUNK_ROWS, count)])
        self._waiting = {name: [values[count:].copy()] for name, values in rows.items()}
        self._count -= count

    def _extend(self, name: str, rows: np.ndarray) -> None:
        for file in self._files:
            if name in file:
                stored = file[name]
                stored.resize(len(stored) + len(rows), axis=0)
                stored[-len(rows) :] = rows


def read_tiles(path: str | os.PathLike[str]) -> StoredTiles:
    """A file of either layout, places or features. Raises ValueError naming the file if it is something else."""
    try:
        with h5py.File(path, "r") as file:
            columns = {name: dataset[()] for name, dataset in file.items() if isinstance(dataset, h5py.Dataset)}
            attributes = {name: dict(file[name].attrs) for name in columns} | {"": dict(file.attrs)}
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"{path} is no HDF5 file, or not a whole one ({error}): extract the features again") from error
    coords = columns.pop("coords", None)
    if coords is None or coords.ndim != 2 or coords.shape[1] != 2:
        raise ValueError(f"{path} has no dataset coords [N, 2], as files of CLAM and TRIDENT do")
    if "features" in columns and columns["features"].shape[:1] != coords.shape[:1]:
        raise ValueError(f"{path} has features {list(columns['features'].shape)} for {len(coords)} coords")
    per_tile = {name: values for name, values in columns.items() if values.shape[:1] == coords.shape[:1]}
    return StoredTiles(coords.astype(np.int64), per_tile, attributes)


@dataclasses.dataclass(frozen=True)
class _Column:
    """Shape of a row and type of a dataset."""

    shape: tuple[int, ...]
    dtype: np.dtype


_COORDS = _Column((2,), np.dtype(np.int64))


def _columns(features: int, scores: Sequence[str], dtype: Any) -> dict[str, _Column]:
    single = _Column((1,), np.dtype(np.float32))
    columns = {"coords": _COORDS, "features": _Column((features,), np.dtype(dtype))} | dict.fromkeys(scores, single)
    if len(columns) != 2 + len(scores):
        raise ValueError(f"scores need names of their own, other than coords and features: {list(scores)}")
    return columns


Attributes = Mapping[str, Mapping[str, Any]]  # by dataset


@contextlib.contextmanager
def _create(
    slide: TiledSlide,
    places: Path,
    values: Path,
    columns: Mapping[str, _Column],
    about_places: Attributes,
    about_values: Attributes,
) -> Iterator[TileRows]:
    """The two files of a slide, with empty datasets: coords alone in `places`, all columns in `values`."""
    with atomic_write(places) as part, h5py.File(part, "w") as first:
        _lay_out(first, slide, {"coords": _COORDS}, about_places)
        with atomic_write(values) as other, h5py.File(other, "w") as second:
            _lay_out(second, slide, columns, about_values)
            rows = TileRows([first, second], columns)
            yield rows
            rows.flush()


def _lay_out(file: h5py.File, slide: TiledSlide, columns: Mapping[str, _Column], about: Attributes) -> None:
    file.attrs.update(
        {"mpp": slide.grid.mpp, "slide_mpp": slide.slide_mpp, "mpp_source": slide.mpp_source, **slide.about}
    )
    for name, column in columns.items():
        shape, chunks = (0, *column.shape), (CHUNK_ROWS, *column.shape)
        dataset = file.create_dataset(name, shape, column.dtype, maxshape=(None, *column.shape), chunks=chunks)
        dataset.attrs.update(about.get(name, {}))


def _magnification(mpp: float) -> int | float:
    exact = MAGNIFICATION_MPP / mpp
    return round(exact) if abs(exact - round(exact)) < 1e-9 else exact
