"""Checks of every request before any route sees it, and headers of every response."""

from __future__ import annotations

import asyncio
import dataclasses
import hmac
import ipaddress
import json
import logging
import time
from collections.abc import Mapping
from http.cookies import CookieError, SimpleCookie
from urllib.parse import urlsplit

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kandinsky22.serve.metrics import Metrics
from kandinsky22.serve.settings import LOOPBACK, ServerSettings

logger = logging.getLogger("kandinsky22.serve")

COOKIE = "kandinsky22_token"
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
# Paths that need no token: they show nothing but the program itself. The studio asks for the token with `POST /login`.
OPEN_PATHS = ("/", "/login", "/healthz", "/readyz")
OPEN_FOLDERS = ("/studio/",)
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
    """

    status: int
    code: str
    message: str


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
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings, metrics: Metrics) -> None:
        self._app, self._settings, self._metrics = app, settings, metrics

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
        body = _LimitedBody(receive, headers, self._settings)
        response = _Response(send, scope, self._metrics, self._allowed_origin(headers), body)
        if (refusal := self.refusal(scope, headers)) is not None:
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
        path = scope["path"]
        is_open = path in OPEN_PATHS or path.startswith(OPEN_FOLDERS)
        if not is_open and scope["method"] != "OPTIONS" and not self._has_token(scope, headers):
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

    def _has_token(self, scope: Scope, headers: Mapping[str, str]) -> bool:
        token = self._settings.token
        if token is None:
            return True
        kind, _, value = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and equal_secrets(value.strip(), token):
            return True
        if kind.lower() == "basic" and _basic_password_matches(value, token):
            return True
        return equal_secrets(_cookie(headers.get("cookie", "")), token) or has_valid_signature(scope, token)


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


def equal_secrets(first: str, second: str) -> bool:
    """Return whether two secrets are equal, in a time that does not depend on where they differ.

    Args:
        first: A secret.
        second: Another one.
    """
    return hmac.compare_digest(first.encode("utf-8", "replace"), second.encode("utf-8", "replace"))


def signature(path: str, expires: int, token: str) -> str:
    """Return the signature that opens one path without the token, for addresses in responses of the OpenAI API.

    Args:
        path: Path of the address.
        expires: Time in seconds after which it is invalid.
        token: Token of the server.
    """
    return hmac.new(token.encode(), f"{path}\n{expires}".encode(), "sha256").hexdigest()


def has_valid_signature(scope: Scope, token: str) -> bool:
    """Return whether a request's address carries a valid signature.

    Args:
        scope: The request.
        token: Token of the server.
    """
    from urllib.parse import parse_qs

    query = parse_qs(scope.get("query_string", b"").decode("latin-1"))
    signatures, expiries = query.get("signature", []), query.get("expires", [])
    if scope["method"] not in ("GET", "HEAD") or len(signatures) != 1 or len(expiries) != 1:
        return False
    if not expiries[0].isascii() or not expiries[0].isdigit() or len(expiries[0]) > 12:
        return False
    expires = int(expiries[0])
    return time.time() < expires and equal_secrets(signatures[0], signature(scope["path"], expires, token))


def _basic_password_matches(value: str, token: str) -> bool:
    """Return whether HTTP basic credentials carry the token as password, as clients of /sdapi send it."""
    import base64
    import binascii

    try:
        decoded = base64.b64decode(value, validate=True).decode()
    except (binascii.Error, UnicodeDecodeError, ValueError):
        return False
    return equal_secrets(decoded.partition(":")[2], token)


def _cookie(header: str) -> str:
    try:
        cookie = SimpleCookie(header).get(COOKIE)
    except CookieError:
        return ""
    return "" if cookie is None else cookie.value


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

    def __init__(self, receive: Receive, headers: Mapping[str, str], settings: ServerSettings) -> None:
        self._receive, self._settings = receive, settings
        self._size, self._complete = 0, False
        self.refusal: Refusal | None = None  # frameworks replace the exception by one of their own
        self._deadline: float | None = None  # begins with the first part: a busy server is not a slow client
        length = headers.get("content-length", "0")
        self._is_too_large = length.isascii() and length.isdigit() and int(length[:20]) > settings.max_body_bytes

    async def receive(self) -> Message:
        if self._complete:
            return await self._receive()  # waits for the client to disconnect
        if self._is_too_large:
            raise self._too_large()
        try:
            if self._deadline is None:
                self._deadline = time.monotonic() + self._settings.body_seconds
            left = self._deadline - time.monotonic()
            message = await asyncio.wait_for(self._receive(), max(0.0, left))
        except asyncio.TimeoutError:
            self.refusal = Refusal(408, "timeout", "the body of the request took too long")
            raise BodyError(self.refusal) from None
        if message["type"] == "http.request":
            self._size += len(message.get("body", b""))
            self._complete = not message.get("more_body", False)
            if self._size > self._settings.max_body_bytes:
                raise self._too_large()
        return message

    def _too_large(self) -> BodyError:
        limit = self._settings.max_body_bytes
        self.refusal = Refusal(413, "too_large", f"the body of the request has more than {limit} bytes")
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
        error = {"message": refusal.message, "argument": None, "code": refusal.code}
        body = json.dumps({"error": error}).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
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
