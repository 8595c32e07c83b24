"""Leases on slides, so that any number of processes that share a folder divide a cohort without a coordinator.

A slide's claims are files claim.0, claim.1, ... in its state folder; the one with the highest number counts. Making a file that is not
there yet is atomic on every file system that clusters share, so a slide is first taken by making claim.0, and a dead
worker's claim.n is taken over by making claim.n+1. The owner counts beats into its file. Another process gives it up for dead
when the count has stood still for a whole lease by its own clock (clocks of two machines are never compared), or at once where
the owner ran on the same machine and is gone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable
from types import TracebackType
from typing import Self

from data_pipelines.exports import write_text

_NAME = re.compile(r"claim\.(\d+)")


@dataclasses.dataclass(frozen=True)
class Owner:
    """Who holds a claim. worker: one process of one start."""

    host: str
    pid: int
    worker: str
    beat: int = 0

    @property
    def gone(self) -> bool:
        """Whether it ran on this machine and does so no more."""
        if self.host != socket.gethostname() or os.name != "posix":  # elsewhere signal 0 is no question
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:  # it lives, as another user
            return False
        return False


class Claims:
    """The claims of this process. Runs as a context, during which they are kept alive; those left at the end are given back."""

    def __init__(self, *, lease_seconds: float, clock: Callable[[], float] = time.monotonic):
        self._me = Owner(socket.gethostname(), os.getpid(), uuid.uuid4().hex)
        self._lease_seconds, self._clock = lease_seconds, clock
        self._held: dict[pathlib.Path, pathlib.Path] = {}  # state folder -> claim
        self._watched: dict[
            pathlib.Path, tuple[Owner | None, float]
        ] = {}  # claim of another -> as first seen, and when
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="claims", daemon=True)

    def take(self, folder: pathlib.Path) -> bool:
        """Whether this process now holds the slide with this state folder. False: another is at work on it."""
        folder.mkdir(parents=True, exist_ok=True)
        number, claim = _latest(folder)
        if claim is not None and not self._dead(claim):
            return False
        mine = folder / f"claim.{number + 1}"
        try:
            descriptor = os.open(mine, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            return False
        with os.fdopen(descriptor, "w") as file:
            file.write(json.dumps(dataclasses.asdict(self._me)))
        with self._lock:
            self._held[folder] = mine
        return True

    def holds(self, folder: pathlib.Path) -> bool:
        """Whether the claim is still this process's: one that slept past its lease may find that another took over."""
        with self._lock:
            mine = self._held.get(folder)
        return mine is not None and _latest(folder)[1] == mine

    def release(self, folder: pathlib.Path) -> None:
        """Gives the slide back; nothing where it is not held."""
        with self._lock:
            mine = self._held.pop(folder, None)
            if mine is None:
                return
            if _latest(folder)[1] == mine:
                # Beats that a kill cut off, then older claims before ours, so that none of them ever counts.
                for old in [*folder.glob(".*.claim.*"), *sorted(folder.glob("claim.*"), key=_number)]:
                    old.unlink(missing_ok=True)
            else:
                mine.unlink(missing_ok=True)

    def _dead(self, claim: pathlib.Path) -> bool:
        owner = _read(claim)
        if owner is not None and owner.gone:
            return True
        seen, since = self._watched.setdefault(claim, (owner, self._clock()))
        if seen != owner:
            self._watched[claim] = (owner, self._clock())
            return False
        return self._clock() - since >= self._lease_seconds

    def _beat(self) -> None:
        beat = 0
        while not self._stop.wait(self._lease_seconds / 4):
            beat += 1
            with self._lock:
                for mine in [mine for mine in self._held.values() if mine.exists()]:
                    with contextlib.suppress(FileNotFoundError):  # taken over and given back while this process slept
                        write_text(mine, json.dumps(dataclasses.asdict(dataclasses.replace(self._me, beat=beat))))

    def __enter__(self) -> Self:
        self._heart.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        self._heart.join()
        for folder in list(self._held):
            self.release(folder)


def _number(claim: pathlib.Path) -> int:
    match = _NAME.fullmatch(claim.name)
    return int(match[1]) if match else -1


def _latest(folder: pathlib.Path) -> tuple[int, pathlib.Path | None]:
    """The number and the file of the claim that counts; -1 and None where there is none."""
    claims = [path for path in folder.iterdir() if _number(path) >= 0]
    latest = max(claims, key=_number, default=None)
    return (-1, None) if latest is None else (_number(latest), latest)


def _read(claim: pathlib.Path) -> Owner | None:
    """None where it was just given back, or is being made."""
    try:
        return Owner(**json.loads(claim.read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return None
