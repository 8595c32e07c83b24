"""The stage `features`: the k most malignant patches of each slide, with the encoder's features, kept in a file each."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from data_pipelines.files import atomic_write
from data_pipelines.patches import PatchBatch
from data_pipelines.scan import ScanJob, ScanShape, prefetch, scan
from data_pipelines.slides import SlideError
from experiments.run.progress import progress
from experiments.run.scoring import TileScorer
from experiments.run.screening.examples import TiledCohort
from experiments.run.screening.origins import Checksums, changed, write_record
from srcc_jax.kernels.top_k import select_top_k
from srcc_jax.methods.gastric_screening import Config, malignancy_logit
from srcc_jax.models import zoo
from srcc_jax.models.architecture import Architecture, normalize
from srcc_jax.models.features import pooled
from srcc_jax.models.layers import fold_batch_norm
from srcc_jax.train import Interrupted

LOGIT, FEATURES, LESION = "logit", "features", "lesion"  # outputs of the network
BLOCK = 2  # tiles along the side of what is read at once: at 512 px a super-tile is of 1024
_CHUNK = {"cpu": 1}  # patches at a time on each device; one of 512 pixels takes tens of megabytes
_ACCELERATOR_CHUNK = 8


def patch_scorer(architecture: Architecture, *, tile: int, mesh: Mesh, cells: int | None = None) -> TileScorer:
    """The network of the patches, BatchNorm folded: "logit" [n] of malignancy and "features" [n, D], float32. With `cells`, of a network
    with a map, also "lesion" float16 [n, cells, cells], the mean probability of the pixels of each cell."""
    network = zoo.build(architecture, folded=True)

    def outputs(variables: Mapping[str, Any], windows: jax.Array) -> dict[str, jax.Array]:
        out: Any = network.apply(variables, normalize(windows, architecture), train=False)
        found = {LOGIT: malignancy_logit(out), FEATURES: pooled(out, "mean")}
        if cells is not None and "dense" in out:
            lesion = jax.nn.sigmoid(out["dense"][..., 0].astype(jnp.float32))
            parts = lesion.reshape(len(lesion), cells, tile // cells, cells, tile // cells)
            found[LESION] = parts.mean((2, 4)).astype(jnp.float16)
        return found

    fold = functools.partial(fold_batch_norm, epsilon=architecture.bn_epsilon)
    chunk = _CHUNK.get(mesh.devices.flat[0].platform, _ACCELERATOR_CHUNK)
    return TileScorer(outputs, fold, tile=tile, mesh=mesh, chunk=chunk)


@dataclasses.dataclass(frozen=True)
class PatchNetwork:
    """A patch_scorer with the weights that it is to use."""

    scorer: TileScorer
    folded: Mapping[str, Any]

    def score(self, job: ScanJob, *, threads: int) -> tuple[np.ndarray, np.ndarray]:
        """logit float32 [n], NaN where a tile could not be read, and features float32 [n, D] of the tiles of a job whose rows count
        from 0. Raises SlideError where none can be read."""
        logit = np.full(len(job.tiles), np.nan, np.float32)
        parts: dict[int, np.ndarray] = {}
        shape = ScanShape.of(job.tiles.grid, block=BLOCK)
        for scored in self.scorer.score(self.folded, prefetch(scan([job], shape, threads=threads))):
            logit[scored.row] = scored.outputs["logit"]
            parts.update(zip(scored.row.tolist(), scored.outputs["features"]))
        if not parts:
            raise SlideError("none of its tiles could be read")
        features = np.zeros((len(logit), len(next(iter(parts.values())))), np.float32)
        features[list(parts)] = list(parts.values())
        return logit, features


@dataclasses.dataclass(frozen=True, eq=False)
class SlideFeatures:
    """What the screening network sees of S slides. features float32 [S, k, D], valid bool [S, k], label int [S], slide_id str [S];
    largest float32 [S]: the logit of the most malignant patch, which it does not see. A Reader: rows are slides."""

    features: np.ndarray
    valid: np.ndarray
    label: np.ndarray
    slide_id: np.ndarray
    largest: np.ndarray

    def read(self, rows: np.ndarray, *, size: int) -> PatchBatch:
        """The batch of these slides, filled up with padding to `size`."""
        arrays: dict[str, np.ndarray] = {
            "row": np.full(size, -1, np.int32),
            "weight": np.zeros(size, np.float32),
            "label": np.zeros(size, np.float32),
            "features": np.zeros((size, *self.features.shape[1:]), np.float32),
            "valid": np.zeros((size, *self.valid.shape[1:]), bool),
        }
        arrays["row"][: len(rows)], arrays["weight"][: len(rows)] = rows, 1
        for name in ("label", "features", "valid"):
            arrays[name][: len(rows)] = getattr(self, name)[rows]
        return PatchBatch(arrays, {})


def top_patches(logit: np.ndarray, *, k: int) -> np.ndarray:
    """int [k' <= k]: rows of the highest logits float [n] of a slide, best first, of equals the lowest row; none that is NaN."""
    rows, valid = select_top_k(jnp.asarray(logit), jnp.zeros(len(logit), jnp.int32), slides=1, k=k)
    return np.asarray(rows[0])[np.asarray(valid[0])]


def keep_features_of(networks: Checksums, folder: pathlib.Path) -> None:
    """Removes what is there of other networks, so that it is made again, and records these."""
    stale = list(folder.glob("*.npz")) if changed(folder, networks) else []
    if stale:
        print(f"{folder}: {len(stale)} files are of another multi-task network and are made again", flush=True)
    for file in stale:
        file.unlink()
    write_record(folder, networks)


def write_features(
    cohort: TiledCohort, network: PatchNetwork, folder: pathlib.Path, *, threads: int, stop: Callable[[], bool]
) -> dict[str, str]:
    """<slide_id>.npz for each slide that has none: of its k best patches logit [k'], x and y in level-0 pixels, and features [k', D];
    tiles: how many it has. Returns slide -> why it has no file. Raises Interrupted after a slide when asked to stop."""
    failed = {}
    slides = cohort.slides
    with progress(len(slides.records), "features", unit="slides") as bar:
        for number, record in enumerate(slides.records):
            bar.update()
            file = folder / f"{record.slide_id}.npz"
            if file.exists():
                continue
            tiles = slides.tiles.take(slides.rows(number))
            lend = functools.partial(cohort.shelf.lend, record.slide_id)
            try:
                logit, features = network.score(ScanJob(lend, tiles, np.arange(len(tiles))), threads=threads)
            except SlideError as error:
                failed[record.slide_id] = str(error)
                continue
            best = top_patches(logit, k=cohort.config.top_k)
            with atomic_write(file) as temporary, temporary.open("wb") as out:
                np.savez(
                    out,
                    logit=logit[best],
                    x=tiles.x[best],
                    y=tiles.y[best],
                    features=features[best],
                    tiles=np.int64(len(tiles)),
                    unreadable=np.int64(np.isnan(logit).sum()),
                )
            if stop():
                raise Interrupted(number + 1, saved=True)
    return failed


def read_features(folder: pathlib.Path, slide_ids: Sequence[str], label: np.ndarray, config: Config) -> SlideFeatures:
    """Of the slides that have a file. Raises SlideError where none has."""
    known = [number for number, name in enumerate(slide_ids) if (folder / f"{name}.npz").exists()]
    if not known:
        raise SlideError(f"{folder} holds features of no slide: run the stage `features` first")
    stored, largest = [], np.zeros(len(known), np.float32)
    for place, number in enumerate(known):
        with np.load(folder / f"{slide_ids[number]}.npz", allow_pickle=False) as file:
            stored.append(file["features"])
            largest[place] = file["logit"].max()
    features = np.zeros((len(known), config.top_k, stored[0].shape[1]), np.float32)
    valid = np.zeros((len(known), config.top_k), bool)
    for place, found in enumerate(stored):
        features[place, : len(found)], valid[place, : len(found)] = found, True
    return SlideFeatures(features, valid, label[known], np.asarray(slide_ids)[known], largest)
