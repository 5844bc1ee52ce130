"""Client of the server's native API, with the standard library only."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import json
import socket
import urllib.parse
from collections.abc import Iterator, Mapping
from typing import Any

from kandinsky22.errors import KandinskyError, printable

TIMEOUT = 60.0  # seconds without a byte; events arrive at least every 15 s
MAX_RESPONSE_BYTES = 1 << 28  # no image of the server is larger
MAX_EVENT_LINE = 1 << 24


class ServerError(KandinskyError):
    """The server cannot be reached, or refuses a request.

    Attributes:
        status: HTTP status; None if there was no response.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


@dataclasses.dataclass(frozen=True)
class Event:
    """A server-sent event.

    Attributes:
        name: Kind of event.
        data: Its content.
        id: Number by which the client resumes; "" for none.
    """

    name: str
    data: Mapping[str, Any]
    id: str


class ApiClient:
    """Client of one server.

    Args:
        address: Address of the server, such as "http://127.0.0.1:7822".
        token: Secret of the server; None sends none.
    """

    def __init__(self, address: str, token: str | None = None) -> None:
        self._address = address.rstrip("/")
        self._parts = urllib.parse.urlsplit(self._address)
        self._token = token

    def info(self) -> Mapping[str, Any]:
        """Return what the server offers.

        Raises:
            ServerError: If the server cannot be reached, or requires another token.
        """
        info = self._json("GET", "/api/info")
        if not isinstance(info.get("models"), list):
            raise ServerError(f"{self._address} is no server of kandinsky22")
        return info

    def upload(self, content: bytes) -> str:
        """Upload an image file.

        Args:
            content: PNG, JPEG or WebP file.

        Returns:
            Id of the upload.

        Raises:
            ServerError: If the server cannot be reached, or refuses the file.
        """
        return str(self._json("POST", "/api/uploads", content, {"Content-Type": "application/octet-stream"})["id"])

    def submit(self, job: Mapping[str, Any], key: str) -> Mapping[str, Any]:
        """Queue a job. The same key again returns the same job.

        Args:
            job: The request of the job.
            key: Idempotency key.

        Returns:
            State of the job.

        Raises:
            ServerError: If the server cannot be reached, or refuses the job.
        """
        headers = {"Content-Type": "application/json", "Idempotency-Key": key}
        return self._json("POST", "/api/jobs", json.dumps(job).encode(), headers)

    def job(self, id: str) -> Mapping[str, Any]:
        """Return the state of a job.

        Args:
            id: Id of the job.

        Raises:
            ServerError: If the server cannot be reached, or has no such job.
        """
        return self._json("GET", f"/api/jobs/{id}")

    def cancel(self, id: str) -> None:
        """Cancel a job. Errors are ignored: the command ends anyway.

        Args:
            id: Id of the job.
        """
        with contextlib.suppress(ServerError):
            self._json("DELETE", f"/api/jobs/{id}")

    def file(self, path: str) -> bytes:
        """Return the content of a file of the server.

        Args:
            path: Its address, relative to the server.

        Raises:
            ServerError: If the server cannot be reached, or has no such file.
        """
        with self._request("GET", path) as response:
            return _read(response, self._address)

    def events(self, id: str, after: str = "") -> Iterator[Event]:
        """Yield the events of a job until the connection or the job ends.

        Args:
            id: Id of the job.
            after: Id of the last event that was received; "" for none.

        Raises:
            ServerError: If the connection breaks.
        """
        headers = {"Accept": "text/event-stream", **({"Last-Event-ID": after} if after else {})}
        with self._request("GET", f"/api/jobs/{id}/events", headers=headers) as response:
            fields: dict[str, str] = {}
            while line := self._line(response):
                text = line.decode("utf-8", "replace").rstrip("\r\n")
                name, _, value = text.partition(":")
                if name and text:
                    fields[name] = value.removeprefix(" ")
                elif not text and "data" in fields:
                    yield Event(fields.get("event", "message"), _object(fields["data"]), fields.get("id", ""))
                    fields = {}

    def _line(self, response: http.client.HTTPResponse) -> bytes:
        try:
            return response.readline(MAX_EVENT_LINE)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise ServerError(f"the connection to {self._address} broke: {_reason(error)}") from error

    def _json(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> Mapping[str, Any]:
        with self._request(method, path, body, headers) as response:
            return _object(_read(response, self._address).decode("utf-8", "replace"))

    @contextlib.contextmanager
    def _request(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> Iterator[http.client.HTTPResponse]:
        """Yield the response to a request; one with another status than 2xx is an error."""
        kind = http.client.HTTPSConnection if self._parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(self._parts.hostname or "", self._parts.port, timeout=TIMEOUT)
        authorization = {"Authorization": f"Bearer {self._token}"} if self._token else {}
        with contextlib.closing(connection):
            try:
                connection.request(method, self._parts.path + path, body, {**(headers or {}), **authorization})
                response = connection.getresponse()
            except (OSError, http.client.HTTPException, UnicodeError) as error:
                raise ServerError(f"{self._address} cannot be reached: {_reason(error)}") from error
            if not 200 <= response.status < 300:
                raise self._refusal(response)
            yield response

    def _refusal(self, response: http.client.HTTPResponse) -> ServerError:
        """Return the error for a response with another status than 2xx."""
        if response.status == 401:
            return ServerError(
                f"{self._address} requires its token: set KANDINSKY22_TOKEN, or add --token", response.status
            )
        with contextlib.suppress(ServerError):
            error = _object(_read(response, self._address).decode("utf-8", "replace")).get("error")
            if isinstance(error, Mapping) and isinstance(error.get("message"), str):
                return ServerError(f"{self._address}: {error['message']}", response.status)
        return ServerError(f"{self._address} answered with status {response.status}", response.status)


def _read(response: http.client.HTTPResponse, address: str) -> bytes:
    try:
        content = response.read(MAX_RESPONSE_BYTES + 1)
    except (OSError, http.client.HTTPException) as error:
        raise ServerError(f"the connection to {address} broke: {_reason(error)}") from error
    if len(content) > MAX_RESPONSE_BYTES:
        raise ServerError(f"{address} sent more than {MAX_RESPONSE_BYTES} bytes")
    return content


def _object(text: str) -> Mapping[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise ServerError("the server sent something else than a JSON object")
    return content


def _reason(error: Exception) -> str:
    if isinstance(error, socket.timeout):
        return f"no answer for {TIMEOUT:g} seconds"
    return printable(getattr(error, "strerror", None) or str(error) or type(error).__name__)
