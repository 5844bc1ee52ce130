"""Recipe of the embedded decoder UNet: from noise to the latents of an image, conditioned on its CLIP embedding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from kandinsky22.checkpoints.atomic_files import atomic_write
from kandinsky22.models.movq import VQModel
from kandinsky22.models.unet import UNet2DConditionModel
from kandinsky22.schedulers import DDPMScheduler
from kandinsky22.training.clip import EMBEDDING, IMAGE_SIZE, Towers
from kandinsky22.training.denoising import (
    Denoiser,
    Examples,
    concatenate_conditions,
    denoising_losses,
    stratified_timesteps,
    timestep_distribution,
)
from kandinsky22.training.loop import Objective, Settings, StepRandomness, bfloat16_autocast, load_average, train
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
# The published noise schedule. At its last timestep a trace of the image remains (signal-to-noise ratio 0.0016). A
# network that predicts noise would have to ignore it, and flat colours come out wrong. Velocity prediction avoids this.
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
# Number of images in the bank before the first step, new images per step, and largest number of images.
BANK_START, BANK_GROWTH, BANK_SIZE = 6144, 2, 32768
EMPTY_SHARE = 0.08  # probability of the embedding of the zero image, which guidance needs
EMBEDDING_NOISE = 0.2  # largest noise on embeddings, in their standard deviations: those of the prior are inexact too
RECOLORED_SHARE = 0.25  # share of images in arbitrary colours, which make any combination of shape and colour familiar
SETTINGS = Settings(steps=14000, learning_rate=1e-3, warmup=300, decay=6000, bf16=True, seed=2)


def train_decoder(
    folder: str | Path, movq: VQModel, towers: Towers, settings: Settings = SETTINGS, *, bank_size: int = BANK_SIZE
) -> UNet2DConditionModel:
    """Train the UNet, or resume its training.

    Args:
        folder: Folder of the stage.
        movq: Trained MoVQ, whose encoder gives the latents.
        towers: Trained CLIP towers.
        settings: Hyperparameters.
        bank_size: Largest number of images in the bank.

    Returns:
        The trained network.
    """
    torch.manual_seed(settings.seed)
    unet = UNet2DConditionModel(**CONFIG)
    nn.init.zeros_(unet.conv_out.weight)
    bank = Bank(Path(folder) / "bank", movq, towers, seed=settings.seed, size=bank_size)
    train(unet, denoising_objective(unet, [bank], zero_embedding(towers)), settings, folder)
    return unet


def load_decoder(folder: str | Path) -> UNet2DConditionModel:
    """Return the network in its current state of training, frozen.

    Args:
        folder: Folder of the stage.
    """
    unet = UNet2DConditionModel(**CONFIG)
    load_average(unet, folder)
    return unet.eval().requires_grad_(False)


@torch.no_grad()
def zero_embedding(towers: Towers) -> Tensor:
    """Return the image embedding (1, D) of the image whose processed values are 0, the negative one of guidance.

    Args:
        towers: Trained CLIP towers.
    """
    return towers.embed_images(torch.full((1, 3, IMAGE_SIZE, IMAGE_SIZE), 0.5))


class Bank:
    """Latents and embeddings of rendered images, stored on disk, where a resumed run reads them again.

    The bank grows during training, thus training starts at once. Each image depends on the seed and on its index alone,
    and the size of the bank depends on the step alone.

    Args:
        folder: Folder of the files.
        movq: Trained MoVQ.
        towers: Trained CLIP towers.
        seed: Seed of the images.
        size: Largest number of images.

    Attributes:
        name: Name of the examples in the log.
        batch: Number of batch items per step.
        chunk: Number of images that are encoded together.
        embeds_shape: Shape of the stored embeddings of an image, whose first one is that of the image itself.
        timesteps_per_example: Number of timesteps at which each example is denoised, above 1 for examples whose
            conditions are more expensive to encode than to denoise.
    """

    name = "decoder"
    batch = BATCH
    chunk = 64
    embeds_shape: tuple[int, ...] = (EMBEDDING,)
    timesteps_per_example = 1

    def __init__(self, folder: Path, movq: VQModel, towers: Towers, *, seed: int, size: int) -> None:
        self.movq, self.towers, self.seed, self.size = movq, towers, seed, size
        folder.mkdir(parents=True, exist_ok=True)
        self.latents = _open_array(folder / "latents.npy", (size, 4, SIZE // 8, SIZE // 8))
        self.embeds = _open_array(folder / "embeds.npy", (size, *self.embeds_shape))
        self.count_file = folder / "count"
        self.count = int(self.count_file.read_text(encoding="utf-8")) if self.count_file.is_file() else 0

    def size_at(self, step: int) -> int:
        """Return the number of images that the bank holds at a step.

        Args:
            step: Number of the step, counted from 0.
        """
        return min(BANK_START + BANK_GROWTH * step, self.size) // self.chunk * self.chunk

    def sample_indices(self, randomness: StepRandomness, count: int) -> npt.NDArray[np.int64]:
        """Return random indices of images, and add the missing images to the bank.

        Args:
            randomness: Random generators of the step.
            count: Number of indices.
        """
        size = self.size_at(randomness.step)
        if self.count < size:
            for first in range(self.count, size, self.chunk):
                self._fill(first)
            self.latents.flush()
            self.embeds.flush()
            self.count = size
            with atomic_write(self.count_file) as temporary:
                temporary.write_text(str(size), encoding="utf-8")
        return randomness.numpy.integers(0, size, count)

    def read(self, indices: npt.NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Return latents (count, 4, h, w) and embeddings (count, *embeds_shape) of images.

        Args:
            indices: Indices that `sample_indices` has returned.
        """
        return torch.from_numpy(self.latents[indices]).float(), torch.from_numpy(self.embeds[indices]).float()

    def examples(self, randomness: StepRandomness) -> Examples:
        """Return the examples of a step.

        Args:
            randomness: Random generators of the step.
        """
        return Examples(*self.read(self.sample_indices(randomness, self.batch)))

    def chunk_scenes(self, index: int) -> tuple[list[Scene], np.random.Generator]:
        """Return the scenes of the chunk that contains an image.

        Args:
            index: Index of the image.

        Returns:
            The scenes, and the random generator of everything else about them.
        """
        rng = np.random.default_rng([self.seed, 2**31, index // self.chunk * self.chunk])
        return [self.sample_scene(rng) for _ in range(self.chunk)], rng

    def sample_scene(self, rng: np.random.Generator) -> Scene:
        """Return a random scene for an image.

        Args:
            rng: Random generator.
        """
        return sample_scene(rng, shapes=1 if rng.random() < 0.4 else 2)

    def embed(self, scenes: Sequence[Scene], palettes: Sequence[Palette], rng: np.random.Generator) -> Tensor:
        """Return the embeddings to be stored for images, (len(scenes), *embeds_shape).

        Args:
            scenes: Scenes of the images.
            palettes: Palette of each scene.
            rng: Random generator.
        """
        return self.towers.embed_images(render(scenes, IMAGE_SIZE, palettes))

    def encode_chunk(self, first: int) -> tuple[Sequence[Scene], Sequence[Palette], Tensor]:
        """Return scenes, palettes and embeddings of a chunk of images.

        Args:
            first: Index of the first image.
        """
        scenes, rng = self.chunk_scenes(first)
        palettes = mixed_palettes(scenes, rng, RECOLORED_SHARE)
        return scenes, palettes, self.embed(scenes, palettes, rng)

    @torch.no_grad()
    def _fill(self, first: int) -> None:
        with bfloat16_autocast():
            scenes, palettes, embeds = self.encode_chunk(first)
            images = (render(scenes, SIZE, palettes) * 2 - 1).split(16)
            latents = torch.cat([self.movq.quant_conv(self.movq.encoder(part)) for part in images])
        self.latents[first : first + self.chunk] = latents.half().numpy()
        self.embeds[first : first + self.chunk] = embeds.half().numpy()


def _open_array(path: Path, shape: tuple[int, ...]) -> np.memmap[Any, np.dtype[np.float16]]:
    if path.is_file():
        return np.lib.format.open_memmap(path, mode="r+")
    return np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=shape)


def denoising_objective(network: Denoiser, banks: Sequence[Bank], negative: Tensor) -> Objective:
    """Return the denoising objective: error of the velocity, of its averages over areas, and the learned variance.

    Each step contains examples of all banks. If there are several, the velocity's error is also logged per bank.

    Args:
        network: Network to be trained.
        banks: Sources of examples.
        negative: Negative image embedding (1, D), which replaces some of the embeddings.
    """
    scheduler = DDPMScheduler(**SCHEDULER)
    distribution = timestep_distribution(scheduler.alphas_cumprod)
    _, sample = banks[0].read(banks[0].sample_indices(StepRandomness.of(0, 0), 512))
    std = sample.view(512, -1, EMBEDDING)[:, 0].std(0)

    def objective(randomness: StepRandomness) -> dict[str, Tensor]:
        inputs, conditions = [], []
        for bank in banks:
            examples = bank.examples(randomness)
            repeats = bank.timesteps_per_example
            embeds = perturb_embeddings(examples.embeds, std, negative, randomness)
            latents = examples.latents.repeat(repeats, 1, 1, 1)
            timesteps = stratified_timesteps(distribution, len(latents), randomness)
            weight = torch.as_tensor(examples.weight).expand(len(examples.latents), 1, *latents.shape[2:])
            noise = torch.randn(latents.shape, generator=randomness.torch)
            inputs.append((latents, noise, timesteps, weight.repeat(repeats, 1, 1, 1)))
            conditions += [network.encode_condition(embeds, examples.hint, examples.channels)] * repeats
        latents, noise, timesteps, weight = (torch.cat(parts) for parts in zip(*inputs, strict=True))
        noisy = scheduler.add_noise(latents, noise, timesteps)
        with sdpa_kernel(SDPBackend.MATH):  # the backward pass of fused attention is slower for so few tokens
            output = network.denoise(noisy, timesteps, concatenate_conditions(conditions)).float()
        losses = denoising_losses(output, latents, noise, timesteps, scheduler, weight)
        if len(banks) > 1:
            errors = (output.detach()[:, :4] - scheduler.get_velocity(latents, noise, timesteps)).square()
            per_bank = errors.mean((1, 2, 3)).split([len(parts[0]) for parts in inputs])
            losses |= {bank.name: error.mean() for bank, error in zip(banks, per_bank, strict=True)}
        return losses

    return objective


def perturb_embeddings(embeds: Tensor, std: Tensor, negative: Tensor, randomness: StepRandomness) -> Tensor:
    """Return embeddings with noise, like those of a prior, some of them replaced by the negative embedding.

    Args:
        embeds: Image embeddings (batch, D).
        std: Standard deviation (D,) of image embeddings.
        negative: Negative image embedding (1, D).
        randomness: Random generators of the step.
    """
    amount = EMBEDDING_NOISE * torch.rand(len(embeds), 1, generator=randomness.torch)
    embeds = embeds + amount * std * torch.randn(embeds.shape, generator=randomness.torch)
    return torch.where(torch.rand(len(embeds), 1, generator=randomness.torch) < EMPTY_SHARE, negative, embeds)
