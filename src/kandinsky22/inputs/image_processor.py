"""The image processor of the reference: images to tensors in [-1, 1] and back.

The pipelines do not need it: they read images themselves (`inputs.images`). Scripts use it to prepare tensors.
"""

from __future__ import annotations

import types
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageFilter
import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor

from kandinsky22.errors import invalid
from kandinsky22.inputs import images, masks, validation
from kandinsky22.inputs.images import Array

RESAMPLING = {
    "linear": PIL.Image.Resampling.BILINEAR,
    "bilinear": PIL.Image.Resampling.BILINEAR,
    "bicubic": PIL.Image.Resampling.BICUBIC,
    "lanczos": PIL.Image.Resampling.LANCZOS,
    "nearest": PIL.Image.Resampling.NEAREST,
}
RESIZE_MODES = ("default", "fill", "crop")
PIXEL_KINDS = "one or more images with 2 to 4 dimensions, of floats, booleans or uint8"


class VaeImageProcessor:
    """Convert images to tensors of an autoencoder, and its tensors to images.

    Args:
        do_resize: Whether `preprocess` resizes images to multiples of `vae_scale_factor`.
        vae_scale_factor: Pixels per latent along each side.
        vae_latent_channels: Channels of latents, which `preprocess` returns unchanged.
        resample: Filter for PIL images, one of `RESAMPLING`.
        reducing_gap: PIL's option for fast reduction; None for the exact result.
        do_normalize: Whether tensors are in [-1, 1] instead of [0, 1].
        do_binarize: Whether values become 0 and 1.
        do_convert_rgb: Whether PIL images are converted to RGB.
        do_convert_grayscale: Whether PIL images are converted to grey.

    Attributes:
        config: The arguments.
    """

    def __init__(
        self,
        do_resize: bool = True,
        vae_scale_factor: int = 8,
        vae_latent_channels: int = 4,
        resample: str = "lanczos",
        reducing_gap: float | None = None,
        do_normalize: bool = True,
        do_binarize: bool = False,
        do_convert_rgb: bool = False,
        do_convert_grayscale: bool = False,
    ) -> None:
        validation.one_of("resample", resample, tuple(RESAMPLING))
        validation.positive_int("vae_scale_factor", vae_scale_factor)
        if do_convert_rgb and do_convert_grayscale:
            raise invalid("do_convert_grayscale", True, "False with do_convert_rgb=True")
        self.config = types.SimpleNamespace(
            do_resize=do_resize,
            vae_scale_factor=vae_scale_factor,
            vae_latent_channels=vae_latent_channels,
            resample=resample,
            reducing_gap=reducing_gap,
            do_normalize=do_normalize,
            do_binarize=do_binarize,
            do_convert_rgb=do_convert_rgb,
            do_convert_grayscale=do_convert_grayscale,
        )

    # Conversions

    @staticmethod
    def numpy_to_pil(images: Array) -> list[Image]:
        """Return PIL images.

        Args:
            images: One image (H, W, C) or several (N, H, W, C) in [0, 1], with C = 1 or 3.

        Raises:
            InputError: If `images` is not such an array, or has values that are not finite or outside [0, 1].
        """
        batch = _checked_pixels(images)
        pixels = (batch * 255).round().astype(np.uint8)
        return [PIL.Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image) for image in pixels]

    @staticmethod
    def pil_to_numpy(images: Image | list[Image]) -> Array:
        """Return an array (N, H, W) or (N, H, W, C) in [0, 1].

        Args:
            images: One PIL image, or several of the same size and mode.

        Raises:
            InputError: If sizes or modes differ.
        """
        return _pil_array("images", images if isinstance(images, list) else [images])

    @staticmethod
    def numpy_to_pt(images: Array) -> Tensor:
        """Return a tensor (N, C, H, W).

        Args:
            images: Array (N, H, W, C) or (N, H, W).
        """
        return torch.from_numpy((images[..., None] if images.ndim == 3 else images).transpose(0, 3, 1, 2))

    @staticmethod
    def pt_to_numpy(images: Tensor) -> Array:
        """Return an array (N, H, W, C) of float32.

        Args:
            images: Tensor (N, C, H, W).
        """
        array: Array = images.detach().cpu().permute(0, 2, 3, 1).float().numpy()
        return array

    @staticmethod
    def normalize(images: Any) -> Any:
        """Return values in [-1, 1].

        Args:
            images: Array or tensor in [0, 1].
        """
        return 2.0 * images - 1.0

    @staticmethod
    def denormalize(images: Any) -> Any:
        """Return values in [0, 1].

        Args:
            images: Array or tensor in [-1, 1]; values beyond are clipped.
        """
        return (images * 0.5 + 0.5).clip(0, 1)

    @staticmethod
    def convert_to_rgb(image: Image) -> Image:
        """Return an image in RGB.

        Args:
            image: PIL image.
        """
        return image.convert("RGB")

    @staticmethod
    def convert_to_grayscale(image: Image) -> Image:
        """Return an image in grey, mode "L".

        Args:
            image: PIL image.
        """
        return image.convert("L")

    @staticmethod
    def blur(image: Image, blur_factor: int = 4) -> Image:
        """Return a blurred image, for example a mask with soft edges.

        Args:
            image: PIL image.
            blur_factor: Standard deviation of the Gaussian in pixels.
        """
        return image.filter(PIL.ImageFilter.GaussianBlur(blur_factor))

    @staticmethod
    def binarize(image: Any) -> Any:
        """Return 0 for values below 0.5, and 1 for the others.

        Args:
            image: Array or tensor in [0, 1].
        """
        ones = image >= 0.5
        return ones.to(image.dtype) if isinstance(ones, Tensor) else ones.astype(image.dtype)

    @staticmethod
    def get_crop_region(mask_image: Image, width: int, height: int, pad: int = 0) -> tuple[int, int, int, int]:
        """Return left, top, right and bottom of the rectangle around a mask, see `masks.crop_region`.

        Args:
            mask_image: PIL image, not black everywhere.
            width: Width at which the rectangle is repainted, which gives its proportions.
            height: Height likewise.
            pad: Pixels around the mask.
        """
        return tuple(masks.crop_region(mask_image.convert("L"), (height, width), pad))  # type: ignore[return-value]

    # Resizing

    def get_default_height_width(
        self, image: Any, height: int | None = None, width: int | None = None
    ) -> tuple[int, int]:
        """Return height and width, reduced to multiples of `vae_scale_factor`.

        Args:
            image: PIL image, array (N, H, W) or (N, H, W, C), or tensor (N, C, H, W).
            height: Height in pixels; None for that of the image.
            width: Width in pixels; None for that of the image.

        Raises:
            InputError: If a side is not an integer, or is below `vae_scale_factor`.
        """
        if isinstance(image, Image):
            own_height, own_width = image.height, image.width
        else:
            own_height, own_width = image.shape[2:4] if isinstance(image, Tensor) else image.shape[1:3]
        factor, sides = self.config.vae_scale_factor, []
        for name, side, own_side in (("height", height, own_height), ("width", width, own_width)):
            argument, pixels = (f"{name} of image", own_side) if side is None else (name, side)
            if validation.positive_int(argument, pixels) < factor:
                raise invalid(argument, pixels, f"at least {factor} pixels, the side of a latent")
            sides.append(int(pixels) - int(pixels) % factor)
        return sides[0], sides[1]

    def resize(self, image: Any, height: int, width: int, resize_mode: str = "default") -> Any:
        """Return an image or a batch of images in another size.

        Args:
            image: PIL image, array (N, H, W, C) or tensor (N, C, H, W). Arrays and tensors are resized to the nearest
                pixel.
            height: Height in pixels.
            width: Width in pixels.
            resize_mode: For PIL images: "default" stretches the image, "fill" keeps its proportions and repeats its
                border, "crop" keeps its proportions and cuts off what is outside.

        Raises:
            InputError: If the size is invalid, or the mode is unknown or not available for this kind of image.
        """
        size = validation.positive_int("height", height), validation.positive_int("width", width)
        validation.pixel_count("(height, width)", size, (1, *size))
        accepted = RESIZE_MODES if isinstance(image, Image) else RESIZE_MODES[:1]
        validation.one_of("resize_mode", resize_mode, accepted)
        if isinstance(image, Tensor):
            return F.interpolate(image, (height, width))
        if not isinstance(image, Image):
            return self.pt_to_numpy(F.interpolate(self.numpy_to_pt(image), (height, width)))
        resample = RESAMPLING[self.config.resample]
        if resize_mode == "default":
            return image.resize((width, height), resample, reducing_gap=self.config.reducing_gap)
        fitted = masks.fitted_size(image.size, (width, height), cover=resize_mode == "crop")
        resized = image.resize(fitted, resample)
        left, top = width // 2 - fitted[0] // 2, height // 2 - fitted[1] // 2
        if resize_mode == "crop":
            return resized.crop((-left, -top, width - left, height - top)).convert("RGB")
        return masks.with_margins(resized, (left, top), (width, height)).convert("RGB")

    # Whole images

    def preprocess(
        self,
        image: Any,
        height: int | None = None,
        width: int | None = None,
        resize_mode: str = "default",
        crops_coords: tuple[int, int, int, int] | None = None,
    ) -> Tensor:
        """Return images as a tensor (N, C, H, W), in [-1, 1] if `do_normalize`.

        Args:
            image: One image or a list: PIL images, arrays (H, W), (H, W, C) or (N, H, W, C), or tensors (H, W),
                (C, H, W) or (N, C, H, W). Arrays and tensors hold floats in [0, 1], booleans, or uint8, which is
                divided by 255. Floats in [-1, 1] are not normalised again. Tensors of floats with `vae_latent_channels`
                channels are latents and returned as they are.
            height: Height in pixels; None for that of the image.
            width: Width in pixels; None for that of the image.
            resize_mode: See `resize`.
            crops_coords: Left, top, right and bottom of the part of PIL images to use; None for all of it.

        Raises:
            InputError: If the images are of another kind, or of different kinds or sizes, or smaller than
                `vae_scale_factor` if they are resized, or if another argument is invalid.
        """
        items = image if isinstance(image, list) else [image]
        kind = next((kind for kind in (Image, np.ndarray, Tensor) if items and isinstance(items[0], kind)), None)
        if kind is None or not all(isinstance(item, Image | np.ndarray | Tensor) for item in items):
            raise invalid("image", image, "PIL images, arrays or tensors")
        if not all(isinstance(item, kind) for item in items):
            raise invalid("image", image, "images of one kind in one list")
        if kind is Image:
            pixels = self._pil_pixels(items, height, width, resize_mode, crops_coords)
        else:
            pixels = _stacked(items)
            if kind is Tensor and pixels.shape[1] == self.config.vae_latent_channels:
                if not items[0].is_floating_point():
                    raise invalid("image", image, f"latents of floats, as there are {pixels.shape[1]} channels")
                return pixels
            if self.config.do_resize:
                pixels = self.resize(pixels, *self.get_default_height_width(pixels, height, width))
        if self.config.do_normalize:
            low, high = float(pixels.min()), float(pixels.max())
            limits = (-images.MAX_SIGNED_VALUE, images.MAX_SIGNED_VALUE)
            validation.values_in_range("image", low, high, limits, "values in [0, 1], or in [-1, 1]")
            pixels = pixels if low < 0 else self.normalize(pixels)
        return self.binarize(pixels) if self.config.do_binarize else pixels

    def _pil_pixels(
        self,
        items: list[Image],
        height: int | None,
        width: int | None,
        resize_mode: str,
        crops_coords: tuple[int, int, int, int] | None,
    ) -> Tensor:
        """PIL images as a tensor (N, C, H, W) in [0, 1]."""
        if crops_coords is not None:
            items = [item.crop(_checked_box(crops_coords)) for item in items]
        if self.config.do_resize:
            size = self.get_default_height_width(items[0], height, width)
            items = [self.resize(item, *size, resize_mode=resize_mode) for item in items]
        if self.config.do_convert_rgb:
            items = [self.convert_to_rgb(item) for item in items]
        elif self.config.do_convert_grayscale:
            items = [self.convert_to_grayscale(item) for item in items]
        return self.numpy_to_pt(_pil_array("image", items))

    def postprocess(self, image: Tensor, output_type: str = "pil", do_denormalize: list[bool] | None = None) -> Any:
        """Return decoded images in the requested form.

        Args:
            image: Tensor (N, C, H, W), in [-1, 1] if `do_normalize`.
            output_type: "pil", "np" (N, H, W, C), "pt" (N, C, H, W), or "latent" for the tensor as it is.
            do_denormalize: Whether each image is in [-1, 1]; None for `do_normalize` of all.

        Raises:
            InputError: If `image` is not such a tensor, the type is unknown, or the number of `do_denormalize` differs
                from that of the images.
        """
        if not isinstance(image, Tensor):
            raise invalid("image", image, "a tensor (N, C, H, W)")
        validation.one_of("output_type", output_type, images.OUTPUT_TYPES)
        if output_type == "latent":
            return image
        if validation.dense("image", image).ndim != 4 or 0 in image.shape or not image.is_floating_point():
            raise invalid("image", image, "a tensor of floats (N, C, H, W)")
        signed: Any = [self.config.do_normalize] * len(image) if do_denormalize is None else do_denormalize
        if not isinstance(signed, list | tuple) or not all(isinstance(flag, bool | np.bool_) for flag in signed):
            raise invalid("do_denormalize", signed, "a list of booleans, or None")
        if len(signed) != len(image):
            raise invalid("len(do_denormalize)", len(signed), f"{len(image)}, one per image")
        pixels = torch.stack(
            [self.denormalize(item) if flag else item for item, flag in zip(image, signed, strict=True)]
        )
        if output_type == "pt":
            return pixels
        array = self.pt_to_numpy(pixels)
        return array if output_type == "np" else self.numpy_to_pil(array)

    def apply_overlay(
        self, mask: Image, init_image: Image, image: Image, crop_coords: tuple[int, int, int, int] | None = None
    ) -> Image:
        """Return an image with another one laid over it where a mask is white.

        Args:
            mask: PIL image of the size of `init_image`.
            init_image: The image that shows where the mask is black.
            image: The image that shows where the mask is white.
            crop_coords: Left, top, right and bottom of the part of `init_image` that `image` covers; None for all.
        """
        result = init_image.convert("RGB")
        overlay = image
        if crop_coords is not None:
            left, top, right, bottom = crop_coords
            overlay = PIL.Image.new("RGB", result.size)
            overlay.paste(self.resize(image, bottom - top, right - left, resize_mode="crop"), (left, top))
        result.paste(overlay.convert("RGB"), mask=mask.convert("L"))
        return result


def _pil_array(argument: str, items: list[Image]) -> Array:
    """Return PIL images as an array (N, H, W) or (N, H, W, C) in [0, 1]."""
    first = items[0]
    for index, item in enumerate(items):
        if item.size != first.size:
            raise invalid(f"{argument}[{index}].size", item.size, f"{first.size}, that of the first image")
        if item.mode != first.mode:
            expected, advice = f"{first.mode!r}, that of the first image", "convert them, as do_convert_rgb=True does"
            raise invalid(f"{argument}[{index}].mode", item.mode, expected, advice)
    return np.stack([np.asarray(item, dtype=np.float32) / np.float32(255) for item in items])


def _checked_box(box: Any) -> tuple[int, int, int, int]:
    """Return the coordinates of a crop."""
    sides = list(box) if isinstance(box, list | tuple) else []
    if len(sides) == 4 and all(isinstance(side, int | np.integer) for side in sides):
        left, top, right, bottom = map(int, sides)
        if left < right and top < bottom:
            return left, top, right, bottom
    raise invalid("crops_coords", box, "integers left, top, right, bottom, the first two below the others")


def _stacked(items: list[Any]) -> Tensor:
    """Return arrays or tensors as one tensor of floats (N, C, H, W)."""
    labels = ["image"] if len(items) == 1 else [f"image[{index}]" for index in range(len(items))]
    batches = [_floats(label, item) for label, item in zip(labels, items, strict=True)]
    first = batches[0]
    for label, item, batch in zip(labels, items, batches, strict=True):
        if item.ndim != items[0].ndim or batch.shape[1:] != first.shape[1:]:
            raise invalid(f"{label}.shape", tuple(item.shape), f"{tuple(items[0].shape)}, that of the first image")
        if batch.device != first.device:
            raise invalid(f"{label}.device", batch.device, f"{first.device}, that of the first image")
    return torch.cat(batches)


def _floats(argument: str, item: Any) -> Tensor:
    """Return an array or a tensor as floats (n, C, H, W)."""
    if is_array := isinstance(item, np.ndarray):
        item = validation.plain_array(argument, item, PIXEL_KINDS)
        has_pixels = item.dtype.kind in "fb" or item.dtype == np.uint8
    else:
        has_pixels = validation.dense(argument, item).is_floating_point() or item.dtype in (torch.uint8, torch.bool)
    if item.ndim not in (2, 3, 4) or 0 in item.shape or not has_pixels:
        raise invalid(argument, item, PIXEL_KINDS)
    batch = item if item.ndim == 4 else item[None]
    if batch.ndim == 3:
        batch = batch[..., None] if is_array else batch[:, None]
    validation.pixel_count(argument, item, batch.shape[:3] if is_array else (len(batch), *batch.shape[2:]))
    if is_array:
        dtype = batch.dtype.newbyteorder("=")  # torch reads neither other byte orders nor long doubles
        batch = torch.from_numpy(np.ascontiguousarray(batch, np.float64 if dtype == np.longdouble else dtype))
        batch = batch.permute(0, 3, 1, 2)
    if batch.dtype == torch.uint8:
        return batch.float() / 255
    floats: Tensor = batch.float() if batch.dtype.itemsize == 1 else batch  # booleans, and floats of 8 bits
    return floats


def _checked_pixels(images: Any) -> Array:
    """Return an array (N, H, W, C) whose values are in [0, 1] after rounding to 8 bits."""
    expected = "an array (H, W, C) or (N, H, W, C) with 1 to 4 channels"
    if not isinstance(images, np.ndarray):
        raise invalid("images", images, expected, "convert tensors by pt_to_numpy() first")
    array = validation.plain_array("images", images)
    if array.ndim not in (3, 4) or not 1 <= array.shape[-1] <= 4 or 0 in array.shape[-3:] or array.dtype.kind == "c":
        raise invalid("images", images, expected)
    batch = array[None] if array.ndim == 3 else array
    validation.pixel_count("images", images, batch.shape[:3])
    if batch.size:
        limits = (-0.5 / 255, 255.5 / 255)
        validation.values_in_range("images", float(batch.min()), float(batch.max()), limits, "values in [0, 1]")
    return batch
