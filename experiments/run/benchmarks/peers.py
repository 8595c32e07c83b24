"""A network in torch and in JAX as two processes that take turns: each measures one round when it is asked to.

python -m experiments.run.benchmarks.peers torch train b1 224 16      (a line of standard input is a round, the answer its seconds)
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.run.benchmarks.torch_peers import DENSE, torch_task

if TYPE_CHECKING:
    from srcc_jax.models.architecture import Architecture

# torch gives freed memory back to the system and asks for it again at every step, which costs it up to 3.7 times on CPU.
TORCH_MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "8589934592",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "268435456",
}


# Both sides get what `make` gives every program: memory in large pages, which both gain by.
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


class Child:
    """A process of a module of ours that measures a round whenever `seconds` is called: it answers a line with a number."""

    def __init__(self, module: str, *arguments: object, **environment: str):
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *map(str, arguments)],
            env={**os.environ, **HUGE_PAGES, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def seconds(self) -> float:
        """Seconds of one round."""
        assert self._process.stdin and self._process.stdout
        print("go", file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError("a peer of the benchmark ended early: see what it printed above")
        return float(answer)

    def close(self) -> None:
        self._process.communicate()


class Peer(Child):
    """One task of one framework, compiled and its caches warm. module: the program of its process."""

    def __init__(
        self,
        framework: str,
        task: str,
        network: str,
        side: int,
        batch: int,
        *,
        module: str = "experiments.run.benchmarks.peers",
    ):
        super().__init__(
            module, framework, task, network, side, batch, **(TORCH_MALLOC if framework == "torch" else {})
        )
        self.seconds()


def interleaved(one: Callable[[], float], other: Callable[[], float], *, rounds: int) -> tuple[np.ndarray, np.ndarray]:
    """Seconds [rounds] of each, measured in turn, so that both meet the same disturbances."""
    pairs = np.asarray([(one(), other()) for _ in range(rounds)])
    return pairs[:, 0], pairs[:, 1]


def jax_task(task: str, network: str, side: int, batch: int) -> Callable[[], None]:
    """Ours, as the experiments run it: all cores as devices, folded for inference, the step of `fit` for training."""
    import jax
    import optax

    from experiments.run.program import prefer_wide_vectors
    from srcc_jax import parallel
    from srcc_jax.losses import binary_cross_entropy
    from srcc_jax.models.architecture import normalize
    from srcc_jax.models.layers import fold_batch_norm
    from srcc_jax.models.zoo import build, init
    from srcc_jax.train import init_state, make_train_step

    prefer_wide_vectors()
    parallel.set_cpu_devices(len(os.sched_getaffinity(0)))
    mesh, net = parallel.make_mesh(), _architecture(network)
    variables = init(net, jax.random.key(0))
    image = np.random.default_rng(0).integers(0, 256, (batch, side, side, 3), np.uint8)
    if task == "infer":
        return _jax_inference(net, fold_batch_norm(variables, epsilon=net.bn_epsilon), image, mesh)
    adam = optax.flatten(optax.adam(1e-3))
    make_loss = _pixel_loss if network in DENSE else binary_cross_entropy
    loss = make_loss(build(net), prepare=lambda image, key: normalize(image, net))
    step, state = make_train_step(loss, adam, mesh), init_state(variables, adam, 0, mesh)
    arrays = {"image": image, "label": np.arange(batch, dtype=np.float32) % 2, "weight": np.ones(batch, np.float32)}

    def train() -> None:
        nonlocal state
        state, _ = step(state, parallel.put(arrays, mesh))
        jax.block_until_ready(state)

    return train


def _jax_inference(net, folded, image: np.ndarray, mesh) -> Callable[[], None]:
    """Through the sliding-window kernel, whose windows here are whole images."""
    import jax

    from srcc_jax import parallel
    from srcc_jax.kernels.windows import make_window_fn
    from srcc_jax.models.architecture import normalize
    from srcc_jax.models.zoo import build

    network: Any = build(net, folded=True)
    output = "dense" if net.name in DENSE else "logits"
    outputs = make_window_fn(
        lambda variables, windows: network.apply(variables, normalize(windows, net), train=False)[output],
        tile=image.shape[1],
        mesh=mesh,
    )
    folded = parallel.replicate(folded, mesh)
    window = np.stack([np.arange(len(image)), *np.zeros((2, len(image)), int)], axis=1).astype(np.int32)
    return lambda: jax.block_until_ready(outputs(folded, image, window, len(image)))


def _architecture(network: str) -> Architecture:
    """With one class, under the conventions of torch where the family has them."""
    from srcc_jax.models import zoo

    sources = zoo.family(network).sources
    return zoo.architecture(
        network, source="torchvision" if "torchvision" in sources else next(iter(sources)), classes=1
    )


def _pixel_loss(model, *, prepare):
    """Mean cross-entropy of all pixels with the label of their image."""
    import jax
    import optax

    def loss_fn(params, stats, batch, key):
        image = prepare(batch["image"], key)
        out, stats = model.apply({"params": params, **stats}, image, train=True, mutable=list(stats))
        label = jax.numpy.broadcast_to(batch["label"][:, None, None, None], out["dense"].shape)
        return optax.sigmoid_binary_cross_entropy(out["dense"], label).mean(), (stats, {})

    return loss_fn


MakeTask = Callable[[str, str, int, int], Callable[[], None]]
"""(task, network, side, batch) -> one round of it."""


def serve(tasks: Mapping[str, MakeTask], framework: str, task: str, network: str, side: str, batch: str) -> None:
    """Answers each line of standard input with the seconds of one round. tasks: by framework."""
    run = tasks[framework](task, network, int(side), int(batch))
    for _ in sys.stdin:
        began = time.perf_counter()
        run()
        print(time.perf_counter() - began, flush=True)


if __name__ == "__main__":
    serve({"torch": torch_task, "jax": jax_task}, *sys.argv[1:])
