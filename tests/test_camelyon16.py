"""Camelyon16 as it is distributed: names, annotations, masks, the reference, and the known exceptions."""

import pytest

from data_pipelines.camelyon16 import TRAINING, few_shot, find_camelyon16
from data_pipelines.cohort import CohortError, read_cohort
from tests import programs

FILES = (
    "training/normal/normal_001.tif", "training/normal/normal_086.tif", "training/tumor/tumor_002.tif", "training/tumor/tumor_009.tif",
    "training/lesion_annotations/tumor_002.xml", "masks/tumor_009_mask.tif", "masks/tumor_002_mask.tif", "testing/images/Test_001.tif",
    "testing/images/test_003.tif", "testing/images/test_049.tif", "testing/images/test_114.tif", "testing/lesion_annotations/test_001.xml",
    "testing/lesion_annotations/test_114.xml", "readme.txt",
)  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    numbers = [f"training/tumor/tumor_{number:03}.{kind}" for number in TRAINING for kind in ("tif", "xml")]
    for name in (*FILES, *numbers):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    (tmp_path / "reference.csv").write_text("test_001,Tumor,IDC,Macro\ntest_003,Normal,DCIS,None\n")
    return tmp_path


def by_name(found):
    return {record.slide_id: record for record in found.records}


def test_names_labels_and_annotations(folder):
    """A shape comes before a mask; normal slides have neither; capitals do not matter."""
    found = by_name(find_camelyon16(folder / "data", reference=folder / "reference.csv"))
    assert found["Tumor_002"].annotation.name == "tumor_002.xml"
    assert found["Tumor_009"].annotation.name == "tumor_009_mask.tif"
    assert (found["Normal_001"].label, found["Normal_001"].annotation) == ("normal", None)
    assert [(found[n].label, found[n].split) for n in ("Test_001", "Test_003")] == [
        ("tumour", "test"),
        ("normal", "test"),
    ]
    assert not any("mask" in record.path.name for record in found.values())


def test_the_exceptions_are_left_out_and_said(folder):
    found = find_camelyon16(folder / "data")
    assert not {"Test_049", "Test_114", "Normal_086", "Tumor_111"} & set(by_name(found))
    text = "\n".join(found.notes)
    assert "Test_049 (a duplicate)" in text and "Test_114 (not annotated exhaustively)" in text
    assert "Normal_086 (it holds tumour and was renamed Tumor_111)" in text and "no reference" in text


def test_normal_086_is_tumor_111_where_that_is_annotated(folder):
    (folder / "data" / "training" / "tumor_111.xml").write_bytes(b"x")
    record = by_name(find_camelyon16(folder / "data"))["Tumor_111"]
    assert (record.label, record.path.name, record.annotation.name) == ("tumour", "normal_086.tif", "tumor_111.xml")
    (folder / "data" / "training" / "tumor_111.tif").write_bytes(b"x")
    found = find_camelyon16(folder / "data")
    assert by_name(found)["Tumor_111"].path.name == "tumor_111.tif" and "left out: Normal_086" in "\n".join(found.notes)


def test_the_slides_of_the_paper(folder):
    found = by_name(few_shot(find_camelyon16(folder / "data")))
    assert sum(record.split == "train" for record in found.values()) == 10 and "Tumor_009" not in found
    assert {name for name, record in found.items() if record.split == "validation"} == {"Normal_001", "Tumor_002"}
    (folder / "data" / "training" / "tumor" / "tumor_045.tif").unlink()
    with pytest.raises(CohortError, match="Tumor_045 missing"):
        few_shot(find_camelyon16(folder / "data"))


def test_what_is_missing_is_named(folder):
    (folder / "reference.csv").write_text("test_001,Tumor\n")
    with pytest.raises(CohortError, match="no line for Test_003"):
        find_camelyon16(folder / "data", reference=folder / "reference.csv")
    with pytest.raises(CohortError, match="no slide named"):
        find_camelyon16(folder / "data" / "masks")


@pytest.mark.parametrize("selection, training", [("few_shot", 10), ("all", 11)])
def test_the_table_is_one_that_programs_read(folder, selection, training):
    with programs.imported("camelyon_cohort") as module:
        outcome = programs.start(
            module,
            folder=folder / "data",
            reference=folder / "reference.csv",
            out=folder / "cohort.csv",
            selection=selection,
        )
    assert outcome.status == 0, outcome.err
    cohort = read_cohort(folder / "cohort.csv")
    splits = [record.split for record in cohort]
    assert splits.count("train") == training and splits.count("test") == 2
    assert "left out: Test_049" in outcome.out


def test_the_reference_of_the_challenge_is_read(shared_data, tmp_path):
    for number in (1, 3):
        (tmp_path / f"test_{number:03}.tif").write_bytes(b"x")
    found = find_camelyon16(tmp_path, reference=shared_data / "reference" / "camelyon16_test_GT.csv")
    assert [record.label for record in found.records] == ["tumour", "normal"]
