"""Objectives: cached tensors, noise and conditions of a batch, a call of the network, and the losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kandinsky22.inputs import masks
from kandinsky22.schedulers import Scheduler
from kandinsky22.training.finetuning.batches import Draw, TensorStore
from kandinsky22.training.finetuning.losses import LossWeights, denoising_losses
from kandinsky22.training.finetuning.preparation import Entry

VALIDATION_TIMESTEPS = 4  # noise levels per held-out picture
EMPTY_TEXT = ""
EQUAL_WEIGHTS = LossWeights()


class Objective(Protocol):
    """Function of a network and a batch that training minimises."""

    def losses(self, network: nn.Module, draws: Sequence[Draw]) -> dict[str, Tensor]:
        """Return the losses of a batch, averaged over it; "loss" is minimised.

        Args:
            network: The network, which a wrapper for several processes may contain.
            draws: The examples.
        """

    def validation_losses(self, network: nn.Module) -> dict[str, float]:
        """Return the losses of the held-out pictures, with noise that is always the same; empty without such pictures.

        Args:
            network: The network.
        """


@dataclass(frozen=True)
class Noised:
    """A clean sample, its noise and its timestep.

    Attributes:
        sample: Clean sample (...).
        noise: Noise of the same shape.
        timestep: The timestep.
    """

    sample: Tensor
    noise: Tensor
    timestep: int


def draw_noise(
    sample: Tensor, total: int, numbers: np.random.Generator, noise: torch.Generator, level: float | None
) -> Noised:
    """Return a sample with random noise and a timestep.

    Args:
        sample: Clean sample (...).
        total: Number of timesteps.
        numbers: Generator of the timestep.
        noise: Generator of the noise.
        level: Position of the timestep from 0 to 1; None draws it.
    """
    position = numbers.random()
    timestep = int((position if level is None else level) * total)
    return Noised(sample, torch.randn(sample.shape, generator=noise), min(timestep, total - 1))


def random_mask(numbers: np.random.Generator, height: int, width: int) -> Tensor:
    """Return a random mask (1, height, width), 1 where the picture is repainted: everything, boxes or strokes.

    Args:
        numbers: Generator.
        height: Height in pixels.
        width: Width in pixels.
    """
    mask, kind = torch.zeros(1, height, width), numbers.random()
    if kind < 0.2:
        return torch.ones(1, height, width)
    if kind < 0.6:
        for _ in range(int(numbers.integers(1, 4))):
            part = numbers.uniform(0.1, 0.7, size=2)
            top, left = numbers.random(2) * (1 - part)
            rows = slice(int(top * height), int((top + part[0]) * height) + 1)
            mask[:, rows, int(left * width) : int((left + part[1]) * width) + 1] = 1
        return mask
    y, x = numbers.random(2)
    for _ in range(int(numbers.integers(8, 24))):
        radius = numbers.uniform(0.03, 0.12)
        y, x = np.clip(np.array((y, x)) + numbers.normal(scale=0.12, size=2), 0, 1)
        rows = slice(int(max(y - radius, 0) * height), int((y + radius) * height) + 1)
        mask[:, rows, int(max(x - radius, 0) * width) : int((x + radius) * width) + 1] = 1
    return mask


class _CachedObjective:
    """What the objectives of prior and decoder have in common: validation, and means over a batch."""

    entries: Sequence[Entry]
    held_out: Sequence[Entry]
    batch_size: int
    seed: int

    def _losses(
        self, network: nn.Module, draws: Sequence[Draw], entries: Sequence[Entry], *, training: bool
    ) -> dict[str, Tensor]:
        raise NotImplementedError

    def losses(self, network: nn.Module, draws: Sequence[Draw]) -> dict[str, Tensor]:
        """Return the losses of a batch, averaged over it; "loss" is minimised.

        Args:
            network: The network, which a wrapper for several processes may contain.
            draws: The examples.
        """
        return {name: value.mean() for name, value in self._losses(network, draws, self.entries, training=True).items()}

    @torch.no_grad()
    def validation_losses(self, network: nn.Module) -> dict[str, float]:
        """Return the losses of the held-out pictures, with noise that is always the same; empty without such pictures.

        Args:
            network: The network.
        """
        sums: dict[str, float] = {}
        draws = [
            Draw(index, (self.seed, 5, index, level), (level + 0.5) / VALIDATION_TIMESTEPS)
            for index in range(len(self.held_out))
            for level in range(VALIDATION_TIMESTEPS)
        ]
        for index in range(len(self.held_out)):  # pictures may differ in size
            own = [draw for draw in draws if draw.index == index]
            for name, values in self._losses(network, own, self.held_out, training=False).items():
                sums[name] = sums.get(name, 0.0) + float(values.sum())
        return {name: value / len(draws) for name, value in sums.items()}


class DecoderObjective(_CachedObjective):
    """Denoising of latents, given image embeddings.

    Args:
        entries: Pictures to train on.
        held_out: Pictures to validate with.
        store: Their tensors.
        scheduler: Scheduler of the decoder.
        zero_embed: Embedding (1, D) of the all-zero image.
        mode: Kind of decoder.
        weights: Weights of the parts of the loss.
        condition_dropout: Share of image embeddings that are replaced by `zero_embed`.
        seed: Seed of the training.
        device: Device of the network.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        held_out: Sequence[Entry],
        store: TensorStore,
        scheduler: Scheduler,
        zero_embed: Tensor,
        *,
        mode: str = "plain",
        weights: LossWeights = EQUAL_WEIGHTS,
        condition_dropout: float = 0.1,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.entries, self.held_out, self.store, self.scheduler = entries, held_out, store, scheduler
        self.zero_embed, self.mode, self.weights = zero_embed, mode, weights
        self.condition_dropout, self.seed, self.device = condition_dropout, seed, device

    def _losses(
        self, network: nn.Module, draws: Sequence[Draw], entries: Sequence[Entry], *, training: bool
    ) -> dict[str, Tensor]:
        items = [self.item(draw, entries[draw.index], training=training) for draw in draws]
        noised = [item["noised"] for item in items]
        embeds = torch.stack([item["embeds"] for item in items]).to(self.device)
        return self.noised_losses(network, noised, embeds, items)

    def noised_losses(
        self, network: nn.Module, noised: Sequence[Noised], embeds: Tensor, items: Sequence[Mapping[str, Any]]
    ) -> dict[str, Tensor]:
        """Return the losses per example (batch,).

        Args:
            network: The UNet.
            noised: Latents with noise.
            embeds: Image embeddings (batch, D).
            items: "hint" or "known" per example, for decoders that have them.
        """
        latents, noise = (
            torch.stack([getattr(item, name) for item in noised]).to(self.device) for name in ("sample", "noise")
        )
        timesteps = torch.tensor([item.timestep for item in noised])
        sample = self.scheduler.add_noise(latents, noise, timesteps)
        added = {"image_embeds": embeds}
        if self.mode == "inpaint":
            known = torch.stack([item["known"] for item in items]).to(self.device)
            sample = torch.cat([sample, latents * known, known], dim=1)
        if self.mode == "hint":
            added["hint"] = torch.stack([item["hint"] for item in items]).to(self.device)
        output = network(sample, timesteps.to(self.device), added_cond_kwargs=added, return_dict=False)[0]
        return denoising_losses(output, latents, noise, timesteps, self.scheduler, self.weights)

    def item(self, draw: Draw, entry: Entry, *, training: bool) -> dict[str, Any]:
        """Return the tensors of one example: "noised", "embeds", and "hint" or "known".

        Args:
            draw: The example.
            entry: Its picture.
            training: Whether conditions are dropped and parts are drawn.
        """
        tensors = self.store[entry.path]
        numbers, noise = draw.generators()
        variant = int(numbers.integers(entry.variants)) if training else 0
        dropped = numbers.random() < self.condition_dropout and training
        latents = tensors["latents"][variant]
        item: dict[str, Any] = {
            "noised": draw_noise(latents, len(self.scheduler), numbers, noise, draw.level),
            "embeds": self.zero_embed[0] if dropped else tensors["embeds"][variant],
        }
        if self.mode == "hint":
            item["hint"] = tensors["hint"][variant].float() / 127.5 - 1
        if self.mode == "inpaint":
            height, width = latents.shape[1:]
            stored = tensors.get("mask")
            mask = random_mask(numbers, 8 * height, 8 * width) if stored is None else (stored[variant] > 127).float()
            item["known"] = masks.unmasked_latents(mask[None], (height, width))[0]
        return item


class PriorObjective(_CachedObjective):
    """Denoising of image embeddings, given captions.

    Args:
        entries: Pictures to train on.
        held_out: Pictures to validate with.
        store: Their tensors.
        texts: Cache files of the captions and of the empty text.
        scheduler: Scheduler of the prior.
        normalisation: Mean and standard deviation (1, D) of image embeddings.
        weights: Weights of the parts of the loss.
        caption_dropout: Share of captions that are replaced by the empty text.
        seed: Seed of the training.
        device: Device of the network.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        held_out: Sequence[Entry],
        store: TensorStore,
        texts: Mapping[str, Path],
        scheduler: Scheduler,
        normalisation: tuple[Tensor, Tensor],
        *,
        weights: LossWeights = EQUAL_WEIGHTS,
        caption_dropout: float = 0.1,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.entries, self.held_out, self.store, self.texts = entries, held_out, store, texts
        self.scheduler, self.weights, self.caption_dropout = scheduler, weights, caption_dropout
        self.mean, self.std = (value.detach().float().cpu() for value in normalisation)
        self.seed, self.device = seed, device

    def _losses(
        self, network: nn.Module, draws: Sequence[Draw], entries: Sequence[Entry], *, training: bool
    ) -> dict[str, Tensor]:
        noised, texts = [], []
        for draw in draws:
            entry = entries[draw.index]
            numbers, noise = draw.generators()
            variant = int(numbers.integers(entry.variants)) if training else 0
            dropped = numbers.random() < self.caption_dropout and training
            embeds = (self.store[entry.path]["embeds"][variant] - self.mean[0]) / self.std[0]
            noised.append(draw_noise(embeds, len(self.scheduler), numbers, noise, draw.level))
            texts.append(self.store[self.texts[EMPTY_TEXT if dropped else entry.caption or EMPTY_TEXT]])
        sample, noise_ = (
            torch.stack([getattr(item, name) for item in noised]).to(self.device) for name in ("sample", "noise")
        )
        timesteps = torch.tensor([item.timestep for item in noised])
        length = max(len(text["hidden"]) for text in texts)
        hidden = torch.stack([F.pad(text["hidden"], (0, 0, 0, length - len(text["hidden"]))) for text in texts])
        mask = torch.stack([torch.arange(length) < len(text["hidden"]) for text in texts])
        predicted = network(
            self.scheduler.add_noise(sample, noise_, timesteps),
            timesteps.to(self.device),
            torch.stack([text["embeds"] for text in texts]).to(self.device),
            encoder_hidden_states=hidden.to(self.device),
            attention_mask=mask.to(self.device),
            return_dict=False,
        )[0]
        return denoising_losses(predicted, sample, noise_, timesteps, self.scheduler, self.weights)
