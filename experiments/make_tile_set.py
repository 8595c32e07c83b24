"""Writes labelled patches as one set of ArrayRecord files, which training programs take wherever they take patches.

    python -m experiments.make_tile_set --patches=patches.csv --out=sets --name=my_patches
    python -m experiments.negative_mining --hard=sets/my_patches ...

--patches is a folder <class>/<image> (with <split>/ above or not) or a list (CSV: path, label and, where known, slide_id, patient_id,
split). A set is a few large files instead of many small ones: it copies fast, and reads fast from network disks.
"""

from __future__ import annotations

from absl import flags

from data_pipelines.patches import read_patches
from data_pipelines.tile_sets import write_tile_set
from experiments.run.program import run

_PATCHES = flags.DEFINE_string("patches", None, "folder or list of labelled patches", required=True)
_OUT = flags.DEFINE_string("out", None, "folder of sets", required=True)
_NAME = flags.DEFINE_string("name", None, "of the set: small letters, digits, underscores", required=True)


def main() -> None:
    """Writes the set and says where."""
    patches = read_patches(_PATCHES.value)
    folder = write_tile_set(
        _OUT.value,
        _NAME.value,
        path=patches.path,
        label=patches.label.tolist(),
        slide_id=patches.slide_id.tolist(),
        patient_id=patches.patient_id.tolist(),
        split=patches.split.tolist(),
    )
    print(f"{len(patches)} patches: {folder}")


if __name__ == "__main__":
    run(main)
