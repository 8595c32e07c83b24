"""Classifiers of patches: schedules, balanced draws, a fit that is killed and continued, and what it says of patches."""

import jax
import numpy as np
import optax
import pytest
from PIL import Image

from data_pipelines.patches import PatchesError, PatchReader, WeightedRows, class_weights, read_patches
from experiments.run.model import Network
from experiments.run.patch_training import METRIC, PatchTrainer, Recipe, judged, softmax
from experiments.run.workdir import WorkdirError
from srcc_jax import schedules, train
from srcc_jax.models.zoo import init
from srcc_jax.parallel import make_mesh
from tests import small_networks
from tests.small_training import assert_same_bits

SIDE = 32
RECIPE = Recipe(batch=8, scoring_batch=8, epochs=3, learning_rate=3e-3)
TRAIN, VALIDATION, TEST = np.arange(0, 17), np.arange(17, 25), np.arange(25, 33)


class Killed(BaseException):
    """Stands for SIGKILL."""


@pytest.fixture(scope="module", autouse=True)
def quick_compiling():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """Noise, and under label 1 broad stripes; one patch in four is of label 1, and the last is not readable."""
    folder, random, lines = tmp_path_factory.mktemp("patches"), np.random.default_rng(0), ["path,label"]
    for number in range(33):
        image = random.integers(60, 200, (SIDE, SIDE, 3))
        if number % 4 == 0:
            image = image // 4 + 120 * (np.arange(SIDE) // 8 % 2)[:, None, None]
        Image.fromarray(image.astype(np.uint8)).save(folder / f"{number}.png")
        lines.append(f"{number}.png,{'striped' if number % 4 == 0 else 'plain'}")
    (folder / "32.png").write_text("no image")
    (folder / "list.csv").write_text("\n".join(lines))
    patches = read_patches(folder / "list.csv")
    return PatchReader(patches, patches.is_one_of(["striped"]).astype(np.float32), SIDE)


@pytest.fixture(scope="module")
def network():
    net = small_networks.architecture("tiny")
    return net, init(net, jax.random.key(0))


@pytest.fixture(scope="module")
def trainer(network):
    return PatchTrainer(network[0], RECIPE, make_mesh(), threads=1)


def begin(trainer, network, reader, folder, **changes):
    rows = {"train": TRAIN, "validation": VALIDATION, "seed": 1, **changes}
    return trainer.fit(network[1], reader, folder=folder, **rows)


@pytest.fixture(scope="module")
def whole(trainer, network, reader, tmp_path_factory):
    folder, rows = tmp_path_factory.mktemp("whole"), []
    found = begin(trainer, network, reader, folder, log=lambda step, row: rows.append((step, row)))
    return folder, found, rows


def test_the_rate_of_the_released_code():
    """20 steps in an epoch, half a period of 200 epochs: the numbers at epochs 0, 10, 20, 30 (hand-worked)."""
    steps = np.array([0, 10, 20, 30]) * 20 + 7
    rates = schedules.cosine_decay(steps, 1e-4, span=200, unit=20)
    np.testing.assert_allclose(rates, 1e-4 * np.array([1, 0.99384, 0.97553, 0.9455]), rtol=1e-5)


def test_the_rate_of_each_step_is_optax_s():
    wanted = optax.cosine_decay_schedule(3e-2, 40)
    found = schedules.cosine_decay(np.arange(41), 3e-2, span=40, unit=1)
    np.testing.assert_allclose(found, [wanted(step) for step in range(41)], atol=1e-8)


def test_fits_of_any_length_share_one_compiled_step():
    traced = []

    def loss(params, stats, batch, key):
        traced.append(key)
        return (params["a"] * batch["x"]).sum(), (stats, {})

    mesh, params = make_mesh(), {"a": np.zeros(4, np.float32)}
    step = train.make_train_step(loss, schedules.by_cosine(1.0, span=1), mesh)
    for span, second in ((4, 0.853553), (8, 0.961940)):  # the rate of the second step, ½ (1 + cos(π / span))
        state = train.init_state({"params": params}, schedules.by_cosine(1.0, span=span), 0, mesh)
        for _ in range(2):
            state, _ = step(state, {"x": np.ones(4, np.float32)})
        np.testing.assert_allclose(state.params["a"], -(1 + second) * np.ones(4), atol=1e-6)
    assert len(traced) == 1


def test_class_weights_and_draws():
    label = np.array([0, 0, 0, 1])
    weight = class_weights(label)
    np.testing.assert_allclose(weight, [1 / 3, 1 / 3, 1 / 3, 1])
    rows = WeightedRows(np.arange(10, 14), weight, 50, seed=3)
    drawn = np.concatenate([rows(step) for step in range(80)])
    share = [(drawn == row).mean() for row in range(10, 14)]
    np.testing.assert_allclose(share, [1 / 6, 1 / 6, 1 / 6, 1 / 2], atol=0.03)
    np.testing.assert_array_equal(WeightedRows(np.arange(10, 14), weight, 50, seed=3)(7), rows(7))
    assert (WeightedRows(np.arange(10, 14), weight, 50, seed=4)(7) != rows(7)).any()


def test_judged_against_numbers_by_hand():
    logits = np.array([[0.0, 0.0], [1000.0, 0.0], [0.0, np.log(3)]])
    label = np.array([0, 0, 1])
    found = judged(logits, label)
    assert found[METRIC] == pytest.approx((np.log(2) + 0 + np.log(4 / 3)) / 3)
    assert found["validation_accuracy"] == 1 and found["validation_auc"] == 1
    np.testing.assert_allclose(softmax(logits)[2], [0.25, 0.75])
    assert "validation_auc" not in judged(logits[:2], label[:2])


def test_a_fit_keeps_the_least_validation_loss(whole, reader):
    folder, found, rows = whole
    judged_rows = [(step, row) for step, row in rows if METRIC in row]
    assert [step for step, _ in judged_rows] == [3, 6, 9]  # 17 patches in batches of 8, three epochs
    step, best = min(judged_rows, key=lambda item: item[1][METRIC])
    assert (found.step, found.metrics[METRIC]) == (step, best[METRIC]) and best["validation_auc"] > 0.9
    assert sorted(path.name for path in folder.iterdir()) == ["fit.json", "model.json", "weights.npz"]
    assert_same_bits(Network.load(folder).variables, found.variables)


def test_a_killed_fit_ends_bit_for_bit_as_one_that_was_not(whole, trainer, network, reader, tmp_path):
    def log(step, row):
        if step == 5:
            raise Killed

    with pytest.raises(Killed):
        begin(trainer, network, reader, tmp_path, log=log)
    assert not (tmp_path / "model.json").exists() and (tmp_path / "checkpoints").exists()
    begin(trainer, network, reader, tmp_path)
    for name in ("weights.npz", "model.json"):
        assert (tmp_path / name).read_bytes() == (whole[0] / name).read_bytes()


def test_a_finished_fit_is_not_done_again(whole, trainer, network, reader):
    steps = []
    again = begin(trainer, network, reader, whole[0], log=lambda step, row: steps.append(step))
    assert not steps and again.step == whole[1].step
    assert_same_bits(again.variables, whole[1].variables)


def test_a_folder_of_another_fit_is_refused(whole, trainer, network, reader, tmp_path):
    with pytest.raises(WorkdirError, match="other patches or by another recipe"):
        begin(trainer, network, reader, whole[0], train=TRAIN[1:])
    (tmp_path / "fit.json").write_text("{}")
    with pytest.raises(WorkdirError, match="the checkpoints of a fit on other patches"):
        begin(trainer, network, reader, tmp_path)


def test_one_device_and_four_take_the_same_step(whole, network, reader, tmp_path):
    """Batch statistics are those of the whole batch; what differs is the order of sums."""
    rows = []
    alone = PatchTrainer(network[0], RECIPE, make_mesh(jax.devices()[:1]), threads=1)
    begin(alone, network, reader, tmp_path, log=lambda step, row: rows.append((step, row)))
    for found, wanted in zip(rows[:1], whole[2][:1], strict=True):
        assert found[0] == wanted[0] == 1
        for name in ("loss", "grad_norm"):
            assert found[1][name] == pytest.approx(wanted[1][name], rel=1e-5)


def test_outputs_of_patches(whole, trainer, network, reader, capsys):
    variables = whole[1].variables
    probability = trainer.probabilities(variables, reader, TEST)
    assert probability.shape == (8, 2) and np.isnan(probability[-1]).all()
    np.testing.assert_allclose(probability[:-1].sum(1), 1)
    features = trainer.features(variables, reader, TEST)
    assert features.shape == (8, 32) and np.isnan(features[-1]).all()
    head = variables["params"]["classifier"]
    np.testing.assert_allclose(
        softmax(features[:-1] @ head["kernel"] + head["bias"]), probability[:-1], atol=1e-5
    )  # the features are what the classifier sees
    parts = list(trainer.outputs(variables, reader, TEST[::-1]))
    assert np.concatenate([part.row for part in parts]).tolist() == TEST[::-1][1:].tolist()
    assert capsys.readouterr().err.count("left out: ") == 1 and list(trainer.unreadable) == [reader.patches.path[32]]


def test_patches_that_nobody_can_read_are_an_error(trainer, network, reader, tmp_path):
    with pytest.raises(PatchesError, match="no patch of a batch"):
        begin(trainer, network, reader, tmp_path / "a", train=np.array([32]))
    with pytest.raises(PatchesError, match="none of 1 validation patches"):
        begin(trainer, network, reader, tmp_path / "b", validation=np.array([32]))
