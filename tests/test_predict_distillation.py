"""predict_slides with a model of reverse distillation: map, slide score, lesion candidates, files; and what a kill leaves."""

import csv
import json

import jax
import numpy as np
import pytest
from scipy import ndimage

from data_pipelines.annotations import read_annotation, write_asap_xml
from data_pipelines.exports import read_map
from data_pipelines.polygons import rasterize
from data_pipelines.scan import ScanBatch
from data_pipelines.slides import open_slide
from data_pipelines.tiles import Grid
from data_pipelines.tissue import tissue_mask
from experiments.run.distillation.model import DistillationModel
from experiments.run.distillation.prediction import anomaly_scorer
from experiments.run.workdir import WorkdirError
from srcc_jax.kernels.anomaly_maps import anomaly_map
from srcc_jax.models import distillation
from srcc_jax.models.teachers import teacher_maps
from srcc_jax.parallel import make_mesh
from tests import programs
from tests.prediction_process import check_kills
from tests.programs import one_line, square, tissue
from tests.tiff_files import overwrite, tile_bytes, write_tiff

TILE, STRIDE = 32, 8
FILES = {
    *("anomaly.npz", "anomaly.png", "anomaly.ome.tiff", "anomaly_values.ome.tiff", "detections.csv", "regions.geojson"),
    *("report.html", "slide.json", "tiles.csv"),
}


@pytest.fixture(scope="module", autouse=True)
def quick_compiling():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Four labelled slides of 0.5 µm per pixel, two of them with a square annotated, one with a damaged tile; two models."""
    root = tmp_path_factory.mktemp("distillation")
    lines = ["slide_id,path,label,annotation"]
    for n, name in enumerate("abcd"):
        path = write_tiff(root / f"{name}.tiff", tissue(512, seed=n), mpp=0.5, levels=5, compression="jpeg")
        write_asap_xml(root / f"{name}.xml", [square(56, 56, side=400.0)])
        lines.append(f"{name},{name}.tiff," + (f"tumour,{name}.xml" if name < "c" else "normal,"))
    position, length = tile_bytes(path, level=1)[5]
    overwrite(path, position, bytes(length))
    (root / "cohort.csv").write_text("\n".join(lines) + "\n")
    programs.save_distillation(root / "model", tile=TILE, mpp=1.0)
    programs.save_model(root / "classifier", grid=Grid(tile=32, stride=16, mpp=1.0))
    return root


def predict(root, out="out", **values):
    given = {"workdir": root / "model", "slides": root / "cohort.csv", "out": root / out, **values}
    with programs.imported("predict_slides") as module:
        return programs.start(module, **given)


@pytest.fixture(scope="module")
def outcome(root):
    return predict(root)


@pytest.fixture(scope="module")
def judge(root):
    """image uint8 [B, TILE, TILE, 3] -> anomaly maps of the plain networks, no BatchNorm folded."""
    model = DistillationModel.load(root / "model")
    student = distillation.build(model.student)
    ours = {name: model.variables[name] for name in ("params", "batch_stats")}

    @jax.jit
    def maps(image):
        taught = teacher_maps(model.teacher, model.variables["teacher"], image)
        made = student.apply(ours, *taught, train=False)
        return anomaly_map(taught, [made[f"stage{level}"] for level in (1, 2, 3)], (TILE, TILE))

    return maps


def table(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def columns(path):
    rows = table(path)
    return {name: np.array([float(row[name] or "nan") for row in rows]) for name in rows[0]}


def slide_files(root, name, out="out"):
    return root / out / "slides" / name


def map_of(root, out="out", name="a"):
    return read_map(slide_files(root, name, out) / "anomaly.npz")


# Values


def test_scores_are_those_of_the_plain_networks_on_the_patch_alone(outcome, root, judge):
    found = columns(slide_files(root, "a") / "tiles.csv")
    chosen = np.random.default_rng(0).choice(len(found["x"]), 16, replace=False)
    with open_slide(root / "a.tiff") as slide:
        patches = [slide.read(x, y, TILE, TILE, 1.0) for x, y in zip(found["x"][chosen], found["y"][chosen])]
    wanted = np.asarray(judge(np.stack(patches))).mean((1, 2))
    assert np.ptp(wanted) > 0.01
    np.testing.assert_allclose(found["score"][chosen], wanted, rtol=1e-4, atol=1e-4)


def test_a_cell_lies_in_the_middle_of_its_patch_and_on_tissue(outcome, root):
    found, heat = columns(slide_files(root, "a") / "tiles.csv"), map_of(root)
    assert (heat.unit, heat.mpp, heat.downsample) == ("anomaly score", STRIDE, 2 * STRIDE)
    with open_slide(root / "a.tiff") as slide:
        mask = tissue_mask(slide.thumbnail(16.0), "saturation")
    wanted = {  # patches of 64 level-0 px every 16, those whose middle is on a tissue pixel of 32
        (x, y) for y in range(0, 512 - 63, 16) for x in range(0, 512 - 63, 16) if mask[(y + 32) // 32, (x + 32) // 32]
    }
    assert set(zip(found["x"], found["y"])) == wanted and 100 < len(wanted) < 29**2
    for x, y, score in zip(found["x"], found["y"], found["score"]):
        column, row = ((np.array([x, y]) + 32 - heat.origin) // heat.downsample).astype(int)
        assert heat.values[row, column] == np.float32(score)
    assert np.isfinite(heat.values).sum() == len(wanted)


def windows(rng, count=4):
    image = rng.integers(0, 256, (count, TILE, TILE, 3), np.uint8)
    place = np.zeros((count, 3), np.int32)
    place[:, 0] = np.arange(count)
    return image, ScanBatch(image, place, np.arange(count, dtype=np.int32), count, ())


def test_orientations_are_averaged_and_a_maximum_is_of_the_smoothed_map(root, judge):
    model, (image, batch) = DistillationModel.load(root / "model"), windows(np.random.default_rng(1))
    scorer = anomaly_scorer(model, mesh=make_mesh(jax.devices()[:1]), pooling="max", patch_sigma=2.0, dihedral=True)
    (scored,) = scorer.score(scorer.fold(model.variables), [batch])
    turned = [np.rot90(image, quarter, axes=(1, 2)) for quarter in range(4)]
    each = []
    for pictures in [*turned, *(one[:, :, ::-1] for one in turned)]:
        maps = np.asarray(judge(pictures))
        each.append([ndimage.gaussian_filter(one, 2.0).max() for one in maps])
    assert np.ptp(each, axis=0).max() > 1e-3
    np.testing.assert_allclose(scored.outputs["score"], np.mean(each, axis=0), rtol=1e-4, atol=1e-4)


# Files


def test_slides_have_scores_candidates_and_all_files(outcome, root):
    assert outcome.status == 1 and "4 of 4 slides done" in outcome.out  # of d some patches cannot be read
    rows = table(root / "out" / "slides.csv")
    assert list(rows[0])[4:9] == ["traceback", "score", "highest", "candidates", "mpp"]
    for row in rows:
        folder = slide_files(root, row["slide_id"])
        scores = columns(folder / "tiles.csv")["score"]
        high = scores[scores >= 1.2]
        assert float(row["score"]) == pytest.approx(high.mean() if len(high) else 0)
        assert float(row["highest"]) == np.nanmax(scores) and int(row["tiles"]) == len(scores)
        assert int(row["unreadable"]) == np.isnan(scores).sum() == (row["slide_id"] == "d") * int(row["unreadable"])
        assert {path.name for path in folder.iterdir() if path.is_file()} == FILES
        about = json.loads((folder / "slide.json").read_text())
        assert about["score"] == float(row["score"]) and "probability" not in about
        assert about["top_tiles"][0]["score"] == float(row["highest"])
        assert f"slide score {about['score']:.4f}, highest anomaly score" in (folder / "report.html").read_text()
    assert int(rows[3]["unreadable"]) > 0
    missing = map_of(root, name="d").missing
    assert 0 < missing.sum() <= int(rows[3]["unreadable"])


def test_candidates_are_the_peaks_of_the_map(outcome, root):
    """By the rule as it is told: the largest value, then the largest outside its square, and so on."""
    heat = map_of(root)
    values, radius, wanted = np.where(np.isnan(heat.values), 0, heat.values), round(93.3 / STRIDE), []
    while values.max() > 1.0:
        row, column = np.unravel_index(values.argmax(), values.shape)
        centre = np.array([column + 0.5, row + 0.5]) * heat.downsample + heat.origin
        wanted.append((values[row, column], *centre))
        values[max(row - radius, 0) : row + radius, max(column - radius, 0) : column + radius] = 0
    found = columns(slide_files(root, "a") / "detections.csv")
    np.testing.assert_allclose(np.stack([found[name] for name in ("score", "x", "y")], axis=1), wanted, rtol=1e-6)
    assert len(wanted) > 2


def test_regions_lie_where_the_map_is_high(outcome, root):
    heat = map_of(root)
    shapes = read_annotation(slide_files(root, "a") / "regions.geojson")
    assert {shape.group for shape in shapes} <= {"anomaly score ≥ 1.2", "anomaly score ≥ 2"}
    inside = rasterize(
        [shape for shape in shapes if shape.group == "anomaly score ≥ 1.2"],
        width=heat.values.shape[1],
        height=heat.values.shape[0],
        downsample=heat.downsample,
        origin=heat.origin,
    )
    np.testing.assert_array_equal(inside, heat.values >= 1.2)
    assert inside.any()


def test_the_report_has_columns_of_what_was_found(outcome, root):
    text = (root / "out" / "report.html").read_text()
    assert "tumour in 4 slides" in text and "tiles of 32 px at stride 8" in text
    for heading in ("score", "highest", "candidates"):
        assert f'<button type="button">{heading}</button>' in text
    assert '<button type="button">probability</button>' not in text


def test_the_report_judges_by_the_slide_score(outcome, root):
    metrics = json.loads((root / "out" / "summary.json").read_text())["metrics"]
    scores = {row["slide_id"]: float(row["score"]) for row in table(root / "out" / "slides.csv")}
    auc = np.mean([(scores[p] > scores[n]) + 0.5 * (scores[p] == scores[n]) for p in "ab" for n in "cd"])
    assert metrics["ROC AUC"]["slide"]["value"] == pytest.approx(auc)
    assert set(metrics) == {"ROC AUC", "sensitivity at 1.2", "specificity at 1.2"}


def test_other_files_are_made_from_kept_scores(root):
    """At another stride too. Smoothing of the map and the thresholds touch no patch: only files are made again."""
    common = {"slides": root / "a.tiff", "stride": 16, "formats": "npz,csv,detections"}
    predict(root, "again", **common)
    before, plain = columns(slide_files(root, "a", "again") / "tiles.csv"), map_of(root, "again")
    assert plain.mpp == 16
    changed = predict(root, "again", **common, map_sigma=1.5, slide_threshold=0.5, nms_stop=0.1)
    assert "map sigma (0.0, now 1.5), slide threshold (1.2, now 0.5), NMS stop (1.0, now 0.1)" in changed.out
    assert ", 0 tiles in " in changed.out
    after, heat = columns(slide_files(root, "a", "again") / "tiles.csv"), map_of(root, "again")
    np.testing.assert_array_equal(before["score"], after["score"])
    known = np.isfinite(plain.values)
    np.testing.assert_array_equal(np.isfinite(heat.values), known)
    assert np.std(heat.values[known]) < np.std(plain.values[known])
    (row,) = table(root / "again" / "slides.csv")
    assert float(row["score"]) == pytest.approx(after["score"][after["score"] >= 0.5].mean())


def test_slides_that_all_score_nothing_are_told_and_the_models_own_threshold_is_the_cure(root):
    """A model that stays below 2 everywhere, as RD does; the same patches, whose scores are kept."""
    programs.save_distillation(root / "low", tile=TILE, mpp=1.0, threshold=1.2)
    card = json.loads((root / "low" / "model.json").read_text())
    (root / "low" / "model.json").write_text(json.dumps({**card, "slide_threshold": 2.9}))
    common = {"workdir": root / "low", "stride": 16, "formats": "npz,csv,detections"}
    outcome = predict(root, "low_out", **common)
    words = "All 4 slides score 0: no map reaches the slide threshold 2.9"
    assert words in outcome.out and "--slide_threshold=validation takes 1.2" in outcome.out
    assert words in json.loads((root / "low_out" / "summary.json").read_text())["warnings"][0]
    assert words in (root / "low_out" / "report.html").read_text()
    outcome = predict(root, "low_out", **common, slide_threshold="validation")
    assert "slide threshold (2.9, now 1.2), NMS stop (1.0, now 0.6)" in outcome.out and "score 0" not in outcome.out
    assert all(float(row["score"]) >= 1.2 for row in table(root / "low_out" / "slides.csv"))
    assert json.loads((root / "low_out" / "summary.json").read_text())["warnings"] == []


@pytest.mark.parametrize("source", ["maps", "detections"])
def test_evaluate_camelyon_reads_what_was_written(outcome, root, source):
    given = {"cohort": root / "cohort.csv", "out": root / source, source: root / "out"}
    with programs.imported("evaluate_camelyon") as module:
        evaluated = programs.start(module, **given)
    assert evaluated.status == 0, evaluated.err
    ours = {row["slide_id"]: row for row in table(root / "out" / "slides.csv")}
    rows = table(root / source / "slides.csv")
    assert [(row["score"], row["detections"]) for row in rows] == [
        (ours[row["slide_id"]]["score"], ours[row["slide_id"]]["candidates"]) for row in rows
    ]
    assert [row["lesions"] for row in rows] == ["1", "1", "0", "0"]
    metrics, summary = (
        json.loads(path.read_text()) for path in (root / source / "metrics.json", root / "out" / "summary.json")
    )
    assert metrics["slide ROC AUC"]["value"] == pytest.approx(summary["metrics"]["ROC AUC"]["slide"]["value"])


# Kills


def test_killed_inside_slides_it_ends_with_the_same_bytes(root):
    check_kills(root, (4, 3, 2), workdir=root / "model", slides=root / "cohort.csv")


# Mistakes


def test_mistakes_are_one_line_each(root):
    def mistake(**values):
        return one_line(predict(root, "mistakes", **values))

    assert mistake(gradcam="false").startswith("--gradcam is for models of slide classification, ")
    assert "holds one of slide classification: leave it out" in mistake(workdir=root / "classifier", dihedral="true")
    assert "--thresholds=4: give anomaly scores between 0 and 3, such as 1.2,2" in mistake(thresholds="4")
    assert "--slide_threshold=test: give a map value from 0 on, or validation" in mistake(slide_threshold="test")
    assert "--stride=33 is larger than the model's tile of 32 px" in mistake(stride=33)
    assert "'bmp' is none of png, npz, csv, " in mistake(formats="bmp")
    assert "'detections' is none of" in mistake(workdir=root / "classifier", formats="detections")


def test_a_model_of_an_unknown_kind_is_named(root, tmp_path):
    card = json.loads((root / "model" / "model.json").read_text())
    (tmp_path / "model.json").write_text(json.dumps({**card, "kind": "weather forecast"}))
    assert (
        "holds a model of weather forecast, of which slides are not predicted: give one of slide classification,"
        in (one_line(predict(root, "mistakes", workdir=tmp_path)))
    )
    (tmp_path / "model.json").write_text(json.dumps({**card, "checksum": "0"}))
    with pytest.raises(WorkdirError):
        DistillationModel.load(tmp_path)
