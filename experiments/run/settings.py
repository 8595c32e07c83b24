"""A config dataclass as absl flags, and flags as a config."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable
from typing import Any, TypeVar

from absl import flags

from experiments.run.program import UsageError

C = TypeVar("C")


_DEFINE: dict[type, Callable[..., Any]] = {
    bool: flags.DEFINE_bool,
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    str: flags.DEFINE_string,
}


def define_flags(config: type, flag_values: flags.FlagValues = flags.FLAGS) -> None:
    """One flag per field of a frozen dataclass made with `srcc_jax.settings.setting`: its type, default, help and choices."""
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        kind, text, choices = _plain(hints[field.name]), field.metadata["help"], field.metadata["choices"]
        if choices:
            flags.DEFINE_enum(field.name, str(field.default), list(choices), text, flag_values=flag_values)
        else:
            _DEFINE[kind](field.name, field.default, text, flag_values=flag_values)


def config_from_flags(config: type[C], flag_values: flags.FlagValues = flags.FLAGS) -> C:
    """The config that the command line asks for. Raises UsageError that names the flags it does not accept."""
    values = flag_values.flag_values_dict()
    try:
        return config(**{field.name: values[field.name] for field in dataclasses.fields(config)})  # type: ignore[arg-type]
    except ValueError as error:
        raise UsageError(str(error)) from error


def _plain(hint: Any) -> type:
    """`float` of `float | None`; any other type as it is."""
    if isinstance(hint, types.UnionType):
        return next(part for part in typing.get_args(hint) if part is not types.NoneType)
    return hint
