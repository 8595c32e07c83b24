"""Every annotation format on real files, and what happens to broken, hostile and misplaced ones."""

import dataclasses
import json
import time
import warnings
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from data_pipelines.annotations import (
    AnnotationError,
    AnnotationWarning,
    Shape,
    check_inside,
    rasterize,
    read_annotation,
    write_asap_xml,
)
from data_pipelines.contours import trace_contours

SQUARE = [[0, 0], [10, 0], [10, 10], [0, 10]]


def written(folder, text, name="slide.annotation"):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def geojson(folder, data):
    return read_annotation(written(folder, json.dumps(data)))


def asap(*annotations, groups=""):
    return f"<ASAP_Annotations><Annotations>{''.join(annotations)}</Annotations>{groups}</ASAP_Annotations>"


def annotation(points, kind="Polygon", group="None", order=None):
    numbers = range(len(points)) if order is None else order
    listed = "".join(f'<Coordinate Order="{n}" X="{x}" Y="{y}"/>' for n, (x, y) in zip(numbers, points))
    return f'<Annotation Name="a" Type="{kind}" PartOfGroup="{group}"><Coordinates>{listed}</Coordinates></Annotation>'


def test_asap_files_of_a_real_viewer(shared_data):
    (dot,) = read_annotation(shared_data / "annotations/asap-dot.xml")
    assert dot.kind == "point" and dot.exterior.tolist() == [[23071.5605, 16831.0098]]
    points = read_annotation(shared_data / "annotations/asap-pointset.xml")
    assert [p.kind for p in points] == ["point"] * 5 and points[4].exterior.tolist() == [[22798.1738, 16682.5234]]
    (shape,) = read_annotation(shared_data / "annotations/asap-polygon.xml")
    assert (shape.kind, shape.name, shape.group) == ("polygon", "Annotation 0", "")
    assert shape.exterior.shape == (6, 2) and shape.bounds == (22693.1875, 16551.1797, 23067.4531, 16710.6367)


def test_asap_order_groups_and_types(tmp_path):
    path = written(
        tmp_path,
        asap(
            annotation([SQUARE[i] for i in (2, 0, 3, 1)], group="_0", order=[2, 0, 3, 1]),
            annotation(SQUARE, "Rectangle", "_2"),
            annotation(SQUARE, "Spline"),
            annotation(SQUARE[:2], "Measurement"),
        ),
    )
    with pytest.warns(AnnotationWarning, match="1 of 4 shapes left out: 1 of type Measurement"):
        shapes = read_annotation(path)
    assert [(s.kind, s.group) for s in shapes] == [("polygon", "_0"), ("box", "_2"), ("polygon", "")]
    assert shapes[0].exterior.tolist() == SQUARE


def test_qupath_features_of_real_files(shared_data):
    (holed,) = read_annotation(shared_data / "annotations/holed_histoqc.geojson")
    assert holed.exterior.shape == (4, 2) and len(holed.holes) == 1  # the closing vertex is left off
    named = read_annotation(shared_data / "annotations/qupath05_dlup.geojson")
    assert [shape.name for shape in named] == ["UT", "I", "I"]
    bare = read_annotation(shared_data / "annotations/qupath_polygon.geojson")
    raw = json.loads((shared_data / "annotations/qupath_polygon.geojson").read_text())["coordinates"]
    assert len(bare) == len(raw) and sum(len(s.holes) for s in bare) == sum(len(p) - 1 for p in raw)


def test_geojson_forms(tmp_path):
    ring = [*SQUARE, SQUARE[0]]
    polygon = {"type": "Polygon", "coordinates": [ring, [[2, 2], [4, 2], [4, 4]]]}
    feature = {
        "type": "Feature",
        "geometry": polygon,
        "properties": {"name": "n", "classification": {"name": "Tumor"}},
    }
    two = {"type": "MultiPolygon", "coordinates": [[ring], [[[20, 20], [30, 20], [30, 30]]]]}
    (shape,) = geojson(tmp_path, feature)
    assert (shape.name, shape.group, len(shape.holes)) == ("n", "Tumor", 1)
    assert len(geojson(tmp_path, [feature, feature])) == 2
    assert len(geojson(tmp_path, two)) == 2
    mixed = {
        "type": "GeometryCollection",
        "geometries": [polygon, {"type": "MultiPoint", "coordinates": [[1, 2], [3, 4]]}],
    }
    collection = {"type": "FeatureCollection", "features": [feature, {"type": "Feature", "geometry": mixed}]}
    assert [s.kind for s in geojson(tmp_path, collection)] == ["polygon", "polygon", "point", "point"]
    derived = {"type": "Feature", "geometry": polygon, "properties": {"classification": {"names": ["Tumor", "Ki67"]}}}
    assert geojson(tmp_path, derived)[0].group == "Tumor: Ki67"
    assert geojson(tmp_path, {"type": "FeatureCollection", "features": []}) == []
    line = {"type": "LineString", "coordinates": SQUARE}
    with pytest.warns(AnnotationWarning, match="LineString"):
        assert geojson(tmp_path, line) == []


def test_imagescope_layers_of_a_real_file(shared_data):
    shapes = read_annotation(shared_data / "annotations/TCGA-EJ-5518-01Z-00-DX1_imagescope.xml")
    assert [(shape.group, len(shape.exterior)) for shape in shapes] == [("1", 331), ("1", 1553), ("3", 572), ("4", 364)]
    assert shapes[0].exterior[0].tolist() == [40265.344427, 13434.053525]


def region(points, kind=0, negative=0):
    listed = "".join(f'<Vertex X="{x}" Y="{y}" Z="0"/>' for x, y in points)
    return f'<Region Id="1" Type="{kind}" NegativeROA="{negative}" Text="t"><Vertices>{listed}</Vertices></Region>'


def test_imagescope_negative_regions_rectangles_and_ellipses(tmp_path):
    regions = [
        region([(0, 0), (60, 0), (60, 60), (0, 60)]),
        region([(20, 20), (40, 20), (40, 40), (20, 40)], negative=1),
        region([(70, 0), (90, 60)], kind=1),
        region([(100, 0), (160, 40)], kind=2),
        region([(0, 0), (5, 5)], kind=3),
    ]
    other = (
        '<Annotation Id="2" Name="other"><Regions>' + region([(10, 10), (50, 10), (50, 50)]) + "</Regions></Annotation>"
    )
    layer = f'<Annotation Id="1" Name="tumour"><Regions>{"".join(regions)}</Regions></Annotation>'
    path = written(tmp_path, f"<Annotations>{layer}{other}</Annotations>")
    with pytest.warns(AnnotationWarning, match="1 arrows"):
        shapes = read_annotation(path)
    assert [len(shape.holes) for shape in shapes] == [1, 0, 0, 0]  # its own layer alone, and only what it meets
    assert [shape.group for shape in shapes] == ["tumour"] * 3 + ["other"]
    size = {"width": 200, "height": 80, "downsample": 1}
    areas = [rasterize([shape], **size).sum() for shape in shapes[:3]]
    assert areas[:2] == [3600 - 400, 20 * 60]
    assert areas[2] == pytest.approx(np.pi * 30 * 20, rel=0.01)


def test_ncrf_polygons_with_holes(shared_data):
    shapes = read_annotation(shared_data / "annotations/camelyon16_ncrf_json/Tumor_064.json")
    assert len(shapes) == 11 and sum(len(shape.holes) for shape in shapes) >= 24
    assert {shape.group for shape in shapes} == {"positive"}
    for path in sorted((shared_data / "annotations/camelyon16_test_json").glob("*.json")):
        assert len(read_annotation(path)) == len(json.loads(path.read_text())["positive"])


def test_digestpath_boxes_with_and_without_confidence(shared_data):
    folder = shared_data / "patches/digestpath_signet_ring"
    counts = [len(read_annotation(path)) for path in sorted((folder / "gt").glob("*.xml"))]
    assert counts == [64, 40, 50]
    predicted = [read_annotation(path) for path in sorted((folder / "predicted_yolov3").glob("*.xml"))]
    assert [len(shapes) for shapes in predicted] == [0, 67, 49, 56]
    first = predicted[1][0]
    assert (first.kind, first.group, first.score) == ("box", "ring_cell_cancer", 0.9999068975448608)
    truth = read_annotation(min((folder / "gt").glob("*.xml")))[0]
    assert truth.bounds == (1346, 94, 1413, 189) and truth.score is None


def test_offset_moves_exterior_and_holes(tmp_path):
    polygon = {"type": "Polygon", "coordinates": [SQUARE, [[2, 2], [4, 2], [4, 4]]]}
    (shape,) = read_annotation(written(tmp_path, json.dumps(polygon)), offset=(100, 7))
    assert shape.exterior.tolist()[0] == [100, 7] and shape.holes[0].tolist()[0] == [102, 9]


def test_degenerate_shapes_are_left_out_and_told_once(tmp_path):
    parts = [
        annotation(SQUARE),
        annotation(SQUARE[:2]),
        annotation([]),
        annotation([(0, 0), (5, 5), (9, 9)]),
        annotation([(3, 3)] * 4),
        annotation([(0, 0), ("nan", 5), (9, 9)]),
        annotation([(0, 0), ("inf", 5), (9, 9)]),
    ]
    with pytest.warns(AnnotationWarning) as caught:
        (shape,) = read_annotation(written(tmp_path, asap(*parts)))
    assert shape.exterior.tolist() == SQUARE and len(caught) == 1
    message = str(caught[0].message)
    assert "6 of 7 shapes left out" in message
    assert all(text in message for text in ("1 without vertices", "2 with a coordinate", "3 without an area"))


def test_a_figure_of_eight_stays(tmp_path):
    eight = {"type": "Polygon", "coordinates": [[[0, 0], [10, 10], [10, 0], [0, 10]]]}  # its signed area is 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(geojson(tmp_path, eight)) == 1


ENTITIES = """<?xml version="1.0"?><!DOCTYPE lolz [<!ENTITY a "lol"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;&a;&a;">
<!ENTITY c "&b;&b;&b;&b;&b;&b;&b;&b;&b;&b;">]><ASAP_Annotations>&c;</ASAP_Annotations>"""
EXTERNAL = """<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/passwd">]><ASAP_Annotations>&a;</ASAP_Annotations>"""
REMOTE = """<!DOCTYPE x SYSTEM "http://localhost:1/x.dtd"><ASAP_Annotations/>"""


@pytest.mark.parametrize("bomb", [ENTITIES, EXTERNAL, REMOTE, ENTITIES.encode("utf-16")])
def test_xml_bombs_are_refused(tmp_path, bomb):
    with pytest.raises(AnnotationError, match=r"slide.annotation: refused.*DOCTYPE"):
        read_annotation(written(tmp_path, bomb))


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "neither XML nor JSON"),
        ("x,y\n1,2\n", "readable are ASAP XML"),
        (b"\x89PNG\r\n", "neither XML nor JSON"),
        ("<ASAP_Annotations><Annotations>", "broken XML"),
        ("<html></html>", "root <html>"),
        ('{"positive": [', "broken JSON"),
        ('{"images": []}', "neither GeoJSON"),
        ('{"positive": {}}', "positive: must be a list"),
        ('{"positive": [[1, 2]]}', "positive polygon 1: must be an object"),
        ('{"positive": [{"vertices": [[1]]}]}', "positive polygon 1: vertices must be pairs"),
        ('{"type": "Polygon"}', "feature 1: its Polygon has no list"),
        ('{"type": "Polygon", "coordinates": [7]}', "feature 1: vertices must be pairs"),
        ('{"type": "MultiPolygon", "coordinates": [7]}', "feature 1: a polygon must be a list"),
        ('{"type": "Polygon", "coordinates": [[[1, null], [2, 2], [3, 1]]]}', "feature 1: vertices"),
        ("[" * 100_000, "broken JSON"),
        ("[1]", "neither GeoJSON"),
        (asap(annotation([(1, "")])), r"annotation 1 \('a'\): each <Coordinate> needs numbers as X and Y \(ValueError"),
        (
            "<Annotations><Annotation Name='L'><Regions><Region Id='7'><Vertices><Vertex X='1'/></Vertices></Region>"
            "</Regions></Annotation></Annotations>",
            r"layer 'L', region 7: each <Vertex> needs numbers as X and Y \(KeyError: 'Y'\)",
        ),
        ("<annotation><object><name>x</name></object></annotation>", "object 1: bndbox/xmin must be a number"),
    ],
)
def test_broken_files_are_named_with_the_place(tmp_path, text, message):
    with pytest.raises(AnnotationError, match=message) as caught:
        read_annotation(written(tmp_path, text))
    assert "slide.annotation" in str(caught.value)


def test_a_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_annotation(tmp_path / "nothing.xml")


def test_byte_order_marks_are_read(tmp_path):
    text = json.dumps({"type": "Polygon", "coordinates": [SQUARE]})
    assert len(read_annotation(written(tmp_path, b"\xef\xbb\xbf" + text.encode()))) == 1
    assert len(read_annotation(written(tmp_path, asap(annotation(SQUARE)).encode("utf-16")))) == 1


def test_an_annotation_of_another_slide_is_refused():
    inside, outside = (Shape("polygon", np.array(SQUARE, float) + shift) for shift in (0, 5000))
    check_inside([], 100, 100)
    check_inside([inside], 100, 100, path="a.xml")
    with pytest.raises(AnnotationError, match=r"a.xml: all 1 shapes .*another slide.*bounds"):
        check_inside([outside], 100, 100, path="a.xml")
    with pytest.warns(AnnotationWarning, match="a.xml: 1 of 2"):
        check_inside([inside, outside], 100, 100, path="a.xml")


def test_asap_round_trip_keeps_places_groups_and_holes(tmp_path):
    rng = np.random.default_rng(0)
    shapes = [
        Shape("polygon", rng.uniform(0, 100, (7, 2)), (rng.uniform(20, 60, (4, 2)),), name="lesion", group="tumour"),
        Shape("box", np.array(SQUARE, float) * 3.7, group='"quoted" & <group>'),
        Shape("point", rng.uniform(0, 100, (1, 2))),
    ]
    path = tmp_path / "new" / "slide.xml"
    write_asap_xml(path, shapes)
    back = read_annotation(path)
    expected = [("polygon", "tumour"), ("box", '"quoted" & <group>'), ("point", "")]
    assert [(s.kind, s.group) for s in back] == expected
    for mine, its in zip(shapes, back):
        for ring, other in zip((mine.exterior, *mine.holes), (its.exterior, *its.holes), strict=True):
            np.testing.assert_array_equal(ring, other)
    size = {"width": 50, "height": 50, "downsample": 2}
    np.testing.assert_array_equal(rasterize(shapes, **size), rasterize(back, **size))
    declared = {group.get("Name") for group in ElementTree.parse(path).iterfind("AnnotationGroups/Group")}
    assert declared == {"tumour", "Exclusion", '"quoted" & <group>'}


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(arrays(bool, array_shapes(min_dims=2, max_dims=2, max_side=9)), st.floats(0.5, 500), st.sampled_from(["", "a"]))
def test_asap_files_keep_the_geometry_of_any_mask(tmp_path, mask, downsample, name):
    shapes = [dataclasses.replace(s, name=name) for s in trace_contours(mask, downsample=downsample, group="g")]
    write_asap_xml(tmp_path / "a.xml", shapes)
    back = read_annotation(tmp_path / "a.xml")
    for mine, its in zip(shapes, back, strict=True):  # islands in holes, and holes that touch, are told apart
        for ring, other in zip((mine.exterior, *mine.holes), (its.exterior, *its.holes), strict=True):
            np.testing.assert_array_equal(ring, other)
    again = rasterize(back, width=mask.shape[1], height=mask.shape[0], downsample=downsample)
    np.testing.assert_array_equal(again, mask)


def test_holes_in_asap_files_of_others_stay_excluded_from_all(tmp_path):
    path = written(tmp_path, asap(annotation(SQUARE, group="_0"), annotation(SQUARE, group="_2")))
    assert [(shape.group, len(shape.holes)) for shape in read_annotation(path)] == [("_0", 0), ("_2", 0)]


def test_asap_groups_have_the_colours_asked_for(tmp_path):
    hole = np.array([[2, 2], [4, 2], [4, 4]], float)
    path = tmp_path / "slide.xml"
    shapes = [
        Shape("polygon", np.array(SQUARE, float), (hole,), group="tumour"),
        Shape("point", hole[:1], group="other"),
    ]
    write_asap_xml(path, shapes, colours={"tumour": (16, 32, 255)}, hole_group="_2")
    declared = {g.get("Name"): g.get("Color") for g in ElementTree.parse(path).iterfind("AnnotationGroups/Group")}
    assert list(declared) == ["tumour", "_2", "other"] and declared["tumour"] == "#1020FF"
    used = {(a.get("PartOfGroup"), a.get("Color")) for a in ElementTree.parse(path).iterfind("Annotations/Annotation")}
    assert used == set(declared.items())  # no annotation names a group or a colour that is not declared
    with pytest.raises(ValueError, match="holes go to a group of"):
        write_asap_xml(path, shapes, hole_group="holes")


def test_100_000_vertices_are_read_and_drawn_quickly(tmp_path):
    angle = np.linspace(0, 2 * np.pi, 100_000, endpoint=False)
    ring = 30_000 + 25_000 * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    path = tmp_path / "large.xml"
    write_asap_xml(path, [Shape("polygon", ring, group="tumour")])
    begin = time.process_time()
    shapes = read_annotation(path)
    read = time.process_time()
    assert rasterize(shapes, width=2000, height=2000, downsample=30).mean() == pytest.approx(
        np.pi * 25**2 / 60**2, rel=1e-3
    )
    assert time.process_time() - read < 1.0
    assert read - begin < 3.0
