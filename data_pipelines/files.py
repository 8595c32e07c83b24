"""Writing a file whole or not at all, and one clear error where it cannot be written."""

import contextlib
import errno
import glob
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

_CURES = {
    errno.ENOSPC: "free space there, or write to another disk",
    errno.EDQUOT: "the quota there is used up: free space, or write elsewhere",
    errno.EFBIG: "the file would exceed the limit on file sizes: raise it, or write elsewhere",
    errno.EACCES: "give yourself the right to write there, or choose another folder",
    errno.EPERM: "give yourself the right to write there, or choose another folder",
    errno.EROFS: "the disk is mounted read-only: choose another folder",
    errno.ENOTDIR: "a file stands where a folder is needed: move it, or choose another folder",
    errno.EEXIST: "a file stands where a folder is needed: move it, or choose another folder",
    errno.EISDIR: "a folder stands where a file is needed: move it, or choose another name",
    errno.ENAMETOOLONG: "shorten the name",
}


class OutputError(RuntimeError):
    """Results cannot be written: names path, reason and cure. No OSError, lest it pass for one slide's read error."""


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """A block that writes to `path`: an OSError that says why it cannot becomes OutputError, with the cure."""
    try:
        yield
    except OSError as error:
        if error.errno in _CURES:
            raise OutputError(f"cannot write {path}: {error.strerror}; {_CURES[error.errno]}") from error
        raise


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary path beside `path` to write to; it takes the name `path` when the block ends without an error.

    Makes missing folders. Raises OutputError when folder or file cannot be written; other errors pass through. After
    either, or a kill, what was at `path` is untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".{uuid.uuid4().hex[:8]}.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _flush_to_disk(temporary)
        os.replace(temporary, path)
    except OSError as error:
        about = {None, str(temporary), str(path), *map(str, path.parents)}
        named = error.filename if error.filename is None else os.fsdecode(error.filename)
        if error.errno in _CURES and named in about:
            raise OutputError(f"cannot write {path}: {error.strerror}; {_CURES[error.errno]}") from error
        raise
    finally:
        with contextlib.suppress(OSError):  # already renamed, or never begun
            temporary.unlink()


def remove_unfinished(path: str | os.PathLike) -> None:
    """Removes what `atomic_write` to this path left when its process was killed. Nobody may be writing to it."""
    path = Path(path)
    for left in path.parent.glob(f".{'?' * 8}.{glob.escape(path.name)}"):
        left.unlink(missing_ok=True)


def replace_folder(temporary: str | os.PathLike, path: str | os.PathLike) -> None:
    """Gives the folder `temporary`, on the same disk, the name `path`; a folder that stood there is removed.

    A kill in between leaves nothing at `path`, or the new folder; never a mixture. Raises OutputError.
    """
    temporary, path = Path(temporary), Path(path)
    old = temporary.with_name(f".{uuid.uuid4().hex[:8]}.old")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            os.replace(path, old)
        os.replace(temporary, path)
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a new folder beside `path` to write to; it takes the name `path` when the block ends without an error.

    Raises OutputError where something is at `path` already (an empty folder may be), or nothing can be written there.
    """
    path = Path(path).absolute()
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise OutputError(f"{path} is there already: remove it, or choose another folder")
    temporary = path.with_name(f".{uuid.uuid4().hex[:8]}.{path.name}")
    try:
        check_writable(temporary)
        yield temporary
        replace_folder(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # already renamed, or never begun


def check_writable(folder: str | os.PathLike) -> None:
    """Makes the folder and a file in it, to learn at the start of a run, not at its end, that it cannot be written."""
    with atomic_write(Path(folder) / ".writable") as temporary:
        temporary.write_bytes(b"\n")
    (Path(folder) / ".writable").unlink(missing_ok=True)  # another process may have been here in between


def _flush_to_disk(path: Path) -> None:
    """Before the rename, so that a power cut cannot leave the name on an empty file."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
