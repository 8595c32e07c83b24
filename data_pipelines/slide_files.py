"""Finding slides in folders: by their endings, a DICOM series being one slide."""

import os
from collections.abc import Iterable
from pathlib import Path

from data_pipelines.readers import SlideError
from data_pipelines.slide_routes import PLAIN_ENDINGS

SLIDE_ENDINGS = (
    ".svs", ".tif", ".tiff", ".btf", ".ndpi", ".scn", ".mrxs", ".bif", ".vms", ".vmu", ".svslide", ".czi",
)  # fmt: skip
_DICOM_ENDING = ".dcm"
_RESULTS = ("slides", "state")  # the folders of predict_slides in its --out
_SERIES_UID = b"\x20\x00\x0e\x00UI"  # tag (0020,000E) in explicit little endian, as every encapsulated image has it
_DICOM_HEADER = 1 << 16  # bytes searched for it: it stands before the pixels


def find_slides(path: str | Path) -> list[Path]:
    """The slides at `path`, sorted: the file itself, or those in a folder and its sub-folders.

    A file counts by its ending, sound or not (`open_slide` tells). A folder that holds one DICOM series is one slide; where
    a folder holds several, or other slides too, each series is named by its first file. Folders of data beside an .mrxs
    file are not searched, nor are results of predict_slides, whose heat maps are TIFFs too. Plain images (PNG, JPEG, BMP)
    count only where nothing else is found: beside slides they are thumbnails and masks. Raises SlideError where there are
    none.
    """
    path = Path(path)
    if not path.is_dir():
        if not path.exists():
            raise SlideError(f"{path}: no such file or folder")
        return [path]
    slides: list[Path] = []
    plain: list[Path] = []
    for folder, folders, names in os.walk(path):
        if _holds_results(Path(folder)):
            folders[:] = [name for name in folders if name not in _RESULTS]
        folders[:] = sorted(name for name in folders if not name.startswith(".") and f"{name}.mrxs" not in names)
        files = [Path(folder, name) for name in sorted(names) if not name.startswith(".")]
        here = [file for file in files if file.suffix.lower() in SLIDE_ENDINGS]
        series = _series([file for file in files if file.suffix.lower() == _DICOM_ENDING])
        slides += [*here, *([Path(folder)] if len(series) == 1 and not here else series)]
        plain += [file for file in files if file.suffix.lower() in PLAIN_ENDINGS]
    if not (slides or plain):
        raise SlideError(
            f"{path}: no slides in this folder or below (endings {' '.join(SLIDE_ENDINGS)} {_DICOM_ENDING})"
        )
    return sorted(slides or plain)


def _holds_results(folder: Path) -> bool:
    """Whether predict_slides has written here: each of its slides has a state or a journal."""
    return any(next(folder.glob(f"state/*/{name}"), None) for name in ("state.json", "scores.npz"))


def dicom_file(folder: Path) -> Path:
    """A file of the one DICOM series in a folder. Raises SlideError where there is none, or more than one."""
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() == _DICOM_ENDING)
    series = _series(files)
    if not series:
        raise SlideError(f"{folder}: is a folder without DICOM files: name a slide file")
    if len(series) > 1:
        raise SlideError(
            f"{folder}: holds {len(series)} DICOM series: name a file of one, {series[0].name} for instance"
        )
    return series[0]


def _series(files: Iterable[Path]) -> list[Path]:
    """The first file of each series; a file without a readable series identifier stands for itself."""
    firsts: dict[bytes, Path] = {}
    for file in files:
        firsts.setdefault(_series_uid(file) or os.fsencode(file), file)
    return list(firsts.values())


def _series_uid(file: Path) -> bytes | None:
    try:
        with file.open("rb") as stream:
            header = stream.read(_DICOM_HEADER)
    except OSError:
        return None
    start = header.find(_SERIES_UID) + len(_SERIES_UID)
    if start < len(_SERIES_UID):
        return None
    length = int.from_bytes(header[start : start + 2], "little")
    return header[start + 2 : start + 2 + length].rstrip(b"\0 ")
