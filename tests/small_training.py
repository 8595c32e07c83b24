"""A training run small enough for tests, also as a process of its own that a test may kill:

python -m tests.small_training CHECKPOINTS DEVICES [COORDINATOR PROCESSES PROCESS]
"""

import signal
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from srcc_jax import losses, parallel, train
from srcc_jax.augment import AugmentConfig, augment
from srcc_jax.checkpoints import Checkpoints

STEPS, EVERY, ROWS = 12, 4, 8
KEEP = train.Keep(metric="validation_loss", mode="min")
INTERRUPTED = 75


class Net(nn.Module):
    """Convolution, BatchNorm, dropout, head: what makes a step depend on batch, statistics and key."""

    dropout: float = 0.3

    @nn.compact
    def __call__(self, x, *, train, freeze_norm=False):
        x = nn.Conv(8, (3, 3), use_bias=False, name="stem")(x)  # before BatchNorm a bias has no gradient but rounding
        x = nn.relu(nn.BatchNorm(use_running_average=freeze_norm or not train, momentum=0.9, name="norm")(x))
        features = x.mean((1, 2))
        kept = nn.Dropout(self.dropout, deterministic=not train)(features)
        return {"logits": nn.Dense(1, name="head")(kept), "features": features}


def prepare(image, key):
    return augment(image, key, AugmentConfig()) / 255


def batch_of(step):
    """The global batch of a step: the label says whether the tile is dark. The last row is padding."""
    rng = np.random.default_rng([7, step])
    label = rng.integers(0, 2, ROWS)
    image = rng.integers(0, 156, (ROWS, 6, 6, 3)) + 100 * (1 - label[:, None, None, None])
    weight = np.ones(ROWS, np.float32)
    weight[-1] = 0
    return {"image": image.astype(np.uint8), "label": label.astype(np.int32), "weight": weight}


def batches(begin, rows=slice(None)):
    step = begin
    while True:
        yield {name: array[rows] for name, array in batch_of(step).items()}
        step += 1


def variables():
    """Of the network at the start; drawn by NumPy, whose generators need no compiling."""
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(lambda: Net().init(jax.random.key(0), jnp.zeros((1, 6, 6, 3)), train=False))
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), shapes["params"])
    return {"params": params, "batch_stats": {"norm": {"mean": np.zeros(8, "f"), "var": np.ones(8, "f")}}}


def optimizer():
    return optax.adam(train.epoch_decay(3e-3, 0.95, 2, 3.5))


def evaluator(mesh):
    """state -> the loss in inference of a batch that is not trained on."""
    rows = parallel.process_rows(ROWS, mesh)
    batch = parallel.put({name: array[rows] for name, array in batch_of(10**6).items()}, mesh)

    @jax.jit
    def loss(params, stats, batch):
        logits = Net().apply({"params": params, **stats}, batch["image"] / 255.0, train=False)["logits"][:, 0]
        return losses.weighted_mean(optax.sigmoid_binary_cross_entropy(logits, batch["label"]), batch["weight"])

    return lambda state: {"validation_loss": float(loss(state.params, state.stats, batch))}


def run(folder, *, mesh, log=lambda step, row: None, stop=lambda: False, num_steps=STEPS):
    """Train, or go on training, in a folder of checkpoints."""
    step_fn = train.make_train_step(losses.binary_cross_entropy(Net(), prepare=prepare), optimizer(), mesh)
    state = train.init_state(variables(), optimizer(), 5, mesh)
    rows = parallel.process_rows(ROWS, mesh)
    with Checkpoints(str(folder)) as checkpoints:
        return train.fit(
            step_fn,
            checkpoints.resume(state),
            lambda begin: batches(begin, rows),
            num_steps=num_steps,
            mesh=mesh,
            evaluate=evaluator(mesh),
            every=EVERY,
            keep=KEEP,
            checkpoints=checkpoints,
            log=log,
            stop=stop,
        )


def assert_same_bits(tree, other):
    """Two trees of arrays and keys are equal, bit for bit."""
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(other), strict=True):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))


def main(folder, devices, coordinator=None, processes=None, process=None):
    parallel.set_cpu_devices(int(devices))
    if coordinator:
        parallel.start_distributed(coordinator, processes=int(processes), process=int(process))
    asked = []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
    try:
        run(
            folder,
            mesh=parallel.make_mesh(),
            log=lambda step, row: print("evaluated" if "validation_loss" in row else "step", step, flush=True),
            stop=lambda: bool(asked),
        )
    except train.Interrupted as interrupted:
        print(interrupted, flush=True)
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main(*sys.argv[1:])
