"""Pictures, from wherever they are to PIL and from the decoder's tensors to what was asked for."""

from __future__ import annotations

import io
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
from PIL.Image import Image
from torch import Tensor

from kandinsky22.errors import InputError

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
URL_TIMEOUT = 60.0  # seconds without an answer


def load_image(image: str | os.PathLike[str] | Image, convert_method: Callable[[Image], Image] | None = None) -> Image:
    """A picture from a path, an http(s) address or PIL, upright (EXIF orientation applied) and in RGB.

    `convert_method` replaces the conversion to RGB. Raises InputError when there is no readable picture.
    """
    if isinstance(image, Image):
        picture = image
    elif isinstance(image, str | os.PathLike):
        picture = _read(os.fspath(image))
    else:
        raise InputError(f"image: a path, an http(s) address or a PIL image is needed, not {type(image).__name__}")
    upright = PIL.ImageOps.exif_transpose(picture)
    return upright.convert("RGB") if convert_method is None else convert_method(upright)


def _read(place: str) -> Image:
    try:
        if place.startswith(("http://", "https://")):
            request = urllib.request.Request(place, headers={"User-Agent": "kandinsky22"})
            with urllib.request.urlopen(request, timeout=URL_TIMEOUT) as answer:
                picture = PIL.Image.open(io.BytesIO(answer.read()))
        else:
            picture = PIL.Image.open(place)
        picture.load()
    except (OSError, ValueError, PIL.Image.DecompressionBombError) as error:
        raise InputError(f"image {place!r} cannot be read: {error}") from error
    return picture


def make_image_grid(images: Sequence[Image], rows: int, cols: int, resize: int | None = None) -> Image:
    """One RGB picture with `images` row by row, each first made `resize` pixels square if that is given.

    All cells have the size of the first picture. Raises InputError unless there are rows x cols pictures.
    """
    if not images or len(images) != rows * cols:
        raise InputError(f"images: {len(images)} were given for a grid of rows={rows} x cols={cols}")
    if resize is not None:
        images = [image.resize((resize, resize)) for image in images]
    width, height = images[0].size
    grid = PIL.Image.new("RGB", size=(cols * width, rows * height))
    for index, image in enumerate(images):
        grid.paste(image, box=(index % cols * width, index // cols * height))
    return grid


def from_decoder(pictures: Tensor, output_type: str) -> Any:
    """The decoder's pictures (batch, 3, H, W), nominally in [-1, 1], in the form asked for.

    "pt": unchanged, as the reference returns them. "np": an array (batch, H, W, 3), float32 in [0, 1].
    "pil": a list of 8-bit RGB images.
    """
    if output_type == "pt":
        return pictures
    array: np.ndarray[Any, Any] = (pictures * 0.5 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float().cpu().numpy()
    return array if output_type == "np" else to_pil(array)


def to_pil(array: np.ndarray[Any, Any]) -> list[Image]:
    """8-bit RGB images from an array (batch, H, W, 3) in [0, 1]."""
    return [PIL.Image.fromarray(picture) for picture in (array * 255).round().astype(np.uint8)]
