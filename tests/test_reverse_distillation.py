"""Reverse distillation against the numbers worked by hand from He & Li 2023, and its step on networks of a few thousand weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from srcc_jax import parallel, train
from srcc_jax.kernels.anomaly_maps import gaussian_filter
from srcc_jax.methods import reverse_distillation as rd
from srcc_jax.metrics import best_threshold
from srcc_jax.models import distillation, efficientnet, resnet, teachers, zoo
from tests.small_training import assert_same_bits

# The card's worked example, as maps [1, 2, 2, 2] of two channels.
TEACHER_MAP = np.array([[[1, 0], [1, 3]], [[0, 2], [1, 4]]], np.float32).transpose(1, 2, 0)[None]
STUDENT_MAP = np.array([[[1, 0], [1, 4]], [[1, 1], [0, 3]]], np.float32).transpose(1, 2, 0)[None]
TINY = resnet.architecture("resnet18", source="torchvision", classes=0, width=4, depths=(1, 1, 1, 1), stages=3)
STUDENT = teachers.student_architecture(TINY, shortcut="3x3", embedding_blocks=1)


@pytest.fixture(scope="module", autouse=True)
def fast_compile():
    """What runs once here takes longer to optimise than to run."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def levels(*, flat):
    return rd.similarities([jnp.asarray(TEACHER_MAP)], [jnp.asarray(STUDENT_MAP)], flat=flat)


def loss_of(values, tumour, *, flat=True, **changes):
    """The loss of one patch with these similarities."""
    config = rd.Config(similarity="flat" if flat else "pixel", **changes)
    label = jnp.full(len(values[0]), tumour, jnp.float32)
    return float(rd.patch_losses(values, label, config, alpha=config.alpha)[0])


@pytest.mark.parametrize(
    "flat, tumour, expected", [(False, 0, 0.00148820), (False, 1, 4.052238), (True, 0, 5.51188e-5), (True, 1, 1.912342)]
)
def test_the_focal_loss_of_the_worked_maps(flat, tumour, expected):
    """Pixel by pixel, and as one vector; the similarity of 1 in the pixel form is cut at 1 - 1e-6."""
    assert loss_of(levels(flat=flat), tumour, flat=flat) == pytest.approx(expected, rel=2e-6)


def test_similarities_of_the_worked_maps():
    np.testing.assert_allclose(levels(flat=False)[0][0], [[0.707107, 1], [0.707107, 0.96]], rtol=1e-6)
    np.testing.assert_allclose(levels(flat=True)[0], [0.919145], rtol=1e-6)


@pytest.mark.parametrize(
    "similarity, normal, tumour",
    [(0.9, 0.000105361, 1.678585), (0.5, 0.01732868, 0.1559581), (0.1, 0.1865094, 0.000948245)],
)
def test_the_focal_loss_of_worked_scalars(similarity, normal, tumour):
    """To the six digits that the card prints."""
    value = [jnp.array([similarity], jnp.float32)]
    assert loss_of(value, 0) == pytest.approx(normal, rel=5e-6)
    assert loss_of(value, 1) == pytest.approx(tumour, rel=5e-6)


def test_the_plain_loss_is_the_baselines():
    values = [jnp.array([s], jnp.float32) for s in (0.9, 0.5, 0.1)]
    assert loss_of(values, 0, loss="plain") == pytest.approx(1.5, rel=1e-6)
    assert loss_of(values, 1, loss="plain") == pytest.approx(1.5, rel=1e-6)
    assert loss_of(values[:1], 1, loss="plain") == pytest.approx(0.9, rel=1e-6)


@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_the_focal_loss_is_finite_everywhere_and_its_gradient_vanishes_at_the_optimum(gamma):
    """Also just outside [0, 1], where rounding puts a cosine. Normal patches pull up, tumour patches down."""
    similarity = jnp.array([-1e-7, 0.0, 1e-7, 0.5, 0.9, 1 - 6e-8, 1.0, 1.0000001], jnp.float32)
    for tumour, optimum in ((0, 1.0), (1, 0.0)):
        loss = jax.vmap(jax.value_and_grad(lambda s, t=tumour: rd.focal_loss(s, t, alpha=0.1, gamma=gamma)))
        value, gradient = loss(similarity)
        assert np.isfinite(value).all() and np.isfinite(gradient).all() and (np.asarray(value) >= 0).all()
        inside = (similarity > 1e-6) & (similarity < 1 - 1e-6)
        assert (np.sign(gradient[inside]) == (1 if tumour else -1)).all()
        assert loss(jnp.array([optimum]))[1] == 0
    if gamma:  # on the way there, too
        assert abs(jax.grad(lambda s: rd.focal_loss(s, 0, alpha=0.1, gamma=gamma))(0.9999)) < 1e-4
        assert abs(jax.grad(lambda s: rd.focal_loss(s, 1, alpha=0.1, gamma=gamma))(1e-4)) < 1e-3


@pytest.mark.parametrize("flat", [True, False])
def test_zero_and_equal_maps_have_finite_gradients(flat):
    maps = jnp.asarray(TEACHER_MAP)
    config = rd.Config(similarity="flat" if flat else "pixel")

    def loss(student, tumour):
        return rd.patch_losses(rd.similarities([maps], [student], flat=flat), tumour, config, alpha=0.1).sum()

    for student in (jnp.zeros_like(maps), maps):
        for tumour in (jnp.zeros(1), jnp.ones(1)):
            value, gradient = jax.value_and_grad(loss)(student, tumour)
            assert np.isfinite(value) and np.isfinite(gradient).all()
    assert not jax.grad(loss)(maps, jnp.zeros(1)).any()


def test_the_slide_score_of_the_worked_map():
    assert rd.slide_score(np.array([0, 1.5, 2.01, 2.5, 3.0, 0.2])) == pytest.approx(2.503333, abs=1e-6)
    assert rd.slide_score(np.array([0.1, np.nan])) == 0
    assert rd.slide_score(np.array([[np.nan, 2.2]])) == pytest.approx(2.2)


def test_the_patch_score_is_the_mean_of_the_smoothed_map():
    maps = jnp.asarray(np.random.default_rng(0).random((3, 40, 40), np.float32) * 3)
    smoothed = jax.jit(lambda maps: gaussian_filter(maps, sigma=4))(maps)
    np.testing.assert_allclose(rd.patch_scores(maps), rd.patch_scores(smoothed), rtol=1e-5)


def test_the_best_threshold_is_that_of_trying_all():
    random = np.random.default_rng(1)
    for size in (2, 5, 30):
        tumour, score = random.integers(0, 2, size), random.integers(0, 8, size) / 8
        threshold, accuracy = best_threshold(tumour, score)
        assert accuracy == ((score >= threshold) == tumour).mean()
        tried = [((score >= t) == tumour).mean() for t in np.arange(-1, 20) / 16]
        assert accuracy == max(tried)


def test_training_rows_are_nested_and_as_many_as_asked():
    tumour = np.arange(100) % 4 == 0
    chosen = [set(rd.training_rows(tumour, rd.Config(normal_patches=30, tumour_patches=n, seed=3))) for n in (0, 5, 20)]
    assert [len(rows) for rows in chosen] == [30, 35, 50] and chosen[0] < chosen[1] < chosen[2]
    assert chosen[2] != set(rd.training_rows(tumour, rd.Config(normal_patches=30, tumour_patches=20, seed=4)))
    assert len(rd.training_rows(tumour, rd.Config())) == 100
    with pytest.raises(ValueError, match="--tumour_patches=26: there are 25"):
        rd.training_rows(tumour, rd.Config(tumour_patches=26))


def test_the_presets_are_the_papers_and_the_codes():
    assert (rd.Config().rate, rd.Config().last_epoch, rd.Config().weight_of_normal(500, 5500)) == (1e-5, 50, 0.1)
    assert (rd.Config(preset="code").rate, rd.Config(preset="code").last_epoch) == (1e-6, 10)
    assert rd.Config(preset="code", learning_rate=1.0, epochs=2).rate == 1.0
    share = rd.Config(alpha_by_share=True)
    assert share.weight_of_normal(100, 200) == 0.5
    with pytest.raises(ValueError, match="--loss=plain"):
        share.weight_of_normal(0, 200)
    with pytest.raises(ValueError, match="multiple of 32"):
        rd.Config(tile=100)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "wide_resnet50_2", "b0", "lite1", "tiny"])
def test_every_teacher_has_three_maps_that_fit_its_student(name):
    """Shapes only: nothing is compiled or computed."""
    family = zoo.family(name)
    teacher = teachers.cut(family.architecture(name, source=next(iter(family.sources)), classes=1000))
    student = teachers.student_architecture(teacher, shortcut="1x1")
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.uint8)
    variables = jax.eval_shape(
        lambda: zoo.build(teacher).init(jax.random.key(0), jnp.zeros((1, 64, 64, 3)), train=False)
    )
    assert not any("classifier" in part for part in variables["params"])
    maps = jax.eval_shape(lambda v, x: teachers.teacher_maps(teacher, v, x), variables, image)
    assert [m.shape for m in maps] == [(1, 64 // s, 64 // s, c) for s, c in zip((4, 8, 16), student.widths)]
    network = distillation.build(student)
    out = jax.eval_shape(lambda *maps: network.init_with_output(jax.random.key(0), *maps, train=False)[0], *maps)
    assert [out[f"stage{level}"].shape for level in (1, 2, 3)] == [m.shape for m in maps]


def test_the_maps_of_an_efficientnet_are_given_a_relu():
    teacher = teachers.cut(efficientnet.architecture("tiny", source="keras", classes=3))
    variables = zoo.init(teacher, jax.random.key(0))
    maps = jax.jit(lambda variables, image: teachers.teacher_maps(teacher, variables, image))(variables, noise(1))
    assert all((m >= 0).all() and (m == 0).any() and (m > 0).any() for m in maps)
    with pytest.raises(ValueError, match="densenet121 has no maps"):
        teachers.cut(zoo.architecture("densenet121", source="torchvision", classes=1))


def noise(count, side=32):
    return np.random.default_rng(count).integers(0, 256, (count, side, side, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def fitted():
    """The variables before and after eight steps, and the losses: two dark normal patches, a light tumour patch, and padding."""
    variables = {
        **distillation.init(STUDENT, jax.random.key(1)),
        "teacher": zoo.init(TINY, jax.random.key(2)),
    }
    mesh = parallel.make_mesh(jax.devices()[:1])
    config = rd.Config(tile=32)
    tx = optax.flatten(optax.adam(2e-3, b1=config.adam_b1))
    step = train.make_train_step(rd.make_loss(TINY, STUDENT, config, alpha=0.1), tx, mesh)
    state = train.init_state(variables, tx, 0, mesh)
    image = (
        noise(4) // np.array([4, 4, 1, 1], np.uint8)[:, None, None, None]
        + np.array([0, 0, 0, 9], np.uint8)[:, None, None, None]
    )
    batch = parallel.put({"image": image, "label": np.float32([0, 0, 1, 1]), "weight": np.float32([1, 1, 1, 0])}, mesh)
    rows = []
    for _ in range(8):
        state, metrics = step(state, batch)
        rows.append({name: float(total / count) for name, (total, count) in metrics.items()})
    return variables, state, rows, image


def test_the_teacher_is_untouched_by_training(fitted):
    before, state, _, _ = fitted
    assert_same_bits(before["teacher"], state.stats["teacher"])
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), before["params"], state.params)
    assert all(jax.tree.leaves(moved))


def test_training_tells_tumour_from_normal(fitted):
    _, _, rows, _ = fitted
    assert all(np.isfinite(list(row.values())).all() for row in rows)
    assert rows[-1]["loss"] < rows[0]["loss"]
    gap = [row["similarity_normal"] - row["similarity_tumour"] for row in rows]
    assert gap[-1] > gap[0]


def test_the_anomaly_map_is_the_published_sum_of_distances(fitted):
    """Folded networks against the sum of 1 - cosine over unfolded ones; the teacher's BatchNorm in inference mode."""
    _, state, _, image = fitted
    variables = jax.device_get({"params": state.params, **state.stats})
    maps_of = rd.make_anomaly_map(TINY, STUDENT)

    @jax.jit
    def both(variables, image):
        taught = teachers.teacher_maps(TINY, variables["teacher"], image)
        ours = {name: variables[name] for name in ("params", "batch_stats")}
        out = distillation.build(STUDENT).apply(ours, *taught, train=False)
        return maps_of(rd.fold(variables, TINY, STUDENT), image), taught, out

    got, taught, out = jax.device_get(both(variables, image))
    assert got.shape == (4, 32, 32) and got.min() >= -1e-6 and got.max() <= 3
    corner = 0.0  # aligned corners: the map's corner is that of every level
    for level, theirs in enumerate(taught, start=1):
        a, b = np.asarray(theirs, np.float64)[:, 0, 0], np.asarray(out[f"stage{level}"], np.float64)[:, 0, 0]
        corner += 1 - (a * b).sum(1) / np.maximum(np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1), 1e-8)
    np.testing.assert_allclose(got[:, 0, 0], corner, atol=2e-5)


def test_a_bottleneck_for_other_maps_is_refused(fitted):
    variables, _, _, image = fitted
    maps_of = rd.make_anomaly_map(TINY, dataclasses.replace(STUDENT, widths=(8, 16, 32)))
    with pytest.raises(ValueError, match="this bottleneck was built for"):
        jax.eval_shape(lambda: maps_of(rd.fold(variables, TINY, STUDENT), image))
