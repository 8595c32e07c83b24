"""What each JAX primitive is in ONNX: (graph, its inputs, its equation) -> the names of its outputs.

Images stay NHWC; around Conv and pooling, which are NCHW in ONNX, stand transpositions, of which onnxruntime removes the pairs.
"""

from __future__ import annotations

import itertools
import math
import operator
import string
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from srcc_jax.onnx_graph import ExportError, Graph, Value

_TO_NCHW, _TO_NHWC = (0, 3, 1, 2), (0, 2, 3, 1)


def _integers(values: Sequence[Any]) -> np.ndarray:
    """Sizes as ONNX takes them: the batch, whatever it is, as -1."""
    return np.asarray([value if isinstance(value, int) else -1 for value in map(_plain, values)], np.int64)


def _plain(value: Any) -> Any:
    return operator.index(value) if isinstance(value, int | np.integer) else value


def _nchw(graph: Graph, x: Value, op: str, others: Sequence[Value] = (), **attributes: Any) -> str:
    """An operator of ONNX that wants NCHW, applied to NHWC."""
    y = graph.emit(op, [graph.emit("Transpose", [x], perm=_TO_NCHW), *others], **attributes)
    return graph.emit("Transpose", [y], perm=_TO_NHWC)


def _maximum(graph: Graph, inputs: list[Value], equation: Any) -> str:
    zeros = [isinstance(value, np.ndarray) and not value.any() for value in inputs]
    return graph.emit("Relu", [inputs[zeros.index(False)]]) if any(zeros) else graph.emit("Max", inputs)


def _broadcast(graph: Graph, inputs: list[Value], equation: Any) -> str:
    """Axes are added; of the stretched ones only the batch may be, and that is left to the operators that follow."""
    shape, where = equation.params["shape"], equation.params["broadcast_dimensions"]
    have = equation.invars[0].aval.shape
    aligned = [have[where.index(axis)] if axis in where else 1 for axis in range(len(shape))]
    stretched = [axis for axis, (size, wanted) in enumerate(zip(aligned, shape)) if size != wanted]
    output = graph.emit("Reshape", [inputs[0], _integers(aligned)])
    if 0 in stretched and not isinstance(_plain(shape[0]), int):
        graph.flat.add(output)
        stretched.remove(0)
    if stretched:
        output = graph.emit("Expand", [output, np.asarray([s if isinstance(s, int) else 1 for s in shape], np.int64)])
    return output


def _product(graph: Graph, inputs: list[Value], equation: Any) -> str:
    """A 1×1 convolution where it is one, so that it joins its neighbours; else by its letters."""
    (left, right), (left_batch, right_batch) = equation.params["dimension_numbers"]
    x, y = (variable.aval for variable in equation.invars)
    matrix = inputs[1]
    if isinstance(matrix, np.ndarray) and (x.ndim, y.ndim) == (4, 2) and (tuple(left), tuple(right)) == ((3,), (0,)):
        return _nchw(graph, inputs[0], "Conv", [matrix.T[:, :, None, None]])
    if y.ndim == 2 and (tuple(left), tuple(right)) == ((x.ndim - 1,), (0,)):
        return graph.emit("MatMul", inputs)
    letters = iter(string.ascii_lowercase)
    names = [next(letters) for _ in range(x.ndim)], [next(letters) for _ in range(y.ndim)]
    for a, b in zip((*left, *left_batch), (*right, *right_batch)):
        names[1][b] = names[0][a]
    free = [
        [name for axis, name in enumerate(of) if axis not in (*contracted, *batch)]
        for of, contracted, batch in zip(names, (left, right), (left_batch, right_batch))
    ]
    result = [names[0][axis] for axis in left_batch] + free[0] + free[1]
    return graph.emit("Einsum", inputs, equation=f"{','.join(map(''.join, names))}->{''.join(result)}")


def _convolution(graph: Graph, inputs: list[Value], equation: Any) -> str:
    params, kernel = equation.params, inputs[1]
    numbers, groups, enlarged = params["dimension_numbers"], params["feature_group_count"], params["lhs_dilation"]
    if not isinstance(kernel, np.ndarray) or numbers.lhs_spec != _TO_NCHW or params["batch_group_count"] != 1:
        raise ExportError("a convolution with other than fixed weights has no translation to ONNX here")
    kernel = np.transpose(kernel, numbers.rhs_spec)  # OIHW
    before, after = zip(*params["padding"])
    dilations = list(params["rhs_dilation"])
    if all(step == 1 for step in enlarged):
        where = {"strides": list(params["window_strides"]), "pads": [*before, *after], "dilations": dilations}
        return _nchw(graph, inputs[0], "Conv", [kernel], group=groups, **where)
    if any(step != 1 for step in (*params["window_strides"], *dilations)):
        raise ExportError("a dilated transposed convolution has no translation to ONNX here")
    reach = [size - 1 for size in kernel.shape[2:]]
    extra = [max(0, pad - side) for pad, side in zip(after, reach)]
    pads = [side - pad for side, pad in zip(reach, before)] + [max(0, s - pad) for s, pad in zip(reach, after)]
    grouped = kernel[:, :, ::-1, ::-1].reshape(groups, -1, *kernel.shape[1:]).swapaxes(1, 2)
    scattered = grouped.reshape(-1, *grouped.shape[2:])  # (inputs, outputs of a group, k, k)
    where = {"strides": list(enlarged), "pads": pads, "output_padding": extra}
    return _nchw(graph, inputs[0], "ConvTranspose", [scattered], group=groups, **where)


def _pooling(graph: Graph, inputs: list[Value], equation: Any) -> str:
    """Windows over the pixels of NHWC: the largest value, or the sum (as a mean that counts the padding, times the window)."""
    params = equation.params
    window, strides, padding = (
        params[f"window_{n}"] if n != "padding" else params[n] for n in ("dimensions", "strides", "padding")
    )
    spread = (*params["base_dilation"], *params["window_dilation"])
    if len(window) != 4 or window[0] != 1 or window[3] != 1 or any(step != 1 for step in spread):
        raise ExportError("windows over other axes than the pixels' have no translation to ONNX here")
    (top, bottom), (left, right) = padding[1:3]
    where = {"kernel_shape": window[1:3], "strides": strides[1:3], "pads": [top, left, bottom, right]}
    if equation.primitive.name == "reduce_window_max":
        return _nchw(graph, inputs[0], "MaxPool", **where)
    mean = _nchw(graph, inputs[0], "AveragePool", count_include_pad=1, **where)
    return graph.emit("Mul", [mean, np.asarray(math.prod(window), equation.outvars[0].aval.dtype)])


def _pad(graph: Graph, inputs: list[Value], equation: Any) -> str:
    before, after, between = zip(*equation.params["padding_config"])
    if any(between):
        raise ExportError("padding between pixels has no translation to ONNX here")
    return graph.emit("Pad", [inputs[0], np.asarray([*before, *after], np.int64), inputs[1]])


def _slice(graph: Graph, inputs: list[Value], equation: Any) -> str:
    params, shape = equation.params, equation.invars[0].aval.shape
    strides = params["strides"] or (1,) * len(shape)
    cuts = zip(itertools.count(), params["start_indices"], params["limit_indices"], strides, shape)
    cut = [
        (start, limit, axis, step) for axis, start, limit, step, size in cuts if (start, limit, step) != (0, size, 1)
    ]
    return graph.emit("Slice", [inputs[0], *np.asarray(cut, np.int64).reshape(-1, 4).T]) if cut else str(inputs[0])


def _split(graph: Graph, inputs: list[Value], equation: Any) -> list[str]:
    ends, axis = np.cumsum(equation.params["sizes"], dtype=np.int64), np.asarray([equation.params["axis"]], np.int64)
    return [graph.emit("Slice", [inputs[0], *np.asarray(ends_of)[:, None], axis]) for ends_of in zip((0, *ends), ends)]


def _reversal(graph: Graph, inputs: list[Value], equation: Any) -> str:
    output = inputs[0]
    for axis in equation.params["dimensions"]:
        places = np.arange(equation.invars[0].aval.shape[axis], dtype=np.int64)
        output = graph.emit("Gather", [output, places[::-1]], axis=axis)
    return str(output)


def _taking(graph: Graph, inputs: list[Value], equation: Any) -> str:
    """x[..., places, ...] with known places along one axis: what choosing channels is traced to."""
    numbers, shape = equation.params["dimension_numbers"], equation.invars[0].aval.shape
    axes, places = numbers.start_index_map, inputs[1]
    others = tuple(axis for axis in range(len(shape)) if axis not in axes)
    sizes = tuple(1 if axis in axes else size for axis, size in enumerate(shape))
    fits = len(axes) == 1 and numbers.collapsed_slice_dims == axes and numbers.offset_dims == others
    if not isinstance(places, np.ndarray) or places.ndim != 2 or not fits or equation.params["slice_sizes"] != sizes:
        raise ExportError("gather of other than fixed places along one axis has no translation to ONNX here")
    return graph.emit("Gather", [inputs[0], places[:, 0].astype(np.int64)], axis=axes[0])


def _same_shape(op: str) -> Callable[[Graph, list[Value], Any], str]:
    return lambda graph, inputs, equation: graph.emit(op, inputs)


def _reduction(op: str) -> Callable[[Graph, list[Value], Any], str]:
    """The axes go as an input."""
    return lambda graph, inputs, equation: graph.emit(op, [*inputs, _integers(equation.params["axes"])], keepdims=0)


def _reshape(graph: Graph, inputs: list[Value], equation: Any) -> str:
    return graph.emit("Reshape", [inputs[0], _integers(equation.outvars[0].aval.shape)])


_OF_THE_SAME_NAME = (
    "Add",
    "Sub",
    "Mul",
    "Div",
    "Min",
    "Neg",
    "Exp",
    "Log",
    "Tanh",
    "Sqrt",
    "Abs",
    "Floor",
    "Ceil",
    "Pow",
    "Erf",
)
ELEMENTWISE: dict[str, Callable[[Graph, list[Value], Any], str]] = {
    **{op.lower(): _same_shape(op) for op in _OF_THE_SAME_NAME},
    "logistic": _same_shape("Sigmoid"),
    "gt": _same_shape("Greater"),
    "ge": _same_shape("GreaterOrEqual"),
    "lt": _same_shape("Less"),
    "le": _same_shape("LessOrEqual"),
    "eq": _same_shape("Equal"),
    "max": _maximum,
    "rsqrt": lambda graph, inputs, equation: graph.emit("Reciprocal", [graph.emit("Sqrt", inputs)]),
    "square": lambda graph, inputs, equation: graph.emit("Mul", [inputs[0], inputs[0]]),
    "integer_pow": lambda graph, inputs, equation: graph.emit(
        "Pow", [inputs[0], np.asarray(equation.params["y"], equation.outvars[0].aval.dtype)]
    ),
    "clamp": lambda graph, inputs, equation: graph.emit("Clip", [inputs[1], inputs[0], inputs[2]]),
    "select_n": lambda graph, inputs, equation: graph.emit("Where", [inputs[0], inputs[2], inputs[1]]),
    "convert_element_type": lambda graph, inputs, equation: graph.emit(
        "Cast", inputs, to=graph.type_of(equation.params["new_dtype"])
    ),
}
OTHERS: dict[str, Callable[[Graph, list[Value], Any], str | list[str]]] = {
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "squeeze": _reshape,
    "expand_dims": _reshape,
    "transpose": lambda graph, inputs, equation: graph.emit("Transpose", inputs, perm=equation.params["permutation"]),
    "concatenate": lambda graph, inputs, equation: graph.emit("Concat", inputs, axis=equation.params["dimension"]),
    "reduce_sum": _reduction("ReduceSum"),
    "reduce_max": _reduction("ReduceMax"),
    "dot_general": _product,
    "conv_general_dilated": _convolution,
    "reduce_window_max": _pooling,
    "reduce_window_sum": _pooling,
    "pad": _pad,
    "gather": _taking,
    "rev": _reversal,
    "slice": _slice,
    "split": _split,
}
