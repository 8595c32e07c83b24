"""Files of weights as {name: array}: safetensors, npz, Keras's h5 and torch's pth. Never runs code from a file.

Names and layouts stay as the file has them (see srcc_jax.models.pretrained for what they mean); bfloat16 becomes float32.
"""

import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import numpy as np

from data_pipelines.safetensors_files import MAX_HEADER, read_metadata, read_safetensors
from data_pipelines.torch_checkpoints import LEGACY_START, read_torch_legacy, read_torch_zip

MAX_BYTES = 16 * 2**30  # of a file's arrays when expanded; the largest networks here have 0.3 GB
# What zipfile, h5py and NumPy raise on damaged files.
_READ_ERRORS = (
    ValueError,
    TypeError,
    LookupError,
    OSError,
    EOFError,
    MemoryError,
    OverflowError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
)

# Order in which Keras 3 numbers the variables of a layer, by the layer's class.
_KERAS_VARIABLES = {
    "conv2d": ("kernel", "bias"),
    "depthwise_conv2d": ("kernel", "bias"),
    "dense": ("kernel", "bias"),
    "batch_normalization": ("gamma", "beta", "moving_mean", "moving_variance"),
    "normalization": ("mean", "variance", "count"),
}


class WeightsError(ValueError):
    """A file that holds no weights we read; the message names the file, what is wrong with it and what to do."""


def read_weights(path: str | Path) -> dict[str, np.ndarray]:
    """The arrays of a .safetensors, .npz, .h5 or .pth file by name. They may be read-only views.

    A torch state_dict is taken out of {"state_dict": ...}, and the prefix "module." of parallel training is dropped.
    Raises WeightsError for a file that is missing, damaged, of another kind, or holds anything but arrays.
    """
    path = Path(path)
    try:
        arrays = _reader(path)(path)
    except _READ_ERRORS as error:
        raise WeightsError(f"{path}: {error}") from error
    if not arrays:
        raise WeightsError(f"{path}: holds no arrays")
    prefixed = all(name.startswith("module.") for name in arrays)
    return {name.removeprefix("module.") if prefixed else name: array for name, array in arrays.items()}


def read_texts(path: str | Path) -> dict[str, str]:
    """The texts that travel in a .safetensors file by name; {} of other files. Raises WeightsError as `read_weights` does."""
    path = Path(path)
    try:
        return read_metadata(path) if _reader(path) is read_safetensors else {}
    except _READ_ERRORS as error:
        raise WeightsError(f"{path}: {error}") from error


def _reader(path: Path) -> Callable[[Path], dict[str, np.ndarray]]:
    """What reads the arrays of a file. ValueError where it is not there or not what its ending says."""
    if not path.is_file():
        raise ValueError("is a folder" if path.is_dir() else "there is no such file")
    if path.suffix not in _READERS:
        raise ValueError(f"weights are read from {', '.join(_READERS)} files, not from {path.suffix or 'this'}")
    kinds, reader = _READERS[path.suffix]
    _check_size(path.stat().st_size)
    found = _kind(path)
    if found not in kinds:
        raise ValueError(f"is {found}, not what its ending {path.suffix} says")
    return reader


def _kind(path: Path) -> str:
    """What a file is by its first bytes, in words."""
    with path.open("rb") as file:
        head = file.read(64)
    if head.startswith(b"\x89HDF\r\n\x1a\n"):
        return "an HDF5 file"
    if head.startswith(b"PK\x03\x04"):
        return "a zip archive"
    if head.startswith(LEGACY_START):
        return "a legacy torch file"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= MAX_HEADER:
        return "a safetensors file"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer (git lfs pull brings the weights)"
    return "a text file, or of an unknown kind" if head else "an empty file"


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    return read_torch_zip(path) if zipfile.is_zipfile(path) else read_torch_legacy(path)


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(path) as archive:
        _check_size(sum(entry.file_size for entry in archive.infolist()))
        others = [name for name in archive.namelist() if not name.endswith(".npy")]
    if others:
        raise ValueError(f"a zip archive with other things than arrays: {', '.join(others[:5])}")
    with np.load(path, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def _read_h5(path: Path) -> dict[str, np.ndarray]:
    """Keras's two layouts (`save_weights` of Keras 3, and the older one, alone or inside a whole model), else by path."""
    with h5py.File(path, "r") as file:
        root = file.get("model_weights", file)
        datasets = dict(_datasets(root, ""))
        _check_size(sum(dataset.size * dataset.dtype.itemsize for dataset in datasets.values()))
        if "layer_names" in root.attrs:
            names = {place: name for layer in _texts(root, "layer_names") for place, name in _legacy_names(root, layer)}
        elif "layers" in root:
            names = {place: _keras3_name(dataset) for place, dataset in datasets.items() if _is_weight(place)}
        else:
            names = {place: place for place in datasets}
        if len(set(names.values())) < len(names):
            raise ValueError("several layers have one name: save the model with distinct names of layers")
        return {name: np.asarray(datasets[place]) for place, name in names.items()}


def _datasets(group: h5py.Group, prefix: str) -> Iterator[tuple[str, h5py.Dataset]]:
    """All datasets below a group by path. Data that lie in other files are refused, and links to elsewhere not followed."""
    for key in group:
        if not isinstance(group.get(key, getlink=True), h5py.HardLink):
            raise ValueError(f"{prefix}{key} is a link to elsewhere, not weights")
        member = group[key]
        if isinstance(member, h5py.Group):
            yield from _datasets(member, f"{prefix}{key}/")
        elif not isinstance(member, h5py.Dataset) or member.is_virtual or member.external:
            raise ValueError(f"{prefix}{key} is not stored in this file")
        elif member.shape is None or member.dtype.kind not in "biuf":
            raise ValueError(f"{prefix}{key} is of type {member.dtype}, not numbers")
        else:
            yield f"{prefix}{key}", member


def _texts(group: h5py.Group, attribute: str) -> list[str]:
    return [text.decode() if isinstance(text, bytes) else str(text) for text in group.attrs[attribute]]


def _legacy_names(root: h5py.Group, layer: str) -> list[tuple[str, str]]:
    """(path of the dataset, name of the weight) of a layer. Keras splits long lists of names over weight_names0, ..."""
    parts = sorted(
        (key for key in root[layer].attrs if key.startswith("weight_names")), key=lambda key: (len(key), key)
    )
    return [(f"{layer}/{name}", name) for part in parts for name in _texts(root[layer], part)]


def _is_weight(place: str) -> bool:
    """Keras 3 also saves the state of random layers and of the optimiser."""
    return "seed_generator" not in place and not place.startswith("optimizer/")


def _keras3_name(dataset: h5py.Dataset) -> str:
    """`<layer>/<variable>` of a dataset .../<class>_<number>/vars/<index>, whose group notes the layer's own name."""
    variables = dataset.parent
    if "name" not in variables.attrs:
        raise ValueError("does not note its layers' names: save it again with Keras 3.5 or later, or as legacy .h5")
    folder, index = variables.parent.name.rsplit("/", 1)[-1], dataset.name.rsplit("/", 1)[-1]
    known = _KERAS_VARIABLES.get(re.sub(r"_\d+$", "", folder), ())
    leaf = known[int(index)] if index.isdigit() and int(index) < len(known) else index
    return f"{variables.attrs['name']}/{leaf}"


def _check_size(count: int) -> None:
    if count > MAX_BYTES:
        raise ValueError(
            f"its arrays would take {count / 2**30:.0f} GiB of memory, beyond the {MAX_BYTES / 2**30:.0f} allowed"
        )


_TORCH_KINDS = ("a zip archive", "a legacy torch file")
_READERS: dict[str, tuple[tuple[str, ...], Callable[[Path], dict[str, np.ndarray]]]] = {
    ".safetensors": (("a safetensors file",), read_safetensors),
    ".npz": (("a zip archive",), _read_npz),
    ".h5": (("an HDF5 file",), _read_h5),
    ".pth": (_TORCH_KINDS, _read_torch),
    ".pt": (_TORCH_KINDS, _read_torch),
    ".bin": (_TORCH_KINDS, _read_torch),
}
