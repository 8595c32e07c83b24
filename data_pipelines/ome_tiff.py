"""Heat maps as pyramidal OME-TIFF: in colours for people, as values for programs.

A map is sampled block by block and never held as a whole; values and missing may be arrays, memory maps or HDF5 datasets,
of which slices are read. Reduced levels are maxima, as in the overlays: a hot spot of one cell shows at every level. Each
pixel is one of three things: a value; nothing known (no tile lies there); or not readable. In colours these are the
colour map, GLASS, and gray stripes; among the values both of the latter are NaN, never 0.

The reduced levels of the colours are SubIFDs of the first page, where OME-TIFF readers (QuPath, tifffile) look for them,
and the chain of pages leads through the same SubIFDs, where OpenSlide and cuCIM look.
"""

import dataclasses
import os
import struct
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import imagecodecs
import numpy as np
import tifffile

from data_pipelines.files import atomic_write
from data_pipelines.overlays import SlideMap, hatch, map_colours
from data_pipelines.pyramids import BACKGROUND, Pyramid, write_levels

GLASS = BACKGROUND
TILE = 256
PIXELS_PER_CELL = 4  # over a whole slide: no edge of a cell is off by more than an eighth of a cell
_UNREADABLE = -np.inf  # while the pyramid is made: loses against any value, wins against NaN
_OME = "http://www.openmicroscopy.org/Schemas/OME/2016-06"
_SCHEMA = f"{_OME} {_OME}/ome.xsd"
_MAP_ANNOTATION = "openmicroscopy.org/omero/client/mapAnnotation"


def write_colour_tiff(
    path: str | os.PathLike[str],
    slide_map: SlideMap,
    *,
    slide_size: tuple[int, int] | None = None,
    pixel: float | None = None,
    label: str = "probability",
    colormap: str = "turbo",
    limits: tuple[float, float] = (0.0, 1.0),
) -> None:
    """The map as uint8 RGB with the right µm per pixel for OpenSlide, cuCIM, QuPath and tifffile.

    Without slide_size one pixel is one cell, and the picture begins at the map's origin, which the OME-XML gives in µm
    (PositionX, PositionY) and in level-0 px. With slide_size (width, height) in level-0 px it covers the slide, so that both
    lie on each other by their scale alone; pixel: level-0 px per pixel then, a quarter of a cell unless given.
    Values from limits[0] to limits[1] take the colours of a Matplotlib map (one with gray in it would hide what is missing).
    Raises ValueError for limits that do not rise, a pixel larger than a cell, or a slide_size below 1.
    """
    canvas = _Canvas.over(slide_map, slide_size, pixel)

    def encode(values: np.ndarray) -> bytes:
        return bytes(imagecodecs.lzw_encode(_paint(values, colormap, limits).tobytes()))

    about = {
        "colours": f"{colormap}, {limits[0]:g} to {limits[1]:g}",
        "nothing known": f"RGB {GLASS}",
        "not readable": "gray stripes",
    }
    description = _ome_xml(Path(path).name, canvas, label, about, kind="uint8", samples=3)
    with atomic_write(path) as part:
        _write(part, canvas, encode, description, samples=3, dtype=np.uint8, photometric="rgb", compression="lzw")
        _chain_subifds(part)


def write_value_tiff(
    path: str | os.PathLike[str],
    slide_map: SlideMap,
    *,
    slide_size: tuple[int, int] | None = None,
    pixel: float | None = None,
    label: str = "probability",
) -> None:
    """The map as float32 for QuPath and tifffile (OpenSlide reads colours alone); NaN is where there is no value.

    slide_size and pixel as for write_colour_tiff: without them, pixel [r, c] is values[r, c].
    """
    canvas = _Canvas.over(slide_map, slide_size, pixel)

    def encode(values: np.ndarray) -> bytes:
        return zlib.compress(np.where(values == _UNREADABLE, np.float32(np.nan), values).tobytes(), 6)

    about = {"nothing known": "NaN", "not readable": "NaN"}
    description = _ome_xml(Path(path).name, canvas, label, about, kind="float", samples=1)
    with atomic_write(path) as part:
        _write(
            part,
            canvas,
            encode,
            description,
            samples=1,
            dtype=np.float32,
            photometric="minisblack",
            compression="adobe_deflate",
        )


@dataclasses.dataclass(frozen=True)
class _Canvas:
    """The pixels of a file over a map: `pixel` level-0 px each, from `corner` (x, y) level-0 px on; shape (height, width)."""

    slide_map: SlideMap
    pixel: float
    corner: tuple[float, float]
    shape: tuple[int, int]

    @classmethod
    def over(cls, slide_map: SlideMap, slide_size: tuple[int, int] | None, pixel: float | None) -> "_Canvas":
        cell = slide_map.downsample
        if slide_size is None:
            rows, columns = slide_map.values.shape
            return cls(slide_map, cell, slide_map.origin, (rows, columns))
        pixel = pixel or cell / PIXELS_PER_CELL
        if not 0 < pixel <= cell or min(slide_size) < 1:
            raise ValueError(
                f"a map with cells of {cell:g} level-0 px over a slide of {slide_size} (width, height) needs pixels "
                f"of at most a cell (not {pixel:g} level-0 px) and a slide of at least 1 x 1"
            )
        width, height = (int(np.ceil(side / pixel)) for side in slide_size)
        return cls(slide_map, pixel, (0.0, 0.0), (height, width))

    @property
    def mpp(self) -> float:
        return self.pixel * self.slide_mpp

    @property
    def slide_mpp(self) -> float:
        return self.slide_map.mpp / self.slide_map.downsample

    def block(self, x: int, y: int, width: int, height: int) -> np.ndarray | None:
        """float32 [height, width]: values, NaN, or _UNREADABLE, of the cells under the centres of these pixels."""
        block = np.full((height, width), np.nan, np.float32)
        rows, inside_y = self._cells(y, height, axis=1)
        columns, inside_x = self._cells(x, width, axis=0)
        if not (len(rows) and len(columns)):
            return None
        window = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
        values = np.asarray(self.slide_map.values[window], np.float32)
        unreadable = np.isnan(values) & np.asarray(self.slide_map.missing[window], bool)
        cells = np.where(unreadable, np.float32(_UNREADABLE), values)
        block[inside_y, inside_x] = cells[np.ix_(rows - rows[0], columns - columns[0])]
        return None if np.isnan(block).all() else block

    def _cells(self, first: int, count: int, *, axis: int) -> tuple[np.ndarray, slice]:
        """The cell along x (axis 0) or y (axis 1) under each of these pixels that lies on the map, and which these are."""
        centre = self.corner[axis] + (np.arange(first, first + count) + 0.5) * self.pixel
        cell = np.floor((centre - self.slide_map.origin[axis]) / self.slide_map.downsample).astype(np.int64)
        inside = np.flatnonzero((cell >= 0) & (cell < self.slide_map.values.shape[1 - axis]))
        return cell[inside], slice(inside[0], inside[-1] + 1) if len(inside) else slice(0, 0)


def _write(path: Path, canvas: _Canvas, encode: Callable[[np.ndarray], bytes], description: bytes, **page: Any) -> None:
    sizes = [canvas.shape]
    while max(sizes[-1]) > TILE:
        sizes.append((-(-sizes[-1][0] // 2), -(-sizes[-1][1] // 2)))  # rounded up: the last cell must not fall off
    pyramid = Pyramid(canvas.block, sizes, encode, np.full((TILE, TILE), np.nan, np.float32), _halve)
    write_levels(path, pyramid, mpp=canvas.mpp, description=description, subifds=True, **page)


def _halve(values: np.ndarray) -> np.ndarray:
    """Maximum of each 2 x 2 pixels; NaN loses."""
    values = np.fmax(values[0::2], values[1::2])
    return np.fmax(values[:, 0::2], values[:, 1::2])


def _paint(values: np.ndarray, colormap: str, limits: tuple[float, float]) -> np.ndarray:
    """float32 [TILE, TILE] of a canvas -> uint8 [TILE, TILE, 3]. The stripes go on in the next tile."""
    picture = np.full((*values.shape, 3), GLASS, np.uint8)
    known = np.isfinite(values)
    picture[known] = np.rint(map_colours(values[known], colormap, limits)).astype(np.uint8)
    unreadable = values == _UNREADABLE
    picture[unreadable] = hatch(*values.shape)[unreadable]
    return picture


def _chain_subifds(path: Path) -> None:
    """Makes the first SubIFD the page after the first one; tifffile has chained the SubIFDs themselves."""
    with tifffile.TiffFile(path) as tif:
        page, form = tif.pages.first, tif.tiff
        if not page.subifds:
            return
        following = page.offset + form.tagnosize + len(page.tags) * form.tagsize
        target = struct.pack(form.offsetformat, page.subifds[0])
    with path.open("r+b") as file:
        file.seek(following)
        file.write(target)


def _ome_xml(name: str, canvas: _Canvas, label: str, about: Mapping[str, str], *, kind: str, samples: int) -> bytes:
    """The OME-XML of one image of one plane, after the schema 2016-06."""
    root = ElementTree.Element("OME", {"xmlns": _OME, "xmlns:xsi": "http://www.w3.org/2001/XMLSchema-instance"})
    root.set("xsi:schemaLocation", _SCHEMA)
    add = ElementTree.SubElement
    image = add(root, "Image", {"ID": "Image:0", "Name": name})
    height, width = canvas.shape
    size = {"SizeX": width, "SizeY": height, "SizeC": samples, "SizeZ": 1, "SizeT": 1}
    scale = {"PhysicalSizeX": repr(canvas.mpp), "PhysicalSizeY": repr(canvas.mpp)}
    form = {
        "ID": "Pixels:0",
        "DimensionOrder": "XYCZT",
        "Type": kind,
        "Interleaved": "true" if samples > 1 else "false",
    }
    pixels = add(image, "Pixels", form | {key: str(value) for key, value in size.items()} | scale)
    pixels.attrib |= {"PhysicalSizeXUnit": "µm", "PhysicalSizeYUnit": "µm"}
    add(pixels, "Channel", {"ID": "Channel:0:0", "Name": label, "SamplesPerPixel": str(samples)})
    add(pixels, "TiffData", {"IFD": "0", "PlaneCount": "1"})
    x, y = canvas.corner
    place = {"PositionX": repr(x * canvas.slide_mpp), "PositionY": repr(y * canvas.slide_mpp)}
    plane = {"TheZ": "0", "TheT": "0", "TheC": "0", **place, "PositionXUnit": "µm", "PositionYUnit": "µm"}
    add(pixels, "Plane", plane)
    add(image, "AnnotationRef", {"ID": "Annotation:0"})
    noted = add(
        add(root, "StructuredAnnotations"), "MapAnnotation", {"ID": "Annotation:0", "Namespace": _MAP_ANNOTATION}
    )
    values = add(noted, "Value")
    facts = {"value": label, **about, "x of the corner (level-0 px)": repr(x), "y of the corner (level-0 px)": repr(y)}
    for key, value in (facts | {"pixel (level-0 px)": repr(canvas.pixel)}).items():
        add(values, "M", {"K": key}).text = value
    return ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
