"""Sets of labelled patches as TensorFlow Datasets keeps them: two public ones by name, and patches of one's own in ArrayRecord files.

A patch in a set has a path as one in a file has, <folder of the set>/<split>/<number>.tile, so that tables, lists and readers hold
both kinds. Reading needs no TensorFlow; writing and downloading do, in the library that does it, which is imported only then.
"""

from __future__ import annotations

import functools
import io
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_pipelines.files import OutputError, writing

SUFFIX = ".tile"
PUBLIC = ("patch_camelyon", "colorectal_histology")
VERSION = "1.0.0"
FORMAT = "array_record"
_INFO = "dataset_info.json"
_KNOWN = ("slide_id", "patient_id")
_SPLITS = {"train": "train", "validation": "validation", "test": "test"}  # any other name: no split
_WHOLE = "all"  # the split, in the set, of patches that have none
_SLIDE = re.compile(r"CRC-Prim-HE-\d+")  # in the file names of colorectal_histology (Kather et al. 2016)


class TileSetError(ValueError):
    """A set that cannot be read, or not be made. Names the set and the cure."""


def is_tile_set(path: str | os.PathLike[str]) -> bool:
    """Whether this is the folder of a set (or the one above its only version), or the name of a public set."""
    return str(path) in PUBLIC or _folder(Path(path)) is not None


def is_tile(path: Path) -> bool:
    """Whether this is the path of a patch in a set that is on this disk."""
    return path.suffix == SUFFIX and (path.parent.parent / _INFO).is_file()


def read_tile_set(path: str | os.PathLike[str]) -> dict[str, list[Any]]:
    """Columns path, label, slide_id, patient_id and split of all patches of a set, "" where not known. A public set that is not on the
    disk is downloaded to the library's folder. Reads all records once. Raises TileSetError."""
    found = _folder(Path(path))
    folder = _public_folder(str(path)) if found is None else found
    columns: dict[str, list[Any]] = {name: [] for name in ("path", "label", *_KNOWN, "split")}
    splits = _builder(folder).info.splits
    for split in splits:
        for number, record in enumerate(_records(folder, split)):
            columns["path"].append(folder / split / f"{number}{SUFFIX}")
            columns["label"].append(record["label"])
            for name in _KNOWN:
                columns[name].append(record.get(name, ""))
            columns["split"].append(_SPLITS.get(split, "") if len(splits) > 1 else "")
    return columns


def read_tile(path: Path) -> Image.Image:
    """The image of a patch of a set. Raises OSError where it cannot be read, as opening a file does."""
    folder, split = path.parent.parent, path.parent.name
    try:
        record = _source(folder, split)[int(path.stem)]
    except (TileSetError, IndexError, KeyError, ValueError) as error:
        raise OSError(f"no patch {path.stem} in the split {split!r} of {folder}: {error}") from error
    return Image.open(io.BytesIO(record["image"]))


def write_tile_set(
    folder: str | os.PathLike[str], name: str, *, path: Sequence[Path], label: Sequence[str], **known: Sequence[str]
) -> Path:
    """Writes N image files as the set <folder>/<name>/1.0.0 and returns that folder. known: slide_id, patient_id and split, as far as
    they are ("" where not). JPEG and PNG files are stored as they are, other formats as PNG. Raises TileSetError or OutputError."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise TileSetError(f"{name!r} is no name for a set: give small letters, digits and underscores, a letter first")
    target = Path(folder).absolute() / name / VERSION
    if target.exists():
        raise OutputError(f"{target} is there already: remove it, or give another name")
    import tensorflow_datasets as tfds

    texts = {"label": label, **{column: known[column] for column in _KNOWN if column in known}}
    split = np.array(known.get("split", [""] * len(path)), np.str_)
    split[split == ""] = _WHOLE
    features = {"image": tfds.features.Image(shape=(None, None, 3), encoding_format="png")}
    tfds.disable_progress_bar()

    def examples(rows: np.ndarray) -> Iterator[tuple[int, dict[str, Any]]]:
        for row in rows:
            yield int(row), {"image": _stored(path[row]), **{column: str(texts[column][row]) for column in texts}}

    with writing(target):
        tfds.dataset_builders.store_as_tfds_dataset(
            name,
            version=VERSION,
            features=tfds.features.FeaturesDict(features | {column: tfds.features.Text() for column in texts}),
            split_datasets={str(one): examples(np.flatnonzero(split == one)) for one in np.unique(split)},
            data_dir=str(Path(folder).absolute()),
            file_format=FORMAT,
            description="Labelled patches.",
            disable_shuffling=True,
        )
    return target


def _stored(path: Path) -> io.BytesIO | np.ndarray:
    """What is kept of an image file: its bytes, or its pixels. Raises TileSetError where it is no image."""
    try:
        with Image.open(path) as image:
            if image.format in ("JPEG", "PNG") and image.mode == "RGB":
                return io.BytesIO(path.read_bytes())
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise TileSetError(f"{path}: no image can be read from it ({error}): leave it out, or restore it") from error


def _folder(path: Path) -> Path | None:
    """The folder of the set's files, or None where there is none."""
    if (path / _INFO).is_file():
        return path
    versions = sorted(path.glob(f"*/{_INFO}")) if path.is_dir() else []
    return versions[0].parent if len(versions) == 1 else None


def _public_folder(name: str) -> Path:
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, file_format=FORMAT)
        builder.download_and_prepare()
    except OSError as error:
        raise TileSetError(
            f"{name}: it is not on this disk and cannot be downloaded ({error}): download it where there is a network, with "
            f"tensorflow_datasets and file_format={FORMAT!r}, and give the folder with its {_INFO}"
        ) from error
    return Path(builder.data_dir)


@functools.cache
def _builder(folder: Path) -> Any:
    import tensorflow_datasets as tfds

    return tfds.builder_from_directory(str(folder))


@functools.cache
def _source(folder: Path, split: str) -> Any:
    """Records by number, their images as bytes."""
    import tensorflow_datasets as tfds

    try:
        return _builder(folder).as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    except NotImplementedError as error:
        raise TileSetError(
            f"{folder}: its records cannot be read one by one: prepare the set again with file_format={FORMAT!r}"
        ) from error


def _records(folder: Path, split: str) -> Iterator[Mapping[str, str]]:
    """The texts of all records of a split; TileSetError for a set without images and labels."""
    features = _builder(folder).info.features
    missing = {"image", "label"} - set(features)
    if missing:
        raise TileSetError(f"{folder}: no set of labelled patches, it has no {' and no '.join(sorted(missing))}")
    name_of = getattr(features["label"], "int2str", _text)
    source = _source(folder, split)
    for number in range(len(source)):
        record = source[number]
        texts = {name: _text(record[name]) for name in _KNOWN if name in record}
        slide = _SLIDE.search(_text(record["filename"])) if "filename" in record else None
        yield {"label": name_of(record["label"]), **({"slide_id": slide[0]} if slide else {}), **texts}


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
