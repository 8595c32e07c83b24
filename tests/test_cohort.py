"""The cohort table: what is read, what is refused and how it is told, and splits that never divide a patient."""

import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.cohort import (
    Cohort,
    CohortError,
    SlideRecord,
    assign_splits,
    check_two_classes,
    read_cohort,
    write_cohort,
)

HEADER = "slide_id,path,label,patient_id,split,mpp,annotation"


@pytest.fixture
def table(tmp_path):
    """Writes a table beside three slides and an annotation that exist."""
    for name in ("slides/a.svs", "slides/b.svs", "slides/c.svs", "a.xml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")

    def write(*rows, header=HEADER, encoding="utf-8", newline="\n"):
        path = tmp_path / "cohort.csv"
        path.write_bytes((newline.join([header, *rows]) + newline).encode(encoding))
        return path

    return write


def problems(path, **options):
    with pytest.raises(CohortError) as caught:
        read_cohort(path, **options)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_a_full_table(table, tmp_path):
    cohort = read_cohort(table("a,slides/a.svs,srcc,p1,train,0.25,a.xml", "b,slides/b.svs,normal,p2,val,,"))
    assert list(cohort) == [
        SlideRecord("a", tmp_path / "slides/a.svs", "srcc", "p1", "train", 0.25, tmp_path / "a.xml"),
        SlideRecord("b", tmp_path / "slides/b.svs", "normal", "p2", "validation", None, None),
    ]
    assert cohort.notes == () and cohort.has_splits
    assert [r.slide_id for r in cohort.split("val")] == ["b"] and len(cohort.split("test")) == 0
    assert cohort.labels("srcc").tolist() == cohort.labels(["srcc", "adeno"]).tolist() == [1, 0]
    with pytest.raises(CohortError, match="split 'dev' is unknown"):
        cohort.split("dev")


def test_three_columns_suffice_and_patients_are_stated(table):
    cohort = read_cohort(table("a,slides/a.svs,1", "b,slides/b.svs,0", header="slide_id,path,label"))
    assert [record.patient_id for record in cohort] == ["a", "b"]
    assert "2 of 2 slides name no patient" in cohort.notes[0] and not cohort.has_splits


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_the_ways_spreadsheets_write(table, separator):
    header = "\ufeff Slide_ID , path,LABEL ,comment"
    rows = (' a , slides/a.svs, srcc ,"two\nlines"', ",,,", "b,slides/b.svs,normal,")
    path = table(*(row.replace(",", separator) for row in rows), header=header.replace(",", separator), newline="\r\n")
    assert [(r.slide_id, r.path.name, r.label) for r in read_cohort(path)] == [
        ("a", "a.svs", "srcc"),
        ("b", "b.svs", "normal"),
    ]


def test_clams_table_finds_its_slides(table, tmp_path):
    path = table("p1,a,tumor", "p1,b.svs,normal", header="case_id,slide_id,label")
    assert "no column path" in problems(path) and "slides_folder" in problems(path)
    (tmp_path / "slides/deep").mkdir()
    slides = {"a": tmp_path / "slides/deep/a.tiff", "b": tmp_path / "slides/b.svs"}
    (tmp_path / "slides/a.svs").rename(slides["a"])
    cohort = read_cohort(path, slides_folder=tmp_path / "slides")
    assert [(r.patient_id, r.path) for r in cohort] == [("p1", slides["a"]), ("p1", slides["b"])]
    path = table("p1,a,tumor", "p1,zz,normal", header="case_id,slide_id,label")
    (tmp_path / "slides/a.svs").write_text("another")
    message = problems(path, slides_folder=tmp_path / "slides")
    assert "row 2: the slides_folder holds 2 slides" in message
    assert "row 3: the slides_folder holds no slide named 'zz'" in message


def test_all_problems_are_told_at_once_with_their_rows(table):
    path = table(
        "a,slides/a.svs,srcc,p1,train,0.25,a.xml",
        "a,slides/b.svs,unknown,p1,test,x40,missing.xml",
        "b,slides/missing.svs,,p3,dev,20,",
        '"c/d",slides/a.svs,normal,p4,,"0,25",',
        ",,normal,p5,test,-1,",
        header=HEADER,
    )
    message = problems(path, labels={"srcc", "normal"})
    expected = [
        "row 3: label 'unknown' is unknown: give one of normal, srcc",
        "row 3: mpp 'x40' is no number",
        "row 3: annotation 'missing.xml': there is no file",
        "row 4: path 'slides/missing.svs': there is no",
        "row 4: label is empty",
        "row 4: split 'dev' is unknown: give one of train, validation, test",
        "row 4: mpp 20 is no µm per pixel",
        "row 5: slide_id 'c/d' must be a name without slashes",
        "row 5: mpp '0,25' is no number: give µm per pixel with a decimal point",
        "row 6: slide_id ''",
        "row 6: path is empty",
        "row 6: mpp -1 is no µm",
        "rows 2, 3: slide_id 'a' comes 2 times",
        "rows 2, 5: the file ",
        "rows 5: no split, though others have one",
        "patients in more than one split: p1 (test and train)",
    ]
    assert [text for text in expected if text not in message] == []
    assert f"{len(expected)} problems" in message


def test_files_and_labels_may_be_absent_where_that_is_asked_for(table):
    path = table("a,no.svs,,p,,,no.xml")
    assert "no.svs" in problems(path) and "label is empty" in problems(path, require_files=False)
    (record,) = read_cohort(path, require_files=False, require_labels=False)
    assert record.label is None and record.path.name == "no.svs"
    (record,) = read_cohort(table("a,no.svs", header="slide_id,path"), require_files=False, require_labels=False)
    with pytest.raises(CohortError, match="a have no label"):
        Cohort((record,)).labels("1")


@pytest.mark.parametrize(
    "header, rows, message",
    [
        (HEADER, [], "no rows below its header"),
        ("", [], "no column slide_id"),
        ("slide,path,label", ["a,b,c"], "no column slide_id; it has slide, path, label"),
        ("slide_id,path", ["a,slides/a.svs"], "no column label"),
        ("slide_id,path,label,label", ["a,slides/a.svs,1,2"], "'label' comes twice"),
        ("slide_id,path,label,splits", ["a,slides/a.svs,1,train"], "'splits' is not known, 'split' is"),
        ("slide_id,path,label,patient", ["a,slides/a.svs,1,p"], "'patient' is not known, 'patient_id' is"),
        ("slide_id,path,label", ["a,slides/a.svs,1,2"], "row 2: 4 cells for 3 columns"),
        ("slide_id,path,label", ['a,"slides/a.svs,1'], "row 2 is broken CSV"),
    ],
)
def test_tables_that_are_none(table, header, rows, message):
    assert message in problems(table(*rows, header=header))


def test_other_encodings_and_missing_files(table, tmp_path):
    assert "UTF-8" in problems(table("ä,slides/a.svs,1,,,,", encoding="latin-1"))
    with pytest.raises(FileNotFoundError):
        read_cohort(tmp_path / "none.csv")


def test_long_lists_are_cut(table):
    message = problems(table(*(f"s{k},no{k}.svs,1,,,," for k in range(300))))
    assert "300 problems" in message and "and 280 more" in message and len(message.splitlines()) == 22


def test_a_table_comes_back_as_it_was(table, tmp_path):
    cohort = read_cohort(table('"a, 1",slides/a.svs,srcc,p1,train,0.2431,a.xml', "b,slides/b.svs,normal,p2,test,,"))
    elsewhere = tmp_path / "other" / "new.csv"
    for path in (tmp_path / "again.csv", elsewhere):
        write_cohort(path, cohort)
        assert read_cohort(path).records == cohort.records
    assert (
        "slides/a.svs" in (tmp_path / "again.csv").read_text()
        and str(tmp_path) not in (tmp_path / "again.csv").read_text()
    )


def test_one_class_only_is_refused_before_training(table):
    cohort = read_cohort(table("a,slides/a.svs,adeno,p1,,,", "b,slides/b.svs,normal,p2,,,"))
    check_two_classes(cohort, "adeno")
    with pytest.raises(
        CohortError, match=r"the train split has no positive slide: its labels are adeno \(1\), normal \(1\)"
    ):
        check_two_classes(cohort, "srcc", where="the train split")
    with pytest.raises(CohortError, match="no negative slide"):
        check_two_classes(cohort, {"adeno", "normal"})
    with pytest.raises(CohortError, match="labels are no slide"):
        check_two_classes(Cohort(()), "srcc")


def made(*labels_by_patient):
    """A cohort from one list of labels per patient."""
    records = [
        SlideRecord(f"s{p}_{k}", Path(f"{p}_{k}.svs"), label, f"p{p}")
        for p, labels in enumerate(labels_by_patient)
        for k, label in enumerate(labels)
    ]
    return Cohort(tuple(records))


def split_of_patients(cohort):
    found = {}
    for record in cohort:
        assert found.setdefault(record.patient_id, record.split) == record.split
    return found


def test_splits_are_spread_over_labels_and_follow_the_seed():
    cohort = made(*[["srcc"]] * 20, *[["normal", "normal"]] * 100)
    first = assign_splits(cohort, seed=1)
    counts = {name: len(first.split(name)) for name in ("train", "validation", "test")}
    assert counts == {"train": 13 + 130, "validation": 3 + 30, "test": 4 + 40}
    assert {name: int(first.split(name).labels("srcc").sum()) for name in counts} == {
        "train": 13,
        "validation": 3,
        "test": 4,
    }
    assert assign_splits(cohort, seed=1).records == first.records
    assert assign_splits(cohort, seed=2).records != first.records
    turned = assign_splits(Cohort(cohort.records[::-1]), seed=1)
    assert split_of_patients(turned) == split_of_patients(first)  # whatever the order of the table
    assert "splits by seed 1: train 78 patients, validation 18 patients, test 24 patients" in first.notes


def test_splits_are_the_same_in_every_process():
    split = split_of_patients(assign_splits(made(*[["1"]] * 6, *[["0"]] * 6), seed=0))
    chosen = {name: [patient for patient in split if split[patient] == name] for name in ("test", "validation")}
    assert chosen == {"test": ["p2", "p10"], "validation": ["p4", "p7"]}


def test_given_splits_stay():
    cohort = made(["1"], ["0"])
    given = Cohort(tuple(dataclasses.replace(record, split="test") for record in cohort))
    assert assign_splits(given, seed=0) is given


def test_labels_that_cannot_be_everywhere_are_refused():
    with pytest.raises(CohortError, match=r"label 'srcc' \(2 patients\) would be missing from .*validation"):
        assign_splits(made(["srcc"], ["srcc"], *[["normal"]] * 30), seed=0)
    cohort = made(["srcc"], ["srcc"], *[["normal"]] * 30)
    two = assign_splits(cohort, seed=0, validation=0.0)
    assert {record.split for record in two} == {"train", "test"}
    with pytest.raises(CohortError, match="nothing to train on"):
        assign_splits(cohort, seed=0, validation=0.5, test=0.5)
    with pytest.raises(CohortError, match="nothing to train on"):
        assign_splits(cohort, seed=0, validation=-0.1)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=4), min_size=1, max_size=40),
    st.integers(0, 9),
)
def test_any_division_is_disjoint_and_complete_or_refused(labels, seed):
    cohort = made(*labels)
    try:
        divided = assign_splits(cohort, seed=seed)
    except CohortError as error:
        assert "would be missing" in str(error)
        if all(len(set(patient)) == 1 for patient in labels):  # then only because of too few patients
            assert min(Counter(patient[0] for patient in labels).values()) < 3
        return
    split_of_patients(divided)
    assert [record.slide_id for record in divided] == [record.slide_id for record in cohort]
    for label in {record.label for record in cohort}:
        assert {r.split for r in divided if r.label == label} == {"train", "validation", "test"}
    assert len(np.unique([r.slide_id for name in ("train", "validation", "test") for r in divided.split(name)])) == len(
        cohort
    )
