"""What the sampling loop asks of a scheduler, ours or anyone's with the public protocol: timesteps, then steps."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor

from kandinsky22.errors import InputError, KandinskyError
from kandinsky22.inputs import validation
from kandinsky22.noise import Generators
from kandinsky22.schedulers.base import Scheduler

Times: TypeAlias = Sequence[int] | Tensor | None
Levels: TypeAlias = Sequence[float] | Tensor | None

LEARNED = ("learned", "learned_range")
# Of the reference, these know learned variances only as channels 4 to 6, behind a picture's three, and drop them.
OF_THREE_CHANNELS = {
    "DPMSolverMultistepScheduler",
    "DPMSolverMultistepInverseScheduler",
    "DPMSolverSinglestepScheduler",
    "SASolverScheduler",
}


@dataclasses.dataclass(frozen=True)
class Steps:
    """Which steps a call makes: a number of them, or else the `timesteps` or the `sigmas` themselves, in the form that
    the scheduler's `set_timesteps` takes."""

    number: Any
    timesteps: Any = None
    sigmas: Any = None

    def choose(self, scheduler: Any, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """Set the scheduler's timesteps, and return them. Raises InputError for steps it does not have, and for a
        scheduler that cannot step samples of `shape`, before any network has to run for that."""
        chosen: dict[str, Any] = {"num_inference_steps": validation.whole("num_inference_steps", self.number)}
        given = {"timesteps": self.timesteps, "sigmas": self.sigmas}
        if custom := {name: value for name, value in given.items() if value is not None}:
            if len(custom) > 1:
                raise InputError("timesteps and sigmas are given: one of them is needed, or none")
            chosen = custom
        name = next(iter(chosen))
        if name not in inspect.signature(scheduler.set_timesteps).parameters:
            raise InputError(f"{name}: {type(scheduler).__name__} takes none; a number of steps is needed")
        with _named(scheduler, f"{name}={chosen[name]!r}"):
            scheduler.set_timesteps(**chosen, device=device)
        if not isinstance(scheduler, Scheduler):
            with _named(scheduler, "a step"), torch.random.fork_rng(devices=[]):
                _try(copy.deepcopy(scheduler), shape)
        timesteps: Tensor = scheduler.timesteps
        return timesteps


class Stepper:
    """The steps of one run: what the scheduler's `step` accepts is handed to it, and what it cannot use is not."""

    def __init__(self, scheduler: Any, timesteps: Tensor, generator: Generators) -> None:
        self._scheduler, self._timesteps = scheduler, timesteps
        self._accepted = inspect.signature(scheduler.step).parameters
        self._options: dict[str, Any] = {"return_dict": False}
        if "generator" in self._accepted:
            self._options["generator"] = generator
        self._learned = uses_learned_variance(scheduler)
        self._flat = _expects_pixels(scheduler)

    def __call__(self, index: int, output: Tensor, latents: Tensor) -> Tensor:
        """The latents after step `index` of the timesteps, from those before it and the network's output."""
        if not self._learned:
            output = output[:, : latents.shape[1]]  # the rest, if any, is a learned variance nobody asked for
        if "prev_timestep" in self._accepted:
            to_come = self._timesteps[index + 1 :]
            self._options["prev_timestep"] = to_come[0] if len(to_come) else None
        before = latents
        if self._flat:  # of a single channel nothing is taken for a variance; the arithmetic is the same in any shape
            output, before = (each.flatten(1)[:, None] for each in (output, latents))
        after = self._scheduler.step(output, self._timesteps[index], before, **self._options)[0]
        made: Tensor = after.reshape(latents.shape).to(latents.dtype)
        return made


def uses_learned_variance(scheduler: Any) -> bool:
    """Whether `step` takes a learned variance. A config may have inherited that setting from another scheduler's, so
    it counts only where the class itself has it."""
    own = getattr(scheduler, "config_class", None)
    settings = inspect.signature(type(scheduler)).parameters if own is None else own.names()
    learned = "variance_type" in settings and getattr(scheduler.config, "variance_type", None) in LEARNED
    return learned and not _expects_pixels(scheduler)


def _expects_pixels(scheduler: Any) -> bool:
    names = {kind.__name__ for kind in type(scheduler).__mro__}
    return not isinstance(scheduler, Scheduler) and bool(names & OF_THREE_CHANNELS)


@contextmanager
def _named(scheduler: Any, what: str) -> Iterator[None]:
    """Whatever goes wrong in somebody else's scheduler is an InputError that names it."""
    try:
        yield
    except KandinskyError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"scheduler: {type(scheduler).__name__} cannot make {what} ({reason})") from error


def _try(scheduler: Any, shape: tuple[int, ...]) -> None:
    """Make the first step of a tiny sample."""
    timestep = scheduler.timesteps[0]
    sample = torch.zeros(1, shape[1], *[2] * (len(shape) - 2), device=timestep.device) * scheduler.init_noise_sigma
    seen = scheduler.scale_model_input(sample, timestep)
    output = torch.cat([seen, seen], dim=1)
    Stepper(scheduler, scheduler.timesteps, torch.Generator().manual_seed(0))(0, output, sample)
