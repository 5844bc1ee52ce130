"""Pseudo numerical methods: Runge-Kutta and linear multistep on the noise prediction, each step taken by DDIM's formula
(Liu et al. 2022, https://arxiv.org/abs/2202.09778)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from kandinsky22.schedulers.base import SchedulerOutput
from kandinsky22.schedulers.config import SchedulerConfig, SpacingConfig, TableConfig
from kandinsky22.schedulers.sigmas import SequentialScheduler

# Adams-Bashforth of order 1 to 4, newest first; equations 9 and 12.
_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))
_RUNGE_KUTTA = (1 / 6, 1 / 3, 1 / 3, 1 / 6)


@dataclasses.dataclass(frozen=True)
class PNDMConfig(SpacingConfig, TableConfig):
    """Settings of `PNDMScheduler`.

    `skip_prk_steps` leaves out the Runge-Kutta steps at the start, whose four network calls each give the multistep
    method its first derivatives, and has one step of two calls instead. With `set_alpha_to_one` the last step removes
    all noise, otherwise it ends at the noise level of timestep 0.
    """

    owner: ClassVar[str] = "PNDMScheduler"

    skip_prk_steps: bool = False
    set_alpha_to_one: bool = False


@dataclasses.dataclass(frozen=True)
class Visit:
    """One network call: where its step begins and ends, what part it plays in a Runge-Kutta step (0 to 3), and whether
    it repeats a multistep step from its start (`again`)."""

    begin: int
    end: int
    part: int | None = None
    again: bool = False


class PNDMScheduler(SequentialScheduler):
    """Multistep integration of order 4; settings are the fields of `PNDMConfig`. `timesteps` holds every network call,
    which are more than steps. A variance that the network learned is dropped."""

    config_class = PNDMConfig
    config: PNDMConfig

    def _build(self, config: SchedulerConfig) -> None:
        super()._build(config)
        if not self.config.set_alpha_to_one:
            self.final_alpha_cumprod = self.alphas_cumprod[0]

    def _restart(self) -> None:
        super()._restart()
        self._noises: list[Tensor] = []  # predictions at the starts of steps, newest first
        self._start: Tensor | None = None  # the sample there, while a step takes more calls
        self._sum: Tensor | float = 0.0

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: torch.device | str | None = None,
        timesteps: Sequence[int] | Tensor | None = None,
    ) -> None:  # fmt: skip
        """Choose the timesteps at which steps begin: a number of steps, spaced as configured, or the descending
        `timesteps` themselves. Raises InputError unless exactly one is given and it fits into the training steps."""
        steps = [int(step) for step in self._choose(num_inference_steps, timesteps)]
        self.custom_timesteps = timesteps is not None
        stride = self.config.num_train_timesteps // len(steps)
        self._visits: list[Visit] = []
        order: list[int] = []
        ends = [*steps[1:], -1] if self.custom_timesteps else [step - stride for step in steps]
        runge_kutta = 0 if self.config.skip_prk_steps else min(3, len(steps) - 1)
        for index, (step, end) in enumerate(zip(steps, ends, strict=True)):
            if index < runge_kutta:
                # A Runge-Kutta step leads to the next one's start, through the middle.
                half = (step - end if self.custom_timesteps else stride) // 2
                end = steps[index + 1]
                middle = step - half if self.custom_timesteps else end + half
                order += [step, middle, middle, end]
                self._visits += [Visit(step, to, part) for part, to in enumerate((step - half, middle, end, end))]
            else:
                order.append(step)
                self._visits.append(Visit(step, end))
                if index == 0 and self.config.skip_prk_steps and len(steps) > 1:
                    order.append(steps[1])
                    self._visits.append(Visit(steps[1] + (step - end), steps[1], again=True))
        self.num_inference_steps = len(steps)
        self.timesteps = torch.from_numpy(np.asarray(order, np.int64)).to(device)
        self._restart()

    def step(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        """The sample for the next call, and the predicted clean sample; both shaped as `sample` (B, C, ...). Raises
        InputError for timesteps that are not visited, and shapes that do not fit."""
        place = self._locate(timestep)
        visit = self._visits[place]
        prediction, _ = self._split(model_output, sample)
        at = int(self._order[place])
        here = float(self._alpha_bar(at))
        original = self._original(prediction, sample, here)
        noise = self._noise(prediction, sample, original, here)
        if (visit.part or visit.again) and self._start is None:
            start, visit = sample, Visit(at, visit.end)  # a run that begins in the midst of a step
        elif visit.part is None:
            start, noise = self._multistep(visit, noise, sample)
        else:
            start, noise = self._runge_kutta(visit.part, noise, sample)
        self._place = place + 1
        previous = self._transfer(start, noise, visit.begin, visit.end)
        return SchedulerOutput(previous, original) if return_dict else (previous, original)

    def _runge_kutta(self, part: int, noise: Tensor, sample: Tensor) -> tuple[Tensor, Tensor]:
        if part == 0 or self._start is None:
            self._noises = [noise, *self._noises][:4]
            self._start, self._sum = sample, 0.0
        start, self._sum = self._start, self._sum + _RUNGE_KUTTA[part] * noise
        if part < 3:
            return start, noise
        self._start = None
        return start, self._sum

    def _multistep(self, visit: Visit, noise: Tensor, sample: Tensor) -> tuple[Tensor, Tensor]:
        if visit.again and self._start is not None:
            start, self._start = self._start, None
            return start, (noise + self._noises[0]) / 2
        self._noises, self._start = [noise, *self._noises][:4], sample
        coefficients = _BASHFORTH[len(self._noises) - 1]
        mean = sum(
            (c * value for c, value in zip(coefficients[1:], self._noises[1:], strict=True)), coefficients[0] * noise
        )
        return sample, mean

    def _transfer(self, sample: Tensor, noise: Tensor, begin: int, end: int) -> Tensor:
        """DDIM's step with this prediction of the noise (equation 11)."""
        before, after = float(self._alpha_bar(begin)), float(self._alpha_bar(end))
        return (after / before) ** 0.5 * sample + ((1 - after) ** 0.5 - ((1 - before) * after / before) ** 0.5) * noise
