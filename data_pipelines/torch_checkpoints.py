"""torch checkpoints (.pth, zip and legacy) read without torch, and without running anything that is inside them.

A checkpoint is a pickle that names functions to call, and the bytes of its storages. The unpickler here knows the few
functions that rebuild tensors, and puts in their place ones that only note what was asked for: nothing that a checkpoint
names is executed, and any other name in it is refused. Arrays are made afterwards, as read-only views of the storages with checked bounds.

This is the one way in, also where torch is installed: torch.load(weights_only=True) would give the same arrays of the same
files (it too refuses what is not tensors in plain containers), but its refusals depend on the version that is there.
"""

import collections
import io
import pickle
import pickletools
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

LEGACY_START = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."  # the pickled number that opens such a file

# Everything that a malformed pickle raises while it is read by the restricted unpickler.
_PICKLE_ERRORS = (
    pickle.UnpicklingError,
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)
_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
# What stands beside the weights in checkpoints of training: its values are not looked at.
_BESIDE = (
    "device",
    "dtype",
    "float64",
    "float32",
    "float16",
    "bfloat16",
    "int64",
    "int32",
    "int16",
    "int8",
    "uint8",
    "bool",
)
_WRAPPERS = ("state_dict", "model_state_dict", "model")


class _Storage(NamedTuple):
    dtype: str
    key: str
    length: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_torch_zip(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a state_dict that torch >= 1.6 saved, by name. Raises ValueError for anything else."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        pickles = [entry.filename for entry in entries if entry.filename.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError("a zip archive that torch did not write (no data.pkl in it)")
        stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
        if not stored or sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise ValueError("its entries are compressed, which torch never does: save it again with torch.save")
        folder = pickles[0].removesuffix("data.pkl")
        if f"{folder}byteorder" in archive.namelist() and archive.read(f"{folder}byteorder") != b"little":
            raise ValueError("it was written on a big-endian machine: save it again on another")
        root, _ = _unpickle(io.BytesIO(archive.read(pickles[0])))
        return _arrays(_state_dict(root), lambda storage: archive.read(f"{folder}data/{storage.key}"))


def read_torch_legacy(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a state_dict that torch < 1.6 saved, by name. Raises ValueError for anything else.

    The file is five pickles (magic number, protocol, machine, object, keys of the storages), then for each storage its
    number of elements and its bytes.
    """
    stream = io.BytesIO(path.read_bytes())
    _, _, (machine, _), (root, storages), (keys, _) = (_unpickle(stream) for _ in range(5))
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise ValueError("it was written on a big-endian machine: save it again on another")
    if not isinstance(keys, list) or not all(isinstance(key, str) and key in storages for key in keys):
        raise ValueError("its list of storages is not that of its tensors")
    contents = {}
    for key in keys:
        size = int.from_bytes(stream.read(8), "little") * _width(storages[key].dtype)
        if size > len(stream.getbuffer()) - stream.tell():
            raise ValueError("it ends before its last tensor: download or copy it again")
        contents[key] = stream.read(size)
    return _arrays(_state_dict(root), lambda storage: contents[storage.key])


class _Beside:
    """Stands for a device or a type of elements."""

    def __init__(self, *_: Any) -> None:
        pass


class _TensorUnpickler(pickle.Unpickler):
    """Knows what a state_dict is made of, and only notes which tensors it would have. storages: those met, by key."""

    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream)
        self.storages: dict[str, _Storage] = {}
        self.known: dict[tuple[str, str], Callable] = {
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("collections", "Counter"): collections.Counter,
            ("torch", "Size"): tuple,
            ("torch._utils", "_rebuild_tensor"): self._tensor,
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch._utils", "_rebuild_parameter"): self._parameter,
            ("torch.nn.parameter", "Parameter"): self._parameter,
            **{(module, kind.__name__): kind for module in ("builtins", "__builtin__") for kind in (dict, list, set)},
        }

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _STORAGES:
            return name
        if module == "torch" and name in _BESIDE:
            return _Beside
        if (module, name) not in self.known:
            raise pickle.UnpicklingError(
                f"it asks for {module}.{name}, and only tensors in plain containers are read: "
                "save the state_dict alone, torch.save(model.state_dict(), ...), or as .safetensors"
            )
        return self.known[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        kind, storage, key, _, length, *view = pid
        if kind != "storage" or storage not in _STORAGES or not isinstance(key, str) or any(view):
            raise pickle.UnpicklingError(f"it refers to {pid!r}, which is not a whole storage of a known type")
        return self.storages.setdefault(key, _Storage(_STORAGES[storage], key, length))

    def _tensor(self, storage: _Storage, offset: int, shape: tuple, strides: tuple, *_: Any) -> _Tensor:
        numbers = (storage.length, offset, *shape, *strides)
        if len(shape) != len(strides) or not all(isinstance(n, int) and n >= 0 for n in numbers):
            raise pickle.UnpicklingError("a tensor's offset, shape or strides are not what torch writes")
        return _Tensor(storage, offset, tuple(shape), tuple(strides))

    def _parameter(self, data: _Tensor, *_: Any) -> _Tensor:
        return data


def _unpickle(stream: io.BytesIO) -> tuple[Any, dict[str, _Storage]]:
    """The next pickle of the stream, which is left behind it, and the storages it refers to."""
    start, size = stream.tell(), len(stream.getbuffer())
    try:
        for opcode, argument, _ in pickletools.genops(stream):
            if opcode.name in ("LONG_BINPUT", "PUT") and int(argument or 0) > size:
                raise ValueError("its pickle asks for more memory than it can use")  # a table of `argument` entries
        stream.seek(start)
        unpickler = _TensorUnpickler(stream)
        return unpickler.load(), unpickler.storages
    except _PICKLE_ERRORS as error:
        raise ValueError(f"refused: {str(error) or type(error).__name__}") from error


def _state_dict(root: Any) -> dict[str, _Tensor]:
    """The one dictionary of tensors in a checkpoint, out of the usual wrappers."""
    for wrapper in _WRAPPERS:
        if isinstance(root, Mapping) and isinstance(root.get(wrapper), Mapping):
            root = root[wrapper]
    if not isinstance(root, Mapping):
        raise ValueError(f"holds a {type(root).__name__} instead of a state_dict")
    others = [str(name) for name, value in root.items() if not (isinstance(name, str) and isinstance(value, _Tensor))]
    if others:
        raise ValueError(f"its state_dict has entries that are no tensors: {', '.join(others[:10])}")
    return dict(root)


def _arrays(state: Mapping[str, _Tensor], read: Callable[[_Storage], bytes]) -> dict[str, np.ndarray]:
    """Tensors as read-only views of their storages, each storage read once; bfloat16 as float32."""
    storages = {s: _storage_array(s, read(s)) for s in {tensor.storage for tensor in state.values()}}
    return {name: _view(name, tensor, storages[tensor.storage]) for name, tensor in state.items()}


def _width(dtype: str) -> int:
    return 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize


def _storage_array(storage: _Storage, content: bytes) -> np.ndarray:
    if len(content) != storage.length * _width(storage.dtype):
        raise ValueError(f"storage {storage.key} has {len(content)} bytes for {storage.length} of {storage.dtype}")
    if storage.dtype == "bfloat16":
        return bfloat16_to_float32(content)
    return np.frombuffer(content, storage.dtype)


def bfloat16_to_float32(content: bytes | memoryview) -> np.ndarray:
    """float32 [n] of 2 n bytes: bfloat16 is the upper half of a float32."""
    return (np.frombuffer(content, "<u2").astype(np.uint32) << 16).view(np.float32)


def _view(name: str, tensor: _Tensor, storage: np.ndarray) -> np.ndarray:
    last = tensor.offset + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.strides))
    if 0 not in tensor.shape and last >= storage.size:
        raise ValueError(f"tensor {name} reaches outside its storage")
    strides = [step * storage.itemsize if n > 1 else 0 for n, step in zip(tensor.shape, tensor.strides)]
    start = storage[min(tensor.offset, storage.size) :]
    return np.lib.stride_tricks.as_strided(start, tensor.shape, strides, writeable=False)
