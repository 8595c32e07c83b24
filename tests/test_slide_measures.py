"""What was found on slides, whatever the kind of model calls it: columns of slides.csv and of the cohort's page."""

import csv

import pytest

from data_pipelines.cohort import SlideRecord
from experiments.run.cohort_report import slide_rows
from experiments.run.cohort_summary import write_slides
from experiments.run.slide_result import SlideResult
from srcc_jax.report import Report, render

MEASURES = ("probability", "blur")


@pytest.fixture
def results():
    done = SlideResult("a", "a.svs", "done", probability=0.75, measures={"blur": 0.5})
    return [done, SlideResult("b", "b.svs", "failed", "no such file")]


def test_the_table_has_the_measures_of_the_task_in_the_place_of_the_probability(results, tmp_path):
    write_slides(tmp_path, results, MEASURES)
    with open(tmp_path / "slides.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[4:8] == ["traceback", "probability", "blur", "mpp"] and "measures" not in rows[0]
    assert [(row["probability"], row["blur"]) for row in rows] == [("0.75", "0.5"), ("", "")]
    write_slides(tmp_path, results, ("blur",))
    assert "probability" not in (tmp_path / "slides.csv").read_text()


def test_the_page_shows_a_probability_and_other_measures(results, tmp_path):
    records = [SlideRecord(row.slide_id, tmp_path / row.path, None, row.slide_id) for row in results]
    rows = slide_rows(records, results, tmp_path, measures=MEASURES)
    assert [dict(row.measures) for row in rows] == [{"blur": 0.5}, {"blur": None}]
    text = render(Report(title="t", slides=rows))
    assert text.index(">probability</button>") < text.index(">blur</button>") < text.index(">status</button>")
    without = slide_rows(records[1:], results[1:], tmp_path, measures=("blur",))
    assert ">probability</button>" not in render(Report(title="t", slides=without))
