"""Shared by all pipelines that denoise: validated options, initial noise, the loop with progress and callbacks."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from kandinsky22.errors import InputError, invalid
from kandinsky22.inputs import validation
from kandinsky22.kernels import host_memory
from kandinsky22.noise import Generators, randn_tensor
from kandinsky22.pipelines.base import DiffusionPipeline
from kandinsky22.runtime.calls import CallState, claim_generators, current_state, running_states
from kandinsky22.sampling.guidance import Guidance
from kandinsky22.sampling.loop import Denoise, LoopState, PostStep, sample
from kandinsky22.sampling.scheduler_adapter import TimestepOptions, TimestepSchedule, schedule_timesteps

StepEndCallback: TypeAlias = Callable[[Any, int, Any, dict[str, Any]], "Mapping[str, Tensor] | None"]
"""`callback_on_step_end`: (pipe, step, timestep, tensors) -> tensors to replace, or None."""

LegacyCallback: TypeAlias = Callable[[int, Any, Tensor], Any]
"""`callback`: (step, timestep, latents)."""

STEP_END_PARAMETERS = ("pipe", "step", "timestep", "tensors")
CALLBACK_PARAMETERS = ("step", "timestep", "latents")

LATENTS = ["latents"]  # tensors that `callback_on_step_end` receives by default


@dataclasses.dataclass(frozen=True)
class Callbacks:
    """Callbacks of a call.

    Attributes:
        on_step_end: Called after each step; None calls nothing.
        tensor_inputs: Names of the tensors that `on_step_end` receives; None means none.
        callback: Legacy callback, which cannot change anything; None calls nothing.
        callback_steps: `callback` runs every `callback_steps` steps; None means 1.
    """

    on_step_end: StepEndCallback | None = None
    tensor_inputs: Sequence[str] | None = ("latents",)
    callback: LegacyCallback | None = None
    callback_steps: int | None = None

    @property
    def tensors_exposed(self) -> bool:
        """Whether a callback receives tensors."""
        return bool(self.tensor_inputs) and self.on_step_end is not None

    def checked(self, accepted_tensors: Sequence[str]) -> Callbacks:
        """Return the callbacks with defaults filled in.

        Args:
            accepted_tensors: Names that `tensor_inputs` may contain.

        Raises:
            InputError: If a callback is not callable, or another field is invalid.
        """
        return Callbacks(
            validation.optional_callable("callback_on_step_end", self.on_step_end, STEP_END_PARAMETERS),
            validation.subset_of("callback_on_step_end_tensor_inputs", self.tensor_inputs, accepted_tensors),
            validation.optional_callable("callback", self.callback, CALLBACK_PARAMETERS),
            1 if self.callback_steps is None else validation.positive_int("callback_steps", self.callback_steps),
        )


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """The arguments that all sampling calls share.

    Attributes:
        timesteps: The requested steps.
        guidance: Classifier-free guidance, validated.
        callbacks: Callbacks of the call.
        generator: One generator, a list with one per image, or None for torch's global generator.
        latents: Initial noise in the shape of the latents; None draws it.
    """

    timesteps: TimestepOptions
    guidance: Guidance
    callbacks: Callbacks = dataclasses.field(default_factory=Callbacks)
    generator: Generators = None
    latents: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class SamplingPlan:
    """A validated sampling run. No network has run yet.

    Attributes:
        shape: Shape of the latents.
        schedule: Timesteps, and the scheduler that steps along them.
        guidance: Classifier-free guidance.
        callbacks: Callbacks with defaults filled in.
        generators: None, one generator, or one per batch item.
        latents: Initial noise; None draws it.
    """

    shape: tuple[int, ...]
    schedule: TimestepSchedule
    guidance: Guidance
    callbacks: Callbacks
    generators: Generators
    latents: Tensor | None

    def with_strength(self, strength: float) -> SamplingPlan:
        """Return the plan with only the last steps, see `TimestepSchedule.after_strength`.

        Args:
            strength: Fraction of the steps that run, 0 to 1.
        """
        return dataclasses.replace(self, schedule=self.schedule.after_strength(strength))


class DenoisingPipeline(DiffusionPipeline):
    """Base of all pipelines that denoise.

    While a call runs, `guidance_scale` and `num_timesteps` describe it, and a callback may set `guidance_scale` for the
    steps to come. After each step `callback_on_step_end(pipe, step, timestep, tensors)` receives the requested tensors
    out of `_callback_tensor_inputs`, and may return a dict of tensors that replace them. `callback(step, timestep,
    latents)` runs every `callback_steps` steps and cannot change anything.
    """

    _callback_tensor_inputs: ClassVar[list[str]] = ["latents"]
    _last_call: CallState | None = None
    scheduler: Any

    @property
    def _call_state(self) -> CallState:
        """Values of the call that this thread runs, or else of the last call that began in any thread."""
        state = current_state(self) or self._last_call
        if state is None:
            state = self._last_call = CallState()
        return state

    @property
    def guidance_scale(self) -> float:
        """Guidance scale of the current or last call; a callback may set it for the remaining steps.

        Raises:
            InputError: If it is set to something that is not a number, while no call runs, or while several threads run
                calls and this is none of them.
        """
        return self._guidance_scale

    @guidance_scale.setter
    def guidance_scale(self, scale: float) -> None:
        running = running_states(self)
        if not running:
            raise InputError("guidance_scale can be set only while a call runs: pass guidance_scale= to the call")
        state = current_state(self) or (running[0] if len(running) == 1 else None)
        if state is None:
            raise InputError(
                f"guidance_scale cannot be set from here: {len(running)} calls run in other threads; set it in a "
                "callback of the call"
            )
        state.guidance_scale = validation.finite_float("guidance_scale", scale)

    @property
    def _guidance_scale(self) -> float:
        return self._call_state.guidance_scale

    @_guidance_scale.setter
    def _guidance_scale(self, scale: float) -> None:
        self._call_state.guidance_scale = scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether guidance is enabled."""
        return self._guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        """Number of network evaluations of the current or last call."""
        return self._call_state.num_timesteps

    @property
    def active_scheduler(self) -> Any:
        """Scheduler of the running or last call: a copy of `scheduler` with its timesteps set; None before any call."""
        return self._call_state.active_scheduler

    def interrupt(self) -> None:
        """Stop running calls after their current step. They return what they have by then.

        A callback stops its own call. Any other thread stops all running calls of this pipeline.
        """
        state = current_state(self)
        for each in running_states(self) if state is None else (state,):
            each.interrupted = True

    @property
    def _interrupt(self) -> bool:
        """Whether the call stops after its current step: the name by which callbacks of the reference set it."""
        return self._call_state.interrupted

    @_interrupt.setter
    def _interrupt(self, interrupted: bool) -> None:
        if interrupted:
            self.interrupt()
        else:
            self._call_state.interrupted = False

    def _plan_sampling(self, options: SamplingOptions, *, shape: tuple[int, ...], images: int) -> SamplingPlan:
        """Validate the sampling options for latents of this shape, which `images` results come from."""
        if options.latents is not None:
            validation.initial_latents(options.latents, shape)
        generators = validation.generators_per_item(options.generator, images, shape[0])
        claim_generators(self, generators if isinstance(generators, list | tuple) else [generators])
        callbacks = options.callbacks.checked(self._callback_tensor_inputs)
        options.guidance.check_scheduler(self.scheduler)
        schedule = schedule_timesteps(self.scheduler, options.timesteps, shape=shape, device=self._execution_device)
        return SamplingPlan(shape, schedule, options.guidance, callbacks, generators, options.latents)

    def _standard_noise(self, plan: SamplingPlan, dtype: torch.dtype) -> Tensor:
        """Return standard normal noise: that of the call, or drawn from its generators."""
        noise, device = plan.latents, self._execution_device
        if noise is None:
            noise = randn_tensor(plan.shape, generator=plan.generators, device=device, dtype=dtype)
        return noise.to(device=device, dtype=dtype)

    def _bind_condition(self, tensors: Mapping[str, Tensor], schedule: TimestepSchedule) -> Denoise:
        """Encode the condition from these tensors, and return the network bound to it."""
        raise NotImplementedError

    def _denoise(
        self, plan: SamplingPlan, latents: Tensor, tensors: dict[str, Tensor], post_step: PostStep | None = None
    ) -> Tensor:
        """Run the loop with progress bar and callbacks, and return the final latents."""
        call = self._last_call = current_state(self) or CallState()
        call.guidance_scale, call.num_timesteps = plan.guidance.scale, len(plan.schedule.timesteps)
        call.active_scheduler = plan.schedule.scheduler
        state = LoopState(latents, tensors, plan.guidance, tensors_exposed=plan.callbacks.tensors_exposed)
        guided_tensors = [name for name, tensor in tensors.items() if len(tensor) == 2 * len(latents)]
        steps = sample(
            state,
            plan.schedule,
            lambda current: self._bind_condition(current, plan.schedule),
            plan.generators,
            post_step,
        )
        with self._freed_on_error(), host_memory.reuse_buffers(), self.progress_bar(total=call.num_timesteps) as bar:
            while not call.interrupted and next(steps, None) is not None:
                self._run_callbacks(state, plan)
                state.guidance = dataclasses.replace(plan.guidance, scale=call.guidance_scale)
                self._check_negative_half(state, guided_tensors)
                bar.update()
        return state.latents

    @staticmethod
    def _check_negative_half(state: LoopState, guided_tensors: Sequence[str]) -> None:
        """Raise InputError if a callback has enabled guidance without a negative condition.

        Args:
            state: The loop state after the callbacks of a step.
            guided_tensors: Names of the tensors that held both halves when the call began; none without guidance.
        """
        if not state.guidance.enabled:
            return
        reason = "the call began without guidance and has no negative condition"
        if guided_tensors:
            dropped = [name for name in guided_tensors if len(state.tensors[name]) != 2 * len(state.latents)]
            if not dropped:
                return
            reason = f"a callback has replaced {', '.join(dropped)} by the conditional half"
        raise InputError(f"guidance_scale was set above 1 by a callback: expected at most 1, since {reason}")

    @contextlib.contextmanager
    def _freed_on_error(self) -> Iterator[None]:
        """After an error, take offloaded networks off the device."""
        try:
            yield
        except BaseException:
            self.maybe_free_model_hooks()
            raise

    def _run_callbacks(self, state: LoopState, plan: SamplingPlan) -> None:
        """Run the callbacks after a step. A callback can stop the call here by `interrupt`."""
        callbacks = plan.callbacks
        if callbacks.on_step_end is not None:
            tensors = {"latents": state.latents, **state.tensors}
            exposed = {name: tensors.get(name) for name in callbacks.tensor_inputs or ()}
            changes = callbacks.on_step_end(self, state.index, state.timestep, exposed)
            self._replace_tensors(state, self._checked_changes(changes, state))
        if callbacks.callback is not None and state.index % (callbacks.callback_steps or 1) == 0:
            callbacks.callback(state.index // plan.schedule.order, state.timestep, state.latents)

    def _replace_tensors(self, state: LoopState, changes: Mapping[str, Tensor]) -> None:
        """Replace the loop's tensors by those of a callback."""
        for name, tensor in changes.items():
            if name == "latents":
                state.latents = tensor
            else:
                state.tensors[name] = tensor

    def _checked_changes(self, changes: Any, state: LoopState) -> dict[str, Tensor]:
        if changes is None:
            return {}
        if not isinstance(changes, Mapping):
            raise invalid("callback_on_step_end(...)", changes, "a dict of tensors, or None")
        current = {"latents": state.latents, **state.tensors}
        # A callback that disables guidance may omit the negative half.
        enabled = validation.finite_float("guidance_scale", self._guidance_scale) > 1
        conditional_batch_size = None if enabled else len(state.latents)
        for name in changes:
            validation.one_of("a key of callback_on_step_end(...)", name, self._callback_tensor_inputs)
        return {
            name: validation.replacement_tensor(
                f"callback_on_step_end(...)[{name!r}]", tensor, current.get(name), conditional_batch_size
            )
            for name, tensor in changes.items()
            if tensor is not None
        }
