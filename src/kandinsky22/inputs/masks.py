"""Inpainting masks: conversion to tensors, and the latents that a mask leaves unchanged."""

from __future__ import annotations

from typing import Any

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor

from kandinsky22.errors import invalid
from kandinsky22.inputs import images, validation

LUMA = (0.299, 0.587, 0.114)  # weights of red, green and blue in brightness (ITU-R BT.601), as in PIL

# Offsets (down, right) of the neighbours that extend a repainted latent: six of the eight, because the published
# inpainting UNet was trained with these.
NEIGHBOURS = ((-1, -1), (-1, 0), (0, -1), (0, 1), (1, 0), (1, 1))

MASK_KINDS = "booleans, integers or floats of shape (H, W), (N, H, W), (N, 1, H, W) or (N, H, W, 1)"


def masks_to_tensor(argument: str, value: Any, size: tuple[int, int]) -> Tensor:
    """Return masks as a tensor (batch, 1, height, width), float32: 1 where the image is repainted, 0 elsewhere.

    Masks are white (repaint) and black; half brightness and above counts as white. Masks of another size are
    resized: PIL images with a Lanczos filter, arrays and tensors to the nearest pixel.

    Args:
        argument: Name of the argument, for messages.
        value: One mask or a list of them. A mask is a path, an http(s) URL or a PIL image of any mode; an array
            (H, W), (H, W, C), (N, H, W) or (N, H, W, C) with C = 1, 3 or 4; or a tensor (H, W), (1, H, W),
            (N, H, W), (N, C, H, W) with C = 1 or 3, or (N, H, W, 1). Arrays and tensors hold booleans, floats in
            [0, 1], or integers: 0 and 1, or 0 to 255.
        size: Height and width of the result in pixels.

    Raises:
        InputError: If an item is not a mask.
    """
    return torch.cat([_mask(label, item, size) for label, item in images.labelled_items(argument, value)])


def _mask(argument: str, item: Any, size: tuple[int, int]) -> Tensor:
    """One item as a mask (n, 1, *size) of zeros and ones."""
    if isinstance(item, np.ndarray | Tensor):
        brightness = _brightness(argument, _channels_first(argument, item))
        return images.resize_tensor((brightness >= 0.5).float(), size)
    image = images.open_image(argument, item)
    if image.mode not in ("1", "RGB", "RGBA"):
        image = images.convert_mode(argument, image, "L")
    return torch.from_numpy(np.asarray(resize_mask(image, size)) >= 127.5).float()[None, None]


def resize_mask(mask: Image, size: tuple[int, int]) -> Image:
    """Return a mask resized by PIL's Lanczos filter, in 8 bits of grey.

    Args:
        mask: PIL image of mode "1", "L", "RGB" or "RGBA".
        size: Height and width of the result in pixels.
    """
    return mask.resize(size[::-1], PIL.Image.Resampling.LANCZOS).convert("L")


def _channels_first(argument: str, item: Any) -> Tensor:
    """One or more masks, an array or a tensor, as a tensor (n, C, H, W)."""
    is_array = isinstance(item, np.ndarray)
    try:
        masks: Tensor = (
            torch.from_numpy(np.array(item, dtype=item.dtype.newbyteorder("=")))
            if is_array
            else validation.dense(argument, item).detach().cpu()
        )
    except TypeError as error:
        raise invalid(argument, item, MASK_KINDS) from error
    shape = tuple(masks.shape)
    channel_counts = (1, 3, 4) if is_array else (1,)
    if masks.ndim == 2:
        masks = masks[None, None]
    elif masks.ndim == 3:
        masks = masks.permute(2, 0, 1)[None] if is_array and shape[2] in channel_counts else masks[:, None]
    elif masks.ndim == 4 and shape[3] in channel_counts and (is_array or shape[1] not in (1, 3)):
        masks = masks.permute(0, 3, 1, 2)
    if masks.ndim != 4 or 0 in shape or masks.shape[1] not in (1, 3, 4) or masks.is_complex():
        raise invalid(argument, item, MASK_KINDS)
    return masks


def _brightness(argument: str, masks: Tensor) -> Tensor:
    """Brightness (n, 1, H, W) in [0, 1], from masks (n, C, H, W) of booleans, integers or floats."""
    values = validation.finite_tensor(argument, masks.float())
    low, high = (float(extreme) for extreme in values.aminmax())
    top = 255 if not masks.is_floating_point() and high > 1 else 1
    validation.values_in_range(argument, low, high, (0, top), "floats in [0, 1] or integers from 0 to 255")
    if masks.shape[1] > 1:
        values = (values[:, :3] * torch.tensor(LUMA).view(3, 1, 1)).sum(dim=1, keepdim=True)
    return values / top


def unmasked_latents(repainted: Tensor, size: tuple[int, int]) -> Tensor:
    """Return a mask of latents: 1 where latents stay unchanged, 0 where they are repainted.

    A latent stays unchanged if neither its own pixel nor that of one of six neighbours is repainted.

    Args:
        repainted: Masks of pixels (batch, 1, H, W), 1 where the image is repainted.
        size: Height and width of the latents.

    Returns:
        Tensor (batch, 1, *size) of zeros and ones.
    """
    height, width = size
    unchanged = F.interpolate(1 - repainted, size)
    padded = F.pad(unchanged, (1, 1, 1, 1), value=1.0)
    for down, right in NEIGHBOURS:
        unchanged = unchanged * padded[..., 1 + down : 1 + down + height, 1 + right : 1 + right + width]
    return unchanged
