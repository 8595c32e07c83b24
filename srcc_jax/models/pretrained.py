"""Published weights under our names, for each library that publishes the networks of the zoo, and back.

Weights are right only under the conventions they were trained with (padding, BatchNorm constants, scaling of the image):
`source_conventions` gives the architecture that has them, and `load` refuses weights of another library than the
architecture's. Every array of the file must be used and every array of the network filled.
"""

import dataclasses
import functools
from collections.abc import Collection, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from srcc_jax.models import zoo
from srcc_jax.models.architecture import IMAGENET_STD, Architecture
from srcc_jax.models.layers import variable_shapes
from srcc_jax.models.names import Entry, Path

Arrays = Mapping[str, np.ndarray]

_MEAN, _VARIANCE, _COUNT = (f"normalization/{name}" for name in ("mean", "variance", "count"))


class PretrainedError(ValueError):
    """Weights that do not fit the network; the message lists everything that does not."""


def detect_naming(arrays: Arrays, architecture: Architecture) -> str:
    """The key of the family's namings under which most of the arrays are found in the network's table; of equals, that of the
    architecture's source."""
    names, namings = set(_canonical(arrays)), zoo.family(architecture.name).namings
    hits = {
        key: (len(names & {*_table(key, architecture), *naming.unread}), architecture.source in naming.sources)
        for key, naming in namings.items()
    }
    best = max(hits, key=hits.__getitem__)
    if not hits[best][0]:
        raise PretrainedError(
            f"none of the {len(names)} weights has a name that {', '.join(namings)} give to {architecture.name}; "
            f"the first names are {', '.join(sorted(names)[:5])}"
        )
    return best


@functools.lru_cache(maxsize=64)  # a network has to be traced for it
def _table(key: str, architecture: Architecture) -> Mapping[str, Entry]:
    """The table of a naming: of the network itself, or as the library would make it where the conventions are another's. Empty
    where the library does not have this variant."""
    family = zoo.family(architecture.name)
    naming = family.namings[key]
    if architecture.source not in naming.sources:
        try:
            architecture = family.architecture(
                architecture.name, source=naming.sources[0], classes=architecture.classes
            )
        except ValueError:
            return {}
    return naming.table(architecture)


def source_conventions(
    arrays: Arrays, variant: str, *, source: str | None = None, classes: int | None = None, **changes: Any
) -> Architecture:
    """The architecture that a file's weights were trained as: variant (one of zoo.VARIANTS) and conventions.

    source: a key of the family's sources, needed where the names do not tell it (timm gives the same names to its own
    weights and to TensorFlow's). classes: of the network to be built; by default those of the file's classifier; 0: none.
    changes: fields of the family's architecture, where the file has another shape (`stages` of a ResNet that ends early).
    """
    family = zoo.family(variant)
    try:
        supposed = family.architecture(variant, source=source or next(iter(family.sources)), classes=1)
    except ValueError as error:
        raise PretrainedError(str(error)) from error
    naming = family.namings[detect_naming(arrays, supposed)]
    if source is None and len({family.sources[name] for name in naming.sources}) > 1:
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
    changes |= _image_scaling(known)
    return family.architecture(variant, source=source or naming.sources[0], classes=classes, **changes)


def load(
    arrays: Arrays, architecture: Architecture, variables: Mapping[str, Any], *, replace_head: bool
) -> dict[str, Any]:
    """Variables of `zoo.build(architecture)` filled with the arrays of a file, as float32.

    variables: fresh ones, or only their shapes where the head is not replaced. replace_head: keep the head of `variables`,
    which may have none, and leave the file's, where it has one, unread. Otherwise every array of the file is used and every
    variable filled, or one PretrainedError lists all that does not fit.
    """
    naming, known, fresh = _naming(arrays, architecture), _canonical(arrays), flatten_dict(variables)
    _check_image_scaling(known, architecture)
    table, unread = _table(naming, architecture), set(_unread(naming, architecture))
    if replace_head:
        head = _head(architecture)
        whole = _table(naming, dataclasses.replace(architecture, classes=max(1, architecture.classes)))
        unread |= {name for name, entry in whole.items() if entry.target in head}
        table = {name: entry for name, entry in table.items() if name not in unread}
    _check_total(_without(known, unread), table, fresh, architecture)
    return _filled(known, table, fresh)


def load_trunk(
    arrays: Arrays,
    architecture: Architecture,
    variables: Mapping[str, Any],
    *,
    module: str = "",
    keep: Collection[str] = (),
) -> dict[str, Any]:
    """Variables of a network that contains a classifier's trunk, with that trunk filled, as float32.

    architecture: of the classifier that the file holds, as `source_conventions` gives it. module: the name of the trunk in
    the network; "": the network is the trunk. The trunk may end before the classifier does: what the file has beyond (later
    stages, head) stays unread, and so does what it has for the modules in `keep`, which stay as they are in `variables` (a stem
    of another shape). Every other array of the file is used and every variable of the trunk filled, or one
    PretrainedError lists all that does not fit.
    """
    naming, known, fresh = _naming(arrays, architecture), _canonical(arrays), flatten_dict(variables)
    place = (module,) if module else ()
    whole = {
        name: dataclasses.replace(entry, target=(entry.target[0], *place, *entry.target[1:]))
        for name, entry in _table(naming, architecture).items()
    }
    trunk = {path for path in fresh if path[1 : 1 + len(place)] == place and path[1 + len(place)] not in keep}
    table = {name: entry for name, entry in whole.items() if entry.target in trunk}
    strange = sorted("/".join(path) for path in trunk - {entry.target for entry in table.values()})
    if strange or not trunk:
        raise PretrainedError(
            f"the trunk {module!r} is not that of {architecture.name}, which has no {', '.join(strange) or 'such module'}"
        )
    _check_total(_without(known, {*_unread(naming, architecture), *(whole.keys() - table.keys())}), table, fresh, None)
    return _filled(known, table, fresh)


def transfer(trained: Mapping[str, Any], variables: Mapping[str, Any], architecture: Architecture) -> dict[str, Any]:
    """Fresh variables of an architecture with their trunk taken from trained ones of the same network, whose classes and
    later stages may be others. The head stays fresh. PretrainedError names all that is not there in this shape."""
    ours, fresh, head = flatten_dict(trained), flatten_dict(variables), _head(architecture)
    wanted = {path: leaf.shape for path, leaf in fresh.items() if path not in head}
    wrong = ["/".join(path) for path, shape in wanted.items() if path not in ours or ours[path].shape != shape]
    if wrong:
        raise PretrainedError(
            f"{len(wrong)} of {len(wanted)} arrays of {architecture.name} are not among the weights: {', '.join(wrong)}"
        )
    return unflatten_dict(fresh | {path: jnp.asarray(ours[path], jnp.float32) for path in wanted})


def export(variables: Mapping[str, Any], architecture: Architecture, naming: str) -> dict[str, np.ndarray]:
    """The variables by the names and in the layouts of a library (a key of the family's namings): the inverse of `load`."""
    ours = flatten_dict(variables)
    table = zoo.family(architecture.name).namings[naming].table(architecture)
    return {name: entry.write(np.asarray(ours[entry.target])) for name, entry in table.items()}


def _naming(arrays: Arrays, architecture: Architecture) -> str:
    """The key of the file's naming. PretrainedError where it is not one of the architecture's source."""
    key = detect_naming(arrays, architecture)
    if architecture.source not in zoo.family(architecture.name).namings[key].sources:
        raise PretrainedError(
            f"the weights have {key}'s names, the architecture the conventions of {architecture.source}: "
            f"make the architecture with source_conventions(weights, {architecture.name!r})"
        )
    return key


def _unread(naming: str, architecture: Architecture) -> tuple[str, ...]:
    return zoo.family(architecture.name).namings[naming].unread


def _head(architecture: Architecture) -> set[Path]:
    """The arrays whose shape depends on the number of classes."""
    one, two = (
        flatten_dict(variable_shapes(zoo.build(dataclasses.replace(architecture, classes=classes))))
        for classes in (1, 2)
    )
    return {path for path, leaf in one.items() if leaf.shape != two[path].shape}


def _without(known: Arrays, names: Collection[str]) -> dict[str, np.ndarray]:
    return {name: array for name, array in known.items() if name not in names}


def _filled(known: Arrays, table: Mapping[str, Entry], fresh: Mapping[Path, Any]) -> dict[str, Any]:
    filled = {entry.target: jnp.asarray(entry.read(known[name]), jnp.float32) for name, entry in table.items()}
    return unflatten_dict({**fresh, **filled})


def _check_total(
    known: Arrays, table: Mapping[str, Entry], fresh: Mapping[Path, Any], architecture: Architecture | None
) -> None:
    """One error for all: what the file lacks, what the network has no place for, and what has another shape.

    architecture: of the network, where its head could be replaced.
    """
    missing = [name for name in table if name not in known]
    extra = [name for name in known if name not in table and name not in (_MEAN, _VARIANCE, _COUNT)]
    reshaped = [
        name for name, entry in table.items() if name in known and entry.shape(known[name]) != fresh[entry.target].shape
    ]
    if not (missing or extra or reshaped):
        return
    shapes = [
        f"{name} {list(known[name].shape)} for {list(fresh[table[name].target].shape)} (our layout)"
        for name in reshaped
    ]
    problems = {"missing from the file": missing, "without a place in the network": extra, "of another shape": shapes}
    listed = "; ".join(f"{len(names)} {what}: {', '.join(names)}" for what, names in problems.items() if names)
    head = _head(architecture) if architecture else set()
    replaceable = any(table[name].target in head for name in missing + reshaped)
    cure = "; replace_head=True keeps a fresh classifier instead of the file's" if replaceable else ""
    count = len(missing) + len(extra) + len(reshaped)
    raise PretrainedError(f"{count} of {len(table)} weights unmatched: {listed}{cure}")


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
