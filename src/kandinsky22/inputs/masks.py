"""Inpainting masks: conversion to tensors, the latents that a mask leaves unchanged, and crops around a mask."""

from __future__ import annotations

import dataclasses
import logging
import numbers
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor

from kandinsky22.errors import invalid
from kandinsky22.inputs import images, validation

logger = logging.getLogger(__name__)

LUMA = (0.299, 0.587, 0.114)  # weights of red, green and blue in brightness (ITU-R BT.601), as in PIL

# Offsets (down, right) of the neighbours that extend a repainted latent: six of the eight, because the published
# inpainting UNet was trained with these.
NEIGHBOURS = ((-1, -1), (-1, 0), (0, -1), (0, 1), (1, 0), (1, 1))

MASK_KINDS = "booleans, integers or floats of shape (H, W), (N, H, W), (N, 1, H, W) or (N, H, W, 1)"


def masks_to_tensor(argument: str, value: Any, size: tuple[int, int]) -> Tensor:
    """Return masks as a tensor (batch, 1, height, width), float32: 1 where the image is repainted, 0 elsewhere.

    Masks are white (repaint) and black; half brightness and above counts as white. Transparent parts are black: masks
    are laid over black. A mask that is black everywhere is reported by a warning.
    Masks of another size are resized: PIL images with a Lanczos filter, arrays and tensors to the nearest pixel.

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
        mask, maximum = images.resize_tensor((brightness >= 0.5).float(), size), float(brightness.max())
    else:
        image = _open_mask(argument, item)
        resized = np.asarray(resize_mask(image, size))
        mask, maximum = (
            torch.from_numpy(resized >= 127.5).float()[None, None],
            np.asarray(image.convert("L")).max() / 255,
        )
    if not mask.any():
        _warn_about_black_mask(argument, maximum)
    return mask


def _warn_about_black_mask(argument: str, maximum: float) -> None:
    """Log that a mask repaints nothing, which is rarely intended."""
    advice = ""
    if 0 < maximum < 2 / 255:
        advice = "; its values are 0 and 1 of 255, multiply them by 255"
    elif 0 < maximum < 0.5:
        advice = f"; its largest value is {maximum:.0%} of white, and white begins at 50%"
    logger.warning("%s is black everywhere: nothing is repainted%s", argument, advice)


def _open_mask(argument: str, item: Any) -> Image:
    """Return the mask at a path or URL, or a PIL image, in mode "1", "L" or "RGB". Transparent parts become black."""
    image = images.open_image(argument, item, images.IMAGE_KINDS)
    if image.has_transparency_data and image.mode[0] not in "IF":
        visible = images.convert_mode(argument, image, "RGBA")
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", visible.size, "black"), visible).convert("RGB")
    return image if image.mode in ("1", "RGB") else images.convert_mode(argument, image, "L")


def resize_mask(mask: Image, size: tuple[int, int]) -> Image:
    """Return a mask resized by PIL's Lanczos filter, in 8 bits of grey.

    Args:
        mask: PIL image of mode "1", "L" or "RGB".
        size: Height and width of the result in pixels.
    """
    return mask.resize(size[::-1], PIL.Image.Resampling.LANCZOS).convert("L")


def _channels_first(argument: str, item: Any) -> Tensor:
    """One or more masks, an array or a tensor, as a tensor (n, C, H, W)."""
    if isinstance(item, Tensor):
        validation.dense(argument, item)
    validation.pixel_count(argument, item, item.shape)
    is_array = isinstance(item, np.ndarray)
    try:
        masks: Tensor = (
            torch.from_numpy(
                np.array(validation.plain_array(argument, item, MASK_KINDS), dtype=item.dtype.newbyteorder("="))
            )
            if is_array
            else item.detach().cpu()
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
        alpha = values[:, 3:] / top if masks.shape[1] == 4 else 1
        values = (values[:, :3] * torch.tensor(LUMA, dtype=values.dtype).view(3, 1, 1)).sum(dim=1, keepdim=True) * alpha
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


# Crops around a mask


class CropRegion(NamedTuple):
    """A rectangle of an image, in pixels from its upper left corner, as PIL's `crop` and `paste` take it.

    Attributes:
        left: First column.
        top: First row.
        right: Column after the last.
        bottom: Row after the last.
    """

    left: int
    top: int
    right: int
    bottom: int

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.right - self.left, self.bottom - self.top


@dataclasses.dataclass(frozen=True)
class MaskCrop:
    """The part of a picture around its mask, enlarged or reduced to the size at which it is repainted.

    Attributes:
        picture: The entire picture, RGB.
        mask: Its mask, mode "L", of the same size.
        region: The part that is repainted.
        size: Height and width at which it is repainted.
    """

    picture: Image
    mask: Image
    region: CropRegion
    size: tuple[int, int]

    def cropped_picture(self) -> Image:
        """Return the part of the picture at `size`."""
        return self._fitted(self.picture)

    def cropped_mask(self) -> Image:
        """Return the part of the mask at `size`."""
        return self._fitted(self.mask)

    def paste(self, repainted: Image) -> Image:
        """Return the entire picture with the repainted part where the mask is white, blended where it is grey.

        Args:
            repainted: The repainted part, RGB, at `size`.
        """
        part = repainted.crop(self._window()).resize(self.region.size, PIL.Image.Resampling.LANCZOS)
        result = self.picture.copy()
        result.paste(part, self.region[:2], self.mask.crop(self.region))
        return result

    def _window(self) -> CropRegion:
        """Return the rectangle of an image of `size` that the region fills, centred, with its proportions."""
        height, width = self.size
        fitted = fitted_size(self.region.size, (width, height))
        left, top = width // 2 - fitted[0] // 2, height // 2 - fitted[1] // 2
        return CropRegion(left, top, left + fitted[0], top + fitted[1])

    def _fitted(self, image: Image) -> Image:
        """Return the region of an image at `size`; a margin repeats the pixels of the border."""
        window = self._window()
        part = image.crop(self.region).resize(window.size, PIL.Image.Resampling.LANCZOS)
        return with_margins(part, (window.left, window.top), self.size[::-1])


def fitted_size(size: tuple[int, int], frame: tuple[int, int], *, cover: bool = False) -> tuple[int, int]:
    """Return width and height of an image that is scaled to a frame without a change of its proportions.

    Args:
        size: Width and height of the image.
        frame: Width and height of the frame.
        cover: Whether the image covers the frame instead of lying inside it.
    """
    (width, height), (frame_width, frame_height) = size, frame
    if (width * frame_height > height * frame_width) == cover:
        return max(width * frame_height // height, 1), frame_height
    return frame_width, max(height * frame_width // width, 1)


def with_margins(image: Image, position: tuple[int, int], frame: tuple[int, int]) -> Image:
    """Return an image in a larger frame that repeats the pixels of its border.

    Args:
        image: The image.
        position: Columns to the left of the image, and rows above it.
        frame: Width and height of the frame.
    """
    pixels, (left, top) = np.asarray(image), position
    margins = ((top, frame[1] - top - image.height), (left, frame[0] - left - image.width), (0, 0))
    return PIL.Image.fromarray(np.pad(pixels, margins[: pixels.ndim], mode="edge"))


def crop_region(mask: Image, size: tuple[int, int], padding: int = 0) -> CropRegion:
    """Return the rectangle around everything in a mask that is not black, in the proportions of `size` if it fits.

    Args:
        mask: Mask of mode "L", not black everywhere.
        size: Height and width at which the rectangle is repainted.
        padding: Pixels of the image around the mask.

    Raises:
        InputError: If the mask is black everywhere, or if `padding` is not an integer of at least 0.
    """
    padding = crop_padding(padding)
    box = mask.convert("L").getbbox()
    if box is None:
        raise invalid("mask_image", mask, "a mask with white pixels", "nothing would be repainted")
    padding = min(padding, max(mask.size))  # more would change nothing
    left, right = max(box[0] - padding, 0), min(box[2] + padding, mask.width)
    top, bottom = max(box[1] - padding, 0), min(box[3] + padding, mask.height)
    left, right = _widened(left, right, (bottom - top) * size[1] // size[0], mask.width)
    top, bottom = _widened(top, bottom, (right - left) * size[0] // size[1], mask.height)
    return CropRegion(left, top, right, bottom)


def crop_padding(padding: Any) -> int:
    """Return a valid `padding_mask_crop`.

    Args:
        padding: Its value.

    Raises:
        InputError: If it is not an integer of at least 0.
    """
    if isinstance(padding, bool) or not isinstance(padding, numbers.Integral) or int(padding) < 0:
        raise invalid("padding_mask_crop", padding, "an integer of at least 0")
    return int(padding)


def _widened(start: int, stop: int, length: int, limit: int) -> tuple[int, int]:
    """Return an interval of at least this length around another one, moved and cut to lie between 0 and `limit`."""
    missing = max(length - (stop - start), 0)
    start = max(min(start - missing // 2, limit - max(length, stop - start)), 0)
    return start, min(start + max(length, stop - start), limit)


def mask_crops(image: Any, mask_image: Any, size: tuple[int, int], padding: int) -> list[MaskCrop]:
    """Return the crops of pictures around their masks.

    Args:
        image: One picture or a list of them, of the kinds that `images.images_to_tensor` reads, except latents. Float
            tensors are in [-1, 1].
        mask_image: One mask for all pictures, or one per picture, of the kinds that `masks_to_tensor` reads. A mask
            of another size than its picture is resized.
        size: Height and width at which the crops are repainted.
        padding: Pixels of the picture around its mask.

    Raises:
        InputError: If an item is not a picture or a mask, the numbers differ, a mask is black everywhere, or `padding`
            is not an integer of at least 0.
    """
    pictures = images.pictures_at_their_size("image", image)
    grey = [mask for label, item in images.labelled_items("mask_image", mask_image) for mask in _grey(label, item)]
    count = max(len(pictures), len(grey))
    if len(pictures) not in (1, count) or len(grey) not in (1, count):
        raise invalid("len(mask_image)", len(grey), f"1 or {len(pictures)}, one per image")
    crops = []
    for picture, mask in zip(pictures * (count // len(pictures)), grey * (count // len(grey)), strict=True):
        full_mask = resize_mask(mask, (picture.height, picture.width))
        crops.append(MaskCrop(picture, full_mask, crop_region(full_mask, size, padding), size))
    return crops


def _grey(argument: str, item: Any) -> list[Image]:
    """Return the masks of one item at their own size, mode "L"."""
    if not isinstance(item, np.ndarray | Tensor):
        mask = _open_mask(argument, item)
        return [resize_mask(mask, (mask.height, mask.width))]
    brightness = _brightness(argument, _channels_first(argument, item))
    return [PIL.Image.fromarray((mask[0] * 255).round().byte().numpy()) for mask in brightness]
