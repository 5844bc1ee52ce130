"""The sampler of unCLIP priors: ancestral, on the cosine schedule, from the last timestep to 0 in even strides (Ramesh
et al. 2022, https://arxiv.org/abs/2204.06125)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
from torch import Tensor

from kandinsky22.errors import InputError
from kandinsky22.noise import Generators
from kandinsky22.schedulers.base import SchedulerOutput
from kandinsky22.schedulers.config import whole
from kandinsky22.schedulers.ddpm import AncestralConfig, AncestralScheduler


@dataclasses.dataclass(frozen=True)
class UnCLIPConfig(AncestralConfig):
    """Settings of `UnCLIPScheduler`."""

    owner: ClassVar[str] = "UnCLIPScheduler"
    choices: ClassVar[Mapping[str, tuple[str | None, ...]]] = {
        "beta_schedule": ("squaredcos_cap_v2",),
        "prediction_type": ("epsilon", "sample"),
        "variance_type": ("fixed_small_log", "learned_range"),
    }

    beta_schedule: str = "squaredcos_cap_v2"
    variance_type: str = "fixed_small_log"


class UnCLIPScheduler(AncestralScheduler):
    """Ancestral sampling as unCLIP does it; settings are the fields of `UnCLIPConfig`.

    The stride is (training steps - 1) / (steps - 1), so both the first and the last training timestep are visited; a
    single step starts at the noisiest. `step` has to be told where it leads.
    """

    config_class = UnCLIPConfig
    config: UnCLIPConfig

    def _spaced(self, steps: int) -> list[int]:
        last = self.config.num_train_timesteps - 1
        if steps == 1:
            return [last]
        return [int(step) for step in (np.arange(steps) * (last / (steps - 1))).round()[::-1]]

    def _transition(self, timestep: int, previous: int) -> tuple[Tensor, Tensor]:
        if previous == timestep - 1:
            return self.alphas[timestep], self.betas[timestep]
        beta = 1 - self._alpha_bar(timestep) / self._alpha_bar(previous)
        return 1 - beta, beta

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        prev_timestep: int | Tensor | None = None,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        """The sample at `prev_timestep`, and the predicted clean sample; both shaped as `sample` (B, C, ...).

        Not given, `prev_timestep` is the training timestep before `timestep`, or the end (-1) if `timestep` is the last
        of `timesteps`. Noise is drawn from `generator` (one, or one a sample) at every timestep but 0. Raises
        InputError for timesteps out of order and shapes that do not fit.
        """
        t = self._checked(timestep)
        if prev_timestep is None:
            previous: int | None = -1 if self._previous.get(t) == -1 else t - 1
        else:
            previous = whole(prev_timestep)
        if previous is None or not -1 <= previous < t:
            raise InputError(f"prev_timestep={prev_timestep!r}; accepted: an integer from -1 to {t - 1}, or None")
        out = self._denoise(model_output, t, previous, sample, generator)
        return out if return_dict else out.to_tuple()
