"""Maps of slides: where tiles land, what overlaps give, and that nothing is ever painted where nothing is known."""

import numpy as np
import pytest

from srcc_jax.kernels.heat_maps import HeatMap, TileMapAverage, paint_tiles, smoothed

SCALE = {"tile": 224, "stride": 112, "mpp": 1.0, "slide_mpp": 0.25}  # 1 px of the model is 4 level-0 px


def test_blocky_map_of_four_tiles_keeps_the_slide_score():
    x, y = np.array([0, 2, 0, 2]), np.array([0, 0, 2, 2])
    heat = paint_tiles(np.array([0.1, 0.7, 0.3, 0.2]), x, y, tile=2, stride=2, mpp=1.0, slide_mpp=1.0)
    squares = np.kron(heat.values, np.ones((2, 2)))  # in px
    expected = [[0.1, 0.1, 0.7, 0.7], [0.1, 0.1, 0.7, 0.7], [0.3, 0.3, 0.2, 0.2], [0.3, 0.3, 0.2, 0.2]]
    np.testing.assert_allclose(squares, expected, rtol=1e-6)
    assert np.nanmax(heat.values) == np.float32(0.7)


def test_scale_and_origin_put_each_square_in_the_middle_of_its_tile():
    x, y, probability = np.array([1000.0, 1448.0, 2344.0]), np.array([500.0, 948.0, 500.0]), np.array([0.1, 0.2, 0.3])
    heat = paint_tiles(probability, x, y, **SCALE)
    assert (heat.downsample, heat.mpp) == (448, 112)
    for k in range(3):
        centre = (x[k] + 224 * 4 / 2, y[k] + 224 * 4 / 2)
        column, row = (int((c - o) // heat.downsample) for c, o in zip(centre, heat.origin))
        assert heat.values[row, column] == np.float32(probability[k])
        left, top = heat.origin[0] + column * heat.downsample, heat.origin[1] + row * heat.downsample
        assert (left + 224, top + 224) == centre
    assert np.isnan(heat.values).sum() == heat.values.size - 3 and not heat.missing.any()


def test_unreadable_tiles_are_missing_not_zero():
    x = np.array([0.0, 448.0, 1344.0])
    heat = paint_tiles(np.array([0.5, np.nan, 0.25]), x, np.zeros(3), **SCALE)
    np.testing.assert_array_equal(heat.values, np.array([[0.5, np.nan, np.nan, 0.25]], np.float32))
    np.testing.assert_array_equal(heat.missing, [[False, True, False, False]])


def test_flush_last_tile_on_an_occupied_cell_shows_the_higher():
    heat = paint_tiles(np.array([0.2, 0.9]), np.array([0, 26]), np.zeros(2), **{**SCALE, "slide_mpp": 1.0})
    np.testing.assert_array_equal(heat.values, np.array([[0.9]], np.float32))


def test_overlapping_tiles_are_averaged():
    average = TileMapAverage(np.array([0, 2]), np.zeros(2), size=1, tile=4, stride=2, mpp=1.0, slide_mpp=1.0, cell=1)
    average.add(np.array([0, 1]), np.array([1.0, 3.0]).reshape(2, 1, 1))
    np.testing.assert_array_equal(average.result().values, np.tile([1, 1, 2, 2, 3, 3], (4, 1)))


def slow_average(x, y, maps, shape, side, cell):
    """Mean over tiles, cell by cell; maps [N, side, side]."""
    values = np.full(shape, np.nan)
    for row, column in np.ndindex(shape):
        seen = []
        for n in range(len(x)):
            down, right = row - round(y[n] / cell), column - round(x[n] / cell)
            if 0 <= down < side and 0 <= right < side and not np.isnan(maps[n]).any():
                seen.append(maps[n, down, right])
        if seen:
            values[row, column] = np.mean(seen)
    return values


@pytest.mark.parametrize("stride", [32, 64])
def test_average_equals_a_loop_over_cells(stride):
    """Stride 32 as in the paper: the 7 x 7 maps fall on the cells exactly and nothing is resampled."""
    rng = np.random.default_rng(0)
    x, y = (a.ravel() * stride for a in np.meshgrid(np.arange(4), np.arange(3)))
    keep = rng.random(len(x)) < 0.7
    keep[[0, -1]] = True
    x, y = x[keep], y[keep]
    maps = rng.random((len(x), 7, 7)).astype(np.float32)
    maps[2, 3, 3] = np.nan
    average = TileMapAverage(x, y, size=7, tile=224, stride=stride, mpp=1.0, slide_mpp=1.0)
    order = rng.permutation(len(x))
    for rows in np.array_split(order, 3):
        average.add(rows, maps[rows])
    heat = average.result()
    assert heat.mpp == heat.downsample == 32
    np.testing.assert_allclose(heat.values, slow_average(x, y, maps, heat.values.shape, 7, 32), rtol=1e-5)


def test_tiles_that_never_arrive_are_missing():
    average = TileMapAverage(np.array([0, 224, 672]), np.zeros(3), size=7, tile=224, stride=224, mpp=1.0, slide_mpp=1.0)
    average.add(np.array([0]), np.ones((1, 7, 7)))
    heat = average.result()
    np.testing.assert_array_equal(heat.values[0], np.repeat([1, np.nan, np.nan, np.nan], 7))
    np.testing.assert_array_equal(heat.missing[0], np.repeat([False, True, False, True], 7))


def test_upsampling_is_bilinear_between_cell_centres():
    average = TileMapAverage(np.zeros(1), np.zeros(1), size=2, tile=8, stride=8, mpp=0.5, slide_mpp=0.25, cell=2)
    average.add(np.array([0]), np.array([[[0.0, 4.0], [0.0, 4.0]]]))
    heat = average.result()
    np.testing.assert_allclose(heat.values, np.tile([0, 1, 3, 4], (4, 1)))
    assert (heat.downsample, heat.mpp) == (4, 1.0)


@pytest.mark.parametrize(
    "tile, stride, size, cell", [(224, 112, 7, 28), (240, 120, 8, 30), (224, 32, 7, 32), (260, 130, 9, 26)]
)
def test_cells_divide_tile_and_stride_and_are_not_coarser_than_the_maps(tile, stride, size, cell):
    heat = TileMapAverage(
        np.array([0, stride]), np.zeros(2), size=size, tile=tile, stride=stride, mpp=1.0, slide_mpp=1.0
    ).result()
    assert heat.mpp == cell and heat.values.shape == (tile / cell, (tile + stride) / cell)


def test_no_tiles_and_cells_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="without tiles"):
        paint_tiles(np.zeros(0), np.zeros(0), np.zeros(0), **SCALE)
    with pytest.raises(ValueError, match="5 px does not divide a tile of 224 px"):
        TileMapAverage(np.zeros(1), np.zeros(1), size=7, cell=5, **SCALE)


def test_smoothing_is_the_weighted_mean_of_the_cells_that_have_a_value():
    values = np.random.default_rng(0).random((9, 12)).astype(np.float32)
    values[2:4, 5:7], values[8, 0] = np.nan, np.nan
    heat = HeatMap(values, np.isnan(values), 16.0, (3.0, 4.0), 8.0)
    row, column = np.indices(values.shape)
    wanted = np.full(values.shape, np.nan)
    for r, c in zip(*np.nonzero(np.isfinite(values))):
        near = (abs(row - r) <= 6) & (abs(column - c) <= 6)  # four sigmas
        weight = np.exp(-((row - r) ** 2 + (column - c) ** 2) / (2 * 1.5**2)) * near * np.isfinite(values)
        wanted[r, c] = np.nansum(weight * values) / weight.sum()
    found = smoothed(heat, sigma=1.5)
    np.testing.assert_allclose(found.values, wanted, rtol=1e-6)
    assert (found.origin, found.downsample) == (heat.origin, heat.downsample) and found.missing is heat.missing
