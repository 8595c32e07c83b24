"""The stages multitask and screening: which examples these networks see, and how they are judged."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from data_pipelines.cohort import CohortError
from data_pipelines.patches import ShuffledRows
from experiments.run.screening.examples import SPLITS, Examples
from experiments.run.screening.features import SlideFeatures
from experiments.run.screening.fitting import LAST, LEAST_LOSS, Stage, digest_of
from srcc_jax import metrics
from srcc_jax.methods import gastric_screening as method
from srcc_jax.methods.gastric_screening import Config
from srcc_jax.models.architecture import Architecture
from srcc_jax.models.screening import ScreeningNet


def multitask_stage(config: Config, architecture: Architecture, examples: Examples) -> Stage:
    """The multi-task network, or a classifier of patches in its place."""
    return Stage(
        name="multitask",
        reader=examples.reader,
        inputs=("image", "mask", "label"),
        rows=examples.sampler(config),
        epoch=config.epoch_patches or len(examples.rows["train"]),
        epochs=config.multitask_epochs,
        batch=config.multitask_batch,
        validation=examples.rows["validation"],
        loss=method.patch_loss(config, architecture),
        judge=method.judge_patches(config, architecture),
        summary=merit,
        digest=examples.digest(),
    )


def screening_stage(config: Config, slides: SlideFeatures, splits: np.ndarray) -> Stage:
    """The screening network. splits: str [S], of each slide."""
    rows = {split: np.flatnonzero(splits == split) for split in SPLITS}
    for split in ("train", "validation"):
        if len(set(slides.label[rows[split]].tolist())) < 2:
            raise CohortError(f"the screening network needs slides of both classes in the {split} split, with tissue")
    network = ScreeningNet(config.width)
    return Stage(
        name="screening",
        reader=slides,
        inputs=("features", "valid", "label"),
        rows=ShuffledRows(rows["train"], config.screening_batch, config.seed),
        epoch=len(rows["train"]),
        epochs=config.screening_epochs,
        batch=config.screening_batch,
        validation=rows["validation"],
        loss=method.screening_loss(network),
        judge=method.judge_slides(network),
        summary=merit,
        digest=digest_of(splits, slides.slide_id, slides.label, slides.valid, slides.features),
        keep=LAST if config.screening_selection == "last" else LEAST_LOSS,
    )


def merit(found: Mapping[str, np.ndarray]) -> dict[str, float]:
    """ROC AUC where both classes are there; Dice coefficient of all pixels together where there are counts of them."""
    found_merit: dict[str, float] = {}
    if "logit" in found and len(set(found["label"].tolist())) == 2:
        found_merit["validation_auc"] = float(metrics.roc_auc(found["label"], found["logit"]))
    if "tp" in found:
        found_merit["validation_dice"] = float(metrics.dice(*(found[name].sum() for name in ("tp", "fp", "fn"))))
    return found_merit
