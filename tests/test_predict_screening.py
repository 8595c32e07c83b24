"""predict_slides with a model of gastric screening: gates, lesion map, verdicts, files; and what a kill leaves."""

import csv
import dataclasses
import json

import jax
import numpy as np
import pytest

from data_pipelines.annotations import read_annotation
from data_pipelines.cohort import read_cohort
from data_pipelines.exports import read_map
from data_pipelines.prepare import TISSUE_MPP
from data_pipelines.slides import open_slide
from data_pipelines.tiles import Grid, tile_slide
from data_pipelines.tissue import tissue_mask
from experiments.run.screening import gates
from experiments.run.screening.features import top_patches
from experiments.run.screening.model import ScreeningModel
from experiments.run.screening.prediction import lesion_cell, overlapping_stride, slide_judge
from experiments.run.screening.prediction_gates import SlideGates
from experiments.run.screening.screening_outputs import ScreeningProgress, ScreeningSettings, tapering
from srcc_jax.methods.gastric_screening import malignancy_logit
from srcc_jax.models import zoo
from srcc_jax.models.architecture import normalize
from tests import programs
from tests.prediction_process import check_kills
from tests.programs import one_line, tissue
from tests.tiff_files import overwrite, tile_bytes, write_tiff

TILE, TOP_K = 64, 8
GATED = {"min_tissue": 0.1, "focus_patches": 0, "judged_stride": TILE, "mpp_override": None}
FILES = {
    *(
        f"{stem}{end}"
        for stem in ("lesion", "probability")
        for end in (".npz", ".png", ".ome.tiff", "_values.ome.tiff")
    ),
    *("regions.geojson", "regions.xml", "report.html", "slide.json", "tiles.csv"),
}


@pytest.fixture(scope="module", autouse=True)
def quick_compiling():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Four labelled slides of 0.5 µm per pixel, one out of focus to the model's gate, one with a damaged tile, one with little tissue."""
    root = tmp_path_factory.mktemp("screening")
    images = {name: tissue(1024, seed=n) for n, name in enumerate("abcd")}
    images["b"][128:-128, 128:-128] |= 0xC0  # brighter than gray 180
    small = np.full((512, 512, 3), 243, np.uint8)
    small[:256, :256] = images["c"][200:456, 200:456]
    images["c"] = small
    lines = ["slide_id,path,label"]
    for name, image in images.items():
        path = write_tiff(root / f"{name}.tiff", image, mpp=0.5, levels=3, compression="jpeg")
        lines.append(f"{name},{name}.tiff,{'malignant' if name < 'c' else 'benign'}")
    position, length = tile_bytes(path, level=1)[8 * 3 + 4]
    overwrite(path, position, bytes(length))
    (root / "cohort.csv").write_text("\n".join(lines) + "\n")
    programs.save_screening(root / "model", tile=TILE, top_k=TOP_K, without=("foreground",))
    programs.save_screening(root / "single", model="tiny_single", tile=TILE, without=("foreground", "blur"))
    programs.save_model(root / "classifier", grid=Grid(tile=32, stride=16, mpp=1.0))
    return root


def predict(root, out="out", **values):
    """With patches that do not overlap, where `stride` does not say otherwise; None: as the program has it."""
    given = {"workdir": root / "model", "slides": root / "cohort.csv", "out": root / out, "threads": 1, "stride": TILE}
    with programs.imported("predict_slides") as module:
        return programs.start(module, **{n: value for n, value in (given | values).items() if value is not None})


@pytest.fixture(scope="module")
def outcome(root):
    return predict(root)


@pytest.fixture(scope="module")
def plain(root):
    """image uint8 [B, TILE, TILE, 3] -> logit, features and lesion of the plain network, no BatchNorm folded."""
    model = ScreeningModel.load(root / "model")
    network = zoo.build(model.architecture)

    @jax.jit
    def outputs(image):
        out = network.apply(model.variables["patches"], normalize(image, model.architecture), train=False)
        return malignancy_logit(out), out["features"], jax.nn.sigmoid(out["dense"][..., 0])

    return lambda image: tuple(map(np.asarray, outputs(image)))


def table(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def columns(path):
    rows = table(path)
    return {name: np.array([float(row[name] or "nan") for row in rows]) for name in rows[0]}


def rows_of(root, out="out"):
    return {row["slide_id"]: row for row in table(root / out / "slides.csv")}


def about(root, name, out="out"):
    return json.loads((root / out / "slides" / name / "slide.json").read_text())


def test_every_slide_has_its_row_and_files(outcome, root):
    assert outcome.status == 1, outcome.err  # one slide is out of focus, one has a damaged tile
    rows = rows_of(root)
    assert [rows[name]["status"] for name in "abcd"] == ["done", "blurred", "done", "done"]
    assert "1 of" in rows["d"]["reason"] and int(rows["d"]["unreadable"]) > 0
    for name in "acd":
        assert {p.name for p in (root / "out" / "slides" / name).iterdir() if p.is_file()} == FILES
        score = float(rows[name]["probability"])
        assert rows[name]["verdict"] == str(int(score > 0.74))
        assert rows[name]["verdict_validation"] == str(int(score > 0.5))
        assert float(rows[name]["blurred"]) == 0
        assert int(rows[name]["patches"]) == min(TOP_K, int(rows[name]["tiles"]) - int(rows[name]["unreadable"]))
    assert int(rows["c"]["patches"]) < TOP_K  # fewer than the network takes
    assert about(root, "a")["verdict_thresholds"] == {"verdict": 0.74, "verdict_validation": 0.5}
    page = (root / "out" / "report.html").read_text()
    assert "sensitivity at 0.74" in page and "out of focus" in page


def test_a_slide_out_of_focus_is_reported_and_not_judged(outcome, root):
    row, found = rows_of(root)["b"], about(root, "b")
    assert (row["probability"], row["verdict"], row["patches"], row["blurred"]) == ("", "", "", "1.0")
    assert row["reason"].startswith("out of focus: 100%") and "blurred: b: out of focus" in outcome.err
    assert found["flags"][0] == "out of focus" and found["blurred"] == 1
    assert {p.name for p in (root / "out" / "slides" / "b").iterdir()} == {"report.html", "slide.json"}
    again = predict(root, most_blurred=1)
    assert rows_of(root)["b"]["status"] == "done" and "done again, because of another most blurred" in again.out
    predict(root)


def patches_of(root, name, found, rows):
    with open_slide(root / f"{name}.tiff") as slide:
        return np.stack([slide.read(found["x"][row], found["y"][row], TILE, TILE, 1.0) for row in rows])


def test_scores_map_and_verdict_are_those_of_the_plain_networks(outcome, root, plain):
    folder = root / "out" / "slides" / "a"
    found, heat = columns(folder / "tiles.csv"), read_map(folder / "lesion.npz")
    logit, features, lesion = plain(patches_of(root, "a", found, range(len(found["x"]))))
    np.testing.assert_allclose(found["probability"], 1 / (1 + np.exp(-logit)), rtol=1e-3, atol=1e-4)
    assert (heat.unit, heat.mpp, heat.downsample) == ("lesion probability", 8, 16)
    for row in range(0, len(logit), 7):
        column, line = ((np.array([found["x"][row], found["y"][row]]) - heat.origin) / heat.downsample).astype(int)
        cells = lesion[row].reshape(8, 8, 8, 8).mean((1, 3))
        np.testing.assert_allclose(heat.values[line : line + 8, column : column + 8], cells, atol=2e-3)
    best = top_patches(logit, k=TOP_K)
    wanted = slide_judge(ScreeningModel.load(root / "model"))(features[best])
    assert float(rows_of(root)["a"]["probability"]) == pytest.approx(wanted, abs=1e-3)
    assert float(rows_of(root)["a"]["lesion_mm2"]) == pytest.approx((heat.values >= 0.5).sum() * 64e-6)


def test_half_a_tile_is_the_stride_and_changes_the_map_and_not_the_verdict(outcome, root):
    predict(root, "fine", stride=None, focus_patches=0)
    fine, coarse = rows_of(root, "fine"), rows_of(root)
    for name in "ac":
        assert int(fine[name]["tiles"]) > 2 * int(coarse[name]["tiles"])
        assert float(fine[name]["probability"]) == pytest.approx(float(coarse[name]["probability"]), abs=2e-3)
        assert fine[name]["patches"] == coarse[name]["patches"]
        assert fine[name]["blurred"] == ""
    one, other = (read_map(root / out / "slides" / "a" / "lesion.npz") for out in ("out", "fine"))
    assert one.mpp == other.mpp == 8 and np.abs(one.origin).sum() >= np.abs(other.origin).sum()
    assert fine["b"]["status"] == "done"  # its focus was not looked at


def test_overlapping_maps_leave_no_edge():
    """Patches that say 0.2 beside patches that say 0.8, half a patch apart: steps far smaller than those of the plain mean."""
    tiles = tile_slide(
        "a", width=320, height=128, slide_mpp=1.0, grid=Grid(tile=64, stride=32, mpp=1.0), tissue=np.ones((8, 20), bool),
        mask_downsample=16.0,
    )  # fmt: skip
    settings = ScreeningSettings(
        grid=tiles.grid, min_tissue=0.1, mpp_override=None, model="", judged_stride=64, top_k=8, features=16, cell=8, tissue="otsu",
        focus_patches=0, most_blurred=1, threshold=0.74, validation_threshold=0.5, formats=(), thresholds=(0.5,),
    )  # fmt: skip
    progress = ScreeningProgress(tiles, settings, slide_mpp=1.0)
    value = np.where(tiles.u >= 128, 0.8, 0.2).astype(np.float16)
    for rows in tiles.blocks(settings.shape.block):
        maps = np.broadcast_to(value[rows, None, None], (len(rows), 8, 8))
        outputs = {"logit": np.zeros(len(rows), np.float32), "features": np.zeros((len(rows), 16), np.float32)}
        progress.add(rows, {**outputs, "lesion": maps})
    found = progress.mean_map().values
    assert np.abs(found[:, :12] - 0.2).max() < 1e-3 and np.abs(found[:, -12:] - 0.8).max() < 1e-3
    assert 0 < np.abs(np.diff(found, axis=1)).max() < 0.25  # the plain mean has steps of 0.3
    assert tapering(8)[:, :4] + tapering(8)[:, 4:] == pytest.approx(
        np.repeat(tapering(8).sum(1, keepdims=True) / 4, 4, 1)
    )


def test_contours_enclose_what_is_above_the_thresholds(outcome, root):
    predict(root, "lines", thresholds="0.1", formats="geojson,asap,npz")
    folder = root / "lines" / "slides" / "a"
    shapes = [read_annotation(folder / name) for name in ("regions.geojson", "regions.xml")]
    assert len(shapes[0]) == len(shapes[1]) > 0
    assert {shape.group for shape in shapes[0]} == {"lesion probability ≥ 0.1"}


def test_a_network_without_a_map_gives_the_verdict_alone(outcome, root):
    alone = predict(root, "single", workdir=root / "single", formats="npz,csv,png", stride=None)
    row = rows_of(root, "single")["a"]
    assert row["status"] == "done" and row["probability"] and row["lesion_mm2"] == "" and row["blurred"] == "", alone
    assert row["tiles"] == rows_of(root)["a"]["tiles"]  # without a map there are no seams: the model's stride
    assert not (root / "single" / "slides" / "a" / "lesion.npz").exists()
    assert about(root, "a", "single")["tissue_rule"] == "otsu"


def test_tissue_is_the_foreground_networks_and_otsus_where_it_finds_none(root, tmp_path):
    model = ScreeningModel.load(programs.save_screening(tmp_path / "model", tile=TILE))
    records = read_cohort(root / "cohort.csv").records
    found = {}
    for bias, rule in ((1e3, "foreground"), (-1e3, "foreground"), (0, "otsu")):
        model.variables["foreground"]["params"]["classifier"]["bias"] = np.full(1, bias, np.float32)
        slide = SlideGates(model.variables, model.gates).prepare(records[2], model.grid, tissue_rule=rule, **GATED)
        found[bias, rule] = (slide.tissue_rule, bool(slide.tissue.all()), slide.blurred)
        assert any("foreground network" in line for line in slide.quality.flags()) == (rule == "foreground")
        slide.slide.close()
    assert found == {
        (1e3, "foreground"): ("foreground", True, None),
        (-1e3, "foreground"): ("otsu", False, None),
        (0, "otsu"): ("otsu", False, None),
    }


def gates_of(folder, **spec):
    model = ScreeningModel.load(programs.save_screening(folder, tile=TILE))
    return SlideGates(model.variables, dataclasses.replace(model.gates, **spec)), model.grid


def test_tissue_is_looked_for_at_the_scale_of_the_training(root, tmp_path, monkeypatch):
    gate, grid = gates_of(tmp_path / "model", thumbnail_mpp=8.0)
    seen = []
    monkeypatch.setattr(gates, "square_thumbnail", lambda pixels, side: seen.append(pixels.shape) or pixels)
    slide = gate.prepare(read_cohort(root / "cohort.csv").records[0], grid, tissue_rule="foreground", **GATED)
    slide.slide.close()
    assert seen == [(64, 64, 3)]  # 512 µm


@pytest.mark.parametrize("part, noted", [(0.6, True), (0.8, False)])
def test_tissue_that_the_network_does_not_find_is_noted(root, tmp_path, monkeypatch, part, noted):
    def mask(finder, slide, *, shape):
        found = tissue_mask(slide.thumbnail(TISSUE_MPP))
        found[np.cumsum(found).reshape(found.shape) > part * found.sum()] = False
        return found

    gate, grid = gates_of(tmp_path / "model")
    monkeypatch.setattr(gates.ForegroundFinder, "mask", mask)
    slide = gate.prepare(read_cohort(root / "cohort.csv").records[0], grid, tissue_rule="foreground", **GATED)
    slide.slide.close()
    assert any(f"they share {part:.0%}" in line for line in slide.quality.flags()) == noted, slide.quality.flags()


def test_the_focus_is_that_of_the_same_places_at_any_stride(root, tmp_path, monkeypatch):
    gate, grid = gates_of(tmp_path / "model")
    places = []
    monkeypatch.setattr(
        SlideGates, "_square", lambda gate, made, row: places.append((made.tiles.u[row], made.tiles.v[row]))
    )
    looked_at = []
    for stride in (64, 32):
        places.clear()
        finer, given = dataclasses.replace(grid, stride=stride), {**GATED, "focus_patches": 5}
        slide = gate.prepare(read_cohort(root / "cohort.csv").records[0], finer, tissue_rule="otsu", **given)
        slide.slide.close()
        looked_at.append(list(places))
    assert len(looked_at[0]) == 5 and looked_at[0] == looked_at[1]


def test_strides_of_lesion_maps_overlap_by_half():
    for tile, stride, wanted in ((512, 512, 256), (512, 384, 192), (512, 256, 256), (512, 511, 511)):
        assert overlapping_stride(Grid(tile=tile, stride=stride, mpp=0.5)) == wanted


def test_what_does_not_fit_is_one_line(root):
    for changes, words in (
        ({"stride": 48}, "--stride=48 does not divide the model's stride of 64"),
        ({"tissue": "foreground"}, "has no foreground network: give --tissue=otsu"),
        ({"formats": "cells"}, "'cells' is none of"),
        ({"workdir": root / "classifier", "most_blurred": 0.2}, "--most_blurred is for models of gastric screening"),
    ):
        assert words in one_line(predict(root, "refused", **changes))


def test_cells_divide_tile_and_stride():
    assert [lesion_cell(Grid(tile=t, stride=s, mpp=m)) for t, s, m in ((512, 512, 0.5), (512, 96, 0.5), (64, 64, 10))] == [
        16, 16, 1,
    ]  # fmt: skip


def test_killed_it_ends_with_the_same_bytes(root):
    settings = {"stride": 32, "formats": "npz,csv,geojson", "threads": 1}
    check_kills(root, (3, 6), workdir=root / "model", slides=root / "cohort.csv", **settings)
