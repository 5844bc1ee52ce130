"""What can be mixed: texts, pictures and embeddings, with a weight each."""

from __future__ import annotations

from typing import Any

import PIL.Image
from torch import Tensor

from kandinsky22.errors import InputError
from kandinsky22.inputs import checks


def parts(items: Any, weights: Any, *, rows: int, dim: int, size: int, image_processor: Any) -> list[str | Tensor]:
    """The items as texts, pixels (1, 3, size, size), or embeddings (rows, dim), with their weights checked.

    Items are strings, PIL images (prepared by `image_processor`), tensors of pixels with or without the batch
    dimension, or embeddings (dim,), (1, dim) or (rows, dim). Raises InputError naming the item.
    """
    if not isinstance(items, list | tuple) or not isinstance(weights, list | tuple) or not items:
        raise InputError("images_and_prompts and weights: two lists with at least one entry are needed")
    if len(items) != len(weights):
        raise InputError(f"weights: {len(weights)} were given for {len(items)} images_and_prompts")
    for index, weight in enumerate(weights):
        checks.number(f"weights[{index}]", weight)

    def part(name: str, item: Any) -> str | Tensor:
        if isinstance(item, PIL.Image.Image):
            item = image_processor(item, return_tensors="pt").pixel_values
        if isinstance(item, str):
            return item
        if not isinstance(item, Tensor):
            raise InputError(f"{name}: a string, a PIL image or a tensor is needed, not {type(item).__name__}")
        if item.ndim <= 2:
            return checks.same_batch(name, checks.embeddings(name, item, dim), rows, "the result")
        if tuple(item.shape) not in ((3, size, size), (1, 3, size, size)):
            raise InputError(f"{name} has shape {tuple(item.shape)}; pixels need (3, {size}, {size})")
        return checks.finite(name, item).reshape(1, 3, size, size)

    return [part(f"images_and_prompts[{index}]", item) for index, item in enumerate(items)]
