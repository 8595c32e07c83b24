"""The results of a few-shot study: He & Li's Table 3 over our patches beside the paper's numbers, and its curve."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines.exports import write_image, write_json, write_table, write_text
from experiments.run.distillation.few_shot import DISTANCE, LOGISTIC, MAIN, PAPER, SUPERVISED, Row
from experiments.run.evaluation import ITERATIONS
from experiments.run.workdir import versions
from srcc_jax.metrics import Interval, bootstrap, roc_auc, sensitivity, specificity
from srcc_jax.report import markdown_table

_COLOURS = {MAIN: "#0b63ce", LOGISTIC: "#d1495b", DISTANCE: "#d1495b", SUPERVISED: "#2a9d5c"}


@dataclasses.dataclass(frozen=True)
class Result:
    """A finished run and the test patches: label (1: tumour) and score [n]; thresholds by name."""

    row: Row
    label: np.ndarray
    score: np.ndarray
    thresholds: Mapping[str, float]
    auc: Interval

    def accuracy(self, where: str) -> float:
        """At the threshold of this name, both kinds of patches counting equally, as they do in the paper's test set; NaN where there
        is no such threshold."""
        if where not in self.thresholds:
            return math.nan
        both = [
            metric(self.label, self.score, threshold=self.thresholds[where]) for metric in (sensitivity, specificity)
        ]
        return float(np.mean(both))


def read_result(row: Row, folder: pathlib.Path, positive: Sequence[str]) -> Result:
    """What a run left: metrics.json, patches.csv."""
    metrics = json.loads((folder / "metrics.json").read_text())
    with open(folder / "patches.csv", newline="", encoding="utf-8") as file:
        entries = sorted(
            (line["path"], line["label"] in positive, float(line["score"])) for line in csv.DictReader(file)
        )
    _, label, score = zip(*entries)
    auc = metrics["ROC AUC"]["patch"]
    return Result(row, np.array(label, int), np.array(score), metrics["thresholds"], Interval(**auc))


def mean_auc(results: Sequence[Result], *, minus: Sequence[Result] = ()) -> Interval:
    """Mean ROC AUC over seeds that share their test patches, less that of others, resampling the patches of all together."""

    def metric(label: np.ndarray, _: np.ndarray, /, *, weight: np.ndarray | None = None) -> np.ndarray:
        ours = np.mean([roc_auc(label, each.score, weight=weight) for each in results], axis=0)
        theirs = [roc_auc(label, each.score, weight=weight) for each in minus]
        return np.asarray(ours - np.mean(theirs, axis=0) if theirs else ours)

    return bootstrap(metric, results[0].label, results[0].score, iterations=ITERATIONS, seed=0)


def write_tables(
    folder: pathlib.Path, results: Sequence[Result], counts: Sequence[int], about: Mapping[str, Any]
) -> None:
    """results.csv (a line a run), table.md, summary.json and curve.png."""
    groups: dict[str, dict[int, list[Result]]] = {}
    for result in results:
        groups.setdefault(result.row.arm, {}).setdefault(result.row.tumour, []).append(result)
    columns: dict[str, list[Any]] = {
        "arm": [r.row.arm for r in results],
        "tumour_patches": [r.row.tumour for r in results],
        "seed": [r.row.seed for r in results],
        "auc": [r.auc.value for r in results],
        "auc_low": [r.auc.low for r in results],
        "auc_high": [r.auc.high for r in results],
        **{f"accuracy_{where}": [r.accuracy(where) for r in results] for where in ("fixed", "validation")},
    }
    write_table(folder / "results.csv", columns)
    auc = {arm: {n: mean_auc(runs) for n, runs in found.items()} for arm, found in groups.items()}
    gains = {arm: _gains(groups, arm) for arm in (MAIN, SUPERVISED) if arm in groups}
    summary = {
        "mean ROC AUC": auc,
        **{f"ROC AUC, {arm} less baseline": found for arm, found in gains.items()},
        "paper": PAPER,
        **about,
        "versions": versions(),
    }
    write_json(folder / "summary.json", summary)
    write_text(folder / "table.md", _markdown(groups, auc, gains, counts))
    write_image(folder / "curve.png", draw_curve(groups, auc, counts))


def _gains(groups: Mapping[str, Mapping[int, list[Result]]], arm: str) -> dict[int, Interval]:
    """Tumour patches -> mean ROC AUC of an arm less that of the baseline, over the seeds that both have."""
    gains = {}
    for count, runs in groups[arm].items():
        baseline = groups.get(LOGISTIC if count else DISTANCE, {}).get(count, [])
        seeds = {run.row.seed for run in runs} & {run.row.seed for run in baseline}
        if seeds:
            ours, theirs = ([run for run in found if run.row.seed in seeds] for found in (runs, baseline))
            gains[count] = mean_auc(ours, minus=theirs)
    return gains


def _markdown(
    groups: Mapping[str, Mapping[int, list[Result]]],
    auc: Mapping[str, Mapping[int, Interval]],
    gains: Mapping[str, Mapping[int, Interval]],
    counts: Sequence[int],
) -> str:
    """Accuracy in the layout of the paper's Table 3 with the paper's row, then ROC AUC."""
    every = sorted({*counts, *PAPER})
    heads = ["tumour patches", *map(str, every)]
    text = (
        "Accuracy, normal and tumour patches counting equally: mean over seeds ± standard deviation (seeds). Without tumour patches "
        "every arm is plain reverse distillation (RD).\n\n"
    )
    rows = [["He & Li, Table 3 (Camelyon16)", *(f"{PAPER[n]:.3f}" if n in PAPER else "" for n in every)]]
    for where in ("validation", "fixed"):
        for arm, found in groups.items():
            rows.append(
                [f"{arm}; {where} threshold", *(_spread([r.accuracy(where) for r in found.get(n, [])]) for n in every)]
            )
    text += markdown_table(rows, heads)
    text += "\nROC AUC: mean over seeds ± standard deviation (seeds).\n\n"
    heads = ["tumour patches", *map(str, counts)]
    values = [
        [arm, *(_spread([r.auc.value for r in found.get(n, [])]) for n in counts)] for arm, found in groups.items()
    ]
    text += markdown_table(values, heads)
    text += f"\nMean ROC AUC with 95 % interval over test patches ({ITERATIONS} resamples).\n\n"
    ranges: list[list[Any]] = [[arm, *(found.get(n) for n in counts)] for arm, found in auc.items()]
    for arm, gain in gains.items():
        ranges.append([f"{arm} less baseline, same seeds", *(gain.get(n) for n in counts)])
    return text + markdown_table(ranges, heads)


def _spread(values: Sequence[float]) -> str:
    if not values or math.isnan(values[0]):
        return ""
    deviation = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{deviation} ({len(values)})"


def draw_curve(
    groups: Mapping[str, Mapping[int, list[Result]]], auc: Mapping[str, Mapping[int, Interval]], counts: Sequence[int]
) -> np.ndarray:
    """uint8 [H, W, 3]: ROC AUC with its interval, and accuracy beside the paper's, over the number of tumour patches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 4), dpi=130, layout="constrained")
    left, right = figure.subplots(1, 2)
    place = {n: where for where, n in enumerate(sorted({*counts, *PAPER}))}
    for arm, found in groups.items():
        numbers = sorted(found)
        x = [place[n] for n in numbers]
        style: dict[str, Any] = {"color": _COLOURS.get(arm), "marker": "s" if arm == DISTANCE else "o", "label": arm}
        values = [auc[arm][n] for n in numbers]
        line = left.errorbar(
            x,
            [v.value for v in values],
            [[v.value - v.low for v in values], [v.high - v.value for v in values]],
            capsize=3,
            **style,
        )
        right.plot(
            x,
            [np.mean([r.accuracy("validation") for r in found[n]]) for n in numbers],
            **style | {"color": line.lines[0].get_color()},
        )
    right.plot(
        [place[n] for n in PAPER], list(PAPER.values()), color="#8a8f98", linestyle="--", label="He & Li, Table 3"
    )
    for axes, name in ((left, "ROC AUC, 95 % interval"), (right, "accuracy, validation threshold")):
        axes.set(xlabel="tumour patches", ylabel=name)
        shown = counts if axes is left else list(place)
        axes.set_xticks([place[n] for n in shown], list(map(str, shown)))
        axes.grid(color="#e7e9ed")
        axes.legend(frameon=False, fontsize=8)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
