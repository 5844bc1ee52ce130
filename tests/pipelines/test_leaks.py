"""Memory stays constant over many generations."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.pipelines.tiny import seeded
from torch import nn

from kandinsky22 import AutoPipelineForText2Image, KandinskyV22Img2ImgPipeline, optimisations
from kandinsky22.kernels import conv, host_memory, linear, winograd

GENERATIONS, WARM_UP = 50, 10


def resident() -> int:
    """Return the resident bytes of this process after freed memory was returned to the system."""
    gc.collect()
    host_memory.malloc_trim()
    return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) * 1024


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="memory is read from Linux's /proc")
def test_fifty_generations_take_no_more_memory_than_ten() -> None:
    pipe = AutoPipelineForText2Image.from_pretrained("embedded")
    pipe.set_progress_bar_config(disable=True)
    early = 0
    for number in range(GENERATIONS):
        if number == WARM_UP:
            early = resident()
        pipe(
            f"a red circle, number {number}",
            num_inference_steps=2,
            prior_num_inference_steps=2,
            generator=seeded(number),
        )
    # Caches, such as that of the last 16 texts, take less than a megabyte.
    assert resident() - early < 4e6


@pytest.mark.skipif(not linear.ONEDNN_DTYPES, reason="this torch has no packed products on this machine")
def test_winograd_weights_are_held_for_one_network_at_a_time(decoder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MIN_MULTIPLICATIONS", "MIN_WINOGRAD_CHANNELS", "MIN_WINOGRAD_TILES"):
        monkeypatch.setattr(conv, name, 0)
    counts: list[tuple[bool, bool]] = []

    def count(*_: object) -> None:
        counts.append((matrices(decoder.unet) > 0, matrices(decoder.movq) > 0))

    embeds = torch.zeros(1, decoder.unet.config.encoder_hid_dim)
    handles = [
        layer.register_forward_pre_hook(count)
        for layer in (decoder.unet.conv_in, decoder.movq.decoder.conv_in, decoder.movq.decoder.conv_out)
    ]
    pictures = [
        decoder(embeds, embeds, num_inference_steps=2, output_type="pt", generator=seeded(0)).images for _ in range(2)
    ]
    count()
    for handle in handles:
        handle.remove()
    assert torch.equal(*pictures)
    assert counts == [(False, False), (True, False), (False, False), (False, True)] * 2 + [(False, False)]
    counts.clear()
    starting = KandinskyV22Img2ImgPipeline(**decoder.components)
    starting.set_progress_bar_config(disable=True)
    handles = [layer.register_forward_pre_hook(count) for layer in (decoder.unet.conv_in, decoder.movq.encoder.conv_in)]
    for _ in range(2):
        starting(embeds, torch.zeros(1, 3, 64, 64), embeds, height=64, width=64, num_inference_steps=2, strength=1.0)
    for handle in handles:
        handle.remove()
    assert counts == [(False, False), (False, False), (True, False)] * 2
    with optimisations(free_winograd_weights=False):
        decoder(embeds, embeds, num_inference_steps=2)
    assert matrices(decoder.unet) > 0 < matrices(decoder.movq)


def matrices(network: nn.Module) -> int:
    packs = (vars(layer).get("_packed_weight") for layer in network.modules())
    return sum(pack is not None and pack.layout == winograd.LAYOUT for pack in packs)
