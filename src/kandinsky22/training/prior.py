"""Recipe of the embedded prior: from captions to image embeddings, on frozen CLIP towers.

Encoding a caption costs far more than denoising (about 25 tokens against 3). Each caption is therefore encoded once,
and its embedding is denoised at several timesteps.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kandinsky22.models.prior import PriorTransformer
from kandinsky22.schedulers import UnCLIPScheduler
from kandinsky22.training.captions import EMPTY_CAPTION, FULL, Caption, Detail, add_nonsense_word, caption, matches
from kandinsky22.training.clip import CONTEXT, EMBEDDING, IMAGE_SIZE, Towers
from kandinsky22.training.loop import Settings, StepRandomness, train
from kandinsky22.training.prior_objective import denoise_timesteps
from kandinsky22.training.scenes import COLORS, render, sample_scene

CONFIG: Mapping[str, Any] = {
    "num_attention_heads": 4,
    "attention_head_dim": 48,
    "num_layers": 4,
    "embedding_dim": EMBEDDING,
    "num_embeddings": CONTEXT,
    "additional_embeddings": 4,
}
# Embeddings are normalised to unit variance, thus clipping at 10 standard deviations never changes a good one.
SCHEDULER: Mapping[str, Any] = {"prediction_type": "sample", "clip_sample": True, "clip_sample_range": 10.0}
BATCH = 96
TIMESTEPS_PER_CAPTION = 4  # one from each quarter of the schedule
TWO_SHAPES_SHARE = 0.75  # scenes of two shapes are harder
EMPTY_SHARE = 0.1
# Share of captions such as "a red circle on a red background", which no image shows. A prior that is trained on visible
# shapes only learns rules about colours and backgrounds that overrule the text for combinations left out of training.
# Since embeddings are sums of parts, the embedding of such a scene is that of a visible one with the part of another
# background.
INVISIBLE_SHARE = 0.04
# The prior has to decide jointly everything that a caption leaves open: the left one of two shapes, and therefore the
# colour on the left. This is learned far more slowly than following a caption that states everything.
SPARSE = Detail(size=0.5, color=0.8, background=0.4, position=0.5, relation=0.5)
DETAILS, DETAIL_SHARES = (FULL, Detail(), SPARSE), (0.3, 0.3, 0.4)

SETTINGS = Settings(steps=4000, learning_rate=1e-3, warmup=200, weight_decay=0.1, average=0.999, bf16=True)


def create_prior(towers: Towers, seed: int) -> PriorTransformer:
    """Return an untrained prior with the mean and standard deviation of the towers' image embeddings.

    Args:
        towers: Trained CLIP towers.
        seed: Seed of the initial weights and of the scenes whose embeddings are measured.
    """
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


def _sample_pairs(towers: Towers, background_parts: Tensor, rng: np.random.Generator) -> tuple[list[Caption], Tensor]:
    """Return captions and the image embeddings (BATCH, D) that they describe."""
    scenes = [sample_scene(rng, shapes=2 if rng.random() < TWO_SHAPES_SHARE else 1) for _ in range(BATCH)]
    embeds = towers.embed_images(render(scenes, IMAGE_SIZE)).float()
    captions: list[Caption] = []
    for index, scene in enumerate(scenes):
        uniform = rng.random()
        if uniform < EMPTY_SHARE:
            captions.append(EMPTY_CAPTION)
        elif uniform < EMPTY_SHARE + INVISIBLE_SHARE:
            before, after = scene.background, scene.shapes[int(rng.integers(len(scene.shapes)))].color
            captions.append(caption(dataclasses.replace(scene, background=after), rng, FULL))
            colors = list(COLORS)
            embeds[index] += background_parts[colors.index(after)] - background_parts[colors.index(before)]
        else:
            detail = DETAILS[int(rng.choice(len(DETAILS), p=DETAIL_SHARES))]
            captions.append(caption(scene, rng, detail))
    return captions, embeds


def prior_losses(
    prior: PriorTransformer,
    towers: Towers,
    background_parts: Tensor,
    scheduler: UnCLIPScheduler,
    randomness: StepRandomness,
) -> dict[str, Tensor]:
    """Return the losses of one training step.

    Args:
        prior: Network to be trained.
        towers: Trained CLIP towers.
        background_parts: Contributions (colours, D) of background colours to an embedding.
        scheduler: Noise schedule.
        randomness: Random generators of the step.

    Returns:
        Scalars: the mean error "loss", and the errors "error_first" and "error_last" of the first and the last quarter
        of the timesteps.
    """
    rng = randomness.numpy
    with torch.no_grad():
        captions, embeds = _sample_pairs(towers, background_parts, rng)
        clean = (embeds - prior.clip_mean) / prior.clip_std
        texts = [add_nonsense_word(c.text, rng) if rng.random() < 0.05 else c.text for c in captions]
        text = towers.embed_texts(texts)
    count = TIMESTEPS_PER_CAPTION
    timesteps = torch.arange(count) + torch.rand(BATCH, count, generator=randomness.torch)
    timesteps = (timesteps / count * len(scheduler)).long()
    clean = clean[:, None].expand(-1, count, -1)
    noise = torch.randn(clean.shape, generator=randomness.torch)
    noisy = scheduler.add_noise(clean.flatten(0, 1), noise.flatten(0, 1), timesteps.flatten()).view(clean.shape)
    # For such short sequences in bfloat16, the backward pass of fused attention is several times slower.
    with sdpa_kernel(SDPBackend.MATH):
        condition = prior.encode_condition(text.embeds, text.hidden, text.mask)
        predicted = denoise_timesteps(prior, noisy, timesteps, condition).float()
    error = (predicted - clean).square().mean((0, 2))
    return {"loss": error.mean(), "error_first": error[0], "error_last": error[-1]}


@torch.no_grad()
def sample_embeddings(
    prior: PriorTransformer, towers: Towers, texts: Sequence[str], *, steps: int, guidance: float, seed: int
) -> Tensor:
    """Return image embeddings (N, D) that the prior generates for prompts, as its pipeline does.

    Args:
        prior: The network.
        towers: CLIP towers.
        texts: N prompts.
        steps: Number of denoising steps.
        guidance: Guidance scale; guidance is off up to 1.
        seed: Seed of the noise.
    """
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
            unconditional, predicted = predicted.chunk(2)
            predicted = unconditional + guidance * (predicted - unconditional)
        latents = scheduler.step(predicted, t, latents, following, generator, return_dict=False)[0]
    return prior.post_process_latents(latents)


@torch.no_grad()
def evaluate(
    prior: PriorTransformer, towers: Towers, *, count: int = 200, steps: int = 25, guidance: float = 1.0, seed: int = 7
) -> dict[str, float]:
    """Return how often the scene read from a generated embedding matches the caption and has visible shapes.

    Args:
        prior: Trained network.
        towers: CLIP towers with their probe.
        count: Number of captions per group.
        steps: Number of denoising steps.
        guidance: Guidance scale.
        seed: Seed of captions and noise.

    Returns:
        Shares by group: captions that state everything ("full"), that leave attributes open with the default
        probabilities ("usual"), and that never state one attribute.
    """
    report: dict[str, float] = {}
    details = {"full": FULL, "usual": Detail()}
    details |= {f"no {name}": dataclasses.replace(FULL, **{name: 0.0}) for name in ("background", "relation", "color")}
    for (kind, detail), shapes, held_out in itertools.product(details.items(), (1, 2), (False, True)):
        rng = np.random.default_rng([seed, shapes, held_out])
        captions = [caption(sample_scene(rng, shapes=shapes, held_out=held_out), rng, detail) for _ in range(count)]
        embeds = sample_embeddings(prior, towers, [c.text for c in captions], steps=steps, guidance=guidance, seed=seed)
        correct = [
            matches(c.description, scene) and all(shape.color != scene.background for shape in scene.shapes)
            for c, scene in zip(captions, towers.probe.read_scenes(embeds), strict=True)
        ]
        report[f"{kind}, {shapes}{', held out' if held_out else ''}"] = round(sum(correct) / count, 4)
    return report


def train_prior(folder: str | Path, towers: Towers, settings: Settings = SETTINGS) -> PriorTransformer:
    """Train the prior, or resume its training, and save it in the subfolder "model".

    Args:
        folder: Folder of the stage.
        towers: Trained CLIP towers.
        settings: Hyperparameters.

    Returns:
        The network, frozen.
    """
    folder = Path(folder)
    prior = create_prior(towers, settings.seed)
    scheduler = UnCLIPScheduler(**SCHEDULER)
    background_parts = towers.probe.background_parts().detach()

    def objective(randomness: StepRandomness) -> dict[str, Tensor]:
        return prior_losses(prior, towers, background_parts, scheduler, randomness)

    train(prior, objective, settings, folder)
    prior.requires_grad_(False)
    prior.save_pretrained(folder / "model" / "prior")
    scheduler.save_pretrained(folder / "model" / "scheduler")
    report = {str(guidance): evaluate(prior, towers, guidance=guidance) for guidance in (1.0, 1.5, 2.0, 4.0)}
    (folder / "evaluation.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return prior
