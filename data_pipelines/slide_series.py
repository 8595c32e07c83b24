"""Which of the images in a TIFF is the slide: labels, overviews and thumbnails stand aside, a second scan or focus planes refuse.

A file's first image need not be the slide: converters also write the label first. And to read one of two scanned regions as
if it were all would lose tissue without a word.
"""

import math
import re
from collections.abc import Sequence

import numpy as np
import tifffile

from data_pipelines.slide_scale import FileScale, ome_scale

_ASIDE = re.compile(
    r"(?<![a-z])(label|macro|overview|thumbnail|barcode)(?![a-z])", re.IGNORECASE
)  # names of what is no scan
_SAME_SCALE = 1.5  # ours: images of one slide at closer scales than this, as a ratio, are scans both
_SCAN_SHARE = (
    1 / 16
)  # ours: an unnamed image without a scale is taken for a label below this share of the slide's pixels
_ASPECT_TOLERANCE = 0.02  # reduced copies are rounded to whole pixels


def slide_series(series: Sequence[tifffile.TiffPageSeries]) -> int:
    """The position of the slide's image: the largest that is not named as a label, an overview or a thumbnail.

    Of equally large ones (a slide and its mask) the first that is 8-bit RGB.
    """
    named = [i for i, one in enumerate(series) if not _ASIDE.search(one.name)] or list(range(len(series)))
    return max(named, key=lambda i: (_area(series[i]), pixel_refusal(series[i]) is None, -i))


def pixel_refusal(series: tifffile.TiffPageSeries) -> str | None:
    """Why these pixels cannot be read as one 8-bit RGB image, in words; None where they can."""
    page, axes = series.keyframe, series.axes
    if "S" not in axes or page.samplesperpixel < 3:
        return "is a gray image (one channel); H&E slides in 8-bit RGB are read"
    if page.dtype != np.uint8:
        return f"has {page.dtype} pixels; 8-bit RGB is read: convert it"
    if len(axes.replace("S", "").replace("Y", "").replace("X", "")):
        planes = f"a stack of {series.shape[0]} images of one size (focus planes, or scans)"
        return f"holds {planes}, not a pyramid: save each as a file of its own"
    if page.samplesperpixel > 4 or page.photometric not in (tifffile.PHOTOMETRIC.RGB, tifffile.PHOTOMETRIC.YCBCR):
        return f"has {page.samplesperpixel} channels of kind {page.photometric!s}; 8-bit RGB is read: convert it"
    return None


def second_scan(tif: tifffile.TiffFile, chosen: int) -> str | None:
    """Why the file's slide is not only its image `chosen`, in words; None where everything else can stand aside."""
    series = tif.series
    others = [one for i, one in enumerate(series) if i != chosen and _is_scan(tif, one, series[chosen])]
    if not others:
        return None
    sizes = ", ".join(_size_in_words(one) for one in (series[chosen], *others))
    return (
        f"holds {1 + len(others)} scanned regions ({sizes}): save each as a file of its own, so that none is left out"
    )


def ome_series_scale(tif: tifffile.TiffFile, series: tifffile.TiffPageSeries) -> FileScale:
    """What the OME-XML states for the image of this size."""
    return ome_scale(tif.ome_metadata or "", _size(series))


def _is_scan(tif: tifffile.TiffFile, other: tifffile.TiffPageSeries, slide: tifffile.TiffPageSeries) -> bool:
    """Whether `other` shows tissue at the slide's scale that the slide's image does not."""
    if _ASIDE.search(other.name) or pixel_refusal(other) or not other.keyframe.is_tiled:
        return False
    if _is_halved(
        _size(other), _size(slide)
    ):  # converters that flatten a pyramid give each level the scale of the first
        return False
    scales = [ome_series_scale(tif, one).mpp if tif.is_ome else None for one in (other, slide)]
    if scales[0] and scales[1]:
        return 1 / _SAME_SCALE < scales[0] / scales[1] < _SAME_SCALE
    is_level = is_reduced(_size(other), _size(slide))  # one that is not part of the regular pyramid
    return not is_level and _area(other) >= _SCAN_SHARE * _area(slide)


def _is_halved(size: tuple[int, int], full: tuple[int, int]) -> bool:
    """Whether `size` is `full` over a power of two, to a pixel."""
    factors = (2**power for power in range(1, 10))
    return any(all(abs(side * k - whole) <= k for side, whole in zip(size, full)) for k in factors)


def is_reduced(size: tuple[int, int], full: tuple[int, int]) -> bool:
    """Whether an image of `size` (width, height) px can be one of `full` px at half its size or less."""
    (width, height), (full_width, full_height) = size, full
    slack = _ASPECT_TOLERANCE + 2 / min(size)
    return min(full_width / width, full_height / height) >= 2 - slack and (
        abs(full_width / width * height / full_height - 1) <= slack
    )


def _size(series: tifffile.TiffPageSeries) -> tuple[int, int]:
    return int(series.keyframe.imagewidth), int(series.keyframe.imagelength)


def _area(series: tifffile.TiffPageSeries) -> int:
    return math.prod(_size(series))


def _size_in_words(series: tifffile.TiffPageSeries) -> str:
    width, height = _size(series)
    return f"{series.name!r} {width} x {height} px".removeprefix("'' ")
