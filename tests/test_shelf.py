"""The shelf of open slides: bounded, safe for those who borrow, in one thread and in many."""

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from data_pipelines import readers
from data_pipelines import shelf as shelf_module
from data_pipelines.cohort import SlideRecord
from data_pipelines.shelf import Shelf
from data_pipelines.slides import SlideError
from tests.tiff_files import picture, write_tiff


class Opened:
    """Stands for an open slide; tells the record of all of them when it is closed."""

    def __init__(self, path, record):
        self.path, self.closed, self._record = path, False, record

    def close(self):
        assert not self.closed, f"{self.path} closed twice"
        self.closed = True
        with self._record.lock:
            self._record.open -= 1


class Opener:
    """Takes the place of open_slide: counts what is open, refuses paths in `broken`."""

    def __init__(self):
        self.lock, self.open, self.most, self.times, self.broken = threading.Lock(), 0, 0, {}, set()

    def __call__(self, path, *, mpp_cohort, mpp_override):
        if path in self.broken:
            raise SlideError(f"{path}: broken")
        with self.lock:
            self.open += 1
            self.most = max(self.most, self.open)
            self.times[path.name] = self.times.get(path.name, 0) + 1
        return Opened(path, self)


@pytest.fixture
def opener(monkeypatch):
    opener = Opener()
    monkeypatch.setattr(shelf_module, "open_slide", opener)
    return opener


def records(count):
    return [SlideRecord(f"s{n}", Path(f"s{n}"), None, f"s{n}") for n in range(count)]


def test_the_least_recently_used_is_closed_and_opened_again(opener):
    shelf = Shelf(records(5), limit=2)
    for name in ("s0", "s1", "s0", "s2", "s0", "s1"):  # s2 takes the place of s1, then s1 that of s2
        with shelf.lend(name) as slide:
            assert slide.path.name == name and not slide.closed
    assert opener.times == {"s0": 1, "s1": 2, "s2": 1} and opener.most == 2
    shelf.close()
    assert opener.open == 0


def test_many_slides_need_few_handles(opener):
    shelf = Shelf(records(50), limit=7)
    for _ in range(2):
        for n in range(50):
            with shelf.lend(f"s{n}"):
                pass
    assert opener.most == 7


def test_what_is_lent_out_is_not_closed_and_comes_back_later(opener):
    shelf = Shelf(records(6), limit=1)
    with shelf.lend("s0") as first, shelf.lend("s1") as second:
        for n in range(2, 6):
            with shelf.lend(f"s{n}"):
                assert not first.closed and not second.closed
        with shelf.lend("s0") as again:
            assert again is first
    assert opener.times["s0"] == 1
    with shelf.lend("s5"):
        assert first.closed and second.closed and opener.open == 1


def test_a_slide_that_cannot_be_opened_holds_no_place_and_is_tried_again(opener):
    shelf = Shelf(records(3), limit=1)
    opener.broken.add(Path("s0"))
    for _ in range(2):
        with pytest.raises(SlideError, match="broken"), shelf.lend("s0"):
            pass
    opener.broken.clear()
    with shelf.lend("s0") as slide:
        assert not slide.closed
    with shelf.lend("s1"):
        assert slide.closed


def test_an_error_of_the_borrower_gives_the_slide_back(opener):
    shelf = Shelf(records(2), limit=1)
    with pytest.raises(ZeroDivisionError), shelf.lend("s0") as slide:
        raise ZeroDivisionError
    with shelf.lend("s1"):
        assert slide.closed


def test_threads_never_see_a_closed_slide_and_share_open_ones(opener):
    shelf, threads = Shelf(records(12), limit=4), 8
    gate = threading.Barrier(threads)

    def borrow(seed):
        rng = random.Random(seed)
        gate.wait()
        for _ in range(150):
            name = f"s{rng.randrange(12)}"
            with shelf.lend(name) as slide:
                assert slide.path.name == name and not slide.closed

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(borrow, range(threads)))
    assert opener.most <= 4 + threads
    shelf.close()
    assert opener.open == 0


def test_slides_are_opened_side_by_side_but_each_once(opener, monkeypatch):
    both = threading.Barrier(2, timeout=10)
    opened = []

    def slow(path, **scale):
        both.wait()  # passes only if s0 and s1 are being opened at the same time
        opened.append(path.name)
        return Opened(path, opener)

    monkeypatch.setattr(shelf_module, "open_slide", slow)
    shelf = Shelf(records(2))

    def borrow(name):
        with shelf.lend(name) as slide:
            return slide

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(borrow, ["s0", "s0", "s1", "s1"]))
    assert sorted(opened) == ["s0", "s1"] and found[0] is found[1] and found[2] is found[3]


@pytest.mark.skipif(readers.CuImage is None, reason="cuCIM is not installed")
def test_cucim_never_opens_two_slides_at_once(tmp_path, monkeypatch):
    """Two threads that open the first two slides of a process made cuCIM crash it."""
    opening, most, real = [], [], readers.CuImage

    def watched(path):
        opening.append(path)
        most.append(len(opening))
        time.sleep(0.02)
        image = real(path)
        opening.remove(path)
        return image

    monkeypatch.setattr(readers, "CuImage", watched)
    rows = []
    for n in range(4):
        path = write_tiff(tmp_path / f"{n}.tiff", picture(96, 64), compression="jpeg")
        rows.append(SlideRecord(f"s{n}", path, None, f"s{n}"))
    shelf, both = Shelf(rows), threading.Barrier(4)

    def borrow(row):
        both.wait()
        with shelf.lend(row.slide_id) as slide:
            return slide.backend

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(borrow, rows)) == ["cucim"] * 4
    assert len(most) >= 4 and max(most) == 1
    shelf.close()


def test_real_slides_keep_their_table_and_override_scales(tmp_path):
    image = picture(96, 64)
    with_mpp, without = (
        write_tiff(tmp_path / "a.tiff", image, mpp=0.25),
        write_tiff(tmp_path / "b.tiff", image, mpp=None),
    )
    rows = [
        SlideRecord("a", with_mpp, None, "a", mpp=0.5),
        SlideRecord("b", without, None, "b", mpp=0.4),
        SlideRecord("c", without, None, "c"),
    ]
    shelf = Shelf(rows, mpp_override=1.0, limit=1)
    found = {}
    for name in "abc":
        with shelf.lend(name) as slide:
            found[name] = (slide.mpp, slide.mpp_source)
            assert slide.read(0, 0, 8, 8, slide.mpp).shape == (8, 8, 3)
    assert found == {"a": (pytest.approx(0.25), "file"), "b": (0.4, "cohort"), "c": (1.0, "flag")}
    shelf.close()
