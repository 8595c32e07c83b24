"""compare_models: our rows beside the paper's, over the same slides or not at all."""

import csv
import json

import pytest

from data_pipelines.exports import write_table
from srcc_jax.methods.slide_classification_paper import MODELS, TABLE
from tests import programs
from tests.programs import one_line

LABELS = {"a": "srcc", "b": "srcc", "c": "normal", "d": "normal", "e": "normal"}
SCORES = {
    "FS x10": {"a": 0.9, "b": 0.4, "c": 0.6, "d": 0.1, "e": 0.2},  # 5 of 6 pairs in order
    "ours": {"a": 0.9, "b": 0.8, "c": 0.1, "d": 0.2, "e": 0.3},
}


@pytest.fixture(scope="module")
def comparing():
    with programs.imported("compare_models") as module:
        yield module


@pytest.fixture
def cohort(tmp_path):
    """cohort.csv (its slides need not be there), and the predictions of both models in folders."""
    lines = [f"{name},{name}.svs,{label},p,test" for name, label in LABELS.items()]
    (tmp_path / "cohort.csv").write_text(
        "\n".join(["slide_id,path,label,patient_id,split", *lines, "x,x.svs,srcc,q,train"])
    )
    for model, scores in SCORES.items():
        predict(tmp_path / model, scores)
    return tmp_path / "cohort.csv"


def predict(folder, scores):
    write_table(folder / "slides.csv", {"slide_id": list(scores), "probability": list(scores.values())})


def compare(module, cohort, *predictions, **values):
    given = predictions or [f"{model}={cohort.parent / model}" for model in SCORES]
    arguments = {"cohort": cohort, "split": "test", "out": cohort.parent / "out", **values}
    return programs.start(module, *[f"--predictions={entry}" for entry in given], **arguments)


def table_rows(text):
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return rows[0], {row[0]: row[1:] for row in rows[2:]}


def test_our_rows_stand_beside_those_of_the_paper(comparing, cohort):
    outcome = compare(comparing, cohort)
    assert outcome.status == 0, outcome.err
    text = (cohort.parent / "out" / "table.md").read_text()
    assert text in outcome.out
    header, rows = table_rows(text)
    assert len(header) == 5 and list(rows) == [*MODELS, "ours"]
    fs, ours, other = rows["FS x10"], rows["ours"], rows["WS x10"]
    assert fs[0].startswith("0.833") and ours[0].startswith("1.000")
    paper_auc = TABLE["Hospital A & B"][MODELS.index("FS x10")][0]
    assert fs[2].startswith(f"{paper_auc[0]:.4f}") and f"{paper_auc[1]:.4f}" in fs[2]
    assert other[0] == other[1] == "–" and other[2] != "–"  # not trained here
    assert ours[2] == ours[3] == "–"  # not in the paper


def test_the_test_set_of_the_paper_can_be_chosen(comparing, cohort):
    compare(comparing, cohort, paper_set="DigestPath2019")
    _, rows = table_rows((cohort.parent / "out" / "table.md").read_text())
    assert rows["FS x10"][2].startswith("0.9868")


def test_numbers_and_page_are_left_too(comparing, cohort):
    compare(comparing, cohort)
    summary = json.loads((cohort.parent / "out" / "summary.json").read_text())
    auc = summary["models"]["FS x10"]["ROC AUC"]["slide"]
    assert auc["value"] == pytest.approx(5 / 6) and auc["low"] <= 5 / 6 <= auc["high"]
    page = (cohort.parent / "out" / "report.html").read_text()
    assert "5 slides, 2 positive" in page and "ours" in page


def test_a_slide_that_a_model_lacks_is_named(comparing, cohort):
    predict(cohort.parent / "ours", {**{n: s for n, s in SCORES["ours"].items() if n != "c"}, "d": None})
    message = one_line(compare(comparing, cohort))
    assert "ours/slides.csv has no probability for c, d: " in message
    assert not (cohort.parent / "out").exists()


def test_mistakes_are_one_line_each(comparing, cohort):
    folder = cohort.parent / "ours"
    assert "<name>=<folder of predict_slides>" in one_line(compare(comparing, cohort, str(folder)))
    assert "<name>=<folder of predict_slides>" in one_line(compare(comparing, cohort, "ours="))
    assert "the same name" in one_line(compare(comparing, cohort, f"a={folder}", f"a={folder}"))
    assert "slides.csv is missing" in one_line(compare(comparing, cohort, f"a={cohort.parent}"))
    assert "no positive slide" in one_line(compare(comparing, cohort, positive="SRCC"))
    assert "no positive slide" in one_line(compare(comparing, cohort, split="validation"))
    assert "none.csv: No such file" in one_line(compare(comparing, cohort.parent / "none.csv"))


def test_a_table_of_something_else_is_refused(comparing, cohort):
    with open(cohort.parent / "ours" / "slides.csv", "w", newline="") as file:
        csv.writer(file).writerows([["name", "score"], ["a", 1]])
    assert "has no probability for a, b, c, d, e" in one_line(compare(comparing, cohort))
