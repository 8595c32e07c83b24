"""What a finished run is worth on its test split: patches, slides at both thresholds, sites, and the review of its errors."""

from __future__ import annotations

import collections
import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines.cohort import SlideRecord
from experiments.run.evaluation import ITERATIONS
from experiments.run.scoring import probability
from srcc_jax.methods.gastric_screening import Verdicts
from srcc_jax.metrics import Interval, average_precision, bootstrap, dice, roc_auc

REVIEWED = ("subtype", "site", "year")  # columns of a cohort table by which errors are counted, where it has them
ALL_YEARS = "all"


def judge_patches(found: Mapping[str, np.ndarray], unit: np.ndarray, *, seed: int) -> dict[str, Any]:
    """Of test patches, as the judge of the multi-task stage gives them. unit str [n]: whose each is.

    Average precision and ROC AUC with intervals by unit, where both classes are there. Dice: of all pixels together, and the
    mean over the units that hold lesion, or were called to (of a network with a map).
    """
    label, merit = found["label"].astype(int), {"patches": len(unit), "malignant": int(found["label"].sum())}
    result: dict[str, Any] = dict(merit)
    if len(set(label.tolist())) == 2:
        for name, metric in (("average precision", average_precision), ("ROC AUC", roc_auc)):
            result[name] = bootstrap(metric, label, found["logit"], units=unit, iterations=ITERATIONS, seed=seed)
    if "tp" in found:
        counts = [found[name].astype(np.float64) for name in ("tp", "fp", "fn")]
        _, place = np.unique(unit, return_inverse=True)
        sums = np.stack([np.bincount(place, weights=count) for count in counts])
        result["Dice of pixels"] = float(dice(*sums.sum(1)))
        held = sums.sum(0) > 0
        result["Dice of units"] = float(dice(*sums[:, held]).mean()) if held.any() else 1.0
    return result


@dataclasses.dataclass(frozen=True, eq=False)
class JudgedSlides:
    """The test slides with a verdict. records [S], label int [S], score float [S]: output of the screening network. groups: column of
    the cohort table -> value of each slide, str [S]."""

    records: Sequence[SlideRecord]
    label: np.ndarray
    score: np.ndarray
    groups: Mapping[str, np.ndarray]

    @classmethod
    def of(
        cls,
        records: Sequence[SlideRecord],
        label: np.ndarray,
        logit: np.ndarray,
        columns: Mapping[str, Mapping[str, str]],
    ) -> JudgedSlides:
        """columns: slide -> column -> cell. A column that is empty for all of them is left out."""
        cells = {
            name: np.asarray([columns.get(record.slide_id, {}).get(name, "") for record in records])
            for name in REVIEWED
        }
        known = {name: values for name, values in cells.items() if (values != "").any()}
        return cls(records, np.asarray(label, int), probability(logit), known)

    def merit(self, thresholds: Mapping[str, float], *, seed: int) -> dict[str, Any]:
        """Counts and, with 95 % intervals, sensitivity and specificity (Wilson with continuity correction) at each threshold; average
        precision and ROC AUC (bootstrap by patient)."""
        result: dict[str, Any] = {"slides": len(self.label), "positive": int(self.label.sum())}
        if len(set(self.label.tolist())) == 2:
            patient = np.asarray([record.patient_id for record in self.records])
            for name, metric in (("average precision", average_precision), ("ROC AUC", roc_auc)):
                result[name] = bootstrap(
                    metric, self.label, self.score, units=patient, iterations=ITERATIONS, seed=seed
                )
        for name, threshold in thresholds.items():
            verdicts = Verdicts.at(self.label, self.score, threshold)
            result[name] = {
                "threshold": threshold,
                **dataclasses.asdict(verdicts),
                "sensitivity": verdicts.sensitivity,
                "specificity": verdicts.specificity,
            }
        return result

    def sites(self, threshold: float) -> list[dict[str, Any]]:
        """A row for each site and year, as Tables 2 and 3 of the paper have them, and one of all years for each site that has several;
        empty where the cohort tells neither."""
        none = np.full(len(self.label), "")
        site, year = (self.groups.get(name, none) for name in ("site", "year"))
        rows = []
        for place in sorted(set(site.tolist())) if {"site", "year"} & self.groups.keys() else ():
            years = sorted(set(year[site == place].tolist()))
            rows += [self._site_row(place, value, (site == place) & (year == value), threshold) for value in years]
            if place and len(years) > 1:
                rows.append(self._site_row(place, ALL_YEARS, site == place, threshold))
        return rows

    def _site_row(self, site: str, year: str, inside: np.ndarray, threshold: float) -> dict[str, Any]:
        verdicts = Verdicts.at(self.label[inside], self.score[inside], threshold)
        total, positive = int(inside.sum()), verdicts.tp + verdicts.fn
        shares = {"sensitivity": verdicts.sensitivity, "specificity": verdicts.specificity}
        return {
            "site": site,
            "year": year,
            "total": total,
            "positive": positive,
            "negative": total - positive,
            **shares,
        }

    def errors(self, threshold: float) -> list[dict[str, Any]]:
        """By column and value: slides, and how many were missed or falsely called (§6.2); most errors first."""
        called, truth = self.score > threshold, self.label > 0
        rows = []
        for column, values in self.groups.items():
            for value, count in collections.Counter(values.tolist()).items():
                inside = values == value
                missed, false = int((inside & truth & ~called).sum()), int((inside & ~truth & called).sum())
                rows.append(
                    {"column": column, "value": value, "slides": count, "missed": missed, "falsely called": false}
                )
        return sorted(rows, key=lambda row: (row["column"], -row["missed"] - row["falsely called"], row["value"]))

    def table(self, thresholds: Mapping[str, float]) -> dict[str, Any]:
        """Columns for slides.csv."""
        outcomes = {(1, 1): "true positive", (1, 0): "missed", (0, 1): "falsely called", (0, 0): "true negative"}
        return {
            "slide_id": [record.slide_id for record in self.records],
            "patient_id": [record.patient_id for record in self.records],
            "label": [record.label for record in self.records],
            **self.groups,
            "score": self.score,
            **{
                f"at_{name}": [outcomes[int(t), int(s > threshold)] for t, s in zip(self.label, self.score)]
                for name, threshold in thresholds.items()
            },
        }


def shown(interval: Interval) -> str:
    """0.9706 [0.9102, 0.9924]; nothing where there was nothing to count."""
    return f"{interval.value:.4f} [{interval.low:.4f}, {interval.high:.4f}]" if np.isfinite(interval.value) else ""


def read_results(path: pathlib.Path) -> dict[str, Any]:
    """The numbers of merit that a run wrote, with its intervals."""
    fields = {field.name for field in dataclasses.fields(Interval)}

    def interval_of(found: dict[str, Any]) -> Any:
        if set(found) != fields:
            return found
        value, low, high = (np.nan if found[name] is None else found[name] for name in ("value", "low", "high"))
        return Interval(value, low, high, found["dropped"])

    return json.loads(path.read_text(), object_hook=interval_of)
