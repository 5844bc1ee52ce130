"""Masks: which pixels are repainted, and which latents that leaves untouched."""

from __future__ import annotations

from typing import Any

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from torch import Tensor

from kandinsky22.errors import InputError
from kandinsky22.inputs import images, validation

LUMA = (0.299, 0.587, 0.114)  # what red, green and blue add to brightness (ITU-R BT.601), as in PIL
# Of a latent's eight neighbours, those whose repainting repaints it too; the published inpainting UNet was trained so.
NEIGHBOURS = ((-1, -1), (-1, 0), (0, -1), (0, 1), (1, 0), (1, 1))


def masks(name: str, value: Any, size: tuple[int, int]) -> Tensor:
    """Masks (batch, 1, *size), float32: 1 where the picture is repainted, 0 where it is kept.

    One mask or a list, of white (repaint) and black; from half brightness on counts as white. Paths, addresses, PIL
    images of any mode; arrays (H, W), (H, W, C), (N, H, W) or (N, H, W, C), C being 1, 3 or 4; tensors (H, W),
    (1, H, W), (N, H, W), (N, C, H, W), C being 1 or 3, or (N, H, W, 1). They hold booleans, floats in [0, 1], or
    integers: 0 and 1, or 0 to 255. Another size is resized: Lanczos, arrays and tensors to the nearest pixel. Raises
    InputError naming the item.
    """
    return torch.cat([_mask(label, item, size) for label, item in images.each(name, value)])


def _mask(name: str, item: Any, size: tuple[int, int]) -> Tensor:
    if isinstance(item, np.ndarray | Tensor):
        stack = _stack(name, item)
        bright = _brightness(name, stack)
        return F.interpolate((bright >= 0.5).float(), size)
    picture = images.opened(name, item)
    if picture.mode not in ("1", "RGB", "RGBA"):
        picture = images.rgb(name, picture, "L")
    picture = picture.resize(size[::-1], PIL.Image.Resampling.LANCZOS).convert("L")
    return torch.from_numpy(np.asarray(picture) >= 127.5).float()[None, None]


def _stack(name: str, item: Any) -> Tensor:
    """(n, C, H, W) from an array or a tensor of one or more masks."""
    array = isinstance(item, np.ndarray)
    if not array:
        validation.plain(name, item)
    try:
        stack: Tensor = (
            torch.from_numpy(np.array(item, dtype=item.dtype.newbyteorder("="))) if array else item.detach().cpu()
        )
    except TypeError as error:
        raise InputError(f"{name} holds {item.dtype}; booleans, integers or floats are needed") from error
    shape, colours = tuple(stack.shape), (1, 3, 4) if array else (1,)
    if stack.ndim == 2:
        stack = stack[None, None]
    elif stack.ndim == 3:
        stack = stack.permute(2, 0, 1)[None] if array and shape[2] in colours else stack[:, None]
    elif stack.ndim == 4 and shape[3] in colours and (array or shape[1] not in (1, 3)):
        stack = stack.permute(0, 3, 1, 2)
    if stack.ndim != 4 or 0 in shape or stack.shape[1] not in (1, 3, 4) or stack.is_complex():
        raise InputError(f"{name}: {stack.dtype} of shape {shape} is no mask; (H, W), (N, 1, H, W) or (N, H, W, 1) is")
    return stack


def _brightness(name: str, stack: Tensor) -> Tensor:
    """(n, 1, H, W) in [0, 1], from (n, C, H, W) of booleans, integers or floats."""
    values = validation.finite(name, stack.float())
    low, high = (float(limit) for limit in values.aminmax())
    top = 255 if not stack.is_floating_point() and high > 1 else 1
    if low < 0 or high > top:
        raise InputError(f"{name} holds {low:g} to {high:g}; floats in [0, 1] or integers from 0 to 255 are needed")
    if stack.shape[1] > 1:
        values = (values[:, :3] * torch.tensor(LUMA).view(3, 1, 1)).sum(dim=1, keepdim=True)
    return values / top


def kept(repainted: Tensor, size: tuple[int, int]) -> Tensor:
    """Where latents of `size` stay as they are: (batch, 1, *size), 1 or 0, from masks of pixels.

    A latent stays if neither its own pixel nor that of one of six neighbours is repainted.
    """
    height, width = size
    keep = F.interpolate(1 - repainted, size)
    around = F.pad(keep, (1, 1, 1, 1), value=1.0)
    for down, right in NEIGHBOURS:
        keep = keep * around[..., 1 + down : 1 + down + height, 1 + right : 1 + right + width]
    return keep
