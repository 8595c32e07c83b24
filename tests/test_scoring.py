"""Scoring of tiles: folded and by windows as the plain network tile by tile; failures, waiting, devices, Grad-CAM."""

import time

import jax
import numpy as np
import pytest

from data_pipelines.scan import ScanBatch
from experiments.run.scoring import classifier_scorer, probability
from srcc_jax.kernels.top_k import select_top_k
from srcc_jax.models.architecture import normalize
from srcc_jax.models.zoo import architecture, build, init
from srcc_jax.parallel import make_mesh

TILE, SIDE, WINDOWS, ROWS = 32, 56, 6, 16
TINY = architecture("tiny", source="keras", classes=1, bn_momentum=0.0)


def pictures(rng, count):
    """uint8 [count, SIDE, SIDE, 3]: coloured cells."""
    return rng.integers(0, 256, (count, SIDE // 8, SIDE // 8, 3), np.uint8).repeat(8, 1).repeat(8, 2)


@pytest.fixture(scope="module")
def variables():
    """Fresh weights with the statistics of a few pictures, so that folding BatchNorm has something to do."""
    fresh = init(TINY, jax.random.key(3))
    network, keys = build(TINY), {"dropout": jax.random.key(0)}
    images = normalize(pictures(np.random.default_rng(3), 8), TINY)
    train = jax.jit(lambda images: network.apply(fresh, images, train=True, rngs=keys, mutable=["batch_stats"]))
    _, stats = train(images)
    return {"params": fresh["params"], **stats}


@pytest.fixture(scope="module")
def batches():
    """Two and a half batches over 16 rows in mixed order; row 7 cannot be read, row 12 is not scanned."""
    rng = np.random.default_rng(4)
    rows = [r for r in rng.permutation(ROWS).tolist() if r not in (7, 12)]
    made = []
    for begin in range(0, len(rows), WINDOWS):
        mine = rows[begin : begin + WINDOWS]
        row = np.full(WINDOWS, -1, np.int32)
        row[: len(mine)] = mine
        image = pictures(rng, 2)
        window = rng.integers(0, [2, SIDE - TILE + 1, SIDE - TILE + 1], (WINDOWS, 3)).astype(np.int32)
        failed = ((7, "corrupt"),) if begin else ()
        made.append(ScanBatch(image, window, row, len(mine), failed))
    return made


@pytest.fixture(scope="module")
def scorers():
    meshes = {"one": make_mesh(jax.devices()[:1]), "four": make_mesh()}
    return {name: classifier_scorer(TINY, tile=TILE, mesh=mesh, cam=True) for name, mesh in meshes.items()}


@pytest.fixture(scope="module")
def plain(variables, batches):
    """row -> logit and maps of the network with its BatchNorm, in eval mode, on the tile alone."""
    network = jax.jit(lambda tile: build(TINY).apply(variables, normalize(tile, TINY), train=False))
    found = {}
    for batch in batches:
        for (region, top, left), row in zip(batch.window[: batch.count], batch.row[: batch.count]):
            tile = batch.image[region, top : top + TILE, left : left + TILE]
            out = network(tile[None])
            found[int(row)] = (float(out["logits"][0, 0]), np.asarray(out["maps"][0]))
    return found


def test_logits_are_those_of_the_plain_network(scorers, variables, batches, plain):
    scorer = scorers["one"]
    logits = scorer.logits(scorer.fold(variables), batches, rows=ROWS)
    assert sorted(np.flatnonzero(np.isnan(logits))) == [7, 12]
    wanted = [plain[row][0] for row in sorted(plain)]
    assert np.ptp(wanted) > 0.01
    np.testing.assert_allclose(logits[sorted(plain)], wanted, rtol=1e-4, atol=1e-4)


def test_failed_rows_come_with_their_reasons(scorers, variables, batches):
    scorer = scorers["one"]
    scored = list(scorer.score(scorer.fold(variables), batches))
    assert [s.row.tolist() for s in scored] == [b.row[: b.count].tolist() for b in batches]
    assert {row for s in scored for row, _ in s.failed} == {7}


def test_four_devices_select_the_tiles_that_one_selects(scorers, variables, batches):
    """The selection of weak supervision: scores within 1e-5, and the same rows in the same order."""
    logits = {n: s.logits(s.fold(variables), batches, rows=ROWS) for n, s in scorers.items()}
    np.testing.assert_allclose(logits["four"], logits["one"], rtol=1e-5, atol=1e-5)
    slide = np.arange(ROWS) // 4
    rows = {n: np.asarray(select_top_k(values, slide, slides=4, k=3)[0]) for n, values in logits.items()}
    np.testing.assert_array_equal(rows["four"], rows["one"])
    assert not {7, 12} & set(rows["one"].ravel().tolist())


def test_grad_cam_is_its_closed_form(scorers, variables, batches, plain):
    """For pooling and a dense layer: ReLU of the maps weighted by that layer, divided by the number of pixels."""
    weights = np.asarray(variables["params"]["classifier"]["kernel"])[:, 0]
    scorer = scorers["four"]
    largest = 0.0
    for scored in scorer.score(scorer.fold(variables), batches):
        for row, cam in zip(scored.row, scored.outputs["cam"]):
            maps = plain[int(row)][1]
            wanted = np.maximum(maps @ weights, 0) / (maps.shape[0] * maps.shape[1])
            np.testing.assert_allclose(cam, wanted, rtol=1e-4, atol=1e-4 * np.abs(maps).max())
            largest = max(largest, float(cam.max()))
    assert largest > 0


def test_waiting_is_counted_where_the_source_is_slow(scorers, variables, batches):
    def slow():
        for batch in batches:
            time.sleep(0.3)
            yield batch

    scorer, shares, before = scorers["one"], [], scorers["one"].tiles
    for source in (batches, batches, slow()):  # the first compiles
        scorer.seconds = scorer.waited_seconds = 0.0
        scorer.logits(scorer.fold(variables), source, rows=ROWS)
        shares.append(scorer.waiting_share)
    assert 0 <= shares[1] < 0.5 < shares[2] <= 1
    assert scorer.tiles - before == 3 * sum(batch.count for batch in batches)


def test_probabilities_of_confident_models_keep_their_order():
    found = probability(np.array([-30.0, 0.0, 16.0, 20.0, np.nan], np.float32))
    assert found[1] == 0.5 and 0 < found[0] < 1e-12 and found[2] < found[3] < 1 and np.isnan(found[4])


def test_a_tile_gives_the_same_bits_whatever_shares_its_batch(scorers, variables, batches):
    """Its place, its neighbours and their number: processes that divide a cohort, and a run that goes on, batch otherwise."""
    scorer, batch = scorers["one"], batches[0]
    folded = scorer.fold(variables)
    found = {}
    for order in ([0, 1, 2, 3, 4, 5], [5, 3, 4, 0, 2, 1], [1, 2, 3], [2, 0], [3], [4], [5]):
        window, row = np.zeros_like(batch.window), np.full_like(batch.row, -1)
        window[: len(order)], row[: len(order)] = batch.window[order], batch.row[order]
        (scored,) = scorer.score(folded, [ScanBatch(batch.image, window, row, len(order), ())])
        for place, tile in enumerate(scored.row):
            found.setdefault(int(tile), []).append(
                b"".join(values[place].tobytes() for values in scored.outputs.values())
            )
    assert len(found) == 6 and all(len(values) > 2 and len(set(values)) == 1 for values in found.values())
