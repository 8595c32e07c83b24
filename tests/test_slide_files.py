"""Finding slides in folders."""

import pytest

from data_pipelines.slides import SlideError, find_slides, open_slide


def test_find_slides_in_real_folders(shared_data):
    folder = shared_data / "slides"
    found = find_slides(folder)
    assert folder / "CMU-1-Small-Region_dicom" in found  # a series is one slide
    assert folder / "openslide_fixtures" / "broken_truncated.svs" in found  # broken files too
    assert not [path for path in found if path.suffix == ".png"]  # a mask beside slides
    assert find_slides(folder / "CMU-1-Small-Region_dicom") == [folder / "CMU-1-Small-Region_dicom"]
    assert find_slides(folder / "CMU-1-Small-Region.svs") == [folder / "CMU-1-Small-Region.svs"]


def test_find_slides_searches_sub_folders(tmp_path):
    for name in (
        "b.SVS",
        "sub/a.tif",
        "sub/deep/c.ndpi",
        "m.mrxs",
        "m/Data0000.tif",
        ".hidden.svs",
        "notes.txt",
        "thumb.png",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    found = [str(path.relative_to(tmp_path)) for path in find_slides(tmp_path)]
    assert found == ["b.SVS", "m.mrxs", "sub/a.tif", "sub/deep/c.ndpi"]


def test_find_slides_takes_plain_images_where_there_is_nothing_else(tmp_path):
    for name in ("x.png", "sub/y.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [path.name for path in find_slides(tmp_path)] == ["y.jpg", "x.png"]


def test_find_slides_leaves_out_results_that_lie_among_the_slides(tmp_path):
    for name in (
        "a.svs",
        "out/slides/a/probability.ome.tiff",
        "out/state/a/scores.npz",
        "other/slides/b.tif",
        "state/c.tif",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert [path.name for path in find_slides(tmp_path)] == ["a.svs", "b.tif", "c.tif"]


def test_find_slides_tells_dicom_series_apart(tmp_path):
    def dicom(name: str, uid: bytes) -> None:
        header = bytes(128) + b"DICM" + b"\x20\x00\x0e\x00UI" + len(uid).to_bytes(2, "little") + uid
        (tmp_path / name).write_bytes(header)

    dicom("1.dcm", b"1.2.3\0")
    dicom("2.dcm", b"1.2.3\0")
    assert find_slides(tmp_path) == [tmp_path]
    dicom("3.dcm", b"1.2.4\0")
    assert find_slides(tmp_path) == [tmp_path / "1.dcm", tmp_path / "3.dcm"]
    with pytest.raises(SlideError, match=r"2 DICOM series.*1\.dcm"):
        open_slide(tmp_path)


def test_find_slides_without_slides(tmp_path):
    with pytest.raises(SlideError, match="no slides"):
        find_slides(tmp_path)
    with pytest.raises(SlideError, match="no such"):
        find_slides(tmp_path / "missing")
