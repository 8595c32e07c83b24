"""One model of a run of cell detection: its state, optimiser and step, its training on given masks, its predictions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import optax
from jax.sharding import Mesh

from data_pipelines.cell_crops import CropReader, CropSampler, CropSource, crop_batches
from data_pipelines.cell_images import ANNOTATED, NORMAL, UNLABELLED, CellImage, load_image
from experiments.run.cells.inference import CellScorer
from experiments.run.progress import progress
from experiments.run.workdir import Workdir
from srcc_jax.checkpoints import Checkpoints
from srcc_jax.instances import Instances, find_instances
from srcc_jax.methods.cell_detection import Config, make_loss
from srcc_jax.models.architecture import Architecture
from srcc_jax.train import fit, init_state, make_train_step

SAVE_STEPS = 100  # ours: what a kill costs at most


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a run is: its devices, its folder, threads that read, and whether it is asked to stop."""

    mesh: Mesh
    workdir: Workdir
    threads: int
    stop: Callable[[], bool]


class Learner:
    """Model number `number` of a run, in models/<name> of the work directory. A context manager, as its checkpoints are."""

    def __init__(
        self, number: int, config: Config, architecture: Architecture, variables: Mapping[str, Any], place: Place
    ) -> None:
        self.name = f"{number}_{architecture.name}"
        self.architecture = architecture
        self._config, self._place, self._seed = config, place, (config.seed, number)
        tx = optax.flatten(
            optax.adam(config.learning_rate)
        )  # one vector instead of hundreds of arrays: less to compile
        self._step = make_train_step(make_loss(architecture, config), tx, place.mesh)
        self._scorer = CellScorer(architecture, window=config.window, overlap=config.overlap, mesh=place.mesh)
        self._checkpoints = Checkpoints(str(place.workdir.path / "models" / self.name))
        fresh = init_state(variables, tx, 2 * config.seed + number, place.mesh)
        self._state = self._checkpoints.resume(fresh)

    def __enter__(self) -> Learner:
        return self

    def __exit__(self, *failure: object) -> None:
        self._checkpoints.__exit__(*failure)

    @property
    def step(self) -> int:
        """Steps taken."""
        return int(self._state.step)

    @property
    def variables(self) -> dict[str, Any]:
        """{"params", "batch_stats"} after the last step."""
        return {"params": self._state.params, **self._state.stats}

    def train(self, sources: Sequence[CropSource], until: int) -> None:
        """Goes on to step `until` on crops of these images. Raises Interrupted, TrainingDiverged, BoxesError."""
        reader = CropReader(sources, side=self._config.crop, reduce=self._config.reduce)
        sampler = crop_sampler(self._config, [source.image for source in sources], self._seed)

        def batches(begin: int) -> Iterator[Mapping[str, np.ndarray]]:
            with progress(until - begin, f"training {self.name}", unit="steps") as bar:
                for batch in crop_batches(reader, sampler, begin=begin, end=until, threads=self._place.threads):
                    yield batch
                    bar.update()

        result = fit(
            self._step,
            self._state,
            batches,
            num_steps=until,
            mesh=self._place.mesh,
            every=SAVE_STEPS,
            checkpoints=self._checkpoints,
            log=lambda step, row: self._place.workdir.log(self.name, step, row),
            stop=self._place.stop,
        )
        self._state = result.state

    def predictor(self) -> Callable[[CellImage], np.ndarray]:
        """image -> probabilities float32 [H, W, 3] of the reduced image, by the weights as they are when this is called."""
        folded = self._scorer.fold(self.variables)
        return lambda image: self._scorer.probabilities(folded, load_image(image, reduce=self._config.reduce))


def instances_of(config: Config, probability: np.ndarray, threshold: float) -> Instances:
    """The cells on an image of its own, by the settings of a run."""
    return find_instances(probability, threshold=threshold, min_area=config.min_area, beta=config.beta)


def crop_sampler(config: Config, images: Sequence[CellImage], seed: Sequence[int]) -> CropSampler:
    """Draws crops by the shares of the settings; a kind without images gives its share to the others."""
    kind = np.array([image.kind for image in images])
    unlabelled = config.unlabelled_share * (1 - config.negative_share)
    wanted = {NORMAL: config.negative_share, UNLABELLED: unlabelled, ANNOTATED: 1 - config.negative_share - unlabelled}
    pools = {name: np.flatnonzero(kind == name) for name in wanted if (kind == name).any() and wanted[name]}
    size = np.array([(image.height // config.reduce, image.width // config.reduce) for image in images])
    shares = [wanted[name] for name in pools]
    return CropSampler(size, list(pools.values()), shares, config.crop, config.batch, seed)
