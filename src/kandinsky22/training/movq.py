"""The recipe of the embedded MoVQ: first the whole autoencoder, then, on frozen latents, its decoder alone.

Splitting the training means that the diffusion model can learn on final latents while the decoder still improves.
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
from kandinsky22.training.loop import Draw, Settings, load_average, train
from kandinsky22.training.scenes import Scene, mixed_palettes, render, sample_scene

CONFIG: Mapping[str, Any] = {
    "block_out_channels": (32, 32, 64, 64),
    "layers_per_block": 1,
    "num_vq_embeddings": 1024,
    "sample_size": 16,
}
SIZE, CROP = 128, 64
REPAINTED = 0.5  # share of pictures in arbitrary colours, so that any picture of a user's can be encoded
# Pictures are mostly flat, and the flat parts are learned within minutes: outlines are what limits the result.
EDGE_WEIGHT = 10.0
AUTOENCODER = Settings(steps=2400, learning_rate=2e-3, warmup=100, decay=800, average=0.995, bf16=True)
DECODER = Settings(steps=2400, learning_rate=1e-3, warmup=100, decay=1600, average=0.998, bf16=True, seed=1)


def train_movq(folder: str | Path) -> VQModel:
    """Both stages, resumed where `folder` says they stopped. Returns the finished network."""
    movq = train_autoencoder(folder)
    train(movq.requires_grad_(False), refinement(movq), DECODER, Path(folder) / "decoder")
    return movq


def train_autoencoder(folder: str | Path, settings: Settings = AUTOENCODER) -> VQModel:
    """The first stage. Its latents are final: of zero mean and unit variance, with a codebook that covers them."""
    torch.manual_seed(settings.seed)
    movq = VQModel(**CONFIG)
    movq.quantize.requires_grad_(False)
    train(movq, autoencoding(movq), settings, Path(folder) / "autoencoder")
    freeze_latents(movq, settings.seed)
    return movq


def load_autoencoder(folder: str | Path) -> VQModel:
    """The network after the first stage, which must be finished; nothing is written."""
    movq = VQModel(**CONFIG)
    load_average(movq, Path(folder) / "autoencoder")
    freeze_latents(movq, AUTOENCODER.seed)
    return movq.eval().requires_grad_(False)


def load_movq(folder: str | Path) -> VQModel:
    """The network as far as `folder` has it: the first stage must be finished, the second may be under way."""
    movq = train_autoencoder(folder)
    movq.requires_grad_(False)
    if (Path(folder) / "decoder" / "checkpoint.pt").is_file():
        load_average(movq, Path(folder) / "decoder")
    return movq


def pictures(draw: Draw, *, whole: bool, batch: int = 16) -> Tensor:
    """Training pictures in [-1, 1]: `batch` crops of 64 pixels around shapes, or a quarter as many whole pictures."""
    scenes = [sample_scene(draw.numpy) for _ in range(batch // 4 if whole else batch)]
    images = render(scenes, SIZE, mixed_palettes(scenes, draw.numpy, REPAINTED)) * 2 - 1
    if not whole:
        images = torch.stack([_crop(image, scene, draw) for image, scene in zip(images, scenes, strict=True)])
    return _turn(images, int(draw.numpy.integers(8)))


def _crop(image: Tensor, scene: Scene, draw: Draw) -> Tensor:
    shape = scene.shapes[draw.numpy.integers(len(scene.shapes))]
    center = SIZE * np.array([shape.y, shape.x])
    corner = center - CROP / 2 + draw.numpy.uniform(-CROP / 3, CROP / 3, 2)
    top, left = np.clip(np.round(corner), 0, SIZE - CROP).astype(int)
    return image[:, top : top + CROP, left : left + CROP]


def _turn(images: Tensor, symmetry: int) -> Tensor:
    """One of the eight symmetries of the square."""
    if symmetry & 1:
        images = images.flip(-1)
    if symmetry & 2:
        images = images.flip(-2)
    return (images.mT if symmetry & 4 else images).contiguous()


def picture_loss(output: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Absolute error of colours, weighted towards outlines, and of the differences between neighbouring pixels.

    Both arguments are (batch, 3, H, W) in [-1, 1]. "flat" and "edge" are the unweighted errors, for the log.
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


def latent_penalty(latents: Tensor) -> Tensor:
    """How far the latents (batch, channels, h, w) are from zero mean, unit variance and no correlation of channels."""
    places = latents.float().movedim(1, -1).flatten(0, -2)
    mean = places.mean(0)
    centered = places - mean
    covariance = centered.mT @ centered / len(places)
    return mean.square().sum() + (covariance - torch.eye(len(mean))).square().sum()


def autoencoding(movq: VQModel) -> Any:
    """Objective of the first stage. A little noise on the latents keeps their neighbourhoods meaningful."""

    def objective(draw: Draw) -> dict[str, Tensor]:
        target = pictures(draw, whole=draw.step % 4 == 3)
        latents = movq.quant_conv(movq.encoder(target)).float()
        noisy = latents + 0.05 * torch.randn(latents.shape, generator=draw.torch)
        losses = picture_loss(movq.decoder(movq.post_quant_conv(noisy), noisy), target)
        penalty = latent_penalty(latents)
        return {**losses, "loss": losses["loss"] + 0.02 * penalty, "latents": penalty}

    return objective


def refinement(movq: VQModel) -> Any:
    """Objective of the second stage, for the decoder alone, on exact, noisy and now and then quantized latents."""
    movq.decoder.requires_grad_(True)
    movq.post_quant_conv.requires_grad_(True)

    def objective(draw: Draw) -> dict[str, Tensor]:
        target = pictures(draw, whole=draw.step % 3 == 2)
        with torch.no_grad():
            latents = movq.quant_conv(movq.encoder(target)).float()
            if draw.step % 8 == 7:
                latents = movq.quantize(latents)[0]
            noise = torch.randn(latents.shape, generator=draw.torch)
            latents = latents + 0.1 * torch.rand(len(latents), 1, 1, 1, generator=draw.torch) * noise
        return picture_loss(movq.decoder(movq.post_quant_conv(latents), latents), target)

    return objective


@torch.no_grad()
def freeze_latents(movq: VQModel, seed: int, count: int = 512) -> None:
    """Fold an affine map into the network that gives its latents zero mean and unit variance, and fit the codebook.

    Only 1 x 1 convolutions touch the latents, before and after, so the pictures stay exactly the same.
    """
    rng = np.random.default_rng([seed, 2**31])
    scenes = [sample_scene(rng) for _ in range(count)]
    images = render(scenes, SIZE, mixed_palettes(scenes, rng, REPAINTED)) * 2 - 1
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
    places = ((latents - mean[:, None, None]) / std[:, None, None]).movedim(1, -1).flatten(0, -2)
    movq.quantize.embedding.weight.copy_(_codebook(places, movq.config.num_vq_embeddings, rng))


def _codebook(points: Tensor, entries: int, rng: np.random.Generator, rounds: int = 20) -> Tensor:
    """k-means centres of `points` (n, dim). Half of the start is spread evenly over the points' range of values, since
    almost all points are the few colours of flat areas and a fair draw would hold little else."""
    unique = points[rng.permutation(len(points))[: 40 * entries]]
    spread = torch.cdist(unique, unique[:1])[:, 0].argsort()
    centers = torch.cat([unique[: entries // 2], unique[spread[:: max(1, 2 * len(unique) // entries)]]])
    centers = torch.cat([centers, unique[-entries:]])[:entries].clone()
    for _ in range(rounds):
        nearest = torch.cdist(unique, centers).argmin(1)
        counts = torch.zeros(entries).index_add_(0, nearest, torch.ones(len(unique)))
        sums = torch.zeros_like(centers).index_add_(0, nearest, unique)
        centers = torch.where(counts[:, None] > 0, sums / counts.clamp_min(1)[:, None], centers)
    return centers


def main(folder: str | Path) -> None:
    """Train in `folder`, with a single thread: several stages run side by side, one a core."""
    torch.set_num_threads(1)
    train_movq(folder)


if __name__ == "__main__":
    import sys

    main(sys.argv[1])
