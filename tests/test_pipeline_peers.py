"""Handing tiles to other pipelines, reading them there, and measuring whole processes; no torch is needed."""

import json
import pathlib
import sys

import numpy as np
import openslide
import pytest

from data_pipelines.tiles import Grid, tile_slide
from experiments.run.benchmarks import pipeline_torch
from experiments.run.benchmarks.pipeline_peers import (
    Measured,
    check_same_tiles,
    fastest,
    hand_over,
    run_process,
    tuned_peers,
)
from experiments.run.program import UsageError

GRID = Grid(tile=32, stride=16, mpp=1.0)


@pytest.fixture
def tiles():
    """5 × 9 tiles of a slide with two pixels for one of the model's."""
    tissue = np.ones((20, 12), bool)
    return tile_slide(
        "s", width=200, height=330, slide_mpp=0.5, grid=GRID, tissue=tissue, mask_downsample=17, min_tissue=0
    )


def test_tiles_come_over_as_they_are(tiles, tmp_path):
    hand_over(tiles, tmp_path / "tiles.csv")
    found = pipeline_torch.read_tiles(tmp_path / "tiles.csv")
    assert {name: list(getattr(tiles, name)) for name in found} == found and len(found["u"]) == 45


def test_results_of_all_tiles_in_any_order_pass_and_others_do_not(tiles, tmp_path):
    pace, out = pipeline_torch.Pace(), tmp_path / "out.csv"
    for _ in range(2):
        pace.batch(3)
    columns = {"x": tiles.x[::-1].tolist(), "y": tiles.y[::-1].tolist()}
    pipeline_torch.write_results(str(out), columns, [0.5] * len(tiles), pace)
    check_same_tiles(out, tiles)
    assert json.loads((tmp_path / "out.json").read_text()) == {"tiles_per_second": pace.rate} and pace.rate > 0
    lines = out.read_text().splitlines()
    for wrong in (lines[:-1], [*lines[:-1], "7,7,0.5"], [*lines[:-1], lines[-1].replace("0.5", "")]):
        out.write_text("\n".join(wrong) + "\n")
        with pytest.raises(UsageError, match="45 tiles"):
            check_same_tiles(out, tiles)


def test_pace_leaves_out_the_first_batch(monkeypatch):
    times = iter([100.0, 101.0, 104.0])
    monkeypatch.setattr(pipeline_torch.time, "perf_counter", lambda: next(times))
    pace = pipeline_torch.Pace()
    for count in (16, 16, 4):
        pace.batch(count)
    assert pace.rate == 20 / 4


@pytest.mark.parametrize("batch", [4, 16])
def test_batches_hold_neighbours_and_every_tile_once(tiles, batch):
    places = {"u": tiles.u.tolist(), "v": tiles.v.tolist()}
    batches = pipeline_torch.batches_of(places, stride=GRID.stride, batch=batch)
    assert sorted(row for rows in batches for row in rows) == list(range(len(tiles)))
    assert all(len(rows) == batch for rows in batches[:-1])


def test_windows_are_the_same_pixels_as_single_reads(shared_data):
    path = str(shared_data / "slides" / "P2_0039_section1_x2.tiff")
    places = {"u": [0, 112, 112, 3000], "v": [448, 448, 560, 560]}
    places |= {"x": [2 * u for u in places["u"]], "y": [2 * v for v in places["v"]]}
    job = {"slide": path, "tile": 224, "batch": 4, "mpp": 1.0, "slide_mpp": 0.5}
    windows = pipeline_torch.Windows(job, places)
    with openslide.OpenSlide(path) as slide:
        singly = [
            np.asarray(slide.read_region(at, 1, (224, 224)).convert("RGB")) for at in zip(places["x"], places["y"])
        ]
    for rows in ([0, 1, 2], [0, 3]):  # one region, and one too large for what is wanted of it
        np.testing.assert_array_equal(windows(rows)[: len(rows)], [singly[row] for row in rows])
        assert not windows(rows)[len(rows) :].any()


def test_a_process_is_measured_whole_and_a_failing_one_says_why():
    seconds, usage = run_process([sys.executable, "-c", "import sys; sys.exit(bytearray(60_000_000)[0])"], {})
    assert seconds > 0 and usage.ru_maxrss > 50_000
    with pytest.raises(UsageError, match="no such thing"):
        run_process([sys.executable, "-c", "raise SystemExit('no such thing')"], {})


def test_the_fastest_options_win():
    rates = {16: 100.0, 32: 120.0, 64: 90.0}
    options = [{"batch": batch} for batch in rates]
    assert fastest(lambda given: Measured(1, 1, 1, rates[given["batch"]]), options) == {"batch": 32}


def test_without_its_environment_tiatoolbox_is_left_out_with_a_line(capsys):
    class NoTrial:
        def torch(self, options):
            return Measured(1, 1, 1, options["batch"])

        def tiatoolbox(self, python, options):
            return Measured(1, 1, 1, options["workers"])

    (peer,) = tuned_peers(NoTrial(), None)
    assert peer.name.startswith("frozen torch (batch 32,") and peer.measure().tiles_per_second == 32
    assert "--tiatoolbox_python" in capsys.readouterr().out
    names = [peer.name for peer in tuned_peers(NoTrial(), "python")]
    assert names[1:] == ["TIAToolbox (batch 16, workers 2, tuned True)", "TIAToolbox as shipped"]


def test_the_torch_side_needs_nothing_of_ours():
    source = pathlib.Path(pipeline_torch.__file__).read_text()
    assert not any(
        f"import {room}" in source or f"from {room}" in source for room in ("experiments", "srcc_jax", "data_pipelines")
    )
