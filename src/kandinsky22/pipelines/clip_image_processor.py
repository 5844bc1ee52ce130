"""CLIP's image processor: pictures of any size to the normalised pixels that the vision tower reads.

Checkpoints name a class of transformers. The class here has the same settings and gives the same pixels as its
implementation with PIL, bit for bit.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL.Image
import torch
from torch import Tensor

from kandinsky22.checkpoints.atomic_files import checked_save_path, write_json
from kandinsky22.errors import invalid
from kandinsky22.inputs import images
from kandinsky22.outputs import Output

CONFIG_NAME = "preprocessor_config.json"
MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of OpenAI's CLIP
BICUBIC = int(PIL.Image.Resampling.BICUBIC)


@dataclasses.dataclass
class ProcessedImages(Output):
    """Result of the image processor.

    Attributes:
        pixel_values: Normalised pixels, (batch, 3, height, width): a float32 tensor, or a list of arrays,
            one per image, without `return_tensors`.
    """

    pixel_values: Any

    def to(self, *args: Any, **kwargs: Any) -> ProcessedImages:
        """Return the result on another device, or in another type.

        Args:
            *args: Arguments of `Tensor.to`.
            **kwargs: Arguments of `Tensor.to`.
        """
        return ProcessedImages(self.pixel_values.to(*args, **kwargs))


class CLIPImageProcessor:
    """Resizes, crops and normalises pictures.

    Args:
        do_resize: Whether pictures are resized.
        size: Size to resize to, in pixels: {"shortest_edge": n}, or n alone, or {"height": h, "width": w}.
        resample: Filter of PIL, such as 3 for bicubic; None for bicubic.
        do_center_crop: Whether the centre is cut out; smaller pictures get black borders.
        crop_size: Size of the centre: {"height": h, "width": w}, or n alone.
        do_rescale: Whether values are multiplied by `rescale_factor`.
        rescale_factor: Usually 1 / 255.
        do_normalize: Whether `image_mean` is subtracted, and the result divided by `image_std`.
        image_mean: Means of the three channels, or one number for all.
        image_std: Standard deviations of the three channels, or one number for all.
        do_convert_rgb: Accepted for files that have it: pictures are always converted to RGB.
        **others: Entries of the file that have no effect; they are saved again.
    """

    model_input_names = ("pixel_values",)

    def __init__(
        self,
        *,
        do_resize: bool | None = True,
        size: int | Mapping[str, int] | None = None,
        resample: int | None = BICUBIC,
        do_center_crop: bool | None = True,
        crop_size: int | Mapping[str, int] | None = None,
        do_rescale: bool | None = True,
        rescale_factor: float = 1 / 255,
        do_normalize: bool | None = True,
        image_mean: float | Sequence[float] | None = None,
        image_std: float | Sequence[float] | None = None,
        do_convert_rgb: bool | None = True,
        **others: Any,
    ) -> None:
        self.do_resize, self.do_center_crop = do_resize, do_center_crop
        self.do_rescale, self.do_normalize, self.do_convert_rgb = do_rescale, do_normalize, do_convert_rgb
        self.size = _shortest_edge(224 if size is None else size)
        self.crop_size = _square(224 if crop_size is None else crop_size)
        self.resample = BICUBIC if resample is None else resample
        self.rescale_factor = rescale_factor
        self.image_mean = list(MEAN) if image_mean is None else image_mean
        self.image_std = list(DEVIATION) if image_std is None else image_std
        self._others = others

    def __call__(self, images: Any, return_tensors: str | None = None) -> ProcessedImages:
        """Return normalised pixels.

        Args:
            images: A picture, or a list of pictures: PIL images, or arrays (height, width, 3) of bytes.
            return_tensors: "pt" for a tensor, "np" for an array, None for a list of arrays.

        Raises:
            InputError: If `images` is anything else.
        """
        return self.preprocess(images, return_tensors=return_tensors)

    def preprocess(self, images: Any, return_tensors: str | None = None) -> ProcessedImages:
        """Return normalised pixels, as calling the processor does.

        Args:
            images: A picture, or a list of pictures: PIL images, or arrays (height, width, 3) of bytes.
            return_tensors: "pt" for a tensor, "np" for an array, None for a list of arrays.

        Raises:
            InputError: If `images` is anything else.
        """
        if return_tensors not in (None, "pt", "np"):
            raise invalid("return_tensors", return_tensors, "'pt', 'np' or None")
        listed = list(images) if isinstance(images, list | tuple) else [images]
        if not listed:
            raise invalid("images", images, "at least one picture")
        pixels = [self._process(picture) for picture in map(_as_picture, listed)]
        if return_tensors is None:
            return ProcessedImages(pixels)
        stacked = np.stack(pixels)
        return ProcessedImages(torch.from_numpy(stacked) if return_tensors == "pt" else stacked)

    def _process(self, picture: PIL.Image.Image) -> npt.NDArray[np.float32]:
        """Return the pixels of one RGB picture, (3, height, width)."""
        if self.do_resize:
            picture = picture.resize(self._resized(*picture.size), PIL.Image.Resampling(self.resample))
        pixels: npt.NDArray[Any] = np.asarray(picture)
        if self.do_center_crop:
            pixels = _center(pixels, self.crop_size["height"], self.crop_size["width"])
        if self.do_rescale:
            pixels = (pixels.astype(np.float64) * self.rescale_factor).astype(np.float32)
        if self.do_normalize:
            mean, deviation = (np.array(value, np.float32) for value in (self.image_mean, self.image_std))
            pixels = (pixels.astype(np.float32) - mean) / deviation
        return np.ascontiguousarray(pixels.transpose(2, 0, 1), np.float32)

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """Return the (width, height) that a picture is resized to."""
        if "height" in self.size and "width" in self.size:
            return self.size["width"], self.size["height"]
        short = self.size["shortest_edge"]
        long = int(short * max(width, height) / min(width, height))
        return (short, long) if width <= height else (long, short)

    def to_dict(self) -> dict[str, Any]:
        """Return the entries of the config file."""
        own = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        return {**self._others, **own, "image_processor_type": type(self).__name__}

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write the config file.

        Args:
            save_directory: Folder, which is created if it does not exist.

        Raises:
            CheckpointError: The file cannot be written.
            InputError: `save_directory` is not a path.
        """
        write_json(checked_save_path(save_directory) / CONFIG_NAME, self.to_dict())

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.to_dict().items())})"


def _as_picture(value: Any) -> PIL.Image.Image:
    if isinstance(value, PIL.Image.Image):
        return images.convert_mode("images", value)
    if isinstance(value, Tensor):
        value = value.detach().cpu().numpy()
    if isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim == 3 and value.shape[-1] == 3:
        return PIL.Image.fromarray(value)
    raise invalid("images", value, "PIL images, or arrays (height, width, 3) of bytes")


def _shortest_edge(size: int | Mapping[str, int]) -> dict[str, int]:
    return {"shortest_edge": size} if isinstance(size, int) else dict(size)


def _square(size: int | Mapping[str, int]) -> dict[str, int]:
    if isinstance(size, int):
        return {"height": size, "width": size}
    side = size.get("shortest_edge")
    return dict(size) if side is None else {"height": side, "width": side}


def _center(pixels: npt.NDArray[Any], height: int, width: int) -> npt.NDArray[Any]:
    """Return the centre of pixels (height, width, 3); sides that are too short get black borders."""
    missing = [max(0, side - length) for side, length in zip((height, width), pixels.shape, strict=False)]
    if any(missing):
        borders = [(math.ceil(count / 2), count // 2) for count in missing]
        pixels = np.pad(pixels, [*borders, (0, 0)])
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    return pixels[top : top + height, left : left + width]
