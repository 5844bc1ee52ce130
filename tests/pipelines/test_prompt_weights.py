"""Prompt weights in pipelines: off unless asked for by name."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.pipelines.calls import PRIORS, inputs
from tests.pipelines.tiny import seeded

from kandinsky22 import InputError, KandinskyV22PriorPipeline

Pipelines = Callable[..., Any]


def test_brackets_are_text_unless_asked_for(prior: KandinskyV22PriorPipeline) -> None:
    plain = prior("a (red:1.5) cat", num_inference_steps=2, generator=seeded(1)).image_embeds
    weighted = prior("a (red:1.5) cat", num_inference_steps=2, generator=seeded(1), prompt_weights=True).image_embeds
    assert not torch.equal(plain, weighted)


@pytest.mark.parametrize("prompt", ["a red cat", "a (red:1) cat", "a ([red]) cat"])
def test_weights_of_one_change_nothing(prompt: str, prior: KandinskyV22PriorPipeline) -> None:
    plain = prior.encode_text(["a red cat", "on"])
    weighted = prior.encode_text([prompt, "on"], prompt_weights=True)
    for one, other in zip(vars(plain).values(), vars(weighted).values(), strict=True):
        assert torch.equal(one, other)


def test_a_weight_of_zero_pools_like_the_prompt_without_the_words(prior: KandinskyV22PriorPipeline) -> None:
    weighted = prior.encode_text(["a (red:0) cat"], prompt_weights=True)
    without = prior.encode_text(["a cat"])
    torch.testing.assert_close(weighted.prompt_embeds, without.prompt_embeds)


def test_stronger_words_move_the_pooled_embedding_further(prior: KandinskyV22PriorPipeline) -> None:
    direction = prior.encode_text(["a red cat"]).prompt_embeds - prior.encode_text(["a cat"]).prompt_embeds
    encoding = prior.encode_text(["a (red:1.5) cat"], prompt_weights=True)
    plain = prior.encode_text(["a red cat"])
    torch.testing.assert_close(encoding.prompt_embeds, plain.prompt_embeds + 0.5 * direction)
    assert encoding.text_encoder_hidden_states.shape == plain.text_encoder_hidden_states.shape


@pytest.mark.parametrize("name", ["PriorEmb2Emb", "Combined", "Img2ImgCombined", "InpaintCombined"])
def test_all_pipelines_with_prompts_accept_them(name: str, make_pipeline: Pipelines) -> None:
    pipe, steps = make_pipeline(name), {"num_inference_steps": 2}
    call = {**inputs(name), **steps, "prompt_weights": True, "negative_prompt": "[a] dog"}
    if name not in PRIORS:
        call |= {"prior_num_inference_steps": 2, "output_type": "np", "height": 32, "width": 32}

    def first(prompt: str) -> torch.Tensor:
        result = pipe(**{**call, "prompt": prompt}, generator=seeded(1), return_dict=False)[0]
        return torch.as_tensor(result)

    assert not torch.equal(first("a (red:1.5) cat"), first("a red cat"))
    assert torch.equal(first("a (red:1) cat"), first("a red cat"))


@pytest.mark.usefixtures("no_network_runs")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": "a (red cat", "prompt_weights": True}, "prompt="),
        ({"negative_prompt": "red)", "prompt_weights": True}, "negative_prompt="),
        ({"prompt": "(red:11)", "prompt_weights": True}, "a weight in prompt=11"),
        ({"prompt_weights": 1}, "prompt_weights=1"),
    ],
)
@pytest.mark.parametrize("name", ["Prior", "PriorEmb2Emb", "Combined"])
def test_invalid_weights(name: str, arguments: dict[str, Any], message: str, make_pipeline: Pipelines) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        make_pipeline(name)(**{**inputs(name), **arguments})


def test_a_long_prompt_is_one_short_line(prior: KandinskyV22PriorPipeline, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        prior.encode_text(["a red cat " * 100 + "\n\x1b[31m"])
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith("the prompt has 30")
    assert "but CLIP reads 77: cut off is '" in message
    assert " ... " in message
    assert message.isprintable()
    assert len(message) < 200
