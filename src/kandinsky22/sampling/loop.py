"""The denoising loop. It serves the prior and all decoders, because every difference is prepared before it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from kandinsky22.noise import Generators
from kandinsky22.sampling.guidance import Guidance
from kandinsky22.sampling.scheduler_adapter import SchedulerAdapter, TimestepSchedule

Denoise: TypeAlias = Callable[[Tensor, Any], Tensor]
"""A network bound to its condition: (sample, timestep) -> prediction."""

BindCondition: TypeAlias = Callable[[Mapping[str, Tensor]], Denoise]
"""Encodes the condition from the tensors of a call, and binds the network to it."""

PostStep: TypeAlias = "Callable[[Tensor, LoopState], Tensor]"
"""Post-step hook: (latents, state) -> latents; inpainting uses it to restore the known region."""


@dataclasses.dataclass
class LoopState:
    """Mutable loop state; the caller of `sample` may modify it between steps.

    Attributes:
        latents: Current latents, (batch, channels, ...).
        tensors: Tensors that the condition is encoded from, by name: 2 x batch rows, negative half first, if guidance
            is enabled, otherwise batch rows.
        guidance: Guidance of the coming steps.
        index: Index of the last evaluated timestep.
        timestep: The last evaluated timestep; None before the first.
        tensors_exposed: Whether a callback holds `tensors` and may modify them in place.
    """

    latents: Tensor
    tensors: dict[str, Tensor]
    guidance: Guidance
    index: int = 0
    timestep: Any = None
    tensors_exposed: bool = False


def sample(
    state: LoopState,
    schedule: TimestepSchedule,
    bind_condition: BindCondition,
    generator: Generators,
    post_step: PostStep | None = None,
) -> Iterator[LoopState]:
    """Denoise `state.latents` along the timesteps of `schedule`.

    A guided step evaluates one batch that holds the unconditional half, then the conditional half. Every other step
    evaluates the conditional half alone. A condition is encoded again only after its tensors
    changed, or when guidance begins or ends.

    Args:
        state: Latents, condition tensors and guidance.
        schedule: Timesteps and scheduler of the call.
        bind_condition: Encodes the condition.
        generator: Generators for the noise that steps add; None uses torch's global generator.
        post_step: Hook after each step; None changes nothing.

    Yields:
        `state`, after each step.
    """
    condition, adapter = ConditionCache(bind_condition), SchedulerAdapter(schedule, generator)
    scheduler = schedule.scheduler
    for index, timestep in enumerate(schedule.timesteps):
        guided = state.guidance.is_active(schedule.progress(index))
        denoise = condition.bound_network(state, guided)
        batch = torch.cat([state.latents] * 2) if guided else state.latents
        model_input = scheduler.scale_model_input(batch, timestep)
        output = denoise(model_input, timestep)
        if guided:
            output = state.guidance.combine(output, model_input[: len(state.latents)], scheduler, timestep)
        latents = adapter.step(index, output, state.latents)
        state.index, state.timestep = index, timestep
        state.latents = latents if post_step is None else post_step(latents, state)
        yield state


class ConditionCache:
    """The network bound to its condition, encoded again when a tensor was replaced or modified or guidance switched.

    Args:
        bind_condition: Encodes the condition.
    """

    def __init__(self, bind_condition: BindCondition) -> None:
        self._bind_condition = bind_condition
        self._denoise: Denoise | None = None
        self._encoded: list[tuple[Tensor, int]] = []  # tensors that the condition was encoded from, and their versions
        self._guided = False

    def bound_network(self, state: LoopState, guided: bool) -> Denoise:
        """Return the network bound to the current condition.

        Args:
            state: The loop state.
            guided: Whether both halves of a guided batch are evaluated, or the conditional half alone.
        """
        if self._denoise is None or self._is_stale(state, guided):
            first_row = 0 if guided else -len(state.latents)  # the conditional half comes last
            self._denoise = self._bind_condition({name: tensor[first_row:] for name, tensor in state.tensors.items()})
            self._encoded = [(tensor, _version(tensor)) for tensor in state.tensors.values()]
            self._guided = guided
        return self._denoise

    def _is_stale(self, state: LoopState, guided: bool) -> bool:
        tensors = list(state.tensors.values())
        if guided != self._guided or len(tensors) != len(self._encoded):
            return True
        # Inference tensors do not count modifications: assume one if a callback holds the tensor.
        if state.tensors_exposed and any(tensor.is_inference() for tensor in tensors):
            return True
        return any(
            tensor is not encoded or _version(tensor) != version
            for tensor, (encoded, version) in zip(tensors, self._encoded, strict=True)
        )


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
