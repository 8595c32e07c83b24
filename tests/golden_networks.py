"""Networks with the golden files' weights, and their outputs beside the golden numbers (see tests/golden.py)."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import pytest

from srcc_jax.models import layers, pretrained, zoo
from srcc_jax.models.architecture import Architecture
from tests import golden

FAST_COMPILE = {"xla_backend_optimization_level": 0}  # of what runs once
STAGES = 2e-4  # tolerance of intermediate maps
Golden = dict[str, np.ndarray]


def load(
    shared_data: pathlib.Path, file: str, variant: str, source: str
) -> tuple[Golden, Architecture, dict[str, Any]]:
    """Golden numbers, architecture and variables of a torch-named net."""
    gold = golden.read(shared_data, file)
    weights = golden.torch_weights(gold)
    arch = pretrained.source_conventions(weights, variant, source=source)
    assert arch.bn_epsilon == gold["bn_eps"][0]
    assert arch.bn_momentum == pytest.approx(1 - gold["bn_momentum_torch"][0])
    shapes = layers.variable_shapes(zoo.build(arch))
    return gold, arch, pretrained.load(weights, arch, shapes, replace_head=False)


def evaluate(
    arch: Architecture,
    variables: Mapping[str, Any],
    image: np.ndarray,
    modules: Sequence[str] = (),
    *,
    folded: bool = False,
) -> dict[str, np.ndarray]:
    """Outputs in inference mode, and by their names those of the modules named. Compiled for a single run."""

    def apply(variables, image):
        out, captured = zoo.build(arch, folded=folded).apply(
            variables,
            image,
            train=False,
            capture_intermediates=lambda module, _: len(module.path) == 1 and module.path[0] in modules,
            mutable=["intermediates"],
        )
        return out | {name: captured["intermediates"][name]["__call__"][0] for name in modules}

    return jax.tree.map(np.asarray, jax.jit(apply, compiler_options=FAST_COMPILE)(variables, image))


def check_ends(gold: Golden, out: Mapping[str, np.ndarray], *, prefix: str = "", tolerance: float = 2e-5) -> None:
    """Logits and features. prefix: "" for the first image, "hw2/" for the second."""
    for key in ("logits", "features"):
        assert golden.difference(out[key], gold[prefix + key]) <= tolerance, key


def check_stages(gold: Golden, stages: Mapping[str, np.ndarray]) -> None:
    """Maps [B, H, W, C] by the golden file's names of them, of which none may be missing."""
    assert sorted(stages) == sorted(gold["stages"])
    for name, stage in stages.items():
        layout = stage.transpose(0, 3, 1, 2)
        assert layout.shape == tuple(gold[f"stage/{name}/shape"]), name
        assert golden.difference(layout[:1, :4], gold[f"stage/{name}/slice"]) <= STAGES, name
        pixels = stage.astype(np.float64)  # sums of 100,000 of them
        assert golden.difference(pixels.mean((0, 1, 2)), gold[f"stage/{name}/chan_mean"]) <= STAGES, name
        assert golden.difference(pixels.std((0, 1, 2)), gold[f"stage/{name}/chan_std"]) <= STAGES, name


def check_training(
    gold: Golden, arch: Architecture, variables: Mapping[str, Any], naming: str, *, kinds: str = "wbgB"
) -> None:
    """Loss, running statistics and norms of gradients of one forward and backward pass on the first image.

    kinds: of the arrays whose gradients are compared one by one (see the golden files' README); those of the network's parts
    are always compared.
    """

    def loss_fn(params, stats, image):
        out, stats = zoo.build(arch).apply(
            {"params": params, "batch_stats": stats}, image, train=True, mutable=["batch_stats"]
        )
        return (out["logits"] ** 2).mean(), (out["logits"], stats["batch_stats"])

    step = jax.jit(jax.value_and_grad(loss_fn, has_aux=True), compiler_options=FAST_COMPILE)
    (loss, (logits, stats)), grads = step(variables["params"], variables["batch_stats"], golden.image(gold["input_hw"]))
    assert loss == pytest.approx(float(gold["train/loss"]), rel=1e-5)
    assert golden.difference(logits, gold["train/logits"]) <= 2e-5
    named = pretrained.export({"params": grads, "batch_stats": stats}, arch, naming)
    for which in ("first", "last"):
        norm = str(gold[f"train/bn_{which}/name"])
        for key in ("running_mean", "running_var"):
            assert golden.difference(named[f"{norm}.{key}"], gold[f"train/bn_{which}/{key}_after"]) <= 2e-5
    names = list(map(str, gold["train/grad_param_names"]))
    norms = {name: np.linalg.norm(named[name]) for name in names}
    for part, norm in zip(map(str, gold["train/grad_modules"]), gold["train/grad_norms"], strict=True):
        assert np.hypot.reduce([norms[name] for name in names if name.startswith(f"{part}.")]) == pytest.approx(
            norm, rel=2e-3
        )
    kind = dict(zip(map(str, gold["names"]), map(str, gold["kinds"]), strict=True))
    single = [kind[name] in kinds for name in names]
    ours, wanted = np.array(list(norms.values())), gold["train/grad_param_norms"]
    np.testing.assert_allclose(ours[single], wanted[single], rtol=2e-3, atol=1e-7)
