"""Labelled patches: tables from folders and lists, splits that keep patients whole, and batches that are functions of the step."""

import numpy as np
import pytest
from PIL import Image

from data_pipelines.patches import (
    PatchesError,
    PatchReader,
    ShuffledRows,
    patch_batches,
    read_patches,
    split_patches,
    write_patches,
)


def save(path, value=0, side=8):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((side, side, 3), value, np.uint8)).save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    """Ten patches of each of two classes, in a shade of their own."""
    for number in range(10):
        save(tmp_path / "images" / "normal" / f"{number}.png", 10 * number)
        save(tmp_path / "images" / "tumour" / f"{number}.png", 10 * number + 100, side=12)
    return tmp_path / "images"


def test_a_folder_of_classes(folder):
    patches = read_patches(folder)
    assert len(patches) == 20 and patches.label.tolist() == ["normal"] * 10 + ["tumour"] * 10
    assert set(patches.split) == {""} and len(set(patches.unit)) == 20
    assert patches.is_one_of(["tumour", "other"]).sum() == 10


def test_a_folder_of_splits(tmp_path):
    for name in ("train/good", "train/bad", "val/good", "val/tumor"):
        save(tmp_path / name / "a.png")
    patches = read_patches(tmp_path)
    assert sorted(zip(patches.split, patches.label)) == [
        ("train", "bad"), ("train", "good"), ("validation", "good"), ("validation", "tumor"),
    ]  # fmt: skip
    save(tmp_path / "normal" / "a.png")
    with pytest.raises(PatchesError, match="normal beside train, val"):
        read_patches(tmp_path)


def test_a_list_comes_back_as_it_was_written(folder, tmp_path):
    patches = split_patches(read_patches(folder), seed=1)
    write_patches(tmp_path / "lists" / "all.csv", patches)
    again = read_patches(tmp_path / "lists" / "all.csv")
    assert [path.resolve() for path in again.path] == [path.resolve() for path in patches.path]
    for name in ("label", "slide_id", "patient_id", "split"):
        np.testing.assert_array_equal(getattr(again, name), getattr(patches, name))
    assert again.digest() == patches.digest() != read_patches(folder).digest()


def test_the_list_of_patchcamelyon(tmp_path):
    save(tmp_path / "images" / "ab.tif")
    (tmp_path / "labels.csv").write_text("id,label\nab,1\n")
    patches = read_patches(tmp_path / "labels.csv")
    assert patches.path == (tmp_path / "images" / "ab.tif",) and patches.label.tolist() == ["1"]


def test_all_problems_of_a_list_are_told(tmp_path):
    save(tmp_path / "a.png")
    (tmp_path / "list.csv").write_text("path,label,split\na.png,,train\ngone.png,x,\na.png,x,somewhere\n")
    with pytest.raises(PatchesError) as error:
        read_patches(tmp_path / "list.csv")
    for words in (
        "list.csv",
        "line 2: no label",
        "line 3: there is no file",
        "line 4: split 'somewhere'",
        "others none",
    ):
        assert words in str(error.value)
    (tmp_path / "list.csv").write_text("file,class\na.png,x\n")
    with pytest.raises(PatchesError, match=r"needs the columns path and label.*file, class"):
        read_patches(tmp_path / "list.csv")
    with pytest.raises(PatchesError, match="there is no such folder"):
        read_patches(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(PatchesError, match="no folder of patches"):
        read_patches(tmp_path / "empty")


def test_splits_keep_patients_whole_and_do_not_depend_on_the_order(folder, tmp_path):
    rows = [f"images/{name}/{n}.png,{name},p{n // 2}" for n in range(10) for name in ("normal", "tumour")]
    found = []
    for lines in (rows, rows[::-1]):
        (tmp_path / "list.csv").write_text("\n".join(["path,label,patient_id", *lines]))
        found.append(split_patches(read_patches(tmp_path / "list.csv"), seed=0))
    by_patient = [dict(zip(patches.patient_id, patches.split)) for patches in found]
    assert by_patient[0] == by_patient[1] and set(by_patient[0].values()) == {"train", "validation", "test"}
    for patches in found:
        assert all(by_patient[0][p] == split for p, split in zip(patches.patient_id, patches.split))


def test_batches_are_a_function_of_the_seed_and_the_step():
    rows = np.arange(100, 110)
    sampler = ShuffledRows(rows, batch=4, seed=3)
    assert sampler.steps_per_epoch == 2.5
    drawn = np.concatenate([sampler(step) for step in range(5)])
    for epoch in (drawn[:10], drawn[10:]):
        np.testing.assert_array_equal(np.sort(epoch), rows)
    assert (drawn[:10] != drawn[10:]).any()
    np.testing.assert_array_equal(ShuffledRows(rows, 4, 3)(2), drawn[8:12])
    assert (ShuffledRows(rows, 4, 4)(2) != drawn[8:12]).any()
    np.testing.assert_array_equal(np.sort(ShuffledRows(rows[:2], 5, 0)(0))[[0, -1]], rows[:2])  # batch above the epoch


def test_pixels_labels_and_padding(folder):
    patches = read_patches(folder)
    reader = PatchReader(patches, patches.is_one_of(["tumour"]).astype(float), side=8)
    sampler = ShuffledRows(np.arange(20), batch=3, seed=0)
    whole = list(patch_batches(reader, sampler, size=4, begin=0, end=6, threads=3))
    for step, batch in enumerate(whole):
        arrays, rows = batch.arrays, sampler(step)
        assert arrays["image"].shape == (4, 8, 8, 3) and arrays["image"].dtype == np.uint8 and not batch.failed
        np.testing.assert_array_equal(arrays["row"], [*rows, -1])
        np.testing.assert_array_equal(arrays["weight"], [1, 1, 1, 0])
        np.testing.assert_array_equal(arrays["label"], [*(rows >= 10), 0])
        shade = np.where(rows < 10, 10 * rows, 10 * (rows - 10) + 100)
        np.testing.assert_array_equal(arrays["image"][:3], np.broadcast_to(shade[:, None, None, None], (3, 8, 8, 3)))
    later = list(patch_batches(reader, sampler, size=4, begin=4, end=6))
    for a, b in zip(whole[4:], later, strict=True):
        for name in a.arrays:
            np.testing.assert_array_equal(a.arrays[name], b.arrays[name])


def test_a_patch_that_cannot_be_read_counts_for_nothing(folder):
    patches = read_patches(folder)
    patches.path[3].write_bytes(patches.path[3].read_bytes()[:45])
    patches.path[4].write_text("no image")
    patches.path[5].unlink()
    batch = PatchReader(patches, np.zeros(20), side=8).read(np.arange(2, 6), size=4)
    np.testing.assert_array_equal(batch.arrays["weight"], [1, 0, 0, 0])
    assert sorted(batch.failed) == [3, 4, 5] and str(patches.path[4]) in batch.failed[4]
    assert not batch.arrays["image"][1:].any()
