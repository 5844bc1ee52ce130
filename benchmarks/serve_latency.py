"""What the server adds to a generation: time to the first page, to the first progress, and from submission to image.

`python -m benchmarks.serve_latency` starts a server with the embedded model. Each round measures one generation in this
process and the same generation by the server, in turn. Run it on quiet cores.
"""

from __future__ import annotations

import argparse
import io
import re
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.serve.server import Server, running

from kandinsky22.cli.command_inputs import CommandInputs
from kandinsky22.cli.main import build_parser
from kandinsky22.cli.request import read_request
from kandinsky22.generation.modes import MODES
from kandinsky22.generation.session import Session

PROMPT, QUALITY = "a red circle to the left of a blue square", "balanced"
LINKS = re.compile(r"""(?:src|href)="(/[^"#]*)\"""")


def first_page(server: Server) -> tuple[float, int]:
    """Return seconds and bytes of the first page with what its HTML names. A browser loads imported scripts too."""
    start = time.perf_counter()
    page = server.request("GET", "/", 200)
    parts = [server.request("GET", path, 200) for path in LINKS.findall(page.text)]
    return time.perf_counter() - start, sum(len(part.content) for part in (page, *parts))


def in_process(session: Session, request: Any, seed: int) -> float:
    """Return the seconds of a generation in this process, its PNG file included."""
    start = time.perf_counter()
    result = session.prepare(MODES["generate"], request, {}).generate(seed)
    result.image.save(io.BytesIO(), "PNG")
    return time.perf_counter() - start


def by_server(server: Server, seed: int) -> tuple[float, float]:
    """Return the seconds from the start of a job to its first progress, and from submission to the image's bytes."""
    start = time.perf_counter()
    body = {"mode": "generate", "prompt": PROMPT, "quality": QUALITY, "seed": seed}
    job = server.post("/api/jobs", body)
    started = progress = start
    url = ""
    for name, data, _ in server.events(f"/api/jobs/{job['id']}/events"):
        now = time.perf_counter()
        if name == "job" and data["state"] == "running" and started == start:
            started = now
        if name == "progress" and progress == start:
            progress = now
        if name == "image":
            url = data["url"]
        if name == "end":
            break
    server.request("GET", url, 200)
    return progress - started, time.perf_counter() - start


def main() -> None:
    """Measure, and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    arguments = build_parser().parse_args(["generate", PROMPT, "--quality", QUALITY, "--seed", "1"])
    request = read_request(arguments, None, CommandInputs(None))
    session = Session(MODES["generate"], request)
    session.hide_progress_bars()
    with tempfile.TemporaryDirectory() as folder, running(Path(folder)) as server:
        seconds, size = first_page(server)
        server.wait_ready()
        in_process(session, request, 0)
        by_server(server, 0)
        alone, progress, served = [], [], []
        for seed in range(1, rounds + 1):
            alone.append(in_process(session, request, seed))
            first, whole = by_server(server, seed)
            progress.append(first)
            served.append(whole)
    overhead = [whole - own for whole, own in zip(served, alone, strict=True)]
    print(f"first page: {seconds:.2f} s, {size} bytes")
    print(
        f"first progress after the start of a job: median {statistics.median(progress):.3f} s, "
        f"longest {max(progress):.3f} s"
    )
    print(f"generation in one process: median {statistics.median(alone):.2f} s")
    print(
        f"submission to image: median {statistics.median(served):.2f} s, "
        f"{statistics.median(overhead):.3f} s more, at most {max(overhead):.3f} s more"
    )


if __name__ == "__main__":
    main()
