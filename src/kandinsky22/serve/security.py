"""Checks of every request before any route sees it, and headers of every response."""

from __future__ import annotations

import asyncio
import dataclasses
import ipaddress
import json
import logging
import math
import time
from collections.abc import Mapping
from urllib.parse import urlsplit

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kandinsky22.serve.failures import error_body
from kandinsky22.serve.metrics import Metrics
from kandinsky22.serve.settings import LOOPBACK, ServerSettings
from kandinsky22.serve.tokens import TokenGuard

logger = logging.getLogger("kandinsky22.serve")

SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
# Paths that need no token: they show nothing but the program itself. The studio asks for the token with `POST /login`.
OPEN_PATHS = ("/", "/login", "/healthz", "/readyz")
OPEN_FOLDERS = ("/studio/",)
OPEN_BODY_BYTES = 2**14  # largest body of a request that needs no token
# A refused request's body is read up to this size and for this time. A connection that is closed while its body is on
# the way is reset, and the client may lose the response.
REFUSED_BODY_BYTES, REFUSED_BODY_SECONDS = 2**16, 1.0
CONTENT_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "font-src 'self'; manifest-src 'self'; worker-src 'self'; base-uri 'none'; form-action 'self'; "
    "frame-ancestors 'none'"
)
HEADERS: Mapping[str, str] = {
    "content-security-policy": CONTENT_POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
}


@dataclasses.dataclass(frozen=True)
class Refusal:
    """Why a request is refused.

    Attributes:
        status: HTTP status.
        code: Name of the kind of error.
        message: Description for the user.
        headers: Further headers of the response.
    """

    status: int
    code: str
    message: str
    headers: tuple[tuple[str, str], ...] = ()


class BodyError(Exception):
    """The body of a request is too large or too slow.

    Args:
        refusal: The response.
    """

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.message)
        self.refusal = refusal


class SecurityMiddleware:
    """Checks Host, Origin and token, limits bodies, and adds headers to responses.

    Args:
        app: The application.
        settings: Settings of the server.
        metrics: Counts responses.
        guard: Checks tokens.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings, metrics: Metrics, guard: TokenGuard) -> None:
        self._app, self._settings, self._metrics, self._guard = app, settings, metrics, guard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request.

        Args:
            scope: The request.
            receive: Returns its body.
            send: Sends the response.
        """
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # there are no web sockets
            return
        headers = _decoded_headers(scope)
        limit = OPEN_BODY_BYTES if is_open(scope["path"]) else self._settings.max_body_bytes
        body = _LimitedBody(receive, headers, self._settings.body_seconds, limit)
        response = _Response(send, scope, self._metrics, self._allowed_origin(headers), body)
        if (refusal := self.refusal(scope, headers)) is not None:
            await body.discard()
            await response.refuse(refusal)
            return
        if scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
            await response.preflight()
            return
        try:
            await self._app(scope, body.receive, response.send)
        except BodyError as error:
            await response.refuse(error.refusal)
        except ClientDisconnect:
            return
        except Exception:
            logger.exception("%s %s failed", scope["method"], scope["path"])
            message = "internal error; the server's log has the details"
            await response.refuse(Refusal(500, "internal_error", message))

    def refusal(self, scope: Scope, headers: Mapping[str, str]) -> Refusal | None:
        """Return why a request is refused before its body is read, or None.

        Args:
            scope: The request.
            headers: Its headers, with names in lower case.
        """
        if headers.get("host") == "\0":
            return Refusal(400, "bad_host", "the request has several Host headers")
        if not is_allowed_host(headers.get("host", ""), self._settings):
            return Refusal(421, "wrong_host", "the Host header names another server")
        origin = headers.get("origin")
        is_safe = scope["method"] in SAFE_METHODS
        if origin is not None and not self._is_own_origin(origin, headers) and self._allowed_origin(headers) is None:
            if not is_safe:
                return Refusal(403, "wrong_origin", "the request comes from another site")
        elif origin is None and not is_safe and headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
            return Refusal(403, "wrong_origin", "the request comes from another site")
        needs_token = not is_open(scope["path"]) and scope["method"] != "OPTIONS"
        if needs_token and not self._guard.opens(scope, headers):
            if (seconds := self._guard.seconds_to_wait(scope)) > 0:
                return too_many_tokens(seconds)
            return Refusal(401, "unauthorized", "the server requires its token: Authorization: Bearer TOKEN")
        return None

    def _is_own_origin(self, origin: str, headers: Mapping[str, str]) -> bool:
        try:
            parts = urlsplit(origin)
        except ValueError:
            return False
        return parts.scheme in ("http", "https") and parts.netloc.lower() == headers.get("host", "").lower()

    def _allowed_origin(self, headers: Mapping[str, str]) -> str | None:
        origin = headers.get("origin")
        return origin if origin is not None and origin in self._settings.allowed_origins else None


def is_open(path: str) -> bool:
    """Return whether a path needs no token.

    Args:
        path: Path of the request.
    """
    return path in OPEN_PATHS or path.startswith(OPEN_FOLDERS)


def too_many_tokens(seconds: float) -> Refusal:
    """Return the refusal of a client that sent too many wrong tokens.

    Args:
        seconds: Time for which it must wait.
    """
    wait = math.ceil(seconds)
    message = f"too many wrong tokens; try again in {wait} s"
    return Refusal(429, "too_many_tokens", message, (("retry-after", str(wait)),))


def is_allowed_host(header: str, settings: ServerSettings) -> bool:
    """Return whether a Host header names this server.

    A page of another site can make its own name point to this machine (DNS rebinding). Its requests carry that name.

    Args:
        header: The header.
        settings: Settings of the server.
    """
    try:
        name = urlsplit(f"//{header}").hostname
        urlsplit(f"//{header}").port  # noqa: B018  # raises for an invalid port
    except ValueError:
        return False
    if not name or "@" in header or "/" in header:
        return False
    if name in LOOPBACK or name in {host.lower() for host in settings.allowed_hosts}:
        return True
    if name == settings.host.lower():
        return True
    return settings.host in ("0.0.0.0", "::") and _is_address(name)  # addresses cannot be rebound


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _decoded_headers(scope: Scope) -> dict[str, str]:
    headers: dict[str, str] = {}
    for name, value in scope["headers"]:
        key = name.decode("latin-1").lower()
        headers[key] = "\0" if key == "host" and key in headers else value.decode("latin-1")
    return headers


class _LimitedBody:
    """Body of a request, with limits of size and time."""

    def __init__(self, receive: Receive, headers: Mapping[str, str], seconds: float, limit: int) -> None:
        self._receive, self._seconds, self._limit = receive, seconds, limit
        self._size, self._complete = 0, False
        self.refusal: Refusal | None = None  # frameworks replace the exception by one of their own
        self._deadline: float | None = None  # begins with the first part: a busy server is not a slow client
        length = headers.get("content-length", "0")
        self._is_too_large = length.isascii() and length.isdigit() and int(length[:20]) > limit

    async def receive(self) -> Message:
        if self._complete:
            return await self._receive()  # waits for the client to disconnect
        if self._is_too_large:
            raise self._too_large()
        try:
            if self._deadline is None:
                self._deadline = time.monotonic() + self._seconds
            left = self._deadline - time.monotonic()
            message = await asyncio.wait_for(self._receive(), max(0.0, left))
        except asyncio.TimeoutError:
            self.refusal = Refusal(408, "timeout", "the body of the request took too long")
            raise BodyError(self.refusal) from None
        if message["type"] == "http.request":
            self._size += len(message.get("body", b""))
            self._complete = not message.get("more_body", False)
            if self._size > self._limit:
                raise self._too_large()
        return message

    async def discard(self) -> None:
        """Read a small body and drop it; stop at a large or a slow one."""
        self._limit = min(self._limit, REFUSED_BODY_BYTES)
        self._seconds = min(self._seconds, REFUSED_BODY_SECONDS)
        try:
            while not self._complete and (await self.receive())["type"] == "http.request":
                pass
        except BodyError:
            return

    def _too_large(self) -> BodyError:
        self.refusal = Refusal(413, "too_large", f"the body of the request has more than {self._limit} bytes")
        return BodyError(self.refusal)


class _Response:
    """Response with the security headers."""

    def __init__(
        self, send: Send, scope: Scope, metrics: Metrics, allowed_origin: str | None, body: _LimitedBody
    ) -> None:
        self._send, self._scope, self._metrics = send, scope, metrics
        self._allowed_origin, self._body = allowed_origin, body
        self._started = self._refused = False

    async def send(self, message: Message) -> None:
        if self._refused:
            return
        if not self._started and (refusal := self._body.refusal) is not None:
            self._body.refusal = None
            await self.refuse(refusal)
            self._refused = True
            return
        if message["type"] == "http.response.start":
            self._started = True
            self._metrics.responses.labels(self._method(), str(message["status"])).inc()
            present = {name.lower() for name, _ in message.get("headers", [])}
            extra = dict(HEADERS)
            if self._allowed_origin is not None:
                extra |= {"access-control-allow-origin": self._allowed_origin, "vary": "Origin"}
                extra["cross-origin-resource-policy"] = "cross-origin"
            if b"cache-control" not in present:
                is_static = self._scope["path"].startswith(OPEN_FOLDERS)
                extra["cache-control"] = "no-cache" if is_static else "no-store"
            message["headers"] = [
                *message.get("headers", []),
                *((name.encode(), value.encode()) for name, value in extra.items() if name.encode() not in present),
            ]
        await self._send(message)

    async def refuse(self, refusal: Refusal) -> None:
        """Send an error, unless a response has begun."""
        if self._started or self._refused:
            return
        self._body.refusal = None
        error = error_body(self._scope["path"], refusal.status, refusal.code, refusal.message)
        body = json.dumps(error).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
            *((name.encode(), value.encode()) for name, value in refusal.headers),
        ]
        if refusal.status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        await self.send({"type": "http.response.start", "status": refusal.status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body})

    async def preflight(self) -> None:
        """Answer a browser that asks whether a script of another site may send a request."""
        headers = []
        if self._allowed_origin is not None:
            headers = [
                (b"access-control-allow-methods", b"GET, POST, PATCH, DELETE"),
                (b"access-control-allow-headers", b"authorization, content-type, idempotency-key, last-event-id"),
                (b"access-control-max-age", b"600"),
            ]
        await self.send({"type": "http.response.start", "status": 204, "headers": headers})
        await self.send({"type": "http.response.body", "body": b""})

    def _method(self) -> str:
        method = self._scope["method"]
        return method if method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS") else "other"
