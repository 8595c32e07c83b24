"""A model of a few-shot study on whole slides: its test patches laid out as mosaic slides, predicted, and scored as Camelyon16 scores."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Collection

from data_pipelines.mosaics import MosaicPlan
from data_pipelines.patches import Patches
from data_pipelines.synthetic import mosaic_cohort
from experiments.run.program import UsageError, command
from experiments.run.workdir import keep_record

# Tumour in one place of some 4 × 4 patches, so that lesions are larger than isolated tumour cells (275 µm at 0.97 µm per pixel).
PLAN = MosaicPlan(tissue_patches=(70, 100), positive_fraction=(0.1, 0.25), clustered=1.0)


def write_cohort(
    folder: pathlib.Path, patches: Patches, positive: Collection[str], *, slides: tuple[int, int], side: int, mpp: float
) -> pathlib.Path:
    """The cohort table of mosaic slides made of test patches alone, written once. slides: with and without tumour; side, mpp: pixels
    and µm per pixel of a patch in the slide."""
    table = folder / "cohort.csv"
    if table.exists():
        return table
    rows = patches.rows("test")
    classes = {
        str(label): [patches.path[row] for row in rows if patches.label[row] == label]
        for label in set(patches.label[rows])
    }
    negative = sorted(set(classes) - set(positive))
    plan = MosaicPlan(PLAN.tissue_patches, PLAN.positive_fraction, PLAN.clustered, patch_px=side)
    return mosaic_cohort(
        folder,
        patches={"test": classes},
        positive_classes=[name for name in positive if name in classes],
        negative_classes=negative,
        slides={"test": slides},
        mpp=mpp,
        plan=plan,
        labels=(next(iter(positive)), negative[0]),
        workers=2,
    )


def predict_and_score(
    model: pathlib.Path, cohort: pathlib.Path, out: pathlib.Path, *, positive: str, stride: int
) -> None:
    """Anomaly maps of the slides with the model in this folder, then slide ROC AUC and lesion FROC by their annotations. A slide's
    score is the mean of its map from the model's validation threshold on, which a short training puts far from 2.01."""
    if not (model / "model.json").exists():
        raise UsageError(f"{model} holds no finished model: run --section=few_shot first")
    threshold = json.loads((model / "metrics.json").read_text())["thresholds"]["validation"]
    limits = {"slide_threshold": threshold, "nms_stop": threshold / 2}
    finished = out / "maps" / "summary.json"
    keep_record(out / "maps.json", {"stride": stride}, made=finished)
    if not finished.exists():
        command("predict_slides", workdir=model, slides=cohort, split="test", out=out / "maps", stride=stride, **limits)
    command(
        "evaluate_camelyon",
        cohort=cohort,
        split="test",
        positive=positive,
        maps=out / "maps",
        nms_stop=threshold / 2,
        out=out / "lesions",
    )
