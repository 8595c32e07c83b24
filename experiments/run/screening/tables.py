"""The tables of Yu et al. 2019 with our rows in them: mean and standard deviation over the repeats, and every repeat's counts."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines.exports import write_json, write_text
from experiments.run.screening.judging import shown
from srcc_jax.methods.gastric_screening import Config
from srcc_jax.methods.gastric_screening_paper import ROWS, SCREENING, SEGMENTATION, SITES
from srcc_jax.metrics import Interval
from srcc_jax.report import markdown_table

SCREENING_COLUMNS = ("model", "sensitivity", "specificity", "average precision", "ROC AUC")
SEGMENTATION_COLUMNS = ("model", "Dice, all pixels", "Dice, mean of slides or images")
SITE_COLUMNS = ("repeat", "site", "year", "total", "positive", "negative", "sensitivity", "specificity")
ERROR_COLUMNS = ("repeat", "column", "value", "slides", "missed", "falsely called")


def write_tables(folder: pathlib.Path, config: Config, results: Sequence[Mapping[str, Any]]) -> None:
    """tables.md, and summary.json with the numbers of every repeat. results: what each repeat's run gave."""
    name = row_name(config.model)
    text = "\n".join([*_screening(name, results), *_segmentation(name, results), *_sites(results), *_errors(results)])
    write_text(folder / "tables.md", text)
    write_json(folder / "summary.json", {"model": config.model, "repeats": list(results)})
    print(text, flush=True)


def row_name(model: str) -> str:
    """A --model, after the name that the paper's Table 1 has for it."""
    return f"{ROWS[model][0]}, {model}" if model in ROWS else model


def screening_rows(name: str, results: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Our rows of Table 1, at 0.74 and at the validation threshold, and the baseline: the most malignant patch alone."""
    judged, largest = ([result[key] for result in results if key in result] for key in ("slides", "largest patch"))
    at = "the validation threshold"
    rows = [(f"largest patch alone, {name}, here at {at}", "validation", largest)] if largest else []
    if judged:
        fixed = f"{judged[0]['fixed']['threshold']:g}"
        rows = [(f"{name}, here at {t}", kind, judged) for t, kind in ((fixed, "fixed"), (at, "validation"))] + rows
    return [[title, *_slide_numbers(kind, found)] for title, kind, found in rows]


def _slide_numbers(kind: str, judged: Sequence[Mapping[str, Any]]) -> list[str]:
    """Sensitivity and specificity at a threshold, average precision and ROC AUC, over the repeats."""
    shares = [_over([found[kind][share] for found in judged]) for share in ("sensitivity", "specificity")]
    return [*shares, *(_over([found[n] for found in judged if n in found]) for n in ("average precision", "ROC AUC"))]


def segmentation_row(name: str, results: Sequence[Mapping[str, Any]]) -> list[str] | None:
    """Our row of the Dice coefficients; None of a network without a map."""
    judged = [found for result in results if "Dice of pixels" in (found := result.get("patches", {}))]
    if not judged:
        return None
    return [f"{name}, here", *(spread([found[n] for found in judged]) for n in ("Dice of pixels", "Dice of units"))]


def spread(values: Sequence[float]) -> str:
    """Mean, and standard deviation over several repeats (of a sample)."""
    mean = f"{np.mean(values):.4f}"
    return f"{mean} ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else mean


def _over(intervals: Sequence[Interval]) -> str:
    """One interval as it is, several as their spread."""
    if not intervals:
        return ""
    return shown(intervals[0]) if len(intervals) == 1 else spread([interval.value for interval in intervals])


def _screening(name: str, results: Sequence[Mapping[str, Any]]) -> list[str]:
    ours = screening_rows(name, results)
    if not ours:
        return []
    paper = [
        [f"{model}, paper", *(f"{v:.4f}" for v in (sens, spec, area)), ""]
        for model, (sens, spec, area, *_) in SCREENING.items()
    ]
    about = "95 % intervals: Wilson with continuity correction, bootstrap by patient for areas; several repeats: mean ± standard deviation."
    return ["## Table 1, slides", "", about, "", markdown_table([*ours, *paper], SCREENING_COLUMNS)]


def _segmentation(name: str, results: Sequence[Mapping[str, Any]]) -> list[str]:
    ours = segmentation_row(name, results)
    areas = [found for result in results if "average precision" in (found := result.get("patches", {}))]
    text = []
    if areas:
        numbers = [_over([found[metric] for found in areas]) for metric in ("average precision", "ROC AUC")]
        text = [
            "## Patches",
            "",
            markdown_table([[f"{name}, here", *numbers]], SCREENING_COLUMNS[:1] + SCREENING_COLUMNS[3:]),
        ]
    if ours:
        paper = [[f"{model}, paper", f"{mean:.4f} ± {sd:.4f}", ""] for model, (mean, sd) in SEGMENTATION.items()]
        text += ["## Segmentation, §5.2", "", markdown_table([ours, *paper], SEGMENTATION_COLUMNS)]
    return text


def _sites(results: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = [(number, *row.values()) for number, result in enumerate(results) for row in result.get("sites", ())]
    if not rows:
        return []
    ours = [[*row[:6], *map(shown, row[6:])] for row in rows]
    paper = [
        ["", f"{site}, paper", year, *map(str, counts), *(f"{share:.4f}" for share in shares)]
        for site, year, *counts, shares in ((*row[:5], row[5:]) for row in SITES)
    ]
    return ["## Table 3, sites and years, every repeat", "", markdown_table([*ours, *paper], SITE_COLUMNS)]


def _errors(results: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = [
        [number, *(row[name] for name in ERROR_COLUMNS[1:])]
        for number, result in enumerate(results)
        for row in result.get("errors", ())
    ]
    return ["## Errors, §6.2, every repeat", "", markdown_table(rows, ERROR_COLUMNS)] if rows else []
