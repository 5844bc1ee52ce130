"""Supervision of worker processes: starts them, hands them jobs, and starts them again when they end."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import multiprocessing
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from kandinsky22.serve import messages
from kandinsky22.serve.failures import JobFailure
from kandinsky22.serve.gallery import Gallery
from kandinsky22.serve.job_store import JobRow
from kandinsky22.serve.schemas import JobRequest, Progress
from kandinsky22.serve.settings import ServerSettings, batch_limit

logger = logging.getLogger("kandinsky22.serve")

POLL_SECONDS = 1.0
FIRST_PAUSE, LONGEST_PAUSE = 0.2, 30.0  # seconds before a worker that ends at once is started again
HEALTHY_SECONDS = 30.0  # a worker that lived longer is started again without a pause
LEASE_RENEWALS = 4  # renewals of a lease before it ends
STOP_SECONDS = 1.0
START_SECONDS = 600.0  # longest time until a worker has loaded its first model


class DeviceWorker(threading.Thread):
    """Thread that owns the worker process of one device.

    Args:
        device: The device.
        settings: Settings of the server.
        gallery: Jobs and images of the server.
        on_state: Called whenever `state` changes: "starting", "ready", "busy" or "restarting".
        held_jobs: Returns the ids of the jobs that any worker of the server has.
    """

    def __init__(
        self,
        device: str,
        settings: ServerSettings,
        gallery: Gallery,
        on_state: Callable[[], None],
        held_jobs: Callable[[], set[str]],
    ) -> None:
        super().__init__(daemon=True, name=f"worker-{device}")
        self.state = "starting"
        self.device = device
        self.progress: dict[str, Progress] = {}
        self.previews: dict[str, str] = {}  # the last one of each running job
        self.restarts = 0
        self._device, self._settings, self._gallery = device, settings, gallery
        self._on_state, self._held_jobs = on_state, held_jobs
        self._wake_receiver, self._wake_sender = multiprocessing.Pipe(duplex=False)
        self._send_lock = threading.Lock()
        self._stopping = threading.Event()
        self._process: BaseProcess | None = None
        self._connection: Connection | None = None
        self._running: dict[str, JobRow] = {}
        self._current: str | None = None
        self._last_sign = self._last_progress = self._start_time = 0.0
        self._next_renewal = 0.0
        self._exit = "it did not start"
        self._pause = FIRST_PAUSE

    @property
    def pid(self) -> int | None:
        """Process id of the worker, or None while it has none."""
        return None if self._process is None else self._process.pid

    def held_jobs(self) -> set[str]:
        """Return the ids of the jobs that this worker has."""
        with self._send_lock:  # a claimed job is in `_running` when the lock is free
            return set(self._running)

    def wake(self) -> None:
        """Look for waiting jobs now."""
        with self._send_lock, contextlib.suppress(OSError):
            if not self._wake_receiver.poll():
                self._wake_sender.send_bytes(b"!")

    def cancel(self, job: str) -> bool:
        """Ask the worker to stop a job at its next step.

        Args:
            job: Id of the job.

        Returns:
            Whether it runs here.
        """
        # With the lock, the order is complete: the worker knows every job that is in `_running`.
        with self._send_lock:
            connection = self._connection
            if job not in self._running or connection is None:
                return False
            with contextlib.suppress(OSError):
                connection.send(messages.Cancel(job))
            return True

    def stop(self) -> None:
        """End the worker process and this thread."""
        self._stopping.set()
        self.wake()

    def run(self) -> None:
        """Supervise until `stop`."""
        while not self._stopping.is_set():
            try:
                self._start_process()
                self._supervise()
            except Exception:
                logger.exception("supervision of %s failed", self._device)
                self._stopping.wait(POLL_SECONDS)
            self._end_process()
            if not self._stopping.is_set():
                self._after_crash()

    def _start_process(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        options = messages.WorkerOptions(
            self._settings,
            self._device,
            str(self._settings.state_folder),
            self._settings.default_model("generate"),
        )
        process = context.Process(target=_run_worker, args=(theirs, options), daemon=True, name=self.name)
        process.start()
        theirs.close()
        self._process, self._start_time = process, time.monotonic()
        self._last_sign = self._last_progress = self._start_time

    def _supervise(self) -> None:
        """Exchange messages with the process until it ends, hangs, or the server stops."""
        process, connection = self._process, self._connection
        assert process is not None and connection is not None
        while not self._stopping.is_set():
            if self.state == "ready" and not self._running:
                with self._send_lock:
                    self._take_jobs(connection)
            ready = wait([connection, process.sentinel, self._wake_receiver], timeout=POLL_SECONDS)
            if self._wake_receiver in ready:
                self._wake_receiver.recv_bytes()
            if connection in ready:
                try:
                    while connection.poll():
                        self._handle(connection.recv())
                except (EOFError, OSError):
                    return
            elif process.sentinel in ready:
                return
            if reason := self._hang():
                logger.error("worker %s is ended: %s", self._device, reason)
                return

    def _hang(self) -> str | None:
        """Return why the process counts as hanging, or None."""
        now = time.monotonic()
        limit = START_SECONDS if self.state in ("starting", "restarting") else self._settings.lease_seconds
        if now - self._last_sign > limit:
            return f"no sign of life for {limit:g} s"
        if self._running and now - self._last_progress > self._settings.stall_seconds:
            return f"no progress for {self._settings.stall_seconds:g} s"
        return None

    def _take_jobs(self, connection: Connection) -> None:
        limit = batch_limit(self._settings, self.device.partition(":")[0])
        jobs = self._gallery.claim(self.name, limit)
        if not jobs:
            return
        orders = []
        for job in jobs:
            try:
                orders.append(self._gallery.order(job))
            except Exception as error:
                logger.exception("job %s cannot be started", job.id)
                message = f"the job cannot be read ({type(error).__name__})"
                self._gallery.finish(job.id, "failed", JobFailure(message, "internal_error"))
                continue
            self._running[job.id] = job
            self._report_start(job)
        if orders:
            self._current, self._last_progress = orders[0].job, time.monotonic()
            self._set_state("busy")
            connection.send(messages.Run(tuple(orders)))

    def _report_start(self, job: JobRow) -> None:
        images = JobRequest.model_validate(job.request).count
        progress = Progress(stage="loading", image=0, images=images, step=0, steps=1, fraction=0.0, seconds_left=None)
        self.progress[job.id] = progress
        self._gallery.publish_job(job.id, "state")
        self._gallery.hub.publish("progress", progress.model_dump(), job.id)

    def _handle(self, message: Any) -> None:
        self._last_sign = time.monotonic()
        if isinstance(message, messages.Alive):
            self._renew_leases()
            return
        if isinstance(message, messages.Unusable):
            logger.error("worker %s cannot run: %s", self._device, message.message)
            self._pause = LONGEST_PAUSE
            return
        if isinstance(message, messages.Ready):
            self.device = message.device
            self._set_state("ready")
            return
        if message.job not in self._running:
            return
        self._last_progress, self._current = time.monotonic(), message.job
        if isinstance(message, messages.JobProgress):
            values = {name: value for name, value in dataclasses.asdict(message).items() if name != "job"}
            self.progress[message.job] = progress = Progress.model_validate(values)
            self._gallery.hub.publish("progress", progress.model_dump(), message.job)
        elif isinstance(message, messages.Preview):
            self.previews[message.job] = message.url
            data = {"image": message.image, "step": message.step, "url": message.url}
            self._gallery.hub.publish("preview", data, message.job)
        elif isinstance(message, messages.ImageSaved):
            self._gallery.enter(message.id)
        else:
            self._end_job(message)

    def _renew_leases(self) -> None:
        """Renew the leases of this worker's jobs, and queue jobs again that no worker has any more.

        An expired lease alone proves nothing: after a suspension of the computer, all leases have expired.
        """
        if self._running and self._last_sign > self._next_renewal:
            self._next_renewal = self._last_sign + self._settings.lease_seconds / LEASE_RENEWALS
            self._gallery.store.renew(list(self._running), self._settings.lease_seconds)
        expired = self._gallery.store.expired()
        for job in set(expired) - self._held_jobs() if expired else ():
            self._gallery.try_again(job, charged=True, reason=JobFailure("its worker has lost it", "worker_ended"))

    def _end_job(self, message: Any) -> None:
        job = message.job
        self.progress.pop(job, None)
        self.previews.pop(job, None)
        if isinstance(message, messages.JobDone):
            self._gallery.finish(job, "done")
        elif isinstance(message, messages.JobCancelled):
            self._gallery.finish(job, "cancelled")
        elif message.again:
            self._gallery.try_again(job, charged=True, reason=message.failure)
        else:
            self._gallery.finish(job, "failed", message.failure)
        del self._running[job]  # last: until the database says that it has ended, the job is this worker's
        if not self._running:
            self._set_state("ready")

    def _end_process(self) -> None:
        process, connection = self._process, self._connection
        with self._send_lock:
            self._connection = None
        if connection is not None:
            connection.close()  # the worker ends by itself when it notices
        if process is not None:
            process.join(STOP_SECONDS if self._stopping.is_set() else 0.5)
            if process.is_alive():
                process.kill()
                process.join()
            code = process.exitcode or 0
            self._exit = f"exit code {code}" if code >= 0 else f"signal {-code}"
        self._process = None

    def _after_crash(self) -> None:
        """Queue the interrupted jobs again, and pause before the next start."""
        lived = time.monotonic() - self._start_time
        self.restarts += 1
        logger.error("worker %s ended after %.0f s (%s); it is started again", self._device, lived, self._exit)
        self._set_state("restarting")
        while self._running and not self._stopping.is_set():
            try:
                self._requeue_jobs()
            except Exception:  # a full disk, for example: this thread must outlive it
                logger.exception("the jobs of %s cannot be queued again yet", self._device)
                self._stopping.wait(POLL_SECONDS)
        self._current = None
        self._pause = FIRST_PAUSE if lived > HEALTHY_SECONDS else min(2 * self._pause, LONGEST_PAUSE)
        self._stopping.wait(self._pause)

    def _requeue_jobs(self) -> None:
        """Queue the jobs of this worker again. Only the job that ran is charged with the attempt."""
        for job in list(self._running):
            self.progress.pop(job, None)
            self.previews.pop(job, None)
            reason = JobFailure("the worker process ended unexpectedly", "worker_ended")
            self._gallery.try_again(job, charged=job == self._current, reason=reason)
            del self._running[job]

    def _set_state(self, state: str) -> None:
        if state != self.state:
            self.state = state
            self._on_state()


class Supervisor:
    """All workers of a server.

    Args:
        settings: Settings of the server.
        gallery: Jobs and images of the server.
    """

    def __init__(self, settings: ServerSettings, gallery: Gallery) -> None:
        self._gallery = gallery
        self.workers = [
            DeviceWorker(device, settings, gallery, self._publish_state, self.held_jobs) for device in settings.devices
        ]
        gallery.progress_of = self.progress

    @property
    def state(self) -> str:
        """State of the most available worker."""
        states = [worker.state for worker in self.workers]
        return next(state for state in ("ready", "busy", "starting", "restarting") if state in states)

    def held_jobs(self) -> set[str]:
        """Return the ids of the jobs that the workers have."""
        return set().union(*(worker.held_jobs() for worker in self.workers))

    def start(self) -> None:
        """Start all workers."""
        for worker in self.workers:
            worker.start()

    def stop(self) -> None:
        """End all workers."""
        for worker in self.workers:
            worker.stop()
        for worker in self.workers:
            worker.join(2 * STOP_SECONDS)

    def wake(self) -> None:
        """Look for waiting jobs now."""
        for worker in self.workers:
            worker.wake()

    def cancel(self, job: str) -> bool:
        """Ask the worker of a job to stop it.

        Args:
            job: Id of the job.

        Returns:
            Whether it runs.
        """
        return any(worker.cancel(job) for worker in self.workers)

    def progress(self, job: str) -> Progress | None:
        """Return the progress of a job, or None if it does not run.

        Args:
            job: Id of the job.
        """
        return next((worker.progress[job] for worker in self.workers if job in worker.progress), None)

    def preview(self, job: str) -> str | None:
        """Return the last preview of a running job as a data URL, or None.

        Args:
            job: Id of the job.
        """
        return next((worker.previews[job] for worker in self.workers if job in worker.previews), None)

    def _publish_state(self) -> None:
        self._gallery.hub.publish("worker", {"state": self.state})


def _run_worker(connection: Connection, options: messages.WorkerOptions) -> None:
    """Run a worker. Its modules are imported in its own process only, because they import torch."""
    from kandinsky22.serve import worker

    worker.main(connection, options)
