"""The row of a slide in slides.csv."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

STAGES = ("open", "tissue", "read", "model", "write")
PROBABILITY = "probability"  # the measure that has a field of its own
TIMES = ("tiles_per_second", *(f"seconds_{stage}" for stage in STAGES))  # columns that differ from run to run


@dataclasses.dataclass(frozen=True)
class SlideResult:
    """A row of slides.csv. status is "done", "failed" or, in a table made before the end, "unfinished"; reason says why, or what
    is missing from a finished slide; traceback: a file below the results' folder; seconds are those of the device and of each
    thread, which work side by side; measures: what was found by a task that has others than the probability."""

    slide_id: str
    path: str
    status: str
    reason: str = ""
    traceback: str = ""
    probability: float | None = None
    mpp: float | None = None
    mpp_source: str = ""
    backend: str = ""
    tiles: int = 0
    unreadable: int = 0
    tiles_per_second: float | None = None
    seconds_open: float | None = None
    seconds_tissue: float | None = None
    seconds_read: float | None = None
    seconds_model: float | None = None
    seconds_write: float | None = None
    model: str = ""
    configuration: str = ""
    measures: Mapping[str, float | None] = dataclasses.field(default_factory=dict)

    def measure(self, name: str) -> float | None:
        """The probability, or another of the measures; None where there is none."""
        return self.probability if name == PROBABILITY else self.measures.get(name)


def stage_columns(seconds: Mapping[str, float], scored: int) -> dict[str, Any]:
    """The columns TIMES of a slide of which so many tiles were scored."""
    speed = scored / seconds["model"] if seconds["model"] else None
    columns: dict[str, Any] = {"tiles_per_second": speed and round(speed, 1)}
    return columns | {f"seconds_{stage}": round(seconds[stage], 3) for stage in STAGES}
