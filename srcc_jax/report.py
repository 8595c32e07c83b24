"""A run, or one slide of it, as a self-contained HTML page, and tables as Markdown: arrays and numbers in, text out, no files.

Nothing on a page is fetched from a network. Pictures are either embedded (bytes of a PNG or JPEG) or links relative to the
page (str); the caller, who knows where files are, chooses.
"""

import functools
import html
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from srcc_jax.metrics import Interval, RocCurve
from srcc_jax.report_page import (
    Cell,
    Section,
    Table,
    bullets_html,
    cell_html,
    format_cell,
    frame,
    link_html,
    pairs_html,
    picture_html,
    pictures_html,
    table_html,
)
from srcc_jax.report_plots import roc_plot, training_plot

__all__ = [
    "Report", "SlidePage", "SlideRow", "Table", "TileRow", "comparison_table", "markdown_table", "render", "render_slide",
]  # fmt: skip

WARNINGS_SHOWN = 50  # ours: of a cohort with hundreds of bad slides the table tells the rest


@dataclass(frozen=True, kw_only=True)
class SlideRow:
    """One slide of a cohort. images: caption -> PNG or JPEG to embed, or the picture's path relative to the page.

    tissue: share of the slide's area, 0 to 1. flags: what somebody should look at, one line each. page: the path of the
    slide's own page, relative to this one; empty for none. measures: what was found on it where that is not a probability, by
    name; the names of the first slide are columns.
    """

    slide_id: str
    label: str = ""
    patient_id: str = ""
    probability: float | None = None
    status: str = "done"
    reason: str = ""
    tiles: int | None = None
    tissue: float | None = None
    flags: Sequence[str] = ()
    page: str = ""
    images: Mapping[str, bytes | str] = field(default_factory=dict)
    measures: Mapping[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a page shows; what is empty is left out.

    summary: metric -> unit of the bootstrap ("slide", "patient") -> interval.  roc: model -> curve.
    training: curve -> (step [T], value [T]).  warnings: one line each, failed slides with their reasons among them.
    pictures: caption -> PNG or JPEG to embed, or a path relative to the page.
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
    pictures: Mapping[str, bytes | str] = field(default_factory=dict)
    training: Mapping[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    configuration: Mapping[str, object] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TileRow:
    """One tile of a slide. x, y: its top-left corner in level-0 px; picture: PNG or JPEG, or a path relative to the page."""

    picture: bytes | str
    x: float
    y: float
    value: float


@dataclass(frozen=True, kw_only=True)
class SlidePage:
    """What the page of one slide shows. images: caption -> large pictures; tiles: the most suspicious ones, best first.

    unit: what the tiles' values are. tile_level0: side of a tile in level-0 px. facts: name -> value, as they should read.
    """

    slide_id: str
    subtitle: str = ""
    flags: Sequence[str] = ()
    images: Mapping[str, bytes | str] = field(default_factory=dict)
    tiles: Sequence[TileRow] = ()
    unit: str = "probability"
    tile_level0: float = 0.0
    facts: Mapping[str, object] = field(default_factory=dict)


def render(report: Report) -> str:
    """The page of a run."""
    hidden = len(report.warnings) - WARNINGS_SHOWN
    warnings = [*report.warnings[:WARNINGS_SHOWN], *([f"and {hidden} more: see the table"] if hidden > 0 else [])]
    sections = (
        Section("Warnings", bullets_html(warnings), kind="warnings"),
        Section("Result", _summary(report)),
        Section("Receiver operating characteristic", roc_plot(report.roc) if report.roc else ""),
        Section("Beside the paper", table_html(report.comparison) if report.comparison else ""),
        Section("Slides", _slides(report.slides)),
        Section("Pictures", _pictures(report.pictures)),
        Section("Training", training_plot(report.training) if report.training else ""),
        Section("Configuration", pairs_html(report.configuration)),
        Section("Versions", pairs_html(report.versions)),
    )
    return frame(report.title, report.subtitle, sections)


def render_slide(page: SlidePage) -> str:
    """The page of one slide."""
    sections = (
        Section("To look at", bullets_html(page.flags), kind="warnings"),
        Section("Maps", _pictures(page.images)),
        Section("Highest tiles", _tiles(page)),
        Section("Slide", pairs_html(page.facts)),
    )
    return frame(page.slide_id, page.subtitle, sections)


def _pictures(images: Mapping[str, bytes | str]) -> str:
    """Large, one beside the other; empty for none."""
    figures = "".join(picture_html(caption, image) for caption, image in images.items())
    return f'<div class="maps">{figures}</div>' if figures else ""


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


def _summary(report: Report) -> str:
    if not report.summary:
        return bullets_html(report.notes)
    units = list(dict.fromkeys(unit for intervals in report.summary.values() for unit in intervals))
    rows: list[list[Cell]] = []
    for name, intervals in report.summary.items():
        value = next(iter(intervals.values())).value
        rows.append([name, value, *(_range(intervals.get(unit)) for unit in units)])
    table = Table(["", "value", *(f"95 % interval by {unit}" for unit in units)], rows)
    return table_html(table) + bullets_html(report.notes)


def _range(interval: Interval | None) -> str | None:
    if interval is None:
        return None
    dropped = f" ({interval.dropped} one-class resamples dropped)" if interval.dropped else ""
    return f"{format_cell(interval.low)} to {format_cell(interval.high)}{dropped}"


@dataclass(frozen=True)
class _Column:
    """A column of the table of slides; left out where no slide has something in it."""

    heading: str
    cell: Callable[[SlideRow], str]  # <td>...</td>
    present: Callable[[SlideRow], bool] = lambda slide: True


def _slides(slides: Sequence[SlideRow]) -> str:
    if not slides:
        return ""
    measured = [_Column(name, functools.partial(_measure, name)) for name in slides[0].measures]
    columns = (*_COLUMNS[:_MEASURES], *measured, *_COLUMNS[_MEASURES:])
    shown = [column for column in columns if any(map(column.present, slides))]
    heads = "".join(f'<th><button type="button">{column.heading}</button></th>' for column in shown)
    rows = "".join(
        f'<tr class="{"" if slide.status == "done" else "failed"}">{"".join(column.cell(slide) for column in shown)}</tr>'
        for slide in slides
    )
    return (
        "<p>A click on a heading sorts, a click on a picture enlarges it.</p>"
        f'<table class="sortable"><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>'
    )


def _probability(slide: SlideRow) -> str:
    probability = slide.probability
    share = 100 * probability if probability is not None and math.isfinite(probability) else 0.0
    return f'<td class="number bar" style="--share:{share:.1f}%">{format_cell(probability)}</td>'


def _measure(name: str, slide: SlideRow) -> str:
    return cell_html(slide.measures.get(name))


def _status(slide: SlideRow) -> str:
    words = f"{slide.status}: {slide.reason}" if slide.reason else slide.status
    return f'<td class="status">{html.escape(words)}</td>'


_COLUMNS = (
    _Column("slide", lambda slide: f"<td>{link_html(slide.slide_id, slide.page)}</td>"),
    _Column(
        "patient",
        lambda slide: cell_html(slide.patient_id),
        lambda slide: slide.patient_id not in ("", slide.slide_id),
    ),
    _Column("label", lambda slide: cell_html(slide.label), lambda slide: bool(slide.label)),
    _Column("probability", _probability, lambda slide: slide.probability is not None or not slide.measures),
    _Column(
        "tissue",
        lambda slide: cell_html(None if slide.tissue is None else f"{slide.tissue:.1%}"),
        lambda slide: slide.tissue is not None,
    ),
    _Column("tiles", lambda slide: cell_html(slide.tiles), lambda slide: slide.tiles is not None),
    _Column(
        "flags",
        lambda slide: f'<td class="flags">{"<br>".join(map(html.escape, slide.flags))}</td>',
        lambda slide: bool(slide.flags),
    ),
    _Column("status", _status),
    _Column("pictures", lambda slide: f"<td>{pictures_html(slide.images)}</td>", lambda slide: bool(slide.images)),
)

_MEASURES = next(n for n, column in enumerate(_COLUMNS) if column.heading == "tissue")  # before which they stand


def _tiles(page: SlidePage) -> str:
    if not page.tiles:
        return ""
    figures = "".join(
        picture_html(f"{rank}. {tile.value:.4f} at ({tile.x:.0f}, {tile.y:.0f})", tile.picture)
        for rank, tile in enumerate(page.tiles, 1)
    )
    where = (
        f"{page.unit.capitalize()} and top-left corner (x, y) in level-0 pixels, of which a tile is {page.tile_level0:.0f} wide. "
        "Tiles that overlap a higher one are left out."
    )
    return f'<p>{where}</p><div class="tiles">{figures}</div>'
