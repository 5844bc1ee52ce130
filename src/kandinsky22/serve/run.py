"""Run the server in this process."""

from __future__ import annotations

import contextlib
import functools
import logging
import socket
from typing import Any

from kandinsky22.errors import InputError
from kandinsky22.serve.files import lock_folder
from kandinsky22.serve.settings import ServerSettings

SHUTDOWN_SECONDS = 5
HEAD_SECONDS = 20.0  # longest time of the head of a request


def serve(settings: ServerSettings, *, on_start: Any = None) -> None:
    """Serve until the process is interrupted.

    Args:
        settings: Settings of the server.
        on_start: Called with the server's address when it accepts connections; None calls nothing.

    Raises:
        InputError: If the address or the state folder is in use.
    """
    import uvicorn

    from kandinsky22.serve.app import build_app
    from kandinsky22.serve.http_protocol import TimedProtocol

    lock = lock_folder(settings.state_folder)
    _log_to_stderr()
    listening = _listen(settings)
    address = server_address(settings.host, listening.getsockname()[1])
    protocol: Any = functools.partial(TimedProtocol, head_seconds=min(HEAD_SECONDS, settings.body_seconds))
    app = build_app(settings)
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
        h11_max_incomplete_event_size=32 * 1024,
        http=protocol,
        ws="none",
    )

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if on_start is not None:
                on_start(address)

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            app.state.services.gallery.hub.close()  # otherwise open streams of events would delay the end
            await super().shutdown(sockets)

    with contextlib.closing(listening):
        Server(config).run(sockets=[listening])
    del lock


def _log_to_stderr() -> None:
    """Write the server's own messages with times and tracebacks; the command shows one line of each warning, once."""
    logger, handler = logging.getLogger("kandinsky22.serve"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s: %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


def server_address(host: str, port: int) -> str:
    """Return the address of a server for browsers.

    Args:
        host: Address that it listens on.
        port: Its port.
    """
    name = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{name}:{port}"


def _listen(settings: ServerSettings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((settings.host, settings.port))
    except OSError as error:
        listening.close()
        reason = error.strerror or str(error)
        raise InputError(f"{settings.host}:{settings.port} cannot be used: {reason}; choose another --port") from None
    return listening
