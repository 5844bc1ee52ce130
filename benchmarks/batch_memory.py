"""Memory of a batch over many rows, with the networks replaced by a stub: `python -m benchmarks.batch_memory`."""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import psutil
import pyarrow
import pyarrow.parquet

from kandinsky22.batch.items import ItemOptions
from kandinsky22.batch.rows import RowFile
from kandinsky22.batch.run import RunOptions, run_batch
from kandinsky22.batch.shards import DrawnShard
from kandinsky22.batch.sources import RowSource

CHUNK = 100_000


def write_rows(path: Path, count: int) -> None:
    """Write a Parquet file without holding it in memory."""
    with pyarrow.parquet.ParquetWriter(path, pyarrow.schema([("prompt", pyarrow.string())])) as writer:
        for start in range(0, count, CHUNK):
            prompts = [f"a red circle, number {number}" for number in range(start, min(start + CHUNK, count))]
            writer.write_table(pyarrow.table({"prompt": prompts}))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--shard-size", type=int, default=1000)
    args = parser.parse_args()
    process, memory = psutil.Process(), []
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "rows.parquet"
        write_rows(path, args.rows)

        def note(line: str) -> None:
            if line.startswith("shard"):
                memory.append(process.memory_info().rss)

        source = RowSource(RowFile(str(path), "parquet"), ItemOptions())
        options = RunOptions(source, f"{name}/out", shard_size=args.shard_size, batch_size=1)
        started = time.monotonic()
        run_batch(options, note, lambda draw: lambda task: DrawnShard((), {}))
        seconds = time.monotonic() - started
    tenth = len(memory) // 10
    early, late = max(memory[: tenth + 1]) / 1e6, max(memory[-tenth - 1 :]) / 1e6
    print(f"{args.rows} rows in {seconds:.0f} s: {early:.0f} MB in the first tenth, {late:.0f} MB in the last")


if __name__ == "__main__":
    main()
