"""The journal of a slide: whole blocks only, and what goes on from it is what was never stopped, to the bit."""

import dataclasses

import numpy as np
import pytest

from data_pipelines.tiles import Grid, tile_slide
from experiments.run.journal import Journal, SlideScores

GRID = Grid(tile=32, stride=16, mpp=1.0)
BASIS = {"model": "m", "slide mpp": 0.5}
BLOCK = 4


@pytest.fixture(scope="module")
def tiles():
    tissue = np.random.default_rng(0).random((12, 12)) > 0.2
    size = {"width": 384, "height": 384, "slide_mpp": 0.5, "mask_downsample": 32.0}
    return tile_slide("s", **size, grid=GRID, tissue=tissue)


@pytest.fixture(scope="module")
def results(tiles):
    """logit [N], cam [N, 3, 3]; the tiles 5 and 40 cannot be read."""
    rng = np.random.default_rng(1)
    return rng.normal(size=len(tiles)).astype(np.float32), rng.random((len(tiles), 3, 3)).astype(np.float32)


BAD = {5: "corrupt", 40: "corrupt too"}


def scores_of(tiles, *, cam=True):
    return SlideScores(tiles, slide_mpp=0.5, block=BLOCK, maps="cam" if cam else None)


def feed(scores, tiles, results, *, stop_after=None, cam=True):
    """Hands the tiles that remain over in the order of scanning, three at a time; returns the last journal between blocks."""
    remaining = [row for rows in tiles.blocks(BLOCK) for row in rows if not scores.seen[row]]
    journal, logit, maps = None, *results
    for begin in range(0, len(remaining), 3):
        if stop_after is not None and scores.seen.sum() >= stop_after:
            break
        rows = np.asarray(remaining[begin : begin + 3])
        scores.fail({int(row): BAD[row] for row in rows if row in BAD})
        rows = np.asarray([row for row in rows if row not in BAD], np.int64)
        for part in scores.blocks_of(rows):
            outputs = {"logit": logit[rows[part]]} | ({"cam": maps[rows[part]]} if cam else {})
            scores.add(rows[part], outputs)
            if scores.between_blocks:
                journal = scores.journal(BASIS, {"read": 1.0})
    return journal


def assert_same(found, wanted):
    for field in dataclasses.fields(Journal):
        np.testing.assert_equal(getattr(found, field.name), getattr(wanted, field.name), err_msg=field.name)


@pytest.fixture(scope="module")
def whole(tiles, results):
    scores = scores_of(tiles)
    feed(scores, tiles, results)
    return scores


@pytest.mark.parametrize("stop_after", [20, 50, 90])
def test_going_on_from_a_file_equals_never_stopping(tiles, results, whole, tmp_path, stop_after):
    begun = scores_of(tiles)
    journal = feed(begun, tiles, results, stop_after=stop_after)
    assert 0 < journal.seen.sum() <= begun.seen.sum() < len(tiles)
    journal.save(tmp_path / "scores.npz")
    again = scores_of(tiles)
    again.resume(Journal.load(tmp_path / "scores.npz"))
    feed(again, tiles, results)
    assert again.complete and whole.complete and again.reasons == whole.reasons == BAD
    assert_same(again.journal(BASIS, {}), whole.journal(BASIS, {}))
    np.testing.assert_array_equal(again.mean_map().values, whole.mean_map().values)


def test_a_journal_holds_whole_blocks_alone(tiles, results):
    journal = feed(scores_of(tiles), tiles, results, stop_after=50)
    for rows in tiles.blocks(BLOCK):
        assert journal.seen[rows].all() or not journal.seen[rows].any()
    known = np.isfinite(journal.kept["values"])
    assert (known <= journal.seen).all() and (journal.kept["map_times"] == known).all()


def test_inside_a_block_there_is_no_journal(tiles, results):
    scores = scores_of(tiles)
    rows = tiles.blocks(BLOCK)[0][:2]
    scores.add(rows, {"logit": results[0][rows], "cam": results[1][rows]})
    assert not scores.between_blocks
    with pytest.raises(ValueError, match="half done"):
        scores.journal(BASIS, {})


def test_failures_that_come_before_their_block_are_left_out(tiles, results):
    """A batch may tell of a failure in the block that comes next."""
    scores = scores_of(tiles)
    first, second = tiles.blocks(BLOCK)[:2]
    scores.fail({int(second[0]): "corrupt"})
    scores.add(first, {"logit": results[0][first], "cam": results[1][first]})
    journal = scores.journal(BASIS, {})
    assert journal.seen[first].all() and not journal.seen[second].any() and journal.reasons == {}


def test_what_a_journal_fits(tiles, results, whole):
    journal, count = whole.journal(BASIS, {}), len(tiles)
    assert journal.fits(BASIS, count) and SlideScores.has_maps(journal)
    assert not journal.fits({**BASIS, "model": "n"}, count) and not journal.fits(BASIS, count + 1)
    plain = scores_of(tiles)
    feed(plain, tiles, results, cam=False)
    assert plain.mean_map() is None and not SlideScores.has_maps(plain.journal(BASIS, {}))


def test_maps_that_are_not_wanted_are_not_averaged(tiles, results):
    """Although the network may compute them, or the journal hold them."""
    scores = scores_of(tiles, cam=False)
    feed(scores, tiles, results)
    assert scores.complete and scores.mean_map() is None
    assert set(scores.journal(BASIS, {}).kept) == {"values"}


def test_values_go_by_the_name_that_was_asked_for(tiles, results):
    scores = SlideScores(tiles, slide_mpp=0.5, block=BLOCK, output="score")
    rows = tiles.blocks(BLOCK)[0]
    scores.add(rows, {"score": results[0][rows], "logit": np.zeros(len(rows))})
    np.testing.assert_array_equal(scores.values[rows], results[0][rows])


@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04 cut off", b"text"])
def test_a_file_that_is_no_journal_is_none(tmp_path, content):
    if content is not None:
        (tmp_path / "scores.npz").write_bytes(content)
    assert Journal.load(tmp_path / "scores.npz") is None
