"""HTTP connections with a limit for the time that the head of a request takes."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol


class TimedProtocol(H11Protocol):
    """uvicorn's HTTP protocol, which closes connections whose first or next request does not arrive in time.

    uvicorn itself limits only the time between two requests. A client that sends the head of a request byte by byte
    would hold its connection forever.

    Args:
        head_seconds: Longest time of the head of a request.
        options: Arguments of uvicorn's protocol.
    """

    def __init__(self, *, head_seconds: float, **options: Any) -> None:
        super().__init__(**options)
        self._head_seconds = head_seconds
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Begin to wait for a request.

        Args:
            transport: The connection.
        """
        super().connection_made(transport)
        self._head_timer = self.loop.call_later(self._head_seconds, self._close_unless_complete)

    def data_received(self, data: bytes) -> None:
        """Receive a part of a request.

        Args:
            data: The bytes.
        """
        if self._head_timer is None and self.conn.their_state is h11.IDLE:
            self._head_timer = self.loop.call_later(self._head_seconds, self._close_unless_complete)
        super().data_received(data)
        if self._head_timer is not None and self.conn.their_state is not h11.IDLE:
            self._head_timer.cancel()
            self._head_timer = None

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection.

        Args:
            exc: Why it was lost; None for a regular end.
        """
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
        super().connection_lost(exc)

    def _close_unless_complete(self) -> None:
        self._head_timer = None
        if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            self.transport.close()
