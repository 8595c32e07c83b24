"""The network of the patches before training: fresh, or with a published encoder."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from experiments.run.program import UsageError
from experiments.run.starting import pretrained_network, published_arrays
from srcc_jax.methods.gastric_screening import CLASSES, MODELS, Config, patch_architecture
from srcc_jax.models import pretrained, zoo
from srcc_jax.models.architecture import Architecture

TRUNKS = {"dla34_dense": "dla34", "fcn_resnet50": "resnet50"}  # dense network -> the classifier that is its encoder
_STEM = "base_layer"  # of DLA: the paper's has another shape than the published one


def starting_network(
    config: Config, weights: str | None, source: str | None, *, dtype: str
) -> tuple[Architecture, dict[str, Any]]:
    """Architecture and variables. weights: a file, or a folder made by import_weights; source: who published a file, where its names do
    not tell. Raises UsageError where they do not fit --model."""
    key = jax.random.fold_in(jax.random.key(config.seed), 1)
    variant = MODELS[config.model][0]
    try:
        if weights is None:
            net = patch_architecture(config, dtype=dtype)
            return net, zoo.init(net, key)
        if not config.dense:
            changes = {"dtype": dtype} | ({"remat": True} if config.remat else {})
            return pretrained_network(
                weights, backbone=variant, source=source, classes=CLASSES, key=key, changes=changes
            )
        return _with_encoder(config, *published_arrays(weights, source), key, dtype)
    except pretrained.PretrainedError as error:
        problem = textwrap.shorten(str(error), 300, placeholder=" ...")  # it can name hundreds of arrays
        raise UsageError(f"--pretrained={weights} does not fit --model={config.model}: {problem}") from error
    except ValueError as error:
        raise UsageError(str(error)) from error


def _with_encoder(
    config: Config, arrays: Mapping[str, np.ndarray], source: str | None, key: jax.Array, dtype: str
) -> tuple[Architecture, dict[str, Any]]:
    variant = MODELS[config.model][0]
    if variant not in TRUNKS:
        raise UsageError(f"--model={config.model} has no encoder that is published by itself: leave out --pretrained")
    published = pretrained.source_conventions(arrays, TRUNKS[variant], source=source, classes=1)
    net = patch_architecture(config, source=published.source, dtype=dtype)
    net = dataclasses.replace(net, mean=published.mean, std=published.std)
    keep = (_STEM,) if getattr(net, "stem", "7x7") != "7x7" else ()
    return net, pretrained.load_trunk(arrays, published, zoo.init(net, key), module="trunk", keep=keep)
