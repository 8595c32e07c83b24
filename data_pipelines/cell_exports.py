"""Detected cells of a slide to files: QuPath objects, a table, boxes after DigestPath, a picture."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from data_pipelines.boxes import Boxes, write_boxes
from data_pipelines.contours import trace_contours
from data_pipelines.exports import write_image, write_table
from data_pipelines.geojson import shape_feature, write_geojson
from data_pipelines.polygons import Shape

COLOUR = (230, 30, 90)
_TOLERANCE_PX = 0.75  # of outlines, in pixels of the masks: the steps between pixels go, the form stays
_LEAST_DRAWN_PX = 4  # where the median cell is smaller than this in a picture, cells are dots
_AT_ONCE = 128  # masks that are traced together


@dataclasses.dataclass(frozen=True, eq=False)
class CellTable:
    """N detected cells of a slide. box float64 [N, 4], [x1, y1, x2, y2) in level-0 pixels; score, area_um2 float64 [N]; masks: gives
    bool [h, w] of each box in turn, pixels of `scale` level-0 pixels; label: what they are; more: name -> further number of each."""

    box: np.ndarray
    score: np.ndarray
    area_um2: np.ndarray
    masks: Callable[[], Iterator[np.ndarray]]
    scale: float
    label: str
    more: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.score)

    @property
    def middle(self) -> np.ndarray:
        """(x, y) of the boxes' middles, [N, 2]."""
        return (self.box[:, :2] + self.box[:, 2:]) / 2

    def measurements(self, number: int) -> dict[str, float]:
        """Of one cell, as QuPath names them."""
        measured = {"score": self.score[number], "area µm^2": self.area_um2[number]}
        return {name: float(value) for name, value in measured.items()} | {
            name: float(values[number]) for name, values in self.more.items()
        }


def outlines(cells: CellTable, *, scale: float = 1.0) -> Iterator[Shape]:
    """The largest part of each cell's mask as a polygon, whose pixel steps are smoothed to within 0.75 of the mask's pixels.

    In level-0 pixels times `scale`, rounded to a hundredth. A hundred masks or so are traced at once, side by side.
    """
    masks, first = cells.masks(), 0
    while batch := list(itertools.islice(masks, _AT_ONCE)):
        corner = cells.box[first : first + len(batch), :2]
        for shape, place in zip(_trace(batch), corner):
            rings = [np.round((ring * cells.scale + place) * scale, 2) for ring in (shape.exterior, *shape.holes)]
            yield Shape("polygon", rings[0], tuple(rings[1:]), group=cells.label)
        first += len(batch)


def write_cell_objects(
    path: str | os.PathLike[str], cells: CellTable, *, slide_id: str, offset: tuple[float, float] = (0.0, 0.0)
) -> None:
    """GeoJSON of QuPath cells: outline, label as classification, score and area as measurements. offset: see `geojson`."""

    def features() -> Iterator[dict[str, Any]]:
        for number, shape in enumerate(outlines(cells)):
            yield _feature(shape, "cell", cells.measurements(number), slide_id, offset)

    write_geojson(path, features())


def write_box_objects(
    path: str | os.PathLike[str], cells: CellTable, *, slide_id: str, offset: tuple[float, float] = (0.0, 0.0)
) -> None:
    """GeoJSON of QuPath detections: the boxes of the cells, otherwise as `write_cell_objects`."""

    def features() -> Iterator[dict[str, Any]]:
        for number, (x1, y1, x2, y2) in enumerate(cells.box.tolist()):
            corners = np.asarray([[x1, y1], [x2, y1], [x2, y2], [x1, y2]])
            shape = Shape("box", corners, group=cells.label)
            yield _feature(shape, "detection", cells.measurements(number), slide_id, offset)

    write_geojson(path, features())


def write_cell_table(path: str | os.PathLike[str], cells: CellTable) -> None:
    """CSV with a row for each cell: x, y (corner of its box), width, height in level-0 pixels, score, area_um2 and `more`."""
    x1, y1, x2, y2 = cells.box.T
    columns = {"x": x1, "y": y1, "width": x2 - x1, "height": y2 - y1, "score": cells.score, "area_um2": cells.area_um2}
    write_table(path, columns | {name.replace(" ", "_").replace("µm^2", "um2"): v for name, v in cells.more.items()})


def write_cell_boxes(path: str | os.PathLike[str], cells: CellTable, *, slide_id: str, width: int, height: int) -> None:
    """Boxes with their scores after DigestPath (`boxes.write_boxes`) on a slide of width x height level-0 pixels."""
    write_boxes(path, Boxes(cells.box, cells.score), image=slide_id, width=width, height=height)


def write_cell_picture(
    path: str | os.PathLike[str], thumbnail: np.ndarray, cells: CellTable, *, downsample: float
) -> None:
    """PNG of thumbnail uint8 [h, w, 3], of `downsample` level-0 px per pixel, with the outlines of the cells, or with dots where most
    are too small to be outlined."""
    canvas = Image.fromarray(thumbnail)
    draw = ImageDraw.Draw(canvas)
    if len(cells) and np.median(cells.box[:, 2:] - cells.box[:, :2]) >= _LEAST_DRAWN_PX * downsample:
        for shape in outlines(cells, scale=1 / downsample):
            draw.polygon([tuple(point) for point in shape.exterior.tolist()], outline=COLOUR, width=2)
    else:
        for x, y in (cells.middle / downsample).tolist():
            draw.ellipse((x - 1, y - 1, x + 1, y + 1), fill=COLOUR)
    write_image(path, np.asarray(canvas))


def _feature(
    shape: Shape, kind: Any, measurements: dict[str, float], slide_id: str, offset: tuple[float, float]
) -> dict[str, Any]:
    return shape_feature(
        shape, slide_id=slide_id, object_type=kind, colour=COLOUR, measurements=measurements, offset=offset
    )


def _area(ring: np.ndarray) -> float:
    x, y = ring.T
    return abs(float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))) / 2


def _trace(masks: list[np.ndarray]) -> list[Shape]:
    """The largest part of each mask, bool [h, w] with at least one pixel true, smoothed, in pixels of the mask."""
    widths = np.asarray([mask.shape[1] + 1 for mask in masks])
    left = np.cumsum(widths) - widths
    strip = np.zeros((max(len(mask) for mask in masks), int(widths.sum())), bool)
    for mask, x in zip(masks, left):
        strip[: len(mask), x : x + mask.shape[1]] = mask
    largest: list[tuple[float, Shape | None]] = [(0.0, None)] * len(masks)
    for part in trace_contours(strip):
        number = int(np.searchsorted(left, part.exterior[0, 0], side="right")) - 1
        area = _area(part.exterior) - sum(_area(hole) for hole in part.holes)
        largest[number] = max(largest[number], (area, part), key=lambda found: found[0])
    shapes = [shape for _, shape in largest if shape is not None]
    smooth = iter(simplified([ring for shape in shapes for ring in (shape.exterior, *shape.holes)], _TOLERANCE_PX))
    moved = ([next(smooth) - (x, 0) for _ in (0, *shape.holes)] for shape, x in zip(shapes, left))
    return [Shape("polygon", exterior, tuple(holes)) for exterior, *holes in moved]


def simplified(rings: Sequence[np.ndarray], tolerance: float) -> list[np.ndarray]:
    """Rings [n, 2] with fewer vertices, none of those left out farther than `tolerance` from the ring that remains (Douglas and Peucker
    1973, all rings at once). A ring of which nothing would remain stays as it is."""
    lengths = np.asarray([len(ring) + 1 for ring in rings])
    begins = np.cumsum(lengths) - lengths
    points = np.concatenate([np.concatenate([ring, ring[:1]]) for ring in rings])
    keep = np.zeros(len(points), bool)
    keep[begins] = keep[begins + lengths - 1] = True
    for ring, begin in zip(rings, begins):
        keep[begin + np.square(ring - ring[0]).sum(1).argmax()] = True
    while True:
        ends, piece = np.flatnonzero(keep), np.cumsum(keep) - 1
        away = _distance(points, points[ends[piece]], points[ends[np.minimum(piece + 1, len(ends) - 1)]])
        worst = np.flatnonzero((away > tolerance) & (away == np.maximum.reduceat(away, ends)[piece]))
        if not len(worst):
            break
        keep[worst[np.unique(piece[worst], return_index=True)[1]]] = True
    fewer = [ring[keep[begin : begin + len(ring)]] for ring, begin in zip(rings, begins)]
    return [short if len(short) > 2 else ring for short, ring in zip(fewer, rings)]


def _distance(points: np.ndarray, begin: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Of points [n, 2] from the straight pieces between begin and end [n, 2]."""
    along = end - begin
    length = np.square(along).sum(1)
    part = np.clip(((points - begin) * along).sum(1) / np.where(length > 0, length, 1), 0, 1)
    return np.hypot(*(points - begin - part[:, None] * along).T)
