"""extract_features: its numbers are the network's, its files those of the tools, and it ends what was killed, divided or damaged."""

import csv
import signal
import time

import h5py
import jax
import numpy as np
import pytest

from data_pipelines.cohort import SlideRecord
from data_pipelines.feature_files import CHUNK_ROWS, read_tiles
from data_pipelines.prepare import prepare_slide
from data_pipelines.tiles import Grid
from experiments.run import model as stored
from experiments.run.feature_outputs import FeatureSettings, FeatureTask
from experiments.run.journal import Journal
from experiments.run.model import Model, Network
from experiments.run.scoring import Scored, probability
from experiments.run.slide_result import TIMES
from experiments.run.slide_state import Place
from experiments.run.task import Begun
from srcc_jax.models.architecture import normalize
from srcc_jax.models.zoo import build
from tests import prediction_process, programs, small_networks
from tests.programs import one_line, tissue
from tests.tiff_files import overwrite, tile_bytes, write_tiff

GRID = Grid(tile=32, stride=16, mpp=1.0)
BASE = "10x_32px_16px_overlap"
KILLS = 2
PATIENCE_SECONDS = 300.0


@pytest.fixture(scope="module")
def extracting(tmp_path_factory):
    """The program; what it compiles is kept between its starts."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    with programs.imported("extract_features") as module:
        yield module
    jax.config.update("jax_compilation_cache_dir", None)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """An imported network, a model; slides a and b of 1 µm per pixel, so that nothing is resampled."""
    root = tmp_path_factory.mktemp("root")
    (root / "slides").mkdir()
    for n, name in enumerate("ab"):
        write_tiff(root / "slides" / f"{name}.tiff", tissue(512, seed=n), mpp=1.0, levels=4)
    net = small_networks.architecture("resnet18")
    stored.save(Network(net, small_networks.variables(net), {"name": "small"}), root / "net")
    programs.save_model(root / "model", grid=GRID)
    return root


@pytest.fixture
def extract(extracting, root, tmp_path):
    """extract(name=value): a start with these flags over the two slides."""

    def start(**values):
        defaults = {"network": root / "net", "slides": root / "slides", "out": tmp_path / "out"}
        return programs.start(extracting, **{**defaults, "mpp": 1.0, "tile": 32, "stride": 16, **values})

    return start


def rows_of(out):
    with open(out / "slides.csv", newline="", encoding="utf-8") as file:
        rows = [{name: cell for name, cell in row.items() if name not in TIMES} for row in csv.DictReader(file)]
    return {row["slide_id"]: row for row in rows}


def files_of(out):
    """Path below `out` -> datasets by name, of every HDF5 file."""
    found = {}
    for path in sorted(out.rglob("*.h5")):
        tiles = read_tiles(path)
        found[str(path.relative_to(out))] = {"coords": tiles.coords, **tiles.columns}
    return found


def assert_same(found, wanted):
    assert found.keys() == wanted.keys() and found
    for path, columns in wanted.items():
        assert found[path].keys() == columns.keys()
        for name, values in columns.items():
            np.testing.assert_array_equal(found[path][name], values, err_msg=f"{path} {name}")
            assert found[path][name].dtype == values.dtype


def one_by_one(folder, slide, grid=GRID):
    """The table of a slide's tiles, and the outputs of the network on each, read and computed alone."""
    network = stored.load(folder)
    apply = jax.jit(
        lambda tile: build(network.architecture).apply(
            network.variables, normalize(tile, network.architecture), train=False
        )
    )
    prepared = prepare_slide(SlideRecord("s", slide, None, "s"), grid, min_tissue=0.5)
    tiles, outputs = prepared.tiles, []
    for x, y in zip(tiles.x, tiles.y):
        outputs.append(apply(prepared.slide.read(x, y, grid.tile, grid.tile, grid.mpp)[None]))
    prepared.slide.close()
    return tiles, {name: np.concatenate([np.asarray(o[name]) for o in outputs]) for name in outputs[0]}


@pytest.fixture(scope="module")
def wanted(root):
    return one_by_one(root / "net", root / "slides" / "a.tiff")


# What is in the files


def test_features_are_those_of_the_network_on_each_tile_in_the_order_of_the_table(extract, wanted, tmp_path):
    outcome = extract()
    assert outcome.status == 0 and "the device waited" in outcome.out
    tiles, outputs = wanted
    found = read_tiles(tmp_path / "out" / BASE / "features_resnet18" / "a.h5")
    assert len(tiles) > 2 * CHUNK_ROWS  # many blocks, whose order is another than that of the table
    np.testing.assert_array_equal(found.coords, np.stack([tiles.x, tiles.y], 1))
    assert outputs["features"].std(0).max() > 1e-3
    np.testing.assert_allclose(found.columns["features"], outputs["features"], rtol=1e-5, atol=1e-5)
    assert found.columns["features"].dtype == np.float32 and set(found.columns) == {"features"}
    assert not list((tmp_path / "out" / "state" / "a").glob("*.rows")) and not list(tmp_path.rglob("scores.npz"))


def test_poolings(extract, root, wanted, tmp_path):
    _, outputs = wanted
    mean, largest = outputs["features"], outputs["maps"].max((1, 2))
    expected = {
        "max": largest,
        "mean_max": np.concatenate([mean, largest], 1),
        "stage2": outputs["stage2"].mean((1, 2)),
    }
    for pooling, features in expected.items():
        outcome = extract(pooling=pooling, slides=root / "slides" / "a.tiff")
        assert outcome.status == 0, outcome
        path = tmp_path / "out" / BASE / f"features_resnet18_{pooling}" / "a.h5"
        np.testing.assert_allclose(read_tiles(path).columns["features"], features, rtol=1e-5, atol=1e-5)


def test_clam_reads_its_bags(extract, wanted, tmp_path):
    """As CLAM's Whole_Slide_Bag_FP reads patches/ and Generic_MIL_Dataset h5_files/."""
    assert extract(layout="clam").status == 0
    for slide in "ab":
        with h5py.File(tmp_path / "out" / "h5_files" / f"{slide}.h5", "r") as file:
            features, coords = file["features"][:], file["coords"][:]
            assert file.attrs["pooling"] == "mean" and file.attrs["network"] == "resnet18"
            assert (file.attrs["tile"], file.attrs["stride"], file.attrs["mpp"]) == (32, 16, 1.0)
        with h5py.File(tmp_path / "out" / "patches" / f"{slide}.h5", "r") as file:
            assert (file["coords"].attrs["patch_level"], file["coords"].attrs["patch_size"]) == (0, 32)
            np.testing.assert_array_equal(file["coords"][:], coords)
        assert features.shape == (len(coords), 64) and features.dtype == np.float32
    assert_same(
        {"a": {"coords": read_tiles(tmp_path / "out" / "h5_files" / "a.h5").coords}},
        {"a": {"coords": np.stack([wanted[0].x, wanted[0].y], 1).astype(np.int64)}},
    )


def test_trident_reads_its_bags_in_half_precision(extract, wanted, tmp_path):
    assert extract(dtype="float16", encoder="mine_v1").status == 0
    with h5py.File(tmp_path / "out" / BASE / "features_mine_v1" / "a.h5", "r") as file:
        features = file["features"][:]
        assert file["features"].attrs["encoder"] == "mine_v1" and file["coords"].attrs["patch_size_level0"] == 32
    assert features.dtype == np.float16
    np.testing.assert_allclose(features, wanted[1]["features"], rtol=1e-3, atol=1e-3)


def test_a_finished_model_brings_its_grid_and_its_scores(extracting, root, tmp_path):
    values = {"network": root / "model", "slides": root / "slides" / "a.tiff", "out": tmp_path / "out"}
    assert programs.start(extracting, **values, scores="true").status == 0
    tiles, outputs = one_by_one(root / "model", root / "slides" / "a.tiff")
    found = read_tiles(tmp_path / "out" / BASE / "features_tiny" / "a.h5")
    np.testing.assert_array_equal(found.coords, np.stack([tiles.x, tiles.y], 1))
    expected = probability(outputs["logits"][:, :1])
    np.testing.assert_allclose(found.columns["probability"], expected, rtol=1e-5, atol=1e-5)
    assert float(rows_of(tmp_path / "out")["a"]["probability"]) == pytest.approx(expected.max(), abs=1e-5)


def test_threads_leave_no_trace_in_the_files(extract, tmp_path, monkeypatch):
    files = []
    for threads in (1, 3):
        monkeypatch.chdir(tmp_path)
        extract(threads=threads, layout="clam", out="out", save_seconds=0)
        files.append([path.read_bytes() for path in sorted((tmp_path / "out").rglob("*.h5"))])
        (tmp_path / "out").rename(tmp_path / f"out{threads}")
    assert len(files[0]) == 4 and files[0] == files[1]


# Starts after the first, damage, shards


def test_finished_slides_are_not_done_again_unless_what_they_rest_on_changes(extract, tmp_path):
    extract()
    before = {path: path.stat().st_ino for path in (tmp_path / "out").rglob("*.h5")}
    outcome = extract()
    assert outcome.status == 0 and "(0 of them now), 0 tiles" in outcome.out
    assert {path: path.stat().st_ino for path in (tmp_path / "out").rglob("*.h5")} == before
    again = extract(pooling="max")
    assert "done again, because of another pooling (mean, now max)" in again.out and "(2 of them now)" in again.out


def test_damage_costs_the_tiles_and_a_broken_slide_is_a_row(extract, root, tmp_path):
    (tmp_path / "slides").mkdir()
    path = write_tiff(tmp_path / "slides" / "b.tiff", tissue(512), mpp=1.0, levels=5, compression="jpeg")
    whole = extract(slides=tmp_path / "slides", out=tmp_path / "whole", stride=32)
    position, length = tile_bytes(path)[27]
    overwrite(path, position, bytes(length))
    (tmp_path / "slides" / "broken.svs").write_bytes(b"II*\0")
    outcome = extract(slides=tmp_path / "slides", stride=32)
    rows = rows_of(tmp_path / "out")
    assert (whole.status, outcome.status) == (0, 1) and "failed: broken: " in outcome.err
    assert rows["broken"]["status"] == "failed" and "broken.svs" in rows["broken"]["reason"]
    assert (rows["b"]["status"], rows["b"]["unreadable"], rows["b"]["tiles"]) == ("done", "4", "144")
    assert "4 of 144 tiles could not be read" in rows["b"]["reason"]
    name = "10x_32px_0px_overlap/features_resnet18/b.h5"
    found, sound = files_of(tmp_path / "out"), files_of(tmp_path / "whole")
    assert len(found) == 2 and len(found[name]["coords"]) == 140
    places = {tuple(place): row for row, place in enumerate(sound[name]["coords"].tolist())}
    kept = [places[tuple(place)] for place in found[name]["coords"].tolist()]
    np.testing.assert_array_equal(found[name]["features"], sound[name]["features"][kept])
    assert kept == sorted(kept)


def test_shards_and_claims_make_what_one_process_makes(extract, tmp_path):
    extract(out=tmp_path / "whole")
    assert extract(claim="true", out=tmp_path / "claimed").status == 0
    assert_same(files_of(tmp_path / "claimed"), files_of(tmp_path / "whole"))
    first = extract(shard="1/2")
    assert first.status == 0 and "1 slides of other shards are not finished" in first.out
    assert not (tmp_path / "out" / "slides.csv").exists()
    assert extract(shard="2/2").status == 0
    assert rows_of(tmp_path / "out") == rows_of(tmp_path / "whole")
    assert_same(files_of(tmp_path / "out"), files_of(tmp_path / "whole"))


def test_killed_inside_a_slide_it_goes_on_to_the_same_datasets(tmp_path):
    """Slides that are resampled, of many blocks, in processes that die at the journals they wrote."""
    (tmp_path / "slides").mkdir()
    for n in range(2):
        image = tissue(1024, seed=n)
        write_tiff(tmp_path / "slides" / f"s{n}.tiff", image, mpp=0.7, levels=5, compression="jpeg")
    programs.save_model(tmp_path / "model", grid=GRID)

    def start(out, **values):
        places = {"network": tmp_path / "model", "slides": tmp_path / "slides", "out": tmp_path / out}
        return prediction_process.start(
            tmp_path / "log",
            "extract_features",
            **places,
            compilation_cache=tmp_path / "compiled",
            save_seconds=0,
            **values,
        )

    def half_done():
        """Slides whose journal says that some of their tiles are known: path -> when it was saved."""
        found = {}
        for path in (tmp_path / "out").glob("state/*/scores.npz"):
            journal = Journal.load(path)
            if journal is not None and 0 < journal.seen.sum() < len(journal.seen):
                found[path] = path.stat().st_mtime_ns
        return found

    whole = start("whole", scores="true")
    whole.join(PATIENCE_SECONDS)
    assert whole.exitcode == 0, (tmp_path / "log").read_text()
    for _ in range(KILLS):
        before, process, deadline = half_done(), start("out", scores="true"), time.monotonic() + PATIENCE_SECONDS
        while process.is_alive() and half_done().items() <= before.items() and time.monotonic() < deadline:
            time.sleep(0.001)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, (tmp_path / "log").read_text()
    process = start("out", scores="true")
    process.join(PATIENCE_SECONDS)
    log = (tmp_path / "log").read_text()
    assert process.exitcode == 0 and log.count(" goes on after ") >= KILLS, log
    assert_same(files_of(tmp_path / "out"), files_of(tmp_path / "whole"))
    assert rows_of(tmp_path / "out") == rows_of(tmp_path / "whole")
    assert not list((tmp_path / "out").rglob("*.rows")) and not list((tmp_path / "out").rglob(".*.h5"))


def test_a_slide_that_another_process_took_over_and_finished_is_let_go(root, tmp_path):
    """After a lease was lost: no error, and no journal that speaks of rows which are gone. A slide begun anew has none either."""
    prepared = prepare_slide(SlideRecord("a", root / "slides" / "a.tiff", None, "a"), GRID, min_tissue=0.5)
    settings = FeatureSettings(
        grid=GRID,
        min_tissue=0.5,
        mpp_override=None,
        model="m",
        pooling="mean",
        dtype="float32",
        layout="clam",
        encoder="e",
        scores=False,
    )
    task, place = FeatureTask(settings, tmp_path, "net", 4), Place(tmp_path, "a")
    place.folder.mkdir(parents=True)
    place.scores.write_bytes(b"of another network")
    collector = task.collector(Begun(place, {}, prepared, None), 0)
    assert not place.scores.exists()
    task.rows(place, len(prepared.tiles)).remove()
    rows = np.concatenate(prepared.tiles.blocks(8))
    features = np.ones((len(rows), 4), np.float32)
    assert collector.add(Scored(rows, {"features": features})) == len(rows) and collector.complete
    collector.save(collector.journal({}), place)
    assert not list(place.folder.iterdir())
    prepared.slide.close()


# Mistakes


def test_mistakes_are_one_line_each(extract, extracting, root, tmp_path):
    assert "--pooling=stage9: resnet18 has mean, max, mean_max, maps, stage1, stage2, stage3, stage4, stem: choose" in (
        one_line(extract(pooling="stage9"))
    )
    assert "net holds imported weights, which judge no slides" in one_line(extract(scores="true"))
    assert "--stride=33 is larger than the tile of 32 px" in one_line(extract(stride=33))
    assert "--encoder=a/b: it becomes a part of names" in one_line(extract(encoder="a/b"))
    assert "nothing holds no finished model" in one_line(extract(network=tmp_path / "nothing"))
    values = {"network": root / "net", "slides": root / "slides", "out": tmp_path / "out"}
    assert "--mpp is needed: the weights in " in one_line(programs.start(extracting, **values))
    assert not (tmp_path / "out").exists()


def test_sides_that_the_network_does_not_take_are_refused(extract, tmp_path):
    net = small_networks.architecture("dla34")
    stored.save(Network(net, small_networks.variables(net), {"name": "dla"}), tmp_path / "dla")
    assert "--tile=48: " in one_line(extract(network=tmp_path / "dla", tile=48))


def test_features_that_half_precision_cannot_hold_end_the_run(extract, root, tmp_path):
    model = Model.load(root / "model")
    variables = jax.tree.map(np.array, dict(model.variables))
    variables["params"]["top"]["norm"]["bias"] += np.float32(1e6)
    stored.save(Network(model.architecture, variables, {"name": "loud"}), tmp_path / "loud")
    outcome = extract(network=tmp_path / "loud", dtype="float16")
    assert "cannot be stored as float16: give --dtype=float32" in one_line(outcome)
    assert extract(network=tmp_path / "loud").status == 0
