"""Events of jobs for any number of listeners, with ids by which a listener resumes."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import json
import threading
import time
from collections.abc import AsyncIterator
from typing import Any

KEPT_EVENTS = 1000
QUEUE_SIZE = 512  # events that a slow listener may be behind
KEEPALIVE_SECONDS = 15.0


@dataclasses.dataclass(frozen=True)
class Event:
    """One event.

    Attributes:
        id: Number that grows, also over restarts of the server.
        name: Kind of event.
        job: Id of its job; None for events of the server.
        data: Content.
    """

    id: int
    name: str
    job: str | None
    data: dict[str, Any]


class EventHub:
    """Distribution of events. `publish` may be called from any thread, `listen` in event loops."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: collections.deque[Event] = collections.deque(maxlen=KEPT_EVENTS)
        self._listeners: set[Listener] = set()
        self._last_id = time.time_ns() // 1_000_000  # ids of an earlier process are smaller
        self._closed = False

    def publish(self, name: str, data: dict[str, Any], job: str | None = None) -> None:
        """Send an event to all listeners.

        Args:
            name: Kind of event.
            data: Content, for JSON.
            job: Id of its job; None for events of the server.
        """
        with self._lock:
            self._last_id += 1
            event = Event(self._last_id, name, job, data)
            if name != "preview":  # large, and only the last one is of use
                self._kept.append(event)
            for listener in self._listeners:
                listener.offer(event)

    def listen(self, job: str | None, after: int | None = None) -> Listener:
        """Return a listener. Events that it has missed come first, if they are still kept.

        Args:
            job: Id of the job whose events it receives; None for all events.
            after: Id of the last event that it has received; None for none.
        """
        listener = Listener(self, job, asyncio.get_running_loop())
        with self._lock:
            if after is not None:
                for event in self._kept:
                    if event.id > after:
                        listener.offer(event)
            self._listeners.add(listener)
            if self._closed:
                listener.offer(None)
        return listener

    def remove(self, listener: Listener) -> None:
        """Forget a listener.

        Args:
            listener: The listener.
        """
        with self._lock:
            self._listeners.discard(listener)

    def close(self) -> None:
        """End all listeners."""
        with self._lock:
            self._closed = True
            for listener in self._listeners:
                listener.offer(None)


class Listener:
    """Receiver of events in an event loop.

    Args:
        hub: Its hub.
        job: Id of the job whose events it receives; None for all events.
        loop: Its event loop.
    """

    def __init__(self, hub: EventHub, job: str | None, loop: asyncio.AbstractEventLoop) -> None:
        self._hub, self._job, self._loop = hub, job, loop
        self._queue: asyncio.Queue[Event | None] = asyncio.Queue()
        self._ended = False

    def offer(self, event: Event | None) -> None:
        """Hand over an event from any thread.

        Args:
            event: The event; None ends the listener.
        """
        if event is None or self._job is None or event.job == self._job:
            try:
                self._loop.call_soon_threadsafe(self._put, event)
            except RuntimeError:  # its event loop has ended
                return

    def _put(self, event: Event | None) -> None:
        if self._ended:
            return
        if self._queue.qsize() >= QUEUE_SIZE:
            if event is not None and event.name in ("preview", "progress"):
                return
            if self._queue.qsize() >= 4 * QUEUE_SIZE:  # a client that reads nothing; it resumes by the last id
                event = None
        self._ended = event is None
        self._queue.put_nowait(event)

    def close(self) -> None:
        """Receive no more events."""
        self._hub.remove(self)

    async def events(self) -> AsyncIterator[Event | None]:
        """Yield events, and None after each `KEEPALIVE_SECONDS` without one."""
        try:
            while True:
                try:
                    event = await asyncio.wait_for(self._queue.get(), KEEPALIVE_SECONDS)
                except asyncio.TimeoutError:
                    yield None
                    continue
                if event is None:
                    return
                yield event
        finally:
            self._hub.remove(self)


def encode_event(name: str, data: dict[str, Any], id: int | None = None) -> bytes:
    """Return a server-sent event.

    Args:
        name: Kind of event.
        data: Content.
        id: Number by which a client resumes; None for none.
    """
    number = "" if id is None else f"id: {id}\n"
    return f"{number}event: {name}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n".encode()
