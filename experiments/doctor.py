"""Says what would fail or be slow on this machine, and the cure of each.

    python -m experiments.doctor --slides=slides/ --out=out

The exit status is 1 where something would fail, else 0.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import pathlib

import jax
from absl import flags

from data_pipelines.exports import write_json
from data_pipelines.machine import this_machine
from data_pipelines.slide_check import SlideCheck, reader_versions
from experiments.run import checks
from experiments.run.program import run, start_devices
from experiments.run.slides import slide_records
from experiments.run.workdir import versions

_SLIDES = flags.DEFINE_string(
    "slides", None, "a slide, a folder (searched with its sub-folders) or a cohort CSV to try"
)
_OUT = flags.DEFINE_string("out", ".", "the folder that results will be written to")
_MPP_OVERRIDE = flags.DEFINE_float(
    "mpp_override", None, "µm per pixel of level 0 for slides that do not say it themselves"
)
_MOST = flags.DEFINE_integer("most", 20, "slides that are tried at most, evenly spread", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "seed of the regions that are compared", lower_bound=0)
_JSON = flags.DEFINE_string("json", None, "a file for all findings as JSON")


def main() -> int:
    """Prints the findings, the worst last, and returns the exit status."""
    start_devices()
    machine = this_machine()
    devices = checks.check_devices(machine, os.environ)
    on_cpu = devices[0].level != "fail" and jax.default_backend() == "cpu"
    findings = [
        *devices,
        *checks.check_processor(machine, os.environ, on_cpu=on_cpu),
        *checks.check_memory(machine),
        *checks.check_readers(reader_versions(), tensorflow=importlib.util.find_spec("tensorflow") is not None),
        *checks.check_cache(flags.FLAGS.compilation_cache),
        *checks.check_folder("results", pathlib.Path(_OUT.value).absolute()),
    ]
    slides: list[SlideCheck] = []
    if _SLIDES.value:
        records = slide_records(_SLIDES.value, None)
        found, slides = checks.check_slides(
            records, mpp_override=_MPP_OVERRIDE.value, most=_MOST.value, seed=_SEED.value
        )
        findings += found
    print(", ".join(f"{name} {version}" for name, version in versions().items()))
    order = ("ok", "note", "slow", "fail")
    for finding in sorted(findings, key=lambda finding: order.index(finding.level)):
        print(
            f"{finding.level:4}  {finding.topic}: {finding.text}"
            + (f"\n      → {finding.cure}" if finding.cure else "")
        )
    counts = {level: sum(finding.level == level for finding in findings) for level in order}
    print(f"{counts['fail']} would fail, {counts['slow']} would be slow")
    if _JSON.value:
        facts = {**dataclasses.asdict(machine), "cpu_flags": sorted(machine.cpu_flags)}
        about = {"versions": versions(), "machine": facts, "counts": counts, "findings": findings, "slides": slides}
        write_json(_JSON.value, about)
    return 1 if counts["fail"] else 0


if __name__ == "__main__":
    run(main)
