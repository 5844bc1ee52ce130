"""Runs with a stand-in for the networks: pictures that depend on the prompt and the seed, drawn in a few milliseconds.

`python -m tests.batch.stub_run INPUT OUTPUT FORMAT WORKERS SHARD_SIZE MILLISECONDS` is started and killed by tests.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import sys
import time
from pathlib import Path

from kandinsky22.batch.drawing import DrawOptions
from kandinsky22.batch.items import ItemOptions
from kandinsky22.batch.requests import build_request
from kandinsky22.batch.rows import RowFile, find_row_format
from kandinsky22.batch.run import RunOptions, Summary, run_batch
from kandinsky22.batch.samples import Sample
from kandinsky22.batch.shards import DrawnShard, DrawShard, ShardTask
from kandinsky22.batch.sources import RowSource
from kandinsky22.errors import InputError

SIDE = 8
DELAY = "KANDINSKY22_STUB_MILLISECONDS"  # per picture; an environment variable, which worker processes inherit


def picture(prompt: str, seed: int) -> bytes:
    """Return a small PNG file that depends on its arguments only."""
    from PIL import Image

    pixels = hashlib.sha512(f"{prompt}\0{seed}".encode()).digest() * 3
    content = io.BytesIO()
    Image.frombytes("RGB", (SIDE, SIDE), pixels).save(content, format="PNG")
    return content.getvalue()


def stub_draw(options: DrawOptions) -> DrawShard:
    """Return a function that draws shards without networks."""

    def draw(task: ShardTask) -> DrawnShard:
        samples, failed = [], {}
        for item in task.items:
            time.sleep(float(os.environ.get(DELAY, "0")) / 1000)
            try:
                prompt = build_request(item, options.requests).request.prompt or ""
            except InputError as error:
                failed[task.key(item)] = str(error)
                continue
            if prompt == "fails":
                raise InputError(f"row {item.row}: {prompt}")
            metadata = {
                "key": task.key(item),
                "id": item.id,
                "row": item.row,
                "prompt": prompt,
                "negative_prompt": None,
                "seed": item.seed,
                "width": SIDE,
                "height": SIDE,
                "settings": dict(item.settings),
                "columns": dict(item.columns),
                "recipe": {},
            }
            samples.append(Sample(task.key(item), metadata, picture(prompt, item.seed)))
        return DrawnShard(tuple(samples), failed)

    return draw


def options_for(source: Path, output: Path, **changes: object) -> RunOptions:
    """Return the options of a run with a fixed batch size."""
    rows = RowSource(RowFile(str(source), find_row_format(str(source))), ItemOptions())
    options = RunOptions(rows, str(output), shard_size=10, batch_size=4)
    return dataclasses.replace(options, **changes)  # type: ignore[arg-type]


def run(source: Path, output: Path, **changes: object) -> tuple[Summary, list[str]]:
    """Run with stub networks, and return the summary and the notes."""
    notes: list[str] = []
    return run_batch(options_for(source, output, **changes), notes.append, stub_draw), notes


if __name__ == "__main__":
    source, output, format, workers, shard_size, milliseconds = sys.argv[1:]
    os.environ[DELAY] = milliseconds
    started = options_for(Path(source), Path(output), format=format, workers=int(workers), shard_size=int(shard_size))
    run_batch(started, lambda line: print(line, flush=True), stub_draw)
