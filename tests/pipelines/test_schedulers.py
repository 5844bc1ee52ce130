"""Every scheduler in every pipeline: a learned variance, steps with and without `generator`, two visits a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.pipelines.test_modes_parity import box, embeds, hint, photo
from tests.pipelines.tiny import difference, seeded

import kandinsky22
from kandinsky22 import schedulers

NAMES = sorted({*schedulers.__all__} - {"Scheduler", "SchedulerOutput", "UnCLIPScheduler"})
SMALL: dict[str, Any] = {"num_inference_steps": 4, "height": 32, "width": 32, "output_type": "latent"}


def given(mode: str) -> dict[str, Any]:
    call: dict[str, Any] = {"image_embeds": embeds(1, 1), "negative_image_embeds": embeds(1, 2)}
    if "Img2Img" in mode:
        call |= {"image": photo(3), "strength": 0.6}
    if "Controlnet" in mode:
        call |= {"hint": hint(1, 5)}
    if mode == "Inpaint":
        call |= {"image": photo(3), "mask_image": box(), "output_type": "np"}
    return call


def swap(pipe: Any, name: str) -> Any:
    """The pipeline with this scheduler, told to drop or use the variance as the file says."""
    kind = getattr(kandinsky22, name)
    pipe.scheduler = kind.from_config(pipe.scheduler.config)
    return pipe


@pytest.mark.parametrize("name", NAMES)
def test_decoders(decoder: Any, modes: Callable[[str], Any], name: str) -> None:
    first = swap(decoder, name)(**given(""), **SMALL, generator=seeded(0)).images
    again = decoder(**given(""), **SMALL, generator=seeded(0)).images
    assert torch.isfinite(first).all()
    assert difference(first, again) == 0
    for mode in ("Img2Img", "Inpaint", "Controlnet", "ControlnetImg2Img"):
        pictures = swap(modes(mode), name)(**{**SMALL, **given(mode)}, generator=seeded(0)).images
        assert torch.isfinite(torch.as_tensor(pictures)).all()


@pytest.mark.parametrize("name", NAMES)
def test_the_prior(prior: Any, name: str) -> None:
    """On its own cosine schedule with clean samples predicted."""
    swap(prior, name)
    assert (prior.scheduler.config.prediction_type, prior.scheduler.config.beta_schedule) == (
        "sample",
        "squaredcos_cap_v2",
    )
    ends = [prior("a red square", num_inference_steps=5, generator=seeded(0)).image_embeds for _ in range(2)]
    assert torch.isfinite(ends[0]).all()
    assert difference(*ends) == 0


def test_pictures_keep_their_part_whatever_the_order(modes: Callable[[str], Any]) -> None:
    """Half of ten steps is five, with two network calls each but for the last, which has one."""
    for name, calls in (("EulerDiscreteScheduler", 5), ("HeunDiscreteScheduler", 9), ("KDPM2DiscreteScheduler", 9)):
        pipe = swap(modes("Img2Img"), name)
        options = {**SMALL, **given("Img2Img"), "num_inference_steps": 10, "strength": 0.5}
        pipe(**options, generator=seeded(0))
        assert pipe.num_timesteps == calls
