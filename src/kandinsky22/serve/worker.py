"""Worker process: keeps networks in memory and generates the images of jobs.

It ends when the server's end of the connection is closed, so that no worker outlives its server.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import os
import queue
import signal
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kandinsky22.errors import KandinskyError
from kandinsky22.generation.input_images import InputImages
from kandinsky22.generation.memory_errors import is_out_of_memory
from kandinsky22.generation.modes import MODES
from kandinsky22.generation.recipe import InputFile
from kandinsky22.generation.request import Request
from kandinsky22.serve import messages
from kandinsky22.serve.files import Files, image_id
from kandinsky22.serve.previews import PreviewMap
from kandinsky22.serve.progress import CancelledError, ProgressReporter, StageTimes
from kandinsky22.serve.requests import generation_request, title
from kandinsky22.serve.schemas import JobRequest
from kandinsky22.serve.settings import ModelSettings
from kandinsky22.serve.store import now

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
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server decides when the worker ends
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    Worker(connection, options).run()


@dataclasses.dataclass
class LoadedModel:
    """Networks in memory with what was measured about them."""

    session: Session
    times: StageTimes = dataclasses.field(default_factory=StageTimes)
    preview: PreviewMap | None = None


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
        threading.Thread(target=self._receive, daemon=True).start()
        threading.Thread(target=self._show_life, daemon=True).start()
        self._preload()
        self._send(messages.Ready(self._options.device))
        while True:
            for order in self._orders.get():
                self._run_order(order)

    def _receive(self) -> None:
        try:
            while True:
                message = self._connection.recv()
                if isinstance(message, messages.Run):
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
        with contextlib.suppress(KandinskyError, OSError, RuntimeError):  # the first job reports it
            request = generation_request(job, self._options.preload, self._settings, self._options.device, {})
            model = self._loaded("generate", request)
            self._preview_map(model)

    def _run_order(self, order: messages.Order) -> None:
        try:
            self._generate(order)
        except CancelledError:
            self._send(messages.JobCancelled(order.job))
        except Exception as error:
            self._report_failure(order.job, error)
        else:
            self._send(messages.JobDone(order.job))
        finally:
            self._cancelled.discard(order.job)

    def _report_failure(self, job: str, error: Exception) -> None:
        if is_out_of_memory(error):
            self._models.clear()  # another model may fit now
            self._send(messages.JobFailed(job, OUT_OF_MEMORY, again=True))
        elif isinstance(error, KandinskyError | OSError):
            self._send(messages.JobFailed(job, " ".join(str(error).split()) or type(error).__name__))
        else:
            import traceback

            traceback.print_exc()  # a defect: the details belong to the server's log, not to its clients
            self._send(messages.JobFailed(job, f"internal error ({type(error).__name__})"))

    def _generate(self, order: messages.Order) -> None:
        job = JobRequest.model_validate(order.request)
        self._send(messages.JobProgress(order.job, "loading", 0, job.count, 0, 1, 0.0, None))
        settings_model = self._settings.model(str(job.model))
        if settings_model is None:
            raise KandinskyError(f"the server has no model {job.model!r} any more")
        images = InputImages()
        records = _open_inputs(order.inputs, images)
        request = generation_request(job, settings_model, self._settings, self._options.device, records)
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
        for position in order.positions:
            reporter.begin(position)
            watch = _StepWatch(self, order.job, position, prepared, reporter, model if job.previews else None)
            image = prepared.generate(request.seeds[position], watch)
            self._save(order, job, settings_model, position, image)
            reporter.end()

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

    def _preview_map(self, model: LoadedModel) -> PreviewMap | None:
        if self._settings.previews_per_second <= 0:
            return None
        if model.preview is None:
            decoder = model.session.decoder
            model.preview = PreviewMap(decoder.movq, decoder.device)
        return model.preview


class _StepWatch:
    """Callback after each step of one image: progress, previews, cancellation."""

    def __init__(
        self,
        worker: Worker,
        job: str,
        image: int,
        prepared: Job,
        reporter: ProgressReporter,
        model: LoadedModel | None,
    ) -> None:
        self._worker, self._job, self._image = worker, job, image
        self._prepared, self._reporter, self._model = prepared, reporter, model
        self._prior_steps = 0
        self._last_preview = 0.0

    def __call__(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> None:
        if pipe is self._prepared.networks.prior:
            self._prior_steps += 1  # a mixture runs the prior once per text
            self._reporter.step("prior", self._prior_steps)
            return
        self._reporter.step("decoder", step + 1)
        rate = self._worker._settings.previews_per_second
        if self._model is None or rate <= 0 or time.monotonic() - self._last_preview < 1 / rate:
            return
        self._last_preview = time.monotonic()
        preview = self._worker._preview_map(self._model)
        if preview is not None:
            url = preview.data_url(tensors["latents"][0])
            self._worker._send(messages.Preview(self._job, self._image, step + 1, url))


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
