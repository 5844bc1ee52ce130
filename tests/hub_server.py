"""A small Hub server on this machine, for tests of downloads."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves the folders of `root` as repositories owner/name, and lists the files that were fetched."""

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.root = root
        self.fetched: list[str] = []
        self.tokens: set[str | None] = set()
        self.up = True
        self.ranges: list[str] = []
        self.cut_after: int | None = None  # bytes of a file after which the next answer ends
        self.corrupt: set[str] = set()  # files whose content arrives with another first byte


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        self.server.tokens.add(self.headers.get("Authorization"))
        path = self.path.split("?")[0].strip("/")
        status, headers, content = 404, {"X-Error-Code": "RepoNotFound"}, b""
        if not self.server.up:
            status, headers = 503, {}
        elif path.startswith("api/models/"):
            owner, name, *rest = path.removeprefix("api/models/").split("/")
            folder = self.server.root / owner / name
            if rest[:1] == ["revision"] and rest[1] not in ("main", COMMIT):
                headers = {"X-Error-Code": "RevisionNotFound"}
            elif folder.is_dir():
                files = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
                about: Any = {"id": f"{owner}/{name}", "sha": COMMIT, "siblings": [{"rfilename": f} for f in files]}
                if rest[:1] == ["tree"]:
                    sizes = [(f, (folder / f).stat().st_size) for f in files]
                    about = [{"type": "file", "path": f, "size": size, "oid": "0"} for f, size in sizes]
                status, headers, content = 200, {"Content-Type": "application/json"}, json.dumps(about).encode()
        else:
            owner, name, _, _, inside = path.split("/", 4)
            file = self.server.root / owner / name / inside
            headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}
            if file.is_file():
                content = file.read_bytes()
                status = 200
                headers = {"ETag": f'"{etag(inside, content)}"', "X-Repo-Commit": COMMIT}
                if body:
                    self.server.fetched.append(inside)
                    if inside in self.server.corrupt:
                        content = bytes([content[0] ^ 1]) + content[1:]
                    if match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
                        self.server.ranges.append(f"{inside} {match[1]}")
                        start, total = int(match[1]), len(content)
                        status, content = 206, content[start:]
                        headers["Content-Range"] = f"bytes {start}-{total - 1}/{total}"
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            cut = self.server.cut_after if status in (200, 206) and "ETag" in headers else None
            if cut is not None and len(content) > cut:
                self.wfile.write(content[:cut])
                self.server.cut_after = None
                self.close_connection = True
                return
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


def etag(name: str, content: bytes) -> str:
    """Return the digest that the Hub uses: SHA-256 in its large storage, git's SHA-1 otherwise."""
    if name.endswith((".safetensors", ".bin")):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextlib.contextmanager
def serving(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Run a server of the folders of `root`, and let the Hub client use it."""
    server = Hub(root)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
