"""A function of arrays as an ONNX model, for onnxruntime and the tools that build on it.

The function is traced, its formulations for GPU are taken (a convolution is a Conv node, not the sums that are fast in XLA on
CPU), and every primitive becomes the ONNX operator of the same meaning. What depends on no input is computed here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import export

from srcc_jax.onnx_graph import ExportError, Graph, Value
from srcc_jax.onnx_operators import ELEMENTWISE, OTHERS

_CALLS = ("jit", "pjit", "closed_call", "checkpoint", "custom_jvp_call", "custom_vjp_call")
_NOTHING_TO_DO = ("optimization_barrier", "copy", "stop_gradient")


def to_onnx(
    function: Callable[[jax.Array], Mapping[str, jax.Array]],
    name: str,
    shape: Sequence[int],
    dtype: Any,
    *,
    metadata: Mapping[str, str],
) -> bytes:
    """The ONNX model of function(array [batch, *shape]) -> {name: array [batch, ...]}, for a batch of any size.

    name, shape, dtype: of its input. metadata: texts that travel in the file. Raises ExportError where an operation has no
    translation here.
    """
    (batch,) = export.symbolic_shape("batch")
    example = jax.ShapeDtypeStruct((batch, *shape), dtype)
    try:
        traced, outputs = jax.make_jaxpr(function, return_shape=True)(example)
    except jax.errors.InconclusiveDimensionOperation as error:
        raise ExportError(
            "an operation depends on the size of the batch and has no translation to ONNX here: export as safetensors instead"
        ) from error
    graph = Graph()
    found = _run(graph, traced.jaxpr, traced.consts, [name])
    for key, value in zip(sorted(outputs), found, strict=True):
        graph.emit("Identity", [value], output=key)
    return graph.model({name: example}, outputs, metadata)


def _run(graph: Graph, jaxpr: Any, constants: Sequence[Any], inputs: Sequence[Value]) -> list[Value]:
    """The outputs of a traced function, all of whose operations are added."""
    known: dict[Any, Value] = dict(zip(jaxpr.constvars, map(np.asarray, constants), strict=True))
    known.update(zip(jaxpr.invars, inputs, strict=True))

    def read(variable: Any) -> Value:
        return np.asarray(variable.val) if hasattr(variable, "val") else known[variable]

    for equation in jaxpr.eqns:
        values = _apply(graph, equation, [read(variable) for variable in equation.invars])
        known.update(zip(equation.outvars, values, strict=True))
    return [read(variable) for variable in jaxpr.outvars]


def _apply(graph: Graph, equation: Any, inputs: list[Value]) -> list[Value]:
    primitive, params = equation.primitive.name, equation.params
    if "branches_platforms" in params:  # lax.platform_dependent: what a platform without a formulation of its own runs
        branch = params["branches"][params["branches_platforms"].index(None)]
        return _run(graph, branch.jaxpr, branch.consts, inputs[1:])
    if primitive == "platform_index":
        return [np.zeros((), np.int32)]
    if primitive in _NOTHING_TO_DO:
        return inputs
    if primitive in _CALLS:
        inner = params["call_jaxpr"] if "call_jaxpr" in params else params["jaxpr"]
        return _run(graph, getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), inputs)
    fixed = all(isinstance(size, int | np.integer) for variable in equation.outvars for size in variable.aval.shape)
    if fixed and all(isinstance(value, np.ndarray) for value in inputs):
        result = equation.primitive.bind(*inputs, **params)
        return [np.asarray(leaf) for leaf in (result if equation.primitive.multiple_results else [result])]
    if primitive not in ELEMENTWISE | OTHERS:
        raise ExportError(f"{primitive} has no translation to ONNX here: export as safetensors instead")
    flat = [isinstance(value, np.ndarray) or value in graph.flat for value in inputs]
    if primitive in ELEMENTWISE:
        output = ELEMENTWISE[primitive](graph, inputs, equation)
        graph.flat |= {output} if all(flat) else set()
        return [output]
    if graph.flat & {value for value in inputs if isinstance(value, str)}:
        raise ExportError(f"{primitive} of what is one for the whole batch has no translation to ONNX here")
    found = OTHERS[primitive](graph, inputs, equation)
    return [found] if isinstance(found, str) else [*found]
