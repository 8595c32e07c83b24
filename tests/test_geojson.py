"""GeoJSON for QuPath: valid, whole or not there, the same geometry back, the same bytes again, memory that stays flat."""

import json
import tracemalloc
import uuid

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from data_pipelines.annotations import read_annotation
from data_pipelines.contours import Region, trace_contours
from data_pipelines.geojson import region_features, shape_feature, tile_features, write_geojson
from data_pipelines.polygons import Shape, rasterize

SQUARE = np.array([[0, 0], [0, 10], [10, 10], [10, 0]], float)  # turning the wrong way
HOLE = np.array([[2, 2], [4, 2], [4, 4.5]])


def tiles(count, **options):
    x = np.arange(count) * 448.5
    measurements = {"probability": np.linspace(0, 1, count, dtype=np.float32)}
    return tile_features(x, x[::-1], 448.5, slide_id="s", measurements=measurements, **options)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    arrays(bool, array_shapes(min_dims=2, max_dims=2, max_side=9)),
    st.floats(0.5, 500),
    st.tuples(st.integers(0, 10**5), st.integers(0, 10**5)),
)
def test_any_mask_comes_back_as_it_was(tmp_path, mask, downsample, offset):
    shapes = trace_contours(mask, downsample=downsample, origin=(offset[0] + 7, offset[1]), group="g")
    features = (shape_feature(shape, slide_id="s", offset=offset) for shape in shapes)
    assert write_geojson(tmp_path / "a.geojson", features) == len(shapes)
    back = read_annotation(tmp_path / "a.geojson", offset=offset)
    for mine, its in zip(shapes, back, strict=True):
        assert its.group == "g"
        for ring, other in zip((mine.exterior, *mine.holes), (its.exterior, *its.holes), strict=True):
            np.testing.assert_allclose(ring, other, rtol=0, atol=1e-9)  # subtracting the offset rounds, once each way
    size = {"width": mask.shape[1], "height": mask.shape[0], "downsample": downsample}
    np.testing.assert_array_equal(rasterize(back, **size, origin=(offset[0] + 7, offset[1])), mask)


def test_a_region_is_what_qupath_reads(tmp_path):
    region = Region(Shape("polygon", SQUARE, (HOLE,), name="n", group="g ≥ 0.5"), {"mean": 0.75, "worst": np.nan})
    features = region_features([region], slide_id="s", colours={"g ≥ 0.5": (255, 0, 10)}, offset=(1, 2))
    write_geojson(tmp_path / "a.geojson", features)
    (feature,) = json.loads((tmp_path / "a.geojson").read_text())["features"]
    assert uuid.UUID(feature.pop("id")).version == 5
    assert feature == {
        "type": "Feature",
        "geometry": {
            "type": "Polygon",
            "coordinates": [
                [[-1, -2], [9, -2], [9, 8], [-1, 8], [-1, -2]],  # closed, and turned round
                [[1, 0], [3, 2.5], [3, 0], [1, 0]],
            ],
        },
        "properties": {
            "objectType": "annotation",
            "name": "n",
            "classification": {"name": "g ≥ 0.5", "color": [255, 0, 10]},
            "measurements": {"mean": 0.75, "worst": "NaN"},
        },
    }


def test_points_and_infinities():
    point = Shape("point", np.array([[3.0, 4.5]]))
    feature = shape_feature(point, slide_id="s", object_type="detection", measurements={"a": np.inf, "b": -np.inf})
    assert feature["geometry"] == {"type": "Point", "coordinates": [3, 4.5]}
    measurements = {"a": "Infinity", "b": "-Infinity"}
    assert feature["properties"] == {"objectType": "detection", "measurements": measurements}


def test_tiles_lie_where_they_are_and_keep_their_numbers(tmp_path):
    x, y = np.array([0.0, 448.5]), np.array([10.0, 20.0])
    measurements = {"probability": np.array([0.25, np.nan], np.float32), "tissue": np.array([1, 0.5])}
    features = tile_features(x, y, np.array([448.5, 400]), slide_id="s", measurements=measurements)
    write_geojson(tmp_path / "a.geojson", features)
    first, second = json.loads((tmp_path / "a.geojson").read_text())["features"]
    assert first["properties"] == {"objectType": "tile", "measurements": {"probability": 0.25, "tissue": 1.0}}
    assert second["properties"]["measurements"] == {"probability": "NaN", "tissue": 0.5}
    assert [shape.bounds for shape in read_annotation(tmp_path / "a.geojson")] == [
        (0, 10, 448.5, 458.5),
        (448.5, 20, 848.5, 420),
    ]


def test_identifiers_tell_objects_apart_and_stay_the_same():
    shapes = [Shape("polygon", ring, group=group) for ring in (SQUARE, SQUARE + 1) for group in ("a", "b")]
    first, again = ([shape_feature(shape, slide_id="s")["id"] for shape in shapes] for _ in range(2))
    assert first == again and len(set(first)) == 4
    assert shape_feature(shapes[0], slide_id="t")["id"] not in first
    assert shape_feature(shapes[0], slide_id="s", object_type="detection")["id"] not in first


def test_writing_again_gives_the_same_bytes(tmp_path):
    paths = [tmp_path / name for name in ("a", "b")]
    assert [write_geojson(path, tiles(5)) for path in paths] == [5, 5]
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_nothing_is_a_collection_too(tmp_path):
    assert write_geojson(tmp_path / "a.geojson", []) == 0
    assert json.loads((tmp_path / "a.geojson").read_text()) == {"type": "FeatureCollection", "features": []}


def test_memory_does_not_follow_the_number_of_objects(tmp_path):
    peaks = []
    for count in (500, 4_000):
        tracemalloc.start()
        write_geojson(tmp_path / "a.geojson", tiles(count))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert (tmp_path / "a.geojson").stat().st_size > 1.2e6
    assert peaks[1] - peaks[0] < 3_500 * 40  # the columns of the tiles alone


def test_an_error_half_way_leaves_the_old_file(tmp_path):
    write_geojson(tmp_path / "a.geojson", tiles(1))
    before = (tmp_path / "a.geojson").read_bytes()

    def broken():
        yield from tiles(3)
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        write_geojson(tmp_path / "a.geojson", broken())
    assert (tmp_path / "a.geojson").read_bytes() == before and len(list(tmp_path.iterdir())) == 1
