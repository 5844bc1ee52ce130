"""Wall time of the stages of a process, without gaps: each moment belongs to the innermost stage that is running."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

Event = tuple[float, str]  # time at which a stage begins to run, and its name
SHORTEST = 1e-3  # seconds; shorter stages count for the stage around them


class Stopwatch:
    """Times of stages in the thread that creates it. Other threads change nothing.

    Args:
        started: Start of the process, as of `time.time`.
        name: Stage that runs from then on.

    Attributes:
        events: Beginnings of stages, in order of time.
        counts: Numbers that the process reports besides, such as numbers of steps.
    """

    def __init__(self, started: float, name: str) -> None:
        self._thread, self._running = threading.get_ident(), [name]
        self.events: list[Event] = [(started, name)]
        self.counts: dict[str, int] = {}

    @property
    def current(self) -> str:
        """Name of the stage that is running."""
        return self._running[-1]

    def switch(self, name: str) -> None:
        """End the current stage, and begin another one at the same level.

        Args:
            name: Name of the new stage.
        """
        if threading.get_ident() == self._thread and name != self.current:
            self._running[-1] = name
            self.events.append((time.time(), name))

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Return a context manager for a stage. The stage around it continues afterwards.

        Args:
            name: Name of the stage.
        """
        if threading.get_ident() != self._thread or name == self.current:
            yield
            return
        before, count = time.time(), len(self.events)
        self._running.append(name)
        self.events.append((before, name))
        try:
            yield
        finally:
            self._running.pop()
            now = time.time()
            if len(self.events) == count + 1 and now - before < SHORTEST:
                self.events.pop()
            else:
                self.events.append((now, self.current))

    def write(self, path: Path) -> None:
        """End the last stage, and write events and counts as JSON.

        Args:
            path: Path of the file.
        """
        path.write_text(json.dumps({"events": [*self.events, (time.time(), "exit")], "counts": self.counts}))


def seconds_per_stage(events: Sequence[Event], end: float) -> dict[str, float]:
    """Return the seconds of each stage.

    Args:
        events: Beginnings of stages, in order of time.
        end: End of the last stage.
    """
    seconds: dict[str, float] = {}
    for (start, name), (stop, _) in zip(events, [*events[1:], (end, "")], strict=True):
        seconds[name] = seconds.get(name, 0.0) + max(0.0, stop - start)
    return seconds


def peak_per_stage(events: Sequence[Event], samples: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Return the largest sample of each stage that has one.

    Args:
        events: Beginnings of stages, in order of time.
        samples: Pairs of time and value, in order of time.
    """
    peaks: dict[str, float] = {}
    index = -1
    for moment, value in samples:
        while index + 1 < len(events) and events[index + 1][0] <= moment:
            index += 1
        if index >= 0:
            name = events[index][1]
            peaks[name] = max(value, peaks.get(name, 0.0))
    return peaks
