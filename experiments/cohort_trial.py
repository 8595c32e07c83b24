"""A cohort with broken slides, predicted once in peace and once with `kill -9` again and again: the trial behind RESULTS.md.

    python -m experiments.cohort_trial --workdir=runs/trial --sound=48 --kills=5

Draws the slides, breaks twelve in different ways, and runs predict_slides as a user would. Prints every slide that was not done with its
reason, whether both results are the same to the byte, and memory and open files along the cohort.
"""

from __future__ import annotations

import csv
import dataclasses
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
from absl import flags

from data_pipelines.exports import write_json, write_table
from data_pipelines.synthetic import drawn_cohort
from data_pipelines.tiles import Grid
from experiments.run.damage import damaged_slides
from experiments.run.model import Model
from experiments.run.program import UsageError, run
from srcc_jax.models.zoo import VARIANTS, architecture, init

_WORKDIR = flags.DEFINE_string("workdir", "runs/trial", "folder for slides, model and results")
_SOUND = flags.DEFINE_integer("sound", 48, "slides that are not broken", lower_bound=2)
_BROKEN = flags.DEFINE_bool("broken", True, "add the broken slides")
_SIDE = flags.DEFINE_integer("side", 1500, "side of the drawn slides in pixels, at 0.5 µm per pixel", lower_bound=512)
_KILLS = flags.DEFINE_integer("kills", 5, "times that the second run is killed; 0: no second run", lower_bound=0)
_SEED = flags.DEFINE_integer("seed", 0, "seed of the slides and of the moments of the kills")
_BACKBONE = flags.DEFINE_enum(
    "backbone", "lite0", VARIANTS, "network, untrained: neither speed nor files depend on its weights"
)

_GRID = Grid(tile=224, stride=112, mpp=1.0)
_SAMPLE_SECONDS = 0.5


@dataclasses.dataclass(frozen=True)
class Sample:
    """Of a running prediction: rows in slides.csv, resident memory in MB, open files."""

    rows: int
    megabytes: float
    files: int


def make_cohort(folder: pathlib.Path) -> pathlib.Path:
    """cohort.csv of sound and broken slides, written once."""
    table = folder / "trial.csv"
    if table.exists():
        return table
    half = _SOUND.value // 2
    drawn = drawn_cohort(
        folder, slides={"test": (_SOUND.value - half, half)}, side_px=_SIDE.value, seed=_SEED.value, workers=2
    )
    with open(drawn, newline="", encoding="utf-8") as file:
        rows = [(row["slide_id"], row["path"]) for row in csv.DictReader(file)]
    if _BROKEN.value:
        broken = damaged_slides(folder / rows[0][1], folder / "broken")
        rows += [(name, str(path.relative_to(folder))) for name, path in broken.items()]
    order = np.random.default_rng(_SEED.value).permutation(len(rows))
    columns = {name: [rows[n][place] for n in order] for place, name in enumerate(("slide_id", "path"))}
    write_table(table, columns)
    return table


def make_model(folder: pathlib.Path) -> pathlib.Path:
    """An untrained model."""
    if not (folder / "model.json").exists():
        net = architecture(_BACKBONE.value, source="timm", classes=1)
        about = {"name": f"untrained {net.name}", "settings": {}}
        Model(net, init(net, jax.random.key(_SEED.value)), _GRID, 0.5, "positive", about).save(folder)
    return folder


def start(model: pathlib.Path, cohort: pathlib.Path, out: pathlib.Path) -> subprocess.Popen:
    line = ["-m", "experiments.predict_slides", f"--workdir={model}", f"--slides={cohort}", f"--out={out}"]
    return subprocess.Popen([sys.executable, *line, "--save_seconds=1"])


def watch(process: subprocess.Popen, out: pathlib.Path) -> list[Sample]:
    """Waits for the end, looking in on the way (where the system has /proc)."""
    samples = []
    status, files = pathlib.Path(f"/proc/{process.pid}/status"), pathlib.Path(f"/proc/{process.pid}/fd")
    while process.poll() is None:
        if status.exists():
            try:
                resident = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS"))
                samples.append(Sample(len(table(out)), int(resident.split()[1]) / 1024, len(list(files.iterdir()))))
            except (FileNotFoundError, ProcessLookupError, StopIteration):  # it ended in this moment
                break
        time.sleep(_SAMPLE_SECONDS)
    process.wait()
    return samples


def table(out: pathlib.Path) -> list[dict[str, str]]:
    """The rows of slides.csv so far."""
    path = out / "slides.csv"
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def run_with_kills(model: pathlib.Path, cohort: pathlib.Path, out: pathlib.Path, seconds: float) -> list[float]:
    """Kills the run at random moments until it has been killed often enough, then lets it end. The moments, in seconds."""
    rng, moments = np.random.default_rng([_SEED.value, 1]), list[float]()
    while len(moments) < _KILLS.value:
        process = start(model, cohort, out)
        moment = float(rng.uniform(0.1, 2 / _KILLS.value) * seconds)
        try:
            process.wait(moment)
            raise UsageError(f"the run ended before it could be killed {_KILLS.value} times: give more slides")
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
        moments.append(round(moment, 1))
    start(model, cohort, out).wait()
    return moments


def differences(one: pathlib.Path, other: pathlib.Path) -> list[str]:
    """Files of results that are not the same to the byte, and cells of slides.csv that differ, but for measured times."""
    trees = [
        {str(p.relative_to(out)): p for p in sorted((out / "slides").rglob("*")) if p.is_file()} for out in (one, other)
    ]
    found = [
        name for name in sorted(trees[0].keys() | trees[1].keys()) if not _same(*(tree.get(name) for tree in trees))
    ]
    rows = [{row["slide_id"]: row for row in table(out)} for out in (one, other)]
    for slide_id in sorted(rows[0].keys() | rows[1].keys()):
        a, b = (each.get(slide_id, {}) for each in rows)
        names = [name for name in a.keys() | b.keys() if "second" not in name and a.get(name) != b.get(name)]
        found += [f"slides.csv: {slide_id}: {name}: {a.get(name)!r}, {b.get(name)!r}" for name in sorted(names)]
    return found


def _same(one: pathlib.Path | None, other: pathlib.Path | None) -> bool:
    return one is not None and other is not None and one.read_bytes() == other.read_bytes()


def print_samples(samples: list[Sample], slides: int) -> None:
    """Memory and open files at each quarter of the cohort."""
    for quarter in (1, 2, 3, 4):
        part = [s for s in samples if slides * (quarter - 1) / 4 <= s.rows < slides * quarter / 4 + (quarter == 4)]
        if part:
            megabytes, files = max(s.megabytes for s in part), max(s.files for s in part)
            print(f"quarter {quarter} of the slides: at most {megabytes:.0f} MB, {files} open files")


def main() -> int:
    """Runs the trial; the exit status is 1 where the results differ."""
    workdir = pathlib.Path(_WORKDIR.value)
    cohort, model = make_cohort(workdir / "cohort"), make_model(workdir / "model")
    outs = [workdir / name for name in ("in_peace", "killed")]
    for out in outs:
        shutil.rmtree(out, ignore_errors=True)
    began = time.perf_counter()
    samples = watch(start(model, cohort, outs[0]), outs[0])
    seconds = time.perf_counter() - began
    rows = table(outs[0])
    for row in rows:
        if row["reason"]:
            print(f"{row['status']}: {row['slide_id']}: {row['reason']}")
    done = sum(row["status"] == "done" for row in rows)
    print(f"{done} of {len(rows)} slides done in {seconds:.0f} s, {len(rows) / seconds:.2f} slides/s")
    print_samples(samples, len(rows))
    found: list[str] = []
    if _KILLS.value:
        moments = run_with_kills(model, cohort, outs[1], seconds)
        found = differences(*outs)
        print(
            f"killed after {', '.join(f'{m} s' for m in moments)} of each start, then finished: {len(found)} differences"
        )
        print("\n".join(found[:20]))
    write_json(
        workdir / "trial.json",
        {"slides": len(rows), "done": done, "seconds": seconds, "samples": samples, "differences": found},
    )
    return 1 if found else 0


if __name__ == "__main__":
    run(main)
