"""The embedded model's distilled adapter and tiny decoder: they do what the documentation says of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from benchmarks.embedded_prompts import draw_prompts, judge_all
from tests.pipelines.recording import record_batch_sizes

from kandinsky22 import AutoPipelineForText2Image, KandinskyV22CombinedPipeline, apply_quality
from kandinsky22.pipelines.network_calls import decode_latents
from kandinsky22.training.scenes import render


@pytest.fixture(scope="module")
def embedded() -> Any:
    pipe = AutoPipelineForText2Image.from_pretrained("embedded")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_instant_shows_what_prompts_state(embedded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = draw_prompts(12, held_out=(False,), seed=31)
    arguments = apply_quality(embedded, "instant")
    sizes = record_batch_sizes(embedded.unet, monkeypatch)
    generators = [torch.Generator().manual_seed(prompt.seed) for prompt in prompts]
    images = embedded([prompt.text for prompt in prompts], generator=generators, **arguments).images
    assert sizes == [len(prompts)], "one unguided evaluation of the UNet"
    # 97 % of 1,200 prompts; of 24, fewer than 80 % are right once in a thousand times
    assert sum(verdict.all_correct for verdict in judge_all(images, prompts)) >= 19


def test_the_tiny_decoder_resembles_movq(embedded: Any) -> None:
    pipe = KandinskyV22CombinedPipeline.from_pretrained("embedded")
    pipe.enable_tiny_decoder()
    assert pipe.tiny_decoder is not None
    images = render([prompt.scene for prompt in draw_prompts(4, seed=32)], 128) * 2 - 1
    with torch.no_grad():
        latents = pipe.movq.encode(images).latents
        expected, actual = decode_latents(pipe.movq, latents), pipe.tiny_decoder(latents)
    difference = (expected.clamp(-1, 1) - actual.clamp(-1, 1)).abs().mean() * 127.5
    assert difference < 4  # grey levels of 255; 1.5 on 64 pictures
