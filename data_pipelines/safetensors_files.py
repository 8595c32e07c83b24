"""safetensors files: eight bytes with the header's length, the header as JSON, the bytes of the arrays one after another.

The header gives for each array its type, shape and first and last byte, and under "__metadata__" texts by name.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.files import atomic_write
from data_pipelines.torch_checkpoints import bfloat16_to_float32

MAX_HEADER = 100_000_000  # bytes, as the format's definition says
_TYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U64": "<u8",
    "U32": "<u4",
    "U16": "<u2",
    "U8": "u1",
    "BOOL": "?",
}
_KINDS = {np.dtype(written): kind for kind, written in _TYPES.items() if kind != "BF16"}


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """The arrays by name, bfloat16 as float32. Raises ValueError for a file that is damaged or none of these."""
    content = memoryview(path.read_bytes())
    header, start = _header(content)
    try:
        return {name: _array(name, e, content[start:]) for name, e in header.items() if name != "__metadata__"}
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError("its header is not that of a safetensors file") from error


def read_metadata(path: Path) -> dict[str, str]:
    """The texts in the header, {} where there are none. Raises ValueError as `read_safetensors` does."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        file.seek(0)
        content = memoryview(file.read(8 + min(length, MAX_HEADER)))
    metadata = _header(content)[0].get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError("its header is not that of a safetensors file")
    return metadata


def write_safetensors(path: str | os.PathLike, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Arrays by name, in the order of their names, with texts that travel in the header. TypeError for types without a name there."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in sorted(arrays):
        array = arrays[name]
        if array.dtype not in _KINDS:
            raise TypeError(f"{name} is of type {array.dtype}; written are {', '.join(map(str, _KINDS))}")
        begin, end = end, end + array.nbytes
        header[name] = {"dtype": _KINDS[array.dtype], "shape": list(array.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the arrays are aligned
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in sorted(arrays):
            file.write(np.ascontiguousarray(arrays[name]).data)


def _header(content: memoryview) -> tuple[dict[str, Any], int]:
    """The header, and where it ends."""
    start = 8 + int.from_bytes(content[:8], "little")
    if start > len(content):
        raise ValueError("the file ends inside its header: download or copy it again")
    header = json.loads(bytes(content[8:start]))
    if not isinstance(header, dict):
        raise ValueError("its header is not that of a safetensors file")
    return header, start


def _array(name: str, entry: dict[str, Any], content: memoryview) -> np.ndarray:
    kind, shape, (first, last) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if kind not in _TYPES:
        raise ValueError(f"{name} is of type {kind}; read are {', '.join(_TYPES)}")
    dtype = np.dtype(_TYPES[kind])
    if not 0 <= first <= last <= len(content) or last - first != math.prod(shape) * dtype.itemsize:
        raise ValueError(
            f"{name} has bytes {first} to {last} of {len(content)} for {shape} of {kind}: cut off or damaged"
        )
    data = content[first:last]
    values = bfloat16_to_float32(data) if kind == "BF16" else np.frombuffer(data, dtype)
    return values.reshape(shape)
