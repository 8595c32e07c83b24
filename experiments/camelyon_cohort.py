"""A cohort table of the Camelyon16 data as it is distributed, with its known exceptions left out or corrected, and said.

    python -m experiments.camelyon_cohort --folder=CAMELYON16 --reference=reference.csv --out=cohort.csv

--selection=few_shot takes He & Li's ten training slides, one of each kind for validation, and the test slides; --selection=all every
slide, of whose training set a part, drawn by seed, is for validation.
"""

from __future__ import annotations

import collections
import dataclasses

import numpy as np
from absl import flags

from data_pipelines.camelyon16 import Found, few_shot, find_camelyon16
from data_pipelines.cohort import write_cohort
from experiments.run.program import run

_FOLDER = flags.DEFINE_string("folder", None, "folder with the slides and annotations, at any depth", required=True)
_REFERENCE = flags.DEFINE_string("reference", None, "CSV with the test slides' labels; none: by their annotations")
_OUT = flags.DEFINE_string("out", None, "the table to write (CSV)", required=True)
_SELECTION = flags.DEFINE_enum("selection", "few_shot", ["few_shot", "all"], "which slides")
_VALIDATION = flags.DEFINE_float("validation", 0.15, "of --selection=all: share of the training slides for validation")
_SEED = flags.DEFINE_integer("seed", 0, "seed of that draw")


def with_validation(found: Found) -> Found:
    """The same with a share of the training slides of each label for validation."""
    random = np.random.default_rng(_SEED.value)
    chosen: set[str] = set()
    for label in ("normal", "tumour"):
        names = [r.slide_id for r in found.records if r.split == "train" and r.label == label]
        chosen |= set(random.permutation(names)[: round(_VALIDATION.value * len(names))].tolist())
    records = (dataclasses.replace(r, split="validation") if r.slide_id in chosen else r for r in found.records)
    return Found(tuple(records), found.notes)


def main() -> None:
    """Writes the table and says what is in it."""
    found = find_camelyon16(_FOLDER.value, reference=_REFERENCE.value)
    found = few_shot(found) if _SELECTION.value == "few_shot" else with_validation(found)
    for note in found.notes:
        print(note)
    write_cohort(_OUT.value, found.records)
    counts = collections.Counter((record.split, record.label) for record in found.records)
    print(", ".join(f"{count} {split} {label}" for (split, label), count in sorted(counts.items())))
    print(_OUT.value)


if __name__ == "__main__":
    run(main)
