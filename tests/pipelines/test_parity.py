"""Equal results of equal calls of both libraries on the same checkpoint."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from tests.pipelines.comparison import (
    PIXEL_TOLERANCE,
    SCHEDULERS,
    assert_same_embeddings,
    assert_same_pictures,
    with_schedulers,
)
from tests.pipelines.pictures import noise_picture
from tests.pipelines.tiny import DIM, HAS_AVX512, PIXELS, difference, embeds, pair, seeded

from kandinsky22 import KandinskyV22CombinedPipeline, KandinskyV22Pipeline, KandinskyV22PriorPipeline

# Calls are functions, because a call advances its generators.
PRIOR_CALLS: dict[str, Callable[[], dict[str, Any]]] = {
    "prompt": lambda: {"prompt": "a red cat", "generator": seeded(0)},
    "global seed": lambda: {"prompt": "a red cat"},
    "prompts": lambda: {"prompt": ["a red cat", "dog, 4k photo"], "generator": seeded(1)},
    "empty prompt": lambda: {"prompt": "", "generator": seeded(1)},
    "prompt too long": lambda: {"prompt": "cat dog on " * 40, "generator": seeded(2)},
    "negative": lambda: {"prompt": "a cat", "negative_prompt": "blue", "generator": seeded(3)},
    "negatives, two each": lambda: {
        "prompt": ["a cat", "on a mat"],
        "negative_prompt": ["blue", "bad, ugly"],
        "num_images_per_prompt": 2,
        "generator": seeded(4),
    },
    "three each": lambda: {"prompt": ["a cat", "red"], "num_images_per_prompt": 3, "generator": seeded(5)},
    "guidance off": lambda: {"prompt": "a cat", "guidance_scale": 1.0, "generator": seeded(6)},
    "guidance off, negative, two each": lambda: {
        "prompt": "a cat",
        "negative_prompt": "red",
        "guidance_scale": 0.0,
        "num_images_per_prompt": 2,
        "generator": seeded(6),
    },
    "guidance high": lambda: {"prompt": "a cat", "guidance_scale": 9.5, "generator": seeded(7)},
    "latents": lambda: {
        "prompt": ["a cat", "red"],
        "latents": torch.randn(2, DIM, generator=seeded(8)),
        "generator": seeded(9),
    },
    "generators": lambda: {"prompt": ["a cat", "red"], "generator": [seeded(10), seeded(11)]},
    "generators for negatives too": lambda: {
        "prompt": "a cat",
        "negative_prompt": "red",
        "generator": [seeded(10), seeded(11)],
    },
    "arrays": lambda: {"prompt": "a cat", "output_type": "np", "generator": seeded(12)},
    "more steps": lambda: {"prompt": "a cat", "num_inference_steps": 13, "generator": seeded(13)},
}


@pytest.mark.parametrize("call", PRIOR_CALLS.values(), ids=PRIOR_CALLS)
def test_prior(call: Callable[[], dict[str, Any]], oracles: dict[str, Any], prior: KandinskyV22PriorPipeline) -> None:
    results = []
    for pipe in (prior, oracles["prior"]):
        torch.manual_seed(5)
        results.append(pipe(**{"num_inference_steps": 3, **call()}))
    assert_same_embeddings(*results)


DECODER_CALLS: dict[str, Callable[[], dict[str, Any]]] = {
    "defaults": lambda: {"generator": seeded(0)},
    "global seed": dict,
    "batch": lambda: {**pair(2, seed=1), "generator": seeded(1)},
    "lists": lambda: {
        "image_embeds": [embeds(1, 1), embeds(2, 3)],
        "negative_image_embeds": [embeds(2, 2), embeds(1, 4)],
        "generator": seeded(2),
    },
    "two each": lambda: {**pair(2, seed=1), "num_images_per_prompt": 2, "generator": seeded(3)},
    "wide": lambda: {"height": 24, "width": 48, "generator": seeded(4)},
    "tall, rounded up": lambda: {"height": 45, "width": 22, "generator": seeded(5)},
    "guidance off": lambda: {"guidance_scale": 1.0, "generator": seeded(6)},
    "guidance high": lambda: {"guidance_scale": 8, "generator": seeded(7)},
    "latents": lambda: {"latents": torch.randn(1, 4, 16, 16, generator=seeded(8)), "generator": seeded(9)},
    "generators": lambda: {**pair(2, seed=1), "generator": [seeded(10), seeded(11)]},
    "pil": lambda: {"output_type": "pil", "generator": seeded(12)},
    "pt": lambda: {"output_type": "pt", "generator": seeded(13)},
    "latent": lambda: {"output_type": "latent", "generator": seeded(14)},
    "more steps": lambda: {"num_inference_steps": 5 if HAS_AVX512 else 4, "generator": seeded(15)},
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("call", DECODER_CALLS.values(), ids=DECODER_CALLS)
def test_decoder(
    call: Callable[[], dict[str, Any]], scheduler: str, oracles: dict[str, Any], decoder: KandinskyV22Pipeline
) -> None:
    standard = {**pair(), "height": 32, "width": 32, "num_inference_steps": 3, "output_type": "np"}
    results = []
    for pipe in with_schedulers(decoder, oracles["decoder"], scheduler):
        torch.manual_seed(5)
        results.append(pipe(**{**standard, **call()}).images)
    assert_same_pictures(*results)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_decoder_in_double_precision(scheduler: str, checkpoints: Path, decoder: KandinskyV22Pipeline) -> None:
    """A random network magnifies rounding errors from step to step; in float64 many steps are equal too."""
    ours = KandinskyV22Pipeline(**copy.deepcopy(decoder.components)).to(torch.float64)
    theirs = diffusers.KandinskyV22Pipeline.from_pretrained(checkpoints / "decoder", torch_dtype=torch.float64)
    theirs.set_progress_bar_config(disable=True)
    results = []
    for pipe in with_schedulers(ours, theirs, scheduler):
        results.append(
            pipe(
                **pair(2),
                height=32,
                width=32,
                num_inference_steps=12,
                output_type="latent",
                generator=seeded(0),
            ).images
        )
    assert difference(*results) < 1e-7


COMBINED_CALLS: dict[str, Callable[[], dict[str, Any]]] = {
    "prompt": lambda: {"prompt": "a red cat", "generator": seeded(0)},
    "prompts": lambda: {"prompt": ["a red cat", "dog"], "generator": seeded(1)},
    "negative": lambda: {"prompt": "a red cat", "negative_prompt": "blue", "generator": seeded(2)},
    "negatives, two each": lambda: {
        "prompt": ["a cat", "on a mat"],
        "negative_prompt": ["blue", "bad, ugly"],
        "num_images_per_prompt": 2,
        "generator": seeded(3),
    },
    "guidance": lambda: {
        "prompt": "a red cat",
        "guidance_scale": 2.0,
        "prior_guidance_scale": 6.0,
        "generator": seeded(4),
    },
    "guidance off in the decoder": lambda: {"prompt": "a cat", "guidance_scale": 1.0, "generator": seeded(5)},
    "guidance off in the prior": lambda: {"prompt": "a cat", "prior_guidance_scale": 1.0, "generator": seeded(6)},
    "generators": lambda: {"prompt": ["a cat", "red"], "generator": [seeded(7), seeded(8)]},
    "prior latents": lambda: {"prompt": "a cat", "latents": embeds(1, 9), "generator": seeded(9)},
    "steps": lambda: {
        "prompt": "a cat",
        "prior_num_inference_steps": 5,
        "num_inference_steps": 4,
        "generator": seeded(1),
    },
    "sizes": lambda: {"prompt": "a cat", "height": 24, "width": 40, "generator": seeded(2)},
    "latent": lambda: {"prompt": "a cat", "output_type": "latent", "generator": seeded(3)},
    "pil": lambda: {"prompt": "a cat", "output_type": "pil", "generator": seeded(4)},
    "global seed": lambda: {"prompt": "a cat"},
}


@pytest.mark.parametrize("call", COMBINED_CALLS.values(), ids=COMBINED_CALLS)
def test_combined(
    call: Callable[[], dict[str, Any]], oracles: dict[str, Any], combined: KandinskyV22CombinedPipeline
) -> None:
    standard = {
        "num_inference_steps": 3,
        "prior_num_inference_steps": 2,
        "height": 32,
        "width": 32,
        "output_type": "np",
    }
    results = []
    for pipe in (combined, oracles["combined"]):
        torch.manual_seed(5)
        results.append(pipe(**{**standard, **call()}).images)
    assert_same_pictures(*results)


MIXTURES: dict[str, Callable[[], dict[str, Any]]] = {
    "text": lambda: {"images_and_prompts": ["a cat"], "weights": [1.0]},
    "texts": lambda: {"images_and_prompts": ["a cat", "red"], "weights": [0.25, 0.75]},
    "text and picture": lambda: {"images_and_prompts": ["a cat", noise_picture(1, 56, 40)], "weights": [0.4, 0.6]},
    "pixels": lambda: {
        "images_and_prompts": [torch.randn(1, 3, PIXELS, PIXELS, generator=seeded(3)), "a cat"],
        "weights": [0.3, 0.3],
    },
    "three each": lambda: {
        "images_and_prompts": [noise_picture(2, 56, 40), "a cat", "red"],
        "weights": [0.2, 0.2, 0.6],
        "num_images_per_prompt": 3,
    },
    "negative": lambda: {
        "images_and_prompts": ["a cat", "red"],
        "weights": [0.5, 0.5],
        "negative_prompt": "blue",
        "num_images_per_prompt": 2,
    },
    "negative of the prior": lambda: {
        "images_and_prompts": ["a cat", noise_picture(4, 56, 40)],
        "weights": [0.5, 0.5],
        "negative_prior_prompt": "ugly",
    },
    "both negatives": lambda: {
        "images_and_prompts": ["a cat"],
        "weights": [1.0],
        "negative_prior_prompt": "ugly",
        "negative_prompt": "blue",
    },
    "guidance, steps": lambda: {
        "images_and_prompts": ["a cat", "red"],
        "weights": [0.5, 0.5],
        "guidance_scale": 2.0,
        "num_inference_steps": 5,
    },
    "latents": lambda: {"images_and_prompts": ["a cat"], "weights": [0.9], "latents": embeds(1, 30)},
}


@pytest.mark.parametrize("call", MIXTURES.values(), ids=MIXTURES)
def test_interpolate(
    call: Callable[[], dict[str, Any]], oracles: dict[str, Any], prior: KandinskyV22PriorPipeline
) -> None:
    results, drawn_next = [], []
    for pipe in (prior, oracles["prior"]):
        generator = seeded(40)
        results.append(pipe.interpolate(**{"num_inference_steps": 3, "generator": generator, **call()}))
        drawn_next.append(torch.randn(4, generator=generator))
    assert_same_embeddings(*results)
    assert torch.equal(*drawn_next), "a decoder that uses this generator next would draw other noise"


def test_truncated_prompts_are_reported(prior: KandinskyV22PriorPipeline, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        prior("a cat " * 60 + "red", num_inference_steps=2)
    assert "red" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        prior("a cat", num_inference_steps=2)
    assert not caplog.text


@pytest.mark.parametrize("name", ["prior", "decoder", "combined"])
def test_reference_loads_what_we_save(name: str, oracles: dict[str, Any], tmp_path: Path, request: Any) -> None:
    request.getfixturevalue(name).save_pretrained(tmp_path)
    reloaded = type(oracles[name]).from_pretrained(tmp_path)
    reloaded.set_progress_bar_config(disable=True)
    call: dict[str, Any] = {
        "prior": {"prompt": "a red cat"},
        "decoder": {**pair(seed=1), "height": 32, "width": 32, "output_type": "np"},
        "combined": {"prompt": "a red cat", "height": 32, "width": 32, "output_type": "np"},
    }[name]
    results = [pipe(**call, num_inference_steps=2, generator=seeded(0))[0] for pipe in (reloaded, oracles[name])]
    assert np.abs(np.asarray(results[0]) - np.asarray(results[1])).max() < 1e-6


def test_schedulers_of_the_reference_work_in_our_pipelines(
    decoder: KandinskyV22Pipeline, oracles: dict[str, Any]
) -> None:
    standard = {"height": 32, "width": 32, "num_inference_steps": 4, "output_type": "latent"}
    config = oracles["decoder"].scheduler.config
    solvers = [
        diffusers.DDPMScheduler.from_config(config),
        diffusers.DPMSolverMultistepScheduler.from_config(config, variance_type=None),
        diffusers.UniPCMultistepScheduler.from_config(config),
    ]
    for solver in solvers:
        decoder.scheduler = solver
        ours = decoder(**pair(seed=1), **standard, generator=seeded(1)).images
        assert torch.isfinite(ours).all()
        if isinstance(solver, diffusers.UniPCMultistepScheduler):
            continue  # its step accepts no generator: we pass none, and the reference fails
        theirs = diffusers.KandinskyV22Pipeline(**{**oracles["decoder"].components, "scheduler": solver})
        theirs.set_progress_bar_config(disable=True)
        assert difference(ours, theirs(**pair(seed=1), **standard, generator=seeded(1)).images) < PIXEL_TOLERANCE
