"""Adapter between the denoising loop and a scheduler: timesteps first, then one step at a time.

Any object with the public scheduler protocol works: ours, or one of another library.
"""

from __future__ import annotations

import bisect
import contextlib
import copy
import dataclasses
import inspect
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from kandinsky22.errors import InputError, KandinskyError, describe, invalid
from kandinsky22.inputs import validation
from kandinsky22.kernels.locks import GLOBAL_RNG, global_rng_restored
from kandinsky22.noise import Generators
from kandinsky22.schedulers.base import Scheduler

Timesteps: TypeAlias = Sequence[int] | Tensor | None
Sigmas: TypeAlias = Sequence[float] | Tensor | None

LEARNED_VARIANCE_TYPES = ("learned", "learned_range")
# These classes of the reference expect a learned variance in channels 4 to 6, behind the three of an RGB image.
DROPS_VARIANCE_FOR_RGB_ONLY = {
    "DPMSolverMultistepScheduler",
    "DPMSolverMultistepInverseScheduler",
    "DPMSolverSinglestepScheduler",
    "SASolverScheduler",
}


@dataclasses.dataclass(frozen=True)
class TimestepOptions:
    """The steps that a call requests, in the forms that `set_timesteps` of schedulers accepts.

    Attributes:
        num_inference_steps: Number of steps.
        timesteps: Descending timesteps, instead of a number; None leaves them to the scheduler.
        sigmas: Descending noise levels, instead of a number; None leaves them to the scheduler.
    """

    num_inference_steps: int
    timesteps: Timesteps = None
    sigmas: Sigmas = None


@dataclasses.dataclass(frozen=True)
class TimestepSchedule:
    """The timesteps of one call, and the scheduler that steps along them.

    Attributes:
        scheduler: The call's own copy of the pipeline's scheduler. Its timesteps are set.
        timesteps: The last timesteps of the scheduler, all of them or those that `after_strength` leaves: one per
            network evaluation.
    """

    scheduler: Any
    timesteps: Tensor

    @property
    def order(self) -> int:
        """Network evaluations per step of the method."""
        return int(getattr(self.scheduler, "order", 1))

    def progress(self, index: int) -> float:
        """Return the fraction of the whole denoising process at which the step of an evaluation begins, 0 to 1.

        Args:
            index: Index into `timesteps`.
        """
        starts, evaluation = step_starts(self.scheduler), self._left_out + index
        return (bisect.bisect_right(starts, evaluation) - 1) / len(starts)

    def after_strength(self, strength: float) -> TimestepSchedule:
        """Return the schedule with only the last steps, starting on a step boundary.

        Args:
            strength: Fraction of the steps that run, 0 (none) to 1 (all), rounded down to whole steps.

        Raises:
            InputError: If strength is not a number from 0 to 1.
        """
        fraction = validation.finite_float("strength", strength)
        if not 0 <= fraction <= 1:
            raise invalid("strength", strength, "a number from 0 (keep the image) to 1 (run all steps)")
        starts = [start - self._left_out for start in step_starts(self.scheduler) if start >= self._left_out]
        steps = int(len(starts) * fraction)
        first = starts[-steps] if steps else len(self.timesteps)
        return dataclasses.replace(self, timesteps=self.timesteps[first:])

    @property
    def _left_out(self) -> int:
        """Number of the first timesteps of the scheduler that the call leaves out."""
        return len(self.scheduler.timesteps) - len(self.timesteps)


def step_starts(scheduler: Any) -> list[int]:
    """Return the indices in the timesteps of a scheduler with which steps begin.

    Args:
        scheduler: Any object with the scheduler protocol, whose timesteps are set. Without `step_starts` all steps have
            `order` network evaluations, except the last, which may have fewer.
    """
    starts = getattr(scheduler, "step_starts", None)
    if isinstance(starts, list):
        return starts
    return list(range(0, len(scheduler.timesteps), int(getattr(scheduler, "order", 1))))


def schedule_timesteps(
    scheduler: Any, options: TimestepOptions, *, shape: tuple[int, ...], device: torch.device
) -> TimestepSchedule:
    """Set timesteps on a copy of the scheduler. The only place where a call sets timesteps.

    The copy belongs to the call: calls in other threads and later calls do not see its state. A scheduler with a method
    that was replaced on the object itself is not copied, because such a function usually calls the original's methods.

    Args:
        scheduler: Any object with the scheduler protocol. It is not changed.
        options: The requested steps.
        shape: Shape of the latents.
        device: Device of the timesteps.

    Returns:
        The schedule of the call.

    Raises:
        InputError: If the scheduler cannot make these timesteps, or cannot step a sample of this shape. This is found
            before any network runs.
    """
    requested: dict[str, Any] = {
        "num_inference_steps": validation.positive_int("num_inference_steps", options.num_inference_steps)
    }
    custom = {name: getattr(options, name) for name in ("timesteps", "sigmas") if getattr(options, name) is not None}
    if len(custom) > 1:
        raise InputError("timesteps and sigmas are both passed: expected at most one of them")
    requested = custom or requested
    (name, value), *_ = requested.items()
    if name not in inspect.signature(scheduler.set_timesteps).parameters:
        raise invalid(name, value, f"None, since {type(scheduler).__name__}.set_timesteps does not accept it")
    with _scheduler_errors(scheduler, "be copied"):
        scheduler = scheduler if _has_replaced_methods(scheduler) else copied(scheduler)
    with _scheduler_errors(scheduler, f"make {name}={describe(value)}"):
        scheduler.set_timesteps(**requested, device=device)
    if not isinstance(scheduler, Scheduler):
        with _scheduler_errors(scheduler, "make a step"), global_rng_restored():
            _dry_run(copied(scheduler), shape)
    return TimestepSchedule(scheduler, scheduler.timesteps)


def copied(scheduler: Any) -> Any:
    """Return a deep copy of a scheduler, ours or one of another library.

    Args:
        scheduler: Any object. Tensors in its state that depend on parameters, which Python cannot copy, are detached.
    """
    memo: dict[int, Any] = {}
    remaining, visited = [scheduler], {id(scheduler)}
    while remaining:
        value = remaining.pop()
        parts: list[Any] = []
        if isinstance(value, Tensor):
            if not value.is_leaf:
                memo[id(value)] = value.detach().clone()
        elif isinstance(value, list | tuple):
            parts = list(value)
        elif isinstance(value, dict):
            parts = list(value.values())
        elif not callable(value):
            parts = list(getattr(value, "__dict__", {}).values())
        remaining += [part for part in parts if id(part) not in visited]
        visited.update(map(id, parts))
    return copy.deepcopy(scheduler, memo)


def _has_replaced_methods(scheduler: Any) -> bool:
    """Return whether a method of the protocol is an attribute of the object instead of its class."""
    names = ("set_timesteps", "scale_model_input", "step", "add_noise")
    return any(name in getattr(scheduler, "__dict__", {}) for name in names)


class SchedulerAdapter:
    """Calls a scheduler's `step` with the arguments that it accepts.

    Args:
        schedule: The timesteps of the call.
        generator: Generators for the noise that a step adds; None uses torch's global generator.
    """

    def __init__(self, schedule: TimestepSchedule, generator: Generators) -> None:
        self._schedule = schedule
        accepted = inspect.signature(schedule.scheduler.step).parameters
        self._takes_prev_timestep = "prev_timestep" in accepted
        self._options: dict[str, Any] = {"return_dict": False}
        if "generator" in accepted:
            self._options["generator"] = generator
        self._draws_globally = "generator" not in accepted or generator is None
        self._learned_variance = uses_learned_variance(schedule.scheduler)
        self._rgb_only = _drops_variance_for_rgb_only(schedule.scheduler)

    def step(self, index: int, output: Tensor, latents: Tensor) -> Tensor:
        """Return the latents after one step.

        Args:
            index: Index into the timesteps of the call.
            output: Network output (batch, channels, ...), with or without learned-variance channels.
            latents: Latents before the step, (batch, latent channels, ...).
        """
        timesteps = self._schedule.timesteps
        if not self._learned_variance:
            output = output[:, : latents.shape[1]]  # drop the learned-variance channels
        if self._takes_prev_timestep:
            self._options["prev_timestep"] = timesteps[index + 1] if index + 1 < len(timesteps) else None
        sample = latents
        if self._rgb_only:
            # With a single channel nothing is mistaken for a variance; the arithmetic is elementwise.
            output, sample = output.flatten(1)[:, None], latents.flatten(1)[:, None]
        with GLOBAL_RNG if self._draws_globally else contextlib.nullcontext():
            stepped = self._schedule.scheduler.step(output, timesteps[index], sample, **self._options)[0]
        result: Tensor = stepped.reshape(latents.shape).to(latents.dtype)
        return result


def uses_learned_variance(scheduler: Any) -> bool:
    """Return whether `step` uses a learned variance.

    A config may have inherited `variance_type` from another scheduler's file. It counts only if the class has that
    setting.

    Args:
        scheduler: Any object with the scheduler protocol.
    """
    config_class = getattr(scheduler, "config_class", None)
    settings = inspect.signature(type(scheduler)).parameters if config_class is None else config_class.names()
    learned = getattr(scheduler.config, "variance_type", None) in LEARNED_VARIANCE_TYPES
    return "variance_type" in settings and learned and not _drops_variance_for_rgb_only(scheduler)


def _drops_variance_for_rgb_only(scheduler: Any) -> bool:
    names = {base.__name__ for base in type(scheduler).__mro__}
    return not isinstance(scheduler, Scheduler) and bool(names & DROPS_VARIANCE_FOR_RGB_ONLY)


@contextlib.contextmanager
def _scheduler_errors(scheduler: Any, task: str) -> Iterator[None]:
    """Turn errors of another library's scheduler into an InputError that names it."""
    try:
        yield
    except KandinskyError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"scheduler: {type(scheduler).__name__} cannot {task} ({reason})") from error


def _dry_run(scheduler: Any, shape: tuple[int, ...]) -> None:
    """Make the first step of a tiny sample."""
    timestep = scheduler.timesteps[0]
    size = 1, shape[1], *[2] * (len(shape) - 2)
    sample = torch.zeros(size, dtype=torch.float32, device=timestep.device) * scheduler.init_noise_sigma
    model_input = scheduler.scale_model_input(sample, timestep)
    output = torch.cat([model_input, model_input], dim=1)
    adapter = SchedulerAdapter(TimestepSchedule(scheduler, scheduler.timesteps), torch.Generator().manual_seed(0))
    adapter.step(0, output, sample)
