"""Worker processes that draw shards. A killed worker's shards are drawn again; workers end with their driver."""

from __future__ import annotations

import collections
import dataclasses
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from pathlib import Path

from kandinsky22.batch.drawing import DrawOptions, ShardDrawer
from kandinsky22.batch.manifest import ShardEntry
from kandinsky22.batch.run_lock import hold_worker_lock
from kandinsky22.batch.shards import DrawShard, ShardTask, ShardWriter
from kandinsky22.errors import KandinskyError

TASKS_PER_WORKER = 2  # one that runs, and one that waits
MAX_DEATHS = 3  # of the processes that draw a shard, before the shard counts as their cause

MakeDraw = Callable[[DrawOptions], DrawShard]
"""Function that returns the function that draws shards in a worker."""


def network_draw(options: DrawOptions) -> DrawShard:
    """Return the function that draws shards with networks.

    Args:
        options: How shards are drawn.
    """
    return ShardDrawer(options).draw


@dataclasses.dataclass(frozen=True)
class WorkerSetup:
    """What a worker process needs.

    Attributes:
        options: How shards are drawn.
        writer: Writer of finished shards.
        lock_folder: Output folder whose run the worker belongs to; None for remote folders.
        make_draw: Function that returns the function that draws shards.
    """

    options: DrawOptions
    writer: ShardWriter
    lock_folder: Path | None
    make_draw: MakeDraw = network_draw


class _Worker:
    """The state of a worker process."""

    def __init__(self, setup: WorkerSetup) -> None:
        if setup.lock_folder is not None:
            hold_worker_lock(setup.lock_folder)
        self._writer = dataclasses.replace(setup.writer, worker=f"process {os.getpid()}")
        self._draw = setup.make_draw(setup.options)

    def draw(self, task: ShardTask) -> ShardEntry:
        started = time.monotonic()
        return self._writer.write(task, self._draw(task), started)


# A pool calls functions of modules: this is where a worker process keeps its networks between shards.
_workers: list[_Worker] = []


def _start_worker(setup: WorkerSetup, driver: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver ends its workers
    threading.Thread(target=_end_with_driver, args=(driver,), daemon=True).start()
    _workers.append(_Worker(setup))


def _end_with_driver(driver: Connection) -> None:
    """End this process when the driver has closed its end of a pipe, or was killed."""
    try:
        driver.poll(None)
    finally:
        os._exit(1)


def _draw(task: ShardTask) -> ShardEntry:
    return _workers[0].draw(task)


class WorkerDeathError(KandinskyError):
    """Worker processes end again and again while they draw one shard."""


def draw_with_workers(tasks: Iterator[ShardTask], setup: WorkerSetup, count: int) -> Iterator[ShardEntry]:
    """Yield the entries of shards that worker processes have drawn and written.

    Args:
        tasks: The shards.
        setup: What the workers need.
        count: Number of worker processes.

    Raises:
        WorkerDeathError: If several workers have died over the same shard, of too little memory for example.
        KandinskyError: If a shard cannot be drawn or written.
    """
    again: collections.deque[ShardTask] = collections.deque()
    deaths: collections.Counter[int] = collections.Counter()
    while True:
        running: dict[Future[ShardEntry], ShardTask] = {}
        reader, writer = multiprocessing.Pipe(duplex=False)
        pool = ProcessPoolExecutor(
            count, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(setup, reader)
        )
        try:
            yield from _draw_in_pool(pool, tasks, again, running, count * TASKS_PER_WORKER)
            return
        except BrokenProcessPool:
            for future, task in running.items():
                if future.done() and not future.cancelled() and future.exception() is None:
                    yield future.result()
                    continue
                deaths[task.number] += 1
                if deaths[task.number] >= MAX_DEATHS * TASKS_PER_WORKER * count:
                    raise WorkerDeathError(
                        f"worker processes have died {deaths[task.number]} times while shard {task.number} was drawn; "
                        "use fewer workers or a smaller --batch-size if the memory does not suffice"
                    ) from None
                again.append(task)
        finally:
            writer.close()  # running workers end now: after an error, nobody waits for their shards
            pool.shutdown(wait=True, cancel_futures=True)
            reader.close()


def _draw_in_pool(
    pool: ProcessPoolExecutor,
    tasks: Iterator[ShardTask],
    again: collections.deque[ShardTask],
    running: dict[Future[ShardEntry], ShardTask],
    limit: int,
) -> Iterator[ShardEntry]:
    """Yield entries; `running` is what the pool has been given and not returned."""
    while True:
        while len(running) < limit:
            task = again.popleft() if again else next(tasks, None)
            if task is None:
                break
            try:
                running[pool.submit(_draw, task)] = task
            except BrokenProcessPool:
                again.appendleft(task)
                raise
        if not running:
            return
        done, _ = wait(running, return_when=FIRST_COMPLETED)
        for future in done:
            result = future.result()
            del running[future]
            yield result
