"""Recipe of the embedded prior: from captions to image embeddings, on frozen CLIP towers.

Targets are sums of parts instead of embeddings of the vision tower: no image has to be rendered, and what the prior
generates is as exact as the text allows.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kandinsky22.models.prior import PriorTransformer
from kandinsky22.schedulers import UnCLIPScheduler
from kandinsky22.training.drawings import clip as clip_recipe
from kandinsky22.training.drawings.captions import (
    EMPTY_CAPTION,
    FULL,
    SPARSE,
    Caption,
    Detail,
    add_nonsense_word,
    caption,
)
from kandinsky22.training.drawings.clip import Clip
from kandinsky22.training.drawings.probe import QUESTIONS, SceneLabels, caption_answers
from kandinsky22.training.drawings.scenes import DRAWN, Scene, sample_scene
from kandinsky22.training.drawings.vocabulary import COLORS, NATURAL
from kandinsky22.training.loop import Settings, StepRandomness, train
from kandinsky22.training.prior_objective import prior_losses, sample_embeddings
from kandinsky22.training.towers import CONTEXT

CONFIG: Mapping[str, Any] = {
    "num_attention_heads": 4,
    "attention_head_dim": 64,
    "num_layers": 4,
    "embedding_dim": clip_recipe.SIZES.embedding,
    "num_embeddings": CONTEXT,
    "additional_embeddings": 4,
}
# Embeddings are normalised to unit variance, thus clipping at 10 standard deviations never changes a good one.
SCHEDULER: Mapping[str, Any] = {"prediction_type": "sample", "clip_sample": True, "clip_sample_range": 10.0}
BATCH = 96
# Scenes of several things are harder. The decoder draws nothing else.
MIXTURE = dataclasses.replace(DRAWN, arrangements=(0.2, 0.16, 0.12, 0.1, 0.1))
EMPTY_SHARE = 0.1
# Share of scenes with a thing in the colour of its background. Images do not show them, but prompts ask for them.
INVISIBLE_SHARE = 0.04
DETAILS, DETAIL_SHARES = (FULL, Detail(), SPARSE), (0.3, 0.4, 0.3)
SETTINGS = Settings(
    steps=6000,
    learning_rate=1e-3,
    warmup=300,
    decay=4000,
    weight_decay=0.1,
    average=0.999,
    bf16=True,
    muon=True,
    muon_interval=4,
)


def create_prior(clip: Clip, seed: int) -> PriorTransformer:
    """Return an untrained prior with the mean and standard deviation of its targets.

    Args:
        clip: Trained CLIP.
        seed: Seed of the initial weights and of the scenes whose embeddings are measured.
    """
    torch.manual_seed(seed)
    prior = PriorTransformer(**CONFIG)
    torch.nn.init.normal_(prior.positional_embedding, std=0.1)
    torch.nn.init.normal_(prior.prd_embedding, std=0.1)
    rng = np.random.default_rng([seed, 2])
    with torch.no_grad():
        embeds = clip.probe.compose(SceneLabels.of([sample_scene(rng, MIXTURE) for _ in range(8192)])).float()
        prior.clip_mean.copy_(embeds.mean(0, keepdim=True))
        prior.clip_std.copy_(embeds.std(0, keepdim=True))
    prior.clip_mean.requires_grad_(False)
    prior.clip_std.requires_grad_(False)
    return prior


def sample_pair(rng: np.random.Generator) -> tuple[Caption, Scene]:
    """Return a caption and a scene that it describes.

    Args:
        rng: Random generator.
    """
    scene = sample_scene(rng, MIXTURE)
    uniform = rng.random()
    if uniform < EMPTY_SHARE:
        return EMPTY_CAPTION, scene
    thing = scene.things[0]
    if uniform < EMPTY_SHARE + INVISIBLE_SHARE and thing.color != NATURAL and scene.background.name in COLORS:
        background = dataclasses.replace(scene.background, name=thing.color)
        scene = dataclasses.replace(scene, background=background)
    detail = DETAILS[int(rng.choice(len(DETAILS), p=DETAIL_SHARES))]
    return caption(scene, rng, detail), scene


def train_prior(folder: Path, clip: Clip, settings: Settings = SETTINGS) -> PriorTransformer:
    """Train the prior, or resume its training, and save it in the subfolder "model".

    Args:
        folder: Folder of the stage.
        clip: Trained CLIP.
        settings: Hyperparameters.

    Returns:
        The network, frozen.
    """
    prior = create_prior(clip, settings.seed)
    scheduler = UnCLIPScheduler(**SCHEDULER)

    def objective(randomness: StepRandomness) -> dict[str, Tensor]:
        rng = randomness.numpy
        pairs = [sample_pair(rng) for _ in range(BATCH)]
        texts = [add_nonsense_word(c.text, rng) if rng.random() < 0.05 else c.text for c, _ in pairs]
        with torch.no_grad():
            text = clip.towers.embed_texts(texts)
            embeds = clip.probe.compose(SceneLabels.of([scene for _, scene in pairs])).float()
        return prior_losses(prior, scheduler, text, embeds, randomness)

    train(prior, objective, settings, folder)
    prior.requires_grad_(False)
    prior.save_pretrained(folder / "model" / "prior")
    scheduler.save_pretrained(folder / "model" / "scheduler")
    report = {str(guidance): evaluate(prior, clip, guidance=guidance) for guidance in (1.0, 1.5, 2.0, 4.0)}
    (folder / "evaluation.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return prior


@torch.no_grad()
def evaluate(
    prior: PriorTransformer, clip: Clip, *, count: int = 200, steps: int = 25, guidance: float = 1.0, seed: int = 7
) -> dict[str, float]:
    """Return how often everything that a caption states is read from the embedding that the prior generates.

    Args:
        prior: Trained network.
        clip: CLIP with its probe.
        count: Number of captions per group.
        steps: Number of denoising steps.
        guidance: Guidance scale.
        seed: Seed of captions and noise.

    Returns:
        Shares by group, such as "beside, held out", and by question.
    """
    report: dict[str, float] = {}
    scheduler = UnCLIPScheduler(**SCHEDULER)
    for arrangement in (None, "beside", "above", "on", "front", "row"):
        for held_out in (False, True):
            rng = np.random.default_rng([seed, held_out])
            scenes = [sample_scene(rng, arrangement=arrangement, held_out=held_out) for _ in range(count)]
            captions = [caption(scene, rng) for scene in scenes]
            texts = [c.text for c in captions]
            embeds = sample_embeddings(prior, scheduler, clip.towers, texts, steps=steps, guidance=guidance, seed=seed)
            correct = clip.probe.correct(embeds, torch.tensor([caption_answers(c.description) for c in captions]))
            name = f"{arrangement or 'one'}{', held out' if held_out else ''}"
            report[name] = round(float(correct.all(1).float().mean()), 4)
            if not held_out:
                shares = correct.float().mean(0).tolist()
                report |= {f"{name}: {q}": round(s, 4) for q, s in zip(QUESTIONS, shares, strict=True) if s < 1}
    return report
