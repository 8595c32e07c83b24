"""A config dataclass as absl flags, and flags as a config."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any, TypeVar

from absl import flags

C = TypeVar("C")


def define_flags(config: type) -> None:
    """One flag per field of a frozen dataclass made with `srcc_jax.settings.setting`: its type, default, help and choices."""
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        kind, text, choices = _plain(hints[field.name]), field.metadata["help"], field.metadata["choices"]
        if choices:
            flags.DEFINE_enum(field.name, field.default, list(choices), text)
        else:
            define = {
                bool: flags.DEFINE_bool,
                int: flags.DEFINE_integer,
                float: flags.DEFINE_float,
                str: flags.DEFINE_string,
            }
            define[kind](field.name, field.default, text)


def config_from_flags(config: type[C]) -> C:
    """The config that the command line asks for."""
    values = flags.FLAGS.flag_values_dict()
    return config(**{field.name: values[field.name] for field in dataclasses.fields(config)})  # type: ignore[arg-type]


def _plain(hint: Any) -> type:
    """`float` of `float | None`; any other type as it is."""
    if isinstance(hint, types.UnionType):
        return next(part for part in typing.get_args(hint) if part is not types.NoneType)
    return hint
