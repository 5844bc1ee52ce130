"""Run generated cases in worker processes: ``python -m tests.fuzz --count 20000 --seed 1``.

Each escape is printed with its case, as a line for ``known_cases.jsonl``. A worker that crashes or hangs in native code
is reported and replaced. The exit code is 1 if anything escaped.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.fuzz.harness import TIME_LIMIT, case_of, check
from tests.fuzz.targets import NAMES, SHARES, targets_of
from tests.fuzz.world import World

MEMORY = 12 * 2**30  # bytes of address space of a worker
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}


def main() -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--count", type=int, default=2000, help="number of cases in all (2000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the cases (0)")
    parser.add_argument("--target", nargs="+", choices=NAMES, default=list(NAMES), help="targets (all)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="worker processes (one per core)")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    plan = schedule(options.count, options.target)
    if options.worker:
        return work(plan, options.seed, *(int(value) for value in options.worker))
    return lead(plan, options)


def schedule(count: int, names: list[str]) -> list[tuple[str, int]]:
    """Return all cases as target and index, those of all targets mixed."""
    total = sum(SHARES[name] for name in names)
    plan = [
        ((index + 0.5) / max(round(count * SHARES[name] / total), 1), name, index)
        for name in names
        for index in range(max(round(count * SHARES[name] / total), 1))
    ]
    return [(name, index) for _, name, index in sorted(plan)]


def work(plan: list[tuple[str, int]], seed: int, first: int, step: int, limit: int) -> int:
    """Run every `step`-th case from `first` on; write a line of JSON before each case and for each escape."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    with tempfile.TemporaryDirectory() as folder:
        targets = targets_of(World(Path(folder)))
        for number in range(first, limit, step):
            name, index = plan[number]
            report(at=number)
            # Native code that hangs cannot be interrupted: the process ends, and the leader reports the case.
            faulthandler.dump_traceback_later(2 * TIME_LIMIT, exit=True)
            finding = check(targets[name], case_of(targets[name], seed, index))
            faulthandler.cancel_dump_traceback_later()
            if finding:
                report(number=number, line=finding.line(), problem=finding.problem)
    report(end=True)
    return 0


def report(**values: object) -> None:
    """Write a line of JSON to the original standard output."""
    sys.__stdout__.write(json.dumps(values) + "\n")  # type: ignore[union-attr]
    sys.__stdout__.flush()  # type: ignore[union-attr]


def lead(plan: list[tuple[str, int]], options: argparse.Namespace) -> int:
    """Run the workers, print what escapes and return the exit code."""
    start = time.monotonic()
    with ThreadPoolExecutor(options.jobs) as threads:
        escaped = sum(threads.map(lambda job: supervise(job, plan, options), range(options.jobs)))
    print(f"{len(plan)} cases, seed {options.seed}: {escaped} escaped, {time.monotonic() - start:.0f} s")
    return int(escaped > 0)


def supervise(job: int, plan: list[tuple[str, int]], options: argparse.Namespace) -> int:
    """Run one worker, replace it after a crash, print what escapes and return the number of escapes."""
    escaped, first = 0, job
    while first < len(plan):
        last, ended = None, False
        command = [sys.executable, "-W", "ignore", "-m", "tests.fuzz", *sys.argv[1:]]
        command += ["--worker", str(first), str(options.jobs), str(len(plan))]
        with (
            tempfile.TemporaryFile("w+") as log,
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=ENVIRONMENT) as process,
        ):
            assert process.stdout is not None
            for line in process.stdout:
                if not line.startswith("{"):
                    continue  # native code of the tokenizer prints about keywords that it does not know
                message = json.loads(line)
                last, ended = message.get("at", last), ended or "end" in message
                if "line" in message:
                    escaped += 1
                    print(f"{message['line']}\n{message['problem']}\n", flush=True)
            process.wait()
            if ended:
                break
            log.seek(0)
            tail = log.read()[-1500:]
        if last is None:
            raise SystemExit(f"a worker did not start:\n{tail}")
        escaped += 1
        name, index = plan[last]
        print(f"{name} {index}: the worker ended with code {process.returncode}\n{tail}\n", flush=True)
        first = last + options.jobs
    return escaped


if __name__ == "__main__":
    raise SystemExit(main())
