"""Cells of a slide that is looked at in windows: each once, those of the whole map, and how densely they lie."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from data_pipelines.tiles import Grid, tile_slide
from experiments.run.cells.prediction_windows import CellProgress, Cores
from srcc_jax.cell_windows import WindowCells, cells_of_window, core_borders, found_once
from srcc_jax.instances import Instances, find_instances
from srcc_jax.kernels.density import density_map
from tests.test_instances import scene

SPREAD = 0.3


# Ownership


def cells_at(window, boxes, core, *, margin=8.0, side=200, corner=(0, 0)):
    """Whole boxes as masks, told by one window."""
    label = np.zeros((side, side), np.int32)
    for number, (x1, y1, x2, y2) in enumerate(boxes, start=1):
        label[y1 - corner[1] : y2 - corner[1], x1 - corner[0] : x2 - corner[0]] = number
    box = np.asarray(boxes, float).reshape(-1, 4) - np.tile(corner, 2)
    found = Instances(label, box, np.full(len(box), 0.9), np.bincount(label.ravel())[1:], label > 0)
    return cells_of_window(found, window=window, corner=corner, core=core, margin=margin, slide=(1000, 1000))


LEFT, RIGHT = (0, 0, 150, 200), (150, 0, 300, 200)  # cores of two windows, beginning at x = 0 and 100


def counted(left, right):
    """Boxes that count, as (window, box)."""
    parts = [cells_at(0, left, LEFT), cells_at(1, right, RIGHT, corner=(100, 0))]
    cells = WindowCells.concatenate(parts)
    kept = cells.where(found_once(cells, np.array([0, 0]), np.array([0, 1])))
    assert [mask.all() for mask in kept.masks()] == [True] * len(kept)
    return [(int(window), tuple(box)) for window, box in zip(kept.window, kept.box.tolist())]


def test_a_cell_of_both_windows_counts_once():
    box = (130, 50, 160, 80)  # its middle at 145
    assert counted([box], [box]) == [(0, box)]
    assert counted([box], []) == [(0, box)]
    assert counted([], [box]) == []  # what the other window saw, its own does not


def test_a_cell_that_each_window_finds_on_its_own_side_counts_once():
    assert counted([(130, 50, 168, 80)], [(132, 50, 170, 80)]) == [(0, (130, 50, 168, 80))]


def test_a_cell_that_each_window_leaves_to_the_other_counts_once():
    assert counted([(132, 50, 170, 80)], [(130, 50, 168, 80)]) == [(0, (132, 50, 170, 80))]


def test_neighbours_on_both_sides_of_a_border_both_count():
    one, other = (120, 50, 148, 80), (148, 50, 176, 80)
    assert counted([one, other], [one, other]) == [(0, one), (1, other)]


def test_a_cell_that_a_window_cuts_is_told():
    cells = cells_at(0, [(140, 50, 200, 80), (0, 0, 10, 10)], (0, 0, 180, 200), side=200)
    assert cells.cut.tolist() == [True, False] and cells.own.all()


def test_cores_end_in_the_middle_of_overlaps():
    np.testing.assert_array_equal(core_borders(np.array([0, 48, 60]), tile=64, length=124), [0, 56, 86, 124])


@pytest.fixture(scope="module")
def crowd():
    """Probabilities of cells of up to 32 px, many of which touch, and the cells of the whole map."""
    random = np.random.default_rng(0)
    at = [(x + random.uniform(-5, 5), y + random.uniform(-5, 5)) for y in range(0, 500, 34) for x in range(0, 500, 34)]
    cells = [(x, y, random.uniform(9, 16)) for x, y in at if random.random() < 0.6]
    whole = scene(cells, side=480).astype(np.float16).astype(np.float32)
    return whole, find_instances(whole, threshold=0.5, min_area=30, spread=SPREAD)


@pytest.mark.parametrize("stride, block", [(112, 2), (112, 1), (96, 3)])
def test_windows_find_the_cells_of_the_whole_map(crowd, stride, block):
    """Also at the slide's edges, and in whatever order threads finish. The map is a function of the pixel, as no network quite is."""
    (whole, wanted), side, tile = crowd, 480, 192
    tiles = tile_slide(
        "s", width=side, height=side, slide_mpp=1.0, grid=Grid(tile=tile, stride=stride, mpp=1.0, flush=True),
        tissue=np.ones((30, 30), bool), mask_downsample=16.0, min_tissue=0.0,
    )  # fmt: skip
    borders = core_borders(tiles.grid.positions(side), tile=tile, length=side)
    cores = Cores(side, side, 1.0, borders, borders)
    with ThreadPoolExecutor(3) as pool:
        progress = CellProgress(
            tiles, cores, block=block, pool=pool, ahead=4,
            find=lambda part: find_instances(part, threshold=0.5, min_area=30, spread=SPREAD),
        )  # fmt: skip
        for rows in tiles.blocks(block):
            maps = np.zeros((len(rows), tile, tile, 3), np.float16)
            for one, u, v in zip(maps, tiles.u[rows], tiles.v[rows]):
                part = whole[v : v + tile, u : u + tile]
                one[: part.shape[0], : part.shape[1]] = part
            progress.add(rows, {"probability": maps})
        found = progress.cells()
    found = found.where(found_once(found, tiles.i, tiles.j))
    order = np.lexsort(found.box.T)
    theirs = np.lexsort(wanted.box.T)
    assert len(found) == len(wanted) > 100
    np.testing.assert_array_equal(found.box[order], wanted.box[theirs])
    np.testing.assert_array_equal(found.area[order], wanted.area[theirs])
    np.testing.assert_allclose(found.score[order], wanted.score[theirs], rtol=1e-12)
    painted = np.zeros((side, side), bool)
    for (x1, y1, x2, y2), mask in zip(found.box, found.masks()):
        assert not (painted[y1:y2, x1:x2] & mask).any()
        painted[y1:y2, x1:x2] |= mask
    np.testing.assert_array_equal(painted, wanted.label > 0)


# Density


def test_density_is_of_the_part_that_was_read():
    random = np.random.default_rng(0)
    x, y = random.uniform(0, 300, 200), random.uniform(0, 150, 200)
    read, unread = np.array([[0, 0, 130, 160], [130, 0, 220, 160]]), np.array([[220, 0, 310, 160]])
    keep = x < 220
    found = density_map(x[keep], y[keep], read=read, unread=unread, square_um=50, slide_mpp=0.5, size=(310, 160))
    assert found.values.shape == (2, 4) and (found.downsample, found.mpp, found.origin) == (100, 50, (0, 0))
    for row, top in enumerate((0, 100)):
        height = min(top + 100, 160) - top
        for column, width in enumerate((100, 100)):
            left = 100 * column
            count = ((x >= left) & (x < left + 100) & (y >= top) & (y < top + 100)).sum()
            assert found.values[row, column] == pytest.approx(count / (width * height * 0.25 / 1e6), rel=1e-6)
    assert np.isnan(found.values[:, 2:]).all()  # a fifth of the third column was read
    np.testing.assert_array_equal(found.missing, [[False, False, True, True]] * 2)
