"""A run as one self-contained HTML page, and tables as Markdown: arrays and numbers in, text out, no files.

Nothing on the page is fetched from a network. Pictures of slides are either embedded (bytes) or links relative to the
page (str); the caller, who knows where files are, chooses.
"""

import base64
import html
import io
import math
import urllib.parse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from srcc_jax.metrics import Interval, RocCurve

Cell = str | int | float | Interval | None
ABSENT = "–"
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


@dataclass(frozen=True)
class Table:
    """groups: (heading, number of columns) above the columns, from left to right; empty for none."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    groups: Sequence[tuple[str, int]] = ()
    caption: str = ""


@dataclass(frozen=True, kw_only=True)
class SlideRow:
    """One slide. images: caption -> PNG bytes to embed, or the picture's path relative to the page."""

    slide_id: str
    label: str = ""
    patient_id: str = ""
    probability: float | None = None
    status: str = "done"
    reason: str = ""
    tiles: int | None = None
    images: Mapping[str, bytes | str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a page shows; what is empty is left out.

    summary: metric -> unit of the bootstrap ("slide", "patient") -> interval.  roc: model -> curve.
    training: curve -> (step [T], value [T]).  warnings: one line each, failed slides with their reasons among them.
    notes: sentences under the summary (log-loss clip, iterations and seed of the bootstrap, threshold).
    """

    title: str
    subtitle: str = ""
    summary: Mapping[str, Mapping[str, Interval]] = field(default_factory=dict)
    notes: Sequence[str] = ()
    warnings: Sequence[str] = ()
    roc: Mapping[str, RocCurve] = field(default_factory=dict)
    comparison: Table | None = None
    slides: Sequence[SlideRow] = ()
    training: Mapping[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    configuration: Mapping[str, object] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)


def render(report: Report) -> str:
    """The whole page."""
    sections = (
        ("Warnings", "warnings", _bullets(report.warnings)),
        ("Result", "", _summary(report)),
        ("Receiver operating characteristic", "", roc_plot(report.roc) if report.roc else ""),
        ("Beside the paper", "", _table(report.comparison) if report.comparison else ""),
        ("Slides", "", _slides(report.slides)),
        ("Training", "", training_plot(report.training) if report.training else ""),
        ("Configuration", "", _pairs(report.configuration)),
        ("Versions", "", _pairs(report.versions)),
    )
    body = "".join(
        f'<section class="{kind}"><h2>{name}</h2>{content}</section>' for name, kind, content in sections if content
    )
    title, subtitle = html.escape(report.title), html.escape(report.subtitle)
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_CSS}</style></head><body>'
        f"<header><h1>{title}</h1><p>{subtitle}</p></header><main>{body}</main><script>{_SORT}</script></body></html>\n"
    )


def comparison_table(
    ours: Mapping[str, Mapping[str, Interval]],
    paper: Mapping[str, Mapping[str, Interval]],
    *,
    paper_name: str,
    ours_name: str = "this run",
) -> Table:
    """Our rows beside the paper's: model -> metric -> interval; the paper's order, then rows that only we have."""
    metrics = list(dict.fromkeys(name for rows in (paper, ours) for row in rows.values() for name in row))
    models = list(dict.fromkeys([*paper, *ours]))
    rows: list[list[Cell]] = [
        [model, *(source.get(model, {}).get(name) for source in (ours, paper) for name in metrics)] for model in models
    ]
    groups = [("", 1), (ours_name, len(metrics)), (paper_name, len(metrics))]
    return Table(["model", *metrics, *metrics], rows, groups, "95 % intervals in brackets")


def markdown_table(rows: Sequence[Sequence[Cell]], columns: Sequence[str]) -> str:
    """Rows of cells under named columns, for RESULTS.md; intervals as `0.912 [0.850, 0.961]`."""
    lines = [columns, ["---"] * len(columns), *([format_cell(cell) for cell in row] for row in rows)]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def format_cell(cell: Cell) -> str:
    """Numbers with four decimals, as in the paper; absent and NaN as a dash."""
    if isinstance(cell, Interval):
        return f"{format_cell(cell.value)} [{format_cell(cell.low)}, {format_cell(cell.high)}]"
    if isinstance(cell, float | np.floating):
        return f"{cell:.4f}" if math.isfinite(cell) else ABSENT
    return ABSENT if cell is None else str(cell)


def roc_plot(curves: Mapping[str, RocCurve]) -> str:
    """Curves of one or more models over the same slides, their areas in the legend, as SVG."""
    with matplotlib.rc_context(_SVG):
        figure = Figure(figsize=(7.2, 4.2), layout="constrained")
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color="#c3c7ce", linewidth=1, linestyle="--")
        for colour, (name, curve) in zip(_cycle(len(curves)), curves.items()):
            axes.plot(curve.fpr, curve.tpr, color=colour, linewidth=1.8, label=f"{name}  (AUC {curve.area:.4f})")
        axes.set(xlabel="1 − specificity", ylabel="sensitivity", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right center")
        return _svg(figure)


def training_plot(curves: Mapping[str, tuple[np.ndarray, np.ndarray]], *, quantity: str = "loss") -> str:
    """name -> (step [T], value [T]), drawn over the step, as SVG; few points are marked as such."""
    with matplotlib.rc_context(_SVG):
        figure = Figure(figsize=(7.2, 3.2), layout="constrained")
        axes = figure.subplots()
        for colour, (name, (step, value)) in zip(_cycle(len(curves)), curves.items()):
            marker = "o" if len(step) <= 40 else ""
            axes.plot(step, value, color=colour, linewidth=1.5, marker=marker, markersize=3, label=name)
        axes.set(xlabel="step", ylabel=quantity)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right center")
        return _svg(figure)


def _cycle(count: int) -> list[str]:
    return [_COLOURS[i % len(_COLOURS)] for i in range(count)]


def _svg(figure: Figure) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return f"<figure>{text.getvalue()[text.getvalue().index('<svg') :]}</figure>"


def _summary(report: Report) -> str:
    if not report.summary:
        return _bullets(report.notes)
    units = list(dict.fromkeys(unit for intervals in report.summary.values() for unit in intervals))
    rows: list[list[Cell]] = []
    for name, intervals in report.summary.items():
        value = next(iter(intervals.values())).value
        rows.append([name, value, *(_range(intervals.get(unit)) for unit in units)])
    table = Table(["", "value", *(f"95 % interval by {unit}" for unit in units)], rows)
    return _table(table) + _bullets(report.notes)


def _range(interval: Interval | None) -> str | None:
    if interval is None:
        return None
    dropped = f" ({interval.dropped} one-class resamples dropped)" if interval.dropped else ""
    return f"{format_cell(interval.low)} to {format_cell(interval.high)}{dropped}"


def _table(table: Table, *, kind: str = "") -> str:
    groups = "".join(f'<th colspan="{span}">{html.escape(name)}</th>' for name, span in table.groups)
    heads = "".join(f"<th>{html.escape(name)}</th>" for name in table.columns)
    rows = "".join("<tr>" + "".join(map(_td, row)) + "</tr>" for row in table.rows)
    caption = f"<caption>{html.escape(table.caption)}</caption>" if table.caption else ""
    over = f'<tr class="groups">{groups}</tr>' if groups else ""
    return f'<table class="{kind}">{caption}<thead>{over}<tr>{heads}</tr></thead><tbody>{rows}</tbody></table>'


def _td(cell: Cell) -> str:
    if isinstance(cell, Interval):
        low, high = format_cell(cell.low), format_cell(cell.high)
        return f'<td class="number">{format_cell(cell.value)} <small>[{low}, {high}]</small></td>'
    kind = "number" if isinstance(cell, int | float | np.number) else ""
    return f'<td class="{kind}">{html.escape(format_cell(cell))}</td>'


def _slides(slides: Sequence[SlideRow]) -> str:
    if not slides:
        return ""
    names = ("slide", "patient", "label", "probability", "tiles", "status", "pictures")
    heads = "".join(f'<th><button type="button">{name}</button></th>' for name in names[:-1])
    rows = "".join(map(_slide, slides))
    return (
        "<p>A click on a heading sorts, a click on a picture enlarges it.</p>"
        f'<table class="sortable"><thead><tr>{heads}<th>{names[-1]}</th></tr></thead><tbody>{rows}</tbody></table>'
    )


def _slide(slide: SlideRow) -> str:
    probability = slide.probability
    share = 100 * probability if probability is not None and math.isfinite(probability) else 0.0
    status = f"{slide.status}: {slide.reason}" if slide.reason else slide.status
    return (
        f'<tr class="{"" if slide.status == "done" else "failed"}">'
        + "".join(map(_td, (slide.slide_id, slide.patient_id, slide.label)))
        + f'<td class="number bar" style="--share:{share:.1f}%">{format_cell(probability)}</td>'
        + "".join(map(_td, (slide.tiles, status)))
        + f'<td><div class="pictures">{"".join(map(_picture, slide.images.items()))}</div></td></tr>'
    )


def _picture(item: tuple[str, bytes | str]) -> str:
    caption, image = html.escape(item[0]), item[1]
    if isinstance(image, bytes):
        source = f"data:image/png;base64,{base64.b64encode(image).decode()}"
    else:
        source = html.escape(urllib.parse.quote(image))
    return f'<figure><img loading="lazy" alt="{caption}" src="{source}"><figcaption>{caption}</figcaption></figure>'


def _bullets(lines: Sequence[str]) -> str:
    items = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
    return f"<ul>{items}</ul>" if items else ""


def _pairs(pairs: Mapping[str, object]) -> str:
    items = "".join(f"<dt>{html.escape(key)}</dt><dd>{html.escape(str(value))}</dd>" for key, value in pairs.items())
    return f"<dl>{items}</dl>" if items else ""


_SORT = """
for (const button of document.querySelectorAll(".sortable th button")) button.onclick = () => {
  const head = button.parentElement, column = head.cellIndex, body = head.closest("table").tBodies[0];
  const up = head.ariaSort !== "ascending", key = row => row.cells[column].textContent;
  for (const other of head.parentElement.cells) other.ariaSort = null;
  head.ariaSort = up ? "ascending" : "descending";
  const order = (a, b) => (isNaN(a) || isNaN(b)) ? a.localeCompare(b, undefined, {numeric: true}) : a - b;
  body.append(...[...body.rows].sort((a, b) => (up ? 1 : -1) * order(key(a), key(b))));
};
for (const image of document.querySelectorAll(".pictures img")) image.onclick = () => image.classList.toggle("large");
"""

_CSS = """
:root { color-scheme: light; --ink: #20242c; --soft: #5b616c; --rule: #e1e4e9; --blue: #0b63ce; }
* { box-sizing: border-box; }
body { margin: 0; background: #f5f6f8; color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", Helvetica, sans-serif; }
header, main { max-width: 1120px; margin: auto; padding: 0 24px; }
header { padding-top: 36px; } h1 { font-size: 28px; margin: 0; letter-spacing: -.01em; }
header p { margin: 4px 0 20px; color: var(--soft); } h2 { font-size: 17px; margin: 0 0 12px; }
section { background: #fff; border: 1px solid var(--rule); border-radius: 10px; padding: 20px 24px; margin: 0 0 18px; }
section { overflow-x: auto; } section.warnings { border-color: #e6b655; background: #fffaf0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; } caption { caption-side: bottom; }
caption, small, figcaption, dt { color: var(--soft); font-size: 13px; } caption { text-align: left; padding-top: 8px; }
th, td { padding: 7px 18px 7px 0; text-align: left; border-bottom: 1px solid var(--rule); vertical-align: top; }
th { color: var(--soft); font-weight: 600; font-size: 13px; white-space: nowrap; } .groups th { color: var(--ink); border-bottom: 0; }
td.number { white-space: nowrap; } tbody tr:last-child td { border-bottom: 0; }
th button { all: unset; cursor: pointer; } th button:hover { color: var(--blue); }
th button:focus-visible { outline: 2px solid var(--blue); }
th[aria-sort=ascending] button::after { content: " ↑"; } th[aria-sort=descending] button::after { content: " ↓"; }
.bar { background: linear-gradient(#cfe0f7, #cfe0f7) 0 30px / calc(var(--share) * .8) 4px no-repeat; }
tr.failed { color: #a33b2a; } ul { margin: 10px 0 0; padding-left: 20px; color: var(--soft); }
.warnings ul { color: inherit; margin: 0; } dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 24px; }
dl, dd, figure { margin: 0; } dd { font-size: 13px; overflow-wrap: anywhere; } figure > svg { max-width: 100%; height: auto; }
.pictures { display: flex; gap: 10px; } .pictures img { display: block; height: 150px; cursor: zoom-in; border-radius: 4px; }
.pictures img.large { position: fixed; inset: 0; z-index: 1; width: 100%; height: 100%; object-fit: contain; }
.pictures img.large { background: rgb(20 22 28 / .9); border-radius: 0; cursor: zoom-out; padding: 24px; }
"""
