"""Attacks: each is answered with a status of the client's fault, without a trace of the program."""

from __future__ import annotations

import base64
import http.server
import io
import json
import socket
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tests.serve.conftest import png
from tests.serve.server import DRAFT, Server, running

from kandinsky22.serve.tokens import cookie_name, presented_tokens

TOKEN = "a token of tests"


def raw(server: Server, content: bytes, seconds: float = 30) -> bytes:
    """Return what the server answers to bytes."""
    with socket.create_connection(("127.0.0.1", server.port), seconds) as connection:
        connection.sendall(content)
        answer = b""
        while chunk := connection.recv(65536):
            answer += chunk
            if b"\r\n\r\n" in answer:
                break
        return answer


def assert_refused(response: Any, *statuses: int) -> None:
    assert response.status_code in statuses, (response.status_code, response.text[:300])
    assert "Traceback" not in response.text and 'File "' not in response.text
    assert response.json()["error"]["message"]


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "localhost@evil.example", "", "a:b:c", "[::1"]
)
def test_another_host_is_refused(server: Server, host: str) -> None:
    """A page can make its own name point to this machine (DNS rebinding); the Host header gives it away."""
    assert_refused(server.request("GET", "/api/info", headers={"Host": host}), 400, 421)


def test_several_hosts_are_refused(server: Server) -> None:
    head = f"GET /api/info HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nHost: evil.example\r\n\r\n"
    assert raw(server, head.encode()).split()[1] == b"400"


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://127.0.0.1:1", "http://localhost.evil.example"]
)
def test_posts_of_another_site_are_refused(server: Server, origin: str) -> None:
    for path in ("/api/jobs", "/api/uploads", "/v1/images/generations", "/sdapi/v1/interrupt", "/login"):
        assert_refused(server.request("POST", path, json=DRAFT, headers={"Origin": origin}), 403)
    assert_refused(server.request("DELETE", "/api/images/x", headers={"Origin": origin}), 403)
    assert_refused(server.request("POST", "/api/jobs", json=DRAFT, headers={"Sec-Fetch-Site": "cross-site"}), 403)
    preflight = server.request(
        "OPTIONS", "/api/jobs", headers={"Origin": origin, "Access-Control-Request-Method": "POST"}
    )
    assert "access-control-allow-origin" not in preflight.headers


def test_a_refusal_arrives_though_the_body_is_late(server: Server) -> None:
    """A connection that is closed before the body has arrived is reset, and the client loses the response."""
    head = (
        f"POST /api/jobs HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nOrigin: https://evil.example\r\n"
        "Content-Type: application/json\r\nContent-Length: 4\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", server.port), 30) as connection:
        connection.sendall(head.encode())
        for part in (b"{", b" ", b" ", b"}"):
            time.sleep(0.1)
            connection.sendall(part)
        assert connection.recv(65536).split()[1] == b"403"


def test_a_refusal_does_not_wait_for_a_body_that_never_comes(server: Server) -> None:
    head = (
        f"POST /api/jobs HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nOrigin: https://evil.example\r\n"
        "Content-Length: 4\r\n\r\n{"
    )
    start = time.monotonic()
    assert raw(server, head.encode()).split()[1] == b"403"
    assert time.monotonic() - start < 10


def test_the_own_origin_is_accepted(server: Server) -> None:
    server.request("POST", "/sdapi/v1/interrupt", 200, headers={"Origin": server.address})


@pytest.mark.parametrize(
    "path",
    [
        "/studio/../settings.py",
        "/studio/%2e%2e/settings.py",
        "/studio/..%2f..%2f..%2fetc/passwd",
        "/studio/%2fetc%2fpasswd",
        "/studio/..\\settings.py",
        "/api/uploads/..%2f..%2fdatabase.sqlite3",
        "/api/images/..%2f..%2f..%2fserver.lock/file",
        "/api/images/%00/file",
    ],
)
def test_path_names_lead_nowhere(server: Server, path: str) -> None:
    answer = raw(server, f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nConnection: close\r\n\r\n".encode())
    assert answer.split()[1] in (b"404", b"400", b"422"), answer
    assert b"Traceback" not in answer and b"root:" not in answer


def test_guessed_ids_find_nothing(server: Server) -> None:
    for path in ("images/AAAAAAAAAAAAAAAAAAAAAA", "images/1", "jobs/1", "uploads/1", "jobs/1/events"):
        assert_refused(server.request("GET", f"/api/{path}"), 404)


def bomb(side: int) -> bytes:
    """Return a PNG file of a few bytes per thousand pixels."""
    rows = zlib.compress(b"\0" * (side * (side // 8 + 1)), 9)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def text_bomb() -> bytes:
    """Return a PNG file whose compressed text is large."""
    info = PngInfo()
    info.add_text("parameters", "a" * 30_000_000, zip=True)
    content = io.BytesIO()
    Image.new("RGB", (8, 8)).save(content, "PNG", pnginfo=info)
    return content.getvalue()


POSING: dict[str, bytes] = {
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>',
    "html": b"<!doctype html><script>alert(1)</script>",
    "png and html": b"\x89PNG\r\n\x1a\n<script>alert(1)</script>",
    "empty": b"",
    "cut": png(size=(64, 64))[:60],
    "damaged": png(size=(64, 64)).replace(b"IDAT", b"IDAX"),
    "gif": b"GIF89a\x01\x00\x01\x00\x00\x00\x00,\x00\x00\x00\x00\x01\x00\x01\x00\x00\x02\x02D\x01\x00;",
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n",
    "bomb": bomb(20_000),
    "wide": struct.pack(">8sI4sIIBBBBBI", b"\x89PNG\r\n\x1a\n", 13, b"IHDR", 2**31 - 1, 1, 8, 2, 0, 0, 0, 0),
}


@pytest.mark.parametrize("name", POSING)
def test_what_is_no_picture_is_refused(server: Server, name: str) -> None:
    content, begin = POSING[name], time.monotonic()
    assert_refused(
        server.request("POST", "/api/uploads", data=content, headers={"Content-Type": "image/png"}), 415, 422
    )
    assert_refused(server.request("POST", "/api/recipes", data=content), 415, 422)
    encoded = base64.b64encode(content).decode()
    assert_refused(server.request("POST", "/sdapi/v1/png-info", json={"image": encoded or "!"}), 415, 422)
    assert time.monotonic() - begin < 5


def test_a_bomb_of_text_is_harmless(server: Server) -> None:
    response = server.request("POST", "/api/recipes", data=text_bomb())
    assert_refused(response, 415, 422)


def hostile_recipe(**changes: Any) -> bytes:
    recipe = {
        "format": 1, "seeds": [5], "model": "embedded", "model_digest": "0", "scheduler": "DDPMScheduler", "steps": 2,
        "prior_steps": 2, "guidance": 2.0, "prior_guidance": 2.0, "width": 64, "height": 64, "device": "cpu",
        "dtype": "float32", "hardware": "x", "versions": {}, "command": "generate", "prompt": "a star", **changes,
    }  # fmt: skip
    info = PngInfo()
    info.add_itxt("kandinsky22", changes["text"] if "text" in changes else json.dumps(recipe))
    content = io.BytesIO()
    Image.new("RGB", (8, 8)).save(content, "PNG", pnginfo=info)
    return content.getvalue()


HOSTILE: dict[str, dict[str, Any]] = {
    "not json": {"text": "{"},
    "deep": {"text": "[" * 100_000},
    "steps": {"steps": 10**9},
    "size": {"width": 10**6},
    "command": {"command": "../x"},
    "type": {"prompt": {"a": 1}},
    "infinite": {"guidance": 1e999},
    "unknown": {"surprise": 1},
    "other command": {"command": "compare"},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_recipes_are_refused(server: Server, name: str) -> None:
    assert_refused(server.request("POST", "/api/recipes", data=hostile_recipe(**HOSTILE[name])), 422)


def test_recipes_name_files_of_nobody(server: Server) -> None:
    """A path in a recipe is never opened: only the digest of an input picture is looked up."""
    content = hostile_recipe(command="img2img", image={"name": "/etc/passwd", "sha256": "0" * 64}, strength=0.5)
    answer = server.request("POST", "/api/recipes", 200, data=content).json()
    assert answer["missing"] == ["image"] and "image" not in answer["request"]


def test_large_bodies_are_refused_early(server: Server) -> None:
    head = f"POST /api/uploads HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nContent-Length: {200 * 2**20}\r\n\r\n"
    assert raw(server, head.encode()).split()[1] == b"413"  # before any of the body has been sent

    def endless() -> Iterator[bytes]:
        for _ in range(200):
            yield b"\0" * 2**20

    try:
        response = server.request("POST", "/api/uploads", data=endless())
        assert_refused(response, 413)
    except (ConnectionError, OSError):
        pass  # the server had closed the connection while the client was still sending
    limit = server.get("/api/info")["limits"]["max_upload_bytes"]
    assert_refused(server.request("POST", "/api/uploads", data=b"\0" * (limit + 1)), 413)
    assert_refused(server.request("POST", "/api/jobs", json={"prompt": "a" * 20_000}), 422)


def test_bodies_that_are_not_json_are_refused(server: Server) -> None:
    for content in (b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000, b'{"prompt": 1}', b'{"seed": 1e400}', b"null"):
        assert_refused(
            server.request("POST", "/api/jobs", data=content, headers={"Content-Type": "application/json"}), 400, 422
        )
    for content in (b"", b"--x\r\n", b"--x--"):
        headers = {"Content-Type": "multipart/form-data; boundary=x"}
        assert_refused(server.request("POST", "/v1/images/edits", data=content, headers=headers), 400, 422)
    assert_refused(
        server.request("POST", "/v1/images/edits", data=b"x", headers={"Content-Type": "multipart/form-data"}), 400
    )


def test_json_under_another_media_type_is_explained(server: Server) -> None:
    """As curl sends it without the header."""
    for kind in (None, "application/x-www-form-urlencoded", "text/plain"):
        response = server.request("POST", "/api/jobs", 415, data=b'{"prompt": "a"}', headers={"Content-Type": kind})
        assert "Content-Type: application/json" in response.json()["error"]["message"]


def test_every_response_has_the_security_headers(server: Server) -> None:
    for path in ("/", "/api/info", "/nothing", "/docs"):
        headers = server.request("GET", path).headers
        assert headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'")
        assert headers["x-content-type-options"] == "nosniff" and headers["x-frame-options"] == "DENY"
        assert "server" not in headers
    uploaded = server.upload(png())
    assert server.request("GET", uploaded["url"]).headers["content-type"] == "image/png"


def test_uploads_lose_their_metadata_on_the_way_out(server: Server) -> None:
    info = PngInfo()
    info.add_text("secret", "where I live")
    content = io.BytesIO()
    Image.new("RGB", (8, 8)).save(content, "PNG", pnginfo=info)
    uploaded = server.upload(content.getvalue())
    assert b"secret" not in server.request("GET", uploaded["url"], 200).content


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    options = ["--allow-origin", "https://friend.example", "--allow-urls-from", "localhost"]
    with running(tmp_path_factory.mktemp("guarded"), *options, "--body-seconds", "1", token=TOKEN) as started:
        yield started


def test_without_the_token_nothing_opens(guarded: Server) -> None:
    session, guarded.session = guarded.session, type(guarded.session)()
    try:
        for method, path in (
            ("GET", "/api/info"),
            ("GET", "/metrics"),
            ("POST", "/api/jobs"),
            ("GET", "/openapi.json"),
        ):
            assert_refused(guarded.request(method, path), 401)
            assert_refused(guarded.request(method, path, headers={"Authorization": "Bearer wrong"}), 401)
        guarded.request("GET", "/", 200)
        guarded.request("GET", "/healthz", 200)
        assert_refused(guarded.request("POST", "/login", json={"token": "wrong"}), 401)
        answer = guarded.request("POST", "/login", 204, json={"token": TOKEN})
        cookie = answer.headers["set-cookie"].lower()
        assert "httponly" in cookie and "samesite=strict" in cookie
        guarded.request("GET", "/api/info", 200)  # by the cookie
    finally:
        guarded.session = session
    guarded.request("GET", "/api/info", 200)


def test_guesses_of_the_token_are_limited(tmp_path: Path) -> None:
    with running(tmp_path, token=TOKEN) as server:
        for number in range(10):
            answer = server.request("POST", "/login", json={"token": f"guess {number}"})
            assert_refused(answer, 401, 429)
        assert_refused(server.request("POST", "/login", json={"token": TOKEN}), 429)
        blocked = server.request("GET", "/api/info")
        assert_refused(blocked, 429)
        assert 0 < int(blocked.headers["retry-after"]) <= 60


def test_bodies_without_a_token_are_small(guarded: Server) -> None:
    assert_refused(guarded.request("POST", "/login", json={"token": "x" * 2**15}), 413)


def test_an_allowed_site_may_call(guarded: Server) -> None:
    headers = {"Origin": "https://friend.example"}
    answer = guarded.request("GET", "/api/info", 200, headers=headers)
    assert answer.headers["access-control-allow-origin"] == "https://friend.example"
    guarded.request("POST", "/sdapi/v1/interrupt", 200, headers=headers)


def test_slow_bodies_and_heads_are_cut_off(guarded: Server) -> None:
    begin = time.monotonic()
    head = (
        f"POST /api/uploads HTTP/1.1\r\nHost: 127.0.0.1:{guarded.port}\r\nAuthorization: Bearer {TOKEN}\r\n"
        "Content-Length: 1000\r\n\r\nabc"
    )
    assert raw(guarded, head.encode()).split()[1] == b"408"
    assert raw(guarded, b"GET /healthz HTTP/1.1\r\nHost:") == b""  # the rest of the head does not come
    assert time.monotonic() - begin < 10


class _Pictures(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(302 if "redirect" in self.path else 200)
        self.send_header("Location", "http://127.0.0.1/")
        self.end_headers()
        self.wfile.write(png(size=(64, 64)))

    def log_message(self, *arguments: object) -> None:
        pass


def test_addresses_are_fetched_from_allowed_hosts_only(guarded: Server) -> None:
    pictures = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Pictures)
    threading.Thread(target=pictures.serve_forever, daemon=True).start()
    try:
        port = pictures.server_address[1]
        for host, path, status in (
            ("localhost", "x.png", 200),
            ("localhost", "redirect", 422),
            ("127.0.0.1", "x.png", 422),
        ):
            answer = guarded.request("POST", "/sdapi/v1/png-info", json={"image": f"http://{host}:{port}/{path}"})
            assert answer.status_code == status, answer.text
    finally:
        pictures.shutdown()


def test_another_address_needs_a_token(tmp_path: Path) -> None:
    expected = "expected a loopback address, unless a token is set"
    with pytest.raises(AssertionError, match=expected), running(tmp_path, "--host", "0.0.0.0"):
        pass


def test_two_servers_do_not_share_a_folder(guarded: Server) -> None:
    assert guarded.process is not None
    expected = f"in use by another server, process {guarded.process.pid}"
    with pytest.raises(AssertionError, match=expected), running(guarded.state):
        pass


@pytest.mark.parametrize("others", ['prefs={"theme":"dark"}', "a=hello world", "n=J\u00fcrgen", "path", "secure=1; x"])
def test_the_token_is_found_among_cookies_of_other_programs(others: str) -> None:
    """Browsers send the cookies of a host to all its ports."""
    headers = {"host": "127.0.0.1:7822"}
    cookie = f'{others}; kandinsky22_token_7821=other; {cookie_name(headers)}="{TOKEN}"'
    assert presented_tokens({**headers, "cookie": cookie}) == [TOKEN]
    assert presented_tokens({"host": "127.0.0.1:9", "cookie": cookie}) == []
