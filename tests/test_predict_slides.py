"""predict_slides: every slide given gets a row with a reason or a result, the files agree, and mistakes are one line each."""

import csv
import json
import pathlib
import re
import shutil

import jax
import numpy as np
import openslide
import pytest
import tifffile
from absl import flags

from data_pipelines.annotations import read_annotation
from data_pipelines.cohort import SlideRecord
from data_pipelines.exports import read_map
from data_pipelines.polygons import rasterize
from data_pipelines.tiles import Grid
from experiments.run.evaluation import measure
from experiments.run.model import Model
from experiments.run.program import UsageError
from experiments.run.slides import NO_TISSUE, slide_names, slide_records
from experiments.run.workdir import WorkdirError
from srcc_jax.models.zoo import architecture, init
from tests import programs
from tests.programs import one_line, tissue
from tests.tiff_files import overwrite, tile_bytes, write_tiff

COLUMNS = [
    *("slide_id", "path", "status", "reason", "traceback", "probability", "mpp", "mpp_source", "backend", "tiles"),
    *("unreadable", "tiles_per_second", "seconds_open", "seconds_tissue", "seconds_read", "seconds_model"),
    *("seconds_write", "model", "configuration"),
]


EVERY_FORMAT = "png,npz,csv,ome_tiff,geojson,geojson_tiles,asap,html"


@pytest.fixture(scope="module")
def predicting():
    with programs.imported("predict_slides") as module:
        yield module


def read_rows(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def statuses(rows):
    return {row["slide_id"]: row["status"] for row in rows}


# Real files


@pytest.fixture(scope="module")
def real(predicting, shared_data, tmp_path_factory):
    """A folder with sub-folders of real slides, sound and not, predicted as it is ("plain") and with --mpp_override ("override")."""
    root = tmp_path_factory.mktemp("real")
    slides, folder = shared_data / "slides", root / "slides"
    shutil.copytree(slides / "openslide_fixtures", folder / "fixtures")
    shutil.copytree(slides / "CMU-1-Small-Region_dicom", folder / "CMU_dicom")
    (folder / "a" / "b").mkdir(parents=True)
    for name in ("CMU-1-Small-Region.svs", "CMU-1-Small-Region.jpeg.tiff"):
        shutil.copy(slides / name, folder / "a" / "b")
    shutil.copy(slides / "TCGA-CR-7395-01A-01-TS1.svs", folder)
    (folder / "empty.svs").write_bytes(b"")
    (folder / "text.ndpi").write_text("not a slide")
    model = programs.save_model(root / "model", grid=Grid(tile=32, stride=32, mpp=4.0))
    outcomes = {}
    for name, options in {"plain": {}, "override": {"mpp_override": 0.5, "formats": EVERY_FORMAT}}.items():
        outcomes[name] = programs.start(
            predicting, workdir=model, slides=folder, out=root / name, thresholds="0.1,0.9", **options
        )
    return root, outcomes


SOUND = {"CMU_dicom", "CMU-1-Small-Region"}
ONLY_WITHOUT_SCALE = {"TCGA-CR-7395-01A-01-TS1", "CMU-1-Small-Region.jpeg", "boxes"}
BROKEN = {"boxes_0", "broken_truncated", "small", "unopenable", "unreadable", "empty", "text"}


def test_every_file_that_looks_like_a_slide_has_a_row_with_a_reason(real):
    root, outcomes = real
    rows = read_rows(root / "plain" / "slides.csv")
    assert list(rows[0]) == COLUMNS
    assert {n for n, status in statuses(rows).items() if status == "done"} == SOUND
    assert {n for n, status in statuses(rows).items() if status == "failed"} == ONLY_WITHOUT_SCALE | BROKEN
    assert all(bool(row["reason"]) == (row["status"] == "failed") for row in rows)
    assert all(bool(row["probability"]) == (row["status"] == "done") for row in rows)
    reasons = {row["slide_id"]: row["reason"] for row in rows}
    for name in ONLY_WITHOUT_SCALE:
        assert "scale is not known" in reasons[name] and "--mpp_override" in reasons[name]
    assert "0.00499" in reasons["CMU-1-Small-Region.jpeg"] and "0 bytes" in reasons["empty"]
    assert outcomes["plain"].status == 1 and "2 of 12 slides done" in outcomes["plain"].out


def test_an_override_cures_those_that_only_lacked_a_scale(real):
    root, outcomes = real
    rows = {row["slide_id"]: row for row in read_rows(root / "override" / "slides.csv")}
    assert {name for name, row in rows.items() if row["status"] == "done"} == SOUND | ONLY_WITHOUT_SCALE
    assert {rows[name]["mpp_source"] for name in ONLY_WITHOUT_SCALE} == {"flag"}
    assert {(rows[name]["mpp"], rows[name]["mpp_source"]) for name in SOUND} == {("0.499", "file")}
    same = [float(rows[name]["probability"]) for name in sorted(SOUND)]
    assert same[0] == pytest.approx(same[1], abs=1e-4)  # one picture, by two decoders
    assert outcomes["override"].status == 1


def test_the_report_names_every_failed_slide_and_the_console_too(real):
    root, outcomes = real
    page = (root / "plain" / "report.html").read_text()
    failed = json.loads((root / "plain" / "summary.json").read_text())["failed"]
    assert set(failed) == ONLY_WITHOUT_SCALE | BROKEN
    for name, reason in failed.items():
        assert f"{name}: " in page and f"failed: {name}: {reason}" in outcomes["plain"].err
    assert "No metrics: no slide has a label" in page and "No metrics: no slide has a label" in outcomes["plain"].out


def test_files_of_a_slide_agree(real):
    root, _ = real
    for row in read_rows(root / "override" / "slides.csv"):
        folder = root / "override" / "slides" / row["slide_id"]
        if row["status"] == "failed":
            assert not folder.exists()
            continue
        tiles = read_rows(folder / "tiles.csv")
        probabilities = np.array([float(tile["probability"]) for tile in tiles])
        assert int(row["tiles"]) == len(tiles) and float(row["probability"]) == probabilities.max()
        assert (folder / "probability.png").read_bytes()[:4] == (folder / "gradcam.png").read_bytes()[:4] == b"\x89PNG"
        about = json.loads((folder / "slide.json").read_text())
        assert about["probability"] == float(row["probability"]) and about["mpp_source"] == row["mpp_source"]
        painted = read_map(folder / "probability.npz")
        for tile, probability in zip(tiles, probabilities):
            centre = np.array([float(tile["x"]), float(tile["y"])]) + about["tile_level0"] / 2
            column, line = ((centre - painted.origin) // painted.downsample).astype(int)
            assert painted.values[line, column] == np.float32(probability)
        assert np.isfinite(painted.values).sum() == len(tiles) and not painted.missing.any()
        warm = read_map(folder / "gradcam.npz")
        assert warm.unit == "Grad-CAM" and np.nanmin(warm.values) >= 0 and warm.mpp <= painted.mpp


def test_maps_and_regions_open_in_other_programs(real):
    """OpenSlide sees the map in the slide's own scale; regions lie where tiles are at or above the threshold."""
    root, _ = real
    for name in SOUND:
        folder = root / "override" / "slides" / name
        about = json.loads((folder / "slide.json").read_text())
        with openslide.OpenSlide(folder / "probability.ome.tiff") as picture:
            mpp = float(picture.properties["openslide.mpp-x"])
            size_um = [side * mpp for side in picture.dimensions]
        wanted_um = (about["width"] * about["mpp"], about["height"] * about["mpp"])
        assert size_um == pytest.approx(wanted_um, abs=2 * about["grid"]["stride"] * about["grid"]["mpp"])
        painted = read_map(folder / "probability.npz")
        np.testing.assert_array_equal(tifffile.imread(folder / "probability_values.ome.tiff"), painted.values)
        shapes = read_annotation(folder / "regions.geojson")
        assert {shape.group for shape in shapes} <= {"probability ≥ 0.1", "probability ≥ 0.9"}
        inside = rasterize(
            [shape for shape in shapes if shape.group == "probability ≥ 0.1"],
            width=painted.values.shape[1],
            height=painted.values.shape[0],
            downsample=painted.downsample,
            origin=painted.origin,
        )
        np.testing.assert_array_equal(inside, painted.values >= 0.1)
        assert len(read_annotation(folder / "regions.xml")) == len(shapes)
        objects = json.loads((folder / "tiles.geojson").read_text())["features"]
        measured = [float(feature["properties"]["measurements"]["probability"]) for feature in objects]
        np.testing.assert_allclose(measured, [float(t["probability"]) for t in read_rows(folder / "tiles.csv")])


# A cohort of drawn squares


@pytest.fixture(scope="module")
def cohort(predicting, tmp_path_factory):
    """A labelled cohort with a missing file, a slide without tissue and two with damage, predicted."""
    root = tmp_path_factory.mktemp("cohort")
    for n in range(4):
        write_tiff(root / f"s{n}.tiff", tissue(seed=n), mpp=0.5)
    write_tiff(root / "white.tiff", np.full((256, 256, 3), 255, np.uint8), mpp=0.5)
    for name, level in (("picture", 0), ("tiles", 1)):  # of 0.5 and 1.0 µm per pixel; the last is that of the model
        path = write_tiff(root / f"{name}.tiff", tissue(1024), mpp=0.5, levels=6, compression="jpeg")
        side = 16 >> level
        position, length = tile_bytes(path, level=level)[side // 2 * side + side // 2]
        overwrite(path, position, bytes(length))
    lines = ["slide_id,path,label,patient_id,split"]
    lines += [f"s{n},s{n}.tiff,{'srcc' if n < 2 else 'normal'},p{n},test" for n in range(4)]
    lines += [f"{name},{name}.tiff,srcc,p{name},test" for name in ("white", "gone", "picture", "tiles")]
    lines += ["other,other.tiff,srcc,q,train"]
    (root / "cohort.csv").write_text("\n".join(lines) + "\n")
    model = programs.save_model(root / "model", grid=Grid(tile=32, stride=16, mpp=1.0))
    outcome = programs.start(
        predicting,
        workdir=model,
        slides=root / "cohort.csv",
        split="test",
        out=root / "out",
        gradcam="false",
        stride=32,
    )
    return root, outcome


def test_rows_of_the_split_alone_in_their_order(cohort):
    root, outcome = cohort
    rows = read_rows(root / "out" / "slides.csv")
    assert [row["slide_id"] for row in rows] == ["s0", "s1", "s2", "s3", "white", "gone", "picture", "tiles"]
    failed = {row["slide_id"]: row["reason"] for row in rows if row["status"] == "failed"}
    assert failed["white"] == NO_TISSUE and failed["gone"].endswith("gone.tiff: no such file") and len(failed) == 2
    assert outcome.status == 1


def test_metrics_are_those_of_the_finished_slides(cohort):
    root, _ = cohort
    summary = json.loads((root / "out" / "summary.json").read_text())
    rows = [row for row in read_rows(root / "out" / "slides.csv") if row["status"] == "done"]
    positive = [float(row["probability"]) for row in rows if row["slide_id"] not in ("s2", "s3")]
    negative = [float(row["probability"]) for row in rows if row["slide_id"] in ("s2", "s3")]
    auc = np.mean([(p > n) + 0.5 * (p == n) for p in positive for n in negative])
    assert len(positive) == 4 and summary["slide_auc"]["value"] == pytest.approx(auc)
    assert summary["slides"] == 8 and set(summary["failed"]) == {"white", "gone"}
    assert (
        0 <= summary["device_waiting_share"] <= 1 and summary["tiles"] == sum(int(row["tiles"]) for row in rows) - LOST
    )


LOST = 4  # tiles of 32 px, one beside the other, that lie on the damaged one of 64 px


def test_unreadable_tiles_are_missing_and_said(cohort):
    root, _ = cohort
    (row,) = (row for row in read_rows(root / "out" / "slides.csv") if row["slide_id"] == "tiles")
    values = [tile["probability"] for tile in read_rows(root / "out" / "slides" / "tiles" / "tiles.csv")]
    lost = values.count("")
    assert row["status"] == "done" and row["reason"].startswith(f"{lost} of {len(values)} tiles could not be read")
    assert lost == LOST
    assert float(row["probability"]) == max(float(value) for value in values if value)
    assert int(read_map(root / "out" / "slides" / "tiles" / "probability.npz").missing.sum()) == lost


def test_a_picture_that_cannot_be_read_costs_the_picture_alone(cohort):
    """Level 0 is damaged, which only the thumbnail shows; the model looks at level 1."""
    root, _ = cohort
    (row,) = (row for row in read_rows(root / "out" / "slides.csv") if row["slide_id"] == "picture")
    assert row["status"] == "done" and row["reason"].startswith("no picture of the slide: ")
    assert (root / "out" / "slides" / "picture" / "probability.png").exists()


def test_stride_and_gradcam_follow_the_flags(cohort):
    root, _ = cohort
    assert json.loads((root / "out" / "slides" / "s0" / "slide.json").read_text())["grid"]["stride"] == 32
    assert not (root / "out" / "slides" / "s0" / "gradcam.npz").exists()
    assert "tiles of 32 px at stride 32" in (root / "out" / "report.html").read_text()


# Mistakes


@pytest.fixture
def model(tmp_path):
    return programs.save_model(tmp_path / "model", grid=Grid(tile=32, stride=16, mpp=1.0))


def test_mistakes_are_one_line_each(predicting, model, tmp_path):
    slide = write_tiff(tmp_path / "a.tiff", tissue(), mpp=0.5)
    (tmp_path / "nothing").mkdir()
    (tmp_path / "file").write_text("")

    def mistake(**values):
        return one_line(
            programs.start(predicting, **{"workdir": model, "slides": slide, "out": tmp_path / "out", **values})
        )

    assert "none: no such file or folder" in mistake(slides=tmp_path / "none")
    assert "none.csv: No such file" in mistake(slides=tmp_path / "none.csv")
    assert "nothing: no slides in this folder or below" in mistake(slides=tmp_path / "nothing")
    assert "nothing holds no finished model" in mistake(workdir=tmp_path / "nothing")
    assert "file holds no finished model" in mistake(workdir=tmp_path / "file")
    assert "--stride=33 is larger than the model's tile of 32 px" in mistake(stride=33)
    assert "a file stands where a folder is needed" in mistake(out=tmp_path / "file" / "out")
    assert not (tmp_path / "out" / "slides.csv").exists()


@pytest.mark.parametrize("name", ["stride", "threads"])
def test_numbers_below_one_are_refused_by_the_flag(predicting, model, tmp_path, name):
    with pytest.raises(flags.IllegalFlagValueError, match=f"flag --{name}=0: 0 is not a positive integer"):
        programs.start(predicting, workdir=model, slides=tmp_path, out=tmp_path / "out", **{name: 0})


def test_a_model_that_is_damaged_or_of_another_network_is_refused(model, tmp_path):
    other = programs.save_model(tmp_path / "other", grid=Grid(tile=32, stride=16, mpp=1.0))
    card = json.loads((other / "model.json").read_text())
    card["architecture"]["head"] = 128
    (other / "model.json").write_text(json.dumps(card))
    with pytest.raises(WorkdirError, match=r"weights are of another network than the card.s: .* arrays differ"):
        Model.load(other)
    (other / "weights.npz").write_bytes((other / "weights.npz").read_bytes()[:1000])
    with pytest.raises(WorkdirError, match="weights"):
        Model.load(other)
    (other / "model.json").write_text("{")
    with pytest.raises(WorkdirError, match="is not JSON"):
        Model.load(other)


def test_a_model_comes_back_as_it_was_saved(model):
    loaded = Model.load(model)
    wanted = init(architecture("tiny", source="keras", classes=1), jax.random.key(0))
    assert loaded.grid == Grid(tile=32, stride=16, mpp=1.0) and loaded.positive == "srcc" and loaded.min_tissue == 0.5
    for found, value in zip(jax.tree.leaves(loaded.variables), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(found, value)


# Which slides


def test_slides_of_one_name_are_told_apart(tmp_path):
    for name in ("a/x.svs", "b/x.svs", "b/X.tif", "c/y.svs", "z.svs", "z.tiff"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"II")
    records = slide_records(str(tmp_path), None)
    names = {str(record.path.relative_to(tmp_path)): record.slide_id for record in records}
    assert names == {
        "a/x.svs": "a__x.svs",
        "b/x.svs": "b__x.svs",
        "b/X.tif": "b__X.tif",  # not even on a file system that does not tell capitals
        "c/y.svs": "y",
        "z.svs": "z.svs",
        "z.tiff": "z.tiff",
    }


def test_names_that_would_still_meet_are_refused(tmp_path):
    found = [tmp_path / "a" / "x.svs", tmp_path / "b" / "x.svs", tmp_path / "a__x.svs.tif"]
    for path in found:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"II")
    with pytest.raises(UsageError, match=r"two slides would be named a__x\.svs.*cohort CSV"):
        slide_names(found, tmp_path)


def test_names_are_never_paths(tmp_path):
    (tmp_path / "...svs").write_bytes(b"II")
    (record,) = slide_records(str(tmp_path / "...svs"), None)
    assert record.slide_id == "...svs"


@pytest.mark.parametrize("slide_id", ["../../etc", "a/b", "..", "a\\b"])
def test_slide_ids_with_folders_in_them_are_refused(tmp_path, slide_id):
    (tmp_path / "c.csv").write_text(f"slide_id,path\n{slide_id},a.svs\n")
    with pytest.raises(ValueError, match="must be a name without slashes"):
        slide_records(str(tmp_path / "c.csv"), None)


def test_split_belongs_to_a_cohort(tmp_path):
    (tmp_path / "a.svs").write_bytes(b"II")
    with pytest.raises(UsageError, match="--split needs --slides to be a cohort CSV"):
        slide_records(str(tmp_path), "test")


# Metrics of a prediction


def record(name, label):
    return SlideRecord(name, pathlib.Path(name), label, name)


@pytest.mark.parametrize(
    "labels, message",
    [
        ((None, None, None), "no slide has a label"),
        (("srcc", None, "normal"), "b have no label"),
        (("srcc", "srcc", "srcc"), "no negative slide: its labels are srcc"),
        (("SRCC", "x", "x"), "no positive slide: its labels are SRCC .*'srcc' counts as positive"),
    ],
)
def test_no_metrics_without_labels_of_both_classes_and_why(labels, message):
    records = [record(name, label) for name, label in zip("abc", labels)]
    merit = measure(records, [0.1, 0.2, 0.3], positive="srcc", name="m", seed=0)
    assert merit.summary == merit.curves == {}
    (remark,) = merit.remarks
    assert remark.startswith("No metrics: ") and re.search(message, remark)


def test_metrics_are_over_the_slides_that_were_scored():
    records = [record(name, label) for name, label in zip("abcd", ("srcc", "normal", None, "normal"))]
    merit = measure(records, [0.9, 0.2, None, 0.3], positive="srcc", name="m", seed=0)
    assert merit.summary["ROC AUC"]["slide"].value == 1.0 and list(merit.curves) == ["m"]
