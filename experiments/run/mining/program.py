"""What programs of hard negative mining share: flags, devices, network, and the run of one seed."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from absl import flags
from jax.sharding import Mesh

from data_pipelines.patches import Patches
from experiments.run.mining.stages import MiningRun
from experiments.run.mining.weak_sets import WeakSet
from experiments.run.patch_training import PatchTrainer, Recipe
from experiments.run.program import UsageError, start_devices
from experiments.run.starting import arithmetic, pretrained_network, random_network
from experiments.run.workdir import Workdir
from srcc_jax.augment_patches import PatchViewConfig, patch_views
from srcc_jax.methods.negative_mining import Config, split_units, subset
from srcc_jax.models import zoo
from srcc_jax.models.architecture import Architecture
from srcc_jax.parallel import make_mesh

CLASSES = 2


@dataclasses.dataclass(frozen=True)
class MiningFlags:
    """The flags of programs that mine."""

    pretrained: flags.FlagHolder
    source: flags.FlagHolder
    dtype: flags.FlagHolder
    threads: flags.FlagHolder


def define_mining_flags() -> MiningFlags:
    """Called once, by the program."""
    return MiningFlags(
        pretrained=flags.DEFINE_string(
            "pretrained",
            None,
            "ImageNet weights of --backbone: a folder made by import_weights, or a file (.pth, .safetensors, .npz, .h5); none: random "
            "weights",
        ),
        source=flags.DEFINE_enum(
            "pretrained_source", None, list(zoo.SOURCES), "who published --pretrained, where its names do not tell"
        ),
        dtype=flags.DEFINE_enum(
            "dtype", "auto", ["auto", "float32", "bfloat16"], "arithmetic; auto: bfloat16 on GPU and TPU"
        ),
        threads=flags.DEFINE_integer("threads", 2, "threads that read patches or slides", lower_bound=1),
    )


def start(config: Config) -> Mesh:
    """The devices. Raises UsageError where a batch does not fit them."""
    start_devices(batch=config.batch)
    mesh = make_mesh()
    for name in ("batch", "scoring_batch"):
        size = getattr(config, name)
        if size % mesh.size:
            raise UsageError(
                f"--{name}={size} cannot be split over {mesh.size} devices: give a multiple of {mesh.size}"
            )
    return mesh


@dataclasses.dataclass(frozen=True)
class Start:
    """Where fits begin: begin(seed) gives the network and its variables, whose head depends on the seed."""

    architecture: Architecture
    begin: Callable[[int], dict[str, Any]]


def start_of(given: MiningFlags, config: Config) -> Start:
    """The network of the flags. Raises UsageError, WeightsError or WorkdirError."""
    if config.backbone not in zoo.CLASSIFIERS:
        raise UsageError(f"--backbone={config.backbone} is no classifier: choose one of {', '.join(zoo.CLASSIFIERS)}")

    def network(seed: int) -> tuple[Architecture, dict[str, Any]]:
        key = jax.random.fold_in(jax.random.key(seed), 1)
        options: dict[str, Any] = {"backbone": config.backbone, "classes": CLASSES, "key": key}
        changes: dict[str, Any] = {"dtype": arithmetic(given.dtype.value)}
        if config.bn_momentum is not None:
            changes["bn_momentum"] = config.bn_momentum
        if given.pretrained.value:
            return pretrained_network(given.pretrained.value, source=given.source.value, changes=changes, **options)
        return random_network(changes=changes, **options)

    first, variables = network(config.seed)
    if config.swap_channels:
        first = dataclasses.replace(first, channels={"rgb": "bgr", "bgr": "rgb"}[first.channels])
    return Start(first, lambda seed: variables if seed == config.seed else network(seed)[1])


def trainer_of(
    config: Config, net: Architecture, mesh: Mesh, *, threads: int, stop: Callable[[], bool]
) -> PatchTrainer:
    """One for all fits of a program."""
    recipe = Recipe(
        batch=config.batch,
        scoring_batch=config.scoring_batch,
        epochs=config.epochs,
        epoch_steps=config.epoch_steps,
        learning_rate=config.learning_rate,
        schedule=config.schedule,
        balanced=config.balanced,
    )
    return PatchTrainer(net, recipe, mesh, views=views_of(config, mesh), threads=threads, stop=stop)


def views_of(config: Config, mesh: Mesh):
    """The released code's random views, whose distances in pixels are of patches of 224 px; None where none are asked for."""
    if not config.views:
        return None
    scaled = PatchViewConfig()
    scaled = dataclasses.replace(scaled, elastic_affine=scaled.elastic_affine * config.tile / 224)
    return functools.partial(patch_views, config=scaled, mesh=mesh)


@dataclasses.dataclass(frozen=True)
class Bench:
    """All that the runs of a program share. hard: with splits as far as they are given. settings: all that decide the result."""

    config: Config
    start: Start
    trainer: PatchTrainer
    hard: Patches
    weak_set: WeakSet
    workdir: Workdir
    mesh: Mesh
    settings: Mapping[str, Any]

    def run(self, *, seed: int, name: str = "", positive: float = 1.0, negative: float = 1.0) -> MiningRun:
        """The run of a seed, on a share of the training patches of each class, in a folder of its own."""
        config = dataclasses.replace(self.config, seed=seed)
        patches = with_splits(self.hard, seed=seed)
        train = patches.rows("train")
        label = patches.is_one_of(config.positives).astype(int)[train]
        kept = train[subset(label, positive=positive, negative=negative, seed=seed)]
        return MiningRun(
            config=config,
            trainer=self.trainer,
            variables=self.start.begin(seed),
            patches=patches,
            weak_set=self.weak_set,
            folder=self.workdir.path / (f"seed_{seed}_{name}" if name else f"seed_{seed}"),
            workdir=self.workdir,
            mesh=self.mesh,
            train=kept,
        )


def with_splits(patches: Patches, *, seed: int) -> Patches:
    """Splits that are given stay; otherwise they are drawn by the seed, units whole."""
    if (patches.split != "").all():
        return patches
    return dataclasses.replace(patches, split=split_units(patches.unit, seed=seed))


def decisive_settings(config: Config, hard: Patches, weak_set: WeakSet, **more: Any) -> dict[str, Any]:
    """Everything that decides the result: another value of any of it needs another work directory."""
    return {**dataclasses.asdict(config), "hard": hard.digest(), "weak": weak_set.digest, **more}
