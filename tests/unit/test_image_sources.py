"""Files and addresses of images: limits of size and time, damaged files, and one family of errors."""

from __future__ import annotations

import contextlib
import http.server
import io
import os
import random
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from kandinsky22 import InputError, load_image
from kandinsky22.inputs import sources
from kandinsky22.inputs.images import convert_mode


@pytest.fixture(autouse=True)
def short_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "DOWNLOAD_SECONDS", 0.6)
    monkeypatch.setattr(sources, "WRITER_SECONDS", 0.3)
    monkeypatch.setattr(sources, "PIPE_SECONDS", 0.6)
    monkeypatch.setattr(sources, "MAX_FILE_BYTES", 2**22)


def png(size: tuple[int, int] = (8, 4)) -> bytes:
    content = io.BytesIO()
    PIL.Image.new("RGB", size, "red").save(content, "PNG")
    return content.getvalue()


class Server(http.server.BaseHTTPRequestHandler):
    """A server with one kind of response per path."""

    def do_GET(self) -> None:
        """Respond."""
        with contextlib.suppress(OSError):
            getattr(self, self.path.strip("/"))()

    def log_message(self, *_: object) -> None:
        """Print nothing."""

    def good(self) -> None:
        self.respond()
        self.wfile.write(png())

    def short(self) -> None:
        self.respond(**{"Content-Length": str(len(png()) + 9)})
        self.wfile.write(png())

    def loop(self) -> None:
        self.respond(302, Location="/loop")

    def elsewhere(self) -> None:
        self.respond(302, Location="ftp://localhost/picture.png")

    def local(self) -> None:
        self.respond(302, Location="file:///etc/hostname")

    def missing(self) -> None:
        self.respond(404)

    def endless(self) -> None:
        self.respond()
        while True:
            self.wfile.write(bytes(2**16))

    def dripping(self) -> None:
        self.respond(**{"Content-Length": "100000"})
        self.drip()

    def dripping_header(self) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
        self.drip()

    def silent(self) -> None:
        time.sleep(1.5)

    def junk(self) -> None:
        self.wfile.write(b"no protocol\r\n\r\n")

    def chunked(self) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n")

    def respond(self, code: int = 200, **headers: str) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def drip(self) -> None:
        for _ in range(40):
            self.wfile.write(b"a")
            time.sleep(0.05)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("short", "9 bytes early"),
        ("loop", "infinite loop"),
        ("elsewhere", "unknown url type: ftp"),
        ("local", "not allowed"),
        ("missing", "404"),
        ("endless", "more than 4194304 bytes"),
        ("dripping", "has not ended after 0.6 s"),
        ("dripping_header", "has not ended after 0.6 s"),
        ("silent", "has not ended after 0.6 s"),
        ("junk", "no protocol"),
        ("chunked", "IncompleteRead"),
    ],
)
def test_bad_downloads_are_one_error_in_time(address: str, path: str, reason: str) -> None:
    start = time.monotonic()
    with pytest.raises(InputError, match=f"^image='{address}/{path}' cannot be read: .*{reason}"):
        load_image(f"{address}/{path}")
    assert time.monotonic() - start < 2


def test_the_scheme_of_addresses_has_any_case(address: str) -> None:
    assert load_image(f"HTTP{address[4:]}/good").size == (8, 4)


@pytest.mark.parametrize(
    "location", ["http://", "http://[", "http://a b/", "http://a\nb/", "https://\udcff/", "a\0b", ""]
)
def test_odd_locations(location: str) -> None:
    with pytest.raises(InputError, match=r"^image=.* cannot be read: ") as caught:
        load_image(location)
    assert str(caught.value).isprintable()


@pytest.mark.skipif(os.name == "nt", reason="devices and named pipes of POSIX")
@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/dev/zero", "more than 4194304 bytes"),
        ("/dev/null", "not an image"),
        ("/", "it is a directory"),
        ("fifo", "no program writes into it"),
    ],
)
def test_devices_pipes_and_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, reason: str) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("fifo")
    with pytest.raises(InputError, match=f"^image='{path}' cannot be read: .*{reason}"):
        load_image(path)


def write_slowly(path: Path, content: bytes, seconds: float) -> None:
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as pipe:
        for byte in content:
            pipe.write(bytes([byte]))
            time.sleep(seconds / len(content))


@pytest.mark.skipif(os.name == "nt", reason="named pipes of POSIX")
@pytest.mark.parametrize("seconds", [0.1, 3])
def test_a_slow_writer_is_waited_for_within_a_limit(tmp_path: Path, seconds: float) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    threading.Thread(target=write_slowly, args=(path, png(), seconds), daemon=True).start()
    if seconds < 1:
        assert load_image(path).size == (8, 4)
    else:
        with pytest.raises(InputError, match=r"has not ended after 0\.6 s"):
            load_image(path)


class BrokenPath(os.PathLike):  # type: ignore[type-arg]
    """A path without a path."""

    def __fspath__(self) -> str:
        raise RuntimeError("no path")


@pytest.mark.parametrize("value", [BrokenPath(), b"a.png", 3, None, object, io.BytesIO(png())])
def test_other_types_are_refused(value: Any) -> None:
    with pytest.raises(InputError, match=r"^image=.* is invalid: expected a path, an http\(s\) URL or a PIL image"):
        load_image(value)


def test_a_closed_pil_image_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    image = PIL.Image.open(tmp_path / "a.png")
    image.close()
    with pytest.raises(InputError, match="cannot be read"):
        load_image(image)


def test_bombs_are_refused_before_decoding() -> None:
    header = bytearray(png())
    header[16:24] = struct.pack(">II", 60000, 60000)
    with pytest.raises(InputError, match="cannot be read"):
        sources.decode_image("image", bytes(header), "bomb.png")
    with (
        pytest.raises(InputError, match=r"image\.size=\(8, 4\) is invalid: expected at most 31 pixels"),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(sources, "MAX_IMAGE_PIXELS", 31)
        sources.decode_image("image", png(), "a.png")


def test_no_other_program_draws_a_file() -> None:
    content = io.BytesIO()
    PIL.Image.new("RGB", (4, 4)).save(content, "EPS")
    with pytest.raises(InputError, match="EPS files are drawn by another program"):
        sources.decode_image("image", content.getvalue(), "a.eps")


def test_damaged_files_of_all_formats_are_one_error() -> None:
    PIL.Image.init()
    documents = {}
    for name in sorted(PIL.Image.SAVE):
        with contextlib.suppress(Exception):  # some formats need another mode, or a library
            content = io.BytesIO()
            PIL.Image.effect_noise((20, 24), 90).save(content, name)
            documents[name] = content.getvalue()
    assert len(documents) > 20
    rng = random.Random(5)
    for name, document in documents.items():
        for _ in range(20):
            damaged = bytearray(document)
            for _ in range(rng.choice([1, 3, 12])):
                position = rng.randrange(min(len(damaged), rng.choice([64, 10**6])))
                damaged[position : position + rng.randrange(4)] = rng.choice([b"", b"\xff\xff\xff\xff", b"\0"])
                damaged = damaged or bytearray(1)
            with contextlib.suppress(InputError):
                convert_mode("image", sources.decode_image("image", bytes(damaged), f"a.{name}"))
