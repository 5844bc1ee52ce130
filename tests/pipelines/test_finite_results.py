"""Results that are not finite are errors, not black images."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.pipelines.calls import small_call, two_step_call

from kandinsky22 import KandinskyV22Pipeline, KandinskyV22PriorPipeline, NotFiniteError


def spoil(network: Any) -> None:
    """Set one weight of a network to NaN."""
    with torch.no_grad():
        next(network.parameters()).view(-1)[0] = float("nan")


@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
def test_unet_with_nan(decoder: KandinskyV22Pipeline, output_type: str) -> None:
    spoil(decoder.unet)
    with pytest.raises(NotFiniteError, match=r"(images|latents): 1 of 1 are not finite .*; check the weights"):
        decoder(**{**small_call(""), "output_type": output_type})


def test_movq_with_nan(decoder: KandinskyV22Pipeline) -> None:
    spoil(decoder.movq.decoder)
    with pytest.raises(NotFiniteError, match="images: 1 of 1"):
        decoder(**small_call(""))
    assert torch.as_tensor(decoder(**{**small_call(""), "output_type": "latent"}).images).isfinite().all()


def test_one_of_several(decoder: KandinskyV22Pipeline) -> None:
    def callback(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        tensors["latents"][1] = float("inf")
        return tensors

    call = {**small_call(""), "num_images_per_prompt": 3, "callback_on_step_end": callback}
    with pytest.raises(NotFiniteError, match="images: 1 of 3"):
        decoder(**call)


def test_float16_is_named(decoder: KandinskyV22Pipeline) -> None:
    spoil(decoder.to(torch.float16).movq.decoder)
    with pytest.raises(NotFiniteError, match=r"float16 overflows .* torch_dtype=torch.bfloat16"):
        decoder(**small_call(""))


def test_prior_with_nan(prior: KandinskyV22PriorPipeline) -> None:
    spoil(prior.prior)
    for call in (lambda: prior(**two_step_call("Prior")), lambda: prior.interpolate(["a cat"], [1.0])):
        with pytest.raises(NotFiniteError, match="image_embeds: "):
            call()


def test_image_encoder_with_nan(prior: KandinskyV22PriorPipeline) -> None:
    spoil(prior.image_encoder)
    with pytest.raises(NotFiniteError, match="all-zero image"):
        prior(**two_step_call("Prior"))


def test_combined_pipelines_stop_after_the_prior(combined: Any) -> None:
    spoil(combined.prior_prior)
    with pytest.raises(NotFiniteError, match="image_embeds"):
        combined(**small_call("Combined"))
