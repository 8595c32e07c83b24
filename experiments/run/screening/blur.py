"""The stage `blur`: a gate that tells patches out of focus, taught on the cohort's own patches, defocused by known radii."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from data_pipelines.cohort import CohortError
from data_pipelines.defocus import defocus
from data_pipelines.patches import PatchBatch, ShuffledRows, fill_batch
from data_pipelines.shelf import Shelf
from data_pipelines.tiles import Tiles
from experiments.run.screening.examples import SPLITS, TiledCohort
from experiments.run.screening.fitting import Stage, digest_of
from experiments.run.screening.stages import merit
from srcc_jax.methods import gastric_screening as method
from srcc_jax.methods.gastric_screening import Config

_PLACES = 4  # purpose that a seed is folded with


@dataclasses.dataclass(frozen=True, eq=False)
class FocusReader:
    """Squares of `side` pixels from the middles of tiles, each defocused by a known radius. tile int [N]: rows of the table; radius_um
    float [N]; label float [N]: 1 where that is out of focus. More is read around each, so that its border is true too."""

    tiles: Tiles
    shelf: Shelf
    tile: np.ndarray
    radius_um: np.ndarray
    label: np.ndarray
    side: int

    def read(self, rows: np.ndarray, *, size: int) -> PatchBatch:
        """The batch of these rows, filled up with padding to `size`."""
        return fill_batch(rows, self._pixels, self.label, size=size, side=self.side)

    def _pixels(self, row: int) -> np.ndarray:
        tiles, tile = self.tiles, self.tile[row]
        radius_px = self.radius_um[row] / tiles.mpp
        margin = int(np.ceil(radius_px)) + 1
        with self.shelf.lend(str(tiles.slides[tiles.slide[tile]])) as slide:
            scale = tiles.mpp / slide.mpp
            corner = ((tiles.tile - self.side) / 2 - margin) * scale
            wide = self.side + 2 * margin
            pixels = slide.read(tiles.x[tile] + corner, tiles.y[tile] + corner, wide, wide, tiles.mpp)
        return defocus(pixels, radius_px)[margin:-margin, margin:-margin]


def focus_reader(cohort: TiledCohort, config: Config, radii: Sequence[float] | None = None) -> FocusReader:
    """`blur_patches` places on each slide, drawn by the seed of the splits, each as it is and defocused. radii in µm: the same for
    every place, as a test wants them; None: one each, drawn between `blur_radius` and `blur_most`, as training does."""
    tile, radius = [], []
    for number in range(len(cohort.slides.records)):
        random = np.random.default_rng([config.split_seed, _PLACES, number])
        rows = cohort.slides.rows(number)
        places = random.choice(rows, min(len(rows), config.blur_patches), replace=False)
        for place in np.sort(places):
            drawn = [random.uniform(config.blur_radius, config.blur_most)] if radii is None else list(radii)
            tile += [place] * (1 + len(drawn))
            radius += [0.0, *drawn]
    out_of_focus = np.asarray(radius) >= config.blur_radius
    return FocusReader(
        cohort.slides.tiles,
        cohort.shelf,
        np.asarray(tile),
        np.asarray(radius),
        out_of_focus.astype(np.float32),
        config.blur_side,
    )


def blur_stage(config: Config, cohort: TiledCohort) -> Stage:
    """The blur gate."""
    reader = focus_reader(cohort, config)
    split = np.asarray([record.split for record in cohort.slides.records])[cohort.slides.slide[reader.tile]]
    rows = {name: np.flatnonzero(split == name) for name in SPLITS}
    if not len(rows["train"]) or not len(rows["validation"]):
        raise CohortError("the blur gate needs slides with tissue in the train and validation splits")
    return Stage(
        name="blur",
        reader=reader,
        inputs=("image", "label"),
        rows=ShuffledRows(rows["train"], config.blur_batch, config.seed),
        epoch=len(rows["train"]),
        epochs=config.blur_epochs,
        batch=config.blur_batch,
        validation=rows["validation"],
        loss=method.blur_loss(config),
        judge=method.judge_focus,
        summary=merit,
        digest=digest_of(cohort.slides.tiles.slides, split, reader.tile, reader.radius_um),
    )
