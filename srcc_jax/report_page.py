"""The parts of a page: tables, pictures, lists, and the frame around them with its style. Text from outside is escaped here."""

import base64
import html
import math
import urllib.parse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from srcc_jax.metrics import Interval

Cell = str | int | float | Interval | None
ABSENT = "–"


@dataclass(frozen=True)
class Table:
    """groups: (heading, number of columns) above the columns, from left to right; empty for none."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    groups: Sequence[tuple[str, int]] = ()
    caption: str = ""


@dataclass(frozen=True)
class Section:
    """A part of a page under its heading; left out where `content` (HTML) is empty. kind: its class in the style."""

    heading: str
    content: str
    kind: str = ""


def frame(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """The whole page, with its style and script: nothing on it is fetched from a network."""
    body = "".join(
        f'<section class="{part.kind}"><h2>{html.escape(part.heading)}</h2>{part.content}</section>'
        for part in sections
        if part.content
    )
    title, subtitle = html.escape(title), html.escape(subtitle)
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_CSS}</style></head><body>'
        f"<header><h1>{title}</h1><p>{subtitle}</p></header><main>{body}</main><script>{_SORT}</script></body></html>\n"
    )


def format_cell(cell: Cell) -> str:
    """Numbers with four decimals, as in the paper; absent and NaN as a dash."""
    if isinstance(cell, Interval):
        return f"{format_cell(cell.value)} [{format_cell(cell.low)}, {format_cell(cell.high)}]"
    if isinstance(cell, float | np.floating):
        return f"{cell:.4f}" if math.isfinite(cell) else ABSENT
    return ABSENT if cell is None else str(cell)


def table_html(table: Table) -> str:
    groups = "".join(f'<th colspan="{span}">{html.escape(name)}</th>' for name, span in table.groups)
    heads = "".join(f"<th>{html.escape(name)}</th>" for name in table.columns)
    rows = "".join("<tr>" + "".join(map(cell_html, row)) + "</tr>" for row in table.rows)
    caption = f"<caption>{html.escape(table.caption)}</caption>" if table.caption else ""
    over = f'<tr class="groups">{groups}</tr>' if groups else ""
    return f"<table>{caption}<thead>{over}<tr>{heads}</tr></thead><tbody>{rows}</tbody></table>"


def cell_html(cell: Cell) -> str:
    if isinstance(cell, Interval):
        low, high = format_cell(cell.low), format_cell(cell.high)
        return f'<td class="number">{format_cell(cell.value)} <small>[{low}, {high}]</small></td>'
    kind = "number" if isinstance(cell, int | float | np.number) else ""
    return f'<td class="{kind}">{html.escape(format_cell(cell))}</td>'


def picture_html(caption: str, image: bytes | str) -> str:
    """image: a PNG or JPEG to embed, or the picture's path relative to the page."""
    name = html.escape(caption)
    return f'<figure><img loading="lazy" alt="{name}" src="{_source(image)}"><figcaption>{name}</figcaption></figure>'


def pictures_html(images: Mapping[str, bytes | str]) -> str:
    """caption -> picture, side by side; a click enlarges one."""
    return f'<div class="pictures">{"".join(picture_html(*item) for item in images.items())}</div>'


def link_html(text: str, path: str) -> str:
    """path: relative to the page; empty: no link."""
    return f'<a href="{path_html(path)}">{html.escape(text)}</a>' if path else html.escape(text)


def path_html(path: str) -> str:
    return html.escape(urllib.parse.quote(path))


def _source(image: bytes | str) -> str:
    if isinstance(image, str):
        return path_html(image)
    kind = "jpeg" if image.startswith(b"\xff\xd8") else "png"
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


def bullets_html(lines: Sequence[str]) -> str:
    items = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
    return f"<ul>{items}</ul>" if items else ""


def pairs_html(pairs: Mapping[str, object]) -> str:
    items = "".join(f"<dt>{html.escape(key)}</dt><dd>{html.escape(_words(value))}</dd>" for key, value in pairs.items())
    return f"<dl>{items}</dl>" if items else ""


def _words(value: object) -> str:
    """As it should be read: four digits, and what is below a name as `name value`."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_words(item)}" for name, item in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


_SORT = """
for (const button of document.querySelectorAll(".sortable th button")) button.onclick = () => {
  const head = button.parentElement, column = head.cellIndex, body = head.closest("table").tBodies[0];
  const up = head.ariaSort !== "ascending", key = row => row.cells[column].textContent;
  for (const other of head.parentElement.cells) other.ariaSort = null;
  head.ariaSort = up ? "ascending" : "descending";
  const order = (a, b) => (isNaN(a) || isNaN(b)) ? a.localeCompare(b, undefined, {numeric: true}) : a - b;
  body.append(...[...body.rows].sort((a, b) => (up ? 1 : -1) * order(key(a), key(b))));
};
for (const image of document.querySelectorAll("figure img")) image.onclick = () => image.classList.toggle("large");
"""

_CSS = """
:root { color-scheme: light; --ink: #20242c; --soft: #5b616c; --rule: #e1e4e9; --blue: #0b63ce; }
* { box-sizing: border-box; }
body { margin: 0; background: #f5f6f8; color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", Helvetica, sans-serif; }
header, main { max-width: 1360px; margin: auto; padding: 0 24px; }
header { padding-top: 36px; } h1 { font-size: 28px; margin: 0; letter-spacing: -.01em; }
header p { margin: 4px 0 20px; color: var(--soft); } h2 { font-size: 17px; margin: 0 0 12px; }
section { background: #fff; border: 1px solid var(--rule); border-radius: 10px; padding: 20px 24px; margin: 0 0 18px; }
section { overflow-x: auto; } section.warnings { border-color: #e6b655; background: #fffaf0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; } caption { caption-side: bottom; }
caption, small, figcaption, dt { color: var(--soft); font-size: 13px; } caption { text-align: left; padding-top: 8px; }
th, td { padding: 7px 16px 7px 0; text-align: left; border-bottom: 1px solid var(--rule); vertical-align: top; }
th { color: var(--soft); font-weight: 600; font-size: 13px; white-space: nowrap; } .groups th { color: var(--ink); border-bottom: 0; }
td.number { white-space: nowrap; } tbody tr:last-child td { border-bottom: 0; }
th button { all: unset; cursor: pointer; } th button:hover { color: var(--blue); }
th button:focus-visible { outline: 2px solid var(--blue); }
th[aria-sort=ascending] button::after { content: " ↑"; } th[aria-sort=descending] button::after { content: " ↓"; }
.bar { background: linear-gradient(#cfe0f7, #cfe0f7) 0 30px / calc(var(--share) * .8) 4px no-repeat; }
tr.failed { color: #a33b2a; } ul { margin: 10px 0 0; padding-left: 20px; color: var(--soft); }
.warnings ul { color: inherit; margin: 0; } dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 24px; }
dl, dd, figure { margin: 0; } dd { font-size: 13px; overflow-wrap: anywhere; } figure > svg { max-width: 100%; height: auto; }
.pictures { display: flex; gap: 10px; }
.pictures img { display: block; height: 110px; max-width: none; cursor: zoom-in; border-radius: 4px; }
figure img.large { position: fixed; inset: 0; z-index: 1; width: 100%; height: 100%; max-width: none; max-height: none; }
figure img.large { object-fit: contain; background: rgb(20 22 28 / .9); border-radius: 0; cursor: zoom-out; padding: 24px; }
.maps { display: flex; flex-wrap: wrap; gap: 16px; } .maps img { display: block; max-height: 620px; max-width: 100%; cursor: zoom-in; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(200px, 1fr)); gap: 14px; }
.tiles img { display: block; width: 100%; max-width: 240px; cursor: zoom-in; border-radius: 4px; }
td.flags { color: #9a5b00; min-width: 9em; } td.status { min-width: 10em; overflow-wrap: anywhere; }
td a { color: var(--blue); text-decoration: none; } td a:hover { text-decoration: underline; }
"""
