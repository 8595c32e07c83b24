"""Gastric cancer screening with three networks (Yu et al. 2019): settings, the networks of each stage, losses and decisions.

A foreground network finds tissue on a small picture of a slide. A multi-task network gives each patch a malignancy and a map of
lesion. A screening network makes a slide's verdict of the features of its k most malignant patches. Numbers without 'ours' in
their text are the paper's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from srcc_jax.augment import AugmentConfig, augment
from srcc_jax.augment_masks import ViewConfig, random_views
from srcc_jax.losses import Loss, multi_task, pixel_cross_entropy, softmax_cross_entropy, weighted_mean
from srcc_jax.metrics import Interval, wilson_interval
from srcc_jax.models import zoo
from srcc_jax.models.architecture import Architecture, normalize
from srcc_jax.models.blur import BlurNet
from srcc_jax.models.foreground import ForegroundNet
from srcc_jax.models.screening import ScreeningNet
from srcc_jax.plateau import Plateau
from srcc_jax.settings import check_settings, setting

Judge = Callable[[Any, Mapping[str, jax.Array]], dict[str, jax.Array]]
"""(variables, batch) -> numbers of each example [B] by name, its `loss` among them, in inference mode."""

CLASSES = 2  # of the class branch: benign, malignant
_DLA = {"stem": "3x3", "activation": "leaky"}  # §5.1: three 3×3 convolutions first, InPlace-ABN

# --model -> network of the zoo and what is changed of it. Dense ones have the class branch beside their map of pixels.
MODELS: dict[str, tuple[str, Mapping[str, Any]]] = {
    "dla_dcn": ("dla34_dense", {**_DLA, "nodes": "deformable"}),
    "dla": ("dla34_dense", {}),
    "centernet": ("dla34_dense", {**_DLA, "decoder": "centernet"}),
    "unet": ("unet", {}),
    "fcn": ("fcn_resnet50", {}),
    "resnet34": ("resnet34", {}),
    "densenet121": ("densenet121", {}),
    "res2net50": ("res2net50_26w_4s", {}),
    "efficientnet_b4": ("b4", {}),
    "dla_single": ("dla34", {}),
    "tiny": ("unet", {"widths": (8, 16, 16), "batch_norm": True}),
    "tiny_single": ("resnet18", {"width": 8, "depths": (1, 1, 1, 1)}),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One run of all stages."""

    model: str = setting(
        "dla_dcn",
        "network of the patches. With a map of pixels: dla_dcn (§5.1, theirs), dla, centernet, unet, fcn; judging the patch "
        "alone: resnet34, densenet121, res2net50, efficientnet_b4, dla_single (Table 1); tiny, tiny_single: for tests",
        choices=tuple(MODELS),
    )
    positive: str = setting("malignant", "label that counts as positive; every other is negative (ours)")
    mpp: float = setting(0.5, "µm per pixel of patches (§3: 0.50)", above=0)
    tile: int = setting(512, "side of a patch in pixels (§5.1)", least=32)
    stride: int = setting(512, "stride of the grid in pixels (ours: no overlap; the paper gives none)", least=1)
    min_tissue: float = setting(0.1, "share of a patch that must be tissue (ours)", least=0, most=1)
    mask_mpp: float = setting(2.0, "µm per pixel of the refined masks on disk (ours)", above=0)
    min_lesion: float = setting(
        0.0, "a patch is malignant where more than this share of it is lesion (ours)", least=0, below=1
    )
    thumbnail: int = setting(512, "side in pixels to which whole slides are resized for the foreground (§5.1)", least=4)
    thumbnail_mpp: float = setting(15.7, "µm per pixel at which they are read (§4.1: ×0.635)", above=0)
    class_weight: float = setting(0.01, "λ, weight of the class loss beside that of the pixels (§5.1)", least=0)
    top_k: int = setting(64, "k, most malignant patches of a slide that its verdict is made of (§5.1)", least=1)
    width: int = setting(512, "features of the screening network's hidden layer (§5.1)", least=1)
    threshold: float = setting(0.74, "a slide is positive above this output of the screening network (§5.1)")
    learning_rate: float = setting(1e-3, "Adam's learning rate at the start, of every network (§5.1)", above=0)
    plateau_factor: float = setting(0.5, "factor on it when the validation loss stagnates (§5.1)", above=0, below=1)
    plateau_patience: int = setting(3, "epochs that it may stagnate (§5.1)", least=0)
    plateau_threshold: float = setting(1e-4, "share by which a loss must be lower to count (ours: torch's)", least=0)
    foreground_epochs: int = setting(100, "epochs of the foreground network (§5.1)", least=1)
    multitask_epochs: int = setting(100, "epochs of the multi-task network (§5.1)", least=1)
    screening_epochs: int = setting(20, "epochs of the screening network (§5.1)", least=1)
    blur_epochs: int = setting(20, "epochs of the blur gate (ours)", least=1)
    foreground_batch: int = setting(32, "slides in a batch of the foreground network (§5.1)", least=1)
    multitask_batch: int = setting(16, "patches in a batch of the multi-task network (§5.1)", least=1)
    screening_selection: str = setting(
        "last",
        "which screening network is kept; last: the one after all epochs, as the paper names no selection; loss: of the least "
        "validation loss, where validation slides are many (ours)",
        choices=("last", "loss"),
    )
    screening_batch: int = setting(32, "slides in a batch of the screening network (§5.1)", least=1)
    blur_batch: int = setting(32, "patches in a batch of the blur gate (ours)", least=1)
    epoch_patches: int | None = setting(
        None, "patches in an epoch of the multi-task network; none: all there are, once (ours)", least=1
    )
    validation_patches: int | None = setting(
        None, "validation patches, drawn once by the seed of the splits; none: all there are (ours)", least=1
    )
    balanced: bool = setting(False, "draw malignant and benign patches equally often (ours)")
    remat: bool = setting(
        False,
        "compute the insides of blocks again for the gradient instead of keeping them: InPlace-ABN's saving (§5.1)",
    )
    blur_side: int = setting(256, "side of the blur gate's patches in pixels (ours)", least=16)
    blur_radius: float = setting(
        2.0, "radius of defocus in µm from which on a patch counts as out of focus (ours)", above=0
    )
    blur_most: float = setting(8.0, "largest radius of defocus trained on, in µm (ours)", above=0)
    blur_patches: int = setting(16, "patches of each slide for the blur gate (ours)", least=1)
    crop: float = setting(
        0.75, "augmentation: least side that is cut out, as a share (ours; §5.2 names the kinds)", above=0, most=1
    )
    aspect: float = setting(0.2, "augmentation: largest change of the sides' ratio (ours)", least=0)
    contrast: float = setting(0.2, "augmentation: largest change of the contrast (ours)", least=0, below=1)
    foreground_density: float = setting(
        0.6,
        "augmentation of the foreground network's pictures: largest change of the optical density, for pale and dark stains (ours)",
        least=0,
        below=1,
    )
    noise: float = setting(8.0, "augmentation: largest deviation of Gaussian noise, of 255 (ours)", least=0)
    repeats: int = setting(4, "random sub-samplings, where the cohort table gives no splits (§5.2)", least=1)
    test_share: float = setting(0.3, "share of the patients in the test split of each (§5.2)", above=0, below=1)
    validation_share: float = setting(0.15, "share of the patients in the validation split (ours)", above=0, below=1)
    seed: int = setting(0, "seed of everything random in the run (ours)", least=0)
    split_seed: int = setting(0, "seed of the splits, so that models share them (ours)", least=0)

    def __post_init__(self) -> None:
        check_settings(self)
        if self.tile % 32 or self.thumbnail % 4:
            raise ValueError(f"--tile={self.tile} must be a multiple of 32, --thumbnail={self.thumbnail} one of 4")
        if self.blur_most < self.blur_radius:
            raise ValueError(f"--blur_most={self.blur_most:g} is below --blur_radius={self.blur_radius:g}")

    @property
    def dense(self) -> bool:
        """Whether the network of the patches also maps the lesion."""
        return zoo.family(MODELS[self.model][0]).dense

    @property
    def plateau(self) -> Plateau:
        """The rule of the learning rate."""
        return Plateau(
            base=self.learning_rate,
            factor=self.plateau_factor,
            patience=self.plateau_patience,
            threshold=self.plateau_threshold,
        )

    @property
    def views(self) -> ViewConfig:
        """What may happen to a training patch with its mask."""
        return ViewConfig(crop=self.crop, aspect=self.aspect, contrast=self.contrast, noise=self.noise)


def patch_architecture(config: Config, *, source: str | None = None, dtype: str = "float32") -> Architecture:
    """The network of the patches. source: whose conventions, a key of its family's sources; None: the first's."""
    name, changes = MODELS[config.model]
    family = zoo.family(name)
    fields = {field.name for field in dataclasses.fields(family.kind)}
    if config.remat and "remat" not in fields:
        raise ValueError(f"--remat has no meaning for --model={config.model}: leave it out")
    options: dict[str, Any] = {"dtype": dtype, **changes} | ({"remat": True} if config.remat else {})
    if family.dense:
        options["class_head"] = CLASSES
    return zoo.architecture(
        name, source=source or next(iter(family.sources)), classes=1 if family.dense else CLASSES, **options
    )


def malignancy_logit(outputs: Mapping[str, jax.Array]) -> jax.Array:
    """float32 [B]: its sigmoid is the softmax's share of the class malignant."""
    logits = outputs["logits"].astype(jnp.float32)
    return logits[:, 1] - logits[:, 0]


def unit_range(image: jax.Array) -> jax.Array:
    """0 to 255 -> -1 to 1, as the small networks see pictures."""
    return image.astype(jnp.float32) / 127.5 - 1


def patch_loss(config: Config, architecture: Architecture) -> Loss:
    """Eq. 1, or the class loss alone for a network without a map. batch: image uint8, mask uint8 [B, H, W], label (1: malignant),
    weight. Both see the same kinds of random views."""
    network = zoo.build(architecture)
    if config.dense:

        def prepare_both(image: jax.Array, mask: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
            pixels, lesion = random_views(image, mask, key, config.views)
            return normalize(pixels, architecture), lesion

        return multi_task(network, prepare=prepare_both, class_weight=config.class_weight)

    def prepare(image: jax.Array, key: jax.Array) -> jax.Array:
        nothing = jnp.zeros(image.shape[:3], jnp.uint8)
        return normalize(random_views(image, nothing, key, config.views)[0], architecture)

    loss = softmax_cross_entropy(network, prepare=prepare)

    def loss_fn(params: Any, stats: Any, batch: Mapping[str, jax.Array], key: jax.Array):
        return loss(params, stats, {**batch, "label": batch["label"].astype(jnp.int32)}, key)

    return loss_fn


def judge_patches(config: Config, architecture: Architecture) -> Judge:
    """Of each patch [B]: loss (eq. 1, without views), malignancy logit, and of a network with a map the pixels tp, fp, fn, called at
    probability 0.5. batch: as of `patch_loss`."""
    network = zoo.build(architecture)

    def judge(variables: Any, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        out: Any = network.apply(variables, normalize(batch["image"], architecture), train=False)
        logits, label = out["logits"].astype(jnp.float32), batch["label"].astype(jnp.int32)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, label)
        if not config.dense:
            return {"loss": loss, "logit": malignancy_logit(out)}
        loss = config.class_weight * loss + pixel_cross_entropy(out["dense"], batch["mask"])
        return {"loss": loss, "logit": malignancy_logit(out), **_pixel_counts(out["dense"], batch["mask"])}

    return judge


def _pixel_counts(dense: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
    """Pixels [B] rightly called, wrongly called and missed, where logits [B, H, W, 1] above 0 are called."""
    called, lesion = dense[..., 0] > 0, mask > 0
    counts = {"tp": called & lesion, "fp": called & ~lesion, "fn": ~called & lesion}
    return {name: pixels.sum((1, 2)) for name, pixels in counts.items()}


def foreground_loss(config: Config) -> Loss:
    """Mean cross-entropy of the pixels of thumbnails with masks of tissue; their views are those of the patches, and of other densities."""
    views = dataclasses.replace(config.views, density=config.foreground_density)

    def prepare(image: jax.Array, mask: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        pixels, tissue = random_views(image, mask, key, views)
        return unit_range(pixels), tissue

    return multi_task(ForegroundNet(), prepare=prepare, class_weight=0.0)


def judge_foreground(variables: Any, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """A Judge of thumbnails with masks of tissue: loss, and the pixels tp, fp, fn at probability 0.5."""
    out: Any = ForegroundNet().apply(variables, unit_range(batch["image"]), train=False)
    return {"loss": pixel_cross_entropy(out["dense"], batch["mask"]), **_pixel_counts(out["dense"], batch["mask"])}


def screening_loss(network: ScreeningNet) -> Loss:
    """Binary cross-entropy of slides. batch: features [B, k, D], valid [B, k], label and weight [B]."""

    def loss_fn(params: Any, stats: Any, batch: Mapping[str, jax.Array], key: jax.Array):
        del key
        out: Any = network.apply({"params": params}, batch["features"], batch["valid"], train=True)
        each = optax.sigmoid_binary_cross_entropy(out["logits"][:, 0], batch["label"].astype(jnp.float32))
        return weighted_mean(each, batch["weight"]), (stats, {})

    return loss_fn


def judge_slides(network: ScreeningNet) -> Judge:
    """Of each slide [B]: loss and logit. batch: as of `screening_loss`."""

    def judge(variables: Any, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        out: Any = network.apply(variables, batch["features"], batch["valid"], train=False)
        return _judged_logit(out["logits"][:, 0], batch["label"])

    return judge


def _judged_logit(logit: jax.Array, label: jax.Array) -> dict[str, jax.Array]:
    return {"loss": optax.sigmoid_binary_cross_entropy(logit, label.astype(jnp.float32)), "logit": logit}


def blur_loss(config: Config) -> Loss:
    """Binary cross-entropy of patches that are out of focus (label 1) or not. batch: image uint8, label, weight."""
    network = BlurNet()

    def loss_fn(params: Any, stats: Any, batch: Mapping[str, jax.Array], key: jax.Array):
        image = augment(batch["image"], key, AugmentConfig(brightness=0, contrast=config.contrast, saturation=0, hue=0))
        out: Any = network.apply({"params": params}, unit_range(image), train=True)
        each = optax.sigmoid_binary_cross_entropy(out["logits"][:, 0], batch["label"].astype(jnp.float32))
        return weighted_mean(each, batch["weight"]), (stats, {})

    return loss_fn


def judge_focus(variables: Any, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """A Judge of patches that are out of focus (label 1) or not: loss and logit."""
    out: Any = BlurNet().apply(variables, unit_range(batch["image"]), train=False)
    return _judged_logit(out["logits"][:, 0], batch["label"])


def youden_threshold(label: np.ndarray, score: np.ndarray) -> float:
    """The threshold with the largest sensitivity + specificity - 1 over slides called positive ABOVE it; of equals the highest.

    label int [S] of 0 and 1, both present; score float [S]. Thresholds lie halfway between neighbouring scores."""
    label, score = np.asarray(label) > 0, np.asarray(score, np.float64)
    values = np.unique(score)
    between = (values[1:] + values[:-1]) / 2 if len(values) > 1 else values
    gain = [((score > t) & label).sum() / label.sum() - ((score > t) & ~label).sum() / (~label).sum() for t in between]
    best = np.flatnonzero(np.isclose(gain, max(gain)))[-1]
    return float(between[best])


@dataclasses.dataclass(frozen=True)
class Verdicts:
    """Slides judged at a threshold: counts of the four outcomes, called positive where the score is ABOVE it (§5.1)."""

    tp: int
    fn: int
    tn: int
    fp: int

    @classmethod
    def at(cls, label: np.ndarray, score: np.ndarray, threshold: float) -> Verdicts:
        """label int [S] of 0 and 1, score float [S]."""
        truth, called = np.asarray(label) > 0, np.asarray(score) > threshold
        outcomes = (truth & called, truth & ~called, ~truth & ~called, ~truth & called)
        return cls(*(int(outcome.sum()) for outcome in outcomes))

    @property
    def sensitivity(self) -> Interval:
        """With its Wilson interval with continuity correction, as the paper has it."""
        return wilson_interval(self.tp, self.tp + self.fn)

    @property
    def specificity(self) -> Interval:
        """With its Wilson interval with continuity correction."""
        return wilson_interval(self.tn, self.tn + self.fp)
