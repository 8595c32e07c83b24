"""predict_slides with a model of cell detection: every cell once, files, what cannot be read, and what a kill leaves."""

import csv
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data_pipelines.annotations import read_annotation
from data_pipelines.boxes import Boxes, read_boxes, write_boxes
from data_pipelines.exports import read_map
from data_pipelines.polygons import rasterize
from data_pipelines.tiles import Grid
from experiments.run.cells import prediction
from experiments.run.cells.cell_outputs import CELL_FORMATS
from experiments.run.cells.model import CellModel
from tests import programs, small_networks
from tests.prediction_process import check_kills
from tests.programs import one_line, tissue
from tests.tiff_files import overwrite, tile_bytes, write_tiff

TILE, OVERLAP = 64, 16  # of the model; windows on slides overlap by 32


def save_model(folder, **changes):
    """A finished model that was never trained."""
    net = small_networks.architecture("unet", classes=3, batch_norm=True)
    folder.mkdir(parents=True)
    fields = {
        "mpp": 0.5,
        "reduce": 2,
        "window": TILE,
        "overlap": OVERLAP,
        "threshold": 0.5,
        "min_area": 20,
        "beta": 130.0,
    }
    fields |= {"spread": 0.3, "about": {"settings": {"positive": "srcc", "network": "unet"}}, **changes}
    CellModel(architecture=net, variables=small_networks.variables(net), **fields).save(folder)
    return folder


def disc(side, x, y, radius):
    """bool [side, side]."""
    return np.hypot(*(np.mgrid[:side, :side] + 0.5 - np.array([y, x])[:, None, None])) < radius


# The program


@pytest.fixture(scope="module", autouse=True)
def quick_compiling():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


SIDE = 512  # level-0 px, of 0.5 µm: 256 model pixels
DISCS = [
    (90 + 48 * column + 7 * row, 100 + 52 * row, 18 + (column + row) % 3 * 2) for row in range(6) for column in range(6)
]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two slides with dark discs of which one has a damaged tile; a model."""
    root = tmp_path_factory.mktemp("cells")
    image = tissue(SIDE)
    for x, y, radius in DISCS:
        image[disc(SIDE, x, y, radius)] = (150, 20, 150)
        image[disc(SIDE, x, y, 0.7 * radius)] = (60, 20, 110)
    for name in ("whole", "damaged"):
        write_tiff(root / f"{name}.tiff", image, mpp=0.5, levels=4, compression="deflate")
    position, length = tile_bytes(root / "damaged.tiff", level=1)[5]
    overwrite(root / "damaged.tiff", position, bytes(length))
    lines = [f"{name},{name}.tiff,{label}" for name, label in (("whole", "srcc"), ("damaged", "normal"))]
    (root / "cohort.csv").write_text("\n".join(["slide_id,path,label", *lines]) + "\n")
    save_model(root / "model")
    programs.save_model(root / "classifier", grid=Grid(tile=32, stride=16, mpp=1.0))
    return root


def by_colour(architecture):
    """In the place of the network: red below 105 is a cell's inside, above it where there is no green its edge."""

    def probability(variables, image):
        image = image.astype(jnp.float32)
        inner = jax.nn.sigmoid((105 - image[..., 0]) / 10)
        edge = (1 - inner) * jax.nn.sigmoid((36 - image[..., 1]) / 2)
        return jnp.stack([1 - inner - edge, edge, inner], axis=-1)

    return probability


def predict(root, out="out", **values):
    given = {"workdir": root / "model", "slides": root / "cohort.csv", "out": root / out, **values}
    with programs.imported("predict_slides") as module:
        return programs.start(module, **given)


@pytest.fixture(scope="module")
def outcome(root):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prediction, "make_probability", by_colour)
        return predict(root, measure_masks="true", density_um=50, formats=",".join((*CELL_FORMATS, "boxes")))


def table(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_discs_are_found_each_once(outcome, root):
    assert outcome.status == 1 and "2 of 2 slides done" in outcome.out, outcome
    rows = {row["slide_id"]: row for row in table(root / "out" / "slides.csv")}
    cells = table(root / "out" / "slides" / "whole" / "cells.csv")
    assert list(cells[0]) == ["x", "y", "width", "height", "score", "area_um2", "inner_area_um2", "inner_share"]
    assert int(rows["whole"]["cells"]) == len(cells) == len(DISCS)
    box = np.array([[float(cell[name]) for name in ("x", "y", "width", "height")] for cell in cells])
    middle = box[:, :2] + box[:, 2:] / 2
    for x, y, radius in DISCS:
        near = np.hypot(*(middle - (x, y)).T)
        mine = near.argmin()
        assert near[mine] < 2
        np.testing.assert_allclose(box[mine, 2:], 2 * radius, atol=4)
        assert float(cells[mine]["area_um2"]) == pytest.approx(np.pi * (radius * 0.5) ** 2, rel=0.12)
        assert float(cells[mine]["inner_share"]) == pytest.approx(0.49, abs=0.1)
    assert list(table(root / "out" / "slides.csv")[0])[5:7] == ["cells", "cells_per_mm2"]
    about = json.loads((root / "out" / "slides" / "whole" / "slide.json").read_text())
    assert float(rows["whole"]["cells_per_mm2"]) == pytest.approx(len(cells) / about["quality"]["tissue_mm2"])
    assert about["cells"] == len(cells) and about["cut_cells"] == 0 and "probability" not in about


def test_outlines_cover_the_discs_and_boxes_surround_them(outcome, root):
    folder = root / "out" / "slides" / "whole"
    shapes = read_annotation(folder / "cells.geojson")
    assert {shape.group for shape in shapes} == {"srcc"} and len(shapes) == len(DISCS)
    drawn = np.any([disc(SIDE, *one) for one in DISCS], axis=0)
    covered = rasterize(shapes, width=SIDE, height=SIDE, downsample=1.0)
    assert (covered & drawn).sum() / (covered | drawn).sum() > 0.9
    objects = json.loads((folder / "cells.geojson").read_text())["features"]
    assert {one["properties"]["objectType"] for one in objects} == {"cell"}
    assert set(objects[0]["properties"]["measurements"]) == {"score", "area µm^2", "inner area µm^2", "inner share"}
    boxes = json.loads((folder / "boxes.geojson").read_text())["features"]
    assert {one["properties"]["objectType"] for one in boxes} == {"detection"} and len(boxes) == len(DISCS)
    for shape, box in zip(shapes, read_boxes(folder / "detections" / "whole.xml").box):
        np.testing.assert_allclose(shape.bounds, box, atol=3)


def test_density_and_counts_leave_out_what_cannot_be_read(outcome, root):
    rows = {row["slide_id"]: row for row in table(root / "out" / "slides.csv")}
    assert 0 < int(rows["damaged"]["unreadable"]) < int(rows["damaged"]["tiles"])
    assert 0 < int(rows["damaged"]["cells"]) < len(DISCS)
    whole, damaged = (read_map(root / "out" / "slides" / name / "density.npz") for name in ("whole", "damaged"))
    assert whole.unit == "cells per mm²" and not whole.missing.any()
    assert np.nansum(whole.values) * 0.05**2 == pytest.approx(len(DISCS), abs=1)
    assert damaged.missing.any() and np.isnan(damaged.values[damaged.missing]).all()
    values = [float(row["cells_per_mm2"] or "nan") for row in table(root / "out" / "slides" / "damaged" / "tiles.csv")]
    assert np.isnan(values).sum() == int(rows["damaged"]["unreadable"])
    assert "36 cells, " in (root / "out" / "slides" / "whole" / "report.html").read_text()


def test_evaluate_detection_reads_what_was_written(outcome, root, tmp_path):
    (tmp_path / "truth").mkdir()
    box = np.array([(x - r, y - r, x + r, y + r) for x, y, r in DISCS], float)
    boxes = Boxes(box, np.full(len(box), np.nan))
    write_boxes(tmp_path / "truth" / "whole.xml", boxes, image="whole", width=SIDE, height=SIDE)
    with programs.imported("evaluate_detection") as module:
        judged = programs.start(module, truth=tmp_path / "truth", detections=root / "out", out=tmp_path / "judged")
    assert judged.status == 0 and "instance recall 1.0000" in judged.out, judged


def test_a_higher_score_is_asked_for_without_the_network(root):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prediction, "make_probability", by_colour)
        given = {"slides": root / "whole.tiff", "formats": "table"}
        predict(root, "again", **given)
        before = table(root / "again" / "slides" / "whole" / "cells.csv")
        middle = float(np.median([float(cell["score"]) for cell in before]))
        changed = predict(root, "again", **given, min_score=middle)
    assert f"min score (0.0, now {middle})" in changed.out and ", 0 tiles in " in changed.out
    after = table(root / "again" / "slides" / "whole" / "cells.csv")
    assert after == [cell for cell in before if float(cell["score"]) >= middle] and 0 < len(after) < len(before)


# Kills and mistakes


def test_killed_inside_slides_it_ends_with_the_same_bytes(root):
    """With a network of random weights and low demands, whose cells are of all forms and lie across borders."""
    save_model(root / "random", threshold=0.34, min_area=4, overlap=8, window=32)

    check_kills(root, (2, 4), workdir=root / "random", slides=root / "damaged.tiff")
    assert int(table(root / "killed" / "slides.csv")[0]["cells"]) > 20


def test_mistakes_are_one_line_each(root):
    def mistake(**values):
        return one_line(predict(root, "mistakes", **values))

    assert "--min_score is for models of cell detection" in mistake(workdir=root / "classifier", min_score=0.5)
    assert mistake(gradcam="false").startswith("--gradcam is for models of slide classification, ")
    assert mistake(stride=31).startswith("--stride=31 is below half the model's window of 64 px")
    assert "'detections' is none of png, npz, csv" in mistake(formats="detections")
