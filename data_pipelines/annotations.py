"""Annotation files: ASAP, ImageScope and DigestPath XML, NCRF JSON and QuPath GeoJSON -> shapes in level-0 pixels; ASAP back."""

import collections
import dataclasses
import json
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import defusedxml
import defusedxml.ElementTree
import numpy as np

from data_pipelines import annotation_formats
from data_pipelines.annotation_formats import HOLE_OF, AnnotationError, Content
from data_pipelines.files import atomic_write
from data_pipelines.polygons import EXCLUSION_GROUPS, Shape, bounding_box, rasterize

__all__ = [
    "EXCLUSION_GROUPS",
    "AnnotationError",
    "AnnotationWarning",
    "Shape",
    "check_inside",
    "file_offset",
    "rasterize",
    "read_annotation",
    "write_asap_xml",
]

FORMATS = "ASAP XML, ImageScope XML, Pascal VOC (DigestPath) XML, NCRF JSON, GeoJSON"
XML_READERS = {  # by the name of the root element
    "ASAP_Annotations": annotation_formats.read_asap,
    "Annotations": annotation_formats.read_imagescope,
    "annotation": annotation_formats.read_voc,
}
COLOURS = ("#F4FA58", "#FA5858", "#58ACFA", "#58FA82", "#FA58F4", "#FE9A2E", "#81F7F3", "#BDBDBD")


class AnnotationWarning(UserWarning):
    """A part of an annotation file was left out; the rest is used."""


def read_annotation(path: str | os.PathLike[str], *, offset: tuple[float, float] = (0.0, 0.0)) -> list[Shape]:
    """The shapes of an annotation file, in level-0 pixels; the format is recognised by the content.

    offset (x, y) is added to all vertices: files drawn on a view that starts at the slide's bounds (QuPath crops to them)
    need the slide's (bounds x, bounds y).

    What has no area (a polygon or box with fewer than three distinct vertices, or all on one line), a coordinate that is not
    finite, or a type that marks no place (arrows, rulers, lines) is left out, and one AnnotationWarning says how many and
    why. Rings that cross themselves stay (even-odd rule). No shapes at all is a legitimate file: an empty list.
    Raises AnnotationError for another format, broken or hostile content; OSError where the file cannot be read.
    """
    path = Path(path)
    try:
        content = _parse(path.read_bytes())
        shapes = _usable(content.shapes, content.skipped)
        shapes = _cut(shapes, _usable(content.cuts, content.skipped))
    except AnnotationError as error:
        raise AnnotationError(f"{path}: {error}") from error
    if content.skipped:
        reasons = ", ".join(f"{count} {reason}" for reason, count in content.skipped.items())
        total = len(shapes) + content.skipped.total()
        warnings.warn(
            f"{path}: {content.skipped.total()} of {total} shapes left out: {reasons}", AnnotationWarning, stacklevel=2
        )
    return [_moved(shape, offset) for shape in shapes]


def file_offset(path: str | os.PathLike[str], bounds: tuple[int, int, int, int]) -> tuple[float, float]:
    """The `offset` with which read_annotation gets level-0 pixels out of a slide's annotation file: QuPath, whose files end in .geojson,
    counts from the corner of the slide's bounds (x, y, width, height), everyone else from that of the slide."""
    x, y = bounds[:2] if Path(path).suffix.lower() == ".geojson" else (0, 0)
    return float(x), float(y)


def _parse(data: bytes) -> Content:
    start = data.lstrip(b"\xef\xbb\xbf\xff\xfe\x00 \t\r\n")[:1]
    if start == b"<":
        return _parse_xml(data)
    if start in (b"{", b"["):
        return _parse_json(data)
    raise AnnotationError(f"neither XML nor JSON; readable are {FORMATS}")


def _parse_xml(data: bytes) -> Content:
    """No document type, hence no entities and nothing fetched: bombs are refused before they expand."""
    try:
        root = defusedxml.ElementTree.fromstring(data, forbid_dtd=True)
    except defusedxml.DefusedXmlException as error:
        raise AnnotationError(
            f"refused, it declares a document type or entities ({type(error).__name__}), which no annotation needs: "
            "remove the <!DOCTYPE ...> part if the file is known to be harmless"
        ) from error
    except ElementTree.ParseError as error:
        raise AnnotationError(f"broken XML ({error}): export the annotation again") from error
    if root.tag not in XML_READERS:
        raise AnnotationError(f"XML with the root <{root.tag}>, which is no known format; readable are {FORMATS}")
    return XML_READERS[root.tag](root)


def _parse_json(data: bytes) -> Content:
    try:
        found: Any = json.loads(data)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise AnnotationError(f"broken JSON ({error}): export the annotation again") from error
    if isinstance(found, dict) and "type" not in found and ("positive" in found or "negative" in found):
        return annotation_formats.read_ncrf(found)
    return annotation_formats.read_geojson(found)


def _usable(shapes: Iterable[Shape], skipped: collections.Counter[str]) -> list[Shape]:
    """The shapes that mark a place; the others are counted by reason. Holes that are none are dropped without a word."""
    usable = []
    for shape in shapes:
        if not all(np.isfinite(ring).all() for ring in (shape.exterior, *shape.holes)):
            skipped["with a coordinate that is not finite"] += 1
        elif shape.kind != "point" and not _has_area(shape.exterior):
            skipped["without an area (fewer than three vertices that differ, or all on one line)"] += 1
        else:
            usable.append(dataclasses.replace(shape, holes=tuple(hole for hole in shape.holes if _has_area(hole))))
    return usable


def _has_area(ring: np.ndarray) -> bool:
    """Whether the vertices [n, 2] do not all lie on one line."""
    arms = ring - ring[0]
    lengths = np.square(arms).sum(axis=1)
    longest = arms[lengths.argmax()]
    return bool(np.abs(arms[:, 0] * longest[1] - arms[:, 1] * longest[0]).max() > 1e-9 * lengths.max())


def _cut(shapes: Sequence[Shape], cuts: Sequence[Shape]) -> list[Shape]:
    """The shapes, each with those cuts of its group as holes that may touch it."""
    return [
        dataclasses.replace(
            shape,
            holes=shape.holes
            + tuple(cut.exterior for cut in cuts if cut.group == shape.group and _may_meet(cut, shape)),
        )
        for shape in shapes
    ]


def _may_meet(one: Shape, other: Shape) -> bool:
    a, b = one.bounds, other.bounds
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _moved(shape: Shape, offset: tuple[float, float]) -> Shape:
    holes = tuple(hole + offset for hole in shape.holes)
    return dataclasses.replace(shape, exterior=shape.exterior + offset, holes=holes)


def check_inside(
    shapes: Sequence[Shape], width: int, height: int, *, path: str | os.PathLike[str] = "the annotation"
) -> None:
    """Refuses an annotation that lies outside its slide (level-0 pixels) altogether, and warns of single shapes outside.

    path: the annotation's file, for the message. Shapes that the edge of the slide cuts are fine.
    """
    outside = sum(not _on_slide(shape, width, height) for shape in shapes)
    if outside and outside == len(shapes):
        x0, y0, x1, y1 = bounding_box(shapes)
        raise AnnotationError(
            f"{path}: all {len(shapes)} shapes (x {x0:.0f} to {x1:.0f}, y {y0:.0f} to {y1:.0f}) lie outside the slide of "
            f"{width} x {height} pixels. It may belong to another slide, be drawn at another magnification, or count from "
            "the slide's bounds instead of its corner (then read it with their offset)"
        )
    if outside:
        warnings.warn(
            f"{path}: {outside} of {len(shapes)} shapes lie outside the slide", AnnotationWarning, stacklevel=2
        )


def _on_slide(shape: Shape, width: int, height: int) -> bool:
    x0, y0, x1, y1 = shape.bounds
    return x1 >= 0 and y1 >= 0 and x0 <= width and y0 <= height


def write_asap_xml(
    path: str | os.PathLike[str],
    shapes: Iterable[Shape],
    *,
    colours: Mapping[str, tuple[int, int, int]] | None = None,
    hole_group: str = "Exclusion",
) -> None:
    """Writes shapes as ASAP XML with every group that they name (ASAP does not load a file that lacks one).

    ASAP has no holes: each becomes a polygon of a group of its own, after Camelyon16 (where it is called "_2"), with the name
    "hole of <name of the shape>", by which read_annotation gives it back to that shape. hole_group: one of
    EXCLUSION_GROUPS.  colours: (red, green, blue) by group, for those that shall not have the next of COLOURS.  Scores are not
    kept: what shall be told by score has to be grouped by it.
    """
    if hole_group not in EXCLUSION_GROUPS:
        raise ValueError(f"{path}: holes go to a group of {sorted(EXCLUSION_GROUPS)}, not to {hole_group!r}")
    root = ElementTree.Element("ASAP_Annotations")
    annotations = ElementTree.SubElement(root, "Annotations")
    wanted = {group: "#{:02X}{:02X}{:02X}".format(*rgb) for group, rgb in (colours or {}).items()}
    groups: dict[str, str] = {}  # name -> colour, in order of appearance
    kinds = {"polygon": "Polygon", "box": "Rectangle", "point": "Dot"}
    for shape in shapes:
        name = shape.name or f"Annotation {len(annotations)}"
        rings = [(kinds[shape.kind], name, shape.group, shape.exterior)]
        rings += [("Polygon", HOLE_OF + name, hole_group, hole) for hole in shape.holes]
        for kind, label, group, ring in rings:
            colour = groups.setdefault(group, wanted.get(group, COLOURS[len(groups) % len(COLOURS)]))
            labels = {"Name": label, "Type": kind, "PartOfGroup": group or "None", "Color": colour}
            listed = ElementTree.SubElement(ElementTree.SubElement(annotations, "Annotation", labels), "Coordinates")
            for order, (x, y) in enumerate(ring.tolist()):
                ElementTree.SubElement(listed, "Coordinate", {"Order": str(order), "X": repr(x), "Y": repr(y)})
    declared = ElementTree.SubElement(root, "AnnotationGroups")
    for group, colour in groups.items():
        if group:
            ElementTree.SubElement(declared, "Group", {"Name": group, "PartOfGroup": "None", "Color": colour})
    ElementTree.indent(root, "\t")
    with atomic_write(path) as part:
        ElementTree.ElementTree(root).write(part, encoding="utf-8", xml_declaration=True)
