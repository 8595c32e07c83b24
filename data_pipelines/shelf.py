"""Open slides by identifier: a bounded number of handles, shared by threads."""

from __future__ import annotations

import collections
import contextlib
import threading
from collections.abc import Iterable, Iterator

from data_pipelines.cohort import SlideRecord
from data_pipelines.slides import Slide, open_slide


class _Place:
    """Where one slide stands. Its lock is held while the slide is opened, so that others can be opened beside it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.slide: Slide | None = None
        self.lent = 0


class Shelf:
    """Slides of a cohort, opened when first asked for. The least recently used is closed once more than `limit` are open.

    A slide that is lent out is never closed; it goes back at the end of the `with` block. Safe to use from several threads.
    """

    def __init__(self, records: Iterable[SlideRecord], *, mpp_override: float | None = None, limit: int = 256):
        self._records = {record.slide_id: record for record in records}
        self._mpp_override = mpp_override
        self._limit = limit
        self._places: collections.OrderedDict[str, _Place] = collections.OrderedDict()
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def lend(self, slide_id: str) -> Iterator[Slide]:
        """The open slide. Raises SlideError where it cannot be opened."""
        with self._lock:
            place = self._places.setdefault(slide_id, _Place())
            self._places.move_to_end(slide_id)
            place.lent += 1
            idle = self._take_idle()
        for slide in idle:
            slide.close()
        try:
            with place.lock:
                if place.slide is None:
                    record = self._records[slide_id]
                    place.slide = open_slide(record.path, mpp_cohort=record.mpp, mpp_override=self._mpp_override)
            yield place.slide
        finally:
            with self._lock:
                place.lent -= 1

    def _take_idle(self) -> list[Slide]:
        """Takes what nobody has borrowed off the shelf, the longest unused first, until `limit` places are left."""
        idle = [slide_id for slide_id, place in self._places.items() if not place.lent]
        taken = [self._places.pop(slide_id) for slide_id in idle[: max(0, len(self._places) - self._limit)]]
        return [place.slide for place in taken if place.slide is not None]

    def close(self) -> None:
        """Closes every slide."""
        with self._lock:
            places, self._places = self._places, collections.OrderedDict()
        for place in places.values():
            if place.slide is not None:
                place.slide.close()
