"""Batch sizes: measured once per model, device and size, then read from a cache file."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

from kandinsky22.batch.drawing import ShardDrawer, job_pixels
from kandinsky22.batch.items import Item
from kandinsky22.batch.requests import build_request
from kandinsky22.checkpoints.atomic_files import read_json, write_json
from kandinsky22.checkpoints.cache_folder import cache_folder
from kandinsky22.errors import KandinskyError
from kandinsky22.generation.batching import generate_batch
from kandinsky22.generation.memory_errors import is_out_of_memory

if TYPE_CHECKING:
    from kandinsky22.generation.session import Job

CANDIDATES = (1, 2, 4, 8, 16, 32, 64)
MAX_CPU_BATCH = 16  # beyond, caches of CPUs gain nothing and memory grows
MEASURED_STEPS = 2
GAIN = 1.05  # speed-up that a twice as large batch must bring
MEMORY_FRACTION = 0.85  # of the device's memory that a batch may use


@dataclasses.dataclass(frozen=True)
class BatchSize:
    """A measured batch size.

    Attributes:
        size: Number of images that run together.
        pixels: Pixels of the images for which it was measured.
    """

    size: int
    pixels: int


def find_batch_size(drawer: ShardDrawer, item: Item) -> BatchSize:
    """Return the batch size for items like this one, from the cache or measured now.

    Args:
        drawer: The networks.
        item: A good item.
    """
    row = build_request(item, drawer.options.requests)
    job = drawer.session(row.mode, row.request).prepare(row.mode, row.request, row.inputs.images)
    pixels, path = job_pixels(job), _cache_file(job)
    if path is not None:
        with contextlib.suppress(KandinskyError):
            cached = read_json(path).get("batch_size")
            if isinstance(cached, int) and cached in CANDIDATES:
                return BatchSize(cached, pixels)
    size = measured_batch_size(job)
    if path is not None:
        # An unwritable cache folder, whatever is wrong with it, disables the cache.
        with contextlib.suppress(Exception):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, {"batch_size": size, "pixels": pixels})
    return BatchSize(size, pixels)


def measured_batch_size(job: Job, candidates: tuple[int, ...] = CANDIDATES) -> int:
    """Return the smallest batch size that twice as large batches do not beat clearly.

    Args:
        job: The job, which runs with `MEASURED_STEPS` steps.
        candidates: Ascending batch sizes to try.
    """
    on_cpu = job.networks.device.type == "cpu"
    request = dataclasses.replace(job.request, steps=min(job.request.steps or 1, MEASURED_STEPS), prior_steps=1)
    short = dataclasses.replace(job, request=request)
    best, best_rate = candidates[0], 0.0
    for size in candidates:
        if on_cpu and size > MAX_CPU_BATCH:
            break
        rate = _rate(short, size)
        if rate is None or rate < best_rate * GAIN:
            break
        best, best_rate = size, rate
        if not on_cpu and _memory_used() * 2 > MEMORY_FRACTION:
            break
    return best


def _rate(job: Job, size: int) -> float | None:
    """Return the images per second of a batch, or None if the memory does not suffice."""
    best = float("inf")
    try:
        generate_batch([job] * size, list(range(size)))  # buffers grow and kernels are chosen
        for _ in range(2):
            started = time.perf_counter()
            generate_batch([job] * size, list(range(size)))
            best = min(best, time.perf_counter() - started)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None
    return size / best


def _memory_used() -> float:
    """Return the largest fraction of the GPU's memory that was in use."""
    import torch

    if not torch.cuda.is_available():
        return 0.0
    return torch.cuda.max_memory_allocated() / torch.cuda.get_device_properties().total_memory


def _cache_file(job: Job) -> Path | None:
    """Return the cache file of a kind of job, or None without a cache folder."""
    folder = cache_folder()
    if folder is None:
        return None
    import torch

    recipe = job.recipe
    parts = (
        recipe.model_digest,
        recipe.command,
        recipe.device,
        recipe.dtype,
        recipe.hardware,
        recipe.quantize,
        recipe.engine,
        recipe.guidance > 1,
        job_pixels(job),
        torch.get_num_threads(),
        recipe.versions,
    )
    name = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    return folder / "batch-size" / f"{name}.json"
