"""Tables 2 to 5 of Lee et al. 2023 on a user's patches: one setting varied at a time, mean and sd over seeds, beside the paper."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from data_pipelines.exports import write_json, write_table, write_text
from experiments.run.mining.comparison import Result, spread
from experiments.run.mining.program import Bench
from experiments.run.mining.stages import Arm, MiningRun
from experiments.run.workdir import versions
from srcc_jax.methods.negative_mining import METRICS, QUERIES, implied_prevalence
from srcc_jax.methods.negative_mining_paper import COLUMNS, HEADINGS, TABLES, Row
from srcc_jax.report import Report, markdown_table, render
from srcc_jax.report_page import Cell, Table

ABLATIONS = {"query": "Table 2", "alpha": "Table 3", "limited": "Table 4", "imbalanced": "Table 5"}
ALPHAS, SHARES = ("5", "10", "20", "50", "100"), ("0.1", "0.3", "0.5", "0.7", "1")  # of Tables 3 to 5
MODELS = ("weak", "strong", "leaked")
OURS = (*COLUMNS, "AP, positive", "F1 at 0.5")
OUR_HEADINGS = (*HEADINGS, "AP, positive", "true F1")
AT_LOW = ("accuracy at 0.1", "F1 at 0.1", "sensitivity at 0.1", "specificity at 0.1")
LEAKED = (
    "leaked: as in the released code the mined tiles are added before the split, so that the test holds some of them and other slides. "
    "Its numbers are of another, easier test."
)


@dataclasses.dataclass(frozen=True)
class Setting:
    """One row of a table: how tiles are mined, and the share of the training patches of each class."""

    table: str
    arm: Arm
    positive: float = 1.0
    negative: float = 1.0

    @property
    def name(self) -> str:
        """As the tables name it."""
        if self.table == "Table 4":
            return f"{self.positive:.0%} of all"
        if self.table == "Table 5":
            return f"{self.positive:.0%} of the positives"
        return f"{self.arm.query}, α {self.arm.alpha}"

    @property
    def paper(self) -> Row | None:
        """The paper's row of this setting, where it has one."""
        wanted = (self.arm.query, self.arm.alpha, self.positive, self.negative)
        rows = (row for row in TABLES[self.table] if (row.query, row.alpha, row.positive, row.negative) == wanted)
        return next(rows, None)


def settings_of(
    ablation: str, *, query: str, alpha: int, alphas: Sequence[int], shares: Sequence[float]
) -> Iterator[Setting]:
    """The rows of an ablation ("all": of each). query, alpha: where they are not what is varied."""
    tables = ABLATIONS.values() if ablation == "all" else [ABLATIONS[ablation]]
    for table in tables:
        if table == "Table 2":
            yield from (Setting(table, Arm(each, alpha)) for each in QUERIES)
        elif table == "Table 3":
            yield from (Setting(table, Arm(query, each)) for each in alphas)
        else:
            for share in shares:
                yield Setting(table, Arm(query, alpha), share, share if table == "Table 4" else 1.0)


def run_ablation(
    bench: Bench, settings: Sequence[Setting], seeds: Sequence[int], *, leak: bool
) -> dict[tuple[Setting, str], list[Result]]:
    """(setting, model) -> its results by seed. Models that rows share are trained once; tables are written after each row."""
    runs: dict[tuple[int, float, float], MiningRun] = {}
    found: dict[tuple[Setting, str], list[Result]] = {}
    for setting in settings:
        for seed in seeds:
            key = (seed, setting.positive, setting.negative)
            if key not in runs:
                name = "" if setting.positive == 1 else f"positive_{setting.positive:g}_negative_{setting.negative:g}"
                runs[key] = bench.run(seed=seed, name=name, positive=setting.positive, negative=setting.negative)
            for model, result in _results(runs[key], setting, leak=leak):
                found.setdefault((setting, model), []).append(result)
        write_ablation(bench, found)
    return found


def _results(run: MiningRun, setting: Setting, *, leak: bool) -> Iterator[tuple[str, Result]]:
    arm, label = setting.arm, run.label[run.rows["test"]]
    scored = [
        ("weak", label, run.test("weak", lambda: run.weak)),
        ("strong", label, run.test(f"strong_{arm.name}", lambda: run.strong(arm))),
    ]
    if leak:
        scored.append(("leaked", *run.leaked(arm)))
    mined, false_positives = int(run.mined(arm).new.sum()), len(run.false_positives.row)
    for model, label, probability in scored:
        known = np.isfinite(probability)
        yield (
            model,
            Result(
                run.config.seed,
                setting.positive,
                model,
                arm.alpha,
                label[known],
                probability[known],
                mined,
                false_positives,
            ),
        )


def write_ablation(bench: Bench, found: Mapping[tuple[Setting, str], Sequence[Result]]) -> None:
    """ablation.csv (a line a model and seed), tables.md, report.html, ablation.json in the work directory."""
    folder = bench.workdir.path
    lines = [(setting, model, result) for (setting, model), results in found.items() for result in results]
    columns: dict[str, list] = {
        "table": [setting.table for setting, _, _ in lines],
        "setting": [setting.name for setting, _, _ in lines],
        "model": [model for _, model, _ in lines],
        "seed": [result.seed for *_, result in lines],
        "false_positives": [result.false_positives for *_, result in lines],
        "mined": [result.mined for *_, result in lines],
    }
    write_table(folder / "ablation.csv", columns | {name: [r.value(name) for *_, r in lines] for name in METRICS})
    table, low = paper_tables(found), low_threshold_rows(found)
    heads = ["table", "setting", "model", *AT_LOW, "positives in the test"]
    text = markdown_table(table.rows, table.columns) + f"\n{table.caption}\n\n" + markdown_table(low, heads)
    write_text(folder / "tables.md", text)
    report = Report(
        title="Hard negative mining: ablations",
        subtitle=f"{bench.config.backbone}, seeds {', '.join(map(str, sorted({r.seed for *_, r in lines})))}",
        notes=_notes(found),
        comparison=table,
        configuration=bench.settings,
        versions=versions(),
    )
    write_text(folder / "report.html", render(report))
    write_json(folder / "ablation.json", {"rows": table.rows, "at 0.1": low, "settings": dict(bench.settings)})


def paper_tables(found: Mapping[tuple[Setting, str], Sequence[Result]]) -> Table:
    """All rows, ours beside the paper's."""
    rows: list[Sequence[Cell]] = []
    for (setting, model), results in found.items():
        paper = None if setting.paper is None or model == "leaked" else list(getattr(setting.paper, model))
        ours = [spread(results, name) for name in OURS]
        rows.append([setting.table, setting.name, model, *ours, *(paper or [None] * len(COLUMNS))])
    groups = [("", 3), ("this run, mean ± sd over seeds", len(OURS)), ("Lee et al. 2023, other data", len(COLUMNS))]
    columns = ["table", "setting", "model", *OUR_HEADINGS, *HEADINGS]
    return Table(
        columns,
        rows,
        groups,
        "At probability 0.5. The paper's F1 is accuracy, its AUPRC the macro AP; so are ours of that name.",
    )


def low_threshold_rows(found: Mapping[tuple[Setting, str], Sequence[Result]]) -> list[list[str]]:
    """A line for each row: the metrics at 0.1, and the share of positives in the test patches."""
    lines = []
    for (setting, model), results in found.items():
        share = np.mean([result.label.mean() for result in results])
        values = [spread(results, name) for name in AT_LOW]
        lines.append([setting.table, setting.name, model, *values, f"{share:.3f}"])
    return lines


def _notes(found: Mapping[tuple[Setting, str], Sequence[Result]]) -> list[str]:
    implied = ", ".join(
        f"{row.alpha}: {implied_prevalence(sensitivity=row.strong[3], specificity=row.strong[4], accuracy=row.strong[2]):.3f}"
        for row in TABLES["Table 3"]
    )
    notes = [
        "Weak and strong models are judged on the same test patches; mined tiles are in the training patches alone.",
        f"Share of positives in the test that the paper's strong models imply, by α: {implied}; of its weak model 0.309.",
    ]
    return notes + ([LEAKED] if any(model == "leaked" for _, model in found) else [])
