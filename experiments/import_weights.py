"""Published weights as a folder that training starts from: the arrays under our names, and a card with all their conventions.

    python -m experiments.import_weights --arch=resnet18 --source=resnet18-f37072fd.pth --out=ckpt

The folder is what slide_classification takes as --pretrained. A .safetensors file that export_model wrote becomes the model that
it was exported from, for predict_slides too. docs/weights.md says what is recognised from whom.
"""

from __future__ import annotations

import os
import pathlib
from typing import Any

import jax
from absl import flags

from data_pipelines.files import atomic_folder
from data_pipelines.weights import read_weights
from experiments.run import hub
from experiments.run.model import Model, Network, checksum, flat_arrays, read_exchange, save
from experiments.run.program import UsageError, run
from experiments.run.workdir import file_sha256, versions
from srcc_jax.models import pretrained, zoo
from srcc_jax.models.architecture import Architecture
from srcc_jax.models.layers import variable_shapes
from srcc_jax.models.resnet import ResNetArchitecture

_ARCH = flags.DEFINE_enum("arch", None, list(zoo.VARIANTS), "the network that the weights are of")
_SOURCE = flags.DEFINE_string(
    "source", None, "file (.safetensors, .npz, .h5, .pth, .pt, .bin), or hf:owner/name[/file] of the Hugging Face Hub"
)
_OUT = flags.DEFINE_string("out", None, "folder to be made")
_FROM = flags.DEFINE_enum(
    "weights_from", None, list(zoo.SOURCES), "who published them, where the names of the arrays do not tell"
)
_CLASSES = flags.DEFINE_integer(
    "classes", None, "classes of the network; none: those of the file; 0: no classifier", lower_bound=0
)
_REPLACE = flags.DEFINE_bool(
    "replace_head", False, "give it a fresh classifier (none with --classes=0), not the file's"
)
_STAGES = flags.DEFINE_integer("stages", None, "ResNets: the file ends after this many stages", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "seed of a fresh classifier", lower_bound=0)
_LIST = flags.DEFINE_bool("list", False, "list the networks and whose weights each takes, and do nothing else")


def listing() -> str:
    """A line for each family of networks: its variants, and the sources of weights for them."""
    return "\n".join(f"{', '.join(family.variants)}: {', '.join(family.sources)}" for family in zoo.FAMILIES)


def published(file: pathlib.Path, arch: str) -> tuple[Architecture, dict[str, Any]]:
    """Architecture and variables of a published file. Raises PretrainedError that names all that does not fit."""
    changes = {} if _STAGES.value is None else {"stages": _STAGES.value}
    if changes and not issubclass(zoo.family(arch).kind, ResNetArchitecture):
        raise UsageError(f"--stages={_STAGES.value} is for ResNets; {arch} has all of its own")
    arrays = read_weights(file)
    net = pretrained.source_conventions(arrays, arch, source=_FROM.value, classes=_CLASSES.value, **changes)
    fresh = zoo.init(net, jax.random.key(_SEED.value)) if _REPLACE.value else variable_shapes(zoo.build(net))
    return net, pretrained.load(arrays, net, fresh, replace_head=_REPLACE.value)


def imported(file: pathlib.Path, source: str) -> Network | Model:
    """What the file holds: a model that was exported here, or published weights of --arch. source: as the user named it."""
    stored = read_exchange(file)
    if stored is not None:
        if _ARCH.value not in (None, stored.architecture.name):
            raise UsageError(f"{file} is of {stored.architecture.name}, not of --arch={_ARCH.value}")
        if _REPLACE.value or _CLASSES.value is not None or _STAGES.value is not None or _FROM.value is not None:
            raise UsageError(f"{file} has a card of its own: only --source, --out and --arch go with it")
        return stored
    if _ARCH.value is None:
        raise UsageError(f"{file}: --arch must say which network it is of, one of {', '.join(zoo.VARIANTS)}")
    net, variables = published(file, _ARCH.value)
    about = {
        "name": f"{net.name} ({net.source})",
        "source": source if source.startswith(hub.PREFIX) else file.name,
        "file": file.name,
        "sha256": file_sha256(file),
        "replaced_head": _REPLACE.value,
        "versions": versions(),
    }
    return Network(net, variables, about)


def main() -> None:
    """Imports, and says what it did."""
    if _LIST.value:
        print(listing())
        return
    source, out = _SOURCE.value, _OUT.value
    if not source or not out:
        raise UsageError("--source and --out are needed (--list tells which networks there are)")
    file = hub.fetch(source) if source.startswith(hub.PREFIX) else pathlib.Path(source)
    with atomic_folder(out) as folder:
        stored = imported(file, source)
        save(stored, folder)
    flat = flat_arrays(stored)
    parameters = sum(array.size for name, array in flat.items() if name.startswith("params/"))
    net = stored.architecture
    print(
        f"{os.path.normpath(out)}: {net.name} with {net.classes} classes from {net.source}, {len(flat)} arrays, "
        f"{parameters:,} parameters, SHA-256 {checksum(flat, stored.architecture.as_dict())[:16]}"
    )


if __name__ == "__main__":
    run(main)
