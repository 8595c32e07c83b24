"""Reverse distillation in torch and in JAX as two processes that take turns, as `experiments.run.benchmarks.peers` has it for classifiers.

python -m experiments.run.benchmarks.distillation_peers torch train wide_resnet50_2 256 8

A network is named by its teacher. "infer" gives the score of each patch, "train" is a step on the focal loss of flat similarities.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import numpy as np

from experiments.run.benchmarks.distillation_torch import torch_task
from experiments.run.benchmarks.peers import serve


def jax_task(task: str, network: str, side: int, batch: int) -> Callable[[], None]:
    """Ours, as the experiments run it: folded, all cores as devices, for inference; the step of `fit`, on one device, for training."""
    import jax
    import optax

    from experiments.run.program import prefer_wide_vectors
    from srcc_jax import parallel
    from srcc_jax.kernels.windows import make_window_fn
    from srcc_jax.methods.reverse_distillation import Config, fold, make_anomaly_map, make_loss, patch_scores
    from srcc_jax.models import distillation, zoo
    from srcc_jax.models.teachers import cut, student_architecture
    from srcc_jax.train import init_state, make_train_step

    prefer_wide_vectors()
    parallel.set_cpu_devices(1 if task == "train" else len(os.sched_getaffinity(0)))
    mesh = parallel.make_mesh()
    teacher = cut(zoo.architecture(network, source="torchvision", classes=1))
    student = student_architecture(teacher, shortcut="3x3")
    keys = jax.random.split(jax.random.key(0))
    variables = {**distillation.init(student, keys[0]), "teacher": zoo.init(teacher, keys[1])}
    image = np.random.default_rng(0).integers(0, 256, (batch, side, side, 3), np.uint8)
    if task == "infer":
        maps_of = make_anomaly_map(teacher, student)
        scores = make_window_fn(lambda folded, image: patch_scores(maps_of(folded, image)), tile=side, mesh=mesh)
        folded = parallel.replicate(fold(variables, teacher, student), mesh)
        window = np.stack([np.arange(batch), *np.zeros((2, batch), int)], axis=1).astype(np.int32)
        return lambda: jax.block_until_ready(scores(folded, image, window, batch))
    adam = optax.flatten(optax.adam(1e-5, b1=0.5))
    step = make_train_step(make_loss(teacher, student, Config(), alpha=0.1), adam, mesh)
    state = init_state(variables, adam, 0, mesh)
    arrays = {"image": image, "label": np.arange(batch, dtype=np.int32) % 2, "weight": np.ones(batch, np.float32)}

    def train() -> None:
        nonlocal state
        state, _ = step(state, parallel.put(arrays, mesh))
        jax.block_until_ready(state)

    return train


if __name__ == "__main__":
    serve({"torch": torch_task, "jax": jax_task}, *sys.argv[1:])
