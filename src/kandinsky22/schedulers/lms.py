"""Linear multistep: Adams-Bashforth along the noise level, with coefficients for its uneven steps (Hairer et al. 1993,
"Solving Ordinary Differential Equations I", chapter III.5)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch import Tensor

from kandinsky22.errors import InputError
from kandinsky22.schedulers.base import SchedulerOutput
from kandinsky22.schedulers.config import GridConfig, SpacingConfig, TableConfig, whole
from kandinsky22.schedulers.exponential_integrator import weights
from kandinsky22.schedulers.sigmas import ExplodingScheduler, widened


@dataclasses.dataclass(frozen=True)
class LMSConfig(GridConfig, SpacingConfig, TableConfig):
    """Settings of `LMSDiscreteScheduler`."""

    owner: ClassVar[str] = "LMSDiscreteScheduler"

    timestep_spacing: str = "linspace"


class LMSDiscreteScheduler(ExplodingScheduler):
    """Steps from the derivatives of the steps before; settings are the fields of `LMSConfig`. A variance that the
    network learned is dropped."""

    config_class = LMSConfig
    config: LMSConfig

    def _restart(self) -> None:
        super()._restart()
        self._slopes: list[Tensor] = []  # newest first

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        order: int = 4,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        """The sample at the next level, and the predicted clean sample; both shaped as `sample` (B, C, ...).

        `order` is the number of derivatives used at most. Raises InputError for timesteps that are not visited, and
        shapes that do not fit.
        """
        most = whole(order)
        if most is None or most < 1:
            raise InputError(f"order={order!r}; accepted: an integer above 0")
        place = self._locate(timestep)
        level, end = self._levels[place : place + 2]
        sample = widened(sample)
        original = self._clean(self._split(model_output, sample)[0], sample, level)
        self._slopes = [(sample - original) / level, *self._slopes][:most]
        length = end - level
        nodes = [(self._levels[place - back] - level) / length for back in range(len(self._slopes))]
        previous = sample
        # The integral of u^k over the step is 1 / (k + 1).
        for weight, slope in zip(weights(nodes, [1 / (k + 1) for k in range(len(nodes))]), self._slopes, strict=True):
            previous = previous + (length * weight) * slope
        self._place = place + 1
        return self._result(previous, original, model_output, return_dict)
