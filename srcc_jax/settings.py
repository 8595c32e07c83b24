"""Settings of a fit: fields of a frozen dataclass that carry their own help text and bounds (flags are generated from them)."""

from __future__ import annotations

import dataclasses
import math
import operator
from typing import Any

_BOUNDS = {
    "least": ("at least", operator.ge),
    "above": ("above", operator.gt),
    "most": ("at most", operator.le),
    "below": ("below", operator.lt),
}


def setting(default: Any, help: str, *, choices: tuple[str, ...] | None = None, **bounds: float) -> Any:
    """A dataclass field with the text that `--help` shows. `help` says where the number comes from: a section, or 'ours'.

    bounds: least, above, most, below, as `check_settings` holds a number to them.
    """
    unknown = set(bounds) - set(_BOUNDS)
    if unknown:
        raise TypeError(f"unknown bounds {sorted(unknown)}: there are {', '.join(_BOUNDS)}")
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, "bounds": bounds})


def check_settings(config: Any) -> None:
    """Raises ValueError that names, as flags, every setting that is out of its bounds or is none of its choices."""
    wrong = {field.name: _problem(field, getattr(config, field.name)) for field in dataclasses.fields(config)}
    if any(wrong.values()):
        texts = [f"--{name}={getattr(config, name)} must be {problem}" for name, problem in wrong.items() if problem]
        raise ValueError("; ".join(texts))


def _problem(field: dataclasses.Field, value: Any) -> str:
    """What the value of a setting would have to be; empty where it is that."""
    choices, bounds = field.metadata["choices"], field.metadata["bounds"]
    if choices:
        return "" if value in choices else f"one of {', '.join(choices)}"
    if isinstance(value, float) and not math.isfinite(value):
        return "a finite number"
    missed = [name for name, bound in bounds.items() if value is not None and not _BOUNDS[name][1](value, bound)]
    return " and ".join(f"{_BOUNDS[name][0]} {bounds[name]:g}" for name in missed)
