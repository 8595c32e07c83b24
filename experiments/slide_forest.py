"""A random forest over numbers of slides' probability maps (Wang et al. 2016, HMS&MIT): from maps to a score for each slide.

    python -m experiments.predict_slides --workdir=runs/patches --slides=cohort.csv --out=out
    python -m experiments.slide_forest --cohort=cohort.csv --maps=out --out=forest

--maps is a folder that predict_slides wrote for all slides of the cohort table. Slides of the splits train and validation are learnt
from, those of the test split scored; without splits every slide is scored by the forest of the other folds. Leaves features.csv,
slides.csv, metrics.json and report.html.
"""

from __future__ import annotations

import pathlib

import numpy as np
from absl import flags
from sklearn.ensemble import RandomForestClassifier
from sklearn.model_selection import StratifiedGroupKFold

from data_pipelines.cohort import Cohort, check_two_classes, read_cohort
from data_pipelines.cohort_rows import listed
from data_pipelines.exports import read_map, write_json, write_table, write_text
from experiments.run.evaluation import measure
from experiments.run.program import UsageError, run
from experiments.run.workdir import versions
from srcc_jax.map_features import HIGH, LOW, NAMES, map_features
from srcc_jax.report import Report, Table, render

_COHORT = flags.DEFINE_string("cohort", None, "cohort table with labels", required=True)
_MAPS = flags.DEFINE_string("maps", None, "folder that predict_slides wrote", required=True)
_MAP = flags.DEFINE_string("map", "probability", "name of the map; of reverse distillation: anomaly")
_OUT = flags.DEFINE_string("out", None, "folder for the results", required=True)
_POSITIVE = flags.DEFINE_string("positive", "tumour", "label of the slides with tumour")
_HIGH = flags.DEFINE_float("high", HIGH, "map value from which on a region is tumour (Wang et al. 2016: 0.9)")
_LOW = flags.DEFINE_float("low", LOW, "map value from which on the largest region is sought (ours)")
_TREES = flags.DEFINE_integer("trees", 500, "trees of the forest (ours)", lower_bound=1)
_FOLDS = flags.DEFINE_integer("folds", 5, "folds, by patient, where the table has no splits", lower_bound=2)
_SEED = flags.DEFINE_integer("seed", 0, "seed of the forest, the folds and the bootstrap")


def read_features(cohort: Cohort) -> np.ndarray:
    """float [S, 31]. UsageError that names slides without a map."""
    files = [pathlib.Path(_MAPS.value) / "slides" / record.slide_id / f"{_MAP.value}.npz" for record in cohort]
    absent = [record.slide_id for record, file in zip(cohort, files) if not file.exists()]
    if absent:
        raise UsageError(
            f"{_MAPS.value} has no {_MAP.value} map of {listed(absent)}: predict them, or take them out of the cohort table"
        )
    rows = []
    for file in files:
        found = read_map(file)
        rows.append(list(map_features(found.values, mpp=found.mpp, high=_HIGH.value, low=_LOW.value).values()))
    return np.array(rows)


def forest() -> RandomForestClassifier:
    return RandomForestClassifier(_TREES.value, class_weight="balanced", random_state=_SEED.value)


def scores(cohort: Cohort, features: np.ndarray, label: np.ndarray) -> np.ndarray:
    """float [S]: probability of tumour of the slides that are scored, NaN for those that were learnt from."""
    split = np.array([record.split or "" for record in cohort])
    score = np.full(len(label), np.nan)
    if "test" in split:
        learnt = split != "test"
        if len(set(label[learnt])) < 2:
            raise UsageError(
                f"{_COHORT.value}: the slides to learn from are all of one class: give train slides of both"
            )
        score[~learnt] = forest().fit(features[learnt], label[learnt]).predict_proba(features[~learnt])[:, 1]
        return score
    patient = [record.patient_id for record in cohort]
    if min(np.bincount(label)) < _FOLDS.value:
        raise UsageError(f"--folds={_FOLDS.value}: a class has only {min(np.bincount(label))} slides")
    if len(set(patient)) < _FOLDS.value:
        raise UsageError(
            f"--folds={_FOLDS.value}: the slides are of {len(set(patient))} patients: give fewer folds, or splits"
        )
    folds = StratifiedGroupKFold(_FOLDS.value, shuffle=True, random_state=_SEED.value)
    for learnt, held_out in folds.split(features, label, patient):
        if len(set(label[learnt])) < 2:
            raise UsageError(
                f"--folds={_FOLDS.value}: the slides to learn from in one of them are all of one class, because a patient's slides "
                "stay together: give other folds, or splits"
            )
        score[held_out] = forest().fit(features[learnt], label[learnt]).predict_proba(features[held_out])[:, 1]
    return score


def write_results(cohort: Cohort, features: np.ndarray, label: np.ndarray, score: np.ndarray) -> None:
    """The four files."""
    out = pathlib.Path(_OUT.value)
    names = [record.slide_id for record in cohort]
    write_table(out / "features.csv", {"slide_id": names, **dict(zip(NAMES, features.T))})
    write_table(
        out / "slides.csv", {"slide_id": names, "label": [record.label for record in cohort], "probability": score}
    )
    kept = [None if np.isnan(value) else float(value) for value in score]
    merit = measure(list(cohort), kept, positive=_POSITIVE.value, name="random forest", seed=_SEED.value)
    importance = forest().fit(features, label).feature_importances_
    order = np.argsort(-importance)
    about = {"high": _HIGH.value, "low": _LOW.value, "trees": _TREES.value, "seed": _SEED.value, "map": _MAP.value}
    write_json(out / "metrics.json", {**merit.summary, "notes": merit.remarks, **about, "versions": versions()})
    report = Report(
        title="Slides by their maps",
        subtitle=f"random forest, {len(names)} slides, {len(NAMES)} features",
        summary=merit.summary,
        notes=[*merit.remarks, "Importance: of a forest over all slides, as mean decrease of impurity."],
        roc=merit.curves,
        comparison=Table(["feature", "importance"], [[NAMES[n], float(importance[n])] for n in order]),
        configuration=about,
        versions=versions(),
    )
    write_text(out / "report.html", render(report))
    for name, units in merit.summary.items():
        print(f"{name} {units['slide'].value:.4f} [{units['slide'].low:.4f}, {units['slide'].high:.4f}]")
    print(out / "report.html")


def main() -> None:
    """Features, forest, files."""
    cohort = read_cohort(_COHORT.value, require_files=False)
    check_two_classes(cohort, _POSITIVE.value, where=_COHORT.value)
    features, label = read_features(cohort), cohort.labels(_POSITIVE.value)
    write_results(cohort, features, label, scores(cohort, features, label))


if __name__ == "__main__":
    run(main)
