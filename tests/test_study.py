"""The pieces of a study of slide classification: preparing its slides, its steps, and tiles that cannot be read."""

import jax
import numpy as np
import optax
import pytest

from data_pipelines.annotations import write_asap_xml
from data_pipelines.cohort import CohortError, SlideRecord
from data_pipelines.slides import SlideError
from data_pipelines.stream import FAILED, READ
from data_pipelines.tiles import Grid
from experiments.run.slides import NO_TISSUE, NOT_ANNOTATED, prepare_slides
from experiments.run.study import Steps, Study
from srcc_jax.methods.slide_classification import Config
from srcc_jax.parallel import make_mesh
from tests.programs import square, tissue
from tests.tiff_files import write_tiff

GRID = Grid(tile=32, stride=16, mpp=1.0)


def records(folder):
    """Five slides: two sound, of which "a" is annotated; without tissue; empty; annotated on glass alone."""
    for name in ("a", "b", "glass"):
        write_tiff(folder / f"{name}.tiff", tissue(seed=ord(name[0])), mpp=0.5)
    write_tiff(folder / "white.tiff", np.full((256, 256, 3), 255, np.uint8), mpp=0.5)
    (folder / "empty.tiff").write_bytes(b"")
    write_asap_xml(folder / "a.xml", [square(100, 100)])
    write_asap_xml(folder / "glass.xml", [square(0, 0, 4.0)])
    annotations = {"a": folder / "a.xml", "glass": folder / "glass.xml"}
    names = ("a", "white", "b", "empty", "glass")
    return [SlideRecord(n, folder / f"{n}.tiff", "srcc", n, annotation=annotations.get(n)) for n in names]


def prepare(folder, rows, **options):
    settings = {
        "min_tissue": 0.5,
        "mpp_override": None,
        "cache": folder / "tiles",
        "annotated": {"a", "glass"},
        "min_annotated": 0.0,
    }
    return prepare_slides(rows, GRID, **{**settings, **options})


def test_slides_that_cannot_be_used_are_listed_and_the_others_go_on(tmp_path):
    found = prepare(tmp_path, records(tmp_path))
    assert [record.slide_id for record in found.records] == ["a", "b"]
    failed = {record.slide_id: reason for record, reason in found.failed}
    assert failed["white"] == NO_TISSUE and failed["glass"] == NOT_ANNOTATED and "0 bytes" in failed["empty"]
    for number, name in enumerate("ab"):
        rows = found.rows(number)
        assert set(found.tiles.slide_id[rows]) == {name} and (found.slide[rows] == number).all()
    assert (found.tiles.annotated[found.rows(0)] > 0).any() and not found.tiles.annotated[found.rows(1)].any()


def test_tiles_are_kept_for_the_next_start(tmp_path, monkeypatch):
    rows = records(tmp_path)
    before = prepare(tmp_path, rows)
    for name in ("a", "b"):
        (tmp_path / f"{name}.tiff").unlink()
    after = prepare(tmp_path, rows)
    for name in ("x", "y", "tissue", "annotated"):
        np.testing.assert_array_equal(getattr(after.tiles, name), getattr(before.tiles, name))


def test_no_usable_slide_at_all_is_an_error_with_the_first_reason(tmp_path):
    rows = [row for row in records(tmp_path) if row.slide_id in ("white", "empty")]
    with pytest.raises(SlideError, match="none of 2 slides can be used; the first: white: no tile"):
        prepare(tmp_path, rows)


def test_a_larger_share_of_annotation_can_be_asked_for(tmp_path):
    """The square of 60 px covers most of a tile of 64 level-0 px, but never all of it."""
    rows = records(tmp_path)
    assert "a" in [record.slide_id for record in prepare(tmp_path, rows, min_annotated=0.5).records]
    found = prepare(tmp_path, rows, min_annotated=0.95, cache=tmp_path / "other")
    assert [record.slide_id for record in found.records] == ["b"]


def test_the_last_layer_trains_first_and_adam_begins_anew_when_the_rest_is_thawed():
    mesh, adam = make_mesh(jax.devices()[:1]), optax.adam(0.1)
    steps = Steps(2, adam, adam, "head", "everything")
    state = steps.begin({"params": {"w": np.ones(3, np.float32)}}, 0, mesh)
    used = state.replace(opt=jax.tree.map(lambda leaf: leaf + 1, state.opt))
    chosen = {}
    for step in range(5):
        name, after = steps.at(used.replace(step=jax.numpy.int32(step)), mesh)
        fresh = all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), after.opt, state.opt)))
        chosen[step] = (name, fresh)
    assert chosen == dict.fromkeys((0, 1), ("head", False)) | {2: ("everything", True)} | dict.fromkeys(
        (3, 4), ("everything", False)
    )
    without = Steps(0, adam, adam, "head", "everything")
    name, after = without.at(used, mesh)
    assert name == "everything" and after is used  # there is nothing to thaw


@pytest.mark.parametrize(
    "selection, annotated, chosen",
    [
        ("auto", True, {"fs": True, "ws": False}),
        ("auto", False, {"fs": False, "ws": False}),
        ("tile", True, {"fs": True, "ws": True}),
        ("slide", True, {"fs": False, "ws": False}),
    ],
)
def test_what_a_stage_is_selected_by(tmp_path, selection, annotated, chosen):
    study = bare_study(tmp_path, annotated={"a"} if annotated else set())
    study.config = Config(selection=selection)
    assert {stage: study.selects_by_tiles(stage) for stage in ("fs", "ws")} == chosen


def test_selection_by_tiles_needs_annotated_ones(tmp_path):
    study = bare_study(tmp_path, annotated=set())
    study.config = Config(selection="tile")
    with pytest.raises(CohortError, match=r"--selection=tile: no tile .* `annotation` .*--selection=slide"):
        study.selects_by_tiles("ws")


def bare_study(folder, **options):
    """Slides, and no network: for methods that need none."""
    study = Study.__new__(Study)
    study.train = study.validation = prepare(folder, records(folder), **{"min_annotated": None, **options})
    study._unreadable = set()
    return study


def test_unreadable_tiles_are_told_once_a_slide_and_a_batch_of_them_ends_the_run(tmp_path, capsys):
    study = bare_study(tmp_path)
    first, second = study.train.rows(0)[0], study.train.rows(1)[0]

    def check(rows, status):
        study._check_read({"row": np.array(rows), "status": np.array(status)})
        return capsys.readouterr().err

    assert check([first, second], [READ, READ]) == ""
    assert check([first, second], [READ, FAILED]) == "train: tiles of b cannot be read: they count for nothing\n"
    assert check([first, second], [READ, FAILED]) == ""
    with pytest.raises(SlideError, match=r"no tile of a batch could be read \(a, b\)"):
        check([first, second], [FAILED, FAILED])
