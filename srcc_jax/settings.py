"""Settings of a fit: fields of a frozen dataclass that carry their own help text (flags are generated from them)."""

from __future__ import annotations

import dataclasses
from typing import Any


def setting(default: Any, help: str, *, choices: tuple[str, ...] | None = None) -> Any:
    """A dataclass field with the text that `--help` shows. `help` says where the number comes from: a section, or 'ours'."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})
