"""Photos, masks and hints that tests of pipelines start from."""

from __future__ import annotations

from typing import Any

import numpy as np
import PIL.Image
import torch
from tests.pipelines.tiny import seeded


def photo(seed: int, width: int = 32, height: int = 32) -> PIL.Image.Image:
    """Return a picture of smooth colours, so that resizing it is hardly affected by rounding."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return PIL.Image.fromarray(noise).resize((width, height), PIL.Image.Resampling.BICUBIC)


def photo_tensor(seed: int, *, signed: bool = False) -> torch.Tensor:
    """Return a photo as a tensor (3, 32, 32) in [0, 1], or in [-1, 1] if `signed`."""
    values = torch.from_numpy(np.asarray(photo(seed), dtype=np.float32) / 255).permute(2, 0, 1).contiguous()
    return values * 2 - 1 if signed else values


def noise_picture(seed: int, width: int = 40, height: int = 56) -> PIL.Image.Image:
    """Return a picture of independent random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels)


def box_mask(width: int = 32, height: int = 32) -> np.ndarray[Any, Any]:
    """Return a mask (H, W) that repaints an off-centre box, one corner of the picture and a single pixel."""
    mask = np.zeros((height, width), dtype=np.float32)
    mask[height // 4 : height // 2, width // 3 : width - 7] = 1
    mask[-3:, :5] = 1
    mask[1, -4] = 1
    return mask


def box_mask_image(width: int = 32, height: int = 32) -> PIL.Image.Image:
    """Return the same mask as a grey picture."""
    return PIL.Image.fromarray((box_mask(width, height) * 255).astype(np.uint8))


def hint(rows: int, seed: int, height: int = 32, width: int = 32) -> torch.Tensor:
    """Return hints (rows, 3, 4 H, 4 W): eight hint pixels per latent, which covers two pixels of the tiny picture."""
    return torch.rand(rows, 3, height * 4, width * 4, generator=seeded(seed))
