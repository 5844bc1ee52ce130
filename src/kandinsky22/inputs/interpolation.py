"""What the image encoder's side of the prior takes: pictures and embeddings, alone or mixed with texts."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from kandinsky22.errors import InputError
from kandinsky22.inputs import images, prompts, validation


def pictures(name: str, value: Any, *, dim: int, size: int, image_processor: Any) -> list[Tensor]:
    """Pictures as pixels (n, 3, size, size) and embeddings (n, dim), one tensor for each item of a list.

    Items are paths, addresses and PIL images of any mode; arrays (H, W), (H, W, C) or (N, H, W, C) of uint8, or the
    last two of floats in [0, 1]; tensors (3, size, size) or (n, 3, size, size) of pixels as `image_processor` makes
    them; embeddings (dim,) or (n, dim), tensors or arrays of floats. Raises InputError naming the item.
    """
    options: dict[str, Any] = {"dim": dim, "size": size, "image_processor": image_processor}
    return [_picture(label, item, **options) for label, item in images.each(name, value)]


def parts(items: Any, weights: Any, *, rows: int, dim: int, **options: Any) -> list[str | Tensor]:
    """The items as texts, pixels (1, 3, size, size), or embeddings (rows, dim), with their weights checked.

    Strings are texts; everything else is as in `pictures`, one picture an item. Raises InputError naming the item.
    """
    if not isinstance(items, list | tuple) or not isinstance(weights, list | tuple) or not items:
        raise InputError("images_and_prompts and weights: two lists with at least one entry are needed")
    if len(items) != len(weights):
        raise InputError(f"weights: {len(weights)} were given for {len(items)} images_and_prompts")
    for index, weight in enumerate(weights):
        validation.number(f"weights[{index}]", weight)

    def part(name: str, item: Any) -> str | Tensor:
        if isinstance(item, str):
            return prompts.texts(name, item)[0]
        made = _picture(name, item, dim=dim, **options)
        if made.ndim == 2:
            return validation.same_batch(name, made, rows, "the result")
        if len(made) != 1:
            raise InputError(f"{name} holds {len(made)} pictures; one is needed, with its own weight")
        return made

    return [part(f"images_and_prompts[{index}]", item) for index, item in enumerate(items)]


def _picture(name: str, item: Any, *, dim: int, size: int, image_processor: Any) -> Tensor:
    if isinstance(item, np.ndarray | Tensor) and item.ndim <= 2 and item.dtype != np.uint8:
        return validation.embeddings(name, item, dim)
    if isinstance(item, Tensor):
        if item.shape[-3:] != (3, size, size) or item.ndim > 4 or len(item) == 0 or not item.is_floating_point():
            raise InputError(f"{name} has shape {tuple(item.shape)}; pixels need floats (n, 3, {size}, {size})")
        return validation.finite(name, item).reshape(-1, 3, size, size)
    if isinstance(item, np.ndarray):
        seen = images.to_pil(images.frames(name, item))
    elif isinstance(item, str | os.PathLike | PIL.Image.Image):
        seen = [images.rgb(name, images.opened(name, item))]
    else:
        kinds = "a picture (path, PIL, array), prepared pixels or an embedding is needed"
        raise InputError(f"{name}: {kinds}, not {type(item).__name__}")
    pixels: Tensor = image_processor(seen, return_tensors="pt").pixel_values
    return torch.as_tensor(pixels)
