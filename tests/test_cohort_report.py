"""The cohort's page takes flags, pictures and pages from the slides' folders, embedded while they are few."""

import numpy as np
import pytest
from PIL import Image

from data_pipelines.cohort import SlideRecord
from data_pipelines.exports import write_json
from experiments.run.cohort_report import slide_rows
from experiments.run.slide_quality import preview
from experiments.run.slide_result import SlideResult


@pytest.fixture
def out(tmp_path):
    """Folders of two finished slides, a and b; c failed and has none."""
    picture = preview(Image.fromarray(np.full((40, 60, 3), 200, np.uint8)))
    for name in ("a", "b"):
        folder = tmp_path / "slides" / name
        (folder / "preview").mkdir(parents=True)
        for file in ("probability", "top_tiles"):
            (folder / "preview" / f"{file}.jpg").write_bytes(picture)
        write_json(folder / "slide.json", {"tissue_share": 0.25, "flags": ["pen marks: blue 1 mm²"]})
    (tmp_path / "slides" / "a" / "report.html").write_text("page")
    return tmp_path


def rows(out, **options):
    records = [SlideRecord(name, out / f"{name}.svs", "srcc", "p") for name in "abc"]
    results = [SlideResult(name, f"{name}.svs", "done", probability=0.5) for name in "ab"]
    return slide_rows(records, [*results, SlideResult("c", "c.svs", "failed", "no such file")], out, **options)


def test_rows_hold_what_the_folders_of_the_slides_hold(out):
    a, b, c = rows(out)
    assert (a.flags, a.tissue, a.page) == (["pen marks: blue 1 mm²"], 0.25, "slides/a/report.html")
    assert list(a.images) == ["probability", "highest tiles"]
    assert a.images["probability"] == (out / "slides/a/preview/probability.jpg").read_bytes()
    assert b.page == "" and (c.flags, c.tissue, c.page, c.images) == ((), None, "", {})


def test_pictures_are_linked_when_all_together_are_too_large(out):
    size = sum(path.stat().st_size for path in out.glob("slides/*/preview/*.jpg"))
    assert all(isinstance(image, bytes) for row in rows(out, embedded=size) for image in row.images.values())
    a, b, _ = rows(out, embedded=size - 1)
    assert a.images == {
        "probability": "slides/a/preview/probability.jpg",
        "highest tiles": "slides/a/preview/top_tiles.jpg",
    }
    assert all(isinstance(image, str) for image in b.images.values())
