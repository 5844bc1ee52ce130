"""Image files and addresses: reading them within limits of size and time, and decoding them with PIL.

Whatever a file contains, and whatever a server sends, the result is an image or an `InputError`.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import os
import socket
import stat
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from typing import IO, Any

import PIL
import PIL.Image
import PIL.ImageOps
from PIL.Image import Image

from kandinsky22.errors import InputError, describe, invalid
from kandinsky22.kernels.locks import ObjectLock

MAX_FILE_BYTES = 256 * 2**20
MAX_IMAGE_PIXELS = 178_956_970  # twice PIL's default limit for warnings, which is where PIL refuses images
URL_SECONDS = 15.0  # longest time without a byte from a server
DOWNLOAD_SECONDS = 60.0  # longest time of a download
WRITER_SECONDS = 10.0  # longest time without a program that writes into a named pipe
PIPE_SECONDS = 600.0  # longest time that the writer takes, which may be a program that generates the image
CHUNK_BYTES = 2**20

_decoding = ObjectLock()  # two threads must not decode one PIL image, which reads its file where the other one left it

# EPS and WMF files are drawn by programs outside of this process: PIL starts Ghostscript, or calls Windows.
PROGRAM_FORMATS = ("EPS", "WMF")


def read_bytes(argument: str, location: str) -> bytes:
    """Return the content of a file, a pipe or an http(s) address.

    Args:
        argument: Name of the argument, for messages.
        location: Path or address.

    Raises:
        InputError: If it cannot be read, has more than `MAX_FILE_BYTES` bytes, or takes too long.
    """
    with _one_error_family(argument, location):
        return _download(location) if is_address(location) else read_file(location)


def decode_image(argument: str, content: bytes, name: str) -> Image:
    """Return the image that a file contains, decoded, upright (EXIF orientation applied) and in its original mode.

    Args:
        argument: Name of the argument, for messages.
        content: Bytes of the file.
        name: Path or address of the file, for messages.

    Raises:
        InputError: If PIL cannot decode it, if it has more than `MAX_IMAGE_PIXELS` pixels, or if another program would
            have to decode it.
    """
    with _one_error_family(argument, name), decoded(argument, content) as image:
        return PIL.ImageOps.exif_transpose(image)


@contextlib.contextmanager
def decoded(argument: str, content: bytes) -> Iterator[Image]:
    """Open an image file in memory and decode its pixels. Damaged files raise errors of almost any class.

    Args:
        argument: Name of the argument, for messages.
        content: Bytes of the file.

    Returns:
        A context with the image, in its original orientation and mode.

    Raises:
        InputError: If it has no pixels or more than `MAX_IMAGE_PIXELS`.
        Exception: If PIL cannot decode it, or if another program would have to decode it.
    """
    with PIL.Image.open(io.BytesIO(content)) as image:
        if image.format in PROGRAM_FORMATS:
            raise ValueError(f"{image.format} files are drawn by another program; convert it to PNG first")
        _load(argument, image)
        yield image


def upright_copy(argument: str, image: Image) -> Image:
    """Return a decoded copy of a PIL image, rotated as its EXIF orientation requires.

    Args:
        argument: Name of the argument, for messages.
        image: The image; it may be a file that is not yet decoded.

    Raises:
        InputError: If it cannot be decoded, or if it has no pixels or more than `MAX_IMAGE_PIXELS`.
    """
    with _decoding, _one_error_family(argument, image):
        _load(argument, image)
        return PIL.ImageOps.exif_transpose(image)


def is_address(location: str) -> bool:
    """Return whether a string is an http(s) address rather than a path.

    Args:
        location: The string.
    """
    return location[:8].lower().startswith(("http://", "https://"))


def _load(argument: str, image: Image) -> None:
    _check_pixels(argument, image)
    image.load()
    _check_pixels(argument, image)  # some formats know their size only now


def _check_pixels(argument: str, image: Image) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise invalid(f"{argument}.size", image.size, "at least one pixel")
    if width * height > MAX_IMAGE_PIXELS:
        raise invalid(f"{argument}.size", image.size, f"at most {MAX_IMAGE_PIXELS} pixels")


@contextlib.contextmanager
def _one_error_family(argument: str, source: Any) -> Iterator[None]:
    """Raise every error as an `InputError`: PIL's decoders raise almost any class for damaged files."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        if isinstance(error, PIL.UnidentifiedImageError):  # its message shows only an object in memory
            reason = "it is not an image in a format that PIL reads"
        raise InputError(f"{argument}={describe(source)} cannot be read: {reason}") from error


# Files


def read_file(path: str, limit: int | None = None) -> bytes:
    """Return the content of a file, a pipe or a device.

    Args:
        path: The path.
        limit: Largest accepted number of bytes; None for `MAX_FILE_BYTES`.

    Raises:
        OSError: If it cannot be read, or takes too long.
        ValueError: If it has more bytes, or the path is one that no file can have.
    """
    if os.path.isdir(path):
        raise IsADirectoryError("it is a directory")
    # Opening a named pipe without a writer would otherwise block forever.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with open(descriptor, "rb", buffering=0) as file:
        kind = os.fstat(descriptor).st_mode
        return _read_limited(file.read, limit) if stat.S_ISREG(kind) else _read_stream(file, limit)


def _read_stream(file: IO[bytes], limit: int | None) -> bytes:
    """Return the content of a pipe or a device, whose writer may be slow, endless or missing."""
    start, is_pipe = time.monotonic(), stat.S_ISFIFO(os.fstat(file.fileno()).st_mode)
    has_writer = not is_pipe

    def read(count: int) -> bytes:
        nonlocal has_writer
        while True:
            chunk: bytes | None = file.read(count)
            # None: no data yet. b"" is the end of the stream, but it also precedes the first writer of a named pipe.
            has_writer = has_writer or chunk != b""
            if chunk or (chunk is not None and has_writer):
                return chunk
            if time.monotonic() - start > (seconds := PIPE_SECONDS if has_writer else WRITER_SECONDS):
                ended = f"it has not ended after {seconds:g} s"
                raise TimeoutError(ended if has_writer else "no program writes into it")
            time.sleep(0.01)

    return _read_limited(read, limit)


def _read_limited(read: Callable[[int], bytes], limit: int | None = None) -> bytes:
    content, limit = bytearray(), MAX_FILE_BYTES if limit is None else limit
    while chunk := read(CHUNK_BYTES):
        content += chunk
        if len(content) > limit:
            raise ValueError(f"it has more than {limit} bytes")
    return bytes(content)


# Addresses


class _Deadline:
    """Timer that ends all connections of a download: a server that sends single bytes never reaches a timeout."""

    def __init__(self) -> None:
        self.expired = False
        self._sockets: list[socket.socket] = []
        self._timer = threading.Timer(DOWNLOAD_SECONDS, self._expire)
        self._timer.daemon = True

    def __enter__(self) -> _Deadline:
        self._timer.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._timer.cancel()

    def add(self, connection: socket.socket) -> None:
        self._sockets.append(connection)
        if self.expired:
            self._expire()

    def _expire(self) -> None:
        self.expired = True
        for connection in self._sockets:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


def _download(address: str) -> bytes:
    with _Deadline() as deadline:
        try:
            request = urllib.request.Request(address, headers={"User-Agent": "kandinsky22"})
            with _opener(deadline).open(request, timeout=URL_SECONDS) as response:
                content = _read_limited(response.read1)
        except Exception:
            if deadline.expired:
                raise TimeoutError(f"the download has not ended after {DOWNLOAD_SECONDS:g} s") from None
            raise
        if deadline.expired:
            raise TimeoutError(f"the download has not ended after {DOWNLOAD_SECONDS:g} s")
        if response.length:
            raise ConnectionError(f"the download ended {response.length} bytes early")
        return content


def _opener(deadline: _Deadline) -> urllib.request.OpenerDirector:
    """Return an opener of http(s) addresses whose connections end at the deadline. It has no other protocols."""

    class Connection(http.client.HTTPConnection):
        def connect(self) -> None:
            super().connect()
            deadline.add(self.sock)

    class SecureConnection(http.client.HTTPSConnection):
        def connect(self) -> None:
            super().connect()
            deadline.add(self.sock)

    class Handler(urllib.request.HTTPHandler):
        def http_open(self, request: urllib.request.Request) -> Any:
            return self.do_open(Connection, request)

    class SecureHandler(urllib.request.HTTPSHandler):
        def https_open(self, request: urllib.request.Request) -> Any:
            return self.do_open(SecureConnection, request)

    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
        Handler(),
        SecureHandler(),
    ):
        opener.add_handler(handler)
    return opener
