"""Objectives: cached tensors, noise and conditions of a batch, a call of the network, and the losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kandinsky22.inputs import images, masks
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

    def follow(self, results: Callable[[], Mapping[str, Tensor]]) -> None:
        """Receive access to the weights that are saved, once before training.

        Args:
            results: Function that returns the trained parameters by name, or their moving averages.
        """


@dataclass(frozen=True)
class Batch:
    """Examples of one pass, on the device of the network.

    Attributes:
        sample: Clean samples (batch, ...).
        noise: Noise of the same shape.
        timesteps: Timesteps (batch,), on the CPU.
        condition: What the network is conditioned on, by name, each (batch, ...).
    """

    sample: Tensor
    noise: Tensor
    timesteps: Tensor
    condition: Mapping[str, Tensor]


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


class CachedObjective:
    """What objectives have in common: validation, and means over a batch."""

    entries: Sequence[Entry]
    held_out: Sequence[Entry]
    seed: int

    def follow(self, results: Callable[[], Mapping[str, Tensor]]) -> None:
        """Receive access to the weights that are saved, which has no effect here.

        Args:
            results: Function that returns the trained parameters by name, or their moving averages.
        """

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


class DenoisingObjective(CachedObjective):
    """Denoising: noise is added to clean samples, and the network predicts it."""

    scheduler: Scheduler
    weights: LossWeights
    device: torch.device | str

    def batch(self, draws: Sequence[Draw], entries: Sequence[Entry], *, training: bool) -> Batch:
        """Return the examples of one pass.

        Args:
            draws: The examples.
            entries: The pictures that they are parts of.
            training: Whether conditions are dropped and parts are drawn.
        """
        raise NotImplementedError

    def predict(
        self, network: Callable[..., Any], noisy: Tensor, timesteps: Tensor, condition: Mapping[str, Tensor]
    ) -> Tensor:
        """Return a network's output.

        Args:
            network: The network, or a function that computes as it does.
            noisy: Samples with noise (batch, ...).
            timesteps: Timesteps (batch,), on the CPU.
            condition: What it is conditioned on.
        """
        raise NotImplementedError

    def unconditional(self, condition: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the condition that guidance leads away from.

        Args:
            condition: A condition.
        """
        raise NotImplementedError

    def _losses(
        self, network: nn.Module, draws: Sequence[Draw], entries: Sequence[Entry], *, training: bool
    ) -> dict[str, Tensor]:
        return self.denoising(network, self.batch(draws, entries, training=training))

    def denoising(self, network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return the losses per example (batch,).

        Args:
            network: The network.
            batch: The examples.
        """
        noisy = self.scheduler.add_noise(batch.sample, batch.noise, batch.timesteps)
        output = self.predict(network, noisy, batch.timesteps, batch.condition)
        return denoising_losses(output, batch.sample, batch.noise, batch.timesteps, self.scheduler, self.weights)

    def _stacked(self, noised: Sequence[Noised], condition: Mapping[str, Tensor]) -> Batch:
        sample, noise = (
            torch.stack([getattr(item, name) for item in noised]).to(self.device) for name in ("sample", "noise")
        )
        timesteps = torch.tensor([item.timestep for item in noised])
        return Batch(sample, noise, timesteps, {name: value.to(self.device) for name, value in condition.items()})


class DecoderObjective(DenoisingObjective):
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

    def batch(self, draws: Sequence[Draw], entries: Sequence[Entry], *, training: bool) -> Batch:
        """Return the examples of one pass; their condition has "image_embeds", and "hint" or "channels".

        Args:
            draws: The examples.
            entries: The pictures that they are parts of.
            training: Whether conditions are dropped and parts are drawn.
        """
        items = [self.item(draw, entries[draw.index], training=training) for draw in draws]
        condition = {"image_embeds": torch.stack([item["embeds"] for item in items])}
        if self.mode == "hint":
            condition["hint"] = torch.stack([item["hint"] for item in items])
        if self.mode == "inpaint":
            known = torch.stack([item["known"] for item in items])
            latents = torch.stack([item["noised"].sample for item in items])
            condition["channels"] = torch.cat([latents * known, known], dim=1)
        return self._stacked([item["noised"] for item in items], condition)

    def predict(
        self, network: Callable[..., Any], noisy: Tensor, timesteps: Tensor, condition: Mapping[str, Tensor]
    ) -> Tensor:
        """Return the UNet's output.

        Args:
            network: The UNet, or a function that computes as it does.
            noisy: Latents with noise (batch, 4, h, w).
            timesteps: Timesteps (batch,), on the CPU.
            condition: Condition of a batch.
        """
        added = {name: value for name, value in condition.items() if name != "channels"}
        sample = torch.cat([noisy, condition["channels"]], dim=1) if "channels" in condition else noisy
        output: Tensor = network(sample, timesteps.to(noisy.device), added_cond_kwargs=added, return_dict=False)[0]
        return output

    def unconditional(self, condition: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a condition with the embedding of the all-zero image.

        Args:
            condition: Condition of a batch.
        """
        embeds = condition["image_embeds"]
        return {**condition, "image_embeds": self.zero_embed.to(embeds).expand_as(embeds)}

    def item(self, draw: Draw, entry: Entry, *, training: bool) -> dict[str, Any]:
        """Return the tensors of one example: "noised", "embeds", and "hint", or "mask" and "known".

        Hints (3, 8 h, 8 w) and masks (1, H, W) are those that pipelines compute with; "known" (1, h, w) are the latents
        that stay unchanged.

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
            "embeds": self.zero_embed[0] if dropped else self._embeds(entry, variant, numbers, training=training),
        }
        if self.mode == "hint":
            hint = tensors["hint"][variant]
            item["hint"] = images.hints_to_tensor("hint", hint, (hint.shape[1], hint.shape[2]))[0]
        if self.mode == "inpaint":
            height, width = latents.shape[1:]
            stored = tensors.get("mask")
            mask = random_mask(numbers, 8 * height, 8 * width) if stored is None else (stored[variant] > 127).float()
            item["mask"], item["known"] = mask, masks.unmasked_latents(mask[None], (height, width))[0]
        return item

    def _embeds(self, entry: Entry, variant: int, numbers: np.random.Generator, *, training: bool) -> Tensor:
        """Return an image embedding (D,) of a picture: the encoder's, or one that the prior samples."""
        if not entry.sampled:
            return self.store[entry.path]["embeds"][variant]
        path = entry.sampled[int(numbers.integers(len(entry.sampled))) if training else 0]
        return self.store[path]["embeds"][0]


class PriorObjective(DenoisingObjective):
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

    def batch(self, draws: Sequence[Draw], entries: Sequence[Entry], *, training: bool) -> Batch:
        """Return the examples of one pass; their condition consists of the prior's arguments for texts.

        Args:
            draws: The examples.
            entries: The pictures, with captions.
            training: Whether captions are dropped and mirror images are drawn.
        """
        noised, texts = [], []
        for draw in draws:
            entry = entries[draw.index]
            numbers, noise = draw.generators()
            variant = int(numbers.integers(entry.variants)) if training else 0
            dropped = numbers.random() < self.caption_dropout and training
            embeds = (self.store[entry.path]["embeds"][variant] - self.mean[0]) / self.std[0]
            noised.append(draw_noise(embeds, len(self.scheduler), numbers, noise, draw.level))
            texts.append(EMPTY_TEXT if dropped else entry.caption or EMPTY_TEXT)
        return self._stacked(noised, self._condition(texts))

    def _condition(self, captions: Sequence[str]) -> dict[str, Tensor]:
        texts = [self.store[self.texts[caption]] for caption in captions]
        length = max(len(text["hidden"]) for text in texts)
        return {
            "proj_embedding": torch.stack([text["embeds"] for text in texts]),
            "encoder_hidden_states": torch.stack(
                [F.pad(text["hidden"], (0, 0, 0, length - len(text["hidden"]))) for text in texts]
            ),
            "attention_mask": torch.stack([torch.arange(length) < len(text["hidden"]) for text in texts]),
        }

    def predict(
        self, network: Callable[..., Any], noisy: Tensor, timesteps: Tensor, condition: Mapping[str, Tensor]
    ) -> Tensor:
        """Return the prior's output.

        Args:
            network: The prior, or a function that computes as it does.
            noisy: Normalised image embeddings with noise (batch, D).
            timesteps: Timesteps (batch,), on the CPU.
            condition: Condition of a batch.
        """
        output: Tensor = network(noisy, timesteps.to(noisy.device), **condition, return_dict=False)[0]
        return output

    def unconditional(self, condition: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the condition of empty texts.

        Args:
            condition: Condition of a batch.
        """
        texts = self._condition([EMPTY_TEXT] * len(condition["proj_embedding"]))
        return {name: value.to(self.device) for name, value in texts.items()}
