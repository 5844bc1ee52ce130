"""Inputs of the prior's image encoder: images and embeddings, alone or mixed with texts for interpolation."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from kandinsky22.errors import invalid
from kandinsky22.inputs import images, prompts, validation


class InterpolationItem(NamedTuple):
    """One item of an interpolation.

    Attributes:
        content: A text, pixels (1, 3, image_size, image_size), or embeddings (batch_size, embedding_dim).
        weight: Factor of its embedding.
    """

    content: str | Tensor
    weight: float


def image_items(
    argument: str, value: Any, *, embedding_dim: int, image_size: int, image_processor: Any
) -> list[Tensor]:
    """Return the pixels or embeddings of each item of a list of images.

    Args:
        argument: Name of the argument, for messages.
        value: One item or a list of them. An item is a path, an http(s) URL or a PIL image of any mode; an array
            (H, W), (H, W, C) or (N, H, W, C) of uint8, or the last two of floats in [0, 1]; a float tensor
            (3, image_size, image_size) or (n, 3, image_size, image_size) of pixels as `image_processor` returns
            them; or an embedding (embedding_dim,) or (n, embedding_dim), a tensor or array of floats.
        embedding_dim: Number of values of one embedding.
        image_size: Side in pixels of the image encoder's input.
        image_processor: CLIP image processor that converts images to pixels.

    Returns:
        One tensor per item: pixels (n, 3, image_size, image_size) or embeddings (n, embedding_dim).

    Raises:
        InputError: If an item is none of those.
    """
    return [
        _pixels_or_embeddings(
            label, item, embedding_dim=embedding_dim, image_size=image_size, image_processor=image_processor
        )
        for label, item in images.labelled_items(argument, value)
    ]


def interpolation_items(
    items: Any,
    weights: Any,
    *,
    dtype: torch.dtype,
    batch_size: int,
    embedding_dim: int,
    image_size: int,
    image_processor: Any,
) -> list[InterpolationItem]:
    """Return the items to interpolate with their weights, after checking both.

    Args:
        items: List of texts (strings) and of items that `image_items` accepts, one image each. A path must be a
            `pathlib.Path`, because strings are texts.
        weights: List of one number per item, finite in `dtype`.
        dtype: Type of the embeddings that the weights are factors of.
        batch_size: Number of embeddings to compute, the size to which embeddings are repeated.
        embedding_dim: Number of values of one embedding.
        image_size: Side in pixels of the image encoder's input.
        image_processor: CLIP image processor that converts images to pixels.

    Raises:
        InputError: If an item or a weight is invalid, or if their numbers differ.
    """
    items = validation.listed("images_and_prompts", items) if isinstance(items, list | tuple) else items
    if not isinstance(items, list) or not items:
        raise invalid("images_and_prompts", items, "a list of at least one image or text")
    if not isinstance(weights, list | tuple):
        raise invalid("weights", weights, "a list of one number per item of images_and_prompts")
    weights = validation.listed("weights", weights)
    if len(items) != len(weights):
        raise invalid("len(weights)", len(weights), f"{len(items)}, one per item of images_and_prompts")
    factors = [_finite_factor(f"weights[{index}]", weight, dtype) for index, weight in enumerate(weights)]

    def checked_item(argument: str, item: Any) -> str | Tensor:
        if isinstance(item, str):
            return prompts.text_list(argument, item)[0]
        tensor = _pixels_or_embeddings(
            argument, item, embedding_dim=embedding_dim, image_size=image_size, image_processor=image_processor
        )
        if tensor.ndim == 2:
            return validation.batch_of_size(argument, tensor, batch_size, "the result")
        if len(tensor) != 1:
            raise invalid(f"len({argument})", len(tensor), "1 image per item", "list each image with its own weight")
        return tensor

    contents = [checked_item(f"images_and_prompts[{index}]", item) for index, item in enumerate(items)]
    return [InterpolationItem(content, factor) for content, factor in zip(contents, factors, strict=True)]


def _finite_factor(argument: str, weight: Any, dtype: torch.dtype) -> float:
    factor = validation.finite_float(argument, weight)
    if not bool(torch.tensor(factor, dtype=dtype).isfinite()):
        raise invalid(argument, weight, f"a number that is finite in {str(dtype).removeprefix('torch.')}")
    return factor


def _pixels_or_embeddings(
    argument: str, item: Any, *, embedding_dim: int, image_size: int, image_processor: Any
) -> Tensor:
    if isinstance(item, Tensor):
        validation.dense(argument, item)
    if isinstance(item, np.ndarray | Tensor) and item.ndim <= 2 and item.dtype != np.uint8:
        return validation.image_embeddings(argument, item, embedding_dim)
    if isinstance(item, Tensor):
        shape = (3, image_size, image_size)
        if item.shape[-3:] != shape or item.ndim > 4 or len(item) == 0 or not item.is_floating_point():
            raise invalid(argument, item, f"floating-point pixels of shape (n, 3, {image_size}, {image_size})")
        return validation.finite_tensor(argument, item).reshape(-1, *shape)
    if isinstance(item, np.ndarray):
        pil_images = images.array_to_pil(images.array_to_rgb(argument, item))
    elif isinstance(item, str | os.PathLike | PIL.Image.Image):
        pil_images = [images.convert_mode(argument, images.open_image(argument, item))]
    else:
        raise invalid(argument, item, "an image (path, URL, PIL image or array), preprocessed pixels or an embedding")
    pixels: Tensor = image_processor(pil_images, return_tensors="pt").pixel_values
    return torch.as_tensor(pixels)
