"""Killed anywhere and any number of times, or divided among processes that die: the same bytes as one run that nobody touched."""

import signal
import time

import numpy as np
import pytest

from data_pipelines.tiles import Grid
from tests import prediction_process, programs
from tests.prediction_process import PATIENCE_SECONDS, half_done, results_of, wait_for_changes
from tests.programs import tissue
from tests.tiff_files import overwrite, tile_bytes, write_tiff

KILLS = 10


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A model and slides that are resampled when they are read; one has a damaged tile, one cannot be opened."""
    root = tmp_path_factory.mktemp("killed")
    (root / "slides").mkdir()
    for n in range(6):
        image = tissue(1024, seed=n)
        path = write_tiff(root / "slides" / f"s{n}.tiff", image, mpp=0.7, levels=5, compression="jpeg")
    position, length = tile_bytes(path)[8 * 16 + 8]
    overwrite(path, position, bytes(length))
    (root / "slides" / "broken.svs").write_bytes(b"II*\0")
    programs.save_model(root / "model", grid=Grid(tile=32, stride=16, mpp=1.0))
    return root


@pytest.fixture(scope="module")
def start(root):
    """start(name): a process with its results in the folder of this name."""

    def begin(name, **values):
        places = {"workdir": root / "model", "slides": root / "slides", "out": root / name}
        return prediction_process.start(
            root / f"{name}.log", **places, compilation_cache=root / "compiled", save_seconds=0, **values
        )

    return begin


@pytest.fixture(scope="module")
def undisturbed(root, start):
    process = start("whole")
    process.join(PATIENCE_SECONDS)
    assert process.exitcode == 1, (root / "whole.log").read_text()  # one slide is broken, one has a damaged tile
    return results_of(root / "whole")


def test_killed_ten_times_it_ends_with_the_same_bytes(root, start, undisturbed):
    rng, inside = np.random.default_rng(0), 0
    for _ in range(KILLS):
        process = start("killed")
        wait_for_changes(root / "killed", int(rng.integers(1, 6)), process)
        time.sleep(float(rng.random()) * 0.02)
        assert process.is_alive(), (root / "killed.log").read_text()
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        inside += half_done(root / "killed") > 0
    process = start("killed")
    process.join(PATIENCE_SECONDS)
    log = (root / "killed.log").read_text()
    assert process.exitcode == 1 and inside >= 3 and log.count(" goes on after ") >= 3, log
    assert results_of(root / "killed") == undisturbed
    assert not list(root.glob("killed/state/*/.*"))


def test_four_processes_of_which_one_dies_leave_what_one_leaves(root, start, undisturbed):
    processes = [start("claimed", claim="true", lease_seconds=5) for _ in range(4)]
    wait_for_changes(root / "claimed", 6, processes[0])
    processes[0].kill()
    for process in processes:
        process.join(PATIENCE_SECONDS)
    log = (root / "claimed.log").read_text()
    assert [process.exitcode for process in processes] == [-signal.SIGKILL, 1, 1, 1], log
    assert results_of(root / "claimed") == undisturbed
    assert not list(root.glob("claimed/state/*/claim.*"))
