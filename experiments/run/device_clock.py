"""For how long the device was at work, measured apart from who feeds it and who takes its results."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import jax


class DeviceClock:
    """Runs as a context. A thread waits for each batch's results, so that the moment they are ready is seen by somebody even
    while the main thread reads or writes."""

    def __init__(self) -> None:
        self._watcher = ThreadPoolExecutor(1, thread_name_prefix="clock")
        self._began = self._free = time.perf_counter()
        self.busy_seconds = 0.0
        self.seconds = 0.0  # from begin to end, known at the end

    def watch(self, began: float, outputs: Any) -> Future[float]:
        """outputs: arrays of a computation that was asked for at perf_counter time `began`. Gives the device's seconds on it."""
        return self._watcher.submit(self._wait, began, outputs)

    def _wait(self, began: float, outputs: Any) -> float:
        jax.block_until_ready(outputs)
        ready = time.perf_counter()
        seconds = ready - max(began, self._free)
        self.busy_seconds += seconds
        self._free = ready
        return seconds

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._watcher.shutdown()
        self.seconds = time.perf_counter() - self._began
