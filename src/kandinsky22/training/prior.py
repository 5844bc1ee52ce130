"""The recipe of the embedded prior: from captions to image embeddings, on frozen CLIP towers.

Reading a caption costs far more than denoising (some 25 tokens against 3), so every caption is read once and denoised
at several timesteps.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kandinsky22.models.prior import MASKED, STEP_TOKENS, PriorCondition, PriorTransformer
from kandinsky22.schedulers import UnCLIPScheduler
from kandinsky22.training.captions import EMPTY, FULL, Caption, Detail, agrees, caption, distracted
from kandinsky22.training.clip import CONTEXT, EMBEDDING, IMAGE_SIZE, Towers
from kandinsky22.training.loop import Draw, Settings, train
from kandinsky22.training.scenes import COLORS, render, sample_scene

CONFIG: Mapping[str, Any] = {
    "num_attention_heads": 4,
    "attention_head_dim": 48,
    "num_layers": 4,
    "embedding_dim": EMBEDDING,
    "num_embeddings": CONTEXT,
    "additional_embeddings": 4,
}
# Embeddings are normalised to unit variance, so that clipping at 10 deviations never touches a good one.
SCHEDULER: Mapping[str, Any] = {"prediction_type": "sample", "clip_sample": True, "clip_sample_range": 10.0}
BATCH = 96
LEVELS = 4  # timesteps at which each caption is denoised, one from each equal part of the schedule
TWO_SHAPES = 0.75  # they are harder
EMPTY_PROMPTS = 0.1
# Share of captions like "a red circle on a red background". No picture shows that, and a prior that sees visible shapes
# only learns rules about colours and backgrounds which overrule the text wherever training left a combination out. As
# embeddings are sums of parts, that of such a picture is a visible one's with another background's part.
INVISIBLE = 0.04
# What a caption leaves open the prior has to decide, and all at once: which of two shapes is left, and so what is left
# in that colour. That is learned far more slowly than to follow a caption that states everything.
OPEN = Detail(size=0.5, color=0.8, background=0.4, place=0.5, relation=0.5)
DETAILS, DETAIL_SHARES = (FULL, Detail(), OPEN), (0.3, 0.3, 0.4)

SETTINGS = Settings(steps=4000, learning_rate=1e-3, warmup=200, weight_decay=0.1, average=0.999, bf16=True)


def create(towers: Towers, seed: int) -> PriorTransformer:
    """An untrained prior that knows the mean and deviation of the towers' image embeddings."""
    torch.manual_seed(seed)
    prior = PriorTransformer(**CONFIG)
    torch.nn.init.normal_(prior.positional_embedding, std=0.1)
    torch.nn.init.normal_(prior.prd_embedding, std=0.1)
    rng = np.random.default_rng([seed, 2])
    with torch.no_grad():
        scenes = [sample_scene(rng, shapes=1 if i % 4 == 0 else 2) for i in range(4096)]
        parts = [towers.embed_images(render(scenes[i : i + 256], IMAGE_SIZE)) for i in range(0, len(scenes), 256)]
        embeds = torch.cat(parts)
        prior.clip_mean.copy_(embeds.mean(0, keepdim=True))
        prior.clip_std.copy_(embeds.std(0, keepdim=True))
    prior.clip_mean.requires_grad_(False)
    prior.clip_std.requires_grad_(False)
    return prior


def denoise_levels(prior: PriorTransformer, noisy: Tensor, timesteps: Tensor, condition: PriorCondition) -> Tensor:
    """`prior.denoise` of several noisy embeddings (B, levels, D) at timesteps (B, levels) for each text of a batch.

    All levels stand in one sequence and do not see each other, so that keys and values of the text are shared.
    """
    batch, levels, _ = noisy.shape
    time = prior.time_embedding(timesteps.flatten())
    query = prior.prd_embedding[0].expand(len(time), -1)
    tokens = torch.stack([time, prior.proj_in(noisy.flatten(0, 1)), query], dim=1)
    tokens = (tokens + prior.positional_embedding[:, -STEP_TOKENS:]).view(batch, levels * STEP_TOKENS, -1)
    causal = torch.full((STEP_TOKENS, STEP_TOKENS), MASKED).triu(1)
    own = torch.block_diag(*[causal - MASKED] * levels) + MASKED
    text = condition.mask.expand(-1, -1, levels * STEP_TOKENS, -1)
    mask = torch.cat([text, own.expand(batch, 1, -1, -1)], dim=3)
    for block, past in zip(prior.transformer_blocks, condition.layers, strict=True):
        tokens, _ = block(tokens, mask, past)
    last = tokens.view(batch, levels, STEP_TOKENS, -1)[:, :, -1]
    return cast(Tensor, prior.proj_to_clip_embeddings(prior.norm_out(last)))


def _pairs(towers: Towers, directions: Tensor, rng: np.random.Generator) -> tuple[list[Caption], Tensor]:
    """Captions and the image embeddings (B, D) that they describe."""
    scenes = [sample_scene(rng, shapes=2 if rng.random() < TWO_SHAPES else 1) for _ in range(BATCH)]
    embeds = towers.embed_images(render(scenes, IMAGE_SIZE)).float()
    captions: list[Caption] = []
    for row, scene in enumerate(scenes):
        chance = rng.random()
        if chance < EMPTY_PROMPTS:
            captions.append(EMPTY)
        elif chance < EMPTY_PROMPTS + INVISIBLE:
            before, after = scene.background, scene.shapes[int(rng.integers(len(scene.shapes)))].color
            captions.append(caption(dataclasses.replace(scene, background=after), rng, FULL))
            embeds[row] += directions[list(COLORS).index(after)] - directions[list(COLORS).index(before)]
        else:
            detail = DETAILS[int(rng.choice(len(DETAILS), p=DETAIL_SHARES))]
            captions.append(caption(scene, rng, detail))
    return captions, embeds


def objective(
    prior: PriorTransformer, towers: Towers, directions: Tensor, scheduler: UnCLIPScheduler, draw: Draw
) -> dict[str, Tensor]:
    """Losses of one training step."""
    rng = draw.numpy
    with torch.no_grad():
        captions, embeds = _pairs(towers, directions, rng)
        clean = (embeds - prior.clip_mean) / prior.clip_std
        texts = [distracted(c.text, rng) if rng.random() < 0.05 else c.text for c in captions]
        text = towers.embed_texts(texts)
    timesteps = torch.arange(LEVELS) + torch.rand(BATCH, LEVELS, generator=draw.torch)
    timesteps = (timesteps / LEVELS * len(scheduler)).long()
    clean = clean[:, None].expand(-1, LEVELS, -1)
    noise = torch.randn(clean.shape, generator=draw.torch)
    noisy = scheduler.add_noise(clean.flatten(0, 1), noise.flatten(0, 1), timesteps.flatten()).view(clean.shape)
    # The fused attention is several times slower backwards in bfloat16 than its parts, at these short lengths.
    with sdpa_kernel(SDPBackend.MATH):
        condition = prior.encode_condition(text.embeds, text.hidden, text.mask)
        predicted = denoise_levels(prior, noisy, timesteps, condition).float()
    error = (predicted - clean).square().mean((0, 2))
    return {"loss": error.mean(), "error_first": error[0], "error_last": error[-1]}


@torch.no_grad()
def sample_embeddings(
    prior: PriorTransformer, towers: Towers, texts: Sequence[str], *, steps: int, guidance: float, seed: int
) -> Tensor:
    """Image embeddings (N, D) that the prior imagines for prompts, as its pipeline does."""
    generator = torch.Generator().manual_seed(seed)
    scheduler = UnCLIPScheduler(**SCHEDULER)
    scheduler.set_timesteps(steps)
    guided = guidance > 1
    text = towers.embed_texts([""] * len(texts) + list(texts) if guided else texts)
    condition = prior.encode_condition(text.embeds, text.hidden, text.mask, scheduler.timesteps.tolist())
    latents = torch.randn(len(texts), EMBEDDING, generator=generator)
    for t, following in zip(scheduler.timesteps, [*scheduler.timesteps[1:], None], strict=True):
        predicted = prior.denoise(torch.cat([latents] * 2) if guided else latents, t, condition)
        if guided:
            empty, predicted = predicted.chunk(2)
            predicted = empty + guidance * (predicted - empty)
        latents = scheduler.step(predicted, t, latents, following, generator, return_dict=False)[0]
    return prior.post_process_latents(latents)


@torch.no_grad()
def evaluate(
    prior: PriorTransformer, towers: Towers, *, count: int = 200, steps: int = 25, guidance: float = 1.0, seed: int = 7
) -> dict[str, float]:
    """How often the scene that can be read from an imagined embedding is one that the caption describes, and visible:
    of captions that state all, that leave open what is usual, and that leave one thing open."""
    report: dict[str, float] = {}
    details = {"full": FULL, "usual": Detail()}
    details |= {f"no {name}": dataclasses.replace(FULL, **{name: 0.0}) for name in ("background", "relation", "color")}
    for (kind, detail), shapes, held_out in itertools.product(details.items(), (1, 2), (False, True)):
        rng = np.random.default_rng([seed, shapes, held_out])
        captions = [caption(sample_scene(rng, shapes=shapes, held_out=held_out), rng, detail) for _ in range(count)]
        embeds = sample_embeddings(prior, towers, [c.text for c in captions], steps=steps, guidance=guidance, seed=seed)
        right = [
            agrees(told.named, scene) and all(shape.color != scene.background for shape in scene.shapes)
            for told, scene in zip(captions, towers.probe.scenes(embeds), strict=True)
        ]
        report[f"{kind}, {shapes}{', held out' if held_out else ''}"] = round(sum(right) / count, 4)
    return report


def train_prior(folder: str | Path, towers: Towers, settings: Settings = SETTINGS) -> PriorTransformer:
    """Train the prior, or go on where `folder` stands, and save it in `folder`/model; returns it frozen."""
    folder = Path(folder)
    prior = create(towers, settings.seed)
    scheduler = UnCLIPScheduler(**SCHEDULER)
    directions = towers.probe.background_parts().detach()
    train(prior, lambda draw: objective(prior, towers, directions, scheduler, draw), settings, folder)
    prior.requires_grad_(False)
    prior.save_pretrained(folder / "model" / "prior")
    scheduler.save_pretrained(folder / "model" / "scheduler")
    report = {str(guidance): evaluate(prior, towers, guidance=guidance) for guidance in (1.0, 1.5, 2.0, 4.0)}
    (folder / "evaluation.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return prior
