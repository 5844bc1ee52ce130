"""Recipe of the embedded decoder UNet: from noise to the latents of an image, conditioned on its CLIP embedding.

This stage trains it on images of half the size. `shared` trains it further, in full size and with all its inputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from kandinsky22.checkpoints.atomic_files import atomic_write
from kandinsky22.checkpoints.fingerprint import weights_digest
from kandinsky22.models.movq import VQModel
from kandinsky22.models.unet import UNet2DConditionModel
from kandinsky22.schedulers import DDPMScheduler
from kandinsky22.training import autoencoder
from kandinsky22.training.denoising import Examples, denoising_objective, perturb_embeddings
from kandinsky22.training.drawings import clip as clip_recipe
from kandinsky22.training.drawings.clip import Clip
from kandinsky22.training.drawings.movq import FACTOR, LATENT_CHANNELS, SIZE
from kandinsky22.training.drawings.probe import SceneLabels
from kandinsky22.training.drawings.rendering import render
from kandinsky22.training.drawings.scenes import DRAWN, Mixture, Scene, sample_scene
from kandinsky22.training.drawings.sprites import Sprites
from kandinsky22.training.loop import Settings, StepRandomness, bfloat16_autocast, load_average, train

# The outer levels are narrow: at equal width they would take most of a step, and they only refine what the inner ones
# compose. Groups of one channel would remove absolute colours.
CONFIG: Mapping[str, Any] = {
    "sample_size": SIZE // FACTOR,
    "in_channels": LATENT_CHANNELS,
    "out_channels": 2 * LATENT_CHANNELS,
    "block_out_channels": (32, 64, 128, 256),
    "down_block_types": (*("ResnetDownsampleBlock2D",) * 2, *("SimpleCrossAttnDownBlock2D",) * 2),
    "up_block_types": (*("SimpleCrossAttnUpBlock2D",) * 2, *("ResnetUpsampleBlock2D",) * 2),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 128,
    "encoder_hid_dim": clip_recipe.SIZES.embedding,
    "attention_head_dim": 32,
}
# The published noise schedule, with velocity instead of noise prediction.
SCHEDULER: Mapping[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "prediction_type": "v_prediction",
    "variance_type": "fixed_small",
    "clip_sample": False,
}
BATCH = 16
CHUNK = 64  # number of images that are encoded together
# Number of images in the bank before the first step, new images per step, and largest number of images.
BANK_START, BANK_GROWTH, BANK_SIZE = 4096, 1, 65536
BANK = "bank"  # folder of the bank in that of its stage
COMPOSED_SHARE = 0.7  # share of the embeddings that are sums of parts, which are exact, instead of the vision tower's
EMPTY_SHARE = 0.08
EMBEDDING_NOISE = 0.2  # those of the prior are inexact too
MIXTURE = DRAWN
# One thing much more often than several: outlines are learned first, and faster on large things.
HALF_SIZE_MIXTURE = dataclasses.replace(DRAWN, arrangements=(0.08, 0.06, 0.05, 0.03, 0.03))
# After these steps, places and colours are right. Most details are smaller than a latent at this size. They are learned
# at the full size, and the learning rate falls there.
SETTINGS = Settings(
    steps=3200,
    learning_rate=4e-3,
    warmup=200,
    decay=1,
    average=0.999,
    bf16=True,
    muon=True,
    muon_interval=4,
    seed=2,
)


def train_decoder(
    folder: Path, movq: VQModel, clip: Clip, sprites: Sprites, settings: Settings = SETTINGS
) -> UNet2DConditionModel:
    """Train the UNet, or resume its training, on images of half the size, where a step costs a quarter.

    The shared UNet goes on from there in full size. The embeddings are sums of parts alone: the towers may still be in
    training.

    Args:
        folder: Folder of the stage.
        movq: Trained MoVQ, whose encoder gives the latents.
        clip: Trained CLIP.
        sprites: Pixels of all things.
        settings: Hyperparameters.

    Returns:
        The trained network.
    """
    torch.manual_seed(settings.seed)
    unet = UNet2DConditionModel(**CONFIG)
    nn.init.zeros_(unet.conv_out.weight)
    bank = Bank(
        folder / BANK,
        movq,
        clip,
        sprites,
        seed=settings.seed,
        image_size=SIZE // 2,
        composed_share=1.0,
        mixture=HALF_SIZE_MIXTURE,
    )
    train(unet, denoising_objective(unet, DDPMScheduler(**SCHEDULER), [bank]), settings, folder)
    return unet


def load_decoder(folder: Path) -> UNet2DConditionModel:
    """Return the network in its current state of training, frozen.

    Args:
        folder: Folder of the stage.
    """
    unet = UNet2DConditionModel(**CONFIG)
    load_average(unet, folder)
    return unet.eval().requires_grad_(False)


@torch.no_grad()
def zero_embedding(clip: Clip) -> Tensor:
    """Return the image embedding (1, D) of the image whose processed values are 0, the negative one of guidance.

    Args:
        clip: Trained CLIP.
    """
    size = clip.towers.image_size
    return clip.towers.embed_images(torch.full((1, 3, size, size), 0.5)).float()


class Bank:
    """Latents and embeddings of rendered images, stored on disk, where a resumed run reads them again.

    The bank grows during training, thus training starts at once. Each image depends on the seed and on its index alone,
    and the size of the bank depends on the step alone. Each image has two embeddings: the sum of the parts of its
    attributes, and that of the vision tower unless it is never used.

    Args:
        folder: Folder of the files.
        movq: Trained MoVQ.
        clip: Trained CLIP.
        sprites: Pixels of all things.
        seed: Seed of the images.
        image_size: Side of the images, in pixels.
        composed_share: Share of the embeddings that are sums of parts.
        mixture: Shares of what scenes consist of.
        size: Largest number of images.
    """

    name = "decoder"
    timesteps_per_example = 1

    def __init__(
        self,
        folder: Path,
        movq: VQModel,
        clip: Clip,
        sprites: Sprites,
        *,
        seed: int,
        image_size: int = SIZE,
        composed_share: float = COMPOSED_SHARE,
        mixture: Mixture = MIXTURE,
        size: int = BANK_SIZE,
    ) -> None:
        self.movq, self.clip, self.sprites, self.seed, self.size = movq, clip, sprites, seed, size
        self.image_size, self.composed_share, self.mixture = image_size, composed_share, mixture
        folder.mkdir(parents=True, exist_ok=True)
        side = image_size // FACTOR
        self.latents = _open_array(folder / "latents.npy", (size, LATENT_CHANNELS, side, side))
        kinds = 2 if composed_share < 1 else 1
        self.embeds = _open_array(folder / "embeds.npy", (size, kinds, clip_recipe.SIZES.embedding))
        self.count_file = folder / "count"
        self.count = int(self.count_file.read_text(encoding="utf-8")) if self.count_file.is_file() else 0
        self._refresh(folder / "vision")
        self._grow(BANK_START)
        self.std = torch.from_numpy(self.embeds[:BANK_START, 0]).float().std(0)
        self.negative = zero_embedding(clip)

    def examples(self, randomness: StepRandomness) -> Examples:
        """Return the examples of a step.

        Args:
            randomness: Random generators of the step.
        """
        indices = self.sample(BATCH, randomness)  # in no order: the timesteps of a batch ascend
        embeds = self.stored_embeds(indices, randomness)
        return Examples(torch.from_numpy(self.latents[indices]).float(), self.perturb(embeds, randomness))

    def perturb(self, embeds: Tensor, randomness: StepRandomness) -> Tensor:
        """Return embeddings (N, D) with noise, some of them replaced by the negative embedding.

        Args:
            embeds: Embeddings (N, D).
            randomness: Random generators of the step.
        """
        return perturb_embeddings(
            embeds, self.std, self.negative, randomness, noise=EMBEDDING_NOISE, empty_share=EMPTY_SHARE
        )

    def sample(self, count: int, randomness: StepRandomness) -> npt.NDArray[np.int64]:
        """Return the indices of random images, after the bank has grown to its size of the step.

        Args:
            count: Number of indices.
            randomness: Random generators of the step.
        """
        size = min(BANK_START + BANK_GROWTH * randomness.step, self.size) // CHUNK * CHUNK
        self._grow(size)
        return randomness.numpy.integers(0, size, count)

    def stored_embeds(self, indices: npt.NDArray[np.int64], randomness: StepRandomness) -> Tensor:
        """Return embeddings (len(indices), D): of each image the sum of parts or that of the vision tower.

        Args:
            indices: Indices of the images.
            randomness: Random generators of the step.
        """
        kinds = (randomness.numpy.random(len(indices)) >= self.composed_share).astype(int)
        return torch.from_numpy(self.embeds[indices, kinds]).float()

    def chunk_scenes(self, first: int) -> Sequence[Scene]:
        """Return the scenes of CHUNK images that were encoded together.

        Args:
            first: Index of the first image.
        """
        rng = np.random.default_rng([self.seed, 2**31, first])
        return [sample_scene(rng, self.mixture) for _ in range(CHUNK)]

    def _grow(self, size: int) -> None:
        """Add images until there are `size`."""
        if self.count >= size:
            return
        for first in range(self.count, size, CHUNK):
            self._fill(first)
        self.latents.flush()
        self.embeds.flush()
        self.count = size
        with atomic_write(self.count_file) as temporary:
            temporary.write_text(str(size), encoding="utf-8")

    def _refresh(self, digest_file: Path) -> None:
        """Compute the vision tower's embeddings again if the tower has been trained further."""
        digest = weights_digest({"vision": self.clip.towers.vision})
        if self.composed_share == 1:
            return
        if self.count and (not digest_file.is_file() or digest_file.read_text(encoding="utf-8") != digest):
            for first in range(0, self.count, CHUNK):
                self.embeds[first : first + CHUNK, 1] = self._seen(self._render(self.chunk_scenes(first)))
            self.embeds.flush()
        with atomic_write(digest_file) as temporary:
            temporary.write_text(digest, encoding="utf-8")

    def _render(self, scenes: Sequence[Scene]) -> Tensor:
        return render(self.sprites, scenes, self.image_size)

    @torch.no_grad()
    def _seen(self, images: Tensor) -> npt.NDArray[np.float16]:
        """Return the vision tower's embeddings of images."""
        with bfloat16_autocast():
            embeds = self.clip.towers.embed_images(images)
        return embeds.half().numpy()

    @torch.no_grad()
    def _fill(self, first: int) -> None:
        scenes = self.chunk_scenes(first)
        images = self._render(scenes)
        with bfloat16_autocast():
            latents = autoencoder.encode(self.movq, images * 2 - 1)
        composed = self.clip.probe.compose(SceneLabels.of(scenes)).float()
        self.latents[first : first + CHUNK] = latents.half().numpy()
        self.embeds[first : first + CHUNK, 0] = composed.half().numpy()
        if self.composed_share < 1:
            self.embeds[first : first + CHUNK, 1] = self._seen(images)


def _open_array(path: Path, shape: tuple[int, ...]) -> np.memmap[Any, np.dtype[np.float16]]:
    if path.is_file():
        return np.lib.format.open_memmap(path, mode="r+")
    return np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=shape)
