"""Recipe of the embedded MoVQ: 256 x 256 pixels to 32 x 32 latents of four channels, as in the published one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kandinsky22.models.movq import VQModel
from kandinsky22.training.autoencoder import autoencoder_objective, decoder_objective, normalise_latents
from kandinsky22.training.drawings.rendering import render
from kandinsky22.training.drawings.scenes import Mixture, Scene, sample_scene
from kandinsky22.training.drawings.sprites import Sprites
from kandinsky22.training.loop import CHECKPOINT, Settings, StepRandomness, load_average, train

LATENT_CHANNELS = 4
FACTOR = 8
CONFIG: Mapping[str, Any] = {
    "block_out_channels": (32, 64, 96, 128),
    "layers_per_block": 1,
    "norm_num_groups": 8,  # groups of one channel would remove the absolute colours from what the encoder sees
    "num_vq_embeddings": 1024,
    "sample_size": 32,
}
SIZE, CROP = 256, 64  # sides of images and of crops, in pixels
BATCH = 32  # number of crops; there are a sixteenth as many full images
FULL_SIZE_EVERY = 5  # one in so many steps sees full images
# Small details limit the result, and scenes of several things have most of them.
MIXTURE = Mixture(arrangements=(0.2, 0.15, 0.1, 0.1, 0.15))
AUTOENCODER = Settings(steps=1800, learning_rate=2e-3, warmup=100, decay=900, average=0.995, bf16=True, muon=True)
DECODER = Settings(steps=1500, learning_rate=1e-3, warmup=100, decay=1000, average=0.998, bf16=True, muon=True, seed=1)


def train_movq(folder: Path, sprites: Sprites) -> VQModel:
    """Train both stages, or resume their training.

    Args:
        folder: Folder of both stages.
        sprites: Pixels of all things.

    Returns:
        The trained network.
    """
    movq = train_autoencoder(folder, sprites)

    def images(randomness: StepRandomness) -> Tensor:
        return training_images(sprites, randomness)

    train(movq, decoder_objective(movq, images), DECODER, folder / "decoder")
    return movq


def train_autoencoder(folder: Path, sprites: Sprites, settings: Settings = AUTOENCODER) -> VQModel:
    """Train the first stage, or resume its training.

    Its latents are final: they have zero mean and unit variance, and the codebook covers them.

    Args:
        folder: Folder of both stages.
        sprites: Pixels of all things.
        settings: Hyperparameters.

    Returns:
        The network after the first stage.
    """
    torch.manual_seed(settings.seed)
    movq = VQModel(**CONFIG)
    movq.quantize.requires_grad_(False)

    def images(randomness: StepRandomness) -> Tensor:
        return training_images(sprites, randomness)

    train(movq, autoencoder_objective(movq, images), settings, folder / "autoencoder")
    return _with_normal_latents(movq, sprites)


def load_movq(folder: Path, sprites: Sprites) -> VQModel:
    """Return the network in its current state of training, frozen, without writing any file.

    Args:
        folder: Folder of both stages. The first one must have a checkpoint.
        sprites: Pixels of all things.
    """
    movq = VQModel(**CONFIG)
    load_average(movq, folder / "autoencoder")
    movq = _with_normal_latents(movq, sprites)
    if (folder / "decoder" / CHECKPOINT).is_file():
        load_average(movq, folder / "decoder")
    return movq.eval().requires_grad_(False)


def _with_normal_latents(movq: VQModel, sprites: Sprites, count: int = 512) -> VQModel:
    rng = np.random.default_rng([AUTOENCODER.seed, 2**31])
    scenes = [sample_scene(rng) for _ in range(count)]
    normalise_latents(movq, render(sprites, scenes, SIZE) * 2 - 1, AUTOENCODER.seed)
    return movq


def training_images(sprites: Sprites, randomness: StepRandomness) -> Tensor:
    """Return the images of a step: crops around things, or a sixteenth as many full images.

    Args:
        sprites: Pixels of all things.
        randomness: Random generators of the step.

    Returns:
        RGB images in [-1, 1]: crops (BATCH, 3, CROP, CROP) or full images (BATCH // 16, 3, SIZE, SIZE).
    """
    rng = randomness.numpy
    full_size = randomness.step % FULL_SIZE_EVERY == FULL_SIZE_EVERY - 1
    scenes = [sample_scene(rng, MIXTURE) for _ in range(BATCH // 16 if full_size else BATCH)]
    images = render(sprites, scenes, SIZE) * 2 - 1
    if not full_size:
        images = torch.stack([_crop(image, scene, rng) for image, scene in zip(images, scenes, strict=True)])
    return images.flip(-1) if rng.random() < 0.5 else images


def _crop(image: Tensor, scene: Scene, rng: np.random.Generator) -> Tensor:
    thing = scene.things[rng.integers(len(scene.things))]
    center = SIZE * np.array([thing.y, thing.x])
    corner = center - CROP / 2 + rng.uniform(-CROP / 2, CROP / 2, 2)
    top, left = np.clip(np.round(corner), 0, SIZE - CROP).astype(int)
    return image[:, top : top + CROP, left : left + CROP]
