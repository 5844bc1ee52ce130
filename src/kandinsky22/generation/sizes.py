"""Sizes of results that are generated over images."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kandinsky22.errors import invalid
from kandinsky22.generation.canvas import extended_size
from kandinsky22.generation.limits import check_size
from kandinsky22.generation.request import Request

if TYPE_CHECKING:
    from PIL.Image import Image

# Largest difference of two aspect ratios that still counts as equal, as a natural logarithm: the sides of scaled
# copies are rounded to pixels.
ASPECT_RATIO_TOLERANCE = 0.02


def check_aspect_ratios(images: Mapping[str, Image]) -> None:
    """Raise an error unless images that are overlaid have the same aspect ratio.

    Args:
        images: Images by option.

    Raises:
        InputError: If two aspect ratios differ by more than `ASPECT_RATIO_TOLERANCE`.
    """
    for (first_name, first), (name, image) in zip(images.items(), list(images.items())[1:], strict=False):
        ratio = first.width * image.height / (first.height * image.width)
        if abs(math.log(ratio)) > ASPECT_RATIO_TOLERANCE:
            raise invalid(
                f"size of {name}",
                f"{image.width}x{image.height}",
                f"the aspect ratio of {first_name}, which is {first.width}x{first.height}",
                "crop or resize one of them",
            )


def fitting_size(image_size: tuple[int, int], default_side: int, multiple: int) -> tuple[int, int]:
    """Return the (width, height) that fits an image's aspect ratio best, then the area of the model's default size.

    Args:
        image_size: (width, height) of the image, in pixels.
        default_side: Side of the model's default square, in pixels.
        multiple: Width and height are multiples of this number of pixels.
    """
    width, height = image_size
    exact = default_side * math.sqrt(width / height), default_side * math.sqrt(height / width)
    near = [
        sorted({max(1, math.floor(side / multiple)) * multiple, math.ceil(side / multiple) * multiple})
        for side in exact
    ]
    candidates = [(wide, high) for wide in near[0] for high in near[1]]

    def deviation(size: tuple[int, int]) -> tuple[float, float]:
        wide, high = (math.log(rounded / side) for rounded, side in zip(size, exact, strict=True))
        return round(abs(wide - high), 9), abs(wide + high)

    return min(candidates, key=deviation)


def result_size(request: Request, decoder: Any, base_size: tuple[int, int]) -> tuple[int, int]:
    """Return the (width, height) that is generated for a base image, in pixels.

    Args:
        request: Settings of the generation.
        decoder: Decoder pipeline.
        base_size: Width and height of the base image, in pixels.

    Raises:
        InputError: If the size is beyond a limit.
    """
    if request.crop is not None:
        side = decoder.default_size
        return request.width or side, request.height or side
    if request.extend is not None:
        return extended_size(base_size, request.extend)
    if request.width is not None and request.height is not None:
        return request.width, request.height
    size = fitting_size(base_size, decoder.default_size, decoder.movq_scale_factor**2)
    return check_size("size of the result", size, "add --size")
