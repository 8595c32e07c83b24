"""Cells of a slide that is looked at window by window: who keeps a cell that several windows see, so that it counts once.

Neighbouring windows overlap, and each has a core, which ends in the middle of the overlaps. A cell is its window's own where the middle
of its box lies in the core. A network sees other surroundings in each window, so that two may find a cell at slightly different places:
each its own, or neither. Therefore windows also tell of guests, whose middle lies a little outside the core, and `found_once` settles it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from srcc_jax.instances import Instances

_NEIGHBOURS = ((0, 1), (1, -1), (1, 0), (1, 1))  # of two windows that overlap, the later as seen from the earlier
_COLUMNS = ("window", "box", "score", "area", "inner", "own", "cut")
_SAME = 0.5  # two masks are of one cell where they share more than this part of the smaller

Rectangle = tuple[float, float, float, float]
"""(x1, y1, x2, y2), of which x2 and y2 no longer belong to it."""


@dataclasses.dataclass(frozen=True, eq=False)
class WindowCells:
    """N cells on a slide. window int32 [N]: which found it; box int32 [N, 4], [x1, y1, x2, y2) in model pixels from the slide's corner;
    score float64 [N]; area, inner int32 [N]: pixels of the cell and of its seed; own bool [N], else a guest; cut bool [N]: its window
    ends where it does; bits uint8 [M]: masks within the boxes, eight pixels to a byte, each beginning with a byte of its own."""

    window: np.ndarray
    box: np.ndarray
    score: np.ndarray
    area: np.ndarray
    inner: np.ndarray
    own: np.ndarray
    cut: np.ndarray
    bits: np.ndarray

    def __len__(self) -> int:
        return len(self.window)

    @classmethod
    def none(cls) -> WindowCells:
        integers, numbers, truths = np.zeros(0, np.int32), np.zeros(0), np.zeros(0, bool)
        box, bits = np.zeros((0, 4), np.int32), np.zeros(0, np.uint8)
        return cls(integers, box, numbers, integers, integers, truths, truths, bits)

    @classmethod
    def concatenate(cls, parts: Sequence[WindowCells]) -> WindowCells:
        """All cells, in order."""
        names = [field.name for field in dataclasses.fields(cls)]
        parts = [cls.none(), *parts]
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))

    def masks(self) -> Iterator[np.ndarray]:
        """bool [height, width] of each box: which of its pixels are the cell's."""
        ends = np.cumsum(self._bytes())
        for (x1, y1, x2, y2), begin, end in zip(self.box.tolist(), [0, *ends[:-1]], ends):
            shape = (y2 - y1, x2 - x1)
            yield np.unpackbits(self.bits[begin:end], count=shape[0] * shape[1]).reshape(shape).astype(bool)

    def where(self, keep: np.ndarray) -> WindowCells:
        """The cells for which keep, bool [N], is true."""
        kept = {name: getattr(self, name)[keep] for name in _COLUMNS}
        return WindowCells(**kept, bits=self.bits[np.repeat(keep, self._bytes())])

    def by_window(self) -> dict[int, WindowCells]:
        """Window -> its cells, which are next to each other here."""
        windows, begins = np.unique(self.window, return_index=True)
        ends, at = np.append(begins[1:], len(self)), np.append(0, np.cumsum(self._bytes()))
        return {
            int(window): WindowCells(
                **{name: getattr(self, name)[begin:end] for name in _COLUMNS}, bits=self.bits[at[begin] : at[end]]
            )
            for window, begin, end in zip(windows, begins, ends)
        }

    def _bytes(self) -> np.ndarray:
        """Of each mask."""
        width, height = (self.box[:, 2:] - self.box[:, :2]).astype(np.int64).T
        return -(-width * height // 8)


def core_borders(starts: np.ndarray, *, tile: int, length: int) -> np.ndarray:
    """float64 [k + 1]: where the cores of windows with these ascending starts [k] end along an axis of `length` pixels."""
    between = (starts[1:] + starts[:-1] + tile) / 2
    return np.concatenate([[0.0], between, [float(length)]])


def cells_of_window(
    found: Instances, *, window: int, corner: tuple[int, int], core: Rectangle, margin: float, slide: tuple[int, int]
) -> WindowCells:
    """Its own cells and its guests. found: on the window's part of the slide, whose corner (x, y) is in model pixels, as are its core and
    the slide's (width, height). margin: how far outside the core the middle of a guest's box may be."""
    box = found.box.astype(np.int64) + np.tile(corner, 2)
    middle = (box[:, :2] + box[:, 2:]) / 2
    low, high = np.asarray(core[:2]), np.asarray(core[2:])
    own = ((middle >= low) & (middle < high)).all(1)
    near = ((middle >= low - margin) & (middle < high + margin)).all(1)
    extent = np.asarray([*corner, corner[0] + found.label.shape[1], corner[1] + found.label.shape[0]])
    cut = ((box == extent) & (extent != np.asarray([0, 0, *slide]))).any(1)
    inner = np.bincount(found.label[found.seed], minlength=len(found) + 1)[1:]
    masks = [
        np.packbits(found.label[y1:y2, x1:x2] == number)
        for number, (x1, y1, x2, y2) in enumerate(found.box.astype(int).tolist(), start=1)
        if near[number - 1]
    ]
    return WindowCells(
        window=np.full(int(near.sum()), window, np.int32),
        box=box[near].astype(np.int32),
        score=found.score[near],
        area=found.area[near].astype(np.int32),
        inner=inner[near].astype(np.int32),
        own=own[near],
        cut=cut[near],
        bits=np.concatenate([np.zeros(0, np.uint8), *masks]),
    )


def found_once(cells: WindowCells, row: np.ndarray, column: np.ndarray) -> np.ndarray:
    """bool [N]: the cells that count. row, column int [W]: places of the windows in their grid; cells come in the windows' order.

    Of two windows' own cells that are one, the first counts. A guest counts where no such cell does, and another window has it as a guest
    too: each took it for the other's. Linear in windows, as long as a cell meets few others.
    """
    keep = cells.own.copy()
    meets: dict[int, list[int]] = {}
    for first, second in _same_cells(cells, row, column):
        if cells.own[first] and cells.own[second]:
            keep[second] &= not keep[first]
        for one, other in ((first, second), (second, first)):
            if not cells.own[one]:
                meets.setdefault(one, []).append(other)
    for guest in sorted(meets):
        others = meets[guest]
        keep[guest] = not keep[others].any() and not cells.own[others].all()
    return keep


def _same_cells(cells: WindowCells, row: np.ndarray, column: np.ndarray) -> list[tuple[int, int]]:
    """Pairs of cells of neighbouring windows that are one cell, ascending."""
    windows, begins = np.unique(cells.window, return_index=True)
    ends = np.append(begins[1:], len(cells))
    spans = {
        (int(row[window]), int(column[window])): (int(begin), int(end))
        for window, begin, end in zip(windows, begins, ends)
    }
    close: list[tuple[int, int]] = []
    for (i, j), span in spans.items():
        for down, right in _NEIGHBOURS:
            other = spans.get((i + down, j + right))
            if other is not None:
                close += _boxes_that_meet(cells.box, span, other)
    wanted = np.zeros(len(cells), bool)
    wanted[[index for pair in close for index in pair]] = True
    masks = dict(zip(np.flatnonzero(wanted).tolist(), cells.where(wanted).masks()))
    return sorted(
        (one, other)
        for one, other in close
        if _shared(cells.box[one], masks[one], cells.box[other], masks[other])
        > _SAME * min(cells.area[one], cells.area[other])
    )


def _boxes_that_meet(box: np.ndarray, first: tuple[int, int], second: tuple[int, int]) -> list[tuple[int, int]]:
    """Pairs (a, b), a of the span `first`, b of `second`, whose boxes have a pixel in common."""
    a, b = box[slice(*first), None], box[None, slice(*second)]
    meet = ((a[..., :2] < b[..., 2:]) & (b[..., :2] < a[..., 2:])).all(-1)
    one, other = np.nonzero(meet)
    return list(zip((one + first[0]).tolist(), (other + second[0]).tolist()))


def _shared(box: np.ndarray, mask: np.ndarray, other_box: np.ndarray, other_mask: np.ndarray) -> int:
    """Pixels that both masks, within their boxes, have."""
    x1, y1 = np.maximum(box[:2], other_box[:2])
    x2, y2 = np.minimum(box[2:], other_box[2:])
    part = mask[y1 - box[1] : y2 - box[1], x1 - box[0] : x2 - box[0]]
    other = other_mask[y1 - other_box[1] : y2 - other_box[1], x1 - other_box[0] : x2 - other_box[0]]
    return int((part & other).sum())
