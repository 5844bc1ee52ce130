"""Recipe of the embedded MoVQ: the autoencoder first, then its decoder alone on frozen latents.

The latents are final after the first stage, thus the diffusion model can be trained while the decoder still improves.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kandinsky22.models.layers import SpatialNorm
from kandinsky22.models.movq import VQModel
from kandinsky22.training.autoencoder import latent_penalty
from kandinsky22.training.loop import CHECKPOINT, Objective, Settings, StepRandomness, load_average, train
from kandinsky22.training.scenes import Scene, mixed_palettes, render, sample_scene

CONFIG: Mapping[str, Any] = {
    "block_out_channels": (32, 32, 64, 64),
    "layers_per_block": 1,
    "num_vq_embeddings": 1024,
    "sample_size": 16,
}
SIZE, CROP = 128, 64  # sides of images and of crops, in pixels
RECOLORED_SHARE = 0.5  # share of images in arbitrary colours, which lets any image of a user be encoded
# Images are mostly flat, and flat areas are learned within minutes: outlines limit the result.
EDGE_WEIGHT = 10.0
AUTOENCODER = Settings(steps=2400, learning_rate=2e-3, warmup=100, decay=800, average=0.995, bf16=True)
DECODER = Settings(steps=2400, learning_rate=1e-3, warmup=100, decay=1600, average=0.998, bf16=True, seed=1)


def train_movq(folder: str | Path) -> VQModel:
    """Train both stages, or resume their training.

    Args:
        folder: Folder of both stages.

    Returns:
        The trained network.
    """
    movq = train_autoencoder(folder)
    train(movq.requires_grad_(False), decoder_objective(movq), DECODER, Path(folder) / "decoder")
    return movq


def train_autoencoder(folder: str | Path, settings: Settings = AUTOENCODER) -> VQModel:
    """Train the first stage, or resume its training.

    Its latents are final: they have zero mean and unit variance, and the codebook covers them.

    Args:
        folder: Folder of both stages.
        settings: Hyperparameters.

    Returns:
        The network after the first stage.
    """
    torch.manual_seed(settings.seed)
    movq = VQModel(**CONFIG)
    movq.quantize.requires_grad_(False)
    train(movq, autoencoder_objective(movq), settings, Path(folder) / "autoencoder")
    normalise_latents(movq, settings.seed)
    return movq


def load_autoencoder(folder: str | Path) -> VQModel:
    """Return the network after the first stage, which must be finished, without writing any file.

    Args:
        folder: Folder of both stages.
    """
    movq = VQModel(**CONFIG)
    load_average(movq, Path(folder) / "autoencoder")
    normalise_latents(movq, AUTOENCODER.seed)
    return movq.eval().requires_grad_(False)


def load_movq(folder: str | Path) -> VQModel:
    """Return the network in its current state; the first stage is finished first, the second may be incomplete.

    Args:
        folder: Folder of both stages.
    """
    movq = train_autoencoder(folder)
    movq.requires_grad_(False)
    if (Path(folder) / "decoder" / CHECKPOINT).is_file():
        load_average(movq, Path(folder) / "decoder")
    return movq


def training_images(randomness: StepRandomness, *, full_size: bool, batch: int = 16) -> Tensor:
    """Return training images.

    Args:
        randomness: Random generators of the step.
        full_size: Whether to return full images instead of crops around shapes.
        batch: Number of crops; there are a quarter as many full images.

    Returns:
        RGB images in [-1, 1]: crops (batch, 3, 64, 64) or full images (batch // 4, 3, 128, 128).
    """
    scenes = [sample_scene(randomness.numpy) for _ in range(batch // 4 if full_size else batch)]
    images = render(scenes, SIZE, mixed_palettes(scenes, randomness.numpy, RECOLORED_SHARE)) * 2 - 1
    if not full_size:
        images = torch.stack([_crop(image, scene, randomness) for image, scene in zip(images, scenes, strict=True)])
    return _apply_symmetry(images, int(randomness.numpy.integers(8)))


def _crop(image: Tensor, scene: Scene, randomness: StepRandomness) -> Tensor:
    shape = scene.shapes[randomness.numpy.integers(len(scene.shapes))]
    center = SIZE * np.array([shape.y, shape.x])
    corner = center - CROP / 2 + randomness.numpy.uniform(-CROP / 3, CROP / 3, 2)
    top, left = np.clip(np.round(corner), 0, SIZE - CROP).astype(int)
    return image[:, top : top + CROP, left : left + CROP]


def _apply_symmetry(images: Tensor, symmetry: int) -> Tensor:
    """Apply one of the eight symmetries of the square, 0 to 7."""
    if symmetry & 1:
        images = images.flip(-1)
    if symmetry & 2:
        images = images.flip(-2)
    return (images.mT if symmetry & 4 else images).contiguous()


def image_loss(output: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Return the reconstruction loss: error of colours, weighted towards outlines, and of differences between pixels.

    Args:
        output: Reconstructed images (batch, 3, H, W) in [-1, 1].
        target: True images of the same shape.

    Returns:
        Scalars: "loss", and for the log the unweighted errors "edge" and "flat" near outlines and elsewhere.
    """
    output = output.float()
    across, down = target.diff(dim=-1).abs().amax(1, keepdim=True), target.diff(dim=-2).abs().amax(1, keepdim=True)
    change = torch.maximum(F.pad(across, (0, 1)), F.pad(down, (0, 0, 0, 1)))
    outline = F.max_pool2d((change > 0.02).float(), 5, stride=1, padding=2)
    error = (output - target).abs()
    slope = (output.diff(dim=-1) - target.diff(dim=-1)).abs().mean()
    slope = slope + (output.diff(dim=-2) - target.diff(dim=-2)).abs().mean()
    with torch.no_grad():
        channels = error.shape[1]
        edge = (error * outline).sum() / (channels * outline.sum()).clamp_min(1)
        flat = (error * (1 - outline)).sum() / (channels * (1 - outline).sum()).clamp_min(1)
    return {"loss": (error * (1 + EDGE_WEIGHT * outline)).mean() + 2 * slope, "edge": edge, "flat": flat}


def autoencoder_objective(movq: VQModel) -> Objective:
    """Return the objective of the first stage. Noise on the latents makes nearby latents decode to similar images.

    Args:
        movq: Network to be trained.
    """

    def objective(randomness: StepRandomness) -> dict[str, Tensor]:
        target = training_images(randomness, full_size=randomness.step % 4 == 3)
        latents = movq.quant_conv(movq.encoder(target)).float()
        noisy = latents + 0.05 * torch.randn(latents.shape, generator=randomness.torch)
        losses = image_loss(movq.decoder(movq.post_quant_conv(noisy), noisy), target)
        penalty = latent_penalty(latents)
        return {**losses, "loss": losses["loss"] + 0.02 * penalty, "latents": penalty}

    return objective


def decoder_objective(movq: VQModel) -> Objective:
    """Return the objective of the second stage: the decoder alone, on exact, noisy and sometimes quantized latents.

    Args:
        movq: Network of the first stage, whose decoder becomes trainable.
    """
    movq.decoder.requires_grad_(True)
    movq.post_quant_conv.requires_grad_(True)

    def objective(randomness: StepRandomness) -> dict[str, Tensor]:
        target = training_images(randomness, full_size=randomness.step % 3 == 2)
        with torch.no_grad():
            latents = movq.quant_conv(movq.encoder(target)).float()
            if randomness.step % 8 == 7:
                latents = movq.quantize(latents)[0]
            noise = torch.randn(latents.shape, generator=randomness.torch)
            latents = latents + 0.1 * torch.rand(len(latents), 1, 1, 1, generator=randomness.torch) * noise
        return image_loss(movq.decoder(movq.post_quant_conv(latents), latents), target)

    return objective


@torch.no_grad()
def normalise_latents(movq: VQModel, seed: int, count: int = 512) -> None:
    """Fold an affine map into the network that gives latents zero mean and unit variance, and fit the codebook.

    Only 1 x 1 convolutions touch the latents, before and after, thus decoded images stay the same.

    Args:
        movq: Network, changed in place.
        seed: Seed of the scenes whose latents are measured.
        count: Number of these scenes.
    """
    rng = np.random.default_rng([seed, 2**31])
    scenes = [sample_scene(rng) for _ in range(count)]
    images = render(scenes, SIZE, mixed_palettes(scenes, rng, RECOLORED_SHARE)) * 2 - 1
    latents = torch.cat([movq.quant_conv(movq.encoder(part)) for part in images.split(16)])
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    movq.quant_conv.weight.div_(std[:, None, None, None])
    assert movq.quant_conv.bias is not None
    movq.quant_conv.bias.sub_(mean).div_(std)
    norms = [module for module in movq.modules() if isinstance(module, SpatialNorm)]
    for conv in [movq.post_quant_conv, *(c for norm in norms for c in (norm.conv_y, norm.conv_b))]:
        assert conv.bias is not None
        conv.bias.add_(conv.weight[:, :, 0, 0] @ mean)
        conv.weight.mul_(std[:, None, None])
    vectors = ((latents - mean[:, None, None]) / std[:, None, None]).movedim(1, -1).flatten(0, -2)
    movq.quantize.embedding.weight.copy_(_codebook(vectors, movq.config.num_vq_embeddings, rng))


def _codebook(points: Tensor, entries: int, rng: np.random.Generator, rounds: int = 20) -> Tensor:
    """Return k-means centres of `points` (n, dim).

    Almost all points are the few colours of flat areas, which would fill a random initial codebook. Half of the initial
    centres are therefore spread evenly over the range of the points.
    """
    sample = points[rng.permutation(len(points))[: 40 * entries]]
    by_distance = torch.cdist(sample, sample[:1])[:, 0].argsort()
    centers = torch.cat([sample[: entries // 2], sample[by_distance[:: max(1, 2 * len(sample) // entries)]]])
    centers = torch.cat([centers, sample[-entries:]])[:entries].clone()
    for _ in range(rounds):
        nearest = torch.cdist(sample, centers).argmin(1)
        counts = torch.zeros(entries).index_add_(0, nearest, torch.ones(len(sample)))
        sums = torch.zeros_like(centers).index_add_(0, nearest, sample)
        centers = torch.where(counts[:, None] > 0, sums / counts.clamp_min(1)[:, None], centers)
    return centers


def main(folder: str | Path) -> None:
    """Train both stages in a single thread: several stages of the training may run at once, one per core.

    Args:
        folder: Folder of both stages.
    """
    torch.set_num_threads(1)
    train_movq(folder)


if __name__ == "__main__":
    import sys

    main(sys.argv[1])
