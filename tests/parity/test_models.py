"""Networks compared with the reference's: tensor names, values, and configs in both directions."""

from __future__ import annotations

import itertools
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from kandinsky22.errors import ConfigError, InputError
from kandinsky22.models.movq import VQModel
from kandinsky22.models.prior import TIMESTEPS_PER_BATCH, PriorTransformer
from kandinsky22.models.unet import UNet2DConditionModel

PRIOR = {"num_attention_heads": 2, "attention_head_dim": 12, "embedding_dim": 32, "num_layers": 3}
UNET = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 8,
    "block_out_channels": (32, 64, 96),
    "layers_per_block": 2,
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D", "SimpleCrossAttnDownBlock2D"),
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "resnet_time_scale_shift": "scale_shift",
    "encoder_hid_dim": 32,
    "encoder_hid_dim_type": "image_proj",
    "addition_embed_type": "image",
    "cross_attention_dim": 24,
    "attention_head_dim": 16,
}
MOVQ = {
    "block_out_channels": (32, 32, 64),
    "layers_per_block": 1,
    "latent_channels": 4,
    "vq_embed_dim": 4,
    "num_vq_embeddings": 64,
    "norm_type": "spatial",
    "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"),
}
UNET_VARIANTS = {
    "plain": {},
    "hint": {"addition_embed_type": "image_hint", "in_channels": 8},
    "inpaint": {"in_channels": 9},
    "two levels": {
        "block_out_channels": (32, 48),
        "norm_num_groups": 16,
        "layers_per_block": 3,
        "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    },
    "wide heads": {"attention_head_dim": 32, "norm_eps": 1e-6},
    "attention everywhere": {
        "down_block_types": ("SimpleCrossAttnDownBlock2D",) * 3,
        "up_block_types": ("SimpleCrossAttnUpBlock2D",) * 3,
        "layers_per_block": 1,
    },
}


def twins(theirs_class: type[nn.Module], ours_class: type[Any], config: dict[str, Any]) -> tuple[Any, Any]:
    """Return the reference's network with random tensors, and ours, built from its config, with the same tensors."""
    torch.manual_seed(0)
    theirs = theirs_class(**config).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.15)
    ours = ours_class.from_config(theirs.config).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def error(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest difference relative to the largest value."""
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize("lengths", [(5, 9, 3), (77, 1, 2), (0, 4, 5), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("timestep", [0, 999, torch.tensor(500), torch.tensor([1, 2, 999])], ids=str)
def test_prior(lengths: tuple[int, ...], timestep: int | Tensor) -> None:
    theirs, ours = twins(diffusers.PriorTransformer, PriorTransformer, PRIOR)
    sample, text, states = torch.randn(3, 32), torch.randn(3, 32), torch.randn(3, 77, 32)
    mask = torch.arange(77) < torch.tensor(lengths)[:, None]
    mask[1, lengths[1] // 2] = lengths[1] == 1  # a masked token inside the text, unless it is the only one
    with torch.no_grad():
        expected = theirs(sample, timestep, text, states, mask).predicted_image_embedding
        assert error(ours(sample, timestep, text, states, mask).predicted_image_embedding, expected) < 1e-5
        assert error(ours(sample, timestep, text, states, mask.float(), return_dict=False)[0], expected) < 1e-5
        assert error(ours.post_process_latents(sample), theirs.post_process_latents(sample)) < 1e-6


def test_prior_condition_serves_every_step() -> None:
    theirs, ours = twins(diffusers.PriorTransformer, PriorTransformer, PRIOR)
    text, states, mask = torch.randn(2, 32), torch.randn(2, 77, 32), torch.arange(77)[None].repeat(2, 1) < 6
    with torch.no_grad():
        condition = ours.encode_condition(text, states, mask)
        assert all(kv.key.shape[2] == 7 for kv in condition.layers), "padding is not computed"
        for timestep in (980, 500, 0):
            sample = torch.randn(2, 32)
            expected = theirs(sample, timestep, text, states, mask).predicted_image_embedding
            assert error(ours.denoise(sample, timestep, condition), expected) < 1e-5


def test_prior_computes_timesteps_ahead() -> None:
    theirs, ours = twins(diffusers.PriorTransformer, PriorTransformer, PRIOR)
    text, states, mask = torch.randn(2, 32), torch.randn(2, 77, 32), torch.arange(77) < torch.tensor([[6], [2]])
    schedule = [float(t) for t in range(990, 0, -20)]
    assert len(schedule) > TIMESTEPS_PER_BATCH, "more than one block"
    calls = []
    ours.time_embedding.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        condition = ours.encode_condition(text, states, mask, schedule)
        for timestep in [*schedule, schedule[0], 7]:  # in order, then the first again, then another one
            sample = torch.randn(2, 32)
            expected = theirs(sample, timestep, text, states, mask).predicted_image_embedding
            assert error(ours.denoise(sample, timestep, condition), expected) < 1e-5
    assert len(calls) == 4


def test_prior_reads_a_text() -> None:
    with pytest.raises(InputError, match="encoder_hidden_states"):
        PriorTransformer(**PRIOR)(torch.randn(1, 32), 0, torch.randn(1, 32), attention_mask=torch.ones(1, 77))


def test_prior_without_a_mask_attends_to_all_tokens() -> None:
    theirs, ours = twins(diffusers.PriorTransformer, PriorTransformer, PRIOR)
    inputs = torch.randn(2, 32), torch.tensor([7, 300]), torch.randn(2, 32), torch.randn(2, 77, 32)
    with torch.no_grad():
        expected = theirs(*inputs).predicted_image_embedding
        assert error(ours(*inputs).predicted_image_embedding, expected) < 1e-5
        masked = theirs(*inputs, torch.ones(2, 77)).predicted_image_embedding
    assert error(masked, expected) > 1e-3, "a mask is also a causal one"


@pytest.mark.parametrize("name", ["hint", "inpaint"])
def test_unet_takes_positional_arguments_of_the_reference(name: str) -> None:
    theirs, ours = twins(diffusers.UNet2DConditionModel, UNet2DConditionModel, UNET | UNET_VARIANTS[name])
    sample, added = torch.randn(1, 4 if name == "hint" else 9, 8, 8), {"image_embeds": torch.randn(1, 32)}
    if name == "hint":
        added["hint"] = torch.randn(1, 3, 64, 64)
    arguments = (sample, 5, None, None, None, None, None, added, None, None, None, None, False)
    with torch.no_grad():
        assert error(ours(*arguments)[0], theirs(*arguments)[0]) < 1e-5
        for position, argument in ((2, "encoder_hidden_states"), (3, "class_labels"), (5, "attention_mask")):
            changed = [*arguments[:position], torch.zeros(1), *arguments[position + 1 :]]
            with pytest.raises(InputError, match=argument):
                ours(*changed)


@pytest.mark.parametrize("variant", UNET_VARIANTS)
@pytest.mark.parametrize("size", [(16, 16), (8, 24)], ids=str)
def test_unet(variant: str, size: tuple[int, int]) -> None:
    theirs, ours = twins(diffusers.UNet2DConditionModel, UNet2DConditionModel, UNET | UNET_VARIANTS[variant])
    sample = torch.randn(2, 4 if variant == "hint" else theirs.config.in_channels, *size)
    added = {"image_embeds": torch.randn(2, 32)}
    if variant == "hint":
        added["hint"] = torch.randn(2, 3, 8 * size[0], 8 * size[1])
    for timestep in (0, torch.tensor(999), torch.tensor([3, 700])):
        with torch.no_grad():
            expected = theirs(sample, timestep, None, added_cond_kwargs=added).sample
            assert error(ours(sample, timestep, added_cond_kwargs=added).sample, expected) < 1e-5
            assert error(ours(sample, timestep, None, added_cond_kwargs=added, return_dict=False)[0], expected) < 1e-5


def test_unet_condition_carries_extra_channels() -> None:
    theirs, ours = twins(diffusers.UNet2DConditionModel, UNet2DConditionModel, UNET | UNET_VARIANTS["inpaint"])
    latents, extra, embeds = torch.randn(2, 4, 16, 16), torch.randn(2, 5, 16, 16), torch.randn(2, 32)
    with torch.no_grad():
        expected = theirs(torch.cat([latents, extra], 1), 10, None, added_cond_kwargs={"image_embeds": embeds}).sample
        assert error(ours.denoise(latents, 10, ours.encode_condition(embeds, channels=extra)), expected) < 1e-5


def test_missing_unet_inputs_are_named() -> None:
    unhinted, hinted = UNet2DConditionModel(**UNET), UNet2DConditionModel(**UNET | UNET_VARIANTS["hint"])
    embeds, picture = torch.randn(1, 32), torch.randn(1, 3, 128, 128)
    for call, name in (
        (lambda: unhinted.encode_condition(embeds, hint=picture), "hint"),
        (lambda: hinted.encode_condition(embeds), "hint"),
        (lambda: unhinted(torch.randn(1, 4, 16, 16), 0, added_cond_kwargs={}), "image_embeds"),
        (lambda: unhinted(torch.randn(1, 4, 6, 16), 0, added_cond_kwargs={"image_embeds": embeds}), "sample"),
    ):
        with pytest.raises(InputError, match=name):
            call()


@pytest.mark.parametrize("size", [(16, 16), (24, 40)], ids=str)
def test_movq(size: tuple[int, int]) -> None:
    theirs, ours = twins(diffusers.VQModel, VQModel, MOVQ)
    assert ours.downscale_factor == 4
    picture, latents = torch.randn(2, 3, *size), torch.randn(2, 4, size[0] // 4, size[1] // 4)
    with torch.no_grad():
        assert error(ours.encode(picture).latents, theirs.encode(picture).latents) < 1e-5
        for raw in (True, False):
            expected = theirs.decode(latents, force_not_quantize=raw)
            result = ours.decode(latents, force_not_quantize=raw)
            assert error(result.sample, expected.sample) < 1e-5
            assert torch.allclose(result.commit_loss, expected.commit_loss, rtol=1e-5)
            assert torch.equal(ours.decode(latents, force_not_quantize=raw, return_dict=False)[0], result.sample)
        assert error(ours(picture).sample, theirs(picture).sample) < 1e-4


@pytest.mark.parametrize("networks", [(PriorTransformer, PRIOR), (UNet2DConditionModel, UNET), (VQModel, MOVQ)])
def test_gradients_reach_every_parameter(networks: tuple[type[Any], dict[str, Any]]) -> None:
    network = networks[0](**networks[1])
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    if isinstance(network, PriorTransformer):
        args = (torch.randn(2, 32), 5, torch.randn(2, 32), torch.randn(2, 77, 32), torch.ones(2, 77))
        out = network.post_process_latents(network(*args).predicted_image_embedding)
    elif isinstance(network, UNet2DConditionModel):
        added = {"image_embeds": torch.randn(2, 32)}
        out = network(torch.randn(2, 4, 16, 16), torch.tensor([1, 2]), added_cond_kwargs=added).sample
    else:
        decoded = network(torch.randn(2, 3, 16, 16))
        out = decoded.sample + decoded.commit_loss
    out.square().sum().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()] in (
        [],
        ["quantize.embedding.weight"],
    )


PUBLISHED = [
    (diffusers.PriorTransformer, PriorTransformer, {"embedding_dim": 1280}),
    (
        diffusers.UNet2DConditionModel,
        UNet2DConditionModel,
        UNET
        | {
            "sample_size": 64,
            "block_out_channels": (384, 768, 1152, 1536),
            "layers_per_block": 3,
            "down_block_types": ("ResnetDownsampleBlock2D",) + ("SimpleCrossAttnDownBlock2D",) * 3,
            "up_block_types": ("SimpleCrossAttnUpBlock2D",) * 3 + ("ResnetUpsampleBlock2D",),
            "attention_head_dim": 64,
            "cross_attention_dim": 768,
            "encoder_hid_dim": 1280,
        },
    ),
    (
        diffusers.VQModel,
        VQModel,
        MOVQ
        | {
            "block_out_channels": (128, 256, 256, 512),
            "layers_per_block": 2,
            "num_vq_embeddings": 16384,
            "down_block_types": ("DownEncoderBlock2D",) * 3 + ("AttnDownEncoderBlock2D",),
            "up_block_types": ("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * 3,
        },
    ),
]


@pytest.mark.parametrize(("theirs", "ours", "config"), PUBLISHED, ids=["prior", "unet", "movq"])
def test_published_networks_have_the_same_tensors(theirs: Any, ours: Any, config: dict[str, Any]) -> None:
    with torch.device("meta"):
        reference, default, read = theirs(**config), ours(), ours.from_config(theirs(**config).config)
    shapes = {name: tensor.shape for name, tensor in reference.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in default.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in read.state_dict().items()}


REFUSED = [
    (PriorTransformer, PRIOR, {"added_emb_type": None}),
    (PriorTransformer, PRIOR, {"additional_embeddings": 3}),
    (PriorTransformer, PRIOR, {"num_layers": 0}),
    (PriorTransformer, PRIOR, {"num_layres": 3}),
    (UNet2DConditionModel, UNET, {"addition_embed_type": "text"}),
    (UNet2DConditionModel, UNET, {"class_embed_type": "timestep"}),
    (UNet2DConditionModel, UNET, {"mid_block_type": None}),
    (UNet2DConditionModel, UNET, {"down_block_types": ("DownBlock2D",) * 3}),
    (UNet2DConditionModel, UNET, {"up_block_types": ("ResnetUpsampleBlock2D",)}),
    (UNet2DConditionModel, UNET, {"block_out_channels": (30, 64, 96)}),
    (UNet2DConditionModel, UNET, {"attention_head_dim": 64}),
    (UNet2DConditionModel, UNET, {"layers_per_block": 1.5}),
    (VQModel, MOVQ, {"norm_type": "group"}),
    (VQModel, MOVQ, {"block_out_channels": (32, 48, 64)}),
    (VQModel, MOVQ, {"vq_embed_dim": 3}),
    (VQModel, MOVQ, {"down_block_types": ("DownEncoderBlock2D",)}),
    (VQModel, MOVQ, {"lookup_from_codebook": True}),
]


@pytest.mark.parametrize(("network", "config", "change"), REFUSED, ids=lambda value: str(value)[:50])
def test_other_configs_are_refused_by_name(network: Any, config: dict[str, Any], change: dict[str, Any]) -> None:
    name = next(iter(change))
    name = "block_out_channels" if name == "attention_head_dim" else name  # the error names both
    with pytest.raises(ConfigError, match=name):
        network(**config | change)


def test_configs_read_like_the_dictionaries_they_are_stored_as() -> None:
    config = UNet2DConditionModel(**UNET).config
    assert config.in_channels == config["in_channels"] == dict(config)["in_channels"] == 4
    assert config.get("nothing", 3) == 3
    assert dict(itertools.islice(config.items(), 2)) == {"sample_size": 16, "in_channels": 4}
    assert "supported_values" not in config
    with pytest.raises(KeyError):
        config["supported_values"]
