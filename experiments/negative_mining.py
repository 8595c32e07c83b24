"""Hard negative mining (Lee et al. 2023): a weak model, the tiles that its false positives resemble, a strong model trained on them, too.

    python -m experiments.negative_mining --hard=annotated/ --weak=negative_slides.csv --positive=tumour --workdir=runs/mining \\
        --pretrained=resnet18.pth

--hard is a folder <class>/<image> (with <split>/ above or not), a list (CSV: path, label and, where known, slide_id, patient_id, split),
a set of tiles, or an annotated cohort table, of whose slides patches are cut. --weak is a folder, list or set of patches, or a
folder or cohort table of slides, all known negative; those of validation or test patients are not searched. The run goes on
where it was when the same command is given again. Leaves in the work directory the models and, in seed_<n>/mined_<query>_<alpha>.csv,
where each mined tile is; metrics.json, test.csv and report.html. With --ablation the paper's Tables 2 to 5 are made instead:
tables.md, ablation.csv and report.html.
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Sequence

from absl import flags

from experiments.run import settings as settings_module
from experiments.run.mining.ablation import ABLATIONS, ALPHAS, SHARES, run_ablation, settings_of
from experiments.run.mining.program import Bench, decisive_settings, define_mining_flags, start, start_of, trainer_of
from experiments.run.mining.report import judge, write_results
from experiments.run.mining.sources import Sources
from experiments.run.mining.stages import Arm
from experiments.run.program import Stop, UsageError, run
from experiments.run.settings import config_from_flags, define_flags
from experiments.run.starting import pretrained_hash
from experiments.run.workdir import Workdir
from srcc_jax.methods.negative_mining import SEEDS, Config

define_flags(Config)
flags.adopt_module_key_flags(settings_module)  # so that --help lists the method's numbers, not --helpfull alone
_MINING = define_mining_flags()
_HARD = flags.DEFINE_string("hard", None, "labelled patches, or an annotated cohort table", required=True)
_WEAK = flags.DEFINE_string("weak", None, "patches or slides known negative", required=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "folder for checkpoints, models and results", required=True)
_NAMED = flags.DEFINE_bool(
    "named_patches",
    False,
    "names of the patches tell label, patient and slide, as in the data published with the paper",
)
_ABLATION = flags.DEFINE_enum(
    "ablation",
    None,
    [*ABLATIONS, "all"],
    "a table of the paper over --runs seeds; query: 2, alpha: 3, limited: 4 (a share of all hard patches), imbalanced: 5 (of the "
    "positive ones), all: each",
)
_RUNS = flags.DEFINE_integer(
    "runs", len(SEEDS), "of --ablation: seeds, from --seed on (released code: 3)", lower_bound=1
)
_ALPHAS = flags.DEFINE_list("alphas", list(ALPHAS), "of --ablation=alpha: values of --alpha (Table 3)")
_FRACTIONS = flags.DEFINE_list(
    "fractions", list(SHARES), "of --ablation=limited and imbalanced: shares of the patches (Tables 4 and 5)"
)
_LEAK = flags.DEFINE_bool(
    "legacy_leak",
    False,
    "of --ablation: beside each strong model one that mines as the released code does, before the split: how much that flatters",
)
_MPP_OVERRIDE = flags.DEFINE_float("mpp_override", None, "µm per pixel of slides that do not say it themselves")


def open_bench(config: Config) -> Bench:
    """Reads what the flags name, and opens the work directory."""
    mesh = start(config)
    folder = pathlib.Path(_WORKDIR.value).absolute()
    sources = Sources(config, folder, _NAMED.value, _MPP_OVERRIDE.value, _MINING.threads.value)
    hard = sources.hard(_HARD.value)
    begin = start_of(_MINING, config)
    trainer = trainer_of(config, begin.architecture, mesh, threads=_MINING.threads.value, stop=Stop())
    weak_set = sources.weak(_WEAK.value, trainer)
    decisive = decisive_settings(
        config,
        hard,
        weak_set,
        pretrained=pretrained_hash(_MINING.pretrained.value),
        pretrained_source=_MINING.source.value,
        mpp_override=_MPP_OVERRIDE.value,
        dtype=begin.architecture.dtype,
    )
    return Bench(config, begin, trainer, hard, weak_set, Workdir.open(folder, decisive), mesh, decisive)


def ablate(bench: Bench, ablation: str) -> None:
    """The tables of --ablation."""
    config = bench.config
    settings = settings_of(
        ablation,
        query=config.query,
        alpha=config.alpha,
        alphas=[int(number) for number in numbers("alphas", _ALPHAS.value, least=1)],
        shares=numbers("fractions", _FRACTIONS.value, least=0, most=1),
    )
    seeds = range(config.seed, config.seed + _RUNS.value)
    run_ablation(bench, list(settings), seeds, leak=_LEAK.value)
    print((bench.workdir.path / "tables.md").read_text())
    print(f"finished: {bench.workdir.path / 'report.html'}")


def numbers(name: str, values: Sequence[str], *, least: float, most: float = math.inf) -> list[float]:
    """The values of a flag. UsageError for one that is no number above or at `least` and up to `most`."""
    try:
        found = [float(value) for value in values]
    except ValueError:
        raise UsageError(f"--{name}={','.join(values)}: numbers with commas between them are asked for") from None
    if not found or not all(least <= value <= most for value in found):
        raise UsageError(f"--{name}={','.join(values)}: each must be at least {least:g} and at most {most:g}")
    return found


def main() -> None:
    """Trains weak and strong model, and judges both once on the test patches; with --ablation for each row of its tables."""
    bench = open_bench(config_from_flags(Config))
    if _ABLATION.value:
        ablate(bench, _ABLATION.value)
        return
    done = bench.workdir.path / "metrics.json"
    if done.exists():
        print(f"finished before: {done}; the test patches are judged once")
        return
    mining, arm = bench.run(seed=bench.config.seed), Arm(bench.config.query, bench.config.alpha)
    mining.strong(arm)
    judged = judge(mining, arm)
    write_results(mining, arm, judged, settings=bench.settings)
    weak, strong = (judged.merit[model]["AUROC"].value for model in ("weak", "strong"))
    print(
        f"finished: {int(mining.mined(arm).new.sum())} tiles mined, test AUROC weak {weak:.4f}, strong {strong:.4f}: "
        f"{bench.workdir.path}"
    )


if __name__ == "__main__":
    run(main)
