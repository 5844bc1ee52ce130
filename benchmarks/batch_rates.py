"""Measure batches with the embedded model: batch sizes, worker processes, and what a shard costs the driver.

Run it on quiet cores: `python -m benchmarks.batch_rates`. It writes `benchmarks/results/batch.json`, from which
`benchmarks.batch_table` makes the tables of the documentation.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from pathlib import Path

from kandinsky22.batch.drawing import DrawOptions, ShardDrawer
from kandinsky22.batch.items import Item, ItemOptions
from kandinsky22.batch.manifest import Manifest
from kandinsky22.batch.requests import RequestOptions
from kandinsky22.batch.rows import RowFile
from kandinsky22.batch.run import RunOptions, run_batch
from kandinsky22.batch.shards import DrawnShard, ShardTask
from kandinsky22.batch.sources import RowSource
from kandinsky22.batch.storage import LocalFolder

RESULT = Path(__file__).parent / "results" / "batch.json"
PROMPT = "a red circle on a white background, number"
DEFAULTS = {"quality": "draft"}


def batch_size_rates(sizes: tuple[int, ...], rows: int) -> dict[str, float]:
    """Return pictures per second of one process by batch size, the best of three rounds in turn."""
    items = tuple(Item(n, n + 1, str(n), n, {"prompt": f"{PROMPT} {n}"}, {}) for n in range(rows))
    drawers = {size: ShardDrawer(DrawOptions(RequestOptions(DEFAULTS), size)) for size in sizes}
    best: dict[int, float] = {}
    for drawer in drawers.values():
        drawer.draw(ShardTask(0, items[:2]))
    for _ in range(3):
        for size, drawer in drawers.items():
            started = time.perf_counter()
            drawer.draw(ShardTask(0, items))
            best[size] = max(best.get(size, 0), rows / (time.perf_counter() - started))
    return {str(size): round(rate, 3) for size, rate in best.items()}


def worker_rate(folder: Path, rows: int, workers: int) -> dict[str, object]:
    """Return pictures per second of worker processes, without the time that they take to start."""
    source = folder / "prompts.txt"
    source.write_text("".join(f"{PROMPT} {n}\n" for n in range(rows)))
    finished: list[float] = []

    def note(line: str) -> None:
        if line.startswith("shard"):
            finished.append(time.monotonic())

    options = RunOptions(
        RowSource(RowFile(str(source), "text"), ItemOptions(DEFAULTS)),
        str(folder / f"out{workers}"),
        shard_size=16,
        batch_size=8,
        workers=workers,
    )
    run_batch(options, note)
    entries = Manifest(LocalFolder(Path(options.output))).entries.values()
    # The first shard of each worker includes loading networks.
    first = workers
    rate = 16 * (len(finished) - first) / (finished[-1] - finished[first - 1])
    size = sum(path.stat().st_size for path in Path(options.output).rglob("*.png")) / rows
    seconds = [entry.seconds for entry in entries if entry.pictures == 16]
    return {"rate": round(rate, 3), "shard_seconds": seconds[workers:], "bytes_per_picture": round(size)}


def driver_seconds(folder: Path, rows: int) -> float:
    """Return what a shard of 100 pictures costs the driver: two readings, the check and the manifest."""
    source = folder / "many.txt"
    source.write_text("".join(f"{PROMPT} {n}\n" for n in range(rows)))
    row_source = RowSource(RowFile(str(source), "text"), ItemOptions(DEFAULTS))
    options = RunOptions(row_source, str(folder / "driver"), shard_size=100, batch_size=8)
    started = time.perf_counter()
    run_batch(options, lambda line: None, lambda draw: lambda task: DrawnShard((), {}))
    return (time.perf_counter() - started) / (rows / 100)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=320, help="pictures per number of workers")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        result: dict[str, object] = {
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "load before": os.getloadavg()[0],
            "driver_seconds_per_shard": round(driver_seconds(folder, 20_000), 5),
            "rate_by_batch_size": batch_size_rates((1, 8), 32),
            "workers": {str(count): worker_rate(folder, args.rows, count) for count in args.workers},
        }
    rates = result["rate_by_batch_size"]
    assert isinstance(rates, dict)
    print(f"batch of 8 / one by one: {rates['8'] / rates['1']:.2f} (at least 1 is expected)")
    measured = result["workers"]
    assert isinstance(measured, dict)
    for count, values in measured.items():
        ratio = values["rate"] / measured[str(args.workers[0])]["rate"]
        print(f"{count} workers: {values['rate']} pictures/s, {ratio:.2f} times (1.8 is expected of two)")
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {args.out}; load before: {result['load before']:.2f}")


if __name__ == "__main__":
    main()
