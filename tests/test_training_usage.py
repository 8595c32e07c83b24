"""What a user can do wrong with slide_classification, and one clear line for each."""

import contextlib
import csv

import pytest

from data_pipelines.annotations import write_asap_xml
from data_pipelines.tiles import Grid
from experiments.run.program import UsageError
from experiments.run.slides import slide_records
from tests import programs
from tests.programs import one_line, square, tissue
from tests.tiff_files import write_tiff


@pytest.fixture(scope="module")
def training():
    with programs.imported("slide_classification") as module:
        yield module


@pytest.fixture
def cohort(tmp_path):
    """A function that writes a cohort of two positives and two negatives per split: columns and rows may be changed."""

    def write(change=lambda row: row, name="cohort.csv"):
        rows = []
        for number, split in enumerate(("train", "validation")):
            for n in range(4):
                slide_id, label = f"{split}_{n}", "srcc" if n < 2 else "normal"
                if not (tmp_path / f"{slide_id}.tiff").exists():
                    write_tiff(tmp_path / f"{slide_id}.tiff", tissue(seed=10 * number + n), mpp=0.5)
                    write_asap_xml(tmp_path / f"{slide_id}.xml", [square(100, 100)])
                annotation = f"{slide_id}.xml" if label == "srcc" else ""
                rows.append(
                    {"slide_id": slide_id, "path": f"{slide_id}.tiff", "label": label, "split": split}
                    | {"annotation": annotation}
                )
        rows = [row for row in map(change, rows) if row]
        with open(tmp_path / name, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        return tmp_path / name

    return write


def train(module, table, tmp_path, **values):
    settings = {"backbone": "tiny", "tile": 32, "stride": 16, "batch": 8, "buffer": 8, **values}
    return programs.start(module, **{"cohort": table, "workdir": tmp_path / "run", **settings})


def test_a_batch_that_no_number_of_devices_divides_is_refused_with_the_cure(training, cohort, tmp_path):
    message = one_line(train(training, cohort(), tmp_path, batch=30, buffer=30))
    assert "--batch=30 cannot be split evenly over 4 devices: give --batch=32" in message
    message = one_line(train(training, cohort(), tmp_path, batch=9, buffer=9, processes=2))
    assert "--batch=9 must be a multiple of --processes=2" in message
    message = one_line(train(training, cohort(), tmp_path, processes=2))
    assert "--processes=2 needs --coordinator=<host:port of process 0>" in message
    assert not (tmp_path / "run").exists()


def test_files_that_are_not_there_are_named(training, cohort, tmp_path):
    assert "none.csv: No such file" in one_line(train(training, tmp_path / "none.csv", tmp_path))
    assert "none.pth" in one_line(train(training, cohort(), tmp_path, pretrained=tmp_path / "none.pth"))
    assert "no finished model" in one_line(train(training, cohort(), tmp_path, start_from=tmp_path / "none"))
    assert not (tmp_path / "run").exists(), "a mistake in the flags must not claim the work directory"


def test_nonsense_in_flags_is_one_line(training, cohort, tmp_path):
    message = one_line(train(training, cohort(), tmp_path, seed=-1, stride=-2))
    assert message.strip() == "--stride=-2 must be at least 1; --seed=-1 must be at least 0"


def test_one_class_is_refused_with_the_labels_there_are(training, cohort, tmp_path):
    message = one_line(train(training, cohort(), tmp_path, positive="SRCC"))
    assert "the train split has no positive slide" in message and "srcc (2), normal (2)" in message


def test_positives_without_annotation_are_named_with_the_cure(training, cohort, tmp_path):
    table = cohort(lambda row: row | ({"annotation": ""} if row["slide_id"] == "train_1" else {}))
    for mode in ("fs", "ws", "fs_ws"):
        message = one_line(train(training, table, tmp_path, mode=mode))
        assert "1 positive slides of the train split have no annotation: train_1" in message
        assert "--noannotations" in message
    assert not (tmp_path / "run").exists()


def test_annotations_of_other_splits_and_of_negatives_are_not_asked_for(training, cohort, tmp_path):
    """Only validation lacks annotations: the run gets as far as its slides, of which the validation split has none sound."""
    table = cohort(lambda row: row | ({"annotation": ""} if row["split"] == "validation" else {}))
    for path in tmp_path.glob("validation_*.tiff"):
        path.write_bytes(b"")
    message = one_line(train(training, table, tmp_path))
    assert "none of 4 slides can be used" in message and "validation_0" in message


def test_a_positive_whose_annotation_meets_no_tile_is_left_out_and_said(training, cohort, tmp_path):
    table = cohort()
    write_asap_xml(tmp_path / "train_0.xml", [square(0, 0, 4.0)])  # on glass
    write_asap_xml(tmp_path / "train_1.xml", [square(9000, 0)])  # beside the slide
    outcome = train(training, table, tmp_path)
    assert "what can be used of the train split has no positive slide" in one_line(outcome)
    assert "left out of train: train_0: none of its tiles with tissue is annotated" in outcome.out
    assert "--noannotations" in outcome.out and "left out of train: train_1: " in outcome.out


def test_start_from_and_pretrained_exclude_each_other(training, cohort, tmp_path):
    finished = programs.save_model(tmp_path / "finished", grid=Grid(tile=32, stride=16, mpp=1.0))
    weights = finished / "weights.npz"
    message = one_line(train(training, cohort(), tmp_path, start_from=finished, pretrained=weights))
    assert "no --pretrained" in message
    message = one_line(train(training, cohort(), tmp_path, start_from=finished, backbone="b0"))
    assert "--backbone=tiny" in message


def test_weights_of_another_backbone_are_refused(training, cohort, shared_data, tmp_path):
    weights = shared_data / "weights" / "efficientnet-lite1-77cc7160.pth"
    message = one_line(train(training, cohort(), tmp_path, pretrained=weights, backbone="lite0"))
    assert "efficientnet-lite1-77cc7160.pth does not fit --backbone=lite0: 235 of 245 weights unmatched" in message
    assert len(message) < 600
    assert not (tmp_path / "run").exists()


def test_slides_that_come_or_go_once_training_began_are_refused(training, cohort, tmp_path):
    """Rows of tiles would mean other tiles. Before the first step the table is simply written again."""
    table = cohort()
    (tmp_path / "train_3.tiff").rename(tmp_path / "kept")
    (tmp_path / "train_3.tiff").write_bytes(b"")
    with stopped_before_training(training):
        assert "train_3" in train(training, table, tmp_path).out
        (tmp_path / "kept").rename(tmp_path / "train_3.tiff")
        assert "train_3" not in train(training, table, tmp_path).out
        (tmp_path / "run" / "metrics.jsonl").write_text("{}\n")
        (tmp_path / "run" / "tiles" / "train_2.npz").unlink()
        (tmp_path / "train_2.tiff").write_bytes(b"")
        message = one_line(train(training, table, tmp_path))
    assert "train_2 could not be used" in message and "--workdir" in message


@contextlib.contextmanager
def stopped_before_training(module):
    """Ends a start where training would begin."""

    def stop(*_, **__):
        raise UsageError("far enough")

    study, module.Study = module.Study, stop
    try:
        yield
    finally:
        module.Study = study


def test_splits_made_here_are_left_where_prediction_finds_them(training, cohort, tmp_path):
    table = cohort(lambda row: {name: value for name, value in row.items() if name != "split"})
    with stopped_before_training(training):
        outcome = train(training, table, tmp_path)
    assert "splits by seed 0: train 4 patients, validation 2 patients, test 2 patients" in outcome.out
    records = slide_records(str(tmp_path / "run" / "cohort.csv"), "test")
    assert len(records) == 2 and all(record.path.exists() for record in records)
    with pytest.raises(UsageError, match=r"no slide in the split 'test'.*--workdir"):
        slide_records(str(table), "test")
