"""What each library calls the weights of an EfficientNet."""

import dataclasses
from collections.abc import Callable, Iterator

from srcc_jax.models.efficientnet import Block, EfficientNetArchitecture
from srcc_jax.models.names import Entry, Path

Pair = tuple[str, str]


@dataclasses.dataclass(frozen=True)
class EfficientNetNaming:
    """How a library names an EfficientNet's arrays: `<module><separator><leaf>`.

    stem, top: its names of a convolution and its BatchNorm. block(block, number, parts): the pair of names of each part of
    a block, number counting all blocks from 0. sources: keys of efficientnet.SOURCES whose files are named so.
    """

    sources: tuple[str, ...]
    stem: Pair
    top: Callable[[EfficientNetArchitecture], Pair]
    classifier: str
    block: Callable[[Block, int, list[str]], dict[str, Pair]]
    leaf: Callable[[Path], tuple[str, tuple[int, ...]]]
    separator: str
    unread: tuple[str, ...] = ()

    @property
    def classifier_bias(self) -> str:
        """The name of the array that has one value for each class."""
        return f"{self.classifier}{self.separator}bias"

    def table(self, architecture: EfficientNetArchitecture) -> dict[str, Entry]:
        """Name in the file -> Entry, for every array of the network."""
        entries = {}
        for module, name in self._modules(architecture):
            for target in _arrays(module):
                leaf, axes = self.leaf(target)
                entries[f"{name}{self.separator}{leaf}"] = Entry(target, axes)
        return entries

    def _modules(self, architecture: EfficientNetArchitecture) -> Iterator[tuple[Path, str]]:
        yield from zip([("stem", "conv"), ("stem", "norm")], self.stem)
        for number, block in enumerate(architecture.blocks()):
            parts = ["expand"] * (block.expand != 1) + ["depthwise"] + ["squeeze_excite"] * (not architecture.lite)
            for part, names in self.block(block, number, [*parts, "project"]).items():
                children = ("reduce", "expand") if part == "squeeze_excite" else ("conv", "norm")
                yield from (((block.name, part, child), name) for child, name in zip(children, names))
        yield from zip([("top", "conv"), ("top", "norm")], self.top(architecture))
        yield ("classifier",), self.classifier


def _arrays(module: Path) -> list[Path]:
    """Paths of a module's arrays among the variables."""
    if module[-1] == "norm":
        collections = {"scale": "params", "bias": "params", "mean": "batch_stats", "var": "batch_stats"}
        return [(collection, *module, name) for name, collection in collections.items()]
    return [("params", *module, name) for name in (("kernel",) if module[-1] == "conv" else ("kernel", "bias"))]


def _torchvision_block(block: Block, number: int, parts: list[str]) -> dict[str, Pair]:
    """Parts are numbered as they come: without an expansion the depthwise convolution is number 0."""
    prefixes = {part: f"features.{block.stage}.{block.repeat}.block.{i}" for i, part in enumerate(parts)}
    leaves = {part: ("fc1", "fc2") if part == "squeeze_excite" else ("0", "1") for part in parts}
    return {part: (f"{prefixes[part]}.{leaves[part][0]}", f"{prefixes[part]}.{leaves[part][1]}") for part in parts}


def _timm_block(block: Block, number: int, parts: list[str]) -> dict[str, Pair]:
    """Without an expansion (DepthwiseSeparableConv) the projection is `conv_pw`, else the expansion is."""
    names = {"expand": ("conv_pw", "bn1"), "depthwise": ("conv_dw", "bn2"), "project": ("conv_pwl", "bn3")}
    if "expand" not in parts:
        names |= {"depthwise": ("conv_dw", "bn1"), "project": ("conv_pw", "bn2")}
    names["squeeze_excite"] = ("se.conv_reduce", "se.conv_expand")
    return _prefixed(f"blocks.{block.stage - 1}.{block.repeat}.", names, parts)


def _lukemelas_block(block: Block, number: int, parts: list[str]) -> dict[str, Pair]:
    names = {
        "expand": ("_expand_conv", "_bn0"),
        "depthwise": ("_depthwise_conv", "_bn1"),
        "squeeze_excite": ("_se_reduce", "_se_expand"),
        "project": ("_project_conv", "_bn2"),
    }
    return _prefixed(f"_blocks.{number}.", names, parts)


def _keras_block(block: Block, number: int, parts: list[str]) -> dict[str, Pair]:
    names = {
        "expand": ("expand_conv", "expand_bn"),
        "depthwise": ("dwconv", "bn"),
        "squeeze_excite": ("se_reduce", "se_expand"),
        "project": ("project_conv", "project_bn"),
    }
    return _prefixed(f"{block.name}_", names, parts)


def _prefixed(prefix: str, names: dict[str, Pair], parts: list[str]) -> dict[str, Pair]:
    return {part: (prefix + names[part][0], prefix + names[part][1]) for part in parts}


def _torch_leaf(path: Path) -> tuple[str, tuple[int, ...]]:
    """Name and axes of an array in torch: convolutions OIHW (depthwise [C, 1, k, k]), dense layers (out, in)."""
    if path[-2] == "norm":
        return {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}[path[-1]], (0,)
    if path[-1] == "bias":
        return "bias", (0,)
    return "weight", (1, 0) if path[-2] == "classifier" else (2, 3, 1, 0)


def _keras_leaf(path: Path) -> tuple[str, tuple[int, ...]]:
    """Name and axes of an array in Keras: our layout, except that depthwise kernels are [k, k, C, 1]."""
    if path[-2] == "norm":
        return {"scale": "gamma", "bias": "beta", "mean": "moving_mean", "var": "moving_variance"}[path[-1]], (0,)
    if path[-1] == "bias":
        return "bias", (0,)
    if path[-2] == "classifier":
        return "kernel", (0, 1)
    return "kernel", (0, 1, 3, 2) if path[-3] == "depthwise" else (0, 1, 2, 3)


NAMINGS = {
    "torchvision": EfficientNetNaming(
        sources=("torchvision",),
        stem=("features.0.0", "features.0.1"),
        top=lambda arch: (f"features.{len(arch.stages) + 1}.0", f"features.{len(arch.stages) + 1}.1"),
        classifier="classifier.1",
        block=_torchvision_block,
        leaf=_torch_leaf,
        separator=".",
    ),
    "timm": EfficientNetNaming(
        sources=("timm", "timm_tf", "timm_tf_ap"),
        stem=("conv_stem", "bn1"),
        top=lambda arch: ("conv_head", "bn2"),
        classifier="classifier",
        block=_timm_block,
        leaf=_torch_leaf,
        separator=".",
    ),
    "lukemelas": EfficientNetNaming(
        sources=("lukemelas",),
        stem=("_conv_stem", "_bn0"),
        top=lambda arch: ("_conv_head", "_bn1"),
        classifier="_fc",
        block=_lukemelas_block,
        leaf=_torch_leaf,
        separator=".",
    ),
    "keras": EfficientNetNaming(
        sources=("keras",),
        stem=("stem_conv", "stem_bn"),
        top=lambda arch: ("top_conv", "top_bn"),
        classifier="predictions",
        block=_keras_block,
        leaf=_keras_leaf,
        separator="/",
    ),
}
