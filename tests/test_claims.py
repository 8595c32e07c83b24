"""Leases on slides: one owner at a time, the dead are replaced, the living are not, and nothing is left behind."""

import json
import os
import pathlib
import subprocess
import threading
import time

import pytest

from experiments.run import claims as module
from experiments.run.claims import Claims

LEASE = 60.0


class Clock:
    """A clock that a test turns."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def claims(clock):
    with Claims(lease_seconds=LEASE, clock=clock) as mine:
        yield mine


def foreign(folder, number=0, *, host="elsewhere", pid=1, beat=0):
    """A claim of a process on another machine."""
    folder.mkdir(exist_ok=True)
    owner = {"host": host, "pid": pid, "worker": "w", "beat": beat}
    (folder / f"claim.{number}").write_text(json.dumps(owner))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_one_of_many_takes_a_slide_and_gives_it_back(tmp_path, clock):
    with Claims(lease_seconds=LEASE, clock=clock) as first, Claims(lease_seconds=LEASE, clock=clock) as second:
        folder = tmp_path / "slide"
        assert first.take(folder) and not second.take(folder) and not first.take(folder)
        assert first.holds(folder) and not second.holds(folder)
        second.release(folder)
        assert first.holds(folder)
        first.release(folder)
        assert names(folder) == [] and not first.holds(folder)
        assert second.take(folder)
    assert names(folder) == []


def test_many_threads_at_once_find_one_owner(tmp_path):
    found = [Claims(lease_seconds=LEASE) for _ in range(16)]
    start, taken = threading.Barrier(len(found)), []

    def take(claims):
        start.wait()
        taken.append(claims.take(tmp_path / "slide"))

    threads = [threading.Thread(target=take, args=(claims,)) for claims in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(taken) == 1


def test_a_lease_ends_only_when_its_owner_gave_no_sign_for_all_of_it(tmp_path, claims, clock):
    folder = tmp_path / "slide"
    foreign(folder)
    assert not claims.take(folder)
    clock.now += LEASE - 1
    assert not claims.take(folder)
    foreign(folder, beat=1)
    clock.now += LEASE - 1
    assert not claims.take(folder)  # the beat is seen only now
    clock.now += LEASE - 1
    assert not claims.take(folder)
    clock.now += 1
    assert claims.take(folder) and claims.holds(folder) and names(folder) == ["claim.0", "claim.1"]
    (folder / ".0123abcd.claim.0").touch()  # a beat that a kill cut off
    claims.release(folder)
    assert names(folder) == []


def test_an_owner_that_died_on_this_machine_is_replaced_at_once(tmp_path, claims):
    process = subprocess.Popen(["true"])
    process.wait()
    pid = process.pid
    foreign(tmp_path / "dead", host=module.socket.gethostname(), pid=pid)
    foreign(tmp_path / "alive", host=module.socket.gethostname(), pid=os.getpid())
    foreign(tmp_path / "elsewhere", pid=pid)
    assert [claims.take(tmp_path / name) for name in ("dead", "alive", "elsewhere")] == [True, False, False]


def test_an_owner_that_slept_past_its_lease_knows_that_it_lost(tmp_path, claims):
    folder = tmp_path / "slide"
    assert claims.take(folder)
    foreign(folder, number=1)
    assert not claims.holds(folder)
    claims.release(folder)
    assert names(folder) == ["claim.1"]


def test_a_claim_that_was_never_written_runs_out_too(tmp_path, claims, clock):
    folder = tmp_path / "slide"
    folder.mkdir()
    (folder / "claim.0").touch()
    assert not claims.take(folder)
    clock.now += LEASE
    assert claims.take(folder)


def test_claims_are_kept_alive_and_never_made_again(tmp_path):
    with Claims(lease_seconds=0.2) as claims:
        kept, lost = tmp_path / "kept", tmp_path / "lost"
        assert claims.take(kept) and claims.take(lost)
        (lost / "claim.0").unlink()
        deadline = time.monotonic() + 10
        while json.loads((kept / "claim.0").read_text())["beat"] < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert json.loads((kept / "claim.0").read_text())["beat"] >= 2 and names(lost) == []
    assert names(pathlib.Path(kept)) == []
