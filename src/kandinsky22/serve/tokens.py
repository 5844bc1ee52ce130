"""The token of a server: where requests carry it, signatures that stand for it, and the limit of wrong ones."""

from __future__ import annotations

import base64
import binascii
import collections
import hashlib
import hmac
import ipaddress
import threading
import time
from collections.abc import Callable, Mapping
from urllib.parse import parse_qs

from starlette.requests import cookie_parser
from starlette.types import Scope

WRONG_TOKENS = 10  # different wrong tokens of one client within `WINDOW_SECONDS`, after which it must wait
WINDOW_SECONDS = 60.0
MAX_CLIENTS = 10_000  # clients whose wrong tokens are remembered


class TokenGuard:
    """Check of tokens, with a limit of guesses per client.

    Only different wrong tokens count: a browser with an old cookie sends the same one with every request.

    Args:
        token: Token of the server; None requires none.
        clock: Returns the time in seconds.
    """

    def __init__(self, token: str | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._token, self._clock = token, clock
        self._lock = threading.Lock()
        # Per client: the end of its window, and digests of its wrong tokens. The oldest window comes first.
        self._guesses: collections.OrderedDict[str, tuple[float, set[bytes]]] = collections.OrderedDict()

    def opens(self, scope: Scope, headers: Mapping[str, str]) -> bool:
        """Return whether a request carries the token or a valid signature. Wrong tokens are counted.

        Args:
            scope: The request.
            headers: Its headers, with names in lower case.
        """
        if self._token is None:
            return True
        presented = presented_tokens(headers)
        if any([self.accepts(scope, value) for value in presented]):
            return True
        return has_valid_signature(scope, self._token)

    def accepts(self, scope: Scope, value: str) -> bool:
        """Return whether a text is the token. A wrong one is counted; while its client must wait, none is accepted.

        Args:
            scope: The request.
            value: The text.
        """
        if self._token is None:
            return True
        if self.seconds_to_wait(scope) > 0:
            return False
        if equal_secrets(value, self._token):
            return True
        client, now = client_of(scope), self._clock()
        with self._lock:
            end, wrong = self._guesses.get(client, (0.0, set()))
            if now >= end:
                self._guesses.pop(client, None)
                end, wrong = now + WINDOW_SECONDS, set()
            wrong.add(hashlib.sha256(value.encode("utf-8", "replace")).digest())
            self._guesses[client] = end, wrong
            while len(self._guesses) > MAX_CLIENTS:
                self._guesses.popitem(last=False)
        return False

    def seconds_to_wait(self, scope: Scope) -> float:
        """Return the time for which the client of a request must wait, because it sent too many wrong tokens.

        Args:
            scope: The request.
        """
        with self._lock:
            end, wrong = self._guesses.get(client_of(scope), (0.0, set()))
        return max(0.0, end - self._clock()) if len(wrong) >= WRONG_TOKENS else 0.0


def client_of(scope: Scope) -> str:
    """Return what identifies the client of a request: its address, of IPv6 the network.

    Args:
        scope: The request.
    """
    host = str((scope.get("client") or ("",))[0])
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv6Address):
        return str(ipaddress.ip_network((address, 64), strict=False))  # a client has all addresses of its network
    return host


def presented_tokens(headers: Mapping[str, str]) -> list[str]:
    """Return the tokens that a request carries: as bearer, as password of HTTP basic credentials, and as cookie.

    Args:
        headers: Headers of the request, with names in lower case.
    """
    kind, _, value = headers.get("authorization", "").partition(" ")
    password = _basic_password(value) if kind.lower() == "basic" else None
    bearer = value.strip() if kind.lower() == "bearer" else None
    return [
        text for text in (bearer, password, cookie_parser(headers.get("cookie", "")).get(cookie_name(headers))) if text
    ]


def cookie_name(headers: Mapping[str, str]) -> str:
    """Return the name of the cookie that carries the token.

    A browser sends the cookies of a host to all its ports. The port in the name separates the servers of a host.

    Args:
        headers: Headers of the request, with names in lower case.
    """
    port = headers.get("host", "").rpartition(":")[2]
    return f"kandinsky22_token_{port}" if port.isdigit() else "kandinsky22_token"


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
    query = parse_qs(scope.get("query_string", b"").decode("latin-1"))
    signatures, expiries = query.get("signature", []), query.get("expires", [])
    if scope["method"] not in ("GET", "HEAD") or len(signatures) != 1 or len(expiries) != 1:
        return False
    if not expiries[0].isascii() or not expiries[0].isdigit() or len(expiries[0]) > 12:
        return False
    expires = int(expiries[0])
    return time.time() < expires and equal_secrets(signatures[0], signature(scope["path"], expires, token))


def _basic_password(value: str) -> str | None:
    """Return the password of HTTP basic credentials, as clients of /sdapi send the token."""
    try:
        decoded = base64.b64decode(value, validate=True).decode()
    except (binascii.Error, UnicodeDecodeError, ValueError):
        return None
    return decoded.partition(":")[2]
