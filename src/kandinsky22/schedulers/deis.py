"""DEIS: an exponential integrator on the noise prediction, exact for polynomials in the logarithm of the level (Zhang &
Chen 2022, https://arxiv.org/abs/2204.13902)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from kandinsky22.schedulers.base import Floats, SchedulerOutput
from kandinsky22.schedulers.config import SpacingConfig, TableConfig
from kandinsky22.schedulers.exponential_integrator import ExponentialScheduler, SolverConfig, combine, exact_weights


@dataclasses.dataclass(frozen=True)
class DEISConfig(SolverConfig, SpacingConfig):
    """Settings of `DEISMultistepScheduler`; of the paper's forms there is the one in log rho."""

    owner: ClassVar[str] = "DEISMultistepScheduler"
    choices: ClassVar[Mapping[str, tuple[str | None, ...]]] = {
        **TableConfig.choices,
        "algorithm_type": ("deis",),
        "solver_type": ("logrho",),
    }
    synonyms: ClassVar[Mapping[str, Mapping[str, str]]] = {
        "algorithm_type": dict.fromkeys(("dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++"), "deis"),
        "solver_type": dict.fromkeys(("midpoint", "heun", "bh1", "bh2"), "logrho"),
    }

    algorithm_type: str = "deis"
    solver_type: str = "logrho"
    timestep_spacing: str = "linspace"


class DEISMultistepScheduler(ExponentialScheduler):
    """Multistep integration that ends at the lowest level of training; settings are the fields of `DEISConfig`. A
    variance that the network learned is dropped."""

    config_class = DEISConfig
    config: DEISConfig

    @property
    def _of_noise(self) -> bool:
        return True

    def _final(self, levels: Floats) -> float:
        return float(levels[-1] if self._spread() else self._table[0])

    def step(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        """The sample at the next level, and the predicted clean sample; both shaped as `sample` (B, C, ...). Raises
        InputError for timesteps that are not visited, and shapes that do not fit."""
        now = self._begin(model_output, timestep, sample)
        self._remember(now.level, now.prediction)
        stride, past = self._stride(now.level, now.end), self._past[::-1][: self._order_at(now.place)]
        weights = [1.0]
        if now.end != now.level and len(past) > 1:
            weights = exact_weights(stride, [stride.node(level) for level, _ in past])
        terms = [(weight, value) for weight, (_, value) in zip(weights, past, strict=False)]
        return self._result(combine(stride, now.sample, terms, None), now.original, model_output, return_dict)
