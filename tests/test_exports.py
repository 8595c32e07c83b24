"""Files appear whole or not at all, say what went wrong, and maps land on the right pixels."""

import csv
import dataclasses
import errno
import json
import os
import resource
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipelines import exports, files, overlays
from srcc_jax.kernels.heat_maps import HeatMap


def heat_map(values, *, missing=None, downsample=100.0, origin=(0.0, 0.0), mpp=50.0):
    values = np.asarray(values, np.float32)
    missing = np.zeros(values.shape, bool) if missing is None else np.asarray(missing)
    return HeatMap(values, missing, downsample, origin, mpp)


def drawn(slide_map, *, shape=(40, 60), thumbnail_downsample=10.0, **drawing):
    """The picture above the legend, over a plain thumbnail of (200, 180, 190)."""
    thumbnail = np.full((*shape, 3), (200, 180, 190), np.uint8)
    picture = overlays.draw_overlay(thumbnail, slide_map, thumbnail_downsample=thumbnail_downsample, **drawing)
    return picture[: shape[0], : shape[1]]


def test_writing_makes_folders_and_leaves_no_temporary_file(tmp_path):
    path = tmp_path / "a" / "b" / "note.txt"
    exports.write_text(path, "µm\n")
    exports.write_text(path, "again\n")
    assert path.read_text(encoding="utf-8") == "again\n"
    assert os.listdir(path.parent) == ["note.txt"]


def test_who_reads_the_old_file_reads_it_to_its_end(tmp_path):
    path = tmp_path / "note.txt"
    exports.write_text(path, "old")
    with path.open() as reader:
        exports.write_text(path, "new")
        assert reader.read() == "old"
    assert path.read_text() == "new"


def test_an_error_while_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "note.txt"
    exports.write_text(path, "old")
    with pytest.raises(KeyError), files.atomic_write(path) as temporary:
        temporary.write_text("half of the new")
        raise KeyError("a fault of ours")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["note.txt"]


def test_a_file_that_grows_too_large_is_one_clear_line(tmp_path):
    """A real failure in the middle of a write: the limit on file sizes."""
    path = tmp_path / "map.npz"
    path.write_bytes(b"old")
    noise = np.random.default_rng(0).random((400, 400))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(files.OutputError, match=r"cannot write .*map\.npz: File too large; .*raise it"):
            exports.write_map(path, heat_map(noise), unit="probability")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["map.npz"]


def test_a_full_disk_names_path_and_cure(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(files.OutputError, match=r"cannot write .*t\.csv: No space left on device; free space") as info:
        exports.write_table(tmp_path / "t.csv", {"a": [1]})
    assert "\n" not in str(info.value) and not os.listdir(tmp_path)


def test_a_folder_that_cannot_be_is_found_out_at_the_start(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(files.OutputError, match=r"cannot write .*file.out.*a file stands where a folder is needed"):
        files.check_writable(tmp_path / "file" / "out")
    (tmp_path / "taken").mkdir()
    with pytest.raises(files.OutputError, match=r"cannot write .*taken: .*a folder stands where a file is needed"):
        exports.write_text(tmp_path / "taken", "")
    files.check_writable(tmp_path / "new")
    assert os.listdir(tmp_path / "new") == []


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_forbidden_folder_is_one_clear_line(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(files.OutputError, match="Permission denied; give yourself the right"):
        exports.write_text(tmp_path / "note.txt", "")


def test_errors_of_other_files_keep_their_own_name(tmp_path):
    (tmp_path / "other").mkdir()
    with pytest.raises(IsADirectoryError), files.atomic_write(tmp_path / "x" / "out.txt") as temporary:
        temporary.write_text("begun")
        (tmp_path / "other").read_bytes()
    assert os.listdir(tmp_path / "x") == []


def test_a_folder_takes_the_place_of_another_whole(tmp_path):
    new, place = tmp_path / "work" / "new", tmp_path / "out" / "slide"
    for text in ("first", "second"):
        new.mkdir(parents=True)
        (new / f"{text}.txt").write_text(text)
        files.replace_folder(new, place)
        assert [path.name for path in place.iterdir()] == [f"{text}.txt"] and not list((tmp_path / "work").iterdir())
    (tmp_path / "file").write_text("")
    new.mkdir()
    with pytest.raises(files.OutputError, match=r"cannot write .*file/slide.*a file stands where a folder is needed"):
        files.replace_folder(new, tmp_path / "file" / "slide")
    assert new.is_dir()


def test_tables_read_back_and_mark_what_is_absent(tmp_path):
    columns = {
        "slide_id": ['a, "b"', "ü"],
        "probability": np.array([0.1, np.nan], np.float32),
        "tiles": np.array([3, 0]),
        "reason": [None, "two\nlines"],
    }
    exports.write_table(tmp_path / "slides.csv", columns)
    with (tmp_path / "slides.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert rows[0] == {"slide_id": 'a, "b"', "probability": "0.1", "tiles": "3", "reason": ""}
    assert rows[1] == {"slide_id": "ü", "probability": "", "tiles": "0", "reason": "two\nlines"}
    with pytest.raises(ValueError, match=r"differ in length: {'a': 1, 'b': 2}"):
        exports.write_table(tmp_path / "wrong.csv", {"a": [1], "b": [1, 2]})


def test_json_holds_arrays_dataclasses_and_no_nan(tmp_path):
    @dataclasses.dataclass
    class Auc:
        value: float
        low: float

    value = {"auc": Auc(np.float32(0.5), np.nan), "shape": np.array([[1, 2]]), "path": Path("a/b"), "ok": np.True_}
    exports.write_json(tmp_path / "summary.json", value)
    assert json.loads((tmp_path / "summary.json").read_text()) == {
        "auc": {"value": 0.5, "low": None},
        "shape": [[1, 2]],
        "path": "a/b",
        "ok": True,
    }


def test_maps_read_back_with_scale_and_origin(tmp_path):
    written = heat_map([[0.25, np.nan], [1, 0]], missing=[[False, True], [False, False]], origin=(12.5, 300.0))
    exports.write_map(tmp_path / "map.npz", written, unit="probability")
    read = exports.read_map(tmp_path / "map.npz")
    np.testing.assert_array_equal(read.values, written.values)
    np.testing.assert_array_equal(read.missing, written.missing)
    assert (read.downsample, read.origin, read.mpp, read.unit) == (100.0, (12.5, 300.0), 50.0, "probability")


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 broken"])
def test_what_is_no_map_is_refused_by_name(tmp_path, content):
    (tmp_path / "map.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"map\.npz is no heat map of ours"):
        exports.read_map(tmp_path / "map.npz")


def test_arrays_of_others_and_pickles_are_refused(tmp_path):
    for name, arrays in [("other", {"values": np.zeros(3)}), ("pickle", {"values": np.array([{}])})]:
        np.savez(tmp_path / f"{name}.npz", **arrays)
        with pytest.raises(ValueError, match="is no heat map of ours"):
            exports.read_map(tmp_path / f"{name}.npz")


def test_cells_land_on_their_pixels_of_the_thumbnail():
    """A cell of 100 level-0 px at (153, 52) holds the centres, at 155 .. 245 and 55 .. 145, of 10 x 10 thumbnail px."""
    picture = drawn(heat_map([[1.0]], origin=(153.0, 52.0)), alpha=1.0, colormap="gray")
    painted = (picture == 255).all(-1)
    rows, columns = np.nonzero(painted)
    assert (rows.min(), rows.max(), columns.min(), columns.max(), painted.sum()) == (5, 14, 15, 24, 100)
    assert (picture[~painted] == (200, 180, 190)).all()


def test_a_map_that_begins_outside_the_thumbnail_is_cut():
    picture = drawn(heat_map([[1.0, 0.0]], origin=(-50.0, -50.0)), alpha=1.0, colormap="gray")
    assert (picture[:5, :5] == 255).all() and (picture[:5, 5:15] == 0).all()
    assert (picture[5:] == (200, 180, 190)).all() and (picture[:, 15:] == (200, 180, 190)).all()


def test_colours_are_mixed_by_alpha_between_the_limits():
    picture = drawn(heat_map([[3.0, 5.0]]), alpha=0.25, colormap="gray", limits=(1.0, 5.0))
    np.testing.assert_allclose(picture[0, 0], np.array([200, 180, 190]) * 0.75 + 0.25 * 128, atol=1)
    np.testing.assert_allclose(picture[0, 10], np.array([200, 180, 190]) * 0.75 + 0.25 * 255, atol=1)
    with pytest.raises(ValueError, match="limits of the colours must rise; got 1 to 1"):
        drawn(heat_map([[3.0]]), limits=(1, 1))


def test_unreadable_cells_are_hatched_gray_and_the_background_is_left_alone():
    picture = drawn(heat_map([[np.nan, np.nan]], missing=[[True, False]]))
    cell = picture[:10, :10].reshape(-1, 3)
    colours = np.unique(cell, axis=0)
    assert len(colours) == 2  # stripes
    assert colours.min() > 64 and colours.max() < 224  # neither black nor white
    assert (picture[:10, 10:20] == (200, 180, 190)).all()


def test_a_hot_cell_finer_than_a_pixel_still_shows():
    values = np.zeros((35, 35))
    values[17, 3] = 1.0
    picture = drawn(heat_map(values, downsample=3.0), alpha=1.0, colormap="gray", shape=(12, 12))
    hot = np.argwhere((picture == 255).all(-1))
    assert len(hot) and np.abs(hot - [17.5 * 3 / 10 - 0.5, 3.5 * 3 / 10 - 0.5]).max() <= 1.5


def test_overlay_file_has_the_thumbnail_and_a_legend_below(tmp_path):
    thumbnail = np.full((300, 500, 3), 230, np.uint8)
    shown = heat_map(np.full((3, 5), 0.5), missing=np.zeros((3, 5), bool), downsample=1000.0)
    exports.write_overlay(tmp_path / "o.png", thumbnail, shown, thumbnail_downsample=10.0, label="Grad-CAM")
    with Image.open(tmp_path / "o.png") as image:
        assert image.format == "PNG" and image.size == (500, 300 + overlays._STRIP_PX)
        strip = np.asarray(image)[301:]
    assert (strip == overlays.INK).all(-1).sum() > 200  # words and scale bar


@pytest.mark.parametrize("mpp, length_px", [(0.05, 100), (0.5, 100), (8.0, 62), (16.0, 62), (100.0, 100)])
def test_scale_bar_is_a_round_length(mpp, length_px):
    """mpp of the thumbnail: 5, 50, 500 µm, 1 and 10 mm are the longest of 1, 2, 5 x 10^n within 120 px."""
    picture = overlays.draw_overlay(
        np.full((10, 10, 3), 255, np.uint8), heat_map([[0.5]], downsample=10.0, mpp=10 * mpp), thumbnail_downsample=1.0
    )
    ink = (picture[10 + 13] == overlays.INK).all(-1)
    ends = np.flatnonzero(np.diff(np.concatenate([[False], ink, [False]])))  # of runs of ink: letters, and the bar
    assert abs(np.diff(ends)[::2].max() - length_px) <= 1
