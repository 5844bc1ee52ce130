"""Orders of convergence of implicit and ancestral sampling, on normally distributed data (see `gaussian`)."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from tests.unit.gaussian import best_prediction, flow, make_scheduler, variance

from kandinsky22 import schedulers


def test_order_of_convergence_of_implicit_sampling() -> None:
    scheduler = make_scheduler("DDIMScheduler", clip_sample=False)
    table = ((1 - scheduler.alphas_cumprod.double()) / scheduler.alphas_cumprod.double()) ** 0.5
    begin, errors = torch.linspace(-2, 2, 9, dtype=torch.float64).reshape(1, 1, 3, 3), []
    for stride in (20, 10):
        scheduler.set_timesteps(timesteps=list(range(900, 199, -stride)))
        sample = begin
        for timestep in scheduler.timesteps.tolist()[:-1]:
            sample = scheduler.step(best_prediction(sample, float(table[timestep])), timestep, sample).prev_sample
        errors.append(float((sample - flow(begin, float(table[900]), float(table[200]))).abs().max()))
    assert 0.75 < math.log2(errors[0] / errors[1]) < 1.6


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("DDPMScheduler", {}),
        ("DDIMScheduler", {"eta": 1.0}),
        ("UnCLIPScheduler", {}),
        ("EulerAncestralDiscreteScheduler", {}),
    ],
)
def test_order_of_convergence_of_the_variance_of_ancestral_methods(
    name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The variance converges. A step multiplies it and adds noise: steps from 0 and 1, and from 0 with noise 1, give
    both."""
    probes, noise = (torch.tensor(each, dtype=torch.float64).reshape(3, 1, 1, 1) for each in ([0, 1, 0], [0, 0, 1]))
    module = getattr(schedulers, name).step.__module__
    module = "kandinsky22.schedulers.ddpm" if module.endswith("unclip") else module
    monkeypatch.setattr(f"{module}.randn_tensor", lambda *_: noise)
    scheduler = make_scheduler(name, **({} if name.startswith("Euler") else {"clip_sample": False}))
    table = ((1 - scheduler.alphas_cumprod.double()) / scheduler.alphas_cumprod.double()) ** 0.5
    errors = []
    for stride in (20, 10):
        order = list(range(900, 199, -stride))
        scheduler.set_timesteps(timesteps=order)
        spread = variance(float(table[900]))
        for timestep, following in itertools.pairwise(order):
            start, end = (float(table[each]) for each in (timestep, following))
            sizes = [math.hypot(each, 1) if name.startswith("Euler") else 1.0 for each in (start, end)]
            sample = probes * sizes[0]
            model_input = scheduler.scale_model_input(sample, timestep)
            extra = {"prev_timestep": following} if name.startswith("UnCLIP") else {}
            out = (
                scheduler.step(best_prediction(model_input, start), timestep, sample, **options, **extra).prev_sample
                / sizes[1]
            )
            still, moved, drawn = out.flatten().tolist()
            spread = (moved - still) ** 2 * spread + (drawn - still) ** 2
        errors.append(abs(spread - variance(float(table[200]))))
    assert 0.75 < math.log2(errors[0] / errors[1]) < 1.6, errors
