"""The work directory of a run: its settings, its metrics log, and a refusal to be used for something else."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import time
from collections.abc import Mapping
from typing import Any

import jax

from data_pipelines.exports import write_json
from data_pipelines.files import OutputError, check_writable

_PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "numpy",
    "scikit-learn",
    "openslide-python",
    "cucim-cu13",
)


# Descriptors of the lock files of the work directories that this process has open.
_LOCKS: dict[pathlib.Path, int] = {}


class WorkdirError(ValueError):
    """The work directory cannot serve this run."""


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on; 'absent' for one that is not installed."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def file_sha256(path: pathlib.Path) -> str:
    """The file's SHA-256 in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_hash(path: pathlib.Path) -> str:
    """The first 16 digits of the file's SHA-256."""
    return file_sha256(path)[:16]


@dataclasses.dataclass
class Workdir:
    """An open work directory."""

    path: pathlib.Path

    @classmethod
    def open(cls, path: str | pathlib.Path, settings: Mapping[str, Any]) -> Workdir:
        """Makes the directory, or goes on in one that was made with the same settings.

        Raises WorkdirError that lists every setting that differs, or says that another process uses it; OutputError where nothing can
        be written.
        """
        folder = pathlib.Path(path).absolute()
        check_writable(folder)
        _lock(folder)
        file = folder / "settings.json"
        wanted = json.loads(json.dumps(dict(settings)))
        if not file.exists():
            write_json(file, wanted)
        try:
            found = json.loads(file.read_text())
        except json.JSONDecodeError as error:
            raise WorkdirError(f"{file} is not JSON ({error}): restore it, or give another --workdir") from error
        _same_settings(folder, found, wanted)
        return cls(folder)

    @property
    def begun(self) -> bool:
        """Whether a step of training was logged."""
        return (self.path / "metrics.jsonl").exists()

    def log(self, stage: str, step: int, row: Mapping[str, float]) -> None:
        """Appends a line to metrics.jsonl."""
        entry = {"time": round(time.time(), 3), "stage": stage, "step": step, **row}
        try:
            with open(self.path / "metrics.jsonl", "a") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError as error:
            raise OutputError(
                f"{self.path / 'metrics.jsonl'}: {error.strerror}; free space or give another --workdir"
            ) from error

    def history(self, stage: str) -> list[dict[str, float]]:
        """The log of a stage, one row a step, in order; where a step was done twice (after a kill), the later line counts."""
        file = self.path / "metrics.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        rows: dict[int, dict[str, float]] = {}
        for line in lines:
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:  # the last line of a run that was killed while it wrote
                continue
            if entry["stage"] == stage:
                rows.setdefault(entry["step"], {}).update(entry)
        return [rows[step] for step in sorted(rows)]


def keep_record(file: pathlib.Path, wanted: Mapping[str, Any], *, made: pathlib.Path) -> None:
    """Writes beside what is made once how it is made. Once it is there, raises WorkdirError where that was otherwise; what has no
    record, of an older version, is taken as it is."""
    if not made.exists():
        write_json(file, dict(wanted))
    elif file.exists():
        _same_settings(file.parent, json.loads(file.read_text()), json.loads(json.dumps(dict(wanted))))


def _lock(folder: pathlib.Path) -> None:
    """Keeps other runs on this machine out until this process ends, however it ends. Each process of a distributed run has a lock of its
    own. Without effect on a file system that has no locks."""
    number = jax.process_index() if jax.distributed.is_initialized() else 0
    file = folder / f".lock_{number}"
    if file in _LOCKS:
        return
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        owner = os.read(descriptor, 32).decode(errors="replace")
        os.close(descriptor)
        raise WorkdirError(
            f"{folder} is in use by process {owner}: wait for it, stop it, or give another --workdir"
        ) from error
    except OSError:
        pass
    _LOCKS[file] = descriptor
    os.ftruncate(descriptor, 0)
    os.write(descriptor, str(os.getpid()).encode())


def _same_settings(folder: pathlib.Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    names = sorted(set(found) | set(wanted))
    different = [
        f"{n}: {found.get(n)!r} there, {wanted.get(n)!r} asked for" for n in names if found.get(n) != wanted.get(n)
    ]
    if different:
        raise WorkdirError(
            f"{folder} holds a run with other settings ({'; '.join(different)}). Give another --workdir, or the same settings to go on."
        )
