"""Feature files as the two tools lay them out, read the way their consumers do, whole or not there, always the same bytes."""

import h5py
import numpy as np
import pytest

from data_pipelines.feature_files import (
    CHUNK_ROWS,
    TiledSlide,
    read_tiles,
    trident_folder,
    write_clam,
    write_trident,
)
from data_pipelines.tile_table import Grid

SLIDE = TiledSlide(
    slide_id="S.1", grid=Grid(224, 112, 1.0), slide_mpp=0.2528, mpp_source="tiff", width=50_000, height=40_000
)
FOLDER = "10x_224px_112px_overlap"


def rows(count, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "coords": rng.uniform(0, 40_000, (count, 2)),
        "features": rng.random((count, 6), np.float32),
        "attention_scores": rng.random(count, np.float32),
    }


def fill(writer, table, batch):
    with writer as tiles:
        for first in range(0, len(table["coords"]), batch):
            tiles.append(**{name: values[first : first + batch] for name, values in table.items()})


def clam(folder, table, batch=100, slide=SLIDE):
    fill(write_clam(folder, slide, features=6, scores=["attention_scores"]), table, batch)


def trident(folder, table, batch=100, slide=SLIDE):
    fill(write_trident(folder, slide, encoder="e", features=6, scores=["attention_scores"]), table, batch)


def test_clam_reads_the_places_and_bags(tmp_path):
    """As CLAM's Whole_Slide_Bag_FP reads patches/, Generic_MIL_Dataset h5_files/, and its heat maps the scores."""
    table = rows(2 * CHUNK_ROWS + 3)
    clam(tmp_path, table)
    with h5py.File(tmp_path / "patches" / "S.1.h5", "r") as file:
        coords = file["coords"]
        assert list(file) == ["coords"] and coords.dtype == np.int64
        assert (coords.attrs["patch_level"], coords.attrs["patch_size"]) == (0, 886)  # 224 px of 1 µm
        assert coords.attrs["name"] == "S.1" and coords.attrs["save_path"] == str(tmp_path / "patches")
        assert tuple(coords.attrs["downsample"]) == (1.0, 1.0)
        assert tuple(coords.attrs["level_dim"]) == tuple(coords.attrs["downsampled_level_dim"]) == (50_000, 40_000)
        assert len(coords.attrs) == 7
        np.testing.assert_array_equal(coords[3], np.rint(table["coords"][3]))
    with h5py.File(tmp_path / "h5_files" / "S.1.h5", "r") as file:
        np.testing.assert_array_equal(file["features"][:], table["features"])
        np.testing.assert_array_equal(file["coords"][:], np.rint(table["coords"]))
        np.testing.assert_array_equal(file["attention_scores"][:], table["attention_scores"][:, None])
        assert file["features"].dtype == np.float32


def test_trident_folders_are_read_as_bags(tmp_path):
    """As torchmil's TridentWSIDataset reads them (tried with 1.0.2): by the names of folders, files and datasets."""
    table = rows(CHUNK_ROWS)
    trident(tmp_path, table)
    base = f"{tmp_path}/{FOLDER}/"
    with h5py.File(base + "features_e/" + "S.1" + ".h5", "r") as file:
        np.testing.assert_array_equal(file["features"][:], table["features"])
        np.testing.assert_array_equal(file["coords"][:], np.rint(table["coords"]))
        stored = {name: dict(file[name].attrs) for name in ("features", "coords")}
    with h5py.File(base + "patches/" + "S.1" + "_patches.h5", "r") as file:
        np.testing.assert_array_equal(file["coords"][:], np.rint(table["coords"]))
        attributes = dict(file["coords"].attrs)  # as TRIDENT's read_coords
        assert file["coords"].dtype == np.int64 and dict(file.attrs) == {
            "mpp": 1.0,
            "slide_mpp": 0.2528,
            "mpp_source": "tiff",
        }
    assert attributes.pop("level0_magnification") == pytest.approx(10 / 0.2528)
    assert attributes == {
        "patch_size": 224,
        "patch_size_level0": 886,
        "target_magnification": 10,
        "overlap": 112,
        "name": "S.1",
        "savetodir": f"{tmp_path}/{FOLDER}",
        "level0_width": 50_000,
        "level0_height": 40_000,
    }
    assert stored["features"] == {"name": "S.1", "savetodir": f"{tmp_path}/{FOLDER}/features_e", "encoder": "e"}
    assert stored["coords"].keys() == {*attributes, "level0_magnification"}


def test_the_ratio_of_magnifications_gives_the_side_at_level_0(tmp_path):
    slide = TiledSlide(slide_id="a", grid=Grid(256, 256, 0.5), slide_mpp=0.25, mpp_source="", width=9, height=9)
    with write_trident(tmp_path, slide, encoder="e", features=2):
        pass
    about = read_tiles(tmp_path / "20x_256px_0px_overlap" / "patches" / "a_patches.h5").attributes["coords"]
    assert (about["level0_magnification"], about["target_magnification"]) == (40, 20)
    assert about["level0_magnification"].dtype.kind == "i"  # whole numbers as such, as TRIDENT has them
    assert about["patch_size"] * about["level0_magnification"] // about["target_magnification"] == 512 == slide.side
    assert trident_folder(Grid(224, 224, 0.2528)) == "39.56x_224px_0px_overlap"


@pytest.mark.parametrize("write, path", [(clam, "h5_files/S.1.h5"), (trident, f"{FOLDER}/features_e/S.1.h5")])
def test_rows_come_back_and_batches_leave_no_trace(tmp_path, monkeypatch, write, path):
    monkeypatch.chdir(tmp_path)
    table = rows(3 * CHUNK_ROWS + 1)
    files = []
    for batch in (1, 50, CHUNK_ROWS, 700, 10_000):
        write("out", table, batch)
        files.append([file.read_bytes() for file in sorted((tmp_path / "out").rglob("*.h5"))])
    assert len(files[0]) == 2 and all(file == files[0] for file in files)
    back = read_tiles(tmp_path / "out" / path)
    np.testing.assert_array_equal(back.coords, np.rint(table["coords"]))
    np.testing.assert_array_equal(back.columns["features"], table["features"])
    np.testing.assert_array_equal(back.columns["attention_scores"][:, 0], table["attention_scores"])
    assert back.coords.dtype == np.int64 and back.attributes[""]["mpp_source"] == "tiff"


def test_a_slide_without_tiles_has_files_without_rows(tmp_path):
    clam(tmp_path, rows(0))
    back = read_tiles(tmp_path / "h5_files" / "S.1.h5")
    assert back.coords.shape == (0, 2) and back.columns["features"].shape == (0, 6)


def test_other_precisions(tmp_path):
    with write_clam(tmp_path, SLIDE, features=2, dtype=np.float16) as tiles:
        tiles.append(np.zeros((1, 2)), features=np.array([[0.5, 1]]))
    assert read_tiles(tmp_path / "h5_files" / "S.1.h5").columns["features"].dtype == np.float16


@pytest.mark.parametrize("write", [clam, trident])
def test_an_error_half_way_leaves_what_was_there(tmp_path, write):
    write(tmp_path, rows(2))
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    bad = rows(CHUNK_ROWS + 9)
    bad["features"] = bad["features"][: CHUNK_ROWS + 3]  # the last batch lacks some
    with pytest.raises(ValueError, match="features"):
        write(tmp_path, bad)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize(
    "columns",
    [
        {"features": np.zeros((2, 5))},
        {"features": np.zeros((2, 6)), "score": np.zeros(3)},
        {"features": np.zeros((2, 6)), "score": np.zeros(2), "other": np.zeros(2)},
        {"features": np.zeros((2, 6))},
    ],
)
def test_columns_that_do_not_fit_are_refused(tmp_path, columns):
    with (
        pytest.raises(ValueError, match="rows need"),
        write_clam(tmp_path, SLIDE, features=6, scores=["score"]) as tiles,
    ):
        tiles.append(np.zeros((2, 2)), **columns)


def test_scores_need_names_of_their_own(tmp_path):
    with (
        pytest.raises(ValueError, match="names of their own"),
        write_clam(tmp_path, SLIDE, features=6, scores=["coords"]),
    ):
        pass


def test_what_is_no_feature_file_is_named(tmp_path):
    (tmp_path / "a.h5").write_bytes(b"not HDF5")
    with pytest.raises(ValueError, match=r"a\.h5 is no HDF5 file"):
        read_tiles(tmp_path / "a.h5")
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file["features"] = np.zeros((3, 4))
    with pytest.raises(ValueError, match=r"b\.h5 has no dataset coords"):
        read_tiles(tmp_path / "b.h5")
    with h5py.File(tmp_path / "b.h5", "a") as file:
        file["coords"] = np.zeros((2, 2), np.int32)
    with pytest.raises(ValueError, match=r"b\.h5 has features \[3, 4\] for 2 coords"):
        read_tiles(tmp_path / "b.h5")
    with pytest.raises(FileNotFoundError):
        read_tiles(tmp_path / "c.h5")
