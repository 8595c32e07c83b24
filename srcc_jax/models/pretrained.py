"""Published weights under our names, for each library that publishes the networks of the zoo, and back.

Weights are right only under the conventions they were trained with (padding, BatchNorm constants, scaling of the image):
`source_conventions` gives the architecture that has them, and `load` refuses weights of another library than the
architecture's. Every array of the file must be used and every array of the network filled.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from srcc_jax.models import zoo
from srcc_jax.models.architecture import IMAGENET_STD, Architecture
from srcc_jax.models.names import Entry

Arrays = Mapping[str, np.ndarray]

_CLASSIFIER = ("params", "classifier")
_MEAN, _VARIANCE, _COUNT = (f"normalization/{name}" for name in ("mean", "variance", "count"))


class PretrainedError(ValueError):
    """Weights that do not fit the network; the message lists everything that does not."""


def detect_naming(arrays: Arrays, architecture: Architecture) -> str:
    """The key of the family's namings under which most of the arrays are found in the network's table."""
    names, namings = set(_canonical(arrays)), zoo.family(architecture.name).namings
    hits = {key: len(names & set(_table(key, architecture))) for key in namings}
    best = max(hits, key=hits.__getitem__)
    if not hits[best]:
        raise PretrainedError(
            f"none of the {len(names)} weights has a name that {', '.join(namings)} give to {architecture.name}; "
            f"the first names are {', '.join(sorted(names)[:5])}"
        )
    return best


def _table(key: str, architecture: Architecture) -> dict[str, Entry]:
    """The table of a naming: of the network itself, or as the library would make it where the conventions are another's."""
    family = zoo.family(architecture.name)
    naming = family.namings[key]
    if architecture.source not in naming.sources:
        architecture = family.architecture(architecture.name, source=naming.sources[0], classes=architecture.classes)
    return naming.table(architecture)


def source_conventions(
    arrays: Arrays, variant: str, *, source: str | None = None, classes: int | None = None
) -> Architecture:
    """The architecture that a file's weights were trained as: variant (one of zoo.VARIANTS) and conventions.

    source: a key of the family's sources, needed where the names do not tell it (timm gives the same names to its own
    weights and to TensorFlow's). classes: of the network to be built; by default those of the file's classifier.
    """
    family = zoo.family(variant)
    naming = family.namings[
        detect_naming(arrays, family.architecture(variant, source=next(iter(family.sources)), classes=1))
    ]
    if source is None and len(naming.sources) > 1:
        raise PretrainedError(
            "the names of the weights come with different conventions: name their source, one of "
            f"{', '.join(naming.sources)} (timm: efficientnet_*; timm_tf: tf_efficientnet_*; timm_tf_ap: tf_efficientnet_*.ap_*)"
        )
    if source is not None and source not in naming.sources:
        raise PretrainedError(
            f"the names of the weights are those of {' or '.join(naming.sources)}, so the source cannot be {source}"
        )
    known = _canonical(arrays)
    if classes is None:
        if naming.classifier_bias not in known:
            raise PretrainedError(
                f"the file has no classifier ({naming.classifier_bias}): say how many classes the network is to have"
            )
        classes = len(known[naming.classifier_bias])
    return family.architecture(variant, source=source or naming.sources[0], classes=classes, **_image_scaling(known))


def load(
    arrays: Arrays, architecture: Architecture, variables: Mapping[str, Any], *, replace_head: bool
) -> dict[str, Any]:
    """Variables of `zoo.build(architecture)` filled with the arrays of a file, as float32.

    variables: fresh ones, or only their shapes where the head is not replaced. replace_head: keep the classifier of
    `variables` and leave the file's, where it has one, unread. Otherwise every array of the file is used and every
    variable filled, or one PretrainedError lists all that does not fit.
    """
    naming = detect_naming(arrays, architecture)
    if architecture.source not in zoo.family(architecture.name).namings[naming].sources:
        raise PretrainedError(
            f"the weights have {naming}'s names, the architecture the conventions of {architecture.source}: "
            f"make the architecture with source_conventions(weights, {architecture.name!r})"
        )
    known, fresh = _canonical(arrays), flatten_dict(variables)
    _check_image_scaling(known, architecture)
    table = _table(naming, architecture)
    head = {name for name, entry in table.items() if replace_head and entry.target[:2] == _CLASSIFIER}
    table = {name: entry for name, entry in table.items() if name not in head}
    _check_total({name: known[name] for name in known if name not in head}, table, fresh)
    filled = {entry.target: jnp.asarray(entry.read(known[name]), jnp.float32) for name, entry in table.items()}
    return unflatten_dict(fresh | filled)


def export(variables: Mapping[str, Any], architecture: Architecture, naming: str) -> dict[str, np.ndarray]:
    """The variables by the names and in the layouts of a library (a key of the family's namings): the inverse of `load`."""
    ours = flatten_dict(variables)
    table = zoo.family(architecture.name).namings[naming].table(architecture)
    return {name: entry.write(np.asarray(ours[entry.target])) for name, entry in table.items()}


def _check_total(known: Arrays, table: Mapping[str, Entry], fresh: Mapping[tuple[str, ...], Any]) -> None:
    """One error for all: what the file lacks, what the network has no place for, and what has another shape."""
    missing = [name for name in table if name not in known]
    extra = [name for name in known if name not in table and name not in (_MEAN, _VARIANCE, _COUNT)]
    reshaped = [
        f"{name} {list(known[name].shape)} for {list(fresh[entry.target].shape)} (our layout)"
        for name, entry in table.items()
        if name in known and _shape_in_ours(known[name], entry) != fresh[entry.target].shape
    ]
    problems = {"missing from the file": missing, "without a place in the network": extra, "of another shape": reshaped}
    if not any(problems.values()):
        return
    listed = "; ".join(f"{len(names)} {what}: {', '.join(names)}" for what, names in problems.items() if names)
    head = any(table[name.split(" ")[0]].target[:2] == _CLASSIFIER for name in missing + reshaped)
    cure = "; replace_head=True keeps a fresh classifier instead of the file's" if head else ""
    count = sum(map(len, problems.values()))
    raise PretrainedError(f"{count} of {len(table)} weights unmatched: {listed}{cure}")


def _shape_in_ours(array: np.ndarray, entry: Entry) -> tuple[int, ...] | None:
    return tuple(array.shape[axis] for axis in entry.axes) if array.ndim == len(entry.axes) else None


def _canonical(arrays: Arrays) -> dict[str, np.ndarray]:
    """Arrays by Keras's present names (`layer/depthwise_kernel:0` is its older spelling), without torch's step counters."""
    names = {name: name.removesuffix(":0").replace("/depthwise_kernel", "/kernel") for name in arrays}
    if len(set(names.values())) < len(names):
        raise PretrainedError("some weights are there twice, in the old and in the new spelling of Keras's names")
    return {new: arrays[old] for old, new in names.items() if not new.endswith(".num_batches_tracked")}


def _image_scaling(known: Arrays) -> dict[str, tuple[float, ...]]:
    """mean and std in units of 0 to 255 from Keras's Normalization layer, which sees pixels / 255; {} where there is none.

    The published files hold the standard deviation where the variance belongs (their model divides by its root once
    more); files saved from other models hold the variance.
    """
    if _MEAN not in known or _VARIANCE not in known:
        return {}
    mean, variance = (np.asarray(known[name], np.float64).reshape(3) for name in (_MEAN, _VARIANCE))
    published = np.allclose(255 * variance, IMAGENET_STD, rtol=1e-3)
    std = variance if published else np.sqrt(variance)
    return {name: tuple(np.round(255 * value, 5).tolist()) for name, value in (("mean", mean), ("std", std))}


def _check_image_scaling(known: Arrays, architecture: Architecture) -> None:
    for name, values in _image_scaling(known).items():
        ours = getattr(architecture, name)
        if not np.allclose(values, ours, rtol=1e-3, atol=1e-2):
            raise PretrainedError(f"the file's Normalization layer has {name} {values}, the architecture {ours}")
