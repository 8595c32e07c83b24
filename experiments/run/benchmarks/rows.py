"""Rows of the table of BENCHMARKS.md."""

from __future__ import annotations

import numpy as np

Row = tuple[str, str, str, str]  # what, measured, target, seconds


def ratio(name: str, ours: np.ndarray, theirs: np.ndarray, target: str, unit: str = "s") -> Row:
    """Median of the ratios of the rounds, with their quartiles."""
    low, middle, high = np.quantile(ours / theirs, [0.25, 0.5, 0.75])
    seconds = f"{np.median(ours):.3f} {unit} / {np.median(theirs):.3f} {unit}"
    return name, f"{middle:.2f} ({low:.2f} to {high:.2f})", target, seconds
