"""Images: reading them into PIL and tensors, and converting the decoder's output to the requested type."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor

from kandinsky22.errors import invalid
from kandinsky22.inputs import sources, validation

Array: TypeAlias = np.ndarray[Any, Any]
ImageInput: TypeAlias = str | os.PathLike[str] | Image | Array | Tensor
ImageInputs: TypeAlias = ImageInput | Sequence[ImageInput]

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
MAX_SIGNED_VALUE = 1.5  # largest absolute value accepted for images in [-1, 1]; decoders overshoot slightly

ARRAY_KINDS = "an array (H, W), (H, W, C) or (N, H, W, C) with C = 1, 3 or 4, of uint8 or of floats in [0, 1]"
TENSOR_KINDS = "a tensor (C, H, W) or (N, C, H, W) with C = 1 or 3, of uint8 or floats"
FILE_KINDS = "a path, an http(s) URL or a PIL image"
IMAGE_KINDS = "a path, an http(s) URL, a PIL image, an array or a tensor, alone or in a list"


# Reading


def load_image(image: str | os.PathLike[str] | Image, convert_method: Callable[[Image], Image] | None = None) -> Image:
    """Return an image from a path, an http(s) URL or PIL, upright (EXIF orientation applied) and in RGB.

    Args:
        image: Path, URL or PIL image.
        convert_method: Function that replaces the conversion to RGB; None converts to RGB.

    Raises:
        InputError: If `image` is not a readable image.
    """
    upright = open_image("image", image)
    return convert_mode("image", upright) if convert_method is None else convert_method(upright)


def open_image(argument: str, source: Any, expected: str = FILE_KINDS) -> Image:
    """Return the image at a path or URL, or a copy of a PIL image; upright, in its original mode.

    Args:
        argument: Name of the argument, for messages.
        source: Path, http(s) URL or PIL image.
        expected: Everything that the argument may be, for messages.

    Raises:
        InputError: If `source` is none of those, empty, or cannot be read.
    """
    if isinstance(source, Image):
        return sources.upright_copy(argument, source)
    location = _location(source)
    if location is None:
        raise invalid(argument, source, expected)
    return sources.decode_image(argument, sources.read_bytes(argument, location), location)


def _location(source: Any) -> str | None:
    """Return a path or an address as a string, or None for anything else."""
    try:
        return os.fsdecode(source) if isinstance(source, str | os.PathLike) else None
    except Exception:  # a class of somebody's whose __fspath__ fails
        return None


def convert_mode(argument: str, image: Image, mode: str = "RGB") -> Image:
    """Return an image in RGB, or in another mode of 8 bits per channel. Transparency is dropped, not blended.

    Args:
        argument: Name of the argument, for messages.
        image: Image of any mode. 16-bit modes hold 0 to 65535 and mode "F" holds 0 to 255. Mode "I" holds 0 to 255 if
            no value is larger, and 0 to 65535 otherwise.
        mode: Name of a PIL mode with 8 bits per channel.

    Raises:
        InputError: If the image holds other values, or if PIL cannot convert its mode.
    """
    if image.mode[0] in "IF":  # PIL would clip all values at 255
        values = np.asarray(image, dtype=np.float64)
        top = 255 if image.mode == "F" or (image.mode == "I" and values.max() <= 255) else 65535
        expected = f"values from 0 to {top} in a PIL image of mode {image.mode!r}"
        validation.values_in_range(argument, values.min(), values.max(), (0, top), expected)
        image = PIL.Image.fromarray((values * (255 / top)).round().astype(np.uint8))
    try:
        return image.convert(mode)
    except Exception as error:  # PIL raises several classes
        raise invalid(f"{argument}.mode", image.mode, f"a mode that PIL converts to {mode}") from error


def labelled_items(argument: str, value: Any) -> list[tuple[str, Any]]:
    """Return the items of a list, or one single item, each with its name for messages.

    Args:
        argument: Name of the argument.
        value: A non-empty list or tuple, or anything else as a single item.

    Returns:
        Pairs of name and item, such as ("image[0]", item).

    Raises:
        InputError: If `value` is an empty list.
    """
    if not isinstance(value, list | tuple):
        return [(argument, value)]
    items = validation.listed(argument, value)
    if not items:
        raise invalid(argument, value, "at least one item")
    return [(f"{argument}[{index}]", item) for index, item in enumerate(items)]


# Conversion to tensors


def images_to_tensor(
    argument: str,
    value: Any,
    size: tuple[int, int],
    *,
    signed: bool = False,
    latent_shape: tuple[int, ...] | None = None,
) -> Tensor:
    """Return images as a tensor (batch, 3, height, width) in [-1, 1], float32; latents are returned as they are.

    Images of another size are resized: arrays and PIL images with a bicubic filter, tensors to the nearest pixel.

    Args:
        argument: Name of the argument, for messages.
        value: One image or a list of them. An image is a path, an http(s) URL or a PIL image of any mode; an array
            (H, W), (H, W, C) or (N, H, W, C) with C = 1, 3 or 4 (alpha is dropped), of uint8 or of floats in [0, 1];
            or a tensor (C, H, W) or (N, C, H, W) with C = 1 or 3, of uint8, of floats in [0, 1], or of floats in
            [-1, 1] if `signed` or if any value is negative.
        size: Height and width of the result in pixels.
        signed: Whether float tensors are in [-1, 1] even if no value is negative.
        latent_shape: Shape (channels, height, width) of latents that are accepted instead of images, as tensors
            (channels, height, width) or (N, channels, height, width); None accepts no latents.

    Returns:
        Images (batch, 3, *size) in [-1, 1], or latents (batch, *latent_shape), float32 on the CPU.

    Raises:
        InputError: If an item is not such an image, or if the list mixes images and latents.
    """
    tensors = [
        _image_or_latents(label, item, size, signed, latent_shape) for label, item in labelled_items(argument, value)
    ]
    channels = sorted({tensor.shape[1] for tensor in tensors})
    if len(channels) > 1:
        raise invalid(f"channels of {argument}", channels, "either images or latents", "do not mix them in one list")
    return torch.cat(tensors)


def _image_or_latents(
    argument: str, item: Any, size: tuple[int, int], signed: bool, latent_shape: tuple[int, ...] | None
) -> Tensor:
    if not isinstance(item, Tensor):
        return _unit_range_pixels(argument, item, size) * 2 - 1
    validation.dense(argument, item)
    batch = item[None] if item.ndim == 3 else item
    if latent_shape is None or batch.ndim != 4 or batch.shape[1] != latent_shape[0]:
        pixels, unit_range = _tensor_pixels(argument, item, size, signed)
        return pixels * 2 - 1 if unit_range else pixels
    if tuple(batch.shape[1:]) != latent_shape or len(batch) == 0 or not batch.is_floating_point():
        raise invalid(argument, item, f"floating-point latents of shape (n, {', '.join(map(str, latent_shape))})")
    return validation.finite_tensor(argument, batch).detach().float().cpu()


def hints_to_tensor(argument: str, value: Any, size: tuple[int, int]) -> Tensor:
    """Return ControlNet hints as a tensor (batch, 3, height, width), float32.

    Args:
        argument: Name of the argument, for messages.
        value: One hint or a list of them, of the kinds that `images_to_tensor` accepts.
        size: Height and width of the result in pixels. Hints of another size are resized like images.

    Returns:
        Hints (batch, 3, *size). Float tensors keep their values, which must be in [-1, 1]; everything else is
        converted to [0, 1].

    Raises:
        InputError: If an item is not a hint.
    """
    return torch.cat(
        [
            _tensor_pixels(label, item, size, True)[0]
            if isinstance(item, Tensor)
            else _unit_range_pixels(label, item, size)
            for label, item in labelled_items(argument, value)
        ]
    )


def _unit_range_pixels(argument: str, item: Any, size: tuple[int, int]) -> Tensor:
    """Pixels (n, 3, *size) in [0, 1] from an array, a PIL image, a path or a URL."""
    if isinstance(item, np.ndarray):
        images = list(array_to_rgb(argument, item))
    else:
        images = [np.asarray(convert_mode(argument, open_image(argument, item, IMAGE_KINDS)))]
    return torch.from_numpy(np.stack([resize_array(image, size) for image in images])).permute(0, 3, 1, 2)


def array_to_rgb(argument: str, array: Array) -> Array:
    """Return an array (n, H, W, 3) of uint8, or of float32 in [0, 1].

    Args:
        argument: Name of the argument, for messages.
        array: One or more images (H, W), (H, W, C) or (N, H, W, C) with C = 1, 3 or 4, of uint8 or of floats in
            [0, 1]. A fourth channel (alpha) is dropped, a single one is repeated.

    Raises:
        InputError: If the array has another shape, dtype or range, or masked values.
    """
    array = validation.plain_array(argument, array)
    batch = array[..., None] if array.ndim == 2 else array
    batch = batch[None] if batch.ndim == 3 else batch
    if batch.ndim != 4 or 0 in batch.shape or batch.shape[3] not in (1, 3, 4):
        raise invalid(argument, array, ARRAY_KINDS)
    validation.pixel_count(argument, array, batch.shape[:3])
    if batch.dtype != np.uint8:
        if not np.issubdtype(batch.dtype, np.floating):
            raise invalid(argument, array, ARRAY_KINDS)
        validation.values_in_range(argument, batch.min(), batch.max(), (0, 1), "floats in [0, 1]")
        batch = batch.astype(np.float32)
    return np.broadcast_to(batch[..., :3], (*batch.shape[:3], 3))


def _tensor_pixels(argument: str, item: Tensor, size: tuple[int, int], signed: bool) -> tuple[Tensor, bool]:
    """Pixels (n, 3, *size) of a tensor, float32, and whether their range is [0, 1] rather than [-1, 1]."""
    validation.dense(argument, item)
    batch = item[None] if item.ndim == 3 else item
    if batch.ndim != 4 or 0 in batch.shape or batch.shape[1] not in (1, 3):
        raise invalid(argument, item, TENSOR_KINDS)
    if batch.dtype != torch.uint8 and not batch.is_floating_point():
        raise invalid(argument, item, TENSOR_KINDS)
    validation.pixel_count(argument, item, (batch.shape[0], *batch.shape[2:]))
    pixels = validation.finite_tensor(argument, batch.detach().float().cpu())
    pixels = pixels / 255 if batch.dtype == torch.uint8 else pixels
    low, high = (float(extreme) for extreme in pixels.aminmax())
    unit_range = batch.dtype == torch.uint8 or not (signed or low < 0)
    limits = (-MAX_SIGNED_VALUE, 1 if unit_range else MAX_SIGNED_VALUE)
    validation.values_in_range(argument, low, high, limits, f"floats in {'[0, 1]' if unit_range else '[-1, 1]'}")
    return resize_tensor(pixels, size).expand(-1, 3, -1, -1), unit_range


def pictures_at_their_size(argument: str, value: Any) -> list[Image]:
    """Return images as PIL images in RGB, not resized.

    Args:
        argument: Name of the argument, for messages.
        value: One image or a list of them, of the kinds that `images_to_tensor` accepts. Float tensors are in [-1, 1].

    Raises:
        InputError: If an item is not an image.
    """
    return [image for label, item in labelled_items(argument, value) for image in _pictures(label, item)]


def _pictures(argument: str, item: Any) -> list[Image]:
    if isinstance(item, np.ndarray):
        return array_to_pil(array_to_rgb(argument, item))
    if not isinstance(item, Tensor):
        return [convert_mode(argument, open_image(argument, item, IMAGE_KINDS))]
    validation.dense(argument, item)
    height, width = item.shape[-2:] if item.ndim >= 2 else (0, 0)
    pixels, unit_range = _tensor_pixels(argument, item, (height, width), True)
    unit_pixels = pixels if unit_range else (pixels * 0.5 + 0.5).clamp(0, 1)
    return array_to_pil(unit_pixels.permute(0, 2, 3, 1).numpy())


# Resizing


def resize_array(image: Array, size: tuple[int, int]) -> Array:
    """Return an image resized by PIL's bicubic filter.

    Args:
        image: Array (H, W, 3) of uint8, or of float32 in [0, 1].
        size: Height and width of the result in pixels.

    Returns:
        Array (*size, 3), float32 in [0, 1].
    """
    is_uint8 = image.dtype == np.uint8
    planes = [image] if is_uint8 else [image[..., channel] for channel in range(3)]  # PIL has no RGB mode of floats
    resized = [
        PIL.Image.fromarray(np.ascontiguousarray(plane)).resize(
            size[::-1], PIL.Image.Resampling.BICUBIC, reducing_gap=1
        )
        for plane in planes
    ]
    if is_uint8:
        return np.asarray(resized[0], dtype=np.float32) / np.float32(255)
    return np.stack([np.asarray(plane) for plane in resized], axis=-1).clip(0, 1)


def resize_tensor(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Return images resized to the nearest pixel.

    Args:
        images: Tensor (n, channels, H, W).
        size: Height and width of the result in pixels.
    """
    return F.interpolate(images, size)


# Output


def to_output_type(images: Tensor, output_type: str, *, unit_range: bool = False) -> Tensor | Array | list[Image]:
    """Return the decoder's images in the requested form.

    Args:
        images: Tensor (batch, 3, H, W), nominally in [-1, 1].
        output_type: "pt" for a tensor, "np" for an array (batch, H, W, 3) of float32 in [0, 1], "pil" for a list of
            8-bit RGB images.
        unit_range: Whether "pt" gives values in [0, 1]; False returns `images` unchanged, as the reference does in
            some modes.
    """
    if output_type == "pt" and not unit_range:
        return images
    images = (images * 0.5 + 0.5).clamp(0, 1)
    if output_type == "pt":
        return images
    array: Array = images.permute(0, 2, 3, 1).float().cpu().numpy()
    return array if output_type == "np" else array_to_pil(array)


def array_to_pil(array: Array) -> list[Image]:
    """Return 8-bit RGB images.

    Args:
        array: Images (batch, H, W, 3) of uint8, or of floats in [0, 1].
    """
    pixels = array if array.dtype == np.uint8 else (array * 255).round().astype(np.uint8)
    return [PIL.Image.fromarray(image) for image in pixels]


def make_image_grid(images: Sequence[Image], rows: int, cols: int, resize: int | None = None) -> Image:
    """Return one RGB image that shows `images` row by row, in cells of the size of the first image.

    Args:
        images: PIL images, exactly `rows` times `cols`.
        rows: Number of rows.
        cols: Number of columns.
        resize: Side in pixels of the squares that the images are resized to first; None leaves them as they are.

    Raises:
        InputError: If the number of images does not fill the grid, or is 0.
    """
    rows, cols = (validation.positive_int(name, value) for name, value in (("rows", rows), ("cols", cols)))
    items: Any = images
    if not isinstance(items, list | tuple) or not all(isinstance(item, Image) for item in items):
        raise invalid("images", images, "a list of PIL images")
    if len(images) != rows * cols:
        raise invalid("len(images)", len(images), f"rows x cols = {rows} x {cols}, and at least one, to fill the grid")
    if resize is not None:
        side = validation.positive_int("resize", resize, validation.MAX_SIDE)
        images = [image.resize((side, side)) for image in images]
    width, height = images[0].size
    grid = PIL.Image.new("RGB", size=(cols * width, rows * height))
    for index, image in enumerate(images):
        grid.paste(image, box=(index % cols * width, index // cols * height))
    return grid
