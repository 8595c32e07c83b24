"""Outlines of regions: the same cells back, polygons that are valid, regions with what was measured in them."""

import dataclasses
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from scipy import ndimage

from data_pipelines.contours import find_regions, group_colours, region_group, trace_contours
from data_pipelines.polygons import rasterize

masks = arrays(bool, array_shapes(min_dims=2, max_dims=2, max_side=9))


@dataclasses.dataclass
class Map:
    values: np.ndarray
    missing: np.ndarray
    downsample: float = 112.5
    origin: tuple[float, float] = (1000.25, 300.0)
    mpp: float = 28.44


def picture(*rows):
    return np.array([[cell == "#" for cell in row] for row in rows])


def area(ring):
    """Signed: positive when the ring turns from x to y."""
    (x, y), (xn, yn) = ring.T, np.roll(ring, -1, axis=0).T
    return float((x * yn - y * xn).sum() / 2)


def crossings(ring, x, y):
    """How many edges a ray from (x, y) to the right crosses, one by one."""
    ends = zip(ring.tolist(), np.roll(ring, -1, axis=0).tolist())
    return sum(a[0] > x and min(a[1], b[1]) < y < max(a[1], b[1]) for a, b in ends)


@settings(deadline=None)
@given(masks)
def test_contours_hold_exactly_the_cells_of_the_mask(mask):
    rings = [ring for shape in trace_contours(mask) for ring in (shape.exterior, *shape.holes)]
    for row, column in np.ndindex(mask.shape):
        odd = sum(crossings(ring, column + 0.5, row + 0.5) for ring in rings) % 2
        assert odd == mask[row, column]


@settings(deadline=None)
@given(masks, st.floats(0.5, 500), st.tuples(st.floats(-1e5, 1e5), st.floats(-1e5, 1e5)))
def test_contours_rasterise_to_the_mask_at_any_scale(mask, downsample, origin):
    shapes = trace_contours(mask, downsample=downsample, origin=origin)
    height, width = mask.shape
    again = rasterize(shapes, width=width, height=height, downsample=downsample, origin=origin)
    np.testing.assert_array_equal(again, mask)


@settings(deadline=None)
@given(masks)
def test_polygons_are_simple_turn_at_every_vertex_and_belong_to_the_labels(mask):
    labels, count = ndimage.label(mask)
    shapes = trace_contours(mask)
    assert len(shapes) == count
    for label, shape in enumerate(shapes, start=1):
        np.testing.assert_array_equal(
            rasterize([shape], width=mask.shape[1], height=mask.shape[0], downsample=1), labels == label
        )
        assert area(shape.exterior) > 0 and all(area(hole) < 0 for hole in shape.holes)
        for ring in (shape.exterior, *shape.holes):
            assert len(np.unique(ring, axis=0)) == len(ring)  # no point twice
            step = np.roll(ring, -1, axis=0) - ring
            assert ((step == 0).sum(1) == 1).all()  # level or upright
            assert ((step[:, 0] == 0) != (np.roll(step[:, 0], 1) == 0)).all()  # by turns


@pytest.mark.parametrize(
    "rows, holes",
    [
        (("#.", ".#"), [0, 0]),  # two regions that touch
        (("###", "#.#", "###"), [1]),
        (("###", "#.#", "##."), [1]),  # closed but for a corner
        ((".##", "#.#", "###"), [1]),
        (("####", "#.##", "##.#", "####"), [2]),  # two holes that touch
        (("#####", "#...#", "#.#.#", "#...#", "#####"), [1, 0]),  # an island
        (("...",), []),
    ],
)
def test_what_is_a_hole(rows, holes):
    assert [len(shape.holes) for shape in trace_contours(picture(*rows))] == holes


def test_many_cells_are_traced_quickly():
    noise = ndimage.gaussian_filter(np.random.default_rng(0).random((1500, 1500)), 2)
    begin = time.process_time()
    shapes = trace_contours(noise > 0.5)
    assert sum(len(shape.exterior) for shape in shapes) > 100_000
    assert time.process_time() - begin < 5


def test_regions_have_their_measurements_groups_and_places():
    values = np.full((6, 8), np.nan, np.float32)
    values[1:3, 1:4] = [[0.6, 0.7, 0.5], [0.6, 0.6, 0.4]]
    values[4, 6:] = [0.9, 0.95]
    slide_map = Map(values, np.zeros(values.shape, bool))
    low, other, high = find_regions(slide_map, thresholds=(0.5, 0.9), label="score")
    assert [r.shape.group for r in (low, other, high)] == ["score ≥ 0.5"] * 2 + ["score ≥ 0.9"]
    assert low.shape.group == region_group("score", 0.5)
    assert low.shape.score == low.measurements["maximum"] == pytest.approx(0.95)  # the highest first
    assert high.measurements == {**low.measurements, "threshold": 0.9}
    assert other.measurements == pytest.approx(
        {"threshold": 0.5, "maximum": 0.7, "mean": 0.6, "cells": 5, "area µm^2": 5 * 28.44**2}
    )
    assert low.shape.bounds == (1000.25 + 6 * 112.5, 300 + 4 * 112.5, 1000.25 + 8 * 112.5, 300 + 5 * 112.5)
    assert [r.measurements["cells"] for r in find_regions(slide_map, thresholds=[0.5], least_cells=3)] == [5]
    assert not list(find_regions(slide_map, thresholds=[0.99]))


def test_groups_have_the_colour_of_their_threshold_in_the_picture():
    colours = group_colours([0.0, 1.0], label="score", colormap="gray")
    assert colours == {"score ≥ 0": (0, 0, 0), "score ≥ 1": (255, 255, 255)}
