"""Cells and glands as stamps: what the drawn slides are made of.

A stamp holds stain concentrations, so that every slide can colour them in its own way: channel 0 is haematoxylin
(nuclei, blue), channel 1 is eosin (cytoplasm and fibres, pink). Sizes are µm, angles radians.
The signet ring cell is the truth to be found; the clear cell beside it has the same vacuole and as much nucleus, but in
the middle, so that neither mean colour nor vacuoles tell them apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from data_pipelines.textures import smooth_noise

Stain = tuple[float, float]  # concentrations of haematoxylin and eosin

MUCIN: Stain = (0.11, 0.07)
FOAM: Stain = (0.10, 0.13)
PALE: Stain = (0.14, 0.20)
PINK: Stain = (0.20, 0.62)
PURPLE: Stain = (0.42, 0.42)
LUMEN: Stain = (0.01, 0.02)


@dataclass(frozen=True)
class Stamp:
    """stain float32 [h, w, 2], cover float32 [h, w] in [0, 1], outline float64 [n, 2]: (x, y) px from the top-left corner."""

    stain: np.ndarray
    cover: np.ndarray
    outline: np.ndarray

    def turned(self, symmetry: int) -> Stamp:
        """One of the eight symmetries of the square (quarter turns 0..3, mirrored 4..7), without a copy of the pixels."""
        stain, cover, outline = self.stain, self.cover, self.outline
        for _ in range(symmetry % 4):  # a quarter turn counter-clockwise: (x, y) -> (y, width - x)
            outline = np.stack([outline[:, 1], stain.shape[1] - outline[:, 0]], axis=1)
            stain, cover = np.rot90(stain), np.rot90(cover)
        if symmetry >= 4:
            outline = np.stack([stain.shape[1] - outline[:, 0], outline[:, 1]], axis=1)
            stain, cover = stain[:, ::-1], cover[:, ::-1]
        return Stamp(stain, cover, outline)


def press(canvas: np.ndarray, stamp: Stamp, x: int, y: int) -> None:
    """Lay a stamp on a canvas float32 [H, W, 2] with its top-left corner at (x, y) px; what lies outside is cut off."""
    height, width = stamp.cover.shape
    top, left = max(0, -y), max(0, -x)
    under = canvas[max(0, y) : max(0, y + height), max(0, x) : max(0, x + width)]
    inside = np.s_[top : top + under.shape[0], left : left + under.shape[1]]
    under += stamp.cover[inside][..., None] * (stamp.stain[inside] - under)


class _Paper:
    """A small square canvas in µm around (0, 0), on which one stamp is drawn."""

    def __init__(self, rng: np.random.Generator, radius_um: float, mpp: float):
        self.rng, self.mpp = rng, mpp
        self.side = 2 * int(np.ceil(radius_um / mpp + 1))
        axis = ((np.arange(self.side) + 0.5) * mpp - self.side * mpp / 2).astype(np.float32)
        self.x, self.y = axis[None, :], axis[:, None]
        self.stain = np.zeros((self.side, self.side, 2), np.float32)
        self.cover = np.zeros((self.side, self.side), np.float32)

    def inside(self, distance: np.ndarray) -> np.ndarray:
        """Coverage of the pixels by the region of negative distance (µm), its edge one and a half pixels soft."""
        return np.clip(0.5 - distance / (1.5 * self.mpp), 0, 1)

    def ellipse(self, x: float, y: float, a: float, b: float, angle: float = 0.0) -> np.ndarray:
        """Distance (µm, about) to an ellipse around (x, y) with half-axes a along `angle` and b across."""
        cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
        u, v = (self.x - x) * cos + (self.y - y) * sin, (self.y - y) * cos - (self.x - x) * sin
        return (np.sqrt((u / np.float32(a)) ** 2 + (v / np.float32(b)) ** 2) - 1) * np.float32(min(a, b))

    def fill(self, cover: np.ndarray, colour: Stain | np.ndarray) -> None:
        self.stain += cover[..., None] * (np.asarray(colour, np.float32) - self.stain)
        self.cover += cover * (1 - self.cover)

    def nucleus(self, cover: np.ndarray, density: float, pale: float = 0.25) -> None:
        """Clumped chromatin, `pale` lighter than its rim."""
        clumps = smooth_noise(self.rng, cover.shape, 1.2 / self.mpp)
        haematoxylin = density * (1 - pale * np.clip(cover * 2 - 1, 0, 1) + 0.13 * clumps)
        self.fill(cover, np.stack([haematoxylin, np.full_like(haematoxylin, 0.35)], axis=-1))

    def grain(self, amount: float) -> None:
        self.stain *= 1 + np.float32(amount) * smooth_noise(self.rng, self.cover.shape, 1.0 / self.mpp)[..., None]

    def stamp(self, outline_um: np.ndarray) -> Stamp:
        stain = np.clip(self.stain, 0, None) / np.maximum(self.cover, 1e-3)[..., None]  # without the white of the paper
        return Stamp(stain, self.cover, outline_um / self.mpp + self.side / 2)


def _wobbly(rng: np.random.Generator, radius: float, amount: float) -> Callable[[np.ndarray], np.ndarray]:
    """Radius (µm) as a function of the angle: a circle with two to four bulges."""
    waves = np.arange(2, 5)
    size, phase = rng.normal(0, amount / waves), rng.uniform(0, 2 * np.pi, 3)
    return lambda angle: radius * (1 + (size * np.cos(np.asarray(angle)[..., None] * waves + phase)).sum(-1))


def _outline(radius_at: Callable[[np.ndarray], np.ndarray], points: int = 24) -> np.ndarray:
    angle = np.linspace(0, 2 * np.pi, points, endpoint=False)
    return radius_at(angle)[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)


def spindle(rng: np.random.Generator, mpp: float, angle: float) -> Stamp:
    """The nucleus of a fibroblast, lying along `angle`."""
    a, b = rng.uniform(4.0, 7.0), rng.uniform(0.9, 1.5)
    paper = _Paper(rng, a, mpp)
    paper.nucleus(paper.inside(paper.ellipse(0, 0, a, b, angle)), rng.uniform(0.9, 1.4), pale=0.1)
    return paper.stamp(_outline(lambda t: np.full_like(t, a)))


def lymphocyte(rng: np.random.Generator, mpp: float) -> Stamp:
    radius = rng.uniform(2.7, 3.6)
    paper = _Paper(rng, radius + 1, mpp)
    paper.fill(0.6 * paper.inside(paper.ellipse(0, 0, radius + 0.7, radius + 0.5)), PURPLE)
    paper.nucleus(
        paper.inside(paper.ellipse(0, 0, radius, radius * rng.uniform(0.85, 1), rng.uniform(0, 3))), 1.75, 0.1
    )
    return paper.stamp(_outline(lambda t: np.full_like(t, radius)))


def plasma_cell(rng: np.random.Generator, mpp: float) -> Stamp:
    """A round nucleus beside the middle of a purple cell: a mimicker without a vacuole."""
    angle, a = rng.uniform(0, 2 * np.pi), rng.uniform(5.0, 6.5)
    x, y = 1.9 * np.cos(angle), 1.9 * np.sin(angle)
    paper = _Paper(rng, a, mpp)
    paper.fill(paper.inside(paper.ellipse(0, 0, a, a * 0.72, angle)), (0.45, 0.62))
    paper.nucleus(paper.inside(paper.ellipse(x, y, 3.1, 2.9, angle)), 1.55, 0.25)
    return paper.stamp(_outline(lambda t: np.full_like(t, a)))


def red_cell(rng: np.random.Generator, mpp: float) -> Stamp:
    paper = _Paper(rng, 4, mpp)
    paper.fill(paper.inside(paper.ellipse(0, 0, 3.4, rng.uniform(2.4, 3.4), rng.uniform(0, 3))), (0.05, 1.05))
    return paper.stamp(_outline(lambda t: np.full_like(t, 3.4)))


def _pale_cell(rng: np.random.Generator, mpp: float) -> tuple[_Paper, Callable[[np.ndarray], np.ndarray], float]:
    """Rim and vacuole, which the signet ring cell and the clear cell share: 10 to 16 µm across."""
    radius = rng.uniform(5.2, 8.0)
    radius_at = _wobbly(rng, radius, 0.06)
    paper = _Paper(rng, radius * 1.3, mpp)
    distance = np.hypot(paper.x, paper.y) - radius_at(np.arctan2(paper.y, paper.x)).astype(np.float32)
    paper.fill(paper.inside(distance), (0.28, 0.55))
    mucin = np.asarray(MUCIN, np.float32) * (1 + 0.5 * smooth_noise(rng, distance.shape, 3 / mpp)[..., None])
    paper.fill(paper.inside(distance + rng.uniform(0.7, 1.1)), np.clip(mucin, 0, None))
    return paper, radius_at, radius


def signet_ring_cell(rng: np.random.Generator, mpp: float) -> Stamp:
    """A vacuole of mucin that pushes a dark crescent of a nucleus to the edge of the cell."""
    paper, radius_at, radius = _pale_cell(rng, mpp)
    angle = rng.uniform(0, 2 * np.pi)
    away, size = rng.uniform(0.36, 0.46) * radius, rng.uniform(0.93, 1.0) * radius
    within = np.hypot(paper.x, paper.y) - radius_at(np.arctan2(paper.y, paper.x)).astype(np.float32) + 0.25
    beyond = -paper.ellipse(-away * np.cos(angle), -away * np.sin(angle), size, size * 1.05, angle)
    paper.nucleus(paper.inside(np.maximum(within, beyond)), rng.uniform(1.5, 1.9), pale=0.1)
    return paper.stamp(_outline(radius_at))


def clear_cell(rng: np.random.Generator, mpp: float) -> Stamp:
    """The mimicker: the same vacuole, its nucleus in the middle, or missed by the cut."""
    paper, radius_at, radius = _pale_cell(rng, mpp)
    if rng.random() < 0.85:
        x, y, a = *rng.normal(0, 0.08 * radius, 2), rng.uniform(0.40, 0.47) * radius
        paper.nucleus(
            paper.inside(paper.ellipse(x, y, a, a * rng.uniform(0.8, 1), rng.uniform(0, 3))), rng.uniform(1.4, 1.8), 0.1
        )
    return paper.stamp(_outline(radius_at))


def foamy_cell(rng: np.random.Generator, mpp: float) -> Stamp:
    """A macrophage full of small vacuoles, with a small nucleus in the middle."""
    radius = rng.uniform(6.5, 10.0)
    radius_at = _wobbly(rng, radius, 0.08)
    paper = _Paper(rng, radius * 1.3, mpp)
    distance = np.hypot(paper.x, paper.y) - radius_at(np.arctan2(paper.y, paper.x)).astype(np.float32)
    paper.fill(paper.inside(distance), (0.22, 0.42))
    bubbles = smooth_noise(rng, distance.shape, 1.6 / mpp)
    paper.fill(paper.inside(distance + 0.6) * np.clip(0.75 + 0.5 * bubbles, 0, 1), FOAM)
    x, y = rng.normal(0, 0.12 * radius, 2)
    paper.nucleus(paper.inside(paper.ellipse(x, y, rng.uniform(2.3, 3.0), 2.3, rng.uniform(0, 3))), 1.35, 0.2)
    return paper.stamp(_outline(radius_at))


@dataclass(frozen=True)
class GlandKind:
    """How a gland is built; sizes µm, `lumen` as a fraction of its radius, `stretch` its longest to shortest axis at most."""

    radius: tuple[float, float]
    lumen: tuple[float, float]
    stretch: float
    cell_width: float
    cytoplasm: Stain
    apical: Stain
    nucleus: tuple[float, float]  # half-axes along and across the radius
    nucleus_depth: float  # of its centre below the outer edge
    density: float
    goblets: float = 0.0


GLAND_KINDS = (
    # foveolar
    GlandKind((24, 38), (0.22, 0.40), 1.5, 6.5, PINK, PALE, (3.0, 2.5), 4.2, 1.25),
    # intestinal, with goblet cells: a mimicker
    GlandKind((26, 40), (0.18, 0.34), 1.4, 5.2, PURPLE, PINK, (4.6, 2.0), 6.2, 1.35, goblets=0.3),
    # oxyntic
    GlandKind((16, 24), (0.05, 0.15), 1.4, 8.5, (0.25, 0.85), (0.22, 0.80), (2.9, 2.7), 6.5, 1.3),
    # crushed: a mimicker
    GlandKind((11, 17), (0.0, 0.05), 2.4, 4.2, (0.75, 0.55), (0.7, 0.5), (3.6, 1.9), 4.0, 1.9),
)


def gland(rng: np.random.Generator, mpp: float, kind: GlandKind) -> Stamp:
    """Cut across: a ring of cells round a lumen, their nuclei at the outer edge, mucus at the inner."""
    radius, stretch = rng.uniform(*kind.radius), np.sqrt(rng.uniform(1.0, kind.stretch))
    wobble = _wobbly(rng, 1.0, 0.07)
    axes = np.array([stretch, 1 / stretch]) * radius

    def radius_at(angle: np.ndarray) -> np.ndarray:
        return wobble(angle) / np.hypot(np.cos(angle) / axes[0], np.sin(angle) / axes[1])

    paper = _Paper(rng, radius * stretch * 1.3, mpp)
    angle, distance = np.arctan2(paper.y, paper.x), np.hypot(paper.x, paper.y)
    edge = radius_at(angle).astype(np.float32)
    cells = max(6, int(2 * np.pi * radius / kind.cell_width))
    _epithelium(paper, kind, distance / edge, distance - edge, angle * cells / (2 * np.pi), rng.uniform(*kind.lumen))
    for at in (np.arange(cells) + rng.uniform(-0.25, 0.25, cells) + 0.5) * 2 * np.pi / cells:
        _gland_cell(paper, kind, at, float(radius_at(at)))
    return paper.stamp(_outline(radius_at))


def _epithelium(
    paper: _Paper, kind: GlandKind, part: np.ndarray, distance: np.ndarray, sector: np.ndarray, lumen: float
) -> None:
    """Cytoplasm that pales towards the lumen, cell borders, lumen. part: distance from the centre, 1 at the edge."""
    paper.fill(paper.inside(distance - 0.8), (0.15, 0.75))  # basement membrane
    apical = np.clip((1 - part) / max(1e-3, 1 - lumen) * 1.8 - 0.5, 0, 1)[..., None]
    colour = (1 - apical) * np.asarray(kind.cytoplasm, np.float32) + apical * np.asarray(kind.apical, np.float32)
    border = np.abs(sector - np.round(sector)) < 0.07
    paper.fill(paper.inside(distance), colour + 0.12 * (border * part)[..., None])
    paper.grain(0.12)
    if lumen > 0.04:
        ragged = part - lumen * (1 + 0.2 * smooth_noise(paper.rng, part.shape, 4 / paper.mpp))
        paper.fill(np.clip(0.5 - ragged * 12, 0, 1), LUMEN)


def _gland_cell(paper: _Paper, kind: GlandKind, at: float, edge: float) -> None:
    """The nucleus of one cell, and its goblet of mucin where it has one."""
    rng, mpp = paper.rng, paper.mpp
    depth = min(kind.nucleus_depth * rng.uniform(0.8, 1.25), 0.75 * edge)
    along, across = np.array(kind.nucleus) * rng.uniform(0.85, 1.15, 2)
    if rng.random() < kind.goblets:
        vacuole = _Paper(rng, 5.5, mpp)
        vacuole.fill(vacuole.inside(vacuole.ellipse(0, 0, 5.2, 3.8, at)), (0.16, 0.10))
        _press_at(paper, vacuole, at, edge - depth - 5.0)
        along, across, depth = 1.5, 2.4, min(depth, 2.6)
    nucleus = _Paper(rng, max(along, across), mpp)
    nucleus.nucleus(
        nucleus.inside(nucleus.ellipse(0, 0, along, across, at)), kind.density * rng.uniform(0.85, 1.15), 0.3
    )
    _press_at(paper, nucleus, at, edge - depth)


def _press_at(paper: _Paper, part: _Paper, angle: float, radius: float) -> None:
    corner = radius / paper.mpp * np.array([np.cos(angle), np.sin(angle)]) + (paper.side - part.side) / 2
    press(paper.stain, part.stamp(np.zeros((0, 2))), *np.rint(corner).astype(int))
