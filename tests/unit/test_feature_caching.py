"""Feature caching in the UNet: levels that run, cached features, and unchanged results elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from kandinsky22.errors import InputError
from kandinsky22.models.feature_cache import FeatureCache
from kandinsky22.models.unet import UNet2DConditionModel

CONFIG: dict[str, Any] = {
    "block_out_channels": (32, 48, 64),
    "layers_per_block": 2,
    "norm_num_groups": 16,
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D", "SimpleCrossAttnDownBlock2D"),
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "encoder_hid_dim": 24,
    "cross_attention_dim": 16,
    "attention_head_dim": 16,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "attention everywhere": {
        "down_block_types": ("SimpleCrossAttnDownBlock2D",) * 3,
        "up_block_types": ("SimpleCrossAttnUpBlock2D",) * 3,
    },
}


def network(variant: str = "plain") -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(**{**CONFIG, **VARIANTS[variant]}).eval()


def inputs(rows: int = 2) -> tuple[list[Tensor], Tensor]:
    """Return latents of four steps, and embeddings."""
    torch.manual_seed(1)
    return [torch.randn(rows, 4, 8, 12) for _ in range(4)], torch.randn(rows, 24)


@torch.no_grad()
def test_caching_with_every_1_equals_no_cache() -> None:
    unet, (samples, embeds) = network(), inputs()
    condition, cache = unet.encode_condition(embeds), FeatureCache(every=1)
    for index, sample in enumerate(samples):
        assert torch.equal(
            unet.denoise(sample, 900 - 100 * index, condition, cache),
            unet.denoise(sample, 900 - 100 * index, condition),
        )


@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_between_full_steps_the_outer_levels_go_on_with_the_features_of_the_last_one(variant: str, levels: int) -> None:
    unet, (samples, embeds) = network(variant), inputs()
    condition, entered = unet.encode_condition(embeds), unet.up_blocks[-levels]
    inner_features: list[Tensor] = []
    handle = entered.register_forward_pre_hook(lambda _, args: inner_features.append(args[0]))
    expected_full = unet.denoise(samples[0], 900, condition)
    handle.remove()
    # A full step whose inner features are replaced by those of the step before.
    handle = entered.register_forward_pre_hook(lambda _, args: (inner_features[0], *args[1:]))
    expected_between = [unet.denoise(samples[index], 900 - index, condition) for index in (1, 2)]
    handle.remove()

    cache = FeatureCache(every=3, levels=levels)
    assert torch.equal(unet.denoise(samples[0], 900, condition, cache), expected_full)
    for index in (1, 2):
        result = unet.denoise(samples[index], 900 - index, condition, cache)
        assert torch.equal(result, expected_between[index - 1])
        assert not torch.equal(result, unet.denoise(samples[index], 900 - index, condition))
    assert torch.equal(
        unet.denoise(samples[3], 897, condition, cache), unet.denoise(samples[3], 897, condition)
    )  # full again


@pytest.mark.parametrize(("levels", "ran"), [(1, [1, 0, 0, 0, 0, 0, 1]), (2, [1, 1, 0, 0, 0, 1, 1])])
@torch.no_grad()
def test_cached_levels_do_not_run(levels: int, ran: list[int]) -> None:
    unet, (samples, embeds) = network(), inputs()
    condition, cache = unet.encode_condition(embeds), FeatureCache(every=2, levels=levels)
    unet.denoise(samples[0], 900, condition, cache)
    counts = [0] * 7
    for index, level in enumerate(unet._stages()):
        level.register_forward_hook(lambda *_, index=index: counts.__setitem__(index, counts[index] + 1))
    halved: list[int] = []
    unet.down_blocks[levels - 1].downsamplers.register_forward_hook(lambda *_: halved.append(1))
    unet.down_blocks[levels - 1].downsamplers[0].register_forward_hook(lambda *_: halved.append(1))
    unet.denoise(samples[1], 800, condition, cache)
    assert counts == ran
    assert not halved


@torch.no_grad()
def test_a_cache_serves_one_batch_and_leaves_levels_to_skip() -> None:
    unet, (samples, embeds) = network(), inputs()
    condition, cache = unet.encode_condition(embeds), FeatureCache(every=2)
    unet.denoise(samples[0], 900, condition, cache)
    with pytest.raises(InputError, match=r"len\(sample\)=1 is invalid: expected 2, .* in the FeatureCache"):
        unet.denoise(samples[1][:1], 800, unet.encode_condition(embeds[:1]), cache)
    with pytest.raises(
        InputError, match=r"levels=3 is invalid: expected an integer from 1 to 2: this UNet has 3 resolution levels"
    ):
        unet.denoise(samples[0], 900, condition, FeatureCache(every=2, levels=3))


@torch.no_grad()
def test_feature_caches_are_independent() -> None:
    """Two interleaved series of steps equal each series alone."""
    unet, (samples, embeds) = network(), inputs()
    conditions = [unet.encode_condition(embeds), unet.encode_condition(-embeds)]

    def series(condition: Any, cache: FeatureCache) -> Any:
        return (unet.denoise(sample, 900 - index, condition, cache) for index, sample in enumerate(samples))

    alone = [list(series(condition, FeatureCache(every=2))) for condition in conditions]
    turns = list(zip(*(series(condition, FeatureCache(every=2)) for condition in conditions), strict=True))
    for index, both in enumerate(turns):
        assert torch.equal(both[0], alone[0][index])
        assert torch.equal(both[1], alone[1][index])


def test_a_step_between_takes_a_quarter_of_the_operations_at_published_size() -> None:
    with torch.device("meta"), torch.no_grad():
        unet = UNet2DConditionModel()
        condition, sample = unet.encode_condition(torch.empty(2, 1280)), torch.empty(2, 4, 64, 64)
        cache, counts = FeatureCache(every=2), []
        for _ in range(2):
            with FlopCounterMode(display=False) as counter:
                unet.denoise(sample, torch.empty(1), condition, cache)
            counts.append(counter.get_total_flops())
    assert counts[0] == pytest.approx(1.707e12, rel=0.01)
    assert counts[1] / counts[0] == pytest.approx(0.255, abs=0.005)
