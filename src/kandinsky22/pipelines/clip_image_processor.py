"""CLIP's image processor: pictures of any size to the normalised pixels that the vision tower reads.

Checkpoints name a class of transformers. The class here has the same settings and gives the same pixels as its
implementation with PIL, bit for bit.
"""

from __future__ import annotations

import copy
import dataclasses
import json
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
from kandinsky22.errors import InputError, invalid
from kandinsky22.inputs import images
from kandinsky22.inputs.hub_uploads import requested_upload
from kandinsky22.outputs import Output
from kandinsky22.pipelines.clip_settings import PROCESSOR_RULES

CONFIG_NAME = "preprocessor_config.json"
MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of OpenAI's CLIP
BICUBIC = int(PIL.Image.Resampling.BICUBIC)
DEFAULTS: Mapping[str, Any] = {  # of settings that are None
    "size": 224,
    "crop_size": 224,
    "resample": BICUBIC,
    "image_mean": MEAN,
    "image_std": DEVIATION,
}


@dataclasses.dataclass
class ProcessedImages(Output):
    """Result of the image processor.

    Attributes:
        pixel_values: Normalised pixels, (batch, 3, height, width): a float32 tensor, or a list of arrays,
            one per image, without `return_tensors`.
    """

    pixel_values: Any

    @property
    def data(self) -> dict[str, Any]:
        """The entries by name."""
        return dict(self.items())

    def to(self, *args: Any, **kwargs: Any) -> ProcessedImages:
        """Return the result on another device, or in another type.

        Args:
            *args: Arguments of `Tensor.to`.
            **kwargs: Arguments of `Tensor.to`.
        """
        return ProcessedImages(self.pixel_values.to(*args, **kwargs))


class CLIPImageProcessor:
    """Resizes, crops and normalises pictures. Steps that are None do not run.

    Args:
        do_resize: Whether pictures are resized.
        size: Size to resize to, in pixels: {"shortest_edge": n}, or n alone, or {"height": h, "width": w}; None for
            224.
        resample: Filter of PIL, such as 3 for bicubic; None for bicubic.
        do_center_crop: Whether the centre is cut out; smaller pictures get black borders.
        crop_size: Size of the centre: {"height": h, "width": w}, or n alone; None for 224.
        do_rescale: Whether values are multiplied by `rescale_factor`.
        rescale_factor: Usually 1 / 255.
        do_normalize: Whether `image_mean` is subtracted, and the result divided by `image_std`.
        image_mean: Means of the three channels, or one number for all; None for those of CLIP.
        image_std: Standard deviations of the three channels, or one number for all; None for those of CLIP.
        do_convert_rgb: Accepted for files that have it: pictures are always converted to RGB.
        **others: Entries of the file that have no effect; they are saved again.

    Raises:
        InputError: A setting has a value that is not accepted.
    """

    model_input_names = ("pixel_values",)
    do_resize: bool | None
    size: dict[str, int]
    resample: int
    do_center_crop: bool | None
    crop_size: dict[str, int]
    do_rescale: bool | None
    rescale_factor: float
    do_normalize: bool | None
    image_mean: float | list[float]
    image_std: float | list[float]
    do_convert_rgb: bool | None

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
        settings: dict[str, Any] = {
            "do_resize": do_resize,
            "size": size,
            "resample": resample,
            "do_center_crop": do_center_crop,
            "crop_size": crop_size,
            "do_rescale": do_rescale,
            "rescale_factor": rescale_factor,
            "do_normalize": do_normalize,
            "image_mean": image_mean,
            "image_std": image_std,
            "do_convert_rgb": do_convert_rgb,
        }
        vars(self).update(_checked(settings))
        self._others = others

    def __call__(self, images: Any, return_tensors: Any = None, **settings: Any) -> ProcessedImages:
        """Return normalised pixels.

        Args:
            images: See `preprocess`.
            return_tensors: See `preprocess`.
            **settings: See `preprocess`.

        Raises:
            InputError: See `preprocess`.
        """
        return self.preprocess(images, return_tensors, **settings)

    def preprocess(self, images: Any, return_tensors: Any = None, **settings: Any) -> ProcessedImages:
        """Return normalised pixels.

        Args:
            images: A picture, a list of pictures, or a batch: PIL images, or arrays and tensors (height, width, 3) or
                (3, height, width) of bytes, of numbers from 0 to 255, or, with `do_rescale=False`, from 0 to 1.
                Arrays that are resized have whole numbers, or fractions from 0 to 1.
            return_tensors: "pt" for a tensor, "np" for an array, None for a list of arrays.
            **settings: Settings of the constructor that replace those of the object in this call; None replaces none.

        Raises:
            InputError: If an argument is anything else, or a picture has another number of channels.
        """
        kind = getattr(return_tensors, "value", return_tensors)  # transformers has an enumeration of these names
        if kind not in (None, "pt", "np"):
            raise invalid("return_tensors", return_tensors, "'pt', 'np' or None")
        pictures = _as_pictures(images)
        processor = self._with(settings)
        pixels = [processor._process(picture) for picture in pictures]
        if kind is None:
            return ProcessedImages(pixels)
        if len(shapes := {each.shape for each in pixels}) > 1:
            expected = f"one size to stack, not {' and '.join(str(shape[1:]) for shape in sorted(shapes))}"
            raise invalid("images", f"{len(pixels)} pictures", expected, "do_resize and do_center_crop give one size")
        stacked = np.stack(pixels)
        return ProcessedImages(torch.from_numpy(stacked) if kind == "pt" else stacked)

    def _with(self, settings: Mapping[str, Any]) -> CLIPImageProcessor:
        """Return a processor with some other settings. All are checked: attributes may have been set since."""
        replaced = {name: value for name, value in settings.items() if value is not None}
        own = self._settings()
        if unknown := sorted(set(replaced) - set(own)):
            raise invalid("settings of the image processor", ", ".join(unknown), f"some of {', '.join(own)}")
        processor = copy.copy(self)
        vars(processor).update(_checked({**own, **replaced}))
        return processor

    def _settings(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def _process(self, picture: PIL.Image.Image | npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """Return the pixels of one RGB picture, (3, height, width)."""
        pixels: npt.NDArray[Any] = np.asarray(picture)
        if self.do_resize:
            image, is_scaled = _as_image(picture)
            pixels = np.asarray(image.resize(self._resized(*image.size), PIL.Image.Resampling(self.resample)))
            if is_scaled:
                pixels = _rescaled(pixels, 1 / 255)
        if self.do_center_crop:
            pixels = _center(pixels, self.crop_size["height"], self.crop_size["width"])
        if self.do_rescale:
            pixels = _rescaled(pixels, self.rescale_factor)
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
        return {**self._others, **self._settings(), "image_processor_type": type(self).__name__}

    def to_json_string(self) -> str:
        """Return the content of the config file."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_dict(cls, image_processor_dict: Mapping[str, Any], **settings: Any) -> CLIPImageProcessor:
        """Return a processor with the entries of a config file.

        Args:
            image_processor_dict: Entries by name.
            **settings: Settings that replace them.

        Raises:
            InputError: `image_processor_dict` is not a mapping.
        """
        if not isinstance(image_processor_dict, Mapping):
            raise invalid("image_processor_dict", image_processor_dict, "a mapping of settings by name")
        return cls(**{**image_processor_dict, **settings})

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **hub_options: Any
    ) -> None:
        """Write the config file, and upload it on request.

        Args:
            save_directory: Folder, which is created if it does not exist.
            push_to_hub: Whether all files of the folder are uploaded to the Hub afterwards.
            **hub_options: Arguments of the upload, see `save_pretrained` of pipelines.

        Raises:
            CheckpointError: The file cannot be written, or the upload fails.
            InputError: An argument is invalid.
            MissingDependencyError: huggingface_hub is required and not installed.
        """
        folder = checked_save_path(save_directory)
        upload = requested_upload(type(self).__name__, push_to_hub, hub_options, folder)
        write_json(folder / CONFIG_NAME, self.to_dict())
        if upload is not None:
            upload.run(folder)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.to_dict().items())})"


def _as_pictures(values: Any) -> list[PIL.Image.Image | npt.NDArray[Any]]:
    """Return RGB pictures, and arrays (height, width, 3) of bytes or floating-point numbers."""
    listed = list(values) if isinstance(values, list | tuple) else [values]
    pictures: list[PIL.Image.Image | npt.NDArray[Any]] = []
    for value in listed:
        if isinstance(value, PIL.Image.Image):
            pictures.append(images.convert_mode("images", value))
            continue
        array = value.detach().cpu().float().numpy() if _is_float_tensor(value) else value
        array = array.detach().cpu().numpy() if isinstance(array, Tensor) else array
        if not isinstance(array, np.ndarray) or array.ndim not in (3, 4) or array.dtype.kind not in "uif":
            raise _not_pictures(value)
        pictures += [_channels_last(value, each) for each in (array if array.ndim == 4 else [array])]
    if not pictures:
        raise invalid("images", values, "at least one picture")
    return pictures


def _is_float_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _channels_last(value: Any, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return one picture as an array (height, width, 3)."""
    if array.shape[0] == 3:  # before the last axis, as in transformers
        array = array.transpose(1, 2, 0)
    if array.shape[-1] != 3 or 0 in array.shape or not np.isfinite(array).all():
        raise _not_pictures(value)
    if array.min() < 0 or array.max() > 255:
        raise _out_of_range(value, array)
    return array


def _not_pictures(value: Any) -> InputError:
    return invalid("images", value, "PIL images, or arrays (height, width, 3) or (3, height, width) of finite numbers")


def _out_of_range(value: Any, array: npt.NDArray[Any]) -> InputError:
    values = f"not {float(array.min()):g} to {float(array.max()):g}"
    return invalid("images", value, f"bytes, or whole numbers from 0 to 255, or fractions from 0 to 1, {values}")


def _as_image(picture: PIL.Image.Image | npt.NDArray[Any]) -> tuple[PIL.Image.Image, bool]:
    """Return a picture with bytes for PIL, and whether it had numbers from 0 to 1."""
    if isinstance(picture, PIL.Image.Image) or picture.dtype == np.uint8:
        return picture if isinstance(picture, PIL.Image.Image) else PIL.Image.fromarray(picture), False
    is_whole = np.allclose(picture, np.trunc(picture))
    if not is_whole and picture.max() > 1:
        raise _out_of_range(picture, picture)
    values = picture if is_whole else _rescaled(picture, 255)
    return PIL.Image.fromarray(np.ascontiguousarray(values.astype(np.uint8))), not is_whole


def _rescaled(pixels: npt.NDArray[Any], factor: float) -> npt.NDArray[np.float32]:
    return (pixels.astype(np.float64) * factor).astype(np.float32)


def _checked(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings in the form that steps read: sizes with names, lists of numbers, no None with a default.

    Raises:
        InputError: A setting has a value that files may not have either.
    """
    checked: dict[str, Any] = {}
    for name, value in settings.items():
        plain = _plain(DEFAULTS.get(name) if value is None else value)
        if name in PROCESSOR_RULES and not PROCESSOR_RULES[name].accepts(plain):
            raise invalid(name, value, PROCESSOR_RULES[name].expected)
        checked[name] = plain
    size, crop_size = checked["size"], checked["crop_size"]
    side = crop_size.get("shortest_edge") if isinstance(crop_size, dict) else crop_size
    return {
        **checked,
        "size": size if isinstance(size, dict) else {"shortest_edge": size},
        "crop_size": crop_size if side is None else {"height": side, "width": side},
    }


def _plain(value: Any) -> Any:
    """Return a setting as a JSON file would have it."""
    if isinstance(value, np.ndarray | np.generic | Tensor):
        return value.tolist()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):  # a size of transformers
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {name: _plain(entry) for name, entry in value.items() if entry is not None}
    return [_plain(entry) for entry in value] if isinstance(value, list | tuple) else value


def _center(pixels: npt.NDArray[Any], height: int, width: int) -> npt.NDArray[Any]:
    """Return the centre of pixels (height, width, 3); sides that are too short get black borders."""
    missing = [max(0, side - length) for side, length in zip((height, width), pixels.shape, strict=False)]
    if any(missing):
        borders = [(math.ceil(count / 2), count // 2) for count in missing]
        pixels = np.pad(pixels, [*borders, (0, 0)])
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    return pixels[top : top + height, left : left + width]
