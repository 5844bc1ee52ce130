"""Worker process: keeps networks in memory and generates the images of jobs.

It ends when the server's end of the connection is closed, so that no worker outlives its server.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import logging
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kandinsky22.errors import KandinskyError
from kandinsky22.generation.input_images import InputImages
from kandinsky22.generation.memory_errors import is_out_of_memory
from kandinsky22.generation.modes import MODES
from kandinsky22.generation.previews import Previews, new_previews
from kandinsky22.generation.recipe import InputFile
from kandinsky22.generation.request import Request
from kandinsky22.sampling.presets import find_preset
from kandinsky22.serve import messages
from kandinsky22.serve.database import now
from kandinsky22.serve.failures import DISK_FULL, JobFailure, is_disk_full
from kandinsky22.serve.files import Files, image_id
from kandinsky22.serve.progress import CancelledError, ProgressReporter, StageTimes
from kandinsky22.serve.requests import generation_request, title
from kandinsky22.serve.schemas import JobRequest
from kandinsky22.serve.settings import ModelSettings, batch_limit

if TYPE_CHECKING:
    from kandinsky22.generation.session import GeneratedImage, Job, Session

OUT_OF_MEMORY = "out of memory; try a smaller size, or start the server with --low-memory or --dtype bfloat16"
ALIVE_SECONDS = 2.0  # interval of signs of life


def main(connection: Connection, options: messages.WorkerOptions) -> None:
    """Run a worker until its server ends it.

    Args:
        connection: Connection to the server.
        options: Options of the worker.
    """
    # The server decides when the worker ends. A terminal and service managers send signals to the whole process group;
    # a worker that ended before its server would be taken for one that crashed.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    for name in ("torchao", "torch.utils._pytree"):  # warnings about their own optional parts
        logging.getLogger(name).setLevel(logging.ERROR)
    Worker(connection, options).run()


@dataclasses.dataclass
class LoadedModel:
    """Networks in memory with what was measured about them."""

    session: Session
    times: StageTimes = dataclasses.field(default_factory=StageTimes)
    previews: Previews | None = None
    has_no_preview: bool = False


class Worker:
    """Loop of a worker process.

    Args:
        connection: Connection to the server.
        options: Options of the worker.
    """

    def __init__(self, connection: Connection, options: messages.WorkerOptions) -> None:
        self._connection, self._options = connection, options
        self._settings, self._files = options.settings, Files(Path(options.state))
        self._send_lock = threading.Lock()
        self._orders: queue.Queue[tuple[messages.Order, ...]] = queue.Queue()
        self._cancelled: set[str] = set()
        # The least recently used model comes first.
        self._models: collections.OrderedDict[tuple[object, ...], LoadedModel] = collections.OrderedDict()

    def run(self) -> None:
        """Take jobs until the server closes the connection, which ends the process."""
        from kandinsky22.runtime.device import resolve_device

        threading.Thread(target=self._receive, daemon=True).start()
        threading.Thread(target=self._show_life, daemon=True).start()
        try:
            device = resolve_device(self._options.device)
        except KandinskyError as error:
            self._send(messages.Unusable(str(error)))
            return
        self._preload()
        self._send(messages.Ready(str(device)))
        while True:
            self._run_orders(self._orders.get())

    def _receive(self) -> None:
        try:
            while True:
                message = self._connection.recv()
                if isinstance(message, messages.Run):
                    # A request to cancel that came too late was for an earlier attempt.
                    self._cancelled.difference_update(order.job for order in message.orders)
                    self._orders.put(message.orders)
                elif isinstance(message, messages.Cancel):
                    self._cancelled.add(message.job)
        except (EOFError, OSError):
            os._exit(0)  # the server has ended; whatever runs here would be lost anyway

    def _show_life(self) -> None:
        while True:
            time.sleep(ALIVE_SECONDS)
            self._send(messages.Alive())

    def _send(self, message: Any) -> None:
        try:
            with self._send_lock:
                self._connection.send(message)
        except OSError:
            os._exit(0)

    def _preload(self) -> None:
        """Load the default model, so that the first job does not wait for it."""
        if self._options.preload is None:
            return
        job = JobRequest(mode="generate", prompt="")
        try:
            request = self._request(job, self._options.preload, {})
            model = self._loaded("generate", request)
            if self.previews_per_second > 0:
                self._previews(model)
        except (KandinskyError, OSError, RuntimeError) as error:  # the first job reports it to its client
            print(f"model {self._options.preload.id} cannot be loaded: {error}", file=sys.stderr)

    def _run_orders(self, orders: tuple[messages.Order, ...]) -> None:
        """Run jobs of one batch. Each ends with exactly one message."""
        runs = []
        for order in orders:
            with self._ending_with_message([order.job]):
                runs.append(self._prepare(order))
        units = [(run, position) for run in runs for position in run.order.positions]
        for run in runs:
            if not run.order.positions:  # all its images had been written before the worker ended
                self._send(messages.JobDone(run.order.job))
        ended: set[str] = set()
        while units := [unit for unit in units if unit[0].order.job not in ended]:
            chunk = self._next_chunk(units)
            units = units[len(chunk) :]
            jobs = {run.order.job: run for run, _ in chunk}
            with self._ending_with_message(list(jobs)) as failed:
                self._generate(chunk)
            ended |= failed
            for job, run in jobs.items():
                if job not in ended and not any(other is run for other, _ in units):
                    self._end(job)
                    ended.add(job)

    @contextlib.contextmanager
    def _ending_with_message(self, jobs: list[str]) -> Iterator[set[str]]:
        """End jobs with a message if the context raises; their ids are then in the yielded set."""
        ended: set[str] = set()
        try:
            yield ended
        except CancelledError:
            for job in jobs:
                self._send(messages.JobCancelled(job))
            ended.update(jobs)
        except Exception as error:
            for job in jobs:
                self._report_failure(job, error)
            ended.update(jobs)
        self._cancelled -= ended

    def _end(self, job: str) -> None:
        is_cancelled = job in self._cancelled
        self._cancelled.discard(job)
        self._send(messages.JobCancelled(job) if is_cancelled else messages.JobDone(job))

    def _next_chunk(self, units: list[tuple[JobRun, int]]) -> list[tuple[JobRun, int]]:
        """Return the images that are generated next: one, or a batch of images with equal settings."""
        from kandinsky22.generation.batching import job_key

        first = units[0][0]
        limit = batch_limit(self._settings, first.prepared.networks.device.type)
        key = job_key(first.prepared)
        chunk = []
        for run, position in units[:limit]:
            if run is not first and job_key(run.prepared) != key:
                break
            chunk.append((run, position))
        return chunk

    def _report_failure(self, job: str, error: Exception) -> None:
        if is_out_of_memory(error):
            self._free_memory()
            self._send(messages.JobFailed(job, JobFailure(OUT_OF_MEMORY, "out_of_memory"), again=True))
        elif is_disk_full(error):
            self._send(messages.JobFailed(job, JobFailure(DISK_FULL, "disk_full")))
        elif isinstance(error, KandinskyError | OSError):
            message = " ".join(str(error).split()) or type(error).__name__
            self._send(messages.JobFailed(job, JobFailure(message)))
        else:
            import traceback

            traceback.print_exc()  # a defect: the details belong to the server's log, not to its clients
            message = f"internal error ({type(error).__name__})"
            self._send(messages.JobFailed(job, JobFailure(message, "internal_error")))

    def _free_memory(self) -> None:
        """Forget all networks, so that those of the next attempt have all the memory."""
        import gc

        import torch

        self._models.clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _prepare(self, order: messages.Order) -> JobRun:
        job = JobRequest.model_validate(order.request)
        self._send(messages.JobProgress(order.job, "loading", 0, job.count, 0, 1, 0.0, None))
        settings_model = self._settings.model(str(job.model))
        if settings_model is None:
            raise KandinskyError(f"the server has no model {job.model!r} any more")
        images = InputImages()
        records = _open_inputs(order.inputs, images)
        request = self._request(job, settings_model, records)
        model = self._loaded(job.mode, request)
        prepared = model.session.prepare(MODES[job.mode], request, images.images)
        reporter = ProgressReporter(
            order.job,
            images=job.count,
            prior_steps=_prior_steps(prepared),
            decoder_steps=_decoder_steps(prepared),
            times=model.times,
            send=self._send,
            is_cancelled=lambda: order.job in self._cancelled,
        )
        return JobRun(order, job, settings_model, prepared, reporter, model)

    def _request(self, job: JobRequest, model: ModelSettings, records: dict[str, InputFile]) -> Request:
        """Return the request of a job, with the tiny decoder and the distilled adapter of its model."""
        from kandinsky22.generation.adapters import find_distilled_adapter
        from kandinsky22.generation.tiny_decoders import find_tiny_decoder

        is_distilled = job.quality is not None and find_preset(job.quality).distilled
        distilled = find_distilled_adapter(model.location, model.location) if is_distilled else None
        request = generation_request(job, model, self._settings, self._options.device, records, distilled)
        if model.tiny_decoder is None:
            return request
        found = find_tiny_decoder(model.tiny_decoder)
        return dataclasses.replace(request, tiny_decoder=found.record, tiny_decoder_location=found.location)

    def _generate(self, chunk: list[tuple[JobRun, int]]) -> None:
        """Generate and save images that run together."""
        from kandinsky22.generation.batching import generate_batch

        watch = _StepWatch(self, chunk)
        watch.begin()
        jobs = [run.prepared for run, _ in chunk]
        seeds = [run.prepared.request.seeds[position] for run, position in chunk]
        images = [jobs[0].generate(seeds[0], watch)] if len(chunk) == 1 else generate_batch(jobs, seeds, watch)
        for (run, position), image in zip(chunk, images, strict=True):
            self._save(run.order, run.job, run.model, position, image)
        chunk[0][0].reporter.end()

    def _save(
        self, order: messages.Order, job: JobRequest, model: ModelSettings, position: int, image: GeneratedImage
    ) -> None:
        from kandinsky22.generation.image_files import PNG, encode_image

        id = image_id(order.job, position)
        content = encode_image(image.image, PNG, image.recipe.texts())
        record = {
            "job": order.job,
            "position": position,
            "group": job.group,
            "created_at": now(),
            "mode": job.mode,
            "model": model.id,
            "title": title(job),
            "request": order.request,
            "job_created_at": order.created_at,
        }
        self._files.save_thumbnail(id, image.image)
        self._files.save_image(id, content, record)
        self._send(messages.ImageSaved(order.job, position, id))

    def _loaded(self, mode_name: str, request: Request) -> LoadedModel:
        """Return the networks of a request, which are loaded unless they are in memory."""
        from kandinsky22.generation.session import Session, session_key

        mode = MODES[mode_name]
        key = session_key(mode, request)
        model = self._models.pop(key, None)
        if model is None:
            while len(self._models) >= self._settings.sessions:
                self._models.popitem(last=False)
            session = Session(mode, request, low_memory=self._settings.low_memory, compile=self._settings.compile)
            session.hide_progress_bars()
            model = LoadedModel(session)
        self._models[key] = model
        return model

    @property
    def previews_per_second(self) -> float:
        """Largest rate of previews."""
        return self._settings.previews_per_second

    def send_preview(self, model: LoadedModel, job: str, image: int, step: int, latents: Any) -> None:
        """Send the preview of an image.

        Args:
            model: Its model.
            job: Id of its job.
            image: Its position in the job.
            step: Number of finished steps.
            latents: Its latents, (4, height, width).
        """
        if model.has_no_preview:
            return
        try:
            url = self._previews(model).data_url(latents)
        except RuntimeError as error:  # no preview is worth a job
            model.has_no_preview = True
            print(f"no previews: {error}", file=sys.stderr)
        else:
            self._send(messages.Preview(job, image, step, url))

    def _previews(self, model: LoadedModel) -> Previews:
        if model.previews is None:
            model.previews = new_previews(model.session.decoder)
        return model.previews


@dataclasses.dataclass(frozen=True)
class JobRun:
    """A job that is ready to run.

    Attributes:
        order: The server's order.
        job: The request of the API.
        model: Settings of its model.
        prepared: The request of generation with its networks.
        reporter: Reports progress.
        loaded: The networks in memory.
    """

    order: messages.Order
    job: JobRequest
    model: ModelSettings
    prepared: Job
    reporter: ProgressReporter
    loaded: LoadedModel


class _StepWatch:
    """Callback after each step of images that run together: progress, previews, cancellation."""

    def __init__(self, worker: Worker, chunk: list[tuple[JobRun, int]]) -> None:
        self._worker, self._chunk = worker, chunk
        self._prior_steps = 0
        self._last_preview = 0.0

    def begin(self) -> None:
        for run, position in self._chunk:
            run.reporter.begin(position)

    def __call__(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> None:
        is_prior = pipe is self._chunk[0][0].prepared.networks.prior
        self._prior_steps += is_prior  # a mixture runs the prior once per text
        self._check_cancelled()
        for number, (run, _position) in enumerate(self._chunk):
            if is_prior:
                run.reporter.step("prior", self._prior_steps, measured=number == 0)
            else:
                run.reporter.step("decoder", step + 1, measured=number == 0)
        rate = self._worker.previews_per_second
        if not is_prior and rate > 0 and time.monotonic() - self._last_preview >= 1 / rate:
            self._last_preview = time.monotonic()
            self._send_previews(step, tensors["latents"])

    def _check_cancelled(self) -> None:
        """Stop if all jobs were cancelled: the images of a batch cannot stop one by one."""
        for run, _ in self._chunk:
            if not run.reporter.is_cancelled():
                return
        raise CancelledError

    def _send_previews(self, step: int, latents: Any) -> None:
        for (run, position), rows in zip(self._chunk, latents, strict=True):
            if run.job.previews:
                self._worker.send_preview(run.loaded, run.order.job, position, step + 1, rows)


def _open_inputs(paths: dict[str, str], images: InputImages) -> dict[str, InputFile]:
    """Return the records of the input pictures; their pixels are added to `images`."""
    records = {}
    for name, path in paths.items():
        try:
            content = Path(path).read_bytes()
        except OSError:
            raise KandinskyError(f"the picture {name} of the job does not exist any more") from None
        stem = Path(path).stem
        recorded_name = f"{stem if len(stem) == 22 else stem[:16]}.png"
        records[name] = images.add(name, content, recorded_name)
    return records


def _prior_steps(job: Job) -> int:
    """Return the number of steps of the prior per image."""
    request = job.request
    steps = request.prior_steps or 0
    if request.prompt is not None:
        return steps
    texts = sum(item.text is not None for item in request.parts or ())
    return steps * (texts + (request.negative_prompt is not None))


def _decoder_steps(job: Job) -> int:
    """Return the number of steps of the decoder per image."""
    from kandinsky22.generation import stages

    steps = job.request.steps or 1
    if job.request.strength is not None and "strength" in stages.call_parameters(job.networks.decoder):
        return stages.steps_after_strength(job.networks.decoder, steps, job.request.strength)
    return steps
