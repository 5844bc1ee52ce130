"""Progress of a job in a worker, with estimates from measured times, and cancellation between steps."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

from kandinsky22.serve.messages import JobProgress

SMOOTHING = 0.5  # weight of the newest measurement
MIN_INTERVAL = 0.05  # seconds between two progress messages


class CancelledError(Exception):
    """The job was cancelled."""


@dataclasses.dataclass
class StageTimes:
    """Measured times of one model.

    Attributes:
        prior: Seconds per step of the prior.
        decoder: Seconds per step of the decoder.
        decode: Seconds from the last step to the finished file.
    """

    prior: float | None = None
    decoder: float | None = None
    decode: float | None = None

    def add(self, stage: str, seconds: float) -> None:
        """Take a measurement into account.

        Args:
            stage: Name of the attribute.
            seconds: The measured time.
        """
        old = getattr(self, stage)
        setattr(self, stage, seconds if old is None else (1 - SMOOTHING) * old + SMOOTHING * seconds)


class ProgressReporter:
    """Reports the progress of one job.

    Args:
        job: Id of the job.
        images: Number of images.
        prior_steps: Steps of the prior per image.
        decoder_steps: Steps of the decoder per image.
        times: Measured times of the model, which are updated.
        send: Sends a message to the server.
        is_cancelled: Returns whether the job was cancelled.
    """

    def __init__(
        self,
        job: str,
        *,
        images: int,
        prior_steps: int,
        decoder_steps: int,
        times: StageTimes,
        send: Callable[[Any], None],
        is_cancelled: Callable[[], bool],
    ) -> None:
        self._job, self._images, self._times, self._send = job, images, times, send
        self._steps = {"prior": prior_steps, "decoder": decoder_steps}
        self._is_cancelled = is_cancelled
        self._image, self._last_time, self._last_sent = 0, time.monotonic(), 0.0
        self._reported = 0.0

    def begin(self, image: int) -> None:
        """Begin an image.

        Args:
            image: Its index in the job.
        """
        self._image, self._last_time = image, time.monotonic()
        self._report("prior" if self._steps["prior"] else "decoder", 0)

    def step(self, stage: str, step: int, *, measured: bool = True) -> None:
        """Report a finished step.

        Args:
            stage: "prior" or "decoder".
            step: Number of finished steps of the stage.
            measured: Whether the time of the step is measured: once for images that run together.
        """
        if measured:
            self._measure(stage)
        is_last = stage == "decoder" and step >= self._steps["decoder"]
        if is_last:
            self._report("decode", 0)
        elif time.monotonic() - self._last_sent >= MIN_INTERVAL or step == self._steps[stage]:
            self._report(stage, step)

    def end(self) -> None:
        """Report that the image is finished."""
        self._measure("decode")

    def is_cancelled(self) -> bool:
        """Return whether the job was cancelled."""
        return self._is_cancelled()

    def _measure(self, stage: str) -> None:
        now = time.monotonic()
        self._times.add(stage, now - self._last_time)
        self._last_time = now

    def _report(self, stage: str, step: int) -> None:
        self._last_sent = time.monotonic()
        steps = self._steps.get(stage, 1)
        left = self._seconds_left(stage, step)
        self._send(
            JobProgress(
                self._job,
                stage,
                self._image,
                self._images,
                min(step, steps),
                steps,
                self._fraction(stage, step),
                None if left is None else round(left, 2),
            )
        )

    def _image_seconds(self) -> tuple[float, float, float]:
        """Return the expected seconds of prior, decoder and decoding per image; without measurements, rough shares."""
        decoder = self._times.decoder if self._times.decoder is not None else 1.0
        prior = self._times.prior if self._times.prior is not None else decoder / 10
        decode = self._times.decode if self._times.decode is not None else decoder * 2
        return prior * self._steps["prior"], decoder * self._steps["decoder"], decode

    def _done_seconds(self, stage: str, step: int) -> float:
        prior, decoder, _ = self._image_seconds()
        if stage == "prior":
            return prior * min(1.0, step / max(1, self._steps["prior"]))
        if stage == "decoder":
            return prior + decoder * min(1.0, step / max(1, self._steps["decoder"]))
        return prior + decoder

    def _fraction(self, stage: str, step: int) -> float:
        total = sum(self._image_seconds())
        fraction = round(min(1.0, (self._image + self._done_seconds(stage, step) / total) / self._images), 4)
        self._reported = max(self._reported, fraction)  # better estimates never lead backwards
        return self._reported

    def _seconds_left(self, stage: str, step: int) -> float | None:
        if self._times.decoder is None:
            return None
        total = sum(self._image_seconds())
        return total * (self._images - self._image) - self._done_seconds(stage, step)
