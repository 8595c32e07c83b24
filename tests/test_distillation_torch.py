"""The torch twin of reverse distillation, against which it is measured: the same layers, scores and loss."""

import jax
import numpy as np
import pytest

from experiments.run.benchmarks import distillation_torch
from srcc_jax.kernels.anomaly_maps import anomaly_map
from srcc_jax.methods.reverse_distillation import Config, patch_losses, similarities
from srcc_jax.models import distillation, zoo
from srcc_jax.models.layers import variable_shapes
from srcc_jax.models.teachers import cut, student_architecture, taps

torch = pytest.importorskip("torch")
SIDE = 32


@pytest.fixture(scope="module")
def maps():
    """Of a teacher and a student: three levels each, float32 [B, h, w, C], never negative."""
    random = np.random.default_rng(0)
    shapes = [(4, 8, 8, 6), (4, 4, 4, 7), (4, 2, 2, 8)]
    return [[np.abs(random.standard_normal(shape, dtype=np.float32)) for shape in shapes] for _ in range(2)]


def in_torch(arrays):
    return [torch.from_numpy(array.transpose(0, 3, 1, 2)) for array in arrays]


@pytest.mark.parametrize("network", list(distillation_torch.SHAPES))
def test_the_layers_are_ours(network):
    """Every parameter has its like in size."""
    teacher = cut(zoo.architecture(network, source="torchvision", classes=1))
    ours = student_architecture(teacher, shortcut="3x3")
    assert tuple(taps(teacher).values()) == distillation_torch.SHAPES[network].widths
    shapes = variable_shapes(distillation.build(ours), *distillation.map_shapes(ours, side=8))["params"]
    with torch.device("meta"):
        twin = distillation_torch.make_student(distillation_torch.SHAPES[network])
    assert sorted(p.numel() for p in twin.parameters()) == sorted(leaf.size for leaf in jax.tree.leaves(shapes))


def test_a_student_makes_the_maps_of_its_teacher():
    teacher, student = distillation_torch.build("resnet18")
    found = teacher(torch.zeros(2, 3, SIDE, SIDE))
    made = student(found)
    assert [tuple(one.shape) for one in made] == [tuple(one.shape) for one in found] == [
        (2, 64, 8, 8), (2, 128, 4, 4), (2, 256, 2, 2)
    ]  # fmt: skip
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_scores_and_loss_are_ours(maps):
    wanted = np.asarray(anomaly_map(*maps, (SIDE, SIDE))).mean((1, 2))
    theirs = [in_torch(arrays) for arrays in maps]
    np.testing.assert_allclose(distillation_torch.patch_scores(*theirs, SIDE), wanted, rtol=1e-4)
    tumour = np.array([0, 1, 1, 0])
    loss = patch_losses(similarities(*maps, flat=True), jax.numpy.asarray(tumour), Config(), alpha=0.1).mean()
    assert float(distillation_torch.focal_loss(*theirs, torch.from_numpy(tumour > 0))) == pytest.approx(
        float(loss), rel=1e-4
    )
