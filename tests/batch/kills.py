"""Kill runs at random moments, start them again, and compare the result with an uninterrupted run.

`make batch-kills N=20` does it with the embedded model; ROWS, WORKERS and FORMAT select other runs. Tests do it with
stand-ins for the networks.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from kandinsky22.batch.formats import shard_digest

COLOURS = ("red", "blue", "green", "yellow", "purple", "orange", "white")
SHAPES = ("circle", "square", "star", "triangle")


def write_prompts(path: Path, count: int) -> None:
    """Write a JSONL file of prompts."""
    with path.open("w") as file:
        for number in range(count):
            prompt = f"a {COLOURS[number % 7]} {SHAPES[number % 4]} on a {COLOURS[(number // 7) % 7]} background"
            file.write(json.dumps({"id": f"row{number}", "prompt": prompt}) + "\n")


def contents(folder: Path) -> dict[str, str]:
    """Return the digest of every file of a run, except for the manifest: its times differ."""
    return {
        str(path.relative_to(folder)): shard_digest(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "manifest.jsonl"
    }


def entries(folder: Path) -> list[dict[str, object]]:
    """Return the shards of a manifest, without what differs between runs."""
    lines = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    shards = [{name: line[name] for name in ("shard", "name", "sha256", "pictures")} for line in lines[1:]]
    return sorted(shards, key=lambda entry: int(entry["shard"]))


def children(process: int) -> list[int]:
    """Return the processes that a process has started."""
    with open(f"/proc/{process}/task/{process}/children") as file:
        return [int(number) for number in file.read().split()]


def command_line(process: int) -> bytes:
    """Return the arguments of a process, with a null byte after each."""
    return Path(f"/proc/{process}/cmdline").read_bytes()


def workers_of(process: int) -> list[int]:
    """Return the worker processes of a run; multiprocessing also starts a tracker of resources, which draws nothing."""
    found: list[int] = []
    with contextlib.suppress(OSError):  # processes end meanwhile
        for child in children(process):
            command = command_line(child)
            if b"spawn_main" in command or b"ray::MapWorker" in command:
                found.append(child)
            found += workers_of(child)
    return found


def run_with_kills(
    command: Sequence[str], output: Path, kills: int, longest: float, seed: int, *, workers_too: bool = False
) -> dict[str, int]:
    """Start a command until it ends by itself, killing it at random moments.

    Args:
        command: The command.
        output: Its output folder. Three kills of four wait until another shard is finished: starting takes long, and
            most moments would be before the first one.
        kills: Number of kills.
        longest: Longest time before a kill, in seconds.
        seed: Seed of the moments.
        workers_too: Whether every second kill concerns a worker process instead of the driver.
    """
    generator = random.Random(seed)
    counts = {"driver": 0, "worker": 0, "starts": 0}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    while True:
        counts["starts"] += 1
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        while counts["driver"] + counts["worker"] < kills:
            if generator.random() < 0.75:
                await_progress(process, output / "manifest.jsonl")
            try:
                process.wait(timeout=generator.uniform(0, longest))
                break
            except subprocess.TimeoutExpired:
                pass
            victims = workers_of(process.pid) if workers_too and generator.random() < 0.5 else []
            if victims:
                os.kill(generator.choice(victims), signal.SIGKILL)
                counts["worker"] += 1
                continue
            process.kill()
            counts["driver"] += 1
            break
        _, errors = process.communicate()
        if process.returncode != -signal.SIGKILL:
            if process.returncode:
                raise AssertionError(errors.decode()[-3000:])
            if counts["driver"] + counts["worker"] >= kills or process.returncode == 0:
                return counts


def await_progress(process: subprocess.Popen[bytes], manifest: Path) -> None:
    """Wait until a process has written to its manifest, or has ended."""
    before = manifest.stat() if manifest.exists() else None
    while process.poll() is None:
        now = manifest.stat() if manifest.exists() else None
        if now is not None and before is not None and now.st_size > before.st_size:
            return
        before = before or now
        time.sleep(0.02)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--shard-size", type=int, default=20)
    parser.add_argument("--longest", type=float, default=40.0)
    parser.add_argument("--format", default="webdataset")
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--ray", action="store_true")
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp(prefix="batch-kills-"))
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "prompts.jsonl"
    write_prompts(source, args.rows)
    command = [sys.executable, "-m", "kandinsky22", "batch", str(source), "--quality", "draft"]
    command += ["--shard-size", str(args.shard_size), "--batch-size", "8", "--format", args.format, "-q"]
    started = time.monotonic()
    subprocess.run([*command, "-o", str(folder / "whole")], check=True, stdout=subprocess.DEVNULL)
    seconds = time.monotonic() - started
    killed = [*command, "-o", str(folder / "killed"), *(["--ray"] if args.ray else ["--workers", str(args.workers)])]
    workers_too = args.ray or args.workers > 1
    counts = run_with_kills(killed, folder / "killed", args.kills, args.longest, args.seed, workers_too=workers_too)
    print(json.dumps(counts))
    shards = entries(folder / "killed")
    pictures = sum(int(str(entry["pictures"])) for entry in shards)
    result = {
        "rows": args.rows,
        "pictures": pictures,
        "kills": counts,
        "equal files": contents(folder / "killed") == contents(folder / "whole"),
        "equal manifests": shards == entries(folder / "whole"),
        "seconds of the uninterrupted run": round(seconds, 1),
    }
    print(json.dumps(result))
    all_killed = counts["driver"] + counts["worker"] == args.kills  # a run may end before; then more rows are needed
    sys.exit(not (result["equal files"] and result["equal manifests"] and pictures == args.rows and all_killed))


if __name__ == "__main__":
    main()
