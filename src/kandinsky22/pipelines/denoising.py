"""The one sampling loop. It serves the prior and all decoders, because every difference is prepared before it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from kandinsky22.errors import InputError
from kandinsky22.inputs import validation
from kandinsky22.kernels import host_memory
from kandinsky22.noise import Generators, randn_tensor
from kandinsky22.pipelines.base import DiffusionPipeline
from kandinsky22.sampling.guidance import Guidance
from kandinsky22.sampling.scheduler_adapter import Stepper, Steps

Denoise = Callable[[Tensor, Any], Tensor]
"""A network bound to its condition: (sample, timestep) -> output."""

Bind = Callable[[Mapping[str, Tensor]], Denoise]
"""Computes the condition from the tensors in flight."""

Edit = Callable[[Tensor, "Run"], Tensor]
"""What a mode does to the latents that a step made, `run` standing at that step."""

LATENTS = ["latents"]  # what callbacks see unless they ask for more


@dataclasses.dataclass
class Run:
    """A generation in flight. Whoever iterates over `sample` may replace anything here between two steps.

    `tensors` are what the condition is computed from: 2 x batch rows (negative first) where guidance is on. `shown`
    tells that someone else holds them and may change them in place.
    """

    latents: Tensor
    tensors: dict[str, Tensor]
    guidance: Guidance
    index: int = 0
    timestep: Any = None
    shown: bool = False


def sample(
    run: Run, scheduler: Any, timesteps: Tensor, bind: Bind, generator: Generators, edit: Edit | None = None
) -> Iterator[Run]:
    """Denoise `run.latents` along `timesteps`, the last of the scheduler's, yielding `run` after each step.

    A guided step runs one batch that holds the unconditional rows, then the conditional ones; any other step runs the
    conditional ones alone. Conditions are computed anew only after their tensors changed.
    """
    condition, make_step = _Condition(bind), Stepper(scheduler, timesteps, generator)
    order, visits = getattr(scheduler, "order", 1), len(scheduler.timesteps)
    for index, timestep in enumerate(timesteps):
        step = (visits - len(timesteps) + index) // order
        guided = run.guidance.acts(step / -(-visits // order))
        denoise = condition(run, guided)
        seen = scheduler.scale_model_input(torch.cat([run.latents] * 2) if guided else run.latents, timestep)
        output = denoise(seen, timestep)
        if guided:
            output = run.guidance.combine(output, seen[: len(run.latents)], scheduler, timestep)
        latents = make_step(index, output, run.latents)
        run.index, run.timestep = index, timestep
        run.latents = latents if edit is None else edit(latents, run)
        yield run


class _Condition:
    """A bound network, bound again when a tensor in flight was replaced or changed in place, or guidance switched."""

    def __init__(self, bind: Bind) -> None:
        self._bind = bind
        self._denoise: Denoise | None = None
        self._seen: list[tuple[Tensor, int]] = []
        self._guided = False

    def __call__(self, run: Run, guided: bool) -> Denoise:
        unchanged = guided == self._guided and len(run.tensors) == len(self._seen)
        for tensor, (seen, version) in zip(run.tensors.values(), self._seen, strict=False):
            unchanged = unchanged and tensor is seen and _version(tensor) == version
        # tensors made under torch.inference_mode do not count their changes: assume the worst once they were shown
        unknown = run.shown and any(tensor.is_inference() for tensor in run.tensors.values())
        if self._denoise is None or not unchanged or unknown:
            rows = 0 if guided else -len(run.latents)  # without guidance only the conditional rows, which are last
            self._denoise = self._bind({name: tensor[rows:] for name, tensor in run.tensors.items()})
            self._seen = [(tensor, _version(tensor)) for tensor in run.tensors.values()]
            self._guided = guided
        return self._denoise


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


@dataclasses.dataclass(frozen=True)
class Callbacks:
    """Whom to tell after each step: `on_step_end(pipe, step, timestep, tensors) -> tensors to replace`, and
    `callback(step, timestep, latents)` on every `every`-th step."""

    on_step_end: Callable[..., Any] | None
    tensor_inputs: Sequence[str]
    callback: Callable[..., Any] | None = None
    every: int = 1


@dataclasses.dataclass(frozen=True)
class Plan:
    """The checked arguments of a call. `shape` is that of the latents; `pictures` are those a decoder starts from,
    by argument, one for all rows or one for each prompt; `keep_pixels` is inpainting's."""

    shape: tuple[int, ...]
    guidance: Guidance
    timesteps: Tensor
    generators: Generators
    latents: Tensor | None
    callbacks: Callbacks
    pictures: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    keep_pixels: bool = False


class SamplingPipeline(DiffusionPipeline):
    """What all pipelines that denoise have in common: start noise, timesteps, the loop's progress and callbacks.

    While a call runs, `guidance_scale` and `num_timesteps` describe it; a callback may set `_guidance_scale`.
    After each step `callback_on_step_end(pipe, step, timestep, tensors)` sees those of `_callback_tensor_inputs` that
    the call names, and may return a dict of tensors to replace some; `callback(step, timestep, latents)` looks on at
    every `callback_steps`-th step.
    """

    _callback_tensor_inputs: ClassVar[list[str]] = ["latents"]
    _guidance_scale: float = 1.0
    _num_timesteps: int = 0
    _interrupted: bool = False
    scheduler: Any

    @property
    def guidance_scale(self) -> float:
        """Guidance of the current or last call."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether guidance is on."""
        return self._guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        """Number of steps of the current or last call."""
        return self._num_timesteps

    def interrupt(self) -> None:
        """End the running call after its current step, from a callback or another thread; it returns what it has."""
        self._interrupted = True

    def _check_callbacks(
        self, on_step_end: Any, tensor_inputs: Any, callback: Any = None, callback_steps: int | None = None
    ) -> Callbacks:
        """Check whom to tell. Every call begins with this, once, so here an interrupt meant for another ends."""
        self._interrupted = False
        return Callbacks(
            validation.function("callback_on_step_end", on_step_end),
            validation.names("callback_on_step_end_tensor_inputs", tensor_inputs, self._callback_tensor_inputs),
            validation.function("callback", callback),
            1 if callback_steps is None else validation.whole("callback_steps", callback_steps),
        )

    def _need(self, *components: str) -> None:
        """Raise InputError if one of these components was left out when the pipeline was made."""
        if missing := [name for name in components if getattr(self, name) is None]:
            raise InputError(f"{type(self).__name__} was made without {', '.join(missing)}; this call needs it")

    def _need_add_noise(self) -> None:
        """Raise InputError if the scheduler cannot put noise on what a call starts from."""
        if not hasattr(self.scheduler, "add_noise"):
            raise InputError(f"scheduler: {type(self.scheduler).__name__} has no add_noise, which an image needs")

    def _schedule(
        self, shape: tuple[int, ...], pictures: int, steps: Steps, guidance: Guidance, generator: Any,
        latents: Any, callbacks: Callbacks,
    ) -> Plan:  # fmt: skip
        """Check what all calls have in common, for latents of this shape, and set the scheduler's timesteps."""
        if latents is not None:
            latents = validation.latents(latents, shape)
        generators = validation.generators(generator, pictures, shape[0])
        timesteps = steps.choose(self.scheduler, shape, self._execution_device)
        guidance.check(self.scheduler)
        return Plan(shape, guidance, timesteps, generators, latents, callbacks)

    def _tail(self, plan: Plan, strength: Any) -> Plan:
        """The plan's last steps only: `strength`, 0 to 1, is the part of them that runs, rounded down. Methods of more
        than one visit a step begin with the first visit of one."""
        part = validation.number("strength", strength)
        if not 0 <= part <= 1:
            raise InputError(f"strength={strength!r}: a number from 0 (leave as it is) to 1 (all steps) is needed")
        order = getattr(self.scheduler, "order", 1)
        steps = -(-len(plan.timesteps) // order)
        return dataclasses.replace(plan, timesteps=plan.timesteps[(steps - int(steps * part)) * order :])

    def _draw(self, plan: Plan, dtype: torch.dtype) -> Tensor:
        """Standard normal noise, drawn unless the call brings it."""
        latents, device = plan.latents, self._execution_device
        if latents is None:
            latents = randn_tensor(plan.shape, generator=plan.generators, device=device, dtype=dtype)
        return latents.to(device=device, dtype=dtype)

    def _noise(self, plan: Plan, dtype: torch.dtype) -> Tensor:
        """Latents at the scheduler's initial level of noise."""
        return self._draw(plan, dtype) * self.scheduler.init_noise_sigma

    def _bind(self, tensors: Mapping[str, Tensor]) -> Denoise:
        """The network, bound to the condition that these tensors give."""
        raise NotImplementedError

    def _denoise(self, plan: Plan, latents: Tensor, tensors: dict[str, Tensor], edit: Edit | None = None) -> Tensor:
        """The latents after the last step, telling those who asked after each."""
        self._guidance_scale, self._num_timesteps = plan.guidance.scale, len(plan.timesteps)
        shown = bool(plan.callbacks.tensor_inputs) and plan.callbacks.on_step_end is not None
        run = Run(latents, tensors, plan.guidance, shown=shown)
        with self._freed_on_error(), host_memory.kept(), self.progress_bar(total=len(plan.timesteps)) as bar:
            steps = sample(run, self.scheduler, plan.timesteps, self._bind, plan.generators, edit)
            while not self._interrupted and next(steps, None) is not None:
                self._notify(run, plan.callbacks)
                run.guidance = dataclasses.replace(plan.guidance, scale=self._guidance_scale)
                if run.guidance.on and not plan.guidance.on:
                    raise InputError("a callback switched guidance on: the call began without it, so has no negatives")
                bar.update()
        return run.latents

    @contextlib.contextmanager
    def _freed_on_error(self) -> Iterator[None]:
        """Whatever goes wrong, offloaded networks do not stay on the device."""
        try:
            yield
        except BaseException:
            self.maybe_free_model_hooks()
            raise

    def _notify(self, run: Run, callbacks: Callbacks) -> None:
        if callbacks.on_step_end is not None:
            tensors = {"latents": run.latents, **run.tensors}
            shown = {name: tensors.get(name) for name in callbacks.tensor_inputs}
            changes = callbacks.on_step_end(self, run.index, run.timestep, shown)
            self._apply(run, self._check_changes(changes, run))
        if callbacks.callback is not None and run.index % callbacks.every == 0:
            callbacks.callback(run.index // getattr(self.scheduler, "order", 1), run.timestep, run.latents)

    def _apply(self, run: Run, changes: Mapping[str, Tensor]) -> None:
        """Let a callback's tensors take the place of those in flight."""
        for name, tensor in changes.items():
            if name == "latents":
                run.latents = tensor
            else:
                run.tensors[name] = tensor

    def _check_changes(self, changes: Any, run: Run) -> Mapping[str, Tensor]:
        if changes is None:
            return {}
        if not isinstance(changes, Mapping):
            raise InputError(f"callback_on_step_end returned {type(changes).__name__}; a dict of tensors is needed")
        for name in changes:
            validation.choice("callback_on_step_end returned a key", name, self._callback_tensor_inputs)
        # a callback that switches guidance off may leave the negative rows away
        fewest = None if validation.number("guidance_scale", self._guidance_scale) > 1 else len(run.latents)
        flying = {"latents": run.latents, **run.tensors}
        given = {name: tensor for name, tensor in changes.items() if tensor is not None}
        return {
            name: validation.replacement(f"callback_on_step_end returned {name}", tensor, flying.get(name), fewest)
            for name, tensor in given.items()
        }
