"""Exact nearest neighbours against faiss's flat index, each in a process of its own with all cores, taking turns.

python -m experiments.run.benchmarks.search ours 10 1000000      (a line of standard input is a round, the answer its seconds)
"""

from __future__ import annotations

import os
import pathlib
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np

from experiments.run.benchmarks.peers import Child, interleaved
from experiments.run.benchmarks.rows import Row, ratio

QUERIES, FEATURES = 256, 512
SIZES = (250_000, 1_000_000)  # candidates
TARGETS = {10: ("≤ 0.6", "≤ 160 MB"), 100: ("≤ 1.0", "≤ 350 MB")}  # k -> of the time, of the memory
LARGE = 10_000_000
_ROWS_WRITTEN = 100_000


def search_section(rounds: int) -> Iterator[Row]:
    """Time and memory of the k nearest of a million vectors in memory; needs 5 GB."""
    for k, (time_target, memory_target) in TARGETS.items():
        ours, theirs = (_child(task, k, SIZES[-1]) for task in ("ours", "faiss"))
        for child in (ours, theirs):
            child.seconds()  # compiles, and warms the caches
        measured = interleaved(ours.seconds, theirs.seconds, rounds=rounds)
        for child in (ours, theirs):
            child.close()
        yield ratio(f"neighbours, {_size(SIZES[-1])}, k {k}: time / faiss flat", *measured, time_target)
        for candidates in SIZES:
            yield _memory_row(f"neighbours, {_size(candidates)}, k {k}", memory_target, k, candidates)


def large_search_section(rounds: int) -> Iterator[Row]:
    """Ten million vectors of float16 in a memory map of 10 GB, searched once, from the disk as far as it does not fit in memory."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "features.npy"
        _write_features(path, LARGE)
        child = _child("ours", 10, LARGE, path)
        seconds = [child.seconds() for _ in range(max(1, rounds // 10))]
        child.close()
        row = f"neighbours, {_size(LARGE)}, float16 from a memory map, k 10"
        yield f"{row}: time", f"{np.median(seconds):.1f} s", "done", f"{LARGE / np.median(seconds) / 1e6:.2f} million/s"
        yield _memory_row(row, "≤ 160 MB", 10, LARGE, path)


def _size(candidates: int) -> str:
    return f"{QUERIES} × {candidates:,} × {FEATURES}"


def _child(task: str, *arguments: object) -> Child:
    return Child("experiments.run.benchmarks.search", task, *arguments)


def _memory_row(name: str, target: str, *arguments: object) -> Row:
    """What the first search takes, its compilation included, and what the next one does."""
    child = _child("memory", *arguments)
    first, later = child.seconds(), child.seconds()
    child.close()
    return f"{name}: extra memory", f"{first:.0f} MB", target, f"a later search {later:.0f} MB"


def _write_features(path: pathlib.Path, candidates: int) -> None:
    random = np.random.default_rng(0)
    table = np.lib.format.open_memmap(path, "w+", np.float16, (candidates, FEATURES))
    for begin in range(0, candidates, _ROWS_WRITTEN):
        table[begin : begin + _ROWS_WRITTEN] = random.standard_normal((_ROWS_WRITTEN, FEATURES), np.float32)
    table.flush()


def _faiss(queries: np.ndarray, candidates: np.ndarray, k: int) -> Callable[[], float]:
    import faiss

    index = faiss.IndexFlatL2(FEATURES)
    index.add(candidates)
    return lambda: _seconds(lambda: index.search(queries, k))


def _ours(queries: np.ndarray, candidates: np.ndarray, k: int) -> Callable[[], float]:
    return lambda: _seconds(_search(queries, candidates, k))


def _memory(queries: np.ndarray, candidates: np.ndarray, k: int) -> Callable[[], float]:
    """Megabytes that a search takes at its peak, in the first its compilation included, beyond what the process had before it and after
    a search of one vector. Pages of a file in memory are the system's, and not counted."""
    search = _search(queries, candidates, k)
    _search(queries, np.asarray(candidates[:1]), 1)()

    def megabytes() -> float:
        before = _resident("RssAnon")
        peak, done = [before], threading.Event()

        def watch() -> None:
            while not done.wait(0.002):
                peak.append(_resident("RssAnon"))

        watcher = threading.Thread(target=watch)
        watcher.start()
        search()
        done.set()
        watcher.join()
        return (max(peak) - before) / 1e6

    return megabytes


def _search(queries: np.ndarray, candidates: np.ndarray, k: int) -> Callable[[], object]:
    import jax

    from experiments.run.program import prefer_wide_vectors
    from srcc_jax import parallel
    from srcc_jax.kernels.neighbours import nearest

    prefer_wide_vectors()
    parallel.set_cpu_devices(len(os.sched_getaffinity(0)))
    jax.block_until_ready(jax.numpy.zeros(1))
    return lambda: nearest(queries, candidates, k=k)


def _resident(kind: str) -> int:
    """Bytes of this process in memory, of a kind that Linux counts."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(kind):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {kind}: memory is measured on Linux")


def _seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


TASKS = {"ours": _ours, "faiss": _faiss, "memory": _memory}


def main(task: str, k: str, candidates: str, path: str | None = None) -> None:
    """Answers each line of standard input with what one round took. path: a file of features; None: they are drawn."""
    random = np.random.default_rng(1)
    queries = random.standard_normal((QUERIES, FEATURES), np.float32)
    table = np.load(path, mmap_mode="r") if path else random.standard_normal((int(candidates), FEATURES), np.float32)
    measure = TASKS[task](queries, table, int(k))
    for _ in sys.stdin:
        print(measure(), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
