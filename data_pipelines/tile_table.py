"""The Tiles table: where a model looks on its slides; filtered, joined, cut into super-tiles, saved and loaded."""

import csv
import dataclasses
import functools
import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from data_pipelines.files import atomic_write

SLACK_PX = 0.01  # model pixels by which the last tile may pass the slide's edge: rounding of the scale
FORMAT = "srcc_jax tiles 1"
FIELDS = {  # the fixed columns, one value per tile
    "slide": np.int32,
    "i": np.int32,
    "j": np.int32,
    "u": np.int32,
    "v": np.int32,
    "x": np.float64,
    "y": np.float64,
    "side": np.float64,
    "tissue": np.float32,
    "annotated": np.float32,
}


class TilesError(ValueError):
    """A tile table that cannot be read, or tables that do not fit each other."""


@dataclasses.dataclass(frozen=True)
class Grid:
    """Where tiles lie on any slide: squares of `tile` pixels every `stride` pixels, at `mpp` µm per pixel.

    The first tile starts at the slide's corner.  Without `flush`, as in the papers, tiles never pass the far edges, and a
    strip narrower than a stride stays uncovered at the right and at the bottom.  With it a last tile ends flush with each
    edge (methods on whole small crops need that).  A side shorter than a tile has one tile, which passes the edge.
    """

    tile: int
    stride: int
    mpp: float
    flush: bool = False

    def __post_init__(self) -> None:
        if self.tile < 1 or self.stride < 1 or not (np.isfinite(self.mpp) and self.mpp > 0):
            raise ValueError(f"a grid needs tile >= 1 px, stride >= 1 px and mpp > 0 µm per pixel, not {self}")

    def positions(self, length_px: float) -> np.ndarray:
        """Starts of the tiles along an axis of this length, in pixels at `mpp`: int32, ascending, at least one."""
        last = max(int(np.floor(length_px + SLACK_PX)) - self.tile, 0)
        starts = np.arange(0, last + 1, self.stride, dtype=np.int32)
        return np.append(starts, np.int32(last)) if self.flush and starts[-1] < last else starts


@dataclasses.dataclass(frozen=True, eq=False)
class Tiles:
    """N tiles of one or more slides on one grid, as a struct of arrays. Never changed in place.

    slides: names [S] of the slides, slide: int32 [N] index into them (slide_id spells it out).
    i, j: int32 [N] row and column in the grid; u, v: int32 [N] left and top in model pixels (at grid.mpp, from the slide's
    corner); x, y: float64 [N] the same in level-0 pixels; side: float64 [N] a tile's side in level-0 pixels.
    tissue, annotated: float32 [N], fractions of the tile's area.  columns: further arrays [N] by name.
    """

    grid: Grid
    slides: np.ndarray
    slide: np.ndarray
    i: np.ndarray
    j: np.ndarray
    u: np.ndarray
    v: np.ndarray
    x: np.ndarray
    y: np.ndarray
    side: np.ndarray
    tissue: np.ndarray
    annotated: np.ndarray
    columns: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        arrays = {name: getattr(self, name) for name in FIELDS} | dict(self.columns)
        wrong = {name: np.shape(values) for name, values in arrays.items() if np.shape(values) != (len(self),)}
        if wrong:
            raise TilesError(f"every column needs one value per tile, [{len(self)}], not {wrong}")
        kinds = {name: str(values.dtype) for name, values in arrays.items() if values.dtype.kind not in "biufU"}
        if kinds:
            raise TilesError(f"a column holds numbers, truth values or text, not {kinds}")

    def __len__(self) -> int:
        return len(self.slide)

    @functools.cached_property
    def slide_id(self) -> np.ndarray:
        """Name of each tile's slide: str [N]. (Of one tile: slides[slide[row]].)"""
        return self.slides[self.slide]

    @property
    def mpp(self) -> float:
        """µm per model pixel."""
        return self.grid.mpp

    @property
    def tile(self) -> int:
        """A tile's side in model pixels."""
        return self.grid.tile

    @property
    def stride(self) -> int:
        """Distance of neighbouring tiles in model pixels."""
        return self.grid.stride

    def take(self, rows: np.ndarray | Sequence[int]) -> Self:
        """The tiles at these rows, in this order."""
        rows = np.asarray(rows, np.int64)
        arrays: dict[str, Any] = {name: getattr(self, name)[rows] for name in FIELDS}
        return dataclasses.replace(self, **arrays, columns={k: values[rows] for k, values in self.columns.items()})

    def where(self, mask: np.ndarray) -> Self:
        """The tiles for which mask, bool [N], is true."""
        mask = np.asarray(mask)
        if mask.dtype != bool or mask.shape != (len(self),):
            raise TilesError(f"a filter needs bool [{len(self)}], not {mask.dtype} {list(mask.shape)}")
        return self.take(np.flatnonzero(mask))

    def with_column(self, name: str, values: np.ndarray | Sequence[Any]) -> Self:
        """The same tiles with a further column [N], or another version of it."""
        if name in FIELDS or name == "slide_id":
            raise TilesError(f"{name!r} is a fixed column of every tile table: choose another name")
        return dataclasses.replace(self, columns={**self.columns, name: np.asarray(values)})

    def join(self, other: "Tiles") -> Self:
        """These tiles with the further columns of another table of the same grid, matched by slide and place.

        Raises TilesError where the other table lacks one of these tiles, or holds one twice.
        """
        self._check_grid(other)
        _, codes = np.unique(np.concatenate([self.slides, other.slides]), return_inverse=True)
        mine = _keys(codes[: len(self.slides)][self.slide], self)
        theirs = _keys(codes[len(self.slides) :][other.slide], other)
        order = np.argsort(theirs, kind="stable")
        if len(np.unique(theirs)) < len(theirs):
            raise TilesError("the table to join holds some tiles more than once")
        found = np.minimum(np.searchsorted(theirs[order], mine), max(len(theirs) - 1, 0))
        missing = len(mine) if not len(theirs) else int((theirs[order][found] != mine).sum())
        if missing:
            raise TilesError(f"the table to join lacks {missing} of {len(mine)} tiles")
        rows = order[found]
        return dataclasses.replace(self, columns={**self.columns, **{k: v[rows] for k, v in other.columns.items()}})

    @staticmethod
    def concatenate(tables: Sequence["Tiles"]) -> "Tiles":
        """All tiles of tables with the same grid and the same columns, in order."""
        if not tables:
            raise TilesError("nothing to concatenate")
        for table in tables[1:]:
            tables[0]._check_grid(table)
            if set(table.columns) != set(tables[0].columns):
                raise TilesError(f"columns differ: {sorted(tables[0].columns)} and {sorted(table.columns)}")
        names = list(dict.fromkeys(name for table in tables for name in table.slides.tolist()))
        code = {name: index for index, name in enumerate(names)}
        slide = [np.array([code[name] for name in table.slides.tolist()], np.int32)[table.slide] for table in tables]
        arrays: dict[str, Any] = {k: np.concatenate([getattr(table, k) for table in tables]) for k in FIELDS}
        arrays["slide"] = np.concatenate(slide)
        columns = {k: np.concatenate([table.columns[k] for table in tables]) for k in tables[0].columns}
        return Tiles(tables[0].grid, np.array(names, np.str_), **arrays, columns=columns)

    def blocks(self, size: int = 8) -> list[np.ndarray]:
        """Super-tiles: the rows (int64, ascending) of the tiles in each block of size x size grid places of a slide.

        By slide, then block by block along the grid's rows. The tiles of a block lie within (size - 1) * stride + tile model
        pixels in u and in v, flush ones too.
        """
        if not len(self):
            return []
        row, column = self.i // size, self.j // size
        order = np.lexsort([column, row, self.slide])
        keys = np.stack([self.slide, row, column])[:, order]
        begins = np.flatnonzero(np.any(keys[:, 1:] != keys[:, :-1], axis=0)) + 1
        return np.split(order, begins)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes .npz or .csv; both come back exactly as they were. The file appears whole or not at all.

        The first line of a .csv is a comment with the grid and the types: pandas reads it with comment="#".
        """
        path = Path(path)
        header = {"format": FORMAT, "grid": dataclasses.asdict(self.grid)}
        if path.suffix == ".npz":
            arrays: dict[str, Any] = {name: getattr(self, name) for name in ("slides", *FIELDS)}
            arrays |= {f"column:{name}": values for name, values in self.columns.items()}
            with atomic_write(path) as part, open(part, "wb") as file:
                np.savez_compressed(file, header=json.dumps(header), **arrays)
        elif path.suffix == ".csv":
            header |= {"slides": self.slides.tolist(), "types": {k: v.dtype.str for k, v in self.columns.items()}}
            table = {"slide_id": self.slide_id} | {name: getattr(self, name) for name in FIELDS if name != "slide"}
            table |= self.columns
            with atomic_write(path) as part, open(part, "w", encoding="utf-8", newline="") as file:
                file.write(f"# {json.dumps(header)}\n")
                writer = csv.writer(file, lineterminator="\n")
                writer.writerow(table)
                writer.writerows(zip(*(_as_text(values) for values in table.values())))
        else:
            raise TilesError(f"{path}: a tile table is saved as .npz or .csv")

    @staticmethod
    def load(path: str | os.PathLike[str]) -> "Tiles":
        """A table that `save` wrote. Raises TilesError for any other file, OSError where it cannot be read."""
        path = Path(path)
        try:
            if path.suffix == ".npz":
                return _load_npz(path)
            if path.suffix == ".csv":
                return _load_csv(path)
        except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise TilesError(f"{path}: not a tile table as Tiles.save writes it ({error})") from error
        raise TilesError(f"{path}: a tile table ends in .npz or .csv")

    def _check_grid(self, other: "Tiles") -> None:
        if self.grid != other.grid:
            raise TilesError(f"the tables lie on different grids: {self.grid} and {other.grid}")


def _keys(slide: np.ndarray, tiles: Tiles) -> np.ndarray:
    """One int64 per tile for slide, row and column (each below 2^21)."""
    return (slide.astype(np.int64) << 42) | (tiles.i.astype(np.int64) << 21) | tiles.j


def _as_text(values: np.ndarray) -> list[str]:
    """The shortest text that reads back as the same value; truth values as 0 and 1."""
    return (values.astype(np.int8) if values.dtype == bool else values).astype(np.str_).tolist()


def _from_text(values: Sequence[str], dtype: np.dtype) -> np.ndarray:
    text = np.array(values, np.str_)
    return text.astype(np.int8).astype(bool) if dtype.kind == "b" else text.astype(dtype)


def _grid(header: dict[str, Any]) -> Grid:
    if header["format"] != FORMAT:
        raise ValueError(f"format {header['format']!r}, readable is {FORMAT!r}")
    return Grid(**header["grid"])


def _load_npz(path: Path) -> Tiles:
    with np.load(path, allow_pickle=False) as found:
        columns = {name.removeprefix("column:"): found[name] for name in found if name.startswith("column:")}
        arrays: dict[str, Any] = {name: found[name] for name in ("slides", *FIELDS)}
        return Tiles(_grid(json.loads(str(found["header"]))), **arrays, columns=columns)


def _load_csv(path: Path) -> Tiles:
    with open(path, encoding="utf-8", newline="") as file:
        header = json.loads(file.readline().removeprefix("#"))
        names, *rows = csv.reader(file)
    table = dict(zip(names, zip(*rows) if rows else [()] * len(names), strict=True))
    slides = np.array(header["slides"], np.str_)
    code = {name: index for index, name in enumerate(header["slides"])}
    arrays: dict[str, Any] = {k: _from_text(table[k], np.dtype(dtype)) for k, dtype in FIELDS.items() if k != "slide"}
    arrays["slide"] = np.array([code[name] for name in table["slide_id"]], np.int32)
    columns = {name: _from_text(table[name], np.dtype(kind)) for name, kind in header["types"].items()}
    return Tiles(_grid(header), slides, **arrays, columns=columns)
