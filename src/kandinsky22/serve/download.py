"""Downloads of images from the hosts that the settings allow."""

from __future__ import annotations

import http.client
import time
from urllib.parse import urlsplit

from kandinsky22.errors import InputError
from kandinsky22.serve.settings import ServerSettings

SECONDS = 20.0  # longest time of a download
CHUNK_BYTES = 2**16


def download(name: str, address: str, settings: ServerSettings) -> bytes:
    """Return the content of an address. Redirects are not followed: they could lead to any host.

    Args:
        name: Name of the argument, for messages.
        address: The address, whose host is allowed.
        settings: Settings of the server.

    Raises:
        InputError: If the download fails, is too large or takes too long.
    """
    try:
        parts = urlsplit(address)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(parts.hostname or "", parts.port, timeout=SECONDS)
        try:
            target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            connection.request("GET", target, headers={"User-Agent": "kandinsky22", "Accept": "image/*"})
            response = connection.getresponse()
            if response.status != 200:
                raise InputError(f"{name} cannot be downloaded: the host answers with status {response.status}")
            return _body(name, response, settings.max_upload_bytes)
        finally:
            connection.close()
    except (TimeoutError, OSError, http.client.HTTPException, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{name} cannot be downloaded: {type(error).__name__}") from None


def _body(name: str, response: http.client.HTTPResponse, limit: int) -> bytes:
    content, deadline = bytearray(), time.monotonic() + SECONDS
    while chunk := response.read1(CHUNK_BYTES):
        content += chunk
        if len(content) > limit:
            raise InputError(f"{name} cannot be downloaded: it has more than {limit} bytes")
        if time.monotonic() > deadline:
            raise InputError(f"{name} cannot be downloaded: it takes more than {SECONDS:g} s")
    return bytes(content)
