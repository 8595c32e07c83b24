"""Pictures of a run: false positives beside what was mined for them, features in the plane, and where both models look."""

from __future__ import annotations

import pathlib

import numpy as np

from data_pipelines.contact_sheets import Picture, contact_sheet
from data_pipelines.exports import write_image
from data_pipelines.patch_names import join_patches
from data_pipelines.patches import Patches, PatchReader
from experiments.run.figures.attention import draw_attention, make_attention
from experiments.run.figures.embedding import Panel, draw_embeddings, drawn_rows
from experiments.run.mining.stages import Arm, MiningRun

SHEET_ROWS, SHEET_NEIGHBOURS = 12, 8  # ours: of the most probable false positives
LOOKED_AT = 4  # ours: patches of each kind in the figure of where models look
FEWEST_POINTS = 8  # ours: below it no plane of features is drawn


def draw_pictures(run: MiningRun, arm: Arm, row: np.ndarray, weak: np.ndarray, strong: np.ndarray) -> dict[str, str]:
    """Caption -> name of a PNG in the work directory. row int [n]: test patches that can be read; weak, strong [n]: probabilities.
    Without false positives there is nothing to draw."""
    folder = run.workdir.path
    if not len(run.false_positives.row):
        return {}
    names = {
        "False positives (framed) beside the tiles mined for them, with distances": f"mined_{arm.name}.png",
        "Grad-CAM of weak and strong model, on test patches where they differ most": f"attention_{arm.name}.png",
    }
    sheet, attention = (folder / name for name in names.values())
    write_image(sheet, contact_sheet(_sheet(run, arm)))
    _draw_attention(run, arm, attention, row, strong - weak)
    if len(row) + len(run.false_positives.row) >= FEWEST_POINTS:
        caption = "Features of test patches, false positives and mined tiles (t-SNE)"
        names[caption] = f"features_{arm.name}.png"
        _draw_features(run, arm, folder / names[caption], row)
    return names


def _sheet(run: MiningRun, arm: Arm) -> list[list[Picture]]:
    mined, found = run.mined(arm), run.false_positives
    rows = []
    for query in np.argsort(-found.probability, kind="stable")[:SHEET_ROWS]:
        places = np.flatnonzero(mined.query == query)[:SHEET_NEIGHBOURS]
        tiles = run.tile_files(mined.weak[places])
        shown = _pixels(run, join_patches([run.patches.take(found.row[[query]]), tiles]))
        values = [f"{value:.3g}" if np.isfinite(value) else "random" for value in mined.value[places]]
        texts = [f"p {found.probability[query]:.2f}", *values]
        rows.append([Picture(image, text) for image, text in zip(shown, texts)])
    return rows


def _draw_attention(run: MiningRun, arm: Arm, path: pathlib.Path, row: np.ndarray, change: np.ndarray) -> None:
    label = run.label[row]
    order = np.argsort(-np.abs(change), kind="stable")
    chosen = np.concatenate([row[order[label[order] == value]][:LOOKED_AT] for value in (1, 0)])
    images = _pixels(run, run.patches.take(chosen))
    attend = make_attention(run.trainer.architecture, index=1)
    models = {"weak": run.weak, "strong": run.strong(arm)}
    captions = ["positive" if run.label[number] else "negative" for number in chosen]
    draw_attention(path, images, captions, {name: attend(model.variables, images) for name, model in models.items()})


def _draw_features(run: MiningRun, arm: Arm, path: pathlib.Path, row: np.ndarray) -> None:
    found = run.false_positives.row
    parts = {
        "negative": run.patches.take(row[run.label[row] == 0]),
        "positive": run.patches.take(row[run.label[row] == 1]),
        "false positive": run.patches.take(found),
        "mined": run.mined_patches(arm),
    }
    kind = np.concatenate([np.full(len(part), name) for name, part in parts.items()])
    drawn = drawn_rows(kind, seed=run.config.seed)
    patches = join_patches(list(parts.values())).take(drawn)
    reader = PatchReader(patches, np.zeros(len(patches)), run.config.tile)
    models = {"weak": run.weak, "strong": run.strong(arm)}
    features = [run.trainer.features(model.variables, reader, np.arange(len(patches))) for model in models.values()]
    known = np.isfinite(features[0]).all(1)
    panels = [Panel(name, part[known], kind[drawn][known]) for name, part in zip(models, features)]
    draw_embeddings(path, panels, seed=run.config.seed)


def _pixels(run: MiningRun, patches: Patches) -> np.ndarray:
    """uint8 [n, side, side, 3]; black where a patch cannot be read."""
    reader = PatchReader(patches, np.zeros(len(patches)), run.config.tile)
    return reader.read(np.arange(len(patches)), size=len(patches)).arrays["image"]
