"""What a few-shot study runs: its fixed list of patches, and its runs: which arm, how many tumour patches, which seed."""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from data_pipelines.patches import Patches, PatchesError

DRAWS = 4  # purpose that the seed of the splits is folded with
MAIN = "focal, flat"
ARMS: Mapping[str, Mapping[str, str]] = {
    f"{loss}, {similarity}": {"loss": loss, "similarity": similarity}
    for loss in ("focal", "plain")
    for similarity in ("flat", "pixel")
}
SUPERVISED = "supervised"  # the teacher's network, all of whose weights are trained by the labels
FURTHER = (*(arm for arm in ARMS if arm != MAIN), SUPERVISED)
LOGISTIC, DISTANCE = "logistic regression", "distance to normal"
# §4, Tables 2 and 3: patches -> accuracy on 10000 normal and 10000 tumour patches of Camelyon16
PAPER = {0: 0.646, 5: 0.759, 10: 0.784, 50: 0.812, 100: 0.843, 500: 0.881, 1000: 0.879}


@dataclasses.dataclass(frozen=True, order=True)
class Row:
    """One run of a study. Without tumour patches every arm of a similarity is the same: plain reverse distillation."""

    arm: str
    tumour: int
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.arm.replace(', ', '_').replace(' ', '_')}_{self.tumour}_{self.seed}"

    @property
    def settings(self) -> dict[str, str]:
        """Flags of reverse_distillation that the arm sets."""
        changes = dict(ARMS[self.arm])
        return changes | {"loss": "plain"} if self.tumour == 0 else changes


def plan(
    counts: Sequence[int], *, seeds: int, arms: Sequence[str], arm_counts: Sequence[int], arm_seeds: int
) -> list[Row]:
    """The runs, so ordered that a study which is cut off has answered the larger questions: the main arm by its first seed, the
    numbers of `arm_counts` before the others; the other arms by their first seed; the further seeds of the main arm; the rest.
    Without tumour patches nothing is supervised."""
    first = [n for n in arm_counts if n in counts]
    ordered = [*first, *(n for n in counts if n not in first)]
    rows = [Row(MAIN, n, 0) for n in ordered]
    rows += [Row(arm, n, 0) for n in first for arm in arms]
    rows += [Row(MAIN, n, seed) for seed in range(1, seeds) for n in ordered]
    rows += [Row(arm, n, seed) for seed in range(1, arm_seeds) for n in first for arm in arms]
    return [row for row in rows if row.tumour or row.arm != SUPERVISED]


def finished_rows(runs: pathlib.Path, counts: Sequence[int]) -> list[Row]:
    """Runs of further arms that are finished in this folder, whoever asked for them."""
    kinds = [(arm, n, Row(arm, n, 0).name[:-1]) for arm in FURTHER for n in counts]
    found = [(arm, n, path.parent.name, stem) for arm, n, stem in kinds for path in runs.glob(f"{stem}*/metrics.json")]
    return sorted(Row(arm, n, int(name.removeprefix(stem))) for arm, n, name, stem in found)


def name_slides(patches: Patches, pattern: str) -> Patches:
    """The same with the slide of each patch, which the first group of the pattern finds in its file's name. PatchesError where it
    finds none."""
    found = [re.search(pattern, path.stem) for path in patches.path]
    unknown = [path.name for path, match in zip(patches.path, found) if not match or not match.groups()]
    if unknown:
        raise PatchesError(f"--slide_pattern={pattern} finds no slide in {unknown[0]} ({len(unknown)} patches in all)")
    return dataclasses.replace(patches, slide_id=np.array([match[1] for match in found if match]))


def divide(
    patches: Patches,
    tumour: np.ndarray,
    *,
    validation: Sequence[int],
    test: Sequence[int],
    test_slides: Collection[str] = (),
    seed: int = 0,
) -> Patches:
    """The same with a split for every patch; splits that are given stay.

    tumour bool [N]. validation, test: how many normal and tumour patches; those for the test are all of `test_slides` where these
    are given. PatchesError where there are too few.
    """
    if (patches.split != "").all():
        return patches
    random = np.random.default_rng([seed, DRAWS])
    split = np.full(len(patches), "train", dtype="<U10")
    split[np.isin(patches.slide_id, list(test_slides))] = "test"
    for kind, mask in enumerate((~tumour, tumour)):
        rows = random.permutation(np.flatnonzero(mask & (split == "train")))
        held_out = validation[kind] + (0 if test_slides else test[kind])
        if held_out >= len(rows):
            name = ("normal", "tumour")[kind]
            raise PatchesError(
                f"{held_out} {name} patches for validation and test: there are {len(rows)}, and some must be left to train on"
            )
        split[rows[: validation[kind]]] = "validation"
        split[rows[validation[kind] : held_out]] = "test"
    return dataclasses.replace(patches, split=split)
