"""A real server in a process of its own, with the embedded model."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import requests

START_SECONDS = 300.0
DRAFT = {"mode": "generate", "prompt": "a red circle", "quality": "draft", "steps": 2, "prior_steps": 2, "seed": 5}


class Server:
    """A running server.

    Attributes:
        address: Its address.
        state: Its state folder.
    """

    def __init__(self, state: Path, *options: object, token: str | None = None) -> None:
        self.state, self._options, self.token = state, options, token
        self.address = ""
        self.session = requests.Session()
        if token is not None:
            self.session.headers["Authorization"] = f"Bearer {token}"
        self.process: subprocess.Popen[str] | None = None
        self.log: list[str] = []

    def start(self, port: int = 0) -> None:
        """Start the process, and return when it accepts connections."""
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "KANDINSKY22_CACHE": ""}
        environment |= {"OMP_NUM_THREADS": "1", "KANDINSKY22_CONFIG": str(self.state / "none.toml")}
        if self.token is not None:
            environment["KANDINSKY22_SERVE_TOKEN"] = self.token
        command = [sys.executable, "-m", "kandinsky22", "serve", "--state", str(self.state), "--port", str(port)]
        self.process = subprocess.Popen(
            [*command, *map(str, self._options)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, args=(self.process, lines), daemon=True).start()
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            with contextlib.suppress(queue.Empty):
                line = lines.get(timeout=0.2)
                if line.startswith("kandinsky22 serves at "):
                    self.address = line.split()[-1]
                    return
            if self.process.poll() is not None:
                raise AssertionError(f"the server has ended: {''.join(self.log)}")
        raise AssertionError(f"the server does not start: {''.join(self.log)}")

    def _read(self, process: subprocess.Popen[str], lines: queue.Queue[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self.log.append(line)
            lines.put(line)

    def stop(self, signal_number: int = signal.SIGTERM) -> None:
        """End the process."""
        if self.process is not None:
            self.process.send_signal(signal_number)
            self.process.wait(30)

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    def worker_pids(self) -> list[int]:
        """Return the process ids of the server's workers."""
        assert self.process is not None
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                parent = int(folder.joinpath("stat").read_text().rpartition(")")[2].split()[1])
                if parent == self.process.pid and b"spawn_main" in folder.joinpath("cmdline").read_bytes():
                    found.append(int(folder.name))
        return found

    def request(self, method: str, path: str, status: int | None = None, **options: Any) -> requests.Response:
        """Return the response of a request; with `status`, assert that it has this status."""
        response = self.session.request(method, self.address + path, timeout=120, **options)
        if status is not None:
            assert response.status_code == status, (response.status_code, response.text[:1000])
        return response

    def get(self, path: str, status: int | None = 200, **options: Any) -> Any:
        return self.request("GET", path, status, **options).json()

    def post(self, path: str, body: Any = None, status: int | None = 201, **options: Any) -> Any:
        return self.request("POST", path, status, json=body, **options).json()

    def upload(self, content: bytes, status: int = 201) -> Any:
        return self.request("POST", "/api/uploads", status, data=content).json()

    def submit(self, status: int = 201, headers: dict[str, str] | None = None, **settings: Any) -> Any:
        """Queue a small job."""
        return self.post("/api/jobs", {**DRAFT, **settings}, status, headers=headers)

    def wait(self, job: str, seconds: float = 300) -> Any:
        """Return a job when it has ended."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            info = self.get(f"/api/jobs/{job}")
            if info["state"] in ("done", "failed", "cancelled"):
                return info
            time.sleep(0.05)
        raise AssertionError(f"job {job} has not ended: {self.get(f'/api/jobs/{job}')}; {''.join(self.log)}")

    def draw(self, **settings: Any) -> Any:
        """Queue a small job, and return it when it is done."""
        info = self.wait(self.submit(**settings)["id"])
        assert info["state"] == "done", info["error"]
        return info

    def wait_ready(self, seconds: float = START_SECONDS) -> None:
        """Return when a worker is ready."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.request("GET", "/readyz").status_code == 200:
                return
            time.sleep(0.1)
        raise AssertionError(f"no worker is ready: {''.join(self.log)}")

    def events(self, path: str, headers: dict[str, str] | None = None) -> Iterator[tuple[str, Any, int | None]]:
        """Yield (name, data, id) of server-sent events."""
        with self.session.get(self.address + path, stream=True, timeout=120, headers=headers) as response:
            assert response.status_code == 200, response.text
            fields: dict[str, str] = {}
            for line in response.iter_lines(chunk_size=1, decode_unicode=True):
                if line.startswith(":"):
                    continue
                if line:
                    name, _, value = line.partition(": ")
                    fields[name] = value
                elif fields:
                    number = fields.get("id")
                    yield fields["event"], json.loads(fields["data"]), None if number is None else int(number)
                    fields = {}


@contextlib.contextmanager
def running(state: Path, *options: object, token: str | None = None) -> Iterator[Server]:
    """Run a server for a while."""
    server = Server(state, *options, token=token)
    server.start()
    try:
        yield server
    finally:
        server.stop()
