"""Features of all tiles of slides, one HDF5 file a slide, in the layout of TRIDENT or CLAM.

    python -m experiments.extract_features --network=ckpt/resnet50 --slides=<file, folder or CSV> --out=features --mpp=0.5

Works as predict_slides does: the same command goes on with a run that was killed, inside a slide too; bad slides are rows of
out/slides.csv with their reason; --shard and --claim divide a cohort. docs/features.md says what is in the files.
"""

from __future__ import annotations

import pathlib
import re
import time

from absl import flags

from data_pipelines.tiles import Grid
from experiments.run import cohort_program, cohort_summary
from experiments.run.feature_outputs import DTYPES, LAYOUTS, FeatureSettings, FeatureTask
from experiments.run.model import Model, Network, load
from experiments.run.program import UsageError, run, start_devices
from experiments.run.scoring import classifier_scorer
from experiments.run.slide_state import model_hash
from srcc_jax.models.features import widths
from srcc_jax.parallel import make_mesh

_COHORT = cohort_program.define_cohort_flags()
_NETWORK = flags.DEFINE_string(
    "network", None, "folder that import_weights made, or work directory of a finished model", required=True
)
_MPP = flags.DEFINE_float("mpp", None, "µm per pixel of the tiles; none: the model's", lower_bound=0)
_TILE = flags.DEFINE_integer(
    "tile", None, "side of the tiles in pixels; none: the model's, or 224 for imported weights", lower_bound=1
)
_STRIDE = flags.DEFINE_integer(
    "stride", None, "distance of the tiles in pixels; none: the model's, or --tile", lower_bound=1
)
_MIN_TISSUE = flags.DEFINE_float(
    "min_tissue",
    None,
    "tiles with less tissue than this share are left out; none: the model's, or 0.5",
    lower_bound=0,
    upper_bound=1,
)
_POOLING = flags.DEFINE_string(
    "pooling",
    "mean",
    "mean, max or mean_max of the last maps, or the name of others, such as stage3, for their mean",
)
_LAYOUT = flags.DEFINE_enum("layout", "trident", list(LAYOUTS), "whose files to write")
_DTYPE = flags.DEFINE_enum("dtype", "float32", list(DTYPES), "of the features in the files; CLAM takes float32 alone")
_ENCODER = flags.DEFINE_string(
    "encoder", None, "what the files call the network; none: its name, and --pooling where that is not mean"
)
_SCORES = flags.DEFINE_bool("scores", False, "the probability too, where --network is a finished model")


def main() -> int:
    """Extracts, writes the table, and returns the exit status."""
    began = time.perf_counter()
    start_devices()
    network = load(_NETWORK.value)
    settings = _settings(network)
    width = _width(network, settings)
    scorer = classifier_scorer(
        network.architecture,
        tile=settings.grid.tile,
        mesh=make_mesh(),
        cam=False,
        logit=settings.scores,
        pooling=settings.pooling,
    )
    task = FeatureTask(settings, pathlib.Path(_COHORT.out.value).absolute(), network.architecture.name, width)
    outcome = cohort_program.run_cohort(_COHORT, task, scorer, network.variables, began=began)
    if outcome.whole:
        cohort_summary.write_slides(outcome.out, outcome.results, task.measures)
        print(f"{outcome.out / 'slides.csv'}; {width} features a tile")
    return cohort_program.end(_COHORT, outcome)


def _settings(network: Network | Model) -> FeatureSettings:
    if _SCORES.value and not isinstance(network, Model):
        raise UsageError(f"--scores: {_NETWORK.value} holds imported weights, which judge no slides")
    min_tissue = network.min_tissue if isinstance(network, Model) else 0.5
    name = network.architecture.name
    encoder = _ENCODER.value or (name if _POOLING.value == "mean" else f"{name}_{_POOLING.value}")
    if not re.fullmatch(r"[\w.+-]+", encoder):
        raise UsageError(f"--encoder={encoder}: it becomes a part of names of files: letters, digits and . + - _")
    return FeatureSettings(
        grid=_grid(network),
        min_tissue=min_tissue if _MIN_TISSUE.value is None else _MIN_TISSUE.value,
        mpp_override=_COHORT.mpp_override.value,
        model=model_hash(network.architecture, network.variables),
        pooling=_POOLING.value,
        dtype=_DTYPE.value,
        layout=_LAYOUT.value,
        encoder=encoder,
        scores=_SCORES.value,
    )


def _grid(network: Network | Model) -> Grid:
    if isinstance(network, Model):
        tile, mpp = _TILE.value or network.grid.tile, _MPP.value or network.grid.mpp
        stride = _STRIDE.value or (network.grid.stride if tile == network.grid.tile else tile)
    elif not _MPP.value:
        raise UsageError(
            f"--mpp is needed: the weights in {_NETWORK.value} do not say which µm per pixel they are for; 0.5 is x20"
        )
    else:
        tile, mpp = _TILE.value or 224, _MPP.value
        stride = _STRIDE.value or tile
    if stride > tile:
        raise UsageError(f"--stride={stride} is larger than the tile of {tile} px: tissue between tiles is not seen")
    return Grid(tile=tile, stride=stride, mpp=mpp)


def _width(network: Network | Model, settings: FeatureSettings) -> int:
    """Numbers of a tile."""
    try:
        known = widths(network.architecture, side=settings.grid.tile)
    except ValueError as error:
        raise UsageError(f"--tile={settings.grid.tile}: {error}") from error
    if settings.pooling not in known:
        raise UsageError(
            f"--pooling={settings.pooling}: {network.architecture.name} has {', '.join(known)}: choose one of them"
        )
    return known[settings.pooling]


if __name__ == "__main__":
    run(main)
