"""A browser and a server for the tests of the studio and for its screenshots."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw
from playwright.sync_api import Browser, ConsoleMessage, Page, Playwright, Request, Response

import kandinsky22

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def find_chromium() -> str | None:
    """Return the path of the installed Chromium, or None."""
    named = os.environ.get("KANDINSKY22_CHROMIUM")
    return named or next((path for name in NAMES if (path := shutil.which(name))), None)


def launch(playwright: Playwright) -> Browser:
    """Start the installed Chromium."""
    return playwright.chromium.launch(executable_path=find_chromium(), args=list(FLAGS))


class StudioServer:
    """A server in a process of its own, which can be killed and started again with the same state and port."""

    def __init__(self, state: Path, token: str | None = None, options: tuple[str, ...] = ()) -> None:
        self.state = state
        self.token = token
        self.options = options
        with contextlib.closing(socket.socket()) as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"
        self.log = state.with_suffix(".log")
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the server and wait until a worker can take jobs, or until it answers if it needs a token."""
        package = Path(kandinsky22.__file__).parents[1]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "KANDINSKY22_CACHE": "", "PYTHONPATH": str(package)}
        command = [sys.executable, "-m", "kandinsky22", "serve", "--port", str(self.port), "--state", str(self.state)]
        command += [*([] if self.token is None else ["--token", self.token]), *self.options]
        path = "/readyz" if self.token is None else "/healthz"
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError, http.client.HTTPException):
                if self.call("GET", path, check=False)[0] == 200:
                    return
            if self._process.poll() is not None:
                break
            time.sleep(0.1)
        raise AssertionError(f"the server does not start: {self.log.read_text()[-2000:]}")

    def kill(self) -> None:
        """Kill the server as a power cut would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def stop(self) -> None:
        """End the server."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self.kill()

    def call(self, method: str, path: str, body: Any = None, *, check: bool = True) -> tuple[int, Any]:
        """Return status and body of a request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        with contextlib.closing(connection):
            content = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
            headers = (
                {} if body is None else {"Content-Type": "image/png" if isinstance(body, bytes) else "application/json"}
            )
            connection.request(method, path, content, headers)
            response = connection.getresponse()
            text = response.read()
            is_json = "json" in (response.getheader("Content-Type") or "")
            answer = json.loads(text) if is_json and text else text
            assert not check or response.status < 400, (response.status, answer)
            return response.status, answer

    def make(self, **request: Any) -> Any:
        """Return a finished job."""
        _, job = self.call("POST", "/api/jobs", {"mode": "generate", "quality": "draft", **request})
        return self.wait(job["id"])

    def wait(self, job_id: str, seconds: float = 120) -> Any:
        """Return a job when it has ended."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            _, job = self.call("GET", f"/api/jobs/{job_id}")
            if job["state"] in ("done", "failed", "cancelled"):
                return job
            time.sleep(0.05)
        raise AssertionError(f"job {job_id} does not end: {job}")

    def jobs(self) -> list[Any]:
        """Return the newest jobs."""
        return list(self.call("GET", "/api/jobs?limit=50")[1]["items"])


class Watched:
    """What a page does: its messages, its errors and all its requests."""

    def __init__(self, page: Page, address: str) -> None:
        self.page = page
        self.address = address
        self.messages: list[str] = []
        self.foreign: list[str] = []
        page.on("console", self._message)
        page.on("pageerror", lambda error: self.messages.append(f"error: {error}"))
        page.on("request", self._request)

    def collect_responses(self) -> list[Response]:
        """Return a list that receives the responses from now on, except endless ones."""
        responses: list[Response] = []
        self.page.on("response", lambda one: None if one.url.endswith("/api/events") else responses.append(one))
        return responses

    def _message(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.messages.append(f"{message.type}: {message.text} ({message.location.get('url')})")

    def _request(self, request: Request) -> None:
        if not request.url.startswith((self.address, "data:", "blob:")):
            self.foreign.append(request.url)


@contextlib.contextmanager
def running_server(state: Path, token: str | None = None, options: tuple[str, ...] = ()) -> Iterator[StudioServer]:
    """Run a server until the block ends."""
    server = StudioServer(state, token, options)
    try:
        server.start()
        yield server
    finally:
        server.stop()


def scene(size: int = 128) -> bytes:
    """Return the PNG of a red circle on yellow."""
    image = Image.new("RGB", (size, size), (235, 205, 60))
    ImageDraw.Draw(image).ellipse((size // 4, size // 4, 3 * size // 4, 3 * size // 4), fill=(200, 40, 40))
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


def mask_png(size: int = 128, side: int = 32) -> bytes:
    """Return the PNG of a mask with a white square."""
    image = Image.new("L", (size, size))
    image.paste(255, (16, 16, 16 + side, 16 + side))
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()
