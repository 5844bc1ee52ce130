"""Inpainting at the photograph's own size: canvases extended by `--extend`, and crops around the mask by `--crop`."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

    from kandinsky22.inputs.masks import MaskCrop

# Left, top, right, bottom, in pixels.
Margins = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Canvas:
    """Image and mask for the decoder, and the conversion of its result to the image that is saved.

    Attributes:
        image: Image that the decoder receives.
        mask: Mask that the decoder receives.
        box: Left, top, right and bottom of the part of the canvas that is saved; None saves all of it.
        crop: Crop around the mask that the result is pasted back into; None if the decoder repaints the canvas.
    """

    image: Image
    mask: Image
    box: tuple[int, int, int, int] | None = None
    crop: MaskCrop | None = None

    def finish(self, result: Image) -> Image:
        """Return the image that is saved.

        Args:
            result: Result of the decoder.
        """
        canvas = result if self.crop is None else self.crop.paste(result)
        return canvas if self.box is None else canvas.crop(self.box)


def extended_size(size: tuple[int, int], margins: Margins) -> tuple[int, int]:
    """Return the (width, height) of an image with margins.

    Args:
        size: Width and height of the image.
        margins: Left, top, right and bottom margin.
    """
    left, top, right, bottom = margins
    return size[0] + left + right, size[1] + top + bottom


def extend(image: Image, mask: Image | None, margins: Margins, multiple: int) -> Canvas:
    """Return an image with margins that are repainted.

    The margins first show the mirrored image: brightness and colours of its edges continue, which the autoencoder's
    norms and the preserved part near the edges depend on. Sides are rounded up, and the saved part has the exact size.

    Args:
        image: The image.
        mask: Mask of what is repainted inside the image, in its size or another; None preserves all of it.
        margins: Left, top, right and bottom margin in pixels.
        multiple: The decoder's sides are multiples of this number of pixels.
    """
    import numpy as np
    import PIL.Image

    from kandinsky22.inputs.images import convert_mode
    from kandinsky22.inputs.masks import masks_to_tensor

    pixels = np.asarray(convert_mode("image", image))
    height, width = pixels.shape[:2]
    if mask is None:
        repainted = np.zeros((height, width), np.uint8)
    else:
        repainted = (masks_to_tensor("mask", mask, (height, width))[0, 0] * 255).byte().numpy()
    left, top, right, bottom = margins
    before_x, after_x = _with_rounding(left, right, width, multiple)
    before_y, after_y = _with_rounding(top, bottom, height, multiple)
    rows, columns = (before_y, after_y), (before_x, after_x)
    box_left, box_top = before_x - left, before_y - top
    asked_width, asked_height = extended_size((width, height), margins)
    return Canvas(
        PIL.Image.fromarray(np.pad(pixels, (rows, columns, (0, 0)), mode="symmetric")),
        PIL.Image.fromarray(np.pad(repainted, (rows, columns), constant_values=255)),
        (box_left, box_top, box_left + asked_width, box_top + asked_height),
    )


def crop_around_mask(canvas: Canvas, size: tuple[int, int], padding: int) -> Canvas:
    """Return the crop of a canvas around its mask, as `padding_mask_crop` of the inpainting pipelines makes it.

    Args:
        canvas: Canvas without a crop.
        size: Height and width at which the decoder repaints the crop.
        padding: Pixels of the image around the mask.

    Raises:
        InputError: If the mask is black everywhere.
    """
    from kandinsky22.inputs.masks import mask_crops

    (crop,) = mask_crops(canvas.image, canvas.mask, size, padding)
    return dataclasses.replace(canvas, image=crop.cropped_picture(), mask=crop.cropped_mask(), crop=crop)


def _with_rounding(before: int, after: int, side: int, multiple: int) -> tuple[int, int]:
    """Return both margins of a side, enlarged on an extended end so that their sum with the side is a multiple."""
    extra = -(before + side + after) % multiple
    return (before + extra, after) if before and not after else (before, after + extra)


def decoder_size(decoder: Any, width: int, height: int) -> tuple[int, int]:
    """Return the (height, width) of the decoder's result in pixels: both rounded up to what it can generate.

    Args:
        decoder: Decoder pipeline.
        width: Requested width.
        height: Requested height.
    """
    multiple = decoder.movq_scale_factor**2
    return -(-height // multiple) * multiple, -(-width // multiple) * multiple
