"""Shapes in level-0 pixels, and their rasters on any grid of cells."""

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Literal

import numpy as np

# Camelyon16's names for what is cut out of the other groups: holes in a tumour, and regions that nobody judged.
EXCLUSION_GROUPS = frozenset({"_2", "Exclusion"})
CELLS_AT_ONCE = 1 << 22  # cells of one batch of rings
PAIRS_AT_ONCE = 1 << 17  # (edge, row) pairs of one vectorised step: they stay in the cache
HAIR = 1e-9  # an overlap narrower than this many cells is rounding

Rule = Literal["centre", "touched", "whole"]
Window = tuple[slice, slice]  # rows and columns of a mask


@dataclasses.dataclass(frozen=True, eq=False)
class Shape:
    """One annotated object, in level-0 pixels.

    exterior [n, 2] float64 (x, y): the ring of a polygon (not closed: the last vertex joins the first), the four corners of
    a box, or the one place of a point.  holes: rings [m, 2] that are not part of it.  A ring that crosses itself is filled
    by the even-odd rule.  name: of this object; group: its class or layer; score: the confidence of a predicted object.
    """

    kind: Literal["polygon", "box", "point"]
    exterior: np.ndarray
    holes: tuple[np.ndarray, ...] = ()
    name: str = ""
    group: str = ""
    score: float | None = None

    def __post_init__(self) -> None:
        for ring in (self.exterior, *self.holes):
            if ring.ndim != 2 or ring.shape[1] != 2 or not len(ring):
                raise ValueError(f"a shape needs vertices [n, 2] in (x, y) and at least one, not {list(ring.shape)}")

    @property
    def bounds(self) -> tuple[float, float, float, float]:
        """(x0, y0, x1, y1), level-0 pixels."""
        (x0, y0), (x1, y1) = self.exterior.min(axis=0), self.exterior.max(axis=0)
        return float(x0), float(y0), float(x1), float(y1)


def bounding_box(shapes: Sequence[Shape]) -> tuple[float, float, float, float]:
    """(x0, y0, x1, y1) around all shapes (at least one), level-0 pixels."""
    bounds = np.array([shape.bounds for shape in shapes])
    x0, y0 = bounds[:, :2].min(axis=0)
    x1, y1 = bounds[:, 2:].max(axis=0)
    return float(x0), float(y0), float(x1), float(y1)


def rasterize(
    shapes: Iterable[Shape],
    *,
    width: int,
    height: int,
    downsample: float,
    origin: tuple[float, float] = (0.0, 0.0),
    groups: Collection[str] | None = None,
    exclude: Collection[str] = EXCLUSION_GROUPS,
    touched: bool = False,
) -> np.ndarray:
    """The cells that the shapes cover: bool [height, width].

    A cell is a square of `downsample` level-0 pixels, the first one's corner at `origin`.  By default a cell is covered when
    its centre lies inside a shape, so that neighbours with a common edge share no cell, and points cover nothing.  With
    `touched` any overlap counts, so that no shape vanishes because it is smaller than a cell; a point covers the cell it lies
    in, and a cell that is partly hole stays.  Holes are cut from their own shape.  groups: only these are drawn (None: all);
    what belongs to a group of `exclude` is cut from all that is drawn.
    """
    mask = np.zeros((height, width), bool)
    drawn: list[Shape] = []
    cut: list[Shape] = []
    for shape in shapes:
        if shape.group in exclude:
            cut.append(shape)
        elif groups is None or shape.group in groups:
            drawn.append(shape)
    for window, covered in _covers(drawn, mask.shape, downsample, origin, "touched" if touched else "centre"):
        mask[window] |= covered
    if touched:
        _mark_points(mask, drawn, downsample, origin)
    for window, covered in _covers(cut, mask.shape, downsample, origin, "whole" if touched else "centre"):
        mask[window] &= ~covered
    return mask


def _mark_points(mask: np.ndarray, shapes: Iterable[Shape], downsample: float, origin: tuple[float, float]) -> None:
    points = [shape.exterior for shape in shapes if shape.kind == "point"]
    if points:
        columns, rows = np.floor((np.concatenate(points) - origin) / downsample).astype(np.int64).T
        inside = (rows >= 0) & (rows < mask.shape[0]) & (columns >= 0) & (columns < mask.shape[1])
        mask[rows[inside], columns[inside]] = True


def _covers(
    shapes: Iterable[Shape], size: tuple[int, ...], downsample: float, origin: tuple[float, float], rule: Rule
) -> Iterator[tuple[Window, np.ndarray]]:
    """For each shape with an area: the window of the mask [size] it reaches, and the cells there that it covers."""
    areas = [shape for shape in shapes if shape.kind != "point"]
    if not areas:
        return
    rings = _Rings([(shape.exterior, *shape.holes) for shape in areas], size, downsample, origin)
    opposite: dict[Rule, Rule] = {"centre": "centre", "touched": "whole", "whole": "touched"}
    fills = rings.fills(outlines=rule != "centre")
    for shape in areas:
        window, fill = next(fills)
        covered = fill[rule]
        for _ in shape.holes:
            part, fill = next(fills)
            covered[_inner(part, window)] &= ~fill[opposite[rule]]
        yield window, covered


def _inner(part: Window, window: Window) -> Window:
    """The part of a mask, seen from the corner of the window that contains it."""
    (rows, columns), (top, left) = part, (window[0].start, window[1].start)
    return slice(rows.start - top, rows.stop - top), slice(columns.start - left, columns.stop - left)


class _Rings:
    """All rings of some shapes, filled in batches: many small rings cost no more than one with as many vertices.

    vertices [V, 2] (x, y) in cells; lengths [R]; top, left, height, width [R]: the window of each ring in the mask, that of
    a hole inside its exterior's.
    """

    def __init__(
        self,
        shapes: Sequence[Sequence[np.ndarray]],
        size: tuple[int, ...],
        downsample: float,
        origin: tuple[float, float],
    ) -> None:
        rings = [ring for shape in shapes for ring in shape]
        self.lengths = np.array([len(ring) for ring in rings])
        self.begins = np.cumsum(self.lengths) - self.lengths
        self.vertices = (np.concatenate(rings) - origin) / downsample
        counts = np.array([len(shape) for shape in shapes])
        exterior = np.repeat(np.cumsum(counts) - counts, counts)
        start = np.clip(np.floor(np.minimum.reduceat(self.vertices, self.begins)), 0, size[::-1]).astype(np.int64)
        stop = np.clip(np.ceil(np.maximum.reduceat(self.vertices, self.begins)), 0, size[::-1]).astype(np.int64)
        start, stop = np.clip(start, start[exterior], stop[exterior]), np.clip(stop, start[exterior], stop[exterior])
        self.left, self.top = start.T
        self.width, self.height = (stop - start).T

    def fills(self, *, outlines: bool) -> Iterator[tuple[Window, dict[Rule, np.ndarray]]]:
        """For each ring its window, and by rule the cells of the window that it fills ("centre" alone without outlines)."""
        ends = np.cumsum(self.height * (self.width + 1))
        first = 0
        while first < len(ends):
            begin = ends[first] - self.height[first] * (self.width[first] + 1)
            last = max(first + 1, int(np.searchsorted(ends, begin + CELLS_AT_ONCE, side="right")))
            batch = _Batch(self, first, last)
            inside = batch.inside()
            crossed = batch.crossed() if outlines else None
            for ring in range(first, last):
                top, left, height, width = (int(a[ring]) for a in (self.top, self.left, self.height, self.width))
                cells = slice(ends[ring] - begin - height * (width + 1), ends[ring] - begin)
                fill: dict[Rule, np.ndarray] = {"centre": inside[cells].reshape(height, width + 1)[:, :width]}
                if crossed is not None:
                    outline = crossed[cells].reshape(height, width + 1)[:, :width]
                    fill |= {"touched": fill["centre"] | outline, "whole": fill["centre"] & ~outline}
                yield (slice(top, top + height), slice(left, left + width)), fill
            first = last


class _Batch:
    """The edges of consecutive rings, each ring on its own window; the windows lie one behind the other in one flat array.

    A row of a window has one cell more than its width, for what happens right of it.  Both fills are running sums along
    rows whose total is even, or zero, in each row: so one running sum over the flat array does all rows of all windows.

    low, high [n, 2]: the ends of each edge in its window, the one with the smaller y first, so that neighbours agree on a
    shared edge; rise [n] >= 0; slope [n] = dx/dy (0 for a level edge).
    """

    def __init__(self, rings: _Rings, first: int, last: int) -> None:
        lengths = rings.lengths[first:last]
        ring = np.repeat(np.arange(first, last), lengths)
        vertices = rings.vertices[rings.begins[first] : rings.begins[first] + len(ring)]
        vertices = vertices - np.stack([rings.left[ring], rings.top[ring]], axis=1)
        following = np.arange(1, len(ring) + 1)
        following[np.cumsum(lengths) - 1] = np.cumsum(lengths) - lengths
        after = vertices[following]
        swap = (vertices[:, 1] > after[:, 1])[:, None]
        self.low, self.high = np.where(swap, after, vertices), np.where(swap, vertices, after)
        run, self.rise = (self.high - self.low).T
        self.slope = np.divide(run, self.rise, out=np.zeros_like(run), where=self.rise > 0)
        sizes = rings.height[first:last] * (rings.width[first:last] + 1)
        self.cells = int(sizes.sum())
        self.begin = np.repeat(np.cumsum(sizes) - sizes, lengths)
        self.height, self.width = rings.height[ring], rings.width[ring]

    def inside(self) -> np.ndarray:
        """Even-odd rule at cell centres: bool [cells].

        Each edge that crosses the line of centres of a row flips all cells right of the crossing; a running XOR makes the
        parity. O(crossings + cells), however many vertices there are.
        """
        first, stop = (np.ceil(end[:, 1] - 0.5) for end in (self.low, self.high))
        flips = np.zeros(self.cells, np.uint8)
        for edge, row in self._edge_rows(first, stop):
            x = self._x_at(edge, row + 0.5 - self.low[edge, 1])
            np.add.at(flips, self._cell(edge, row, np.ceil(x - 0.5)), np.uint8(1))
        return np.bitwise_xor.accumulate(flips & 1).astype(bool)

    def crossed(self) -> np.ndarray:
        """The cells whose interior an outline passes through: bool [cells].

        In each row that an edge passes it covers one run of columns; runs are added as +1 and -1.
        """
        first, stop = np.floor(self.low[:, 1] + HAIR), np.ceil(self.high[:, 1] - HAIR)
        steps = np.zeros(self.cells, np.int32)
        for edge, row in self._edge_rows(first, stop):
            enter = self._x_at(edge, np.maximum(row - self.low[edge, 1], 0))
            leave = self._x_at(edge, np.minimum(row + 1 - self.low[edge, 1], self.rise[edge]))
            leave = np.where(self.rise[edge] == 0, self.high[edge, 0], leave)
            left, right = np.minimum(enter, leave), np.maximum(enter, leave)
            np.add.at(steps, self._cell(edge, row, np.floor(left + HAIR)), np.int32(1))
            np.add.at(steps, self._cell(edge, row, np.ceil(right - HAIR)), np.int32(-1))
        return np.cumsum(steps, dtype=np.int32) > 0

    def _x_at(self, edge: np.ndarray, above: np.ndarray) -> np.ndarray:
        """x of the edges where y is `above` more than at their lower end."""
        return self.low[edge, 0] + above * self.slope[edge]

    def _cell(self, edge: np.ndarray, row: np.ndarray, column: np.ndarray) -> np.ndarray:
        width = self.width[edge]
        return self.begin[edge] + row * (width + 1) + np.clip(column, 0, width).astype(np.int64)

    def _edge_rows(self, first: np.ndarray, stop: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Each edge with each row first..stop-1 of its window, as (edge, row) index arrays, some edges at once."""
        first, stop = (np.clip(row, 0, self.height).astype(np.int64) for row in (first, stop))
        counts = np.maximum(stop - first, 0)
        ends = np.cumsum(counts)
        begin = 0
        while begin < len(counts):
            done = ends[begin] - counts[begin]
            end = max(begin + 1, int(np.searchsorted(ends, done + PAIRS_AT_ONCE, side="right")))
            edge = np.repeat(np.arange(begin, end), counts[begin:end])
            yield edge, np.arange(len(edge)) + done - (ends - counts - first)[edge]
            begin = end
