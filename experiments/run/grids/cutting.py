"""Grids of patches cut from the slides of a cohort, with the label of each patch from the slide's annotation."""

from __future__ import annotations

import pathlib

import numpy as np

from data_pipelines.cohort import Cohort
from data_pipelines.patch_grids import read_grids, write_grids
from data_pipelines.patches import Patches
from data_pipelines.spots import MASK_MPP, find_regions
from experiments.run.distillation.spot_patches import SpotCutter, tell_failed_slides
from srcc_jax.methods import reverse_distillation
from srcc_jax.methods.patch_grids import Config


def cut_grids(
    cohort: Cohort, config: Config, folder: pathlib.Path, *, mpp_override: float | None, threads: int
) -> tuple[Patches, np.ndarray]:
    """The grids around places that He & Li's rule draws from each slide, and bool [N, side²]: the patches whose middle is tumour. Also
    written as grids.csv; once that is there, it is read. Slides that cannot be used are told, as `SpotCutter.cut` does."""
    listing = folder / "grids.csv"
    if listing.exists():
        tell_failed_slides(folder)
    else:
        spots = reverse_distillation.Config(
            tile=config.image,
            mpp=config.mpp,
            positive=config.positive,
            normal_spots=config.normal_spots,
            tumour_spots=config.tumour_spots,
            validation_spots=config.validation_spots,
            test_normal_spots=config.test_spots,
            test_tumour_spots=config.test_spots,
            seed=config.seed,
            split_seed=config.split_seed,
        )
        patches = SpotCutter(spots, folder, {}, mpp_override).cut(cohort, threads=threads)
        write_grids(listing, patches, _cells(patches, cohort, config, mpp_override))
    return read_grids(listing, side=config.side)


def _cells(patches: Patches, cohort: Cohort, config: Config, mpp_override: float | None) -> np.ndarray:
    records = {record.slide_id: record for record in cohort}
    cells = np.zeros((len(patches), config.side**2), bool)
    steps = np.arange(config.side) - config.side // 2
    for slide in np.unique(patches.slide_id):
        regions = find_regions(records[str(slide)], mpp_override=mpp_override)
        patch = config.tile * config.mpp / MASK_MPP  # in pixels of the mask
        for row in np.flatnonzero(patches.slide_id == slide):
            # A spot is a pixel of the mask times its downsample; the file's name holds that rounded.
            x, y = (round(float(number) / regions.downsample) for number in patches.path[row].stem.rsplit("_", 2)[1:])
            places = [np.floor(middle + steps * patch).astype(int) for middle in (y, x)]
            inside = [(place >= 0) & (place < length) for place, length in zip(places, regions.tumour.shape)]
            found = regions.tumour[np.ix_(*(np.clip(p, 0, n - 1) for p, n in zip(places, regions.tumour.shape)))]
            cells[row] = (found & inside[0][:, None] & inside[1][None]).ravel()
    return cells
