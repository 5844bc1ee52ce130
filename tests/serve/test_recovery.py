"""Killed workers and servers lose nothing, double nothing, and change no picture.

`make serve-kills` repeats it with 20 kills of the worker and 10 of the server, `make serve-load` sends 400 jobs from 20
clients.
"""

from __future__ import annotations

import concurrent.futures
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from tests.serve.server import Server, running

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
KILLS = int(os.environ.get("KANDINSKY22_SERVE_KILLS", "0"))
LOAD = int(os.environ.get("KANDINSKY22_SERVE_LOAD", "0"))
SEED = int(os.environ.get("KANDINSKY22_SERVE_SEED", "0"))


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Server]:
    """A server that the test may end."""
    with running(tmp_path / "state") as started:
        started.wait_ready()
        yield started


def settings_of(number: int) -> dict[str, Any]:
    return {"seed": number, "steps": 2 + number % 3, "count": 1 + number % 2, "prompt": f"a star, number {number}"}


def digests(server: Server, jobs: list[str]) -> dict[str, list[str]]:
    """Return the digests of the pictures of finished jobs, by prompt."""
    found = {}
    for job in jobs:
        info = server.wait(job, 600)
        assert info["state"] == "done", info
        assert [image["seed"] for image in info["images"]] == [
            info["request"]["seed"] + index for index in range(info["request"]["count"])
        ]
        found[info["request"]["prompt"]] = [image["sha256"] for image in info["images"]]
    return found


def assert_files_are_the_rows(server: Server) -> None:
    """Assert that each picture on the disk is in the gallery, and the other way round, without leftovers."""
    on_disk = {path.stem for path in (server.state / "images").rglob("*.png")}
    leftovers = [path for path in server.state.rglob(".*") if path.is_file()]
    with sqlite3.connect(server.state / "database.sqlite3") as connection:
        rows = {row[0] for row in connection.execute("SELECT id FROM images")}
    assert on_disk == rows
    assert not leftovers


def wait_until_running(server: Server, job: str) -> None:
    for name, _, _ in server.events(f"/api/jobs/{job}/events"):
        if name in ("progress", "image", "end"):
            return


def test_a_killed_worker_costs_one_attempt_of_one_job(own: Server) -> None:
    jobs = [own.submit(**{**settings_of(number), "steps": 30})["id"] for number in range(2)]
    wait_until_running(own, jobs[0])
    (worker,) = own.worker_pids()
    os.kill(worker, signal.SIGKILL)
    first = digests(own, jobs)
    assert [own.get(f"/api/jobs/{job}")["attempts"] for job in jobs] == [2, 1]
    again = digests(own, [own.submit(**{**settings_of(number), "steps": 30})["id"] for number in range(2)])
    assert first == again
    assert_files_are_the_rows(own)


def test_a_job_that_always_kills_its_worker_fails(tmp_path: Path) -> None:
    """It fails as the server's fault, also for clients that wait for their picture."""
    calls = {
        "/v1/images/generations": {"prompt": "a red circle", "steps": 900},
        "/sdapi/v1/txt2img": {"prompt": "a red circle", "steps": 150, "n_iter": 9},
    }
    with running(tmp_path / "state", "--max-attempts", "1") as own, concurrent.futures.ThreadPoolExecutor() as pool:
        own.wait_ready()
        for path, body in calls.items():
            answer = pool.submit(own.request, "POST", path, json=body)
            while not (jobs := own.get("/api/jobs?state=running")["items"]):
                time.sleep(0.05)
            other = own.submit()["id"]
            wait_until_running(own, jobs[0]["id"])
            os.kill(own.worker_pids()[0], signal.SIGKILL)
            failed = own.wait(jobs[0]["id"])
            assert failed["state"] == "failed" and "ended unexpectedly" in failed["error"]["message"]
            assert failed["error"]["code"] == "worker_ended"
            assert answer.result().status_code == 500
            assert answer.result().json()["error"]["code"] == "worker_ended"
            assert own.wait(other)["state"] == "done"


def test_signals_to_the_whole_process_group_cost_no_attempt(own: Server) -> None:
    """Service managers and terminals send the signal that ends a server to its workers too."""
    job = own.submit(**{**settings_of(1), "steps": 300})["id"]
    wait_until_running(own, job)
    for number in (signal.SIGTERM, signal.SIGINT):
        for worker in own.worker_pids():
            os.kill(worker, number)
    time.sleep(1)
    own.stop()
    own.start()
    assert own.wait(job)["state"] == "done"
    assert own.get(f"/api/jobs/{job}")["attempts"] == 1


def test_a_killed_server_loses_nothing(own: Server) -> None:
    jobs = [own.submit(**settings_of(number))["id"] for number in range(4)]
    wait_until_running(own, jobs[1])
    workers, before = own.worker_pids(), time.monotonic()
    own.stop(signal.SIGKILL)
    for worker in workers:  # no worker outlives its server
        while Path(f"/proc/{worker}").exists() and time.monotonic() - before < 10:
            time.sleep(0.05)
        assert not Path(f"/proc/{worker}").exists()
    own.start()
    first = digests(own, jobs)
    assert max(own.get(f"/api/jobs/{job}")["attempts"] for job in jobs) == 1
    assert_files_are_the_rows(own)
    own.stop()
    assert own.process is not None and own.process.returncode in (0, -signal.SIGTERM)

    # The database is rebuilt from the pictures.
    own.start()
    image = own.get("/api/images")["items"][0]["id"]
    own.request("PATCH", f"/api/images/{image}", 200, json={"starred": True})
    own.stop()
    for path in own.state.glob("database.sqlite3*"):
        path.unlink()
    shutil.rmtree(own.state / "thumbnails")
    command = [sys.executable, "-m", "kandinsky22", "gallery", "rebuild", "--state", str(own.state)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.startswith(f"{own.state}: 6 images")
    own.start()
    assert digests(own, jobs) == first
    assert own.get(f"/api/images/{image}")["starred"] is True
    assert own.request("GET", f"/api/images/{image}/thumbnail").status_code == 200


@pytest.mark.slow
@pytest.mark.skipif(not KILLS, reason="make serve-kills")
def test_many_kills(tmp_path: Path) -> None:
    source = random.Random(SEED)
    count = 2 * KILLS
    with running(tmp_path / "calm") as calm:
        expected = digests(calm, [calm.submit(**settings_of(number))["id"] for number in range(count)])
    with running(tmp_path / "state", "--max-attempts", "10") as own:
        port, jobs = own.port, [own.submit(**settings_of(number))["id"] for number in range(count)]
        kinds = ["worker"] * KILLS + ["server"] * (KILLS // 2)
        source.shuffle(kinds)
        for kind in kinds:
            own.wait_ready()
            time.sleep(source.random() * 3)
            if kind == "worker":
                for worker in own.worker_pids():
                    os.kill(worker, signal.SIGKILL)
            else:
                own.stop(signal.SIGKILL)
                own.start(port)
            time.sleep(source.random())
        found = digests(own, jobs)
        assert_files_are_the_rows(own)
        assert len(own.get("/api/images", params={"limit": 500})["items"]) == sum(map(len, expected.values()))
        left = own.get("/api/jobs", params={"limit": 500})["items"]
        attempts = [job["attempts"] for job in left]
        print({"kills": len(kinds), "jobs": len(left), "attempts": sum(attempts), "most": max(attempts)})
    assert found == expected


@pytest.mark.slow
@pytest.mark.skipif(not LOAD, reason="make serve-load")
def test_many_clients(tmp_path: Path) -> None:
    with running(tmp_path / "state") as own:
        own.wait_ready()
        own.draw()
        assert own.process is not None
        processes = [own.process.pid, *own.worker_pids()]
        before = [resident_bytes(process) for process in processes]
        address, each = own.address, LOAD // 20

        def client(number: int) -> list[str]:
            ids = []
            with requests.Session() as session:
                for index in range(each):
                    body = {**settings_of(number), "mode": "generate", "quality": "draft", "priority": number % 2}
                    headers = {"Idempotency-Key": f"{number}-{index}"}
                    for _ in range(2):  # a client that repeats its request after a timeout
                        answer = session.post(f"{address}/api/jobs", json={**body, "prior_steps": 2}, headers=headers)
                        assert answer.status_code in (200, 201), answer.text
                    ids.append(answer.json()["id"])
            return ids

        begin = time.monotonic()
        with concurrent.futures.ThreadPoolExecutor(20) as pool:
            jobs = [job for ids in pool.map(client, range(20)) for job in ids]
        submitted = time.monotonic() - begin
        middle: list[int] = []
        while (counts := state_counts(own)).get("done", 0) < LOAD + 1:
            assert not counts.get("failed"), counts
            if not middle and counts.get("done", 0) > LOAD // 4:
                middle = [resident_bytes(process) for process in processes]
            time.sleep(0.5)
        seconds = time.monotonic() - begin
        after = [resident_bytes(process) for process in processes]
        assert len(set(jobs)) == LOAD
        with sqlite3.connect(own.state / "database.sqlite3") as connection:
            rows = connection.execute(
                "SELECT id, seq, priority, started_at FROM jobs WHERE seq > 1 ORDER BY started_at, seq"
            ).fetchall()
            doubled = connection.execute(
                "SELECT job, position FROM images GROUP BY 1, 2 HAVING COUNT(*) > 1"
            ).fetchall()
        assert {row[0] for row in rows} == set(jobs) and not doubled
        for priority in (0, 1):
            order = [row[1] for row in rows if row[2] == priority]
            assert order == sorted(order)
        figures = {"jobs": LOAD, "submitted in s": submitted, "done in s": seconds}
        print(
            figures
            | {
                "resident MB before, after a quarter, after": [
                    [b >> 20 for b in each] for each in (before, middle, after)
                ]
            }
        )
        for early, late in zip(middle, after, strict=True):
            assert late < early + 30 * 2**20
        assert_files_are_the_rows(own)


def state_counts(server: Server) -> dict[str, int]:
    text = server.request("GET", "/metrics", 200).text
    lines = [line for line in text.splitlines() if line.startswith("kandinsky22_jobs{")]
    return {line.split('"')[1]: int(float(line.split()[-1])) for line in lines}


def resident_bytes(process: int) -> int:
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) * 1024
    return 0
