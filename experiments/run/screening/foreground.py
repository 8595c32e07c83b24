"""The stage `foreground`: a network that finds tissue on thumbnails, taught by colour deconvolution and Otsu's threshold."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import numpy as np
from PIL import Image

from data_pipelines.cohort import CohortError, SlideRecord, read_columns
from data_pipelines.exports import write_image, write_table
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

LIST = "pairs.csv"


def foreground_stage(config: Config, records: Sequence[SlideRecord], folder: pathlib.Path) -> Stage:
    """The foreground network, taught by the pairs in `folder`: one of which a file is deleted, because deconvolution and Otsu failed
    on it, is not learnt from (§4.1)."""
    records = [record for record in records if all(file.exists() for file in pair_of(folder, record))]
    split = np.array([record.split for record in records])
    known = np.array([record.slide_id for record in records])
    files = tuple(pair_of(folder, record)[0] for record in records)
    patches = Patches(files, np.full(len(known), "tissue"), known, known, split)
    reader = PatchReader(patches, np.ones(len(known), np.float32), config.thumbnail)
    rows = {name: patches.rows(name) for name in SPLITS}
    if not len(rows["train"]) or not len(rows["validation"]):
        raise CohortError(
            f"{folder}: no pair is left in the train or validation split: remove the folder, and all are written anew"
        )
    return Stage(
        name="foreground",
        reader=MaskedPatchReader(reader, tuple(pair_of(folder, record)[1] for record in records)),
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
) -> int:
    """Thumbnail and mask of tissue of every slide, both `thumbnail` pixels square: once, because what is deleted of those that pairs.csv
    lists stays deleted. Returns how many pairs are whole."""
    listed = set(read_columns(folder / LIST, ())) if (folder / LIST).exists() else set()

    def write(record: SlideRecord) -> None:
        thumbnail, tissue = pair_of(folder, record)
        if record.slide_id in listed or thumbnail.exists():
            return
        with shelf.lend(record.slide_id) as slide:
            pixels = square_thumbnail(slide.thumbnail(config.thumbnail_mpp), config.thumbnail)
        write_mask(tissue, tissue_mask(pixels, "stain"))
        write_image(thumbnail, pixels)

    with progress(len(records), "thumbnails", unit="slides") as bar:
        for _ in work_ahead(records, write, threads=threads, ahead=threads, name="thumbnails"):
            bar.update()
    write_table(folder / LIST, {"slide_id": sorted(listed | {record.slide_id for record in records})})
    return sum(all(file.exists() for file in pair_of(folder, record)) for record in records)


def pair_of(folder: pathlib.Path, record: SlideRecord) -> tuple[pathlib.Path, pathlib.Path]:
    """Thumbnail and mask of a slide."""
    return folder / "thumbnails" / f"{record.slide_id}.png", folder / "tissue" / f"{record.slide_id}.png"


def square_thumbnail(pixels: np.ndarray, side: int) -> np.ndarray:
    """uint8 [H, W, 3] -> [side, side, 3]: the whole picture, whatever its proportions (§5.1)."""
    return np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.BILINEAR))
