"""Runs on a Ray cluster: Ray Data streams shards through two pools of processes, the prior's and the decoder's.

Ray schedules, restarts lost processes and runs their shards again. The shard writer and the manifest are those of runs
on one machine.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import pickle
import socket
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kandinsky22.batch.drawing import DrawOptions, ShardDrawer
from kandinsky22.batch.manifest import ShardEntry
from kandinsky22.batch.run_lock import hold_worker_lock
from kandinsky22.batch.samples import StoredEmbedding
from kandinsky22.batch.shards import ShardTask, ShardWriter
from kandinsky22.batch.sources import Source
from kandinsky22.errors import InputError, KandinskyError, MissingDependencyError

if TYPE_CHECKING:
    from kandinsky22.batch.batch_sizes import BatchSize
    from kandinsky22.batch.items import Item

LOCAL = "local"
OBJECT_STORE_BYTES = 200_000_000  # of a local cluster: embeddings are small, and images never pass through it
LOCAL_STARTS = 4  # attempts to start a local cluster
PRIOR_GPUS, DECODER_GPUS = 0.1, 0.9  # of a GPU: both stages of one GPU fit on it
ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DATA_DISABLE_PROGRESS_BARS": "1"}


@dataclasses.dataclass(frozen=True)
class RayOptions:
    """The cluster of a run.

    Attributes:
        address: Address of the cluster, or `LOCAL` for one that starts on this machine and ends with the run.
        prior_actors: Number of processes that run the prior.
        decoder_actors: Number of processes that run the decoder; None for one per GPU, or per CPU without GPUs.
    """

    address: str
    prior_actors: int = 1
    decoder_actors: int | None = None


@contextlib.contextmanager
def cluster(options: RayOptions) -> Iterator[Any]:
    """Yield the module `ray`, connected to the cluster.

    Args:
        options: The cluster.

    Raises:
        MissingDependencyError: If Ray is not installed.
        InputError: If the cluster cannot be reached.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        import ray
        import ray.data
    except ImportError:
        raise MissingDependencyError("--ray needs Ray: pip install kandinsky22[ray]") from None
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # which reports plans and settings otherwise
    try:
        _connect(ray, options.address)
        yield ray
    finally:
        ray.shutdown()


def _connect(ray: Any, address: str) -> None:
    """Connect to a cluster, or start one. On a busy machine, Ray's own processes may miss its time limits."""
    local = {"num_cpus": os.cpu_count(), "object_store_memory": OBJECT_STORE_BYTES, "include_dashboard": False}
    options = local if address == LOCAL else {}
    for remaining in reversed(range(LOCAL_STARTS if address == LOCAL else 1)):
        try:
            ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False, **options)
            return
        except Exception as error:  # plain ones too
            ray.shutdown()
            if not remaining:
                raise InputError(f"the Ray cluster {address} cannot be reached: {error}") from error


def measure_on_ray(ray: Any, draw: DrawOptions, item: Item) -> BatchSize:
    """Return the batch size of the cluster's processes.

    Args:
        ray: The connected module.
        draw: How shards are drawn.
        item: A good item.

    Raises:
        KandinskyError: If the networks cannot be loaded.
    """
    from kandinsky22.batch.batch_sizes import find_batch_size

    def measure() -> BatchSize:
        return find_batch_size(ShardDrawer(draw), item)

    with _our_errors():
        result: BatchSize = ray.get(ray.remote(**_resources(ray, DECODER_GPUS))(measure).remote())
    return result


def _resources(ray: Any, gpus: float) -> dict[str, Any]:
    """Return what a process reserves: a part of a GPU where the cluster has GPUs, else a CPU for the decoder.

    The prior takes a few per cent of the decoder's time. On CPUs it shares the decoders' cores.
    """
    if ray.cluster_resources().get("GPU", 0) > 0:
        return {"num_gpus": gpus, "num_cpus": 0}
    return {"num_cpus": 1 if gpus == DECODER_GPUS else 0}


def draw_on_ray(
    ray: Any, options: RayOptions, tasks: ShardSource, draw: DrawOptions, writer: ShardWriter, lock_folder: Path | None
) -> Generator[ShardEntry, None, None]:
    """Yield the entries of shards that the cluster has drawn and written.

    Args:
        ray: The connected module.
        options: The cluster.
        tasks: The shards.
        draw: How shards are drawn.
        writer: Writer of finished shards.
        lock_folder: Output folder that local processes lock; None for clusters of several machines.

    Raises:
        KandinskyError: If a shard cannot be drawn or written.
    """
    resources = ray.cluster_resources()
    decoders = options.decoder_actors or int(resources.get("GPU", 0)) or max(1, int(resources.get("CPU", 1)))
    context = ray.data.DataContext.get_current()
    previous = context.target_max_block_size, context.enable_progress_bars
    # One shard per block: a block is what Ray gives to a process at a time, and runs again if the process is lost.
    context.target_max_block_size, context.enable_progress_bars = 1, False
    try:
        dataset = ray.data.read_datasource(_datasource(ray, tasks), override_num_blocks=1, num_cpus=0)
        arguments = (draw, writer, lock_folder)
        for stage, count, gpus in (
            (_PriorStage, options.prior_actors, PRIOR_GPUS),
            (_DecoderStage, decoders, DECODER_GPUS),
        ):
            dataset = dataset.map_batches(
                stage,
                fn_constructor_args=arguments,
                batch_size=1,
                batch_format="numpy",
                compute=ray.data.ActorPoolStrategy(size=count),
                **_resources(ray, gpus),
            )
        with _our_errors():
            for row in dataset.iter_rows():
                entry = ShardEntry.from_json(json.loads(row["entry"]))
                assert entry is not None
                yield entry
    finally:
        context.target_max_block_size, context.enable_progress_bars = previous


@contextlib.contextmanager
def _our_errors() -> Iterator[None]:
    """Raise our own errors instead of Ray's, which contain them."""
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:
            inner = getattr(cause, "cause", None)
            for each in (cause, inner):
                if isinstance(each, KandinskyError):
                    raise InputError(str(each)) from error
            cause = cause.__cause__ or (inner if isinstance(inner, BaseException) else None)
        if type(error).__module__.startswith("ray."):
            raise KandinskyError(f"Ray has ended the run: {str(error).strip().splitlines()[-1]}") from error
        raise


@dataclasses.dataclass(frozen=True)
class ShardSource:
    """The shards that a run draws, as Ray reads them: on any machine of the cluster.

    Attributes:
        source: What is drawn.
        shard_size: Pictures per shard.
        finished: Numbers of shards that are left out.
    """

    source: Source
    shard_size: int
    finished: frozenset[int]

    def tasks(self) -> Iterator[ShardTask]:
        """Yield the shards."""
        return self.source.tasks(self.shard_size, self.finished.__contains__)


def _datasource(ray: Any, shards: ShardSource) -> Any:
    """Return a data source of one task that yields a block per shard; Ray stops it while nobody takes blocks."""
    import pyarrow
    from ray.data.block import BlockMetadata

    def read() -> Iterator[Any]:
        for task in shards.tasks():
            yield pyarrow.table({"task": pyarrow.array([pickle.dumps(task)], pyarrow.binary())})

    class Shards(ray.data.Datasource):  # type: ignore[misc]
        def estimate_inmemory_data_size(self) -> int | None:
            return None

        def get_read_tasks(self, parallelism: int, *arguments: Any, **options: Any) -> list[Any]:
            metadata = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
            return [ray.data.ReadTask(read, metadata)]

    return Shards()


class _Stage:
    """A process of a pool.

    Args:
        draw: How shards are drawn.
        writer: Writer of finished shards.
        lock_folder: Output folder that this process locks while it lives; None locks nothing.
    """

    def __init__(self, draw: DrawOptions, writer: ShardWriter, lock_folder: Path | None) -> None:
        if lock_folder is not None:
            hold_worker_lock(lock_folder)
        self._drawer = ShardDrawer(draw)
        self._writer = dataclasses.replace(writer, worker=f"process {os.getpid()} on {socket.gethostname()}")


class _PriorStage(_Stage):
    """Adds the embeddings of a shard: some kilobytes a picture."""

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        task: ShardTask = pickle.loads(batch["task"][0])
        plan = self._drawer.plan(task)
        embeddings = self._drawer.encode(plan)
        return {"task": batch["task"], "embeddings": _bytes(pickle.dumps((embeddings, plan.failed)))}


class _DecoderStage(_Stage):
    """Draws and writes a shard."""

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        started = time.monotonic()
        task: ShardTask = pickle.loads(batch["task"][0])
        embeddings: dict[int, StoredEmbedding]
        embeddings, failed = pickle.loads(batch["embeddings"][0])
        drawn = self._drawer.decode(self._drawer.plan(task, failed), embeddings)
        entry = self._writer.write(task, drawn, started)
        return {"entry": [json.dumps(dataclasses.asdict(entry))]}


def _bytes(content: bytes) -> Any:
    """Return an array of one object: numpy's own type of bytes would cut zeros at the end."""
    import numpy as np

    array = np.empty(1, dtype=object)
    array[0] = content
    return array
