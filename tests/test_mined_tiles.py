"""What a run of negative mining leaves to other methods: read, kept apart from judged patches, found again on slides."""

import json

import numpy as np
import pytest

from data_pipelines.cohort import SlideRecord
from data_pipelines.patches import patch_table
from data_pipelines.tiles import Grid, Tiles
from experiments.run.mined_tiles import read_mined, rows_on_slides
from experiments.run.program import UsageError
from experiments.run.slides import SlideSet
from srcc_jax.methods.slide_classification import Config, with_mined

HEADER = "query,query_path,rank,value,new,weak_row,slide_id,x,y,path\n"


def workdir(folder, lines, *, tile=64, mpp=2.0):
    """A finished work directory whose chosen arm is l2 with alpha 3, by the seed 42."""
    (folder / "seed_42").mkdir(parents=True)
    settings = {"seed": 42, "query": "l2", "alpha": 3, "tile": tile, "mpp": mpp}
    (folder / "metrics.json").write_text(json.dumps({"settings": settings}))
    (folder / "seed_42" / "mined_l2_3.csv").write_text(HEADER + "\n".join(lines) + "\n")
    return folder


def test_each_mined_tile_is_read_once_with_its_file(tmp_path):
    lines = [
        "0,q,0,1.5,1,7,s1,128,64,/slides/s1.tiff",
        "1,q,0,1.6,0,7,s1,128,64,/slides/s1.tiff",
        "1,q,1,2,1,9,,,,/p/a.png",
    ]
    mined = read_mined(str(workdir(tmp_path / "run", lines)))
    assert [str(path) for path in mined.path] == [str(tmp_path / "run/mined_tiles/s1_128_64.png"), "/p/a.png"]
    assert mined.slide_id.tolist() == ["s1", ""] and mined.side_um == 128
    np.testing.assert_array_equal(mined.x, [128, np.nan])
    other = read_mined(str(workdir(tmp_path / "other", lines[:1])))
    assert other.digest != mined.digest


def test_tiles_of_judged_slides_and_files_are_left_out(tmp_path):
    lines = [f"0,q,{n},1,1,{n},{slide},,,/p/{n}.png" for n, slide in enumerate(["s1", "s2", "", ""])]
    mined = read_mined(str(workdir(tmp_path, lines)))
    apart = patch_table([mined.path[3], tmp_path / "x.png"], ["normal", "tumour"], slide_id=["", "s2"])
    kept = mined.patches(label="normal", apart=apart)
    assert [path.name for path in kept.path] == ["0.png", "2.png"]
    assert set(kept.label) == {"normal"} and set(kept.split) == {"train"} and kept.slide_id.tolist() == ["s1", ""]


def test_what_is_no_finished_run_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no finished work directory"):
        read_mined(str(tmp_path / "nothing"))
    with pytest.raises(UsageError, match="nothing was mined"):
        read_mined(str(workdir(tmp_path / "empty", [])))


def slide_set(names, *, side=100.0, tile=100, mpp=1.0):
    """Slides of 5 x 5 tiles without gaps, level 0 being `mpp`."""
    i, j = (part.ravel() for part in np.mgrid[:5, :5].astype(np.int32))
    parts = []
    for name in names:
        zero = np.zeros(25, np.int32)
        share = np.ones(25, np.float32)
        place = {"x": side * j.astype(float), "y": side * i.astype(float), "side": np.full(25, side)}
        grid = Grid(tile=tile, stride=tile, mpp=mpp)
        parts.append(
            Tiles(grid, np.array([name]), zero, i, j, tile * j, tile * i, **place, tissue=share, annotated=0 * share)
        )
    records = tuple(SlideRecord(name, f"{name}.tiff", "label", name) for name in names)
    return SlideSet(records, Tiles.concatenate(parts), np.repeat(np.arange(len(names)), 25), ())


def test_mined_places_are_found_on_the_negative_slides(tmp_path):
    lines = ["0,q,0,1,1,0,s1,200,100,s1.tiff", "0,q,1,1,1,1,s2,0,0,s2.tiff", "0,q,2,1,1,2,s3,0,0,s3.tiff"]
    slides = slide_set(["s1", "s2", "s4"])
    for side_um, expected in (
        (200, {(1, 2), (1, 3), (2, 2), (2, 3)}),
        (40, {(1, 2)}),
    ):  # larger and smaller than a tile
        mined = read_mined(str(workdir(tmp_path / str(side_um), lines, tile=side_um, mpp=1.0)))
        found = rows_on_slides(mined, slides, np.array([True, False, True]))
        assert list(found) == [0]
        assert {(int(slides.tiles.i[row]), int(slides.tiles.j[row])) for row in found[0]} == expected
    with pytest.raises(UsageError, match="none of the mined tiles"):
        rows_on_slides(mined, slides, np.array([False, False, True]))


def test_mined_tiles_take_their_share_of_the_places():
    config = Config(mode="ws", positive="x", top_k=4, buffer=128, mined_share=0.5, seed=3)
    rows, mined = np.arange(10, 14), np.array([12, 30, 31, 32])
    for number in range(20):
        got = with_mined(rows, mined, config, slide=1, number=number)
        taken = got[np.isin(got, mined)]
        others = [row for row in rows if row not in taken[-2:]][:2]
        assert got[:2].tolist() == others and np.isin(got[2:], mined).all() and len(set(got.tolist())) == 4
        np.testing.assert_array_equal(got, with_mined(rows, mined, config, slide=1, number=number))
    one = Config(mode="ws", positive="x", top_k=1, mined_share=0.5, seed=3)
    turns = [with_mined(rows[:1], mined[1:], one, slide=1, number=number)[0] > 20 for number in range(200)]
    assert 70 < sum(turns) < 130
