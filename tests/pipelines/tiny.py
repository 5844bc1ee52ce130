"""Tiny random pipelines of the reference, and small helpers that most tests of pipelines use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers

# Width of the embeddings: a multiple of 16, so that random numbers drawn in parts equal those drawn at once.
# On other CPUs, rounding of small layers depends on the memory alignment of their weights.
HAS_AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
DIM = 32
PIXELS = 32  # side of the pictures that the vision tower reads

PRIOR_SCHEDULER = {
    "variance_type": "fixed_small_log",
    "prediction_type": "sample",
    "num_train_timesteps": 1000,
    "clip_sample": True,
    "clip_sample_range": 5.0,
}
DECODER_SCHEDULER = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "linear", "clip_sample": True}


def save_tokenizer(folder: Path) -> transformers.CLIPTokenizer:
    """Save and return a tokenizer of letters, with a few merges so that some words have tokens longer than a letter."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789,.!?"
    merges = [("r", "e"), ("re", "d</w>"), ("c", "a"), ("ca", "t</w>"), ("o", "n</w>")]
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 77})
    )
    return transformers.CLIPTokenizer.from_pretrained(str(folder))


def clip_towers(tokenizer: transformers.CLIPTokenizer) -> tuple[Any, Any, Any]:
    """Return a random text tower, a random vision tower and an image processor."""
    common = {"hidden_size": DIM, "projection_dim": DIM, "intermediate_size": 37, "num_attention_heads": 4}
    text = transformers.CLIPTextConfig(
        **common,
        num_hidden_layers=2,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = transformers.CLIPVisionConfig(**common, num_hidden_layers=2, image_size=PIXELS, patch_size=8)
    processor = transformers.CLIPImageProcessor(
        size={"shortest_edge": PIXELS}, crop_size={"height": PIXELS, "width": PIXELS}
    )
    return (
        transformers.CLIPTextModelWithProjection(text).eval(),
        transformers.CLIPVisionModelWithProjection(vision).eval(),
        processor,
    )


def oracle_prior(folder: Path) -> Any:
    """Return the reference's prior pipeline with random weights."""
    tokenizer = save_tokenizer(folder / "words")
    text_encoder, image_encoder, processor = clip_towers(tokenizer)
    prior = diffusers.PriorTransformer(num_attention_heads=2, attention_head_dim=12, embedding_dim=DIM, num_layers=2)
    with torch.no_grad():
        for name, value in prior.named_parameters():
            if name in ("clip_std", "clip_mean", "positional_embedding", "prd_embedding"):
                value.copy_(1 + 0.3 * torch.randn_like(value) if name == "clip_std" else torch.randn_like(value))
    return diffusers.KandinskyV22PriorPipeline(
        prior=prior.eval(),
        image_encoder=image_encoder,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        scheduler=diffusers.UnCLIPScheduler(**PRIOR_SCHEDULER),
        image_processor=processor,
    )


# Decoders of the reference that start from pictures: input channels and added conditioning of their UNet.
MODES = {
    "Img2Img": (4, "image"),
    "Inpaint": (9, "image"),
    "Controlnet": (8, "image_hint"),
    "ControlnetImg2Img": (8, "image_hint"),
}


def oracle_decoder(mode: str = "") -> Any:
    """Return the reference's decoder pipeline with random weights and, as published, learned variance."""
    in_channels, condition = MODES.get(mode, (4, "image"))
    unet = diffusers.UNet2DConditionModel(
        sample_size=16,
        in_channels=in_channels,
        out_channels=8,
        addition_embed_type=condition,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        block_out_channels=(32, 64),
        layers_per_block=1,
        encoder_hid_dim=DIM,
        encoder_hid_dim_type="image_proj",
        cross_attention_dim=16,
        attention_head_dim=8,
        resnet_time_scale_shift="scale_shift",
    )
    if condition == "image_hint":  # random convolutions shrink signals, and hints must make a difference
        with torch.no_grad():
            for parameter in unet.add_embedding.input_hint_block.parameters():
                parameter.mul_(3)
    movq = diffusers.VQModel(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=4,
        layers_per_block=1,
        num_vq_embeddings=12,
        vq_embed_dim=4,
        norm_type="spatial",
    )
    scheduler = diffusers.DDPMScheduler(**DECODER_SCHEDULER, variance_type="learned_range")
    kind = getattr(diffusers, f"KandinskyV22{mode}Pipeline")
    return kind(unet=unet.eval(), scheduler=scheduler, movq=movq.eval())


def seeded(seed: int) -> torch.Generator:
    """Return a generator on the CPU."""
    return torch.Generator().manual_seed(seed)


def embeds(rows: int, seed: int) -> torch.Tensor:
    """Return random image embeddings (rows, DIM)."""
    return torch.randn(rows, DIM, generator=seeded(seed))


def pair(rows: int = 1, seed: int = 20) -> dict[str, torch.Tensor]:
    """Return random image embeddings and their negatives, as arguments of a decoder."""
    return {"image_embeds": embeds(rows, seed), "negative_image_embeds": embeds(rows, seed + 1)}


def load_quietly(kind: Any, folder: Path | str, **options: Any) -> Any:
    """Load a pipeline class from a folder, without progress bars."""
    pipe = kind.from_pretrained(folder, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def difference(ours: Any, theirs: Any) -> float:
    """Return the largest difference relative to the largest value of `theirs`."""
    ours, theirs = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())
