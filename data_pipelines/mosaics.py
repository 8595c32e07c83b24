"""Mosaic slides: real labelled patches laid out as fragments of tissue on white, so that every patch's truth is known.

What stays unreal: patches meet in visible seams (which `MosaicPlan.aligned` keeps out of tiles of their size), and a small collection
repeats its patches (turned and mirrored). Both hold for positive and negative slides alike.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipelines.pyramids import BACKGROUND
from data_pipelines.textures import fragment_field, scattered_boxes

Patches = Mapping[str, Sequence[Path]]
"""class -> its patch files."""

_FIELD = 16  # cells of the outline's field per side of a patch
IMAGES = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp"}
_TISSUE_SHARE = 0.42  # ours: of the slide's area


@dataclass(frozen=True)
class Mosaic:
    """rgb uint8 [H, W, 3]; tumour: for each patch of a positive class its class and the corners float64 [4, 2] (x, y) in px."""

    rgb: np.ndarray
    tumour: tuple[tuple[str, np.ndarray], ...]
    tumour_fraction: float  # of the tissue's area


@dataclass(frozen=True)
class MosaicPlan:
    """tissue_patches: about how many patches of tissue in a slide, at least and at most.  positive_fraction: of the tissue of
    a positive slide.  clustered: share of positive slides whose tumour lies in one place; in the others it is scattered.
    patch_px: side of a patch in the slide, to which all are resized; None: the width of the first.  aligned: the patches lie
    on the lattice of a tiling from the corner, so that a tile of their size is one patch."""

    tissue_patches: tuple[int, int] = (120, 180)
    positive_fraction: tuple[float, float] = (0.01, 0.05)
    clustered: float = 0.5
    patch_px: int | None = None
    aligned: bool = False

    def __post_init__(self) -> None:
        low, high = self.positive_fraction
        if not 0 < low <= high < 1:
            raise ValueError(
                f"positive_fraction is {self.positive_fraction}; give two fractions, 0 < least <= most < 1"
            )
        if not 0 < self.tissue_patches[0] <= self.tissue_patches[1] or high * self.tissue_patches[0] < 1:
            raise ValueError(
                f"tissue_patches is {self.tissue_patches}, of which {high:g} is less than one patch of tumour: "
                "ask for more patches or a greater positive_fraction"
            )


def folder_patches(root: Path | str, *, seed: int, validation: float = 0.2) -> dict[str, dict[str, list[Path]]]:
    """Patches kept as <root>/train/<class>/ and <root>/test/<class>/ -> {split: {class: files}}.

    The share `validation` of each class of train becomes the validation split. Raises ValueError where a folder is missing.
    """
    root = Path(root)
    train, test = (class_folders(root / name) for name in ("train", "test"))
    if train.keys() != test.keys():
        raise ValueError(
            f"{root}: train has the classes {sorted(train)}, test has {sorted(test)}; they must be the same"
        )
    splits: dict[str, dict[str, list[Path]]] = {"train": {}, "validation": {}, "test": test}
    rng = np.random.default_rng(seed)
    for name, files in train.items():
        splits["validation"][name], splits["train"][name] = _divide(rng, files, [validation])
    return splits


def pcam_patches(
    root: Path | str, *, seed: int, validation: float = 0.15, test: float = 0.35
) -> dict[str, dict[str, list[Path]]]:
    """PatchCamelyon as <root>/images/<id>.tif with <root>/labels.csv (id,label) -> {split: {"tumour" | "normal": files}}.

    The splits are drawn from each class by seed. The label speaks of the central 32 x 32 px of a patch; which slide a patch
    comes from is not recorded, so splits of patches may share slides.
    """
    root = Path(root)
    with open(root / "labels.csv", newline="") as table:
        rows = sorted((row["id"], row["label"]) for row in csv.DictReader(table))
    rng = np.random.default_rng(seed)
    splits: dict[str, dict[str, list[Path]]] = {"train": {}, "validation": {}, "test": {}}
    for label, name in (("0", "normal"), ("1", "tumour")):
        files = [root / "images" / f"{patch}.tif" for patch, given in rows if given == label]
        for split, part in zip(("validation", "test", "train"), _divide(rng, files, [validation, test])):
            splits[split][name] = part
    return splits


def class_folders(folder: Path) -> dict[str, list[Path]]:
    """Class -> its image files, sorted, of the folders <folder>/<class>/. Raises ValueError where there is none."""
    classes = {
        place.name: sorted(file for file in place.iterdir() if file.suffix.lower() in IMAGES)
        for place in (sorted(folder.iterdir()) if folder.is_dir() else ())
        if place.is_dir()
    }
    if not classes:
        raise ValueError(f"{folder}: no folder of patches here; expected one folder of images per class")
    return classes


def _divide(rng: np.random.Generator, files: list[Path], shares: list[float]) -> list[list[Path]]:
    """Shuffled files in disjoint parts: one per share, then the rest."""
    shuffled = [files[i] for i in rng.permutation(len(files))]
    cuts = np.rint(np.cumsum(shares) * len(files)).astype(int)
    return [sorted(shuffled[a:b]) for a, b in zip([0, *cuts], [*cuts, len(files)])]


def draw_mosaic(
    rng: np.random.Generator, positive: Patches, negative: Patches, *, tumour: bool, plan: MosaicPlan
) -> Mosaic:
    """Lay out one slide. The same generator gives the same slide; `positive` is not touched where tumour is False."""
    wanted = int(rng.integers(plan.tissue_patches[0], plan.tissue_patches[1], endpoint=True))
    side = int(np.ceil(np.sqrt(wanted / _TISSUE_SHARE)))
    field = _outline(rng, side, wanted)
    cover = (field > 0).reshape(side, _FIELD, side, _FIELD).mean((1, 3))
    chosen = np.zeros((side, side), bool)
    if tumour:
        count = max(1, round(rng.uniform(*plan.positive_fraction) * cover.sum()))
        chosen = _tumour_cells(rng, cover == 1, count, clustered=rng.random() < plan.clustered)
    px = plan.patch_px or _width(next(iter(negative.values()))[0])
    left, top = (0, 0) if plan.aligned else rng.integers(px, size=2)
    rgb = np.full(((side + 1) * px, (side + 1) * px, 3), BACKGROUND, np.uint8)
    hands = {True: _hand(rng, positive), False: _hand(rng, negative)}
    regions = []
    for row, column in np.argwhere(cover > 0):
        name, path = next(hands[bool(chosen[row, column])])
        y, x = top + row * px, left + column * px
        patch = _read_patch(path, px, symmetry=int(rng.integers(8)))
        if chosen[row, column]:
            regions.append((name, np.array([(x, y), (x + px, y), (x + px, y + px), (x, y + px)], float)))
        rgb[y : y + px, x : x + px] = _trim(patch, field, row, column)
    return Mosaic(rgb, tuple(regions), float(chosen.sum() / cover.sum()))


def _outline(rng: np.random.Generator, side: int, wanted: int) -> np.ndarray:
    """float32 [side·16, side·16], positive in two to four fragments that together have the area of `wanted` patches."""
    size = side * _FIELD
    field = np.full((size, size), -np.inf, np.float32)
    for box in scattered_boxes(rng, size, size, int(rng.integers(2, 5))):
        field[box.y : box.y + box.height, box.x : box.x + box.width] = fragment_field(rng, box.height, box.width)
    return field - np.partition(field, -wanted * _FIELD**2, axis=None)[-wanted * _FIELD**2]


def _tumour_cells(rng: np.random.Generator, whole: np.ndarray, count: int, *, clustered: bool) -> np.ndarray:
    """bool [side, side]: `count` of the cells that the outline does not trim, around one of them or anywhere."""
    places = np.argwhere(whole)
    if len(places) < count:
        raise ValueError(
            f"{len(places)} patches lie whole within the tissue, {count} are to be tumour: raise tissue_patches"
        )
    order = rng.random(len(places))
    if clustered:
        order = order + np.hypot(*(places - places[rng.integers(len(places))]).T)
    chosen = np.zeros_like(whole)
    chosen[tuple(places[np.argsort(order)[:count]].T)] = True
    return chosen


def _hand(rng: np.random.Generator, patches: Patches) -> Iterator[tuple[str, Path]]:
    """Patches without end, in classes of a share that differs from slide to slide; none twice before all of its class."""
    names = sorted(patches)
    share = rng.dirichlet(np.ones(len(names)))
    waiting: dict[str, list[Path]] = {name: [] for name in names}
    while True:
        name = names[rng.choice(len(names), p=share)]
        if not waiting[name]:
            waiting[name] = [patches[name][i] for i in rng.permutation(len(patches[name]))]
        yield name, waiting[name].pop()


def _width(path: Path) -> int:
    with Image.open(path) as image:
        return image.width


def _read_patch(path: Path, side: int, *, symmetry: int) -> np.ndarray:
    with Image.open(path) as image:
        pixels = image.convert("RGB")
    if pixels.size != (side, side):
        pixels = pixels.resize((side, side), Image.Resampling.BICUBIC)
    turned = np.rot90(np.asarray(pixels), symmetry % 4)
    return turned[:, ::-1] if symmetry >= 4 else turned


def _trim(patch: np.ndarray, field: np.ndarray, row: int, column: int) -> np.ndarray:
    """White where the outline leaves the patch."""
    corner = field[row * _FIELD : (row + 1) * _FIELD, column * _FIELD : (column + 1) * _FIELD]
    if (corner > 0).all():
        return patch
    smooth = Image.fromarray(np.maximum(corner, -1.0)).resize(patch.shape[1::-1], Image.Resampling.BILINEAR)
    return np.where((np.asarray(smooth) > 0)[..., None], patch, np.asarray(BACKGROUND, np.uint8))
