"""What the routes of the API share."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, cast

from fastapi import Depends, Request

from kandinsky22.serve.events import Listener
from kandinsky22.serve.failures import ApiError, not_found
from kandinsky22.serve.files import Files
from kandinsky22.serve.gallery import ENDED, Gallery
from kandinsky22.serve.job_store import JobRow, KeyReusedError, QueueFullError
from kandinsky22.serve.metrics import Metrics
from kandinsky22.serve.model_facts import model_facts
from kandinsky22.serve.schemas import JobRequest
from kandinsky22.serve.settings import ModelSettings, ServerSettings
from kandinsky22.serve.store import Store
from kandinsky22.serve.supervisor import Supervisor
from kandinsky22.serve.tokens import TokenGuard

POLL_SECONDS = 1.0  # interval at which disconnected clients are noticed


@dataclasses.dataclass
class WebUiState:
    """What the API of the Stable Diffusion web UI keeps between requests.

    Attributes:
        model: Id of the model that requests use which name none; None for the default one.
        jobs: Ids of the jobs that run for this API.
    """

    model: str | None = None
    jobs: set[str] = dataclasses.field(default_factory=set)


@dataclasses.dataclass(frozen=True)
class Services:
    """Parts of a running server.

    Attributes:
        settings: Settings of the server.
        gallery: Jobs and images.
        supervisor: Worker processes.
        metrics: Counters for Prometheus.
        guard: Checks tokens.
        sdapi: State of the API of the Stable Diffusion web UI.
    """

    settings: ServerSettings
    gallery: Gallery
    supervisor: Supervisor
    metrics: Metrics
    guard: TokenGuard
    sdapi: WebUiState = dataclasses.field(default_factory=WebUiState)

    @property
    def store(self) -> Store:
        """The database."""
        return self.gallery.store

    @property
    def files(self) -> Files:
        """The files."""
        return self.gallery.files

    def submit(self, job: JobRequest, key: str | None = None) -> tuple[JobRow, bool]:
        """Queue a job and wake the workers.

        Args:
            job: The job.
            key: Idempotency key; None for none.

        Returns:
            The job, and whether it is new.

        Raises:
            KandinskyError: If the job is invalid.
            ApiError: If the queue is full, or if the key was used for another request.
        """
        try:
            row, is_new = self.gallery.submit(job, key)
        except QueueFullError as error:
            raise ApiError(429, "queue_full", str(error)) from None
        except KeyReusedError as error:
            raise ApiError(409, "key_reused", str(error), "Idempotency-Key") from None
        if is_new:
            self.metrics.submitted.labels(job.mode).inc()
            self.supervisor.wake()
        return row, is_new

    def cancel(self, job: str) -> JobRow:
        """Cancel a job.

        Args:
            job: Id of the job.

        Returns:
            The job.

        Raises:
            ApiError: If there is no such job.
        """
        row = self.gallery.cancel(job)
        if row.state == "running":
            self.supervisor.cancel(job)
        return row

    def job(self, id: str) -> JobRow:
        """Return a job.

        Args:
            id: Id of the job.

        Raises:
            ApiError: If there is no such job.
        """
        row = self.store.job(id)
        if row is None:
            raise not_found("job")
        return row

    def model_facts(self, model: ModelSettings) -> dict[str, Any]:
        """Return a model as the API shows it.

        Args:
            model: The model.
        """
        return model_facts(model)

    async def wait(self, job: str, *, cancel_if: Callable[[], Awaitable[bool]] | None = None) -> JobRow:
        """Return a job when it has ended.

        Args:
            job: Id of the job.
            cancel_if: Asked again and again whether the job is to be cancelled, because nobody waits for it any more;
                None never cancels it.

        Raises:
            ApiError: If the server stops before that.
        """
        listener = self.gallery.hub.listen(job)
        ended = asyncio.ensure_future(self._end_event(listener))
        try:
            while True:
                row = await asyncio.to_thread(self.job, job)
                if row.state in ENDED:
                    return row
                if ended.done():
                    raise ApiError(503, "stopping", "the server stops; the job continues after its next start")
                await asyncio.wait([ended], timeout=POLL_SECONDS)
                if cancel_if is not None and not ended.done() and await cancel_if():
                    await asyncio.to_thread(self.cancel, job)
                    cancel_if = None
        finally:
            ended.cancel()

    async def _end_event(self, listener: Listener) -> None:
        async for event in listener.events():
            if event is not None and event.name == "end":
                return


def _services(request: Request) -> Services:
    return cast(Services, request.app.state.services)


Server = Annotated[Services, Depends(_services)]
"""Parameter of a route that receives the server's parts."""
