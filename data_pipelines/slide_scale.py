"""µm per pixel as a slide file states it, and whether to believe it."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from xml.etree.ElementTree import Element

import defusedxml.ElementTree
from defusedxml.common import DefusedXmlException

PLAUSIBLE_MPP = (0.05, 20.0)  # µm per px: an oil-immersion ×200 to a ×0.5 overview
_OBJECTIVE_FACTOR = 2.5  # scanners call 0.22 to 0.5 µm per px "×20": this is the slack their names need
_UM_PER_RESOLUTION_UNIT = {2: 25_400.0, 3: 10_000.0}  # TIFF ResolutionUnit: inch, centimetre
_UM_PER_OME_UNIT = {"nm": 1e-3, "µm": 1.0, "μm": 1.0, "um": 1.0, "mm": 1e3, "cm": 1e4, "inch": 25_400.0, "in": 25_400.0}


@dataclass(frozen=True)
class FileScale:
    """What a file says: µm per px along x and y, the objective's magnification, and where it says so."""

    x: float | None = None
    y: float | None = None
    objective: float | None = None
    origin: str = "the file"

    @property
    def mpp(self) -> float | None:
        """µm per px, the mean of both axes; None where the file states none."""
        return None if self.x is None or self.y is None else (self.x + self.y) / 2

    @property
    def squareness(self) -> float:
        """Longer over shorter side of a pixel, 1 where nothing is stated."""
        return 1.0 if self.x is None or self.y is None else max(self.x, self.y) / min(self.x, self.y)

    def distrust(self) -> str | None:
        """Why the stated value cannot be used, in words; None where it can."""
        if self.mpp is None:
            hint = f", only an objective of ×{self.objective:g}" if self.objective else ""
            return f"{self.origin} states no µm per pixel{hint}"
        low, high = PLAUSIBLE_MPP
        if not low <= self.mpp <= high:
            return f"{self.origin} says {self.mpp:.4g} µm per pixel, which is outside {low:g} to {high:g}"
        if self.objective:
            expected = 10 / self.objective  # ×40 is 0.25 µm per px, ×20 is 0.5, ×10 is 1
            if not 1 / _OBJECTIVE_FACTOR <= self.mpp / expected <= _OBJECTIVE_FACTOR:
                return (
                    f"{self.origin} says {self.mpp:.4g} µm per pixel but an objective of ×{self.objective:g} "
                    f"(about {expected:.3g} µm per pixel)"
                )
        return None


def resolution_scale(x: float, y: float, unit: int) -> FileScale:
    """x, y: TIFF XResolution and YResolution, px per unit; unit: the ResolutionUnit tag (2 inch, 3 cm, else none)."""
    um = _UM_PER_RESOLUTION_UNIT.get(unit)
    if um is None or not (x > 0 and y > 0):
        return FileScale(origin="the TIFF header")
    return FileScale(um / x, um / y, origin="the TIFF resolution tag")


def aperio_scale(description: str) -> FileScale:
    """Of an Aperio ImageDescription: `|MPP = 0.499|AppMag = 20|`."""
    fields = dict(re.findall(r"\|\s*(MPP|AppMag)\s*=\s*([^|\s]+)", description))
    mpp = positive(fields.get("MPP"))
    return FileScale(mpp, mpp, positive(fields.get("AppMag")), origin="the Aperio header")


def ome_scale(xml: str, size: tuple[int, int] | None = None) -> FileScale:
    """Of the first image of an OME-XML, or of the first of `size` (width, height) px: PhysicalSizeX and Y with their units,
    and the NominalMagnification of its objective (the first one, where the image names none)."""
    origin = "the OME-XML"
    try:
        root = defusedxml.ElementTree.fromstring(xml)
    except (defusedxml.ElementTree.ParseError, DefusedXmlException):
        return FileScale(origin=f"{origin} (unreadable)")
    image = _ome_image(root, size)
    pixels = None if image is None else image.find("{*}Pixels")
    settings = None if image is None else image.find("{*}ObjectiveSettings")
    identifier = None if settings is None else settings.get("ID")
    objectives = root.findall(".//{*}Objective")
    objective = next((o for o in objectives if o.get("ID") == identifier), objectives[0] if objectives else None)
    sizes: list[float | None] = []
    for axis in "XY":
        stated = None if pixels is None else positive(pixels.get(f"PhysicalSize{axis}"))
        unit = "µm" if pixels is None else pixels.get(f"PhysicalSize{axis}Unit", "µm")
        um = _UM_PER_OME_UNIT.get(unit)
        sizes.append(None if stated is None or um is None else stated * um)
    magnification = None if objective is None else positive(objective.get("NominalMagnification"))
    return FileScale(sizes[0], sizes[1], magnification, origin=origin)


def _ome_image(root: Element, size: tuple[int, int] | None) -> Element | None:
    for image in root.iterfind(".//{*}Image"):
        pixels = image.find("{*}Pixels")
        if size is None or (pixels is not None and (pixels.get("SizeX"), pixels.get("SizeY")) == tuple(map(str, size))):
            return image
    return None


def openslide_scale(properties: Mapping[str, str]) -> FileScale:
    """Of OpenSlide's properties `openslide.mpp-x`, `-y` and `openslide.objective-power`."""
    x, y, objective = (positive(properties.get(f"openslide.{name}")) for name in ("mpp-x", "mpp-y", "objective-power"))
    return FileScale(x, y, objective, origin=f"the {properties.get('openslide.vendor', 'slide')} header")


def positive(text: object) -> float | None:
    """A finite number above 0 out of a header's text, else None."""
    try:
        value = float(str(text).replace(",", "."))
    except ValueError:
        return None
    return value if math.isfinite(value) and value > 0 else None
