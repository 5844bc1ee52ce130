"""Every scheduler in every pipeline: learned variance, optional `generator` argument, two evaluations per step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.pipelines.calls import DECODERS, SMALL_LATENTS, inputs
from tests.pipelines.tiny import difference, seeded

import kandinsky22
from kandinsky22 import schedulers

NAMES = sorted({*schedulers.__all__} - {"Scheduler", "SchedulerOutput", "UnCLIPScheduler"})


def with_scheduler(pipe: Any, name: str) -> Any:
    """Give the pipeline this scheduler, with the settings of the one that it has, and return it."""
    kind = getattr(kandinsky22, name)
    pipe.scheduler = kind.from_config(pipe.scheduler.config)
    return pipe


@pytest.mark.parametrize("name", NAMES)
def test_decoders(decoder: Any, make_pipeline: Callable[[str], Any], name: str) -> None:
    first = with_scheduler(decoder, name)(**inputs(""), **SMALL_LATENTS, generator=seeded(0)).images
    again = decoder(**inputs(""), **SMALL_LATENTS, generator=seeded(0)).images
    assert torch.isfinite(first).all()
    assert difference(first, again) == 0
    for mode in DECODERS[1:]:
        options = {"output_type": "np"} if mode == "Inpaint" else {"strength": 0.6} if "Img2Img" in mode else {}
        pipe = with_scheduler(make_pipeline(mode), name)
        pictures = pipe(**{**SMALL_LATENTS, **inputs(mode), **options}, generator=seeded(0)).images
        assert torch.isfinite(torch.as_tensor(pictures)).all()


@pytest.mark.parametrize("name", NAMES)
def test_the_prior(prior: Any, name: str) -> None:
    """The prior keeps its cosine schedule and its prediction of clean samples."""
    with_scheduler(prior, name)
    assert (prior.scheduler.config.prediction_type, prior.scheduler.config.beta_schedule) == (
        "sample",
        "squaredcos_cap_v2",
    )
    ends = [prior("a red square", num_inference_steps=5, generator=seeded(0)).image_embeds for _ in range(2)]
    assert torch.isfinite(ends[0]).all()
    assert difference(*ends) == 0


def test_strength_counts_steps_not_evaluations(make_pipeline: Callable[[str], Any]) -> None:
    """Half of ten steps is five, with two evaluations each except the last, which has one."""
    for name, calls in (("EulerDiscreteScheduler", 5), ("HeunDiscreteScheduler", 9), ("KDPM2DiscreteScheduler", 9)):
        pipe = with_scheduler(make_pipeline("Img2Img"), name)
        options = {**SMALL_LATENTS, **inputs("Img2Img"), "num_inference_steps": 10, "strength": 0.5}
        pipe(**options, generator=seeded(0))
        assert pipe.num_timesteps == calls
