"""The recipe of the embedded decoder UNet: from noise to the latents of a picture, given its CLIP image embedding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from kandinsky22.models.attention import KeyValue
from kandinsky22.models.movq import VQModel
from kandinsky22.models.unet import UNet2DConditionModel, UNetCondition
from kandinsky22.schedulers import DDPMScheduler
from kandinsky22.training.clip import EMBEDDING, IMAGE_SIZE, Towers
from kandinsky22.training.loop import Draw, Settings, load_average, train, write_atomically
from kandinsky22.training.movq import SIZE
from kandinsky22.training.scenes import Palette, Scene, mixed_palettes, render, sample_scene

CONFIG: Mapping[str, Any] = {
    "sample_size": 16,
    "block_out_channels": (64, 128, 128),
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D", "SimpleCrossAttnDownBlock2D"),
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": 128,
    "encoder_hid_dim": EMBEDDING,
    "attention_head_dim": 64,
}
# The published noise schedule. It ends with a trace of the picture left (signal-to-noise 0.0016), from which a network
# that predicts noise must read nothing: flat colours come out wrong. Predicting velocity has no such weak end.
SCHEDULER: Mapping[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "prediction_type": "v_prediction",
    "variance_type": "fixed_small",
    "clip_sample": False,
}
BATCH = 32
BANK_START, BANK_GROWTH, BANK_SIZE = 6144, 2, 32768  # pictures before the first step, new ones with each, and at most
EMPTY = 0.08  # how often the embedding is that of the empty picture, for guidance
EMBEDDING_NOISE = 0.2  # most noise on embeddings, in their standard deviations: the prior's are not exact either
REPAINTED = 0.25  # share of pictures in arbitrary colours, for which no combination of shape and colour is unusual
SNR_CAP = 5.0
SETTINGS = Settings(steps=14000, learning_rate=1e-3, warmup=300, decay=6000, bf16=True, seed=2)


def train_decoder(
    folder: str | Path, movq: VQModel, towers: Towers, settings: Settings = SETTINGS, *, bank_size: int = BANK_SIZE
) -> UNet2DConditionModel:
    """Train, or go on where `folder` stands, on the frozen encoder of `movq` and the frozen vision tower."""
    torch.manual_seed(settings.seed)
    unet = UNet2DConditionModel(**CONFIG)
    nn.init.zeros_(unet.conv_out.weight)
    bank = Bank(Path(folder) / "bank", movq, towers, seed=settings.seed, size=bank_size)
    train(unet, denoising(unet, [bank], zero_embedding(towers)), settings, folder)
    return unet


def load_decoder(folder: str | Path) -> UNet2DConditionModel:
    """The network as far as `folder` has it."""
    unet = UNet2DConditionModel(**CONFIG)
    load_average(unet, folder)
    return unet.eval().requires_grad_(False)


@torch.no_grad()
def zero_embedding(towers: Towers) -> Tensor:
    """Embedding (1, D) of the picture whose processed values are all 0: what guidance leads away from."""
    return towers.embed_images(torch.full((1, 3, IMAGE_SIZE, IMAGE_SIZE), 0.5))


@dataclass(frozen=True)
class Examples:
    """Latents (n, 4, h, w) to denoise, embeddings (n, D), what else the UNet knows, and how much each place counts."""

    latents: Tensor
    embeds: Tensor
    hint: Tensor | None = None
    channels: Tensor | None = None
    weight: Tensor | float = 1.0


class Bank:
    """Latents and embeddings of pictures, on disk, computed before they are needed; a resumed run finds them there.

    The bank grows while training goes on, so that training starts at once. Picture number n is always the same, and
    so is the size of the bank at a step.
    """

    name = "plain"
    batch = BATCH  # rows of a step
    chunk = 64
    embeds_shape: tuple[int, ...] = (EMBEDDING,)  # of what is kept of each picture; the first is its own
    levels = 1  # timesteps at which each example is denoised, for what costs more to encode than to denoise

    def __init__(self, folder: Path, movq: VQModel, towers: Towers, *, seed: int, size: int) -> None:
        self.movq, self.towers, self.seed, self.size = movq, towers, seed, size
        folder.mkdir(parents=True, exist_ok=True)
        self.latents = _array(folder / "latents.npy", (size, 4, SIZE // 8, SIZE // 8))
        self.embeds = _array(folder / "embeds.npy", (size, *self.embeds_shape))
        self.count_file = folder / "count"
        self.count = int(self.count_file.read_text(encoding="utf-8")) if self.count_file.is_file() else 0

    def limit(self, step: int) -> int:
        """How many pictures the bank holds at a step."""
        return min(BANK_START + BANK_GROWTH * step, self.size) // self.chunk * self.chunk

    def choose(self, draw: Draw, count: int) -> npt.NDArray[np.int64]:
        """Numbers of pictures for the step of `draw`; the bank holds them from then on."""
        size = self.limit(draw.step)
        if self.count < size:
            for first in range(self.count, size, self.chunk):
                self._fill(first)
            self.latents.flush()
            self.embeds.flush()
            self.count = size
            write_atomically(self.count_file, lambda path: _write_count(path, size))
        return draw.numpy.integers(0, size, count)

    def take(self, chosen: npt.NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Latents (count, 4, h, w) and embeddings (count, *embeds_shape) of pictures that `choose` chose."""
        return torch.from_numpy(self.latents[chosen]).float(), torch.from_numpy(self.embeds[chosen]).float()

    def examples(self, draw: Draw) -> Examples:
        """What the UNet is shown at the step of `draw`."""
        return Examples(*self.take(self.choose(draw, self.batch)))

    def scenes(self, number: int) -> tuple[list[Scene], np.random.Generator]:
        """The scenes of the chunk that holds picture `number`, and what goes on to draw all else about them."""
        rng = np.random.default_rng([self.seed, 2**31, number // self.chunk * self.chunk])
        return [self.scene(rng) for _ in range(self.chunk)], rng

    def scene(self, rng: np.random.Generator) -> Scene:
        """The scene of one picture."""
        return sample_scene(rng, shapes=1 if rng.random() < 0.4 else 2)

    def embed(self, scenes: Sequence[Scene], palettes: Sequence[Palette], rng: np.random.Generator) -> Tensor:
        """What to keep (len(scenes), *embeds_shape) as the embeddings of pictures."""
        return self.towers.embed_images(render(scenes, IMAGE_SIZE, palettes))

    def chunk_at(self, first: int) -> tuple[Sequence[Scene], Sequence[Palette], Tensor]:
        """Scenes and palettes of the pictures from number `first` on, and what to keep as their embeddings."""
        scenes, rng = self.scenes(first)
        palettes = mixed_palettes(scenes, rng, REPAINTED)
        return scenes, palettes, self.embed(scenes, palettes, rng)

    @torch.no_grad()
    def _fill(self, first: int) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            scenes, palettes, embeds = self.chunk_at(first)
            images = (render(scenes, SIZE, palettes) * 2 - 1).split(16)
            latents = torch.cat([self.movq.quant_conv(self.movq.encoder(part)) for part in images])
        self.latents[first : first + self.chunk] = latents.half().numpy()
        self.embeds[first : first + self.chunk] = embeds.half().numpy()


class Denoiser(Protocol):
    """What can be trained to denoise: a UNet, or several in one."""

    def encode_condition(
        self, image_embeds: Tensor, hint: Tensor | None = None, channels: Tensor | None = None
    ) -> UNetCondition:
        """All that does not depend on the noisy latents."""
        ...

    def denoise(self, sample: Tensor, timestep: Tensor, condition: UNetCondition) -> Tensor:
        """Velocity and learned variance."""
        ...


def _array(path: Path, shape: tuple[int, ...]) -> np.memmap[Any, np.dtype[np.float16]]:
    if path.is_file():
        return np.lib.format.open_memmap(path, mode="r+")
    return np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=shape)


def _write_count(path: Path, count: int) -> None:
    path.write_text(str(count), encoding="utf-8")


def timestep_table(alphas_cumprod: Tensor) -> Tensor:
    """Cumulative probabilities of the timesteps: nearly clean samples, where little is left to learn, are drawn rarely.

    Velocity errors weigh clean-sample errors by snr + 1; the density caps that (min-SNR,
    https://arxiv.org/abs/2303.09556, for velocity).
    """
    snr = alphas_cumprod / (1 - alphas_cumprod)
    density = (snr + 1).clamp(max=SNR_CAP + 1) / (snr + 1)
    return (density / density.sum()).cumsum(0)


def denoising(network: Denoiser, banks: Sequence[Bank], empty: Tensor) -> Any:
    """Objective: velocity, more weight on large areas at high noise, and the learned variance.

    Each step shows examples of all `banks`; where there are several, the velocity's error of each is logged.
    """
    scheduler = DDPMScheduler(**SCHEDULER)
    table = timestep_table(scheduler.alphas_cumprod)
    spread = banks[0].take(banks[0].choose(Draw.of(0, 0), 512))[1].view(512, -1, EMBEDDING)[:, 0].std(0)

    def objective(draw: Draw) -> dict[str, Tensor]:
        rows, conditions = [], []
        for bank in banks:
            shown = bank.examples(draw)
            embeds = blurred(shown.embeds, spread, empty, draw)
            latents = shown.latents.repeat(bank.levels, 1, 1, 1)
            timesteps = stratified(table, len(latents), draw)
            weight = torch.as_tensor(shown.weight).expand(len(shown.latents), 1, *latents.shape[2:])
            noise = torch.randn(latents.shape, generator=draw.torch)
            rows.append((latents, noise, timesteps, weight.repeat(bank.levels, 1, 1, 1)))
            conditions += [network.encode_condition(embeds, shown.hint, shown.channels)] * bank.levels
        latents, noise, timesteps, weight = (torch.cat(parts) for parts in zip(*rows, strict=True))
        noisy = scheduler.add_noise(latents, noise, timesteps)
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernel's backward pass is slower for so few tokens
            output = network.denoise(noisy, timesteps, joined(conditions)).float()
        losses = denoising_losses(output, latents, noise, timesteps, scheduler, weight)
        if len(banks) > 1:
            errors = (output.detach()[:, :4] - scheduler.get_velocity(latents, noise, timesteps)).square()
            each = errors.mean((1, 2, 3)).split([len(row[0]) for row in rows])
            losses |= {bank.name: error.mean() for bank, error in zip(banks, each, strict=True)}
        return losses

    return objective


def blurred(embeds: Tensor, spread: Tensor, empty: Tensor, draw: Draw) -> Tensor:
    """Embeddings (batch, D) as inexact as a prior's, and now and then the empty picture's."""
    amount = EMBEDDING_NOISE * torch.rand(len(embeds), 1, generator=draw.torch)
    embeds = embeds + amount * spread * torch.randn(embeds.shape, generator=draw.torch)
    return torch.where(torch.rand(len(embeds), 1, generator=draw.torch) < EMPTY, empty, embeds)


def joined(conditions: Sequence[UNetCondition]) -> UNetCondition:
    """The conditions of some rows, then those of others."""
    if len(conditions) == 1:
        return conditions[0]
    layers = (
        KeyValue(*(torch.cat(tensors) for tensors in zip(*layer, strict=True)))
        for layer in zip(*(condition.layers for condition in conditions), strict=True)
    )
    beside = [condition.channels for condition in conditions if condition.channels is not None]
    time = torch.cat([condition.time for condition in conditions])
    return UNetCondition(time, tuple(layers), torch.cat(beside) if beside else None)


def stratified(table: Tensor, count: int, draw: Draw) -> Tensor:
    """One timestep from each of `count` equally probable intervals, in order: batches differ less."""
    places = (torch.arange(count) + torch.rand(count, generator=draw.torch)) / count
    return torch.searchsorted(table, places).clamp(max=len(table) - 1)


def denoising_losses(
    output: Tensor,
    latents: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    scheduler: DDPMScheduler,
    weight: Tensor | float = 1.0,
) -> dict[str, Tensor]:
    """Losses of a UNet's `output` (batch, 8, h, w); errors of the velocity are multiplied by `weight`."""
    velocity, place = output.chunk(2, dim=1)
    error = velocity - scheduler.get_velocity(latents, noise, timesteps)
    variance = variance_loss(place, error.detach(), timesteps, scheduler)
    error = error * weight
    clean = (1 - scheduler.alphas_cumprod[timesteps])[:, None, None, None]  # makes it an error of the clean sample
    area = (clean * F.avg_pool2d(error, 4).square()).mean() + (clean * error.mean((2, 3), True).square()).mean()
    plain = error.square().mean()
    return {"loss": plain + 2 * area + 0.1 * variance, "plain": plain, "area": area, "variance": variance}


def variance_loss(place: Tensor, error: Tensor, timesteps: Tensor, scheduler: DDPMScheduler) -> Tensor:
    """Divergence between the true and the predicted step of one timestep, as far as the variance can change it
    (https://arxiv.org/abs/2102.09672, equations 15 and 16).

    `place` (batch, channels, h, w), -1 to 1, lies between the smallest and the largest logarithm of the variance;
    `error` is that of the velocity.
    """
    left = scheduler.alphas_cumprod
    before = torch.cat([torch.ones(1), left[:-1]])
    smallest = scheduler.betas * (1 - before) / (1 - left)
    smallest = torch.cat([smallest[1:2], smallest[1:]])  # at timestep 0 it is zero
    factor = before.sqrt() * scheduler.betas / (1 - left).sqrt()  # from velocity to the mean of the step
    low, high, factor = (v[timesteps][:, None, None, None] for v in (smallest.log(), scheduler.betas.log(), factor))
    guess = low + (place + 1) / 2 * (high - low)
    return 0.5 * (guess - low - 1 + (low - guess).exp() + (factor * error).square() * (-guess).exp()).mean()
