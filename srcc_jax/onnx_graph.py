"""An ONNX graph that is being written: its nodes and constants, and the file they become."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np

OPSET, IR_VERSION = 18, 8  # of 2022, so that runtimes of the last years take the file
Value = np.ndarray | str  # known already, or the name of a tensor in the graph


class ExportError(ValueError):
    """A function that cannot be written as ONNX, or a package for it is not installed."""


def import_onnx() -> ModuleType:
    """The onnx package. Raises ExportError with the cure where it is not installed."""
    try:
        import onnx
        import onnx.helper
        import onnx.numpy_helper
    except ModuleNotFoundError as error:
        raise ExportError(
            "ONNX files need a package that is not installed: python -m pip install -r requirements-export.txt"
        ) from error
    return onnx


class Graph:
    """Nodes and constants in the order they came. flat: tensors whose batch axis is still 1, to be stretched by what they meet."""

    def __init__(self) -> None:
        self._onnx = import_onnx()
        self._nodes: list[Any] = []
        self._constants: list[Any] = []
        self._numbers = itertools.count()
        self.flat: set[str] = set()

    def emit(self, op: str, inputs: Sequence[Value], *, output: str | None = None, **attributes: Any) -> str:
        """Adds a node; returns the name of its only output."""
        output = output or f"{op.lower()}_{next(self._numbers)}"
        names = [value if isinstance(value, str) else self._constant(value) for value in inputs]
        self._nodes.append(self._onnx.helper.make_node(op, names, [output], **attributes))
        return output

    def type_of(self, dtype: Any) -> int:
        """ONNX's number of a type of elements."""
        return self._onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))

    def model(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any], metadata: Mapping[str, str]) -> bytes:
        """The checked model with these inputs and outputs, by name their shapes and types."""
        helper = self._onnx.helper
        ends = [
            [
                helper.make_tensor_value_info(name, self.type_of(leaf.dtype), _axes(leaf.shape))
                for name, leaf in end.items()
            ]
            for end in (inputs, outputs)
        ]
        graph = helper.make_graph(self._nodes, "srcc_jax", *ends, self._constants)
        opsets = [helper.make_opsetid("", OPSET)]
        model = helper.make_model(graph, producer_name="srcc_jax", opset_imports=opsets, ir_version=IR_VERSION)
        helper.set_model_props(model, dict(metadata))
        self._onnx.checker.check_model(model, full_check=True)
        return model.SerializeToString()

    def _constant(self, value: np.ndarray) -> str:
        name = f"constant_{next(self._numbers)}"
        self._constants.append(
            self._onnx.numpy_helper.from_array(np.ascontiguousarray(value).reshape(value.shape), name)
        )
        return name


def _axes(shape: Sequence[Any]) -> list[int | str]:
    return [size if isinstance(size, int) else str(size) for size in shape]
