"""Plots of a report as SVG: curves in, text out; the same input gives the same text.

Matplotlib's import takes longer than all else of a report, and most reports have no plot: so the first plot imports it.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from srcc_jax.metrics import RocCurve

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS = ("#0b63ce", "#d1495b", "#2a9d6f", "#e08e0b", "#7a5bc4", "#3aa6b9", "#8a8f98")
_SVG: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text, in the page's font
    "svg.hashsalt": "srcc_jax",  # equal input, equal page
    "text.parse_math": False,  # names of models may hold dollar signs
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a8f98",
    "axes.labelcolor": "#3c424d",
    "xtick.color": "#5b616c",
    "ytick.color": "#5b616c",
    "axes.grid": True,
    "grid.color": "#e7e9ed",
    "legend.frameon": False,
}


def roc_plot(curves: Mapping[str, RocCurve]) -> str:
    """Curves of one or more models over the same slides, their areas in the legend, as SVG."""
    with _new_figure(height=4.2) as figure:
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color="#c3c7ce", linewidth=1, linestyle="--")
        for colour, (name, curve) in zip(_cycle(len(curves)), curves.items()):
            axes.plot(curve.fpr, curve.tpr, color=colour, linewidth=1.8, label=f"{name}  (AUC {curve.area:.4f})")
        axes.set(xlabel="1 − specificity", ylabel="sensitivity", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right center")
        return _svg(figure)


def training_plot(curves: Mapping[str, tuple[np.ndarray, np.ndarray]], *, quantity: str = "loss") -> str:
    """name -> (step [T], value [T]), drawn over the step, as SVG; few points are marked as such."""
    with _new_figure(height=3.2) as figure:
        axes = figure.subplots()
        for colour, (name, (step, value)) in zip(_cycle(len(curves)), curves.items()):
            marker = "o" if len(step) <= 40 else ""
            axes.plot(step, value, color=colour, linewidth=1.5, marker=marker, markersize=3, label=name)
        axes.set(xlabel="step", ylabel=quantity)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right center")
        return _svg(figure)


@contextlib.contextmanager
def _new_figure(*, height: float) -> Iterator[Figure]:
    """A figure in the reports' style, to be drawn and written within the context. height in inches."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_SVG):
        yield Figure(figsize=(7.2, height), layout="constrained")


def _cycle(count: int) -> list[str]:
    return [_COLOURS[i % len(_COLOURS)] for i in range(count)]


def _svg(figure: Figure) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return f"<figure>{text.getvalue()[text.getvalue().index('<svg') :]}</figure>"
