"""Small functions that scripts for the reference import from its `utils` and from its pipelines' modules."""

from __future__ import annotations

import importlib.util
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any, TypeVar

import torch
from packaging.version import Version
from PIL.Image import Image
from torch import Tensor

from kandinsky22.errors import MissingDependencyError, invalid
from kandinsky22.inputs import images, masks, validation
from kandinsky22.inputs.image_processor import RESAMPLING as PIL_INTERPOLATION
from kandinsky22.inputs.image_processor import VaeImageProcessor
from kandinsky22.models.base import Model as ModelMixin
from kandinsky22.outputs import Output as BaseOutput
from kandinsky22.schedulers.base import Scheduler as SchedulerMixin
from kandinsky22.schedulers.base import SchedulerOutput

__all__ = [
    "CONFIG_NAME",
    "PIL_INTERPOLATION",
    "SAFETENSORS_WEIGHTS_NAME",
    "WEIGHTS_NAME",
    "BaseOutput",
    "ModelMixin",
    "SchedulerMixin",
    "SchedulerOutput",
    "check_min_version",
    "downscale_height_and_width",
    "export_to_gif",
    "export_to_video",
    "is_accelerate_available",
    "is_accelerate_version",
    "is_compiled_module",
    "is_torch_available",
    "is_torch_version",
    "is_transformers_available",
    "is_wandb_available",
    "is_xformers_available",
    "numpy_to_pil",
    "prepare_image",
    "prepare_mask",
    "prepare_mask_and_masked_image",
    "pt_to_pil",
    "replace_example_docstring",
]

F = TypeVar("F", bound=Callable[..., Any])

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "diffusion_pytorch_model.bin"
SAFETENSORS_WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"

COMPARISONS: dict[str, Callable[[Version, Version], bool]] = {
    "<": lambda one, other: one < other,
    "<=": lambda one, other: one <= other,
    "==": lambda one, other: one == other,
    "!=": lambda one, other: one != other,
    ">=": lambda one, other: one >= other,
    ">": lambda one, other: one > other,
}

numpy_to_pil = VaeImageProcessor.numpy_to_pil


# Images


def pt_to_pil(images: Tensor) -> list[Image]:
    """Return PIL images.

    Args:
        images: Tensor (N, C, H, W) in [-1, 1].
    """
    return numpy_to_pil(VaeImageProcessor.pt_to_numpy(VaeImageProcessor.denormalize(images)))


def downscale_height_and_width(height: int, width: int, scale_factor: int = 8) -> tuple[int, int]:
    """Return the height and width of the latents of an image, whose sides are rounded up to multiples of 64.

    Args:
        height: Height in pixels.
        width: Width in pixels.
        scale_factor: Pixels per latent along each side.
    """
    block = scale_factor**2
    return -(-height // block) * scale_factor, -(-width // block) * scale_factor


def prepare_image(pil_image: Image, w: int = 512, h: int = 512) -> Tensor:
    """Return a tensor (1, 3, h, w) in [-1, 1].

    Args:
        pil_image: The image, resized by a bicubic filter.
        w: Width in pixels.
        h: Height in pixels.
    """
    return images.images_to_tensor("pil_image", pil_image, (h, w))


def prepare_mask(masks: Tensor) -> Tensor:
    """Return masks in which every repainted latent repaints six of its neighbours too.

    Args:
        masks: Tensor (N, 1, h, w): 0 where latents are repainted, 1 elsewhere. It is not changed.
    """
    return _unmasked_latents(1 - masks)


def _unmasked_latents(repainted: Tensor) -> Tensor:
    return masks.unmasked_latents(repainted, (repainted.shape[-2], repainted.shape[-1]))


def prepare_mask_and_masked_image(image: Any, mask: Any, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return a mask (N, 1, height, width), 0 where the image is repainted, and the image (N, 3, height, width).

    Args:
        image: Images, see `inputs.images.images_to_tensor`; float tensors are in [-1, 1].
        mask: Masks, see `inputs.masks.masks_to_tensor`: 1 where the image is repainted.
        height: Height in pixels.
        width: Width in pixels.

    Raises:
        InputError: If either is something else.
    """
    repainted = masks.masks_to_tensor("mask", mask, (height, width))
    return 1 - repainted, images.images_to_tensor("image", image, (height, width), signed=True)


def export_to_gif(image: Sequence[Image], output_gif_path: str | os.PathLike[str] | None = None, fps: int = 10) -> str:
    """Write images as an animation.

    Args:
        image: PIL images, at least one.
        output_gif_path: File to write; None for a new temporary file.
        fps: Images per second.

    Returns:
        Path of the file.

    Raises:
        InputError: If `image` is empty, or `fps` is not a positive integer.
    """
    if not image:
        raise invalid("image", image, "at least one PIL image")
    duration = 1000 // validation.positive_int("fps", fps)
    path = _output_path(output_gif_path, ".gif")
    image[0].save(path, save_all=True, append_images=list(image[1:]), optimize=False, duration=duration, loop=0)
    return path


def export_to_video(
    video_frames: Sequence[Any], output_video_path: str | os.PathLike[str] | None = None, fps: int = 10
) -> str:
    """Write images as a video.

    Args:
        video_frames: PIL images, or arrays (H, W, 3) in [0, 1].
        output_video_path: File to write; None for a new temporary file.
        fps: Images per second.

    Returns:
        Path of the file.

    Raises:
        MissingDependencyError: If imageio is not installed.
    """
    if importlib.util.find_spec("imageio") is None:
        raise MissingDependencyError("export_to_video needs imageio: pip install imageio imageio-ffmpeg")
    imageio = importlib.import_module("imageio")
    path = _output_path(output_video_path, ".mp4")
    with imageio.get_writer(path, fps=fps) as writer:
        for picture in images.pictures_at_their_size("video_frames", list(video_frames)):
            writer.append_data(imageio.core.asarray(picture))
    return path


def _output_path(path: str | os.PathLike[str] | None, suffix: str) -> str:
    if path is not None:
        return os.fspath(path)
    with tempfile.NamedTemporaryFile(suffix=suffix, delete=False) as file:
        return file.name


# Packages


def is_accelerate_available() -> bool:
    """Return whether accelerate is installed."""
    return importlib.util.find_spec("accelerate") is not None


def is_transformers_available() -> bool:
    """Return whether transformers is installed."""
    return importlib.util.find_spec("transformers") is not None


def is_torch_available() -> bool:
    """Return whether torch is installed, which kandinsky22 requires."""
    return True


def is_xformers_available() -> bool:
    """Return whether xformers is installed; kandinsky22 does not use it."""
    return importlib.util.find_spec("xformers") is not None


def is_wandb_available() -> bool:
    """Return whether wandb is installed."""
    return importlib.util.find_spec("wandb") is not None


def is_peft_available() -> bool:
    """Return whether peft is installed."""
    return importlib.util.find_spec("peft") is not None


def is_safetensors_available() -> bool:
    """Return whether safetensors is installed, which kandinsky22 requires."""
    return True


def is_torch_npu_available() -> bool:
    """Return whether torch_npu is installed; kandinsky22 is not tested with it."""
    return importlib.util.find_spec("torch_npu") is not None


def is_torch_xla_available() -> bool:
    """Return whether torch_xla is installed; kandinsky22 is not tested with it."""
    return importlib.util.find_spec("torch_xla") is not None


def is_torch_version(operation: str, version: str) -> bool:
    """Return whether the version of torch compares to another one as stated.

    Args:
        operation: "<", "<=", "==", "!=", ">=" or ">".
        version: The other version.
    """
    return _compare(str(torch.__version__), operation, version)


def is_accelerate_version(operation: str, version: str) -> bool:
    """Return whether the version of accelerate compares as stated; False if it is not installed.

    Args:
        operation: "<", "<=", "==", "!=", ">=" or ">".
        version: The other version.
    """
    return is_accelerate_available() and _compare(metadata.version("accelerate"), operation, version)


def _compare(installed: str, operation: str, version: str) -> bool:
    validation.one_of("operation", operation, tuple(COMPARISONS))
    return COMPARISONS[operation](Version(Version(installed).base_version), Version(version))


def check_min_version(min_version: str) -> None:
    """Do nothing: versions of the reference do not apply to kandinsky22.

    Args:
        min_version: Ignored.
    """


def is_compiled_module(module: Any) -> bool:
    """Return whether a module is the result of `torch.compile`.

    Args:
        module: The module.
    """
    return isinstance(module, torch._dynamo.eval_frame.OptimizedModule)


def replace_example_docstring(example_docstring: str) -> Callable[[F], F]:
    """Return a decorator that puts an example into the docstring of a function, at its line "Examples:".

    Args:
        example_docstring: The example.
    """

    def decorate(function: F) -> F:
        if function.__doc__:
            function.__doc__ = re.sub(
                r"^\s*Examples?:\s*$", lambda _: example_docstring, function.__doc__, count=1, flags=re.MULTILINE
            )
        return function

    return decorate
