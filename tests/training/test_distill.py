"""Distillation: consistent models have no loss, steps are DDIM's, losses fall, results draw in few steps."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tests.cli.helpers import Command, assert_one_line
from torch import Tensor, nn

from kandinsky22 import (
    DDIMScheduler,
    DDPMScheduler,
    KandinskyV22CombinedPipeline,
    KandinskyV22Pipeline,
    KandinskyV22PriorPipeline,
    LCMScheduler,
)
from kandinsky22.errors import InputError
from kandinsky22.training.finetuning.batches import Draw
from kandinsky22.training.finetuning.consistency import ConsistencyObjective, Distillation, Solver
from kandinsky22.training.finetuning.distill import Distiller, distill
from kandinsky22.training.finetuning.objectives import Batch, DenoisingObjective
from kandinsky22.training.finetuning.optimizer import new_accelerator
from kandinsky22.training.finetuning.options import DistillOptions
from kandinsky22.training.finetuning.preparation import Entry
from kandinsky22.training.finetuning.run import Stage, TrainingRun
from kandinsky22.training.finetuning.stages import Training

KINDS = ("epsilon", "v_prediction", "sample")
BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "linear", "clip_sample": False}


def ignore(line: str) -> None:
    """Receive a line."""


# A teacher whose trajectories are known: data with mean m and variance v, thus a linear network.


def gaussian_prediction(kind: str, mean: Tensor, variance: float, sample: Tensor, alpha_bar: Tensor) -> Tensor:
    """The best prediction of the clean sample, the noise or the velocity."""
    total = alpha_bar * variance + 1 - alpha_bar
    epsilon = (1 - alpha_bar).sqrt() * (sample - alpha_bar.sqrt() * mean) / total
    x0 = (sample - (1 - alpha_bar).sqrt() * epsilon) / alpha_bar.sqrt()
    return {"epsilon": epsilon, "sample": x0, "v_prediction": alpha_bar.sqrt() * epsilon - (1 - alpha_bar).sqrt() * x0}[
        kind
    ]


class Gaussian(nn.Module):
    """Ideal network for normally distributed data whose mean is the condition."""

    def __init__(self, scheduler: Any, variance: float) -> None:
        super().__init__()
        self.scheduler, self.variance = scheduler, variance

    def forward(self, noisy: Tensor, timesteps: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        alpha_bar = self.scheduler.alphas_cumprod[timesteps].double()[:, None]
        kind = self.scheduler.config.prediction_type
        return gaussian_prediction(kind, condition["mean"], self.variance, noisy, alpha_bar)


class Jump(nn.Module):
    """Network whose consistency function is the end of the trajectory of DDIM with a `Gaussian` teacher."""

    def __init__(self, teacher: Gaussian, solver: Solver, scale: float, offset: float = 0.0) -> None:
        super().__init__()
        self.teacher, self.solver, self.scale, self.offset = teacher, solver, scale, offset
        self.weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, noisy: Tensor, timesteps: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        rows = []
        for row, t in enumerate(timesteps.tolist()):
            end, mean = noisy[row : row + 1], self.scale * condition["mean"][row : row + 1]
            for step in self.solver.timesteps.flip(0):
                if step <= t:
                    output = self.teacher(end, step[None], {"mean": mean})
                    end = self.solver.step(output, end, step[None])
            # solve c_skip x + c_out x0 = end for x0, then express x0 as a prediction
            scaled = 10.0 * t
            skip, out = 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25) ** 0.5
            x0 = (end - skip * noisy[row : row + 1]) / max(out, 1e-9) + self.offset + self.weight
            alpha_bar = self.teacher.scheduler.alphas_cumprod[t].double()
            epsilon = (noisy[row : row + 1] - alpha_bar.sqrt() * x0) / (1 - alpha_bar).sqrt()
            velocity = alpha_bar.sqrt() * epsilon - (1 - alpha_bar).sqrt() * x0
            kind = self.teacher.scheduler.config.prediction_type
            rows.append({"epsilon": epsilon, "sample": x0, "v_prediction": velocity}[kind])
        return torch.cat(rows)


class Normal(DenoisingObjective):
    """Examples of normally distributed data."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler, self.device, self.seed = scheduler, "cpu", 0
        self.entries = self.held_out = [Entry(str(index), Path(), (0, 0), 1) for index in range(2)]

    def batch(self, draws: Sequence[Draw], entries: Sequence[Entry], *, training: bool) -> Batch:
        rows = [torch.randn(3, 4, generator=draw.generators()[1], dtype=torch.float64) for draw in draws]
        mean, clean, noise = torch.stack(rows).unbind(1)
        timesteps = torch.tensor([int(draw.generators()[0].integers(1000)) for draw in draws])
        return Batch(mean + 0.5 * clean, noise, timesteps, {"mean": mean})

    def predict(
        self, network: Callable[..., Any], noisy: Tensor, timesteps: Tensor, condition: Mapping[str, Tensor]
    ) -> Tensor:
        output: Tensor = network(noisy, timesteps, condition)
        return output

    def unconditional(self, condition: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"mean": torch.zeros_like(condition["mean"])}


def analytic(kind: str, guidance: tuple[float, float], offset: float = 0.0) -> tuple[ConsistencyObjective, Jump]:
    scheduler = DDPMScheduler(**BETAS, prediction_type=kind)
    teacher = Gaussian(scheduler, 0.25)
    settings = Distillation(guidance, num_ddim_timesteps=10)
    # Guidance of two linear networks is the network of the scaled mean.
    student = Jump(teacher, Solver(scheduler, 10), guidance[0], offset)
    return ConsistencyObjective(Normal(scheduler), student, teacher, settings), student


DRAWS = [Draw(0, (3, number)) for number in range(24)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_consistent_model_has_no_loss(kind: str, scale: float) -> None:
    objective, student = analytic(kind, (scale, scale))
    loss = objective.losses(student, DRAWS)["loss"]
    # The scheduler's coefficients are float32, and the prediction of pure noise is divided by 0.04.
    assert float(loss) < 2e-5
    assert objective.validation_losses(student)["distance"] < 1e-8
    other, inconsistent = analytic(kind, (scale, scale), offset=0.3)
    student_loss = float(other.losses(inconsistent, DRAWS)["loss"])
    # The end of a trajectory is fixed, so that only the examples of the last step are off.
    ends = other.solver.ends(other.solver.starts(other.task.batch(DRAWS, other.entries, training=True).timesteps))
    assert student_loss == pytest.approx(0.3 * float((ends < 0).double().mean()), rel=0.02)
    assert other.validation_losses(inconsistent)["distance"] == pytest.approx(0.09, rel=0.01)


def test_another_guidance_scale_is_a_loss() -> None:
    objective, _ = analytic("epsilon", (3.0, 3.0))
    _, unguided = analytic("epsilon", (1.0, 1.0))
    assert float(objective.losses(unguided, DRAWS)["loss"]) > 0.01


def test_scales_are_drawn_from_the_range() -> None:
    objective, _ = analytic("epsilon", (2.0, 5.0))
    scales = objective._scales([Draw(0, (3, number)) for number in range(400)])
    assert 2 <= scales.min() < 2.1
    assert 4.9 < scales.max() <= 5
    assert abs(float(scales.mean()) - 3.5) < 0.15
    assert torch.equal(scales[:24], objective._scales(DRAWS))


def test_only_the_noisier_prediction_has_a_gradient() -> None:
    objective, student = analytic("v_prediction", (1.0, 1.0), offset=0.3)
    starts = objective.solver.starts(objective.task.batch(DRAWS, objective.entries, training=True).timesteps)
    inner = [draw for draw, start in zip(DRAWS, starts.tolist(), strict=True) if start > objective.solver.timesteps[0]]
    moved = [draw for draw in DRAWS if draw not in inner]
    assert inner
    assert moved
    student.weight.data.fill_(0.1)
    objective.losses(student, inner)["loss"].backward()
    first = student.weight.grad
    assert first is not None
    # Both ends of inner steps have the offset: without the stop of gradients there would be none.
    assert first.isfinite().all()
    with torch.no_grad():
        target = objective._target
    assert target is student
    student.weight.grad = None
    objective.losses(student, moved)["loss"].backward()
    assert student.weight.grad is not None
    assert float(student.weight.grad) == pytest.approx(1.0, rel=0.01)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [10, 50])
def test_a_step_of_the_solver_is_one_of_ddim(kind: str, steps: int) -> None:
    """Against equation 12 of https://arxiv.org/abs/2010.02502 and a whole generation with the scheduler."""
    schedule = DDPMScheduler(**BETAS, prediction_type=kind, thresholding=False)
    solver = Solver(schedule, steps)
    stride = 1000 // steps
    assert solver.timesteps.tolist() == [stride * number - 1 for number in range(1, steps + 1)]
    assert solver.starts(torch.tensor([0, stride - 1, stride, 999])).tolist() == [
        *(stride - 1, stride - 1, 2 * stride - 1, 999)
    ]
    timesteps = solver.timesteps[[0, 1, steps // 2, steps - 1]]
    ends = solver.ends(timesteps)
    assert ends.tolist() == [t - stride for t in timesteps.tolist()]
    torch.manual_seed(0)
    output, sample = torch.randn(2, 4, 4, 5, 5, dtype=torch.float64)
    after = solver.step(output, sample, timesteps)
    for row, (t, end) in enumerate(zip(timesteps.tolist(), ends.tolist(), strict=True)):
        alpha_bar = schedule.alphas_cumprod[t].double()
        before = schedule.alphas_cumprod[end].double() if end >= 0 else torch.tensor(1.0).double()
        root, noise = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        x0 = {
            "epsilon": (sample[row] - noise * output[row]) / root,
            "sample": output[row],
            "v_prediction": root * sample[row] - noise * output[row],
        }[kind]
        expected = before.sqrt() * x0 + (1 - before).sqrt() * (sample[row] - root * x0) / noise
        torch.testing.assert_close(after[row], expected, rtol=1e-4, atol=1e-5)
    ddim = DDIMScheduler.from_config(schedule.config, timestep_spacing="trailing")
    ddim.set_timesteps(steps)
    assert ddim.timesteps.tolist() == solver.timesteps.flip(0).tolist()
    ours = theirs = sample
    for t in ddim.timesteps:
        theirs = ddim.step(0.3 * theirs, t, theirs, return_dict=False)[0]
        ours = solver.step(0.3 * ours, ours, t.expand(4))
    assert torch.equal(ours, theirs)


def test_predictions_are_those_of_the_sampler() -> None:
    schedule = DDPMScheduler(**{**BETAS, "clip_sample": True}, prediction_type="epsilon")
    solver = Solver(schedule, 50)
    lcm = LCMScheduler.from_config(schedule.config)
    lcm.set_timesteps(4)
    torch.manual_seed(0)
    output, sample = torch.randn(1, 8, 3, 3), torch.randn(1, 4, 3, 3)
    for t in lcm.timesteps:
        clean = lcm.step(output, t, sample, generator=torch.Generator().manual_seed(0)).pred_original_sample
        assert torch.equal(clean, solver.clean(output, sample, t[None], bounded=True))
    assert torch.equal(solver.clean(output, sample, torch.tensor([-20]), bounded=True), sample)
    assert torch.equal(solver.clean(output, sample, torch.tensor([0]), bounded=True), sample)
    assert solver.clean(output, sample, lcm.timesteps[:1], bounded=False).abs().max() > 2
