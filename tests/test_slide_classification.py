"""Samplers, selection and score of Kanavati 2021 against worked numbers."""

import numpy as np
import pytest

from srcc_jax.methods import slide_classification as sc


def config(**changes):
    return sc.Config(**{"tiles_per_slide": 4, "batch": 4, "buffer": 8, "top_k": 1, **changes})


def test_draws_alternate_and_use_each_negative_once():
    draws = sc.balanced_draws(np.array([0, 1, 0, 0]), seed=3, epoch=0)
    assert draws[::2].tolist() == [1, 1, 1]
    assert sorted(draws[1::2].tolist()) == [0, 2, 3]


def test_draws_differ_between_epochs_and_repeat_for_a_seed():
    labels = np.array([1, 1, 1] + [0] * 12)
    first, again, later = (sc.balanced_draws(labels, seed=7, epoch=e) for e in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != later).any()
    assert np.bincount(first, minlength=15)[:3].tolist() == [4, 4, 4]


def test_more_positives_than_negatives_use_every_positive():
    draws = sc.balanced_draws(np.array([1, 1, 1, 0]), seed=0, epoch=0)
    assert sorted(draws[::2].tolist()) == [0, 1, 2] and draws[1::2].tolist() == [3, 3, 3]


def test_one_class_is_refused_with_the_cure():
    with pytest.raises(ValueError, match=r"both classes.*--positive"):
        sc.balanced_draws(np.ones(3, int), seed=0, epoch=0)


def test_epoch_of_the_paper_has_4162_and_a_half_batches():
    labels = np.array([1] * 100 + [0] * 1665)
    sampler = sc.SupervisedSampler(sc.Config(), [np.arange(5)] * len(labels), labels)
    assert sampler.steps_per_epoch == 4162.5
    weak = sc.WeakSampler(sc.Config(), labels)
    assert weak.draws_per_epoch == 3330 and weak.steps_per_round == 4 and weak.draws_per_round == 128
    assert weak.steps_per_epoch == 3330 / 32


def test_supervised_rows_are_a_function_of_the_step_and_balanced_over_an_epoch():
    labels = np.array([1, 0, 0, 0])
    candidates = [np.arange(2), np.arange(10, 30), np.arange(30, 50), np.arange(50, 70)]
    sampler = sc.SupervisedSampler(config(), candidates, labels)
    batches = [sampler(step) for step in range(6)]  # 6 draws of 4 tiles: 24 tiles, 6 batches
    for step in (5, 0, 3):
        for name, values in sc.SupervisedSampler(config(), candidates, labels)(step).items():
            np.testing.assert_array_equal(values, batches[step][name])
    label, row = (np.concatenate([b[name] for b in batches]) for name in ("label", "row"))
    assert label.sum() == 12
    assert set(row[label == 1]) <= {0, 1} and row[label == 0].min() >= 10
    assert [int(((row >= lo) & (row < lo + 20)).sum()) for lo in (10, 30, 50)] == [4, 4, 4]
    assert np.abs(np.concatenate([b["shift"] for b in batches])).max() <= 16


def test_a_batch_may_cross_the_end_of_an_epoch():
    sampler = sc.SupervisedSampler(
        config(batch=8, buffer=8, tiles_per_slide=3), [np.arange(3), np.arange(3, 9)], np.array([1, 0])
    )
    assert sampler.steps_per_epoch == 0.75
    assert sampler(0)["row"].shape == (8,) and sampler(1)["label"].shape == (8,)


def test_candidates_follow_mode_and_annotation():
    labels, slide = np.array([1, 0]), np.array([0, 0, 0, 1, 1])
    annotated = np.array([0, 0.001, 0.6, 0, 0])

    def rows(supervised, annotations):
        settings = config(annotations=annotations)
        found = sc.candidate_rows(settings, supervised=supervised, labels=labels, slide=slide, annotated=annotated)
        return [r.tolist() for r in found]

    assert rows(True, True) == rows(True, False) == rows(False, True) == [[1, 2], [3, 4]]
    assert rows(False, False) == [[0, 1, 2], [3, 4]]


def test_a_share_of_the_tile_may_be_asked_for():
    tiles = {"labels": np.array([1, 0]), "slide": np.array([0, 0, 0, 1]), "annotated": np.array([0.2, 0.5, 0.6, 0])}
    rows = sc.candidate_rows(config(min_annotated=0.5), supervised=True, **tiles)
    assert [r.tolist() for r in rows] == [[2], [3]]


def test_weak_rounds_fill_the_buffer_and_cross_epochs():
    labels = np.array([1, 0, 0, 0])  # 6 draws an epoch, 8 a round
    sampler = sc.WeakSampler(config(), labels)
    both = np.concatenate([sampler.draws(0), sampler.draws(1), sampler.draws(2)])
    epochs = [sc.balanced_draws(labels, seed=0, epoch=e) for e in range(4)]
    np.testing.assert_array_equal(both, np.concatenate(epochs))


def test_rounds_end_with_the_last_epoch_and_are_validated_where_one_ends():
    sampler = sc.WeakSampler(config(max_epochs=5), np.array([1, 0, 0, 0]))  # 30 draws, 8 a round
    assert sampler.rounds == 4
    assert [sampler.finished(number) for number in range(5)] == [False, False, False, True, True]
    long = sc.WeakSampler(config(max_epochs=4), np.array([1] + [0] * 9))  # 18 draws an epoch: 72, that is 9 rounds
    assert long.rounds == 9
    assert [number for number in range(9) if long.ends_epoch(number)] == [2, 4, 6, 8]


def test_candidates_are_those_of_a_loop_over_slides():
    rng = np.random.default_rng(0)
    labels, slide = np.array([1, 0, 1, 0, 0]), np.sort(rng.integers(0, 4, 60))  # the last slide has no tile
    annotated = rng.uniform(0, 1, 60) * (rng.uniform(0, 1, 60) < 0.5)
    settings = config(min_annotated=0.3)
    found = sc.candidate_rows(settings, supervised=True, labels=labels, slide=slide, annotated=annotated)
    for number, rows in enumerate(found):
        wanted = [n for n in range(60) if slide[n] == number and (labels[number] == 0 or annotated[n] > 0.3)]
        assert rows.tolist() == wanted
    assert len(found) == 5 and len(found[4]) == 0


def test_weak_batches_hold_what_was_chosen_with_the_slides_label():
    labels = np.array([1, 0, 0])
    sampler = sc.WeakSampler(config(top_k=2, buffer=8, batch=4), labels)
    chosen = {0: np.array([5, 3]), 1: np.array([20]), 2: np.array([30, 31])}
    rows = sampler.rows_of_step(1, chosen)
    batches = [rows(step) for step in (2, 3)]  # the steps of round 1
    row, label, weight = (np.concatenate([b[name] for b in batches]) for name in ("row", "label", "weight"))
    assert weight.sum() == sum(len(chosen[int(s)]) for s in sampler.draws(1))
    assert set(row[(label == 1) & (weight == 1)]) == {3, 5}
    assert set(row[(label == 0) & (weight == 1)]) <= {20, 30, 31}


def test_slide_score_is_the_maximum_and_ignores_what_could_not_be_read():
    scores = sc.slide_scores(np.array([0.1, 0.7, np.nan, 0.2, np.nan]), np.array([0, 0, 0, 1, 2]), slides=3)
    np.testing.assert_array_equal(scores, [0.7, 0.2, np.nan])


def test_tile_loss_counts_each_class_half():
    logit = np.log(np.array([0.9, 0.8, 0.2, 0.6]) / np.array([0.1, 0.2, 0.8, 0.4]))
    loss = sc.tile_loss(logit, np.array([1, 1, 1, 0]))
    assert loss == pytest.approx((-np.log([0.9, 0.8, 0.2]).mean() - np.log(0.4)) / 2)


def test_slide_loss_is_the_mean_cross_entropy():
    logit = np.log(np.array([0.9, 0.2]) / np.array([0.1, 0.8]))
    assert sc.slide_loss(logit, np.array([1, 0])) == pytest.approx(-(np.log(0.9) + np.log(0.8)) / 2)


def test_buffer_must_be_whole_batches():
    with pytest.raises(ValueError, match="--buffer=130"):
        sc.Config(buffer=130)
