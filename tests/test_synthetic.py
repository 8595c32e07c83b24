"""Drawn slides and mosaics: the truth lies where the pixels are, and a seed decides every byte."""

import hashlib
import itertools

import numpy as np
import openslide
import pytest
from PIL import Image
from scipy import ndimage

from data_pipelines.annotations import read_annotation
from data_pipelines.cells import Stamp
from data_pipelines.cohort import read_cohort
from data_pipelines.drawing import StampSet, draw_slide
from data_pipelines.mosaics import MosaicPlan, draw_mosaic, folder_patches, pcam_patches
from data_pipelines.polygons import Shape, rasterize
from data_pipelines.pyramids import BACKGROUND
from data_pipelines.synthetic import drawn_cohort, large_slide, mosaic_cohort

MPP = 1.0


@pytest.fixture(scope="module")
def stamps():
    return StampSet(np.random.default_rng(0), MPP)


def read_level(slide, level):
    return np.asarray(slide.read_region((0, 0), level, slide.level_dimensions[level]))[..., :3]


def digests(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_large_slide_is_mostly_background(tmp_path):
    path = large_slide(tmp_path / "a.tiff", side_px=4096, island_px=512, tissue=0.05, mpp=MPP)
    with openslide.OpenSlide(path) as slide:
        pixels = read_level(slide, 2)
    light = np.median(pixels, axis=(0, 1))
    assert 0.03 < (pixels.min(axis=-1) < light.min() - 20).mean() < 0.07


# Drawn slides


def test_annotations_cover_exactly_what_signet_ring_cells_changed(stamps):
    """Drawn twice, once with invisible signet ring cells: the pixels that differ are those inside the outlines."""
    drawn = draw_slide(np.random.default_rng(3), stamps, side_px=700, positive=True)
    blind = StampSet.__new__(StampSet)
    blind.__dict__.update(stamps.__dict__)
    cells = stamps.stamps["signet_ring_cell"]
    blind.stamps = stamps.stamps | {"signet_ring_cell": [Stamp(c.stain, 0 * c.cover, c.outline) for c in cells]}
    without = draw_slide(np.random.default_rng(3), blind, side_px=700, positive=True)
    changed = (drawn.rgb != without.rgb).any(axis=-1)
    shapes = [Shape(kind="polygon", exterior=outline) for outline in drawn.signet_ring_cells]
    annotated = rasterize(shapes, width=700, height=700, downsample=1.0)
    assert len(shapes) > 10 and changed.any()
    assert not (changed & ~ndimage.binary_dilation(annotated, iterations=2)).any()
    assert changed[ndimage.binary_erosion(annotated)].mean() > 0.99


def test_turning_a_stamp_turns_its_outline(stamps):
    stamp = stamps.stamps["signet_ring_cell"][0]
    for symmetry in range(8):
        turned = stamp.turned(symmetry)
        side = turned.cover.shape[0]
        inside = rasterize([Shape(kind="polygon", exterior=turned.outline)], width=side, height=side, downsample=1.0)
        assert (inside ^ (turned.cover > 0.5)).mean() < 0.03


def test_positive_and_negative_slides_have_the_same_colours(stamps):
    """The two slides of one seed differ in their nuclei, not in their mean colour: less than 1 of 255 levels."""
    for seed in range(3):
        both = [draw_slide(np.random.default_rng(seed), stamps, side_px=700, positive=p).rgb for p in (True, False)]
        assert (both[0] != both[1]).any()
        difference = both[0].mean((0, 1)) - both[1].mean((0, 1))
        assert np.abs(difference).max() < 1


def test_stain_differs_from_slide_to_slide(stamps):
    means = []
    for seed in range(4):
        rgb = draw_slide(np.random.default_rng(seed), stamps, side_px=300, positive=False).rgb
        means.append(rgb[rgb.min(axis=-1) < 215].mean(axis=0))
    assert np.ptp(means, axis=0).max() > 5


def test_drawn_cohort_is_a_function_of_its_seed(tmp_path):
    options = {"slides": {"train": (1, 1), "test": (1, 0)}, "side_px": 400, "mpp": 2.0}
    calls = []
    drawn_cohort(tmp_path / "a", seed=5, progress=lambda *state: calls.append(state), **options)
    drawn_cohort(tmp_path / "b", seed=5, workers=2, **options)
    drawn_cohort(tmp_path / "c", seed=6, **options)
    first, second, other = (digests(tmp_path / name) for name in "abc")
    assert first == second and first.keys() == other.keys()
    assert all(first[name] != other[name] for name in first if not name.endswith(".csv"))
    assert calls == [(1, 3), (2, 3), (3, 3)]


def test_drawn_cohort_says_what_it_holds(tmp_path):
    cohort = read_cohort(drawn_cohort(tmp_path, slides={"train": (1, 1), "test": (1, 2)}, side_px=400, mpp=2.0))
    assert [(record.split, record.label) for record in cohort] == [
        ("train", "srcc"), ("train", "normal"), ("test", "srcc"), ("test", "normal"), ("test", "normal")
    ]  # fmt: skip
    assert len({record.patient_id for record in cohort}) == 5
    for record in cohort:
        with openslide.OpenSlide(record.path) as slide:
            assert slide.dimensions == (400, 400)
            assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(record.mpp) == 2.0
        assert bool(record.annotation) == (record.label == "srcc")
        if record.annotation:
            shapes = read_annotation(record.annotation)
            assert shapes and {shape.group for shape in shapes} == {"SRCC"}


# Mosaics

COLOURS = {"AC": (200, 30, 30), "H": (30, 200, 30), "T": (30, 30, 200)}
BRIGHTER = {"train": 0, "validation": 20, "test": 40}
PX = 32


@pytest.fixture(scope="module")
def patches(tmp_path_factory):
    """Patches of one colour for each class and split, so that each pixel of a mosaic tells where it comes from."""
    root = tmp_path_factory.mktemp("patches")
    found = {split: {name: [] for name in COLOURS} for split in BRIGHTER}
    for (split, more), (name, colour), number in itertools.product(BRIGHTER.items(), COLOURS.items(), range(2)):
        path = root / f"{split}_{name}_{number}.png"
        Image.new("RGB", (PX, PX), tuple(value + more for value in colour)).save(path)
        found[split][name].append(path)
    return found


@pytest.mark.parametrize("clustered", [0.0, 1.0])
def test_mosaic_annotations_lie_on_the_tumour_patches(patches, clustered):
    plan = MosaicPlan(tissue_patches=(120, 140), clustered=clustered)
    pools = [{name: patches["test"][name] for name in names} for names in (("AC",), ("H", "T"))]
    for seed in range(5):
        mosaic = draw_mosaic(np.random.default_rng(seed), *pools, tumour=True, plan=plan)
        height, width = mosaic.rgb.shape[:2]
        shapes = [Shape(kind="polygon", exterior=corners) for _, corners in mosaic.tumour]
        annotated = rasterize(shapes, width=width, height=height, downsample=1.0)
        tumour = (mosaic.rgb == np.array(COLOURS["AC"]) + BRIGHTER["test"]).all(axis=-1)
        tissue = (mosaic.rgb != BACKGROUND).any(axis=-1)
        np.testing.assert_array_equal(annotated, tumour)
        assert 1 / 140 <= mosaic.tumour_fraction <= 0.05 + 0.5 / 120
        assert tumour.sum() / tissue.sum() == pytest.approx(mosaic.tumour_fraction, rel=0.03)
        assert 110 < tissue.sum() / PX**2 < 150
        pieces = ndimage.label(ndimage.binary_dilation(annotated))[1]
        assert pieces <= 2 if clustered else pieces >= min(2, len(shapes))


def test_mosaic_outline_is_not_made_of_squares(patches):
    pools = [{name: patches["train"][name] for name in names} for names in (("AC",), ("H", "T"))]
    mosaic = draw_mosaic(np.random.default_rng(0), *pools, tumour=False, plan=MosaicPlan())
    tissue = (mosaic.rgb != BACKGROUND).any(axis=-1)
    corners = ndimage.correlate(tissue.astype(int), np.ones((2, 2), int))
    assert not mosaic.tumour
    assert (np.isin(corners, (1, 3))).sum() > 500  # a lattice of squares would have some tens of corners


def test_aligned_mosaic_has_no_tile_of_two_patches(patches):
    pools = [{name: patches["train"][name] for name in names} for names in (("AC",), ("H", "T"))]
    mosaic = draw_mosaic(np.random.default_rng(0), *pools, tumour=True, plan=MosaicPlan(aligned=True))
    rows, columns = (side // PX for side in mosaic.rgb.shape[:2])
    tiles = mosaic.rgb.reshape(rows, PX, columns, PX, 3).swapaxes(1, 2).reshape(-1, PX * PX, 3)
    colours = [np.unique(tile[(tile != BACKGROUND).any(1)], axis=0) for tile in tiles]
    assert max(map(len, colours)) == 1 and sum(map(len, colours)) > 100


def test_mosaic_cohort_keeps_splits_apart(tmp_path, patches):
    options = {
        "patches": patches,
        "positive_classes": ["AC"],
        "negative_classes": ["H", "T"],
        "slides": {"train": (1, 1), "validation": (1, 1), "test": (1, 1)},
        "mpp": MPP,
        "plan": MosaicPlan(tissue_patches=(40, 50), positive_fraction=(0.03, 0.1)),
    }
    cohort = read_cohort(mosaic_cohort(tmp_path / "a", seed=1, **options))
    mosaic_cohort(tmp_path / "b", seed=1, workers=2, **options)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    for record in cohort:
        with openslide.OpenSlide(record.path) as slide:
            pixels = read_level(slide, 0).astype(int)
            assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(MPP)
        colours = {
            (split, name): np.array(colour) + more
            for (split, more), (name, colour) in itertools.product(BRIGHTER.items(), COLOURS.items())
        }
        seen = {key for key, colour in colours.items() if (np.abs(pixels - colour).max(axis=-1) < 6).sum() > PX**2 / 2}
        expected = ("AC", "H", "T") if record.label == "tumour" else ("H", "T")
        assert seen == {(record.split, name) for name in expected}
        if record.annotation:
            shapes = read_annotation(record.annotation)
            inside = rasterize(shapes, width=pixels.shape[1], height=pixels.shape[0], downsample=1.0)
            assert {shape.group for shape in shapes} == {"tumour"}
            tumour = np.abs(pixels - colours[record.split, "AC"]).max(axis=-1) < 85  # half way to the next class
            assert (inside & tumour).sum() / (inside | tumour).sum() > 0.95  # JPEG blurs the seams


def test_patches_in_two_splits_are_refused(tmp_path, patches):
    leaking = patches | {"test": patches["test"] | {"H": patches["train"]["H"]}}
    with pytest.raises(ValueError, match="'train' and 'test'"):
        mosaic_cohort(
            tmp_path,
            patches=leaking,
            positive_classes=["AC"],
            negative_classes=["H", "T"],
            slides={"train": (1, 1), "test": (1, 1)},
            mpp=MPP,
        )


def test_missing_classes_and_hopeless_fractions_are_refused(tmp_path, patches):
    with pytest.raises(ValueError, match=r"'train' has no patches of \['X'\]"):
        mosaic_cohort(
            tmp_path, patches=patches, positive_classes=["X"], negative_classes=["H"], slides={"train": (1, 1)}, mpp=MPP
        )
    with pytest.raises(ValueError, match="less than one patch of tumour"):
        MosaicPlan(tissue_patches=(10, 20))
    with pytest.raises(ValueError, match="no folder of patches here"):
        folder_patches(tmp_path, seed=0)


def test_real_patches_make_disjoint_splits_and_a_slide(tmp_path, shared_data):
    collections = [
        folder_patches(shared_data / "patches" / "colorectal_5class_224", seed=0),
        pcam_patches(shared_data / "patches" / "pcam_kaggle", seed=0),
    ]
    for splits in collections:
        files = [path for classes in splits.values() for paths in classes.values() for path in paths]
        assert len(files) == len(set(files)) and all(path.is_file() for path in files)
    colorectal, pcam = collections
    assert {name: [len(classes[name]) for classes in colorectal.values()] for name in ("AC", "V")} == {
        "AC": [120, 30, 40],
        "V": [120, 30, 40],
    }
    assert sum(len(classes["tumour"]) for classes in pcam.values()) == 360
    cohort = read_cohort(
        mosaic_cohort(
            tmp_path,
            patches=colorectal,
            positive_classes=["AC"],
            negative_classes=["H", "S", "T", "V"],
            slides={"test": (1, 0)},
            mpp=MPP,
            plan=MosaicPlan(patch_px=56),
        )
    )
    shapes = read_annotation(cohort.records[0].annotation)
    assert 1 <= len(shapes) <= 9 and {shape.name for shape in shapes} == {"AC"}
    with openslide.OpenSlide(cohort.records[0].path) as slide:
        pixels = read_level(slide, 0)
    inside = rasterize(shapes, width=pixels.shape[1], height=pixels.shape[0], downsample=1.0)
    assert inside.sum() == len(shapes) * 56**2
    assert pixels[inside].std() > 15  # tissue, not paper
