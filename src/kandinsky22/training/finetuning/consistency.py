"""Latent consistency distillation: a network learns to jump to the end of the sampling trajectory of its teacher.

A step of the teacher's guided DDIM solver leads from a noisy sample to a less noisy one. The student's prediction of
the clean sample must be the same at both, with gradients at the first only. Source: Luo et al. 2023, algorithm 1,
https://arxiv.org/abs/2310.04378; as adapters: Luo et al. 2023, https://arxiv.org/abs/2311.05556.

Kandinsky's networks have no input for a guidance scale, and one more would change the layout of the weights. The scale,
or the mean over a range of scales, therefore becomes part of the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from kandinsky22.schedulers import DDIMScheduler, LCMScheduler, Scheduler
from kandinsky22.training.finetuning.batches import Draw
from kandinsky22.training.finetuning.objectives import CachedObjective, DenoisingObjective
from kandinsky22.training.finetuning.preparation import Entry

Values = Callable[[], Mapping[str, Tensor]]
"""Function that returns values of parameters by name."""

COMPARED_PICTURES = 4  # held-out pictures whose complete trajectories are computed


@dataclass(frozen=True)
class Distillation:
    """Settings of a distillation.

    Attributes:
        guidance: Smallest and largest guidance scale of the teacher.
        num_ddim_timesteps: Steps of the teacher from noise to the clean sample.
        huber_c: Errors below it count squared, larger ones as they are.
    """

    guidance: tuple[float, float]
    num_ddim_timesteps: int = 50
    huber_c: float = 0.001


class WithValues:
    """A network that computes with other values of some of its parameters.

    Args:
        network: The network, which is not changed.
        values: Function that returns the values.
    """

    def __init__(self, network: nn.Module, values: Values) -> None:
        self._network, self._values = network, values

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Return what the network returns.

        Args:
            *arguments: Arguments of the network.
            **named: Named arguments of the network.
        """
        return functional_call(self._network, dict(self._values()), arguments, named)


class Solver:
    """The teacher's DDIM solver, and the consistency function, on batches with different timesteps.

    Args:
        scheduler: Scheduler of the checkpoint.
        steps: Number of steps from noise to the clean sample.

    Attributes:
        timesteps: Timesteps that steps begin at, ascending: those that `LCMScheduler` samples at.

    Raises:
        InputError: The scheduler has fewer timesteps, or its last one is pure noise that the network predicts.
    """

    def __init__(self, scheduler: Scheduler, steps: int) -> None:
        # The end of a trajectory is the clean sample, whatever the checkpoint says about the last step of sampling.
        self._ddim = DDIMScheduler.from_config(scheduler.config, set_alpha_to_one=True)
        self._ddim.set_timesteps(steps)
        self._lcm = lcm_scheduler(scheduler, steps)
        self._lcm.set_timesteps(steps)
        self.timesteps = self._lcm.timesteps.flip(0)

    def starts(self, timesteps: Tensor) -> Tensor:
        """Return the timestep of a step of the solver that each timestep belongs to.

        Args:
            timesteps: Timesteps (batch,).
        """
        stride = int(self.timesteps[0]) + 1
        return self.timesteps[(timesteps // stride).clamp(max=len(self.timesteps) - 1)]

    def ends(self, timesteps: Tensor) -> Tensor:
        """Return the timesteps that steps lead to; a negative number stands for the clean sample.

        Args:
            timesteps: Elements of `timesteps` (batch,).
        """
        return torch.tensor([int(self._ddim.previous_timestep(int(t))) for t in timesteps])

    def step(self, output: Tensor, sample: Tensor, timesteps: Tensor) -> Tensor:
        """Return samples after one step of DDIM.

        Args:
            output: The teacher's guided prediction, of the shape of `sample`.
            sample: Noisy samples (batch, ...).
            timesteps: Elements of `timesteps` (batch,).
        """
        rows = [
            self._ddim.step(output[row : row + 1], int(t), sample[row : row + 1], return_dict=False)[0]
            for row, t in enumerate(timesteps)
        ]
        return torch.cat(rows)

    def clean(self, output: Tensor, sample: Tensor, timesteps: Tensor, *, bounded: bool) -> Tensor:
        """Return the clean samples that a consistency model predicts.

        Args:
            output: The network's output, with or without a learned variance.
            sample: Noisy samples (batch, ...).
            timesteps: Timesteps (batch,); a negative number stands for the clean sample, which is returned.
            bounded: Whether predictions are clipped or thresholded, as in sampling.
        """
        rows = [
            self._lcm.consistency_function(output[row : row + 1], int(t), sample[row : row + 1], bounded=bounded)
            for row, t in enumerate(timesteps)
        ]
        return torch.cat(rows)


def lcm_scheduler(scheduler: Scheduler, steps: int) -> LCMScheduler:
    """Return the scheduler that draws with a distilled network.

    Args:
        scheduler: Scheduler of the checkpoint.
        steps: Number of steps of the solver that is distilled.
    """
    result: LCMScheduler = LCMScheduler.from_config(scheduler.config, original_inference_steps=steps)
    return result


class ConsistencyObjective(CachedObjective):
    """Consistency of a student along the trajectories of its teacher.

    Args:
        task: Denoising objective of the stage, which supplies examples, conditions and calls of the network.
        student: The network in training.
        teacher: The teacher, or a function that computes as it does.
        settings: Settings of the distillation.
    """

    def __init__(
        self, task: DenoisingObjective, student: nn.Module, teacher: Callable[..., Any], settings: Distillation
    ) -> None:
        self.entries, self.held_out, self.seed = task.entries, task.held_out, task.seed
        self.task, self.teacher, self.settings = task, teacher, settings
        self.solver = Solver(task.scheduler, settings.num_ddim_timesteps)
        self._student = student
        self._target: Callable[..., Any] = student
        self._ends: list[tuple[Tensor, Tensor]] | None = None

    def follow(self, results: Values) -> None:
        """Receive access to the weights that are saved: the target of training computes with them.

        Args:
            results: Function that returns the trained parameters by name, or their moving averages.
        """
        self._target = WithValues(self._student, results)

    def _losses(
        self, network: nn.Module, draws: Sequence[Draw], entries: Sequence[Entry], *, training: bool
    ) -> dict[str, Tensor]:
        batch = self.task.batch(draws, entries, training=training)
        starts = self.solver.starts(batch.timesteps)
        noisy = self.task.scheduler.add_noise(batch.sample, batch.noise, starts)
        with torch.no_grad():
            scales = self._scales(draws).to(noisy).reshape(-1, *[1] * (noisy.ndim - 1))
            ends = self.solver.ends(starts)
            after = self.solver.step(self._guided(noisy, starts, batch.condition, scales), noisy, starts)
            output = self.task.predict(self._target, after, ends.clamp(min=0), batch.condition)
            target = self.solver.clean(output.float(), after, ends, bounded=True)
        output = self.task.predict(network, noisy, starts, batch.condition)
        # Bounds would stop the gradients of predictions that are beyond them.
        error = self.solver.clean(output.float(), noisy, starts, bounded=False) - target
        c = self.settings.huber_c
        return {"loss": ((error.square() + c**2).sqrt() - c).flatten(1).mean(1)}

    def _scales(self, draws: Sequence[Draw]) -> Tensor:
        """Return a guidance scale per example."""
        lowest, highest = self.settings.guidance
        return torch.tensor([np.random.default_rng([*draw.key, 7]).uniform(lowest, highest) for draw in draws])

    def _guided(self, noisy: Tensor, timesteps: Tensor, condition: Mapping[str, Tensor], scales: Tensor) -> Tensor:
        """Return the teacher's prediction with classifier-free guidance, without a learned variance."""

        def predict(each: Mapping[str, Tensor]) -> Tensor:
            return self.task.predict(self.teacher, noisy, timesteps, each)[:, : noisy.shape[1]].float()

        conditional = predict(condition)
        if bool((scales == 1).all()):
            return conditional
        unconditional = predict(self.task.unconditional(condition))
        return unconditional + scales * (conditional - unconditional)

    # Validation

    @torch.no_grad()
    def validation_losses(self, network: nn.Module) -> dict[str, float]:
        """Return the losses of held-out pictures, and "distance": how far one step ends from the teacher's trajectory.

        The distance is the mean squared error of clean samples, from the same pure noise.

        Args:
            network: The network.
        """
        losses = super().validation_losses(network)
        if not losses:
            return losses
        if self._ends is None:
            self._ends = [(noise, self.solved(noise, draw, self.held_out)) for noise, draw in self._starts()]
        distances = []
        for (noise, end), (_, draw) in zip(self._ends, self._starts(), strict=True):
            batch = self.task.batch([draw], self.held_out, training=False)
            first = self.solver.timesteps[-1:]
            output = self.task.predict(network, noise, first, batch.condition)
            clean = self.solver.clean(output.float(), noise, first, bounded=True)
            distances.append(float((clean - end).square().mean()))
        return {**losses, "distance": sum(distances) / len(distances)}

    def _starts(self) -> Iterator[tuple[Tensor, Draw]]:
        for index in range(min(len(self.held_out), COMPARED_PICTURES)):
            draw = Draw(index, (self.seed, 8, index))
            yield self.task.batch([draw], self.held_out, training=False).noise, draw

    @torch.no_grad()
    def solved(self, noise: Tensor, draw: Draw, entries: Sequence[Entry]) -> Tensor:
        """Return the end of the teacher's trajectory, with the mean guidance scale.

        Args:
            noise: Pure noise (1, ...).
            draw: The example that supplies the condition.
            entries: The pictures.
        """
        condition = self.task.batch([draw], entries, training=False).condition
        scale = torch.full([1] * noise.ndim, sum(self.settings.guidance) / 2, device=noise.device)
        sample = noise
        for t in self.solver.timesteps.flip(0):
            sample = self.solver.step(self._guided(sample, t[None], condition, scale), sample, t[None])
        return sample
