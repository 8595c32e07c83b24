"""A progress bar with items a second and the time left, shown only for what takes longer than five seconds."""

from __future__ import annotations

import sys

import tqdm

PATIENCE_SECONDS = 5.0


def progress(total: int | None, what: str, *, unit: str = "tiles") -> tqdm.tqdm:
    """A bar to `update(n)` and to close (it is a context manager). Where the output is no terminal, a line every 30 s."""
    return tqdm.tqdm(
        total=total,
        desc=what,
        unit=f" {unit}",
        delay=PATIENCE_SECONDS,
        mininterval=0.5 if sys.stderr.isatty() else 30.0,
        dynamic_ncols=True,
        leave=False,
    )
