"""Rows of BENCHMARKS.md for gastric screening: the multi-task network against torch, and what rematerialisation saves."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp

from experiments.run.benchmarks.peers import Peer, interleaved
from experiments.run.benchmarks.rows import Row, ratio
from srcc_jax.methods.gastric_screening import Config, patch_architecture, patch_loss
from srcc_jax.models import zoo
from srcc_jax.models.layers import variable_shapes

PEERS = "experiments.run.benchmarks.screening_peers"
SIDE, BATCH = 512, 2
TARGETS = {"infer": "≤ 0.8", "train": "≤ 1.2"}
PAPER_BATCH = 16


def screening_section(
    rounds: int, *, side: int = SIDE, batch: int = BATCH, models: tuple[str, ...] = ("dla_dcn", "dla")
) -> Iterator[Row]:
    """Inference and training step of the multi-task network, with deformable nodes and without, against torch with torchvision's
    operator; then the memory of a training step of the paper's batch."""
    for model in models:
        for task, target in TARGETS.items():
            ours, theirs = (Peer(framework, task, model, side, batch, module=PEERS) for framework in ("jax", "torch"))
            measured = interleaved(ours.seconds, theirs.seconds, rounds=rounds)
            ours.close()
            theirs.close()
            what = {"infer": "inference", "train": "training step"}[task]
            yield ratio(f"{model} {side}² {what}, batch {batch}: time / torch", *measured, target)
    yield from memory_rows("dla_dcn", side=side, batch=PAPER_BATCH)


def memory_rows(model: str, *, side: int, batch: int) -> Iterator[Row]:
    """Temporaries of the compiled gradient of a batch on one device, with rematerialisation and without; nothing is run."""
    sizes = {remat: gradient_bytes(Config(model=model, remat=remat), side=side, batch=batch) for remat in (False, True)}
    name = f"{model} {side}², batch {batch}: memory of the gradient with rematerialisation / without"
    yield name, f"{sizes[True] / sizes[False]:.2f}", "", f"{sizes[True] / 1e9:.2f} GB / {sizes[False] / 1e9:.2f} GB"


def gradient_bytes(config: Config, *, side: int, batch: int) -> int:
    """What XLA sets aside for the gradient of eq. 1 beside its arguments and results, in bytes."""
    net = patch_architecture(config)
    shapes = variable_shapes(zoo.build(net))
    loss = patch_loss(config, net)
    described = {
        "image": jax.ShapeDtypeStruct((batch, side, side, 3), jnp.uint8),
        "mask": jax.ShapeDtypeStruct((batch, side, side), jnp.uint8),
        "label": jax.ShapeDtypeStruct((batch,), jnp.int32),
        "weight": jax.ShapeDtypeStruct((batch,), jnp.float32),
    }
    stats = {name: tree for name, tree in shapes.items() if name != "params"}
    key = jax.eval_shape(lambda: jax.random.key(0))
    gradient = jax.jit(jax.grad(loss, has_aux=True)).lower(shapes["params"], stats, described, key)
    analysis = gradient.compile().memory_analysis()
    assert analysis is not None
    return int(analysis.temp_size_in_bytes)
