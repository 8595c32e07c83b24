"""The page is whole, needs no network, shows what it was given, and trusts no text."""

import re
import xml.etree.ElementTree
from html.parser import HTMLParser

import numpy as np
import pytest

from srcc_jax import metrics, report
from srcc_jax.metrics import Interval
from srcc_jax.report_page import format_cell
from srcc_jax.report_plots import roc_plot

VOID = {"meta", "img", "br", "link", "input"}


class Page(HTMLParser):
    """Collects elements and text, and fails on tags that do not match."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.words = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] not in (["script"], ["style"]):
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def full_report(**changes):
    label, score = np.array([1, 1, 0, 0, 0]), np.array([0.8, 0.4, 0.5, 0.4, 0.1])
    values = {
        "title": "Slides",
        "subtitle": "5 slides",
        "summary": {"ROC AUC": {"slide": Interval(0.75, 0.5, 1.0, 12), "patient": Interval(0.75, 0.4, 1.0)}},
        "notes": ["log loss clipped at 1e-15"],
        "warnings": ["s9: truncated"],
        "roc": {"WS": metrics.roc_curve(label, score), "FS": metrics.roc_curve(label, -score)},
        "comparison": report.comparison_table(
            {"WS": {"AUC": Interval(0.9, 0.8, 1.0)}}, {"WS": {"AUC": Interval(0.99, 0.98, 1.0)}}, paper_name="the paper"
        ),
        "slides": [
            report.SlideRow(
                slide_id="s1",
                probability=0.8,
                tissue=0.294,
                flags=["little tissue", "pen marks"],
                page="slides/s 1/report.html",
                images={"map": b"\x89PNG", "cam": "maps/s 1#.png", "top": b"\xff\xd8"},
            ),
            report.SlideRow(slide_id="s9", status="failed", reason="truncated"),
        ],
        "training": {"training": (np.arange(3), np.array([1.0, 0.5, 0.25]))},
        "configuration": {"top_k": 1},
        "versions": {"jax": "1.2.3"},
    }
    return report.Report(**{**values, **changes})


def test_page_shows_every_part_and_its_tags_match():
    page = Page(report.render(full_report()))
    for words in [
        "0.7500 0.5000 to 1.0000 (12 one-class resamples dropped) 0.4000 to 1.0000",
        "95 % interval by slide 95 % interval by patient",
        "log loss clipped at 1e-15",
        "WS (AUC 0.7500)",
        "FS (AUC 0.2500)",
        "this run the paper",
        "0.9000 [0.8000, 1.0000] 0.9900 [0.9800, 1.0000]",
        "0.8000 29.4% little tissue pen marks done",
        "failed: truncated",
        "s9: truncated",
        "top_k 1",
        "jax 1.2.3",
    ]:
        assert words in page.text


def test_empty_parts_are_left_out():
    empty = {"summary": {}, "notes": (), "warnings": (), "roc": {}, "comparison": None, "slides": (), "training": {}}
    page = Page(report.render(full_report(**empty, configuration={}, versions={})))
    assert page.text == "Slides Slides 5 slides" and not [tag for tag, _ in page.elements if tag == "section"]


def test_page_asks_nothing_of_the_network_and_pictures_are_embedded_or_linked():
    text = report.render(full_report())
    sources = [attributes["src"] for _, attributes in Page(text).elements if "src" in attributes]
    assert sources == ["data:image/png;base64,iVBORw==", "maps/s%201%23.png", "data:image/jpeg;base64,/9g="]
    targets = [v for _, a in Page(text).elements for k, v in a.items() if k in ("href", "xlink:href", "action")]
    assert [target for target in targets if not target.startswith("#")] == ["slides/s%201/report.html"]
    assert not re.search(r"@import|url\((?!#)", text)


def test_text_from_outside_cannot_become_markup():
    attack = '--><script>alert("x")</script>'
    row = report.SlideRow(
        slide_id=attack,
        label=attack,
        patient_id=attack,
        reason=attack,
        flags=[attack],
        page=attack,
        images={attack: attack},
    )
    curve = metrics.roc_curve(np.array([0, 1]), np.array([0.1, 0.9]))
    page = full_report(
        title=attack, subtitle=attack, notes=[attack], warnings=[attack], slides=[row], versions={attack: attack},
        configuration={attack: attack}, roc={attack: curve}, training={attack: (np.arange(2), np.arange(2))},
        summary={attack: {attack: Interval(0, 0, 0)}},
        comparison=report.Table([attack], [[attack]], [(attack, 1)], attack),
    )  # fmt: skip
    slide = report.SlidePage(
        slide_id=attack, subtitle=attack, flags=[attack], images={attack: attack}, facts={attack: attack},
        tiles=[report.TileRow(picture=attack, x=0, y=0, value=1)],
    )  # fmt: skip
    for text in (report.render(page), report.render_slide(slide)):
        assert [tag for tag, _ in Page(text).elements].count("script") == 1


def test_columns_that_no_slide_fills_are_left_out():
    def headings(**values):
        page = Page(
            report.render(report.Report(title="", slides=[report.SlideRow(slide_id="a"), report.SlideRow(**values)]))
        )
        return page.text.split("enlarges it. ")[1].split(" a ")[0]

    assert headings(slide_id="b", patient_id="b") == "slide probability status"
    full = {"patient_id": "p", "label": "srcc", "tissue": 0.1, "tiles": 3, "flags": ["x"], "images": {"map": "m.png"}}
    assert headings(slide_id="b", **full) == "slide patient label probability tissue tiles flags status pictures"


def test_configuration_reads_well():
    page = Page(report.render(full_report(configuration={"speed": 419.66271, "seconds": {"read": 4.7843, "all": 30}})))
    assert "speed 419.7 seconds read 4.784, all 30" in page.text


def test_a_path_cannot_become_a_program():
    row = report.SlideRow(slide_id="a", page="javascript:alert(1)")
    assert 'href="javascript%3Aalert%281%29"' in report.render(full_report(slides=[row]))


def test_many_warnings_are_cut_and_say_so():
    text = Page(report.render(full_report(warnings=[f"slide {n} is bad" for n in range(173)]))).text
    assert "slide 49 is bad" in text and "slide 50 is bad" not in text and "and 123 more: see the table" in text


def test_page_of_thousands_of_slides_stays_small_when_pictures_are_linked():
    reason = "2 of 312 tiles could not be read: tile at row 3, column 9 of level 0 has no JPEG header"
    images = {name: f"slides/TCGA-0001/preview/{name}.jpg" for name in ("probability", "gradcam", "top_tiles")}
    row = report.SlideRow(slide_id="TCGA-0001", reason=reason, flags=["pen marks"], page="slides/a.html", images=images)
    assert len(report.render(report.Report(title="many", slides=[row] * 5000))) < 8_000_000


def test_plots_are_svg_and_the_same_every_time():
    curve = metrics.roc_curve(np.array([0, 1, 1]), np.array([0.1, 0.9, 0.05]))
    first, second = (roc_plot({"a & b": curve}) for _ in range(2))
    assert first == second
    figure = xml.etree.ElementTree.fromstring(first.replace("xlink:", ""))
    assert figure[0].tag == "{http://www.w3.org/2000/svg}svg"
    assert "a & b (AUC 0.5000)" in " ".join(" ".join(figure.itertext()).split())


def test_names_of_models_are_no_mathematics():
    """Matplotlib would typeset what stands between two dollar signs."""
    curve = metrics.roc_curve(np.array([0, 1]), np.array([0.1, 0.9]))
    assert "$top_k$ (AUC 1.0000)" in Page(roc_plot({"$top_k$": curve})).text


def test_one_page_from_equal_input():
    assert report.render(full_report()) == report.render(full_report())


def test_comparison_keeps_the_order_of_the_paper_and_shows_what_is_absent():
    ours = {"new": {"AUC": Interval(0.5, 0.4, 0.6)}, "WS": {"AUC": Interval(0.9, 0.8, 1.0)}}
    paper = {"FS": {"AUC": Interval(0.7, 0.6, 0.8), "log loss": Interval(1.0, 0.9, 1.1)}, "WS": {}}
    table = report.comparison_table(ours, paper, paper_name="paper")
    assert table.columns == ["model", "AUC", "log loss", "AUC", "log loss"]
    assert table.groups == [("", 1), ("this run", 2), ("paper", 2)]
    assert [row[0] for row in table.rows] == ["FS", "WS", "new"]
    assert table.rows[0][1:] == [None, None, Interval(0.7, 0.6, 0.8), Interval(1.0, 0.9, 1.1)]
    assert table.rows[1][1:] == [Interval(0.9, 0.8, 1.0), None, None, None]


@pytest.mark.parametrize(
    "cell, text",
    [
        (Interval(0.98765, 0.9, 1.0), "0.9877 [0.9000, 1.0000]"),
        (np.float32(0.5), "0.5000"),
        (float("nan"), "–"),
        (None, "–"),
        (12, "12"),
        ("a", "a"),
    ],
)
def test_cells(cell, text):
    assert format_cell(cell) == text


def test_markdown_table():
    text = report.markdown_table([["WS | top-1", 0.5], ["FS", None]], ["model", "AUC"])
    assert text == "| model | AUC |\n| --- | --- |\n| WS \\| top-1 | 0.5000 |\n| FS | – |\n"
