"""The stage `foreground`: a network that finds tissue on thumbnails, taught by colour deconvolution and Otsu's threshold."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import numpy as np
from PIL import Image

from data_pipelines.cohort import CohortError, SlideRecord
from data_pipelines.exports import write_image
from data_pipelines.lesion_masks import write_mask
from data_pipelines.masked_patches import MaskedPatchReader
from data_pipelines.patches import Patches, PatchReader, ShuffledRows
from data_pipelines.scan import work_ahead
from data_pipelines.shelf import Shelf
from data_pipelines.tissue import tissue_mask
from experiments.run.progress import progress
from experiments.run.screening.examples import SPLITS
from experiments.run.screening.fitting import Stage, digest_of
from experiments.run.screening.stages import merit
from srcc_jax.methods import gastric_screening as method
from srcc_jax.methods.gastric_screening import Config


def foreground_stage(
    config: Config, records: Sequence[SlideRecord], shelf: Shelf, folder: pathlib.Path, *, threads: int
) -> Stage:
    """The foreground network. Pairs are written once to thumbnails/ and tissue/ in `folder`: a pair whose mask is deleted, because
    deconvolution and Otsu failed on it, is not learnt from (§4.1)."""
    write_pairs(config, records, shelf, folder, threads=threads)
    records = [r for r in records if (folder / "tissue" / f"{r.slide_id}.png").exists()]
    split = np.array([record.split for record in records])
    known = np.array([record.slide_id for record in records])
    files = tuple(folder / "thumbnails" / f"{name}.png" for name in known)
    patches = Patches(files, np.full(len(known), "tissue"), known, known, split)
    reader = PatchReader(patches, np.ones(len(known), np.float32), config.thumbnail)
    rows = {name: patches.rows(name) for name in SPLITS}
    if not len(rows["train"]) or not len(rows["validation"]):
        raise CohortError(f"{folder / 'tissue'}: no mask is left in the train or validation split")
    return Stage(
        name="foreground",
        reader=MaskedPatchReader(reader, tuple(folder / "tissue" / f"{name}.png" for name in known)),
        inputs=("image", "mask"),
        rows=ShuffledRows(rows["train"], config.foreground_batch, config.seed),
        epoch=len(rows["train"]),
        epochs=config.foreground_epochs,
        batch=config.foreground_batch,
        validation=rows["validation"],
        loss=method.foreground_loss(config),
        judge=method.judge_foreground,
        summary=merit,
        digest=digest_of(known, split),
    )


def write_pairs(
    config: Config, records: Sequence[SlideRecord], shelf: Shelf, folder: pathlib.Path, *, threads: int
) -> None:
    """Thumbnail and mask of tissue of every slide, both `thumbnail` pixels square. A slide whose thumbnail is there is left alone."""

    def write(record: SlideRecord) -> None:
        thumbnail = folder / "thumbnails" / f"{record.slide_id}.png"
        if thumbnail.exists():
            return
        with shelf.lend(record.slide_id) as slide:
            pixels = square_thumbnail(slide.thumbnail(config.thumbnail_mpp), config.thumbnail)
        write_mask(folder / "tissue" / thumbnail.name, tissue_mask(pixels, "stain"))
        write_image(thumbnail, pixels)

    with progress(len(records), "thumbnails", unit="slides") as bar:
        for _ in work_ahead(records, write, threads=threads, ahead=threads, name="thumbnails"):
            bar.update()


def square_thumbnail(pixels: np.ndarray, side: int) -> np.ndarray:
    """uint8 [H, W, 3] -> [side, side, 3]: the whole picture, whatever its proportions (§5.1)."""
    return np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.BILINEAR))
