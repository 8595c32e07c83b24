"""Several models over the same slides: one table in the form of Kanavati 2021 (Table 1), beside the paper's rows, and one ROC plot.

    python -m experiments.compare_models --cohort=cohort.csv --split=test --out=table \\
        --predictions="FS x10=out/fs" --predictions="WS x10=out/ws"

Each prediction is a folder that predict_slides wrote. Leaves table.md, summary.json and report.html.
"""

from __future__ import annotations

import csv
import pathlib
from collections.abc import Sequence

import numpy as np
from absl import flags

from data_pipelines.cohort import Cohort, check_two_classes, read_cohort
from data_pipelines.cohort_rows import listed
from data_pipelines.exports import write_json, write_text
from experiments.run.evaluation import evaluate, notes
from experiments.run.program import UsageError, run
from experiments.run.workdir import versions
from srcc_jax.methods.slide_classification_paper import MODELS, TABLE
from srcc_jax.metrics import Interval, roc_curve
from srcc_jax.report import Report, comparison_table, markdown_table, render

_COHORT = flags.DEFINE_string("cohort", None, "cohort table with the labels", required=True)
_SPLIT = flags.DEFINE_string("split", None, "compare over this split only")
_POSITIVE = flags.DEFINE_string("positive", "srcc", "label that counts as positive")
_PREDICTIONS = flags.DEFINE_multi_string(
    "predictions", None, "<name>=<folder of predict_slides>, once per model", required=True
)
_PAPER_SET = flags.DEFINE_enum("paper_set", "Hospital A & B", list(TABLE), "the paper's test set to set beside")
_OUT = flags.DEFINE_string("out", None, "folder for the table", required=True)
_SEED = flags.DEFINE_integer("seed", 0, "seed of the bootstrap")


def read_probabilities(folder: pathlib.Path, cohort: Cohort) -> np.ndarray:
    """float [S]: the probability of each slide of the cohort. Raises UsageError that names the slides without one."""
    file = folder / "slides.csv"
    if not file.exists():
        raise UsageError(f"{file} is missing: --predictions takes folders that predict_slides wrote")
    with open(file, newline="", encoding="utf-8") as table:
        found = {row.get("slide_id", ""): row.get("probability", "") for row in csv.DictReader(table)}
    absent = [r.slide_id for r in cohort.records if not found.get(r.slide_id)]
    if absent:
        raise UsageError(
            f"{file} has no probability for {listed(absent)}: every model is compared over the same slides. Predict them, or "
            "take them out of the cohort table"
        )
    return np.asarray([float(found[r.slide_id]) for r in cohort.records])


def named_folders(entries: Sequence[str]) -> dict[str, pathlib.Path]:
    """name -> folder of each --predictions."""
    pairs = [entry.partition("=") for entry in entries]
    for entry, (name, sign, folder) in zip(entries, pairs):
        if not (name and sign and folder):
            raise UsageError(f"--predictions={entry}: give <name>=<folder of predict_slides>")
    if len({name for name, _, _ in pairs}) < len(pairs):
        raise UsageError("two --predictions have the same name: each is a row of the table")
    return {name: pathlib.Path(folder) for name, _, folder in pairs}


def paper_rows(test_set: str) -> dict[str, dict[str, Interval]]:
    """model -> metric -> interval, of one of the paper's test sets."""
    return {
        model: {"ROC AUC": Interval(*auc), "log loss": Interval(*loss)}
        for model, (auc, loss) in zip(MODELS, TABLE[test_set])
    }


def main() -> None:
    """Writes the table and prints it."""
    cohort = read_cohort(_COHORT.value, require_files=False)
    cohort = cohort.split(_SPLIT.value) if _SPLIT.value else cohort
    check_two_classes(cohort, _POSITIVE.value, where=f"{_COHORT.value}, as far as it is compared,")
    label = cohort.labels(positive=_POSITIVE.value)
    patient = np.asarray([record.patient_id for record in cohort.records])
    ours, curves, every = {}, {}, {}
    for name, folder in named_folders(_PREDICTIONS.value).items():
        score = read_probabilities(folder, cohort)
        every[name] = evaluate(label, score, patient, seed=_SEED.value)
        ours[name] = {metric: every[name][metric]["slide"] for metric in ("ROC AUC", "log loss")}
        curves[name] = roc_curve(label, score)
    out = pathlib.Path(_OUT.value)
    table = comparison_table(ours, paper_rows(_PAPER_SET.value), paper_name=f"Kanavati 2021, {_PAPER_SET.value}")
    text = markdown_table(table.rows, table.columns)
    page = Report(
        title="Models compared",
        subtitle=f"{len(label)} slides, {int(label.sum())} positive",
        roc=curves,
        comparison=table,
        notes=notes(_SEED.value),
        versions=versions(),
    )
    write_text(out / "table.md", text)
    write_text(out / "report.html", render(page))
    write_json(out / "summary.json", {"models": every, "versions": versions()})
    print(text)


if __name__ == "__main__":
    run(main)
