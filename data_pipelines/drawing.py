"""Slides drawn to look like H&E of gastric mucosa, with the truth known to the pixel.

Every slide holds glands of four kinds, fibrous stroma, lymphocytes, plasma cells, and nests of pale cells. In a negative
slide these are foamy macrophages and clear cells; in a positive one most clear cells become signet ring cells. The two kinds
of slide therefore have the same colours and the same vacuoles, and only the nucleus pushed to the edge tells them apart.
Densities and sizes are ours, set by eye to those of biopsies.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from data_pipelines import cells
from data_pipelines.cells import Stamp, press
from data_pipelines.textures import Box, fragment_field, periodic_texture, repeated, scattered_boxes, smooth_noise

_COARSE = 8  # px per cell of the grid on which things are laid out
_TEXTURE = 1024  # side of the repeating textures, a power of two
_STAMPS = {  # how many different ones of each are drawn; each is laid down in eight symmetries
    "lymphocyte": (cells.lymphocyte, 24),
    "plasma_cell": (cells.plasma_cell, 16),
    "red_cell": (cells.red_cell, 8),
    "signet_ring_cell": (cells.signet_ring_cell, 64),
    "clear_cell": (cells.clear_cell, 64),
    "foamy_cell": (cells.foamy_cell, 32),
}
_SPINDLE_ANGLES = 24
_GLANDS = 10  # of each kind
_PER_MM2 = {"spindle": 1800, "lymphocyte": 1500, "plasma_cell": 700, "red_cell": 250}
_MM2_PER_NEST = 0.07
_SIGNET_SHARE = 0.7  # of the nests of clear cells in a positive slide, and at least one

# Optical densities of the two stains: the reference matrix of Macenko et al. 2009 as it is commonly released.
_HAEMATOXYLIN, _EOSIN = (0.5626, 0.7201, 0.4062), (0.2159, 0.8012, 0.5581)


@dataclass(frozen=True)
class DrawnSlide:
    """rgb uint8 [side, side, 3]; signet_ring_cells: float64 [n, 2] outlines (x, y) in px, none in a negative slide."""

    rgb: np.ndarray
    signet_ring_cells: tuple[np.ndarray, ...]


class StampSet:
    """The stamps and textures that all slides of a cohort are drawn with, at one µm per pixel."""

    def __init__(self, rng: np.random.Generator, mpp: float):
        self.mpp = mpp
        self.stamps = {kind: _all_ways(draw(rng, mpp) for _ in range(count)) for kind, (draw, count) in _STAMPS.items()}
        angles = np.arange(_SPINDLE_ANGLES) * np.pi / _SPINDLE_ANGLES
        self.spindles = [[cells.spindle(rng, mpp, angle) for _ in range(4)] for angle in angles]
        self.glands = [_all_ways(cells.gland(rng, mpp, kind) for _ in range(_GLANDS)) for kind in cells.GLAND_KINDS]
        self.fibres = periodic_texture(rng, _TEXTURE, along_px=9 / mpp, across_px=0.7 / mpp)
        self.fibres += periodic_texture(rng, _TEXTURE, along_px=6 / mpp, across_px=1.6 / mpp)
        self.fibres /= np.float32(np.sqrt(2))
        self.blotches = periodic_texture(rng, _TEXTURE, along_px=1.5 / mpp, across_px=1.5 / mpp)
        self.grain = rng.standard_normal((_TEXTURE, _TEXTURE), dtype=np.float32)

    def pick(self, rng: np.random.Generator, kind: str) -> Stamp:
        return self.stamps[kind][rng.integers(len(self.stamps[kind]))]


def _all_ways(stamps: Iterable[Stamp]) -> list[Stamp]:
    return [stamp.turned(symmetry) for stamp in stamps for symmetry in range(8)]


@dataclass
class _Nest:
    """A nest of pale cells; px within its fragment."""

    x: float
    y: float
    radius: float
    kind: str


@dataclass(frozen=True)
class _Fragment:
    """One piece of tissue: cover float32 [h, w] in [0, 1]; glands with their top-left corners in px; room: bool on the
    coarse grid, tissue between the glands, where single cells may lie."""

    box: Box
    cover: np.ndarray
    glands: list[tuple[Stamp, int, int]]
    nests: list[_Nest]
    room: np.ndarray


def draw_slide(rng: np.random.Generator, stamps: StampSet, *, side_px: int, positive: bool) -> DrawnSlide:
    """Draw one slide of side_px x side_px at the µm per pixel of the stamps. The same generator draws the same slide."""
    if side_px * stamps.mpp < 100:
        raise ValueError(
            f"side_px is {side_px}, {side_px * stamps.mpp:g} µm; a slide with room for tissue needs 100 µm"
        )
    rng, light = rng.spawn(2)  # the stain does not depend on what was drawn
    canvas = np.zeros((side_px, side_px, 2), np.float32)
    count = int(np.clip((side_px * stamps.mpp / 1000) ** 2 * rng.uniform(0.8, 1.8), 1, 12))
    fragments = [_lay_out(rng, stamps, box) for box in scattered_boxes(rng, side_px, side_px, count)]
    if positive:
        _turn_malignant(rng, [nest for fragment in fragments for nest in fragment.nests])
    outlines: list[np.ndarray] = []
    for fragment in fragments:
        box = fragment.box
        view = canvas[box.y : box.y + box.height, box.x : box.x + box.width]
        orientation = _paint_stroma(rng, stamps, view)
        _scatter_cells(rng, stamps, view, fragment.room, orientation)
        for stamp, x, y in fragment.glands:
            press(view, stamp, x, y)
        outlines += [np.add(outline, (box.x, box.y)) for outline in _place_nests(rng, stamps, view, fragment)]
        view *= fragment.cover[..., None]
    if positive and not outlines:
        raise ValueError(f"side_px is {side_px}: no signet ring cell found room in the tissue; ask for a larger slide")
    return DrawnSlide(_stain(light, stamps, canvas), tuple(outlines))


def _turn_malignant(rng: np.random.Generator, nests: list[_Nest]) -> None:
    clear = [nest for nest in nests if nest.kind == "clear_cell"]
    for place in rng.permutation(len(clear))[: max(1, round(_SIGNET_SHARE * len(clear)))]:
        clear[place].kind = "signet_ring_cell"


def _lay_out(rng: np.random.Generator, stamps: StampSet, box: Box) -> _Fragment:
    field = fragment_field(rng, box.height, box.width)
    tissue = field[::_COARSE, ::_COARSE] > 0.05
    nests = _lay_out_nests(rng, tissue, stamps.mpp)
    reserved = np.zeros_like(tissue)
    y, x = np.indices(tissue.shape) * _COARSE
    for nest in nests:
        reserved |= np.hypot(x - nest.x, y - nest.y) < nest.radius
    room = tissue.copy()
    glands = _lay_out_glands(rng, stamps, tissue, reserved, room)
    return _Fragment(box, np.clip(field * 25, 0, 1), glands, nests, room)


def _lay_out_nests(rng: np.random.Generator, tissue: np.ndarray, mpp: float) -> list[_Nest]:
    """Nests of 35 to 80 µm away from the edge, clear and foamy in turn; at least one where there is tissue."""
    to_edge = ndimage.distance_transform_edt(tissue) * _COARSE
    mm2 = tissue.sum() * (_COARSE * mpp / 1000) ** 2
    nests: list[_Nest] = []
    for _ in range(max(1, round(mm2 / _MM2_PER_NEST * rng.uniform(0.8, 1.25)))):
        radius = rng.uniform(35, 80) / mpp
        places = np.argwhere(to_edge >= min(0.8 * radius, to_edge.max()))
        y, x = places[rng.integers(len(places))] * _COARSE
        if all(np.hypot(x - other.x, y - other.y) > radius + other.radius for other in nests):
            nests.append(_Nest(x, y, radius, ("clear_cell", "foamy_cell")[len(nests) % 2]))
    return nests


def _lay_out_glands(
    rng: np.random.Generator, stamps: StampSet, tissue: np.ndarray, reserved: np.ndarray, room: np.ndarray
) -> list[tuple[Stamp, int, int]]:
    """Throw glands at the tissue and keep those that touch nothing; `reserved` and `room` follow. Regions prefer a kind."""
    scale = 150 / (_COARSE * stamps.mpp)
    zone, region = smooth_noise(rng, tissue.shape, scale), smooth_noise(rng, tissue.shape, 1.3 * scale)
    places = np.argwhere(tissue & (zone > -1.0))
    tries = min(len(places), int(len(places) * (_COARSE * stamps.mpp) ** 2 / 250))
    glands = []
    for row, column in places[rng.permutation(len(places))[:tries]]:
        kind = np.searchsorted((-0.5, 0.2, 1.2), region[row, column] + rng.normal(0, 0.25))
        stamp = stamps.glands[kind][rng.integers(len(stamps.glands[kind]))]
        footprint = stamp.cover[::_COARSE, ::_COARSE] > 0.5
        top, left = row - footprint.shape[0] // 2, column - footprint.shape[1] // 2
        window = np.s_[max(0, top) : top + footprint.shape[0], max(0, left) : left + footprint.shape[1]]
        seen = footprint[max(0, -top) :, max(0, -left) :][: reserved[window].shape[0], : reserved[window].shape[1]]
        if (reserved[window] & seen).any():
            continue
        reserved[window] |= ndimage.binary_dilation(seen)
        room[window] &= ~seen
        glands.append((stamp, int(left) * _COARSE, int(top) * _COARSE))
    return glands


def _paint_stroma(rng: np.random.Generator, stamps: StampSet, view: np.ndarray) -> np.ndarray:
    """Bent bundles of fibres with clefts between them; returns their direction (radians) on the coarse grid."""
    height, width = view.shape[:2]
    x, y = np.arange(width, dtype=np.float32)[None, :], np.arange(height, dtype=np.float32)[:, None]
    angle, bend = rng.uniform(0, np.pi), np.float32(35 / stamps.mpp)
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    along = x * cos + y * sin + bend * smooth_noise(rng, (height, width), 180 / stamps.mpp)
    across = y * cos - x * sin + bend * smooth_noise(rng, (height, width), 120 / stamps.mpp)
    across += np.float32(4 / stamps.mpp) * smooth_noise(rng, (height, width), 25 / stamps.mpp)
    fibre = stamps.fibres[across.astype(np.int32) & (_TEXTURE - 1), along.astype(np.int32) & (_TEXTURE - 1)]
    blotch = repeated(stamps.blotches, (height, width), rng.integers(_TEXTURE, size=2))
    slow = smooth_noise(rng, (height, width), 70 / stamps.mpp)
    cleft = 1 - 0.7 * np.clip(-2.0 - 1.4 * fibre - 0.4 * slow, 0, 1)
    view[..., 0] = np.clip(0.13 + 0.02 * fibre + 0.03 * blotch + 0.03 * slow, 0.01, None) * cleft
    view[..., 1] = np.clip(0.42 + 0.11 * fibre + 0.05 * blotch + 0.07 * slow, 0.02, None) * cleft
    down, right = np.gradient(across[::_COARSE, ::_COARSE])
    return np.arctan2(-right, down)


def _scatter_cells(
    rng: np.random.Generator, stamps: StampSet, view: np.ndarray, room: np.ndarray, orientation: np.ndarray
) -> None:
    """Nuclei of fibroblasts along the fibres; round cells, gathered in places."""
    places = np.argwhere(room)
    mm2 = len(places) * (_COARSE * stamps.mpp / 1000) ** 2
    for kind, density in _PER_MM2.items():
        crowd = np.exp((0.3 if kind == "spindle" else 1.2) * smooth_noise(rng, room.shape, 60 / (_COARSE * stamps.mpp)))
        weight = np.cumsum(crowd[room])
        for place in np.searchsorted(weight, rng.random(round(density * mm2)) * weight[-1]):
            row, column = places[place]
            if kind == "spindle":
                turn = (
                    round((orientation[row, column] + rng.normal(0, 0.2)) / np.pi * _SPINDLE_ANGLES) % _SPINDLE_ANGLES
                )
                stamp = stamps.spindles[turn][rng.integers(4)]
            else:
                stamp = stamps.pick(rng, kind)
            y, x = places[place] * _COARSE + rng.integers(_COARSE, size=2) - np.array(stamp.cover.shape) // 2
            press(view, stamp, int(x), int(y))


def _place_nests(rng: np.random.Generator, stamps: StampSet, view: np.ndarray, fragment: _Fragment) -> list[np.ndarray]:
    """Pack the cells of each nest, looser outwards, none over another; returns the signet ring cells' outlines in px."""
    kept = np.empty((0, 3))  # x, y and radius of the cells placed
    outlines = []
    for nest in fragment.nests:
        for _ in range(int(4 * (nest.radius * stamps.mpp / 6.5) ** 2) + 12):
            kind = nest.kind if rng.random() < 0.9 else "foamy_cell"
            stamp = stamps.pick(rng, kind)
            middle = stamp.cover.shape[0] / 2
            x, y = np.rint(rng.normal((nest.x, nest.y), 0.55 * nest.radius) - middle).astype(int)
            radius = np.hypot(*(stamp.outline - middle).T).max()
            apart = np.hypot(kept[:, 0] - x - middle, kept[:, 1] - y - middle) > kept[:, 2] + radius
            outline = np.add(stamp.outline, (x, y))
            if not apart.all() or not _lies_in(fragment.room, outline):
                continue
            kept = np.vstack([kept, (x + middle, y + middle, radius)])
            press(view, stamp, x, y)
            if kind == "signet_ring_cell":
                outlines.append(outline)
    return outlines


def _lies_in(room: np.ndarray, outline: np.ndarray) -> bool:
    columns, rows = np.floor(outline / _COARSE).astype(int).T
    inside = min(rows.min(), columns.min()) >= 0 and rows.max() < room.shape[0] and columns.max() < room.shape[1]
    return inside and bool(room[rows, columns].all())


def _stain(rng: np.random.Generator, stamps: StampSet, canvas: np.ndarray) -> np.ndarray:
    """Beer-Lambert: concentrations to uint8 RGB, with the stain, the light and the noise of one slide."""
    vectors = np.array([_HAEMATOXYLIN, _EOSIN]) + rng.normal(0, 0.012, (2, 3))
    vectors *= rng.uniform(0.88, 1.13, (2, 1)) / np.linalg.norm(vectors, axis=1, keepdims=True)
    light = (rng.uniform(238, 246) + rng.normal(0, 1.5, 3)).clip(0, 250).astype(np.float32)
    row, column = rng.integers(_TEXTURE, size=2)
    side = canvas.shape[0]
    rgb = np.empty((side, side, 3), np.uint8)
    for top in range(0, side, 256):
        strip = canvas[top : top + 256]
        pixels = light * np.exp(-strip @ vectors.astype(np.float32))
        pixels += 1.5 * repeated(stamps.grain, strip.shape[:2], (row + top, column))[..., None]
        rgb[top : top + 256] = np.clip(pixels, 0, 255)
    return rgb
