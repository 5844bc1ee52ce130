"""Invalid arguments: one KandinskyError that names the argument, before any network runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.pipelines.invalid_arguments import EMBEDDINGS, NAN, PROMPTS, SHARED, SIZES
from tests.pipelines.tiny import DIM

from kandinsky22 import (
    InputError,
    KandinskyError,
    KandinskyV22CombinedPipeline,
    KandinskyV22Pipeline,
    KandinskyV22PriorPipeline,
)

GOOD = {"image_embeds": torch.ones(2, DIM), "negative_image_embeds": torch.zeros(2, DIM)}


pytestmark = pytest.mark.usefixtures("no_network_runs")


# Invalid noise of the right shape
NOISE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "NaN": lambda noise: noise * float("nan"),
    "sparse": lambda noise: noise.to_sparse(),
    "meta": lambda noise: noise.to("meta"),
    "complex": lambda noise: noise.to(torch.complex64),
}


def ids(cases: list[tuple[str, dict[str, Any]]]) -> list[str]:
    return [f"{index}-{next(iter(arguments))}" for index, (_, arguments) in enumerate(cases)]


@pytest.mark.parametrize(("name", "arguments"), SHARED + PROMPTS, ids=ids(SHARED + PROMPTS))
def test_prior(prior: KandinskyV22PriorPipeline, name: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=name):
        prior(**{"prompt": "a cat", **arguments})


@pytest.mark.parametrize(("name", "arguments"), SHARED + SIZES + EMBEDDINGS, ids=ids(SHARED + SIZES + EMBEDDINGS))
def test_decoder(decoder: KandinskyV22Pipeline, name: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=name):
        decoder(**{**GOOD, **arguments})


@pytest.mark.parametrize(("name", "arguments"), SHARED + PROMPTS + SIZES, ids=ids(SHARED + PROMPTS + SIZES))
def test_combined(combined: KandinskyV22CombinedPipeline, name: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=name):
        combined(**{"prompt": "a cat", **arguments})


@pytest.mark.parametrize("kind", NOISE)
def test_invalid_latents_are_refused(
    prior: KandinskyV22PriorPipeline,
    decoder: KandinskyV22Pipeline,
    combined: KandinskyV22CombinedPipeline,
    kind: str,
) -> None:
    of_prior, of_decoder = NOISE[kind](torch.ones(1, DIM)), NOISE[kind](torch.ones(2, 4, 16, 16))
    with pytest.raises(InputError, match=f"latents.*{kind}"):
        prior("a cat", latents=of_prior)
    with pytest.raises(InputError, match=f"latents.*{kind}"):
        combined("a cat", latents=of_prior)
    with pytest.raises(InputError, match=f"latents.*{kind}"):
        decoder(**GOOD, latents=of_decoder)
    with pytest.raises(InputError, match=f"latents.*{kind}"):
        combined(["a cat", "a dog"], latents=of_decoder)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("guidance_scale", {"prior_guidance_scale": float("inf")}),
        ("num_inference_steps", {"prior_num_inference_steps": -1}),
        ("callback_on_step_end_tensor_inputs", {"prior_callback_on_step_end_tensor_inputs": ["image_embeds"]}),
    ],
)
def test_combined_arguments_of_the_prior(
    combined: KandinskyV22CombinedPipeline, name: str, arguments: dict[str, Any]
) -> None:
    with pytest.raises(InputError, match=name):
        combined("a cat", **arguments)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("images_and_prompts", {"images_and_prompts": []}),
        ("images_and_prompts", {"images_and_prompts": "a cat"}),
        (r"images_and_prompts\[1\]", {"images_and_prompts": ["a cat", 3]}),
        (r"images_and_prompts\[1\]", {"images_and_prompts": ["a cat", torch.zeros(3, 8, 8)]}),
        (r"images_and_prompts\[1\]", {"images_and_prompts": ["a cat", NAN]}),
        (r"images_and_prompts\[1\]", {"images_and_prompts": ["a cat", torch.zeros(2, DIM)]}),
        ("weights", {"weights": [1.0]}),
        (r"weights\[0\]", {"weights": ["1", 1.0]}),
        (r"weights\[1\]", {"weights": [1.0, float("nan")]}),
        ("negative_prompt", {"negative_prompt": ["a", "b"]}),
        ("negative_prompt", {"negative_prompt": None}),
        ("negative_prior_prompt", {"negative_prior_prompt": 3}),
        ("negative_prior_prompt", {"negative_prior_prompt": ["a", "b"]}),
        ("device", {"device": "nowhere"}),
        ("num_images_per_prompt", {"num_images_per_prompt": 0}),
        ("guidance_scale", {"guidance_scale": "high"}),
        ("num_inference_steps", {"num_inference_steps": 0}),
        ("latents", {"latents": torch.zeros(1, 2)}),
        ("generator", {"generator": "seed"}),
    ],
)
def test_interpolate(prior: KandinskyV22PriorPipeline, name: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=name):
        prior.interpolate(**{"images_and_prompts": ["a cat", "red"], "weights": [0.5, 0.5], **arguments})


def test_unknown_scheduler(decoder: KandinskyV22Pipeline, combined: KandinskyV22CombinedPipeline) -> None:
    for pipe in (decoder, combined):
        for wrong in ("DDIM", object(), type(pipe.scheduler)):
            with pytest.raises(InputError, match="scheduler"):
                pipe.scheduler = wrong


def test_unet_of_another_mode(decoder: KandinskyV22Pipeline) -> None:
    config = {**decoder.unet.config, "in_channels": 9}
    decoder.unet = type(decoder.unet).from_config(config)
    with pytest.raises(InputError, match="in_channels=9"):
        decoder(**GOOD)


def test_prior_that_does_not_fit(combined: KandinskyV22CombinedPipeline) -> None:
    combined.prior_prior = type(combined.prior_prior).from_config({**combined.prior_prior.config, "embedding_dim": 48})
    with pytest.raises(InputError, match=r"prior_prior.config.embedding_dim=48"):
        combined("a cat")


@pytest.mark.parametrize("missing", ["unet", "movq", "prior_prior", "prior_tokenizer", "prior_image_encoder"])
def test_component_left_out(combined: KandinskyV22CombinedPipeline, missing: str) -> None:
    setattr(combined, missing, None)
    with pytest.raises(InputError, match=f"without {missing.removeprefix('prior_')}"):
        combined("a cat")


@pytest.mark.parametrize(
    "answer", [3, {"noise": torch.zeros(1)}, {"latents": torch.zeros(1, 1)}, {"latents": None, "prompt": "a"}]
)
def test_invalid_callback_results_are_refused(
    decoder: KandinskyV22Pipeline, monkeypatch: pytest.MonkeyPatch, answer: Any
) -> None:
    denoise = lambda noisy, *_: torch.cat([noisy, noisy], dim=1)  # noqa: E731
    monkeypatch.setattr("kandinsky22.pipelines.decoder_base.bind_unet", lambda *_: denoise)
    with pytest.raises(KandinskyError, match=r"callback_on_step_end\(\.\.\.\).*=.* is invalid: expected "):
        decoder(**GOOD, callback_on_step_end=lambda *_: answer)
