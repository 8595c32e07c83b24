"""The grid, the tiles of a slide, and the table: against slow twins, and there and back through files."""

import csv
import dataclasses
import json

import numpy as np
import pytest

from data_pipelines.annotations import Shape, read_annotation
from data_pipelines.tile_table import FIELDS
from data_pipelines.tiles import Grid, Tiles, TilesError, interval_sums, tile_slide

X10 = Grid(tile=224, stride=112, mpp=1.0)


def rectangle(x0, y0, x1, y1, group=""):
    return Shape("polygon", np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]], float), group=group)


def whole(slide_id="s", *, width, height, slide_mpp=1.0, grid=X10, downsample=8.0, tissue=None, **options):
    if tissue is None:
        tissue = np.ones((round(height / downsample), round(width / downsample)), bool)
    return tile_slide(
        slide_id,
        width=width,
        height=height,
        slide_mpp=slide_mpp,
        grid=grid,
        tissue=tissue,
        mask_downsample=downsample,
        **options,
    )


def same(one, other):
    assert one.grid == other.grid and one.slides.tolist() == other.slides.tolist()
    assert list(one.columns) == list(other.columns)
    pairs = [(getattr(one, name), getattr(other, name)) for name in FIELDS]
    for mine, its in [*pairs, *zip(one.columns.values(), other.columns.values())]:
        assert mine.dtype == its.dtype
        np.testing.assert_array_equal(mine, its)


def test_positions_of_the_cards():
    assert [len(X10.positions(length)) for length in (250, 500, 1000)] == [1, 3, 7]
    assert [X10.positions(length)[-1] + 224 for length in (250, 500, 1000)] == [224, 448, 896]
    flush = dataclasses.replace(X10, flush=True)
    assert [len(flush.positions(length)) for length in (250, 500, 1000)] == [2, 4, 8]
    assert [flush.positions(length)[-1] + 224 for length in (250, 500, 1000)] == [250, 500, 1000]
    assert flush.positions(448).tolist() == X10.positions(448).tolist() == [0, 112, 224]  # flush already
    assert flush.positions(100).tolist() == X10.positions(100).tolist() == [0]  # shorter than a tile
    assert X10.positions(335.999).tolist() == [0, 112] and X10.positions(335.9).tolist() == [0]  # rounding of the scale
    assert Grid(tile=4, stride=6, mpp=1.0).positions(16).tolist() == [0, 6, 12]


@pytest.mark.parametrize("wrong", [{"tile": 0}, {"stride": 0}, {"mpp": 0.0}, {"mpp": float("nan")}, {"mpp": -1.0}])
def test_a_grid_that_is_none_is_refused(wrong):
    with pytest.raises(ValueError, match="a grid needs"):
        dataclasses.replace(X10, **wrong)


def test_digestpath_crops_have_the_tiles_of_the_card():
    counts = {}
    for mpp in (2.0, 1.0, 0.5):
        grid = Grid(tile=224, stride=112, mpp=mpp, flush=True)
        tiles = whole(width=2000, height=2000, slide_mpp=0.25, grid=grid)
        counts[mpp] = len(tiles)
        assert (tiles.x + tiles.side).max() == pytest.approx(2000)
        assert len(whole(width=2000, height=2000, slide_mpp=0.25, grid=dataclasses.replace(grid, flush=False))) in (
            1,
            9,
            49,
        )
    assert counts == {2.0: 4, 1.0: 16, 0.5: 64}


def test_level_0_places_are_the_model_pixels_scaled():
    grid = Grid(tile=224, stride=112, mpp=0.5, flush=True)
    tiles = whole(width=3000, height=1777, slide_mpp=0.2431, grid=grid, downsample=32.0)
    scale = 0.5 / 0.2431
    np.testing.assert_allclose(tiles.x, tiles.u * scale, rtol=1e-15)
    np.testing.assert_allclose(tiles.y, tiles.v * scale, rtol=1e-15)
    np.testing.assert_allclose(tiles.side, 224 * scale)
    regular = tiles.j < tiles.j.max()
    np.testing.assert_array_equal(tiles.u[regular], tiles.j[regular] * 112)
    assert tiles.u.max() == int(3000 / scale) - 224 and tiles.v.max() == int(1777 / scale) - 224
    assert (np.diff(tiles.i) >= 0).all()  # row by row
    assert tiles.u.dtype == tiles.v.dtype == tiles.i.dtype == np.int32 and tiles.x.dtype == np.float64
    assert (tiles.mpp, tiles.tile, tiles.stride) == (0.5, 224, 112)


def test_a_slide_smaller_than_a_tile_has_one():
    tiles = whole(width=100, height=90)
    assert (tiles.u.tolist(), tiles.v.tolist(), tiles.tissue.tolist()) == ([0], [0], [1.0])
    assert len(whole(width=47, height=45, downsample=32.0)) == 1  # whose mask is one cell, smaller than the slide
    assert len(whole(width=100, height=90, tissue=np.zeros((11, 12), bool))) == 0


def test_a_slide_without_tissue_has_no_tiles_but_is_known():
    tiles = whole(width=2000, height=2000, tissue=np.zeros((250, 250), bool))
    assert len(tiles) == 0 and tiles.slides.tolist() == ["s"] and tiles.blocks() == []


def test_interval_sums_count_parts():
    values = np.array([[True], [False], [True], [True]])
    found = interval_sums(values, np.array([0, 0.5, 1.2, -3, 3.5, 2]), np.array([4, 2.5, 1.8, 9, 3.75, 2]))
    np.testing.assert_allclose(found[:, 0], [3, 1.0, 0, 3, 0.25, 0])


@pytest.mark.parametrize("downsample", [7.0, 8.0, 16.3])
def test_tissue_is_the_part_of_the_area(downsample):
    rng = np.random.default_rng(0)
    width, height, fine = 1000, 700, 10
    tissue = rng.random((round(height / downsample), round(width / downsample))) < 0.5
    grid = Grid(tile=50, stride=30, mpp=2.0, flush=True)
    tiles = whole(width=width, height=height, grid=grid, downsample=downsample, tissue=tissue, min_tissue=0.0)
    assert len(tiles) == len(grid.positions(500)) * len(grid.positions(350))
    for row in rng.choice(len(tiles), 20, replace=False):  # by points, 10 to a level-0 pixel
        steps = (np.arange(100 * fine) + 0.5) / fine
        x = ((tiles.x[row] + steps) // downsample).astype(int)
        y = ((tiles.y[row] + steps) // downsample).astype(int)
        inside = tissue[np.ix_(y[y < tissue.shape[0]], x[x < tissue.shape[1]])]
        assert tiles.tissue[row] == pytest.approx(inside.sum() / (100 * fine) ** 2, abs=2e-3)


def test_tiles_are_kept_from_half_tissue_on():
    tissue = np.zeros((28, 56), bool)
    tissue[:, 28:] = True  # the right half of 448 x 224 at 8
    tiles = whole(width=448, height=224, tissue=tissue)
    assert tiles.j.tolist() == [1, 2] and tiles.tissue.tolist() == [0.5, 1.0]
    assert whole(width=448, height=224, tissue=tissue, min_tissue=0.51).j.tolist() == [2]


def test_a_mask_of_another_slide_is_refused():
    with pytest.raises(
        ValueError, match=r"s: a tissue mask bool \[28, 28\] at downsample 8 does not fit .*2000 x 2000"
    ):
        whole(width=2000, height=2000, tissue=np.ones((28, 28), bool))
    with pytest.raises(ValueError, match="float64"):
        whole(width=224, height=224, tissue=np.ones((28, 28)))


def test_annotated_is_the_part_of_the_area():
    grid = Grid(tile=224, stride=224, mpp=1.0)
    shapes = [rectangle(0, 0, 112, 224), rectangle(300, 100, 314, 114)]
    tiles = whole(width=672, height=224, grid=grid, shapes=shapes)
    assert tiles.annotated[0] == 0.5
    assert tiles.annotated[1] == pytest.approx(14 * 14 / 224**2, abs=4 / 256)
    assert tiles.annotated[1] > 0 and tiles.annotated[2] == 0
    assert not whole(width=672, height=224, grid=grid).annotated.any()


@pytest.mark.parametrize("shape", [rectangle(500, 100, 503, 103), Shape("point", np.array([[501.5, 101.5]]))])
def test_a_shape_smaller_than_a_cell_marks_all_its_tiles_and_no_other(shape):
    tiles = whole(width=1120, height=560, shapes=[shape])
    holds = (tiles.x < 503) & (tiles.x + 224 > 500) & (tiles.y < 103) & (tiles.y + 224 > 100)
    np.testing.assert_array_equal(tiles.annotated > 0, holds)
    assert holds.sum() == 2


def test_any_overlap_is_exact_on_the_papers_grid():
    rng = np.random.default_rng(1)
    grid = Grid(tile=224, stride=112, mpp=0.5)
    for _ in range(30):
        x, y, w, h = rng.uniform(0, 3000, 2).tolist() + rng.uniform(1, 500, 2).tolist()
        tiles = whole(width=4000, height=3600, slide_mpp=0.25, grid=grid, shapes=[rectangle(x, y, x + w, y + h)])
        overlap = (tiles.x < x + w) & (tiles.x + 448 > x) & (tiles.y < y + h) & (tiles.y + 448 > y)
        np.testing.assert_array_equal(tiles.annotated > 0, overlap)


def test_groups_exclusions_and_shapes_beyond_the_slide():
    shapes = [
        rectangle(-500, -500, 112, 900, "tumour"),
        rectangle(0, 0, 56, 900, "_2"),
        rectangle(336, 0, 448, 900, "normal"),
    ]
    grid = Grid(tile=224, stride=224, mpp=1.0)
    size = {"width": 448, "height": 224, "grid": grid, "shapes": shapes}
    assert whole(**size, groups={"tumour"}).annotated.tolist() == [0.25, 0.0]
    assert whole(**size).annotated.tolist() == [0.25, 0.5]
    assert whole(**size, exclude=()).annotated.tolist() == [0.5, 0.5]
    assert not whole(**size, groups={"other"}).annotated.any()
    assert not whole(width=448, height=224, grid=grid, shapes=[rectangle(900, 0, 950, 9)]).annotated.any()


def shoelace(ring):
    x, y = ring.T
    return abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2


def test_annotated_area_of_a_real_slide(shared_data):
    shapes = read_annotation(shared_data / "annotations/camelyon16_ncrf_json/Tumor_064.json")
    tiles = whole(
        width=100_000,
        height=180_000,
        slide_mpp=0.243,
        grid=Grid(tile=224, stride=224, mpp=0.972),  # side by side: each pixel is in one tile
        downsample=100.0,
        tissue=np.ones((1800, 1000), bool),
        shapes=shapes,
    )
    area = sum(shoelace(shape.exterior) - sum(map(shoelace, shape.holes)) for shape in shapes)
    assert (tiles.annotated * tiles.side**2).sum() == pytest.approx(area, rel=0.01)


def table():
    rng = np.random.default_rng(0)
    tissue = rng.random((60, 70)) < 0.6
    shapes = [rectangle(50, 50, 90, 80)]
    grid = Grid(tile=32, stride=16, mpp=0.5, flush=True)
    size = {"width": 560, "height": 480, "slide_mpp": 0.2431, "grid": grid, "shapes": shapes}
    one = whole('a,"1"', tissue=tissue, **size)
    other = whole("Ω b", tissue=tissue[:, ::-1], **size)
    both = Tiles.concatenate([one, other])
    columns = {
        "score": rng.random(len(both), np.float32),
        "double": rng.standard_normal(len(both)),
        "fold": rng.integers(-(2**60), 2**60, len(both)),
        "mined": rng.random(len(both)) < 0.5,
        "note": np.array([f'007, "n" {k}' for k in range(len(both))]),
    }
    columns["double"][:3] = np.nan, np.inf, -0.0
    for name, values in columns.items():
        both = both.with_column(name, values)
    return both


@pytest.mark.parametrize("suffix", ["npz", "csv"])
def test_tables_come_back_exactly(tmp_path, suffix):
    tiles = table()
    assert len(tiles) > 200
    for version in (tiles, tiles.where(np.zeros(len(tiles), bool)), tiles.take([5, 3, 3])):
        path = tmp_path / "made" / f"tiles.{suffix}"
        version.save(path)
        same(Tiles.load(path), version)
        assert [p.name for p in path.parent.iterdir()] == [path.name]  # nothing half-written stays


def test_the_csv_reads_as_a_plain_table(tmp_path):
    tiles = table()
    tiles.save(tmp_path / "tiles.csv")
    with open(tmp_path / "tiles.csv", newline="") as file:
        first = file.readline()
        rows = list(csv.DictReader(file))
    assert json.loads(first.removeprefix("#"))["grid"]["stride"] == 16
    assert len(rows) == len(tiles) and rows[0]["slide_id"] == 'a,"1"' and float(rows[7]["x"]) == tiles.x[7]


@pytest.mark.parametrize("name, content", [("a.csv", "x,y\n1,2\n"), ("a.csv", ""), ("a.npz", "no zip"), ("a.npz", "")])
def test_files_that_are_no_tables_are_named(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(TilesError, match=f"{name}: not a tile table"):
        Tiles.load(tmp_path / name)


def test_other_suffixes_and_truncated_files(tmp_path):
    tiles = table()
    with pytest.raises(TilesError, match=r"\.npz or \.csv"):
        tiles.save(tmp_path / "tiles.txt")
    with pytest.raises(TilesError, match=r"\.npz or \.csv"):
        Tiles.load(tmp_path / "tiles.txt")
    tiles.save(tmp_path / "tiles.npz")
    (tmp_path / "tiles.npz").write_bytes((tmp_path / "tiles.npz").read_bytes()[:2000])
    with pytest.raises(TilesError, match=r"tiles\.npz"):
        Tiles.load(tmp_path / "tiles.npz")


def test_filters_and_columns():
    tiles = table()
    kept = tiles.where(tiles.columns["mined"])
    assert len(kept) == tiles.columns["mined"].sum() and kept.columns["mined"].all()
    np.testing.assert_array_equal(kept.slide_id, tiles.slide_id[tiles.columns["mined"]])
    assert tiles.take([4, 2]).u.tolist() == [tiles.u[4], tiles.u[2]]
    with pytest.raises(TilesError, match="bool"):
        tiles.where(np.arange(len(tiles)))
    with pytest.raises(TilesError, match="one value per tile"):
        tiles.with_column("short", [1, 2])
    with pytest.raises(TilesError, match="fixed column"):
        tiles.with_column("x", tiles.y)
    with pytest.raises(TilesError, match="numbers, truth values or text"):
        tiles.with_column("object", np.array([None] * len(tiles)))


def test_concatenation_keeps_slides_apart_and_checks():
    tiles = table()
    parts = [tiles.where(tiles.slide == 1), tiles.where(tiles.slide == 0), tiles.where(tiles.slide == 1)]
    joined = Tiles.concatenate(parts)
    np.testing.assert_array_equal(joined.slide_id, np.concatenate([part.slide_id for part in parts]))
    assert joined.slides.tolist() == tiles.slides.tolist()
    other = dataclasses.replace(tiles, grid=dataclasses.replace(tiles.grid, mpp=1.0))
    with pytest.raises(TilesError, match="different grids"):
        Tiles.concatenate([tiles, other])
    with pytest.raises(TilesError, match="columns differ"):
        Tiles.concatenate([tiles, tiles.with_column("more", tiles.u)])
    with pytest.raises(TilesError, match="nothing"):
        Tiles.concatenate([])


def test_join_matches_by_slide_and_place():
    tiles = table()
    bare = dataclasses.replace(tiles, columns={})
    shuffled = np.random.default_rng(1).permutation(len(tiles))
    other = Tiles.concatenate([tiles.take(shuffled).where(tiles.slide[shuffled] == k) for k in (1, 0)])
    joined = bare.join(other.with_column("rank", np.arange(len(tiles))))
    np.testing.assert_array_equal(joined.columns["fold"], tiles.columns["fold"])
    few = bare.take([7, 300]).join(other)
    np.testing.assert_array_equal(few.columns["note"], tiles.columns["note"][[7, 300]])
    with pytest.raises(TilesError, match=f"lacks {len(tiles) - 10} of {len(tiles)}"):
        bare.join(tiles.take(np.arange(10)))
    with pytest.raises(TilesError, match="lacks"):
        bare.join(tiles.take([]))
    with pytest.raises(TilesError, match="more than once"):
        bare.join(tiles.take([0, 0]))


@pytest.mark.parametrize("flush", [False, True])
@pytest.mark.parametrize("size", [1, 3, 8])
def test_blocks_hold_every_tile_once_within_their_extent(flush, size):
    rng = np.random.default_rng(0)
    grid = Grid(tile=32, stride=12, mpp=1.0, flush=flush)
    parts = [
        whole(
            name,
            width=w,
            height=h,
            grid=grid,
            tissue=np.kron(rng.random((h // 40, w // 40)) < 0.5, np.ones((5, 5))) > 0,
        )
        for name, w, h in (("a", 400, 320), ("b", 40, 800), ("c", 600, 40))
    ]
    tiles = Tiles.concatenate(parts)
    tiles = tiles.take(rng.permutation(len(tiles)))
    blocks = tiles.blocks(size)
    assert sorted(np.concatenate(blocks).tolist()) == list(range(len(tiles)))
    keys = []
    for rows in blocks:
        assert (np.diff(rows) > 0).all() and rows.dtype == np.int64
        for place in (tiles.u[rows], tiles.v[rows]):
            assert place.max() - place.min() <= (size - 1) * 12
        (key,) = {(s, i // size, j // size) for s, i, j in zip(tiles.slide[rows], tiles.i[rows], tiles.j[rows])}
        keys.append(key)
    assert keys == sorted(keys) and len(set(keys)) == len(keys)


def test_a_large_slide_is_tiled_in_a_moment():
    grid = Grid(tile=224, stride=112, mpp=0.5)
    angle = np.linspace(0, 2 * np.pi, 100_000, endpoint=False)
    outline = Shape("polygon", 60_000 + 50_000 * np.stack([np.cos(angle), np.sin(angle)], axis=1))
    tiles = whole(
        width=120_000,
        height=120_000,
        slide_mpp=0.25,
        grid=grid,
        downsample=32.0,
        tissue=np.ones((3750, 3750), bool),
        shapes=[outline],
    )
    assert len(tiles) == 534**2
    assert (tiles.annotated > 0.5).mean() == pytest.approx(np.pi * 50**2 / 120**2, rel=0.01)
