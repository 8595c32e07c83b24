"""The whole path on drawn slides, in minutes on two cores: cohort, FS and WS training, prediction of the held-out slides, report.

    python -m experiments.demo --workdir=runs/demo

Each stage is one of the commands that a user runs, and is printed. A demo that was cut off goes on where it was.
"""

from __future__ import annotations

import json
import pathlib
import time

from absl import flags

from data_pipelines.exports import write_json
from data_pipelines.synthetic import drawn_cohort
from experiments.run.program import command, run
from experiments.run.progress import progress

_WORKDIR = flags.DEFINE_string("workdir", "runs/demo", "folder for the slides, the model and the report")
_SIDE = flags.DEFINE_integer("side", 2200, "side of the drawn slides in pixels, at 0.5 µm per pixel")
_SEED = flags.DEFINE_integer("seed", 0, "seed of the slides and of the training")

_SLIDES = {"train": (8, 8), "validation": (4, 4), "test": (12, 12)}
# A small network, small tiles and a short schedule, so that the demo takes minutes on two cores; the paper's numbers are the defaults.
_TRAINING = {
    "mode": "fs_ws",
    "backbone": "tiny",
    "mpp": 1.0,
    "tile": 64,
    "stride": 32,
    "tiles_per_slide": 40,
    "buffer": 128,
    "top_k": 4,
    "batch": 32,
    "learning_rate": 3e-3,
    "frozen_epochs": 0,
    "bn_momentum": 0.9,
    "max_epochs": 12,
    "patience": 10,
}


def draw_slides(folder: pathlib.Path) -> pathlib.Path:
    """The cohort of drawn slides, written once."""
    table = folder / "cohort.csv"
    if not table.exists():
        total = sum(map(sum, _SLIDES.values()))
        with progress(total, "drawing slides", unit="slides") as bar:
            drawn_cohort(
                folder,
                slides=_SLIDES,
                side_px=_SIDE.value,
                seed=_SEED.value,
                workers=2,
                progress=lambda n, _: bar.update(n - bar.n),
            )
    return table


def main() -> None:
    """Runs the stages, gathers their times and says where the report is."""
    workdir = pathlib.Path(_WORKDIR.value)
    seconds: dict[str, float] = {}

    def timed(stage: str, began: float) -> None:
        seconds[stage] = round(time.perf_counter() - began, 1)

    began = time.perf_counter()
    table = draw_slides(workdir / "cohort")
    timed("slides", began)
    began = time.perf_counter()
    command("slide_classification", cohort=table, workdir=workdir, seed=_SEED.value, **_TRAINING)
    timed("training", began)
    began = time.perf_counter()
    command("predict_slides", workdir=workdir, slides=table, split="test", out=workdir)
    timed("prediction", began)
    found = json.loads((workdir / "summary.json").read_text())
    write_json(workdir / "summary.json", {**found, "seconds": seconds})
    auc = found["slide_auc"]
    print(
        f"held-out slide AUC {auc['value']:.3f} [{auc['low']:.3f}, {auc['high']:.3f}], {sum(seconds.values()):.0f} s "
        f"({', '.join(f'{stage} {s:.0f}' for stage, s in seconds.items())})\nreport: {(workdir / 'report.html').absolute()}"
    )


if __name__ == "__main__":
    run(main)
