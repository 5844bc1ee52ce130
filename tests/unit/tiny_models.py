"""Settings of tiny networks, and comparison of weights."""

from __future__ import annotations

from typing import Any

import torch

TINY_MOVQ: dict[str, Any] = {
    "block_out_channels": (32, 32),
    "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
    "latent_channels": 4,
    "num_vq_embeddings": 12,
    "vq_embed_dim": 4,
    "layers_per_block": 1,
    "norm_type": "spatial",
}
TINY_UNET: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 8,
    "addition_embed_type": "image",
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "encoder_hid_dim": 16,
    "encoder_hid_dim_type": "image_proj",
    "cross_attention_dim": 16,
    "attention_head_dim": 8,
    "resnet_time_scale_shift": "scale_shift",
}
TINY_PRIOR: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 8, "embedding_dim": 16, "num_layers": 1}


def assert_same_weights(ours: torch.nn.Module, other: torch.nn.Module) -> None:
    our_weights, other_weights = ours.state_dict(), other.state_dict()
    assert our_weights.keys() == other_weights.keys()
    assert all(torch.equal(our_weights[name], other_weights[name]) for name in our_weights)
