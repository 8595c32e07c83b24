"""Stages of training a slide classifier: what the method decides, joined to slides, stream, device and checkpoints."""

from __future__ import annotations

import csv
import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from data_pipelines.exports import write_table
from experiments.run.scoring import probability
from experiments.run.study import Study
from srcc_jax.checkpoints import Checkpoints
from srcc_jax.kernels.top_k import select_top_k
from srcc_jax.methods.slide_classification import SupervisedSampler, WeakSampler, frozen_steps, with_mined
from srcc_jax.train import TrainState


@dataclasses.dataclass(frozen=True)
class StageResult:
    """The variables of the best checkpoint of a stage, its step and its validation loss."""

    variables: dict[str, Any]
    step: int
    loss: float


def train_supervised(study: Study, variables: Mapping[str, Any]) -> StageResult:
    """FS: the last layer alone for the first epochs, then everything, until patience or the last epoch ends it."""
    config = study.config
    sampler = SupervisedSampler(config, study.candidates(supervised=True), study.labels)
    last = max(1, round(config.max_epochs * sampler.steps_per_epoch))
    steps = study.steps(sampler.steps_per_epoch, frozen=min(frozen_steps(config, sampler.steps_per_epoch), last))
    epoch = max(1, round(sampler.steps_per_epoch))
    with Checkpoints(str(study.workdir.path / "fs")) as checkpoints:
        state = checkpoints.resume(steps.begin(variables, config.seed, study.mesh))
        for until in (steps.frozen, last):
            if int(state.step) > until or not until:
                continue
            step_fn, state = steps.at(state, study.mesh)
            result = study.fit("fs", checkpoints, step_fn, state, sampler, until=until, every=epoch)
            state = result.state
            if result.stopped:
                break
        return best_of(study, checkpoints, state)


def train_weakly(study: Study, variables: Mapping[str, Any], *, fresh_head: bool) -> StageResult:
    """WS: in each round the slides drawn are scanned, their top tiles chosen and saved, and trained on.

    fresh_head: the last layer starts random and is trained alone at first; after FS it is not.
    """
    config = study.config
    sampler = WeakSampler(config, study.labels)
    steps = study.steps(sampler.steps_per_epoch, frozen=sampler.frozen_steps if fresh_head else 0)
    with Checkpoints(str(study.workdir.path / "ws")) as checkpoints:
        state = checkpoints.resume(steps.begin(variables, config.seed, study.mesh))
        for number in range(int(state.step) // sampler.steps_per_round, sampler.rounds):
            if study.keep.exhausted(study.keep.best_of(checkpoints)):
                break
            until = (number + 1) * sampler.steps_per_round
            rows = sampler.rows_of_step(number, choose_tiles(study, sampler, number, state))
            every = until if sampler.ends_epoch(number) else 0
            step_fn, state = steps.at(state, study.mesh)
            state = study.fit("ws", checkpoints, step_fn, state, rows, until=until, every=every).state
        return best_of(study, checkpoints, state)


def choose_tiles(study: Study, sampler: WeakSampler, number: int, state: TrainState) -> dict[int, np.ndarray]:
    """slide -> rows of its most probable tiles, best first, for the slides of a round. Written to ws/rounds before it is used, and
    read back by a run that goes on inside the round."""
    path = study.workdir.path / "ws" / "rounds" / f"{number:05d}.csv"
    slides = np.unique(sampler.draws(number))
    if not path.exists():
        allowed = np.zeros(len(study.train.tiles), bool)
        allowed[np.concatenate(study.candidates(supervised=False))] = True
        what = f"round {number}: selecting"
        logits = study.logits(state, study.train, slides, what, allowed=allowed, interruptible=True)
        rows, valid = select_top_k(logits, study.train.slide, slides=len(study.labels), k=study.config.top_k)
        chosen = {int(slide): np.asarray(rows[slide])[np.asarray(valid[slide])] for slide in slides}
        for slide in chosen.keys() & study.mined.keys():
            chosen[slide] = with_mined(chosen[slide], study.mined[slide], study.config, slide=slide, number=number)
        if jax.process_index() == 0:
            write_choice(path, study, chosen, logits)
        return chosen
    with open(path, newline="", encoding="utf-8") as file:
        entries = [(int(row["slide"]), int(row["row"])) for row in csv.DictReader(file)]
    return {int(slide): np.asarray([row for s, row in entries if s == slide], int) for slide in slides}


def write_choice(path: pathlib.Path, study: Study, chosen: Mapping[int, np.ndarray], logits: np.ndarray) -> None:
    """A row for each chosen tile, best first within its slide: where it is and how probable the model found it."""
    tiles = study.train.tiles
    slide = np.concatenate([np.full(len(rows), number) for number, rows in chosen.items()])
    row = np.concatenate(list(chosen.values()))
    columns = {
        "slide": slide,
        "row": row,
        "slide_id": tiles.slide_id[row],
        "label": study.labels[slide],
        "x": tiles.x[row],
        "y": tiles.y[row],
        "probability": probability(logits[row]),
    }
    write_table(path, columns)


def best_of(study: Study, checkpoints: Checkpoints, state: TrainState) -> StageResult:
    """The variables of the best checkpoint. state: any of the same stage."""
    best = study.keep.best_of(checkpoints)
    assert best.step is not None and best.value is not None
    found = checkpoints.restore({"params": state.params, "stats": state.stats}, best.step)
    return StageResult({"params": found["params"], **found["stats"]}, best.step, best.value)
