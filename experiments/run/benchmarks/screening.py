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
    """What the forward pass of a batch keeps for the gradient, with rematerialisation and without; nothing is run."""
    sizes = {remat: kept_bytes(Config(model=model, remat=remat), side=side, batch=batch) for remat in (False, True)}
    name = f"{model} {side}², batch {batch}: kept for the gradient with rematerialisation / without"
    yield name, f"{sizes[True] / sizes[False]:.2f}", "", f"{sizes[True] / 1e9:.2f} GB / {sizes[False] / 1e9:.2f} GB"


def kept_bytes(config: Config, *, side: int, batch: int) -> int:
    """Bytes that the loss of eq. 1 keeps for its gradient: what a compiler has to hold in memory unless it finds better by itself. Counted
    before compilation, since XLA for CPU undoes rematerialisation."""
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

    def kept(params, stats, batch, key):
        return jax.vjp(lambda params: loss(params, stats, batch, key), params, has_aux=True)[1]

    key = jax.eval_shape(lambda: jax.random.key(0))
    residuals = jax.tree.leaves(jax.eval_shape(kept, shapes["params"], stats, described, key))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in residuals)
