"""Messages between the server and its workers."""

from __future__ import annotations

import dataclasses
from typing import Any

from kandinsky22.serve.failures import JobFailure
from kandinsky22.serve.settings import ModelSettings, ServerSettings


@dataclasses.dataclass(frozen=True)
class Order:
    """A job for a worker.

    Attributes:
        job: Id of the job.
        request: Complete request as JSON.
        created_at: Time at which the job was queued.
        inputs: Paths of the input pictures, by the names of `JobRequest.pictures`.
        positions: Positions of the images that do not exist yet.
    """

    job: str
    request: dict[str, Any]
    created_at: str
    inputs: dict[str, str]
    positions: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class WorkerOptions:
    """What a worker process is started with.

    Attributes:
        settings: Settings of the server.
        device: Device of the worker.
        state: State folder.
        preload: Model whose networks are loaded before the first job; None for none.
    """

    settings: ServerSettings
    device: str
    state: str
    preload: ModelSettings | None = None


@dataclasses.dataclass(frozen=True)
class Run:
    """Server to worker: generate these jobs, in one batch if possible."""

    orders: tuple[Order, ...]


@dataclasses.dataclass(frozen=True)
class Cancel:
    """Server to worker: stop a job at its next step."""

    job: str


@dataclasses.dataclass(frozen=True)
class Ready:
    """Worker to server: the process can take jobs."""

    device: str


@dataclasses.dataclass(frozen=True)
class Unusable:
    """Worker to server: the process cannot take jobs, because its device is not available, and ends."""

    message: str


@dataclasses.dataclass(frozen=True)
class Alive:
    """Worker to server: a sign of life."""


@dataclasses.dataclass(frozen=True)
class JobProgress:
    """Worker to server: progress of a job, with the fields of `schemas.Progress`."""

    job: str
    stage: str
    image: int
    images: int
    step: int
    steps: int
    fraction: float
    seconds_left: float | None


@dataclasses.dataclass(frozen=True)
class Preview:
    """Worker to server: the image so far, as a data URL."""

    job: str
    image: int
    step: int
    url: str


@dataclasses.dataclass(frozen=True)
class ImageSaved:
    """Worker to server: an image and its record are on the disk."""

    job: str
    position: int
    id: str


@dataclasses.dataclass(frozen=True)
class JobDone:
    """Worker to server: all images of a job are on the disk."""

    job: str


@dataclasses.dataclass(frozen=True)
class JobFailed:
    """Worker to server: a job ended with an error.

    Attributes:
        job: Id of the job.
        failure: Why it failed.
        again: Whether another attempt may succeed.
    """

    job: str
    failure: JobFailure
    again: bool = False


@dataclasses.dataclass(frozen=True)
class JobCancelled:
    """Worker to server: a job has stopped."""

    job: str
