"""Pictures, from wherever they are to PIL and from the decoder's tensors to what was asked for."""

from __future__ import annotations

import io
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from http.client import HTTPException
from typing import Any, TypeAlias

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor

from kandinsky22.errors import InputError
from kandinsky22.inputs import validation

Picture: TypeAlias = str | os.PathLike[str] | Image | np.ndarray[Any, Any] | Tensor
Pictures: TypeAlias = Picture | Sequence[Picture]
Array: TypeAlias = np.ndarray[Any, Any]

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
URL_TIMEOUT = 60.0  # seconds without an answer
OVERSHOOT = 1.5  # how far from 0 pixels in [-1, 1] may lie: decoders leave some a little outside their range


def load_image(image: str | os.PathLike[str] | Image, convert_method: Callable[[Image], Image] | None = None) -> Image:
    """A picture from a path, an http(s) address or PIL, upright (EXIF orientation applied) and in RGB.

    `convert_method` replaces the conversion to RGB. Raises InputError when there is no readable picture.
    """
    upright = opened("image", image)
    return rgb("image", upright) if convert_method is None else convert_method(upright)


def opened(name: str, item: Any) -> Image:
    """The picture at a path or address, or a copy of one in PIL; upright, in the mode it has."""
    try:
        picture = _read(os.fspath(item)) if isinstance(item, str | os.PathLike) else item
        if not isinstance(picture, Image):
            raise InputError(f"{name}: a path, an http(s) address or a PIL image is needed, not {type(item).__name__}")
        if 0 in picture.size:
            raise InputError(
                f"{name} is a picture of {picture.width} x {picture.height} pixels; at least one is needed"
            )
        return PIL.ImageOps.exif_transpose(picture)
    except InputError:
        raise
    except (OSError, ValueError, SyntaxError, HTTPException, PIL.Image.DecompressionBombError) as error:
        raise InputError(f"{name} {item!r} cannot be read: {error}") from error


def _read(place: str) -> Image:
    if not place.startswith(("http://", "https://")):
        return PIL.Image.open(place)
    request = urllib.request.Request(place, headers={"User-Agent": "kandinsky22"})
    with urllib.request.urlopen(request, timeout=URL_TIMEOUT) as answer:
        return PIL.Image.open(io.BytesIO(answer.read()))


def rgb(name: str, picture: Image, mode: str = "RGB") -> Image:
    """The picture in RGB, or in another mode of 8 bits a channel. Transparency is dropped, not blended.

    16-bit modes hold 0 to 65535, mode "F" 0 to 255, mode "I" either: no number above 255 means the latter.
    """
    if picture.mode[0] in "IF":  # PIL would cut everything off at 255
        values = np.asarray(picture, dtype=np.float64)
        top = 255 if picture.mode == "F" or (picture.mode == "I" and values.max() <= 255) else 65535
        if not (values.min() >= 0 and values.max() <= top):
            raise InputError(f"{name}: a PIL image of mode {picture.mode!r} holds 0 to {top}, this one other numbers")
        picture = PIL.Image.fromarray((values * (255 / top)).round().astype(np.uint8))
    try:
        return picture.convert(mode)
    except ValueError as error:
        raise InputError(f"{name}: a PIL image of mode {picture.mode!r} has no conversion to {mode}") from error


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


def each(name: str, value: Any) -> list[tuple[str, Any]]:
    """What a list holds, or the one thing that is no list, each with its name for messages."""
    if not isinstance(value, list | tuple):
        return [(name, value)]
    if not value:
        raise InputError(f"{name}: an empty list was given; at least one picture is needed")
    return [(f"{name}[{index}]", item) for index, item in enumerate(value)]


def pixels(
    name: str, value: Any, size: tuple[int, int], *, signed: bool = False, latents: tuple[int, ...] | None = None
) -> Tensor:
    """Pictures (batch, 3, *size) in [-1, 1], float32; or latents, if tensors of the shape `latents` are given.

    One picture or a list: paths, addresses, PIL images; arrays (H, W), (H, W, C) or (N, H, W, C) of uint8, or of
    floats in [0, 1], C being 1, 3 or 4 (alpha is dropped); tensors (C, H, W) or (N, C, H, W), C being 1 or 3, of
    uint8, or of floats in [0, 1] or, if `signed` or any of them is negative, in [-1, 1]. Another size is resized:
    bicubic, tensors to the nearest pixel. Raises InputError naming the item.
    """
    parts = [_pixels(label, item, size, signed, latents) for label, item in each(name, value)]
    if len({part.shape[1] for part in parts}) > 1:
        raise InputError(f"{name} mixes latents with pictures; one list holds only one kind")
    return torch.cat(parts)


def _pixels(name: str, item: Any, size: tuple[int, int], signed: bool, latents: tuple[int, ...] | None) -> Tensor:
    if not isinstance(item, Tensor):
        return _unit(name, item, size) * 2 - 1
    validation.plain(name, item)
    item = item[None] if item.ndim == 3 else item
    if latents is None or item.ndim != 4 or item.shape[1] != latents[0]:
        values, unit = _values(name, item, size, signed)
        return values * 2 - 1 if unit else values
    if tuple(item.shape[1:]) != latents or len(item) == 0 or not item.is_floating_point():
        raise InputError(f"{name}: {item.dtype} latents of shape {tuple(item.shape)}; this size needs floats {latents}")
    return validation.finite(name, item).detach().float().cpu()


def hints(name: str, value: Any, size: tuple[int, int]) -> Tensor:
    """Hints (batch, 3, *size), float32: tensors of floats as they are, within [-1, 1], everything else in [0, 1].

    The kinds are those of `pixels`.
    """
    return torch.cat(
        [
            _values(label, item, size, True)[0] if isinstance(item, Tensor) else _unit(label, item, size)
            for label, item in each(name, value)
        ]
    )


def _unit(name: str, item: Any, size: tuple[int, int]) -> Tensor:
    """Pixels (n, 3, *size) in [0, 1] from a picture that is no tensor."""
    stack = frames(name, item) if isinstance(item, np.ndarray) else [np.asarray(rgb(name, opened(name, item)))]
    return torch.from_numpy(np.stack([_resized(frame, size) for frame in stack])).permute(0, 3, 1, 2)


def frames(name: str, array: Array) -> Array:
    """(n, H, W, 3), uint8 or float32 in [0, 1], from an array of one or more pictures."""
    stack = array[..., None] if array.ndim == 2 else array
    stack = stack[None] if stack.ndim == 3 else stack
    if stack.ndim != 4 or 0 in stack.shape or stack.shape[3] not in (1, 3, 4):
        raise InputError(
            f"{name} has shape {array.shape}; an array needs (H, W), (H, W, C) or (N, H, W, C), C = 1, 3, 4"
        )
    if stack.dtype != np.uint8:
        if not np.issubdtype(stack.dtype, np.floating):
            raise InputError(f"{name} holds {array.dtype}; an array needs uint8, or floats in [0, 1]")
        if not (stack.min() >= 0 and stack.max() <= 1):
            raise InputError(f"{name} holds {stack.min()} to {stack.max()}; an array of floats needs [0, 1]")
        stack = stack.astype(np.float32)
    return np.broadcast_to(stack[..., :3], (*stack.shape[:3], 3))


def _resized(frame: Array, size: tuple[int, int]) -> Array:
    """(*size, 3), float32 in [0, 1], from one picture (H, W, 3)."""
    planes = [frame] if frame.dtype == np.uint8 else [frame[..., channel] for channel in range(3)]
    scaled = [
        PIL.Image.fromarray(np.ascontiguousarray(plane)).resize(
            size[::-1], PIL.Image.Resampling.BICUBIC, reducing_gap=1
        )
        for plane in planes
    ]
    if frame.dtype == np.uint8:
        return np.asarray(scaled[0], dtype=np.float32) / np.float32(255)
    return np.stack([np.asarray(plane) for plane in scaled], axis=-1).clip(0, 1)


def _values(name: str, item: Tensor, size: tuple[int, int], signed: bool) -> tuple[Tensor, bool]:
    """A tensor's pixels (n, 3, *size), float32, and whether their range is [0, 1] rather than [-1, 1]."""
    validation.plain(name, item)
    stack = item[None] if item.ndim == 3 else item
    if stack.ndim != 4 or 0 in stack.shape or stack.shape[1] not in (1, 3):
        raise InputError(f"{name} has shape {tuple(item.shape)}; a tensor needs (C, H, W) or (N, C, H, W), C = 1 or 3")
    if stack.dtype != torch.uint8 and not stack.is_floating_point():
        raise InputError(f"{name} holds {stack.dtype}; a tensor needs uint8, or floats")
    values = validation.finite(name, stack.detach().float().cpu())
    values = values / 255 if stack.dtype == torch.uint8 else values
    low, high = (float(limit) for limit in values.aminmax())
    unit = stack.dtype == torch.uint8 or not (signed or low < 0)
    if high > (1 if unit else OVERSHOOT) or low < -OVERSHOOT:
        raise InputError(
            f"{name} holds {low:g} to {high:g}; a tensor of floats needs {'[0, 1]' if unit else '[-1, 1]'}"
        )
    return F.interpolate(values, size).expand(-1, 3, -1, -1), unit


def from_decoder(pictures: Tensor, output_type: str, *, unit: bool = False) -> Any:
    """The decoder's pictures (batch, 3, H, W), nominally in [-1, 1], in the form asked for.

    "pt": unchanged, or with `unit` in [0, 1], as the reference returns them. "np": an array (batch, H, W, 3), float32
    in [0, 1]. "pil": a list of 8-bit RGB images.
    """
    if output_type == "pt" and not unit:
        return pictures
    pictures = (pictures * 0.5 + 0.5).clamp(0, 1)
    if output_type == "pt":
        return pictures
    array: Array = pictures.permute(0, 2, 3, 1).float().cpu().numpy()
    return array if output_type == "np" else to_pil(array)


def to_pil(array: np.ndarray[Any, Any]) -> list[Image]:
    """8-bit RGB images from an array (batch, H, W, 3) of uint8, or of floats in [0, 1]."""
    levels = array if array.dtype == np.uint8 else (array * 255).round().astype(np.uint8)
    return [PIL.Image.fromarray(picture) for picture in levels]
