"""Tables from measured rates: the simulation up to 64 workers, and the arithmetic of a million pictures.

`python -m benchmarks.batch_table` reads `benchmarks/results/batch.json` and prints Markdown; `--write` puts it into
`docs/how-to/batches.md`.
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.batch_rates import RESULT

PAGE = Path(__file__).parents[1] / "docs" / "how-to" / "batches.md"
SHARD = 100  # pictures per shard
STARTUP_SECONDS = 15.0  # of a worker process, which loads networks
MILLION = 1_000_000
EMBEDDING_BYTES = 2 * 1280 * 4 + 5056 + 256  # two embeddings of the published model, a generator's state, headers
PICTURE_BYTES_512 = 450_000


def simulate(
    workers: int, shards: int, service: Sequence[float], driver: float, generator: random.Random, startup: float
) -> float:
    """Return the seconds until all shards are finished.

    Workers take shards from one queue, as `draw_with_workers` and Ray Data give them. The driver reads rows and enters
    results one after the other.

    Args:
        workers: Number of workers.
        shards: Number of shards.
        service: Measured seconds per shard, from which each shard's time is drawn.
        driver: Seconds that the driver spends on a shard.
        generator: Source of the draws.
        startup: Seconds until a worker takes its first shard.
    """
    free = [startup] * workers
    driver_free = finished = 0.0
    for _ in range(shards):
        started = heapq.heappop(free)
        driver_free = max(driver_free, started) + driver
        end = driver_free + generator.choice(service)
        heapq.heappush(free, end)
        finished = max(finished, end)
    return finished


def efficiency(workers: int, result: dict[str, Any], pictures: int) -> float:
    """Return the speed of several workers relative to that many times one worker."""
    measured = result["workers"]["1"]["shard_seconds"]
    service = [seconds / 16 * SHARD for seconds in measured]
    driver, shards = result["driver_seconds_per_shard"], pictures // SHARD
    one = simulate(1, shards, service, driver, random.Random(0), STARTUP_SECONDS)
    many = simulate(workers, shards, service, driver, random.Random(0), STARTUP_SECONDS)
    return one / many / workers


def scaling_table(result: dict[str, Any]) -> str:
    """Return the simulated scaling as Markdown."""
    lines = ["| Workers | scaling efficiency, 100,000 pictures | scaling efficiency, a million |", "|---|---|---|"]
    for workers in (1, 2, 4, 8, 16, 32, 64):
        values = [efficiency(workers, result, pictures) for pictures in (100_000, MILLION)]
        lines.append(f"| {workers} | {values[0]:.3f} | {values[1]:.3f} |")
    return "\n".join(lines)


def million_table(result: dict[str, Any]) -> str:
    """Return hours and disk of a million pictures as Markdown."""
    rate = result["workers"]["1"]["rate"]
    size = result["workers"]["1"]["bytes_per_picture"]
    lines = ["| | one worker | 8 | 64 |", "|---|---|---|---|"]
    hours = [MILLION / rate / count / efficiency(count, result, MILLION) / 3600 for count in (1, 8, 64)]
    lines.append(f"| hours, embedded model, `draft`, {rate:.1f} pictures/s a worker | {_join(hours)} |")
    for seconds in (1.0, 4.0):
        hours = [MILLION * seconds / count / 3600 for count in (1, 8, 64)]
        lines.append(f"| hours at {seconds:g} s a picture | {_join(hours)} |")
    lines += [
        "",
        "| Disk for a million | GB |",
        "|---|---|",
        f"| pictures of 128 x 128, measured | {size * MILLION / 1e9:.0f} |",
        f"| pictures of 512 x 512, about 450 KB each | {PICTURE_BYTES_512 * MILLION / 1e9:.0f} |",
        f"| embeddings of the published model, `--keep-embeddings` | {EMBEDDING_BYTES * MILLION / 1e9:.0f} |",
    ]
    return "\n".join(lines)


def _join(values: Sequence[float]) -> str:
    return " | ".join(f"{value:,.0f}" if value >= 10 else f"{value:.1f}" for value in values)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    result = json.loads(args.result.read_text())
    for name, table in (("scaling", scaling_table(result)), ("million", million_table(result))):
        print(table, end="\n\n")
        if args.write:
            pattern = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
            page = PAGE.read_text()
            PAGE.write_text(re.sub(pattern, rf"\1\n{table}\n\n\2", page, count=1, flags=re.DOTALL))


if __name__ == "__main__":
    main()
