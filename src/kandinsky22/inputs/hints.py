"""Hints for ControlNet pipelines from photographs: edges by Canny's method, and depth by a model of transformers."""

from __future__ import annotations

import math
import os
from typing import Any, TypeAlias

import numpy as np
import PIL.Image
from PIL.Image import Image

from kandinsky22.errors import CheckpointError, InputError, MissingDependencyError, invalid
from kandinsky22.inputs import validation
from kandinsky22.inputs.images import convert_mode, open_image
from kandinsky22.requirements import require

Array: TypeAlias = np.ndarray[Any, Any]

# Gradients of Sobel's filter over values from 0 to 255: each of both components is at most 4 * 255.
MAX_GRADIENT = math.hypot(4 * 255, 4 * 255)
DEFAULT_LOW, DEFAULT_HIGH, DEFAULT_SIGMA = 100.0, 200.0, 1.0
MAX_SIGMA = 100.0  # pixels
# Tangent of 22.5 degrees in 15-bit fixed point: the border between the four directions of a gradient.
TANGENT, TANGENT_UNIT = 13573, 1 << 15
# Models whose output is the distance in metres. The output of all others grows towards the camera.
METRIC_MODELS = ("zoedepth", "depth_pro", "prompt_depth_anything")


def make_edge_hint(
    image: str | os.PathLike[str] | Image,
    *,
    low: float = DEFAULT_LOW,
    high: float = DEFAULT_HIGH,
    sigma: float = DEFAULT_SIGMA,
) -> Image:
    """Return the edges of an image as white lines, one pixel wide, on black.

    The method is Canny's (1986, https://doi.org/10.1109/TPAMI.1986.4767851). The image is blurred, its gradient
    computed by Sobel's filter in the colour channel where it is largest, and reduced to its local maxima along its
    direction. Lines with a gradient above `low` are edges if they are connected to a pixel with a gradient above
    `high`.

    Args:
        image: Path, URL or PIL image.
        low: Lower threshold of the gradient, from 0 to 1443 for colours from 0 to 255.
        high: Upper threshold of the gradient, at least `low`. Larger thresholds give fewer edges.
        sigma: Standard deviation of the blur in pixels; 0 does not blur. Larger values suppress fine detail.

    Returns:
        Image of mode "L" in the size of `image`.

    Raises:
        InputError: If an argument is invalid.
    """
    low, high = _thresholds(low, high)
    sigma = validation.finite_float("sigma", sigma)
    if not 0 <= sigma <= MAX_SIGMA:
        raise invalid("sigma", sigma, f"a number from 0 to {MAX_SIGMA:g}")
    pixels = np.asarray(convert_mode("image", open_image("image", image)), np.float32)
    dx, dy = _largest_gradient(_blurred(pixels, sigma))
    magnitudes = dx * dx + dy * dy
    ridges = _local_maxima(dx, dy, magnitudes)
    candidates = ridges & (magnitudes > math.floor(low * low))
    edges = _connected(candidates, candidates & (magnitudes > math.floor(high * high)))
    return PIL.Image.fromarray(edges.astype(np.uint8) * 255)


def make_depth_hint(
    image: str | os.PathLike[str] | Image,
    model: str | os.PathLike[str],
    *,
    device: Any = "cpu",
    invert: bool = False,
) -> Image:
    """Return the depth of an image as shades of grey: near is white, far is black.

    Args:
        image: Path, URL or PIL image.
        model: Folder or Hub id of a depth estimation model of transformers, such as DPT or Depth Anything.
        device: Device that runs the model.
        invert: Whether near is black and far is white.

    Returns:
        Image of mode "L" in the size of `image`. The nearest and the farthest pixel are exactly white and black.

    Raises:
        InputError: If an argument is invalid.
        CheckpointError: If the model cannot be loaded.
        MissingDependencyError: If transformers, or another package that the model needs, is not installed.
    """
    validation.strict_bool("invert", invert)
    picture = convert_mode("image", open_image("image", image))
    depth = _estimated_nearness(picture, model, device)
    if not np.isfinite(depth).all():
        raise InputError(f"the depth model {os.fspath(model)} returned NaN or infinity for this image")
    lowest, highest = float(depth.min()), float(depth.max())
    unit = (depth - lowest) / ((highest - lowest) or 1.0)
    return PIL.Image.fromarray(((1 - unit if invert else unit) * 255).round().astype(np.uint8))


# Edges


def _thresholds(low: Any, high: Any) -> tuple[float, float]:
    values = {}
    for name, value in (("low", low), ("high", high)):
        values[name] = validation.finite_float(name, value)
        if not 0 <= values[name] <= math.ceil(MAX_GRADIENT):
            raise invalid(name, value, f"a number from 0 to {math.ceil(MAX_GRADIENT)}")
    if values["low"] > values["high"]:
        raise invalid("low", low, f"at most the upper threshold, {high}")
    return values["low"], values["high"]


def _blurred(pixels: Array, sigma: float) -> Array:
    """Return an image (H, W, C) convolved with a Gaussian that is cut off at three standard deviations."""
    if sigma == 0:
        return pixels
    radius = math.ceil(3 * sigma)
    offsets = np.arange(-radius, radius + 1)
    kernel = np.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = (kernel / kernel.sum()).astype(np.float32)
    for axis in (0, 1):
        padding = [(radius, radius) if dimension == axis else (0, 0) for dimension in range(3)]
        padded, length = np.pad(pixels, padding, mode="edge"), pixels.shape[axis]
        views = (
            padded[start : start + length] if axis == 0 else padded[:, start : start + length]
            for start in range(len(kernel))
        )
        pixels = sum((weight * view for weight, view in zip(kernel, views, strict=True)), np.zeros_like(pixels))
    return pixels


def _largest_gradient(pixels: Array) -> tuple[Array, Array]:
    """Return Sobel's gradient (dx, dy), each (H, W), of the colour channel in which it is largest."""
    padded = np.pad(pixels, ((1, 1), (1, 1), (0, 0)), mode="edge")
    horizontal, vertical = padded[:, 2:] - padded[:, :-2], padded[2:] - padded[:-2]
    dx = horizontal[:-2] + 2 * horizontal[1:-1] + horizontal[2:]
    dy = vertical[:, :-2] + 2 * vertical[:, 1:-1] + vertical[:, 2:]
    channel = (dx * dx + dy * dy).argmax(axis=2)[..., None]
    return np.take_along_axis(dx, channel, 2)[..., 0], np.take_along_axis(dy, channel, 2)[..., 0]


def _local_maxima(dx: Array, dy: Array, magnitudes: Array) -> Array:
    """Return where the gradient is a maximum along its direction, rounded to multiples of 45 degrees, (H, W)."""
    height, width = magnitudes.shape
    padded = np.pad(magnitudes, 1)

    def neighbour(down: int, right: int) -> Array:
        return padded[1 + down : 1 + down + height, 1 + right : 1 + right + width]

    # Of two equal neighbours, the first one counts as the maximum: otherwise, lines would be two pixels wide.
    across = (magnitudes > neighbour(0, -1)) & (magnitudes >= neighbour(0, 1))
    along = (magnitudes > neighbour(-1, 0)) & (magnitudes >= neighbour(1, 0))
    falling = (magnitudes > neighbour(-1, -1)) & (magnitudes > neighbour(1, 1))
    rising = (magnitudes > neighbour(-1, 1)) & (magnitudes > neighbour(1, -1))
    x, y = np.abs(dx).astype(np.float64), np.abs(dy).astype(np.float64) * TANGENT_UNIT
    is_horizontal = y < x * TANGENT
    is_vertical = y > x * (TANGENT + 2 * TANGENT_UNIT)  # the tangent of 67.5 degrees is larger by exactly 2
    diagonal = np.where((dx < 0) != (dy < 0), rising, falling)
    return np.asarray(np.where(is_horizontal, across, np.where(is_vertical, along, diagonal)))


def _connected(candidates: Array, seeds: Array) -> Array:
    """Return the candidates that are connected to a seed by candidates, also diagonally, (H, W)."""
    height, width = candidates.shape
    stride = width + 2
    open_pixels = np.pad(candidates, 1).ravel()  # the border ends the search
    reached = np.zeros_like(open_pixels)
    offsets = np.array([-stride - 1, -stride, -stride + 1, -1, 1, stride - 1, stride, stride + 1])
    frontier = np.flatnonzero(np.pad(seeds, 1))
    while frontier.size:
        reached[frontier] = True
        open_pixels[frontier] = False
        neighbours = (frontier[:, None] + offsets).ravel()
        frontier = np.unique(neighbours[open_pixels[neighbours]])
    return reached.reshape(height + 2, stride)[1:-1, 1:-1]


# Depth


def _estimated_nearness(picture: Image, model: str | os.PathLike[str], device: Any) -> Array:
    """Return values (H, W) that grow towards the camera, in the picture's size."""
    import torch
    from torch.nn.functional import interpolate

    processor, network = _load_depth_model(model)
    try:
        network = network.to(device).eval()
    except (RuntimeError, TypeError) as error:
        raise invalid("device", device, "a device of this machine") from error
    inputs = processor(images=picture, return_tensors="pt").to(device)
    with torch.inference_mode():
        depth = network(**inputs).predicted_depth.float().cpu()
    depth = depth.reshape(1, 1, *depth.shape[-2:])
    depth = interpolate(depth, size=(picture.height, picture.width), mode="bicubic", align_corners=False)[0, 0]
    settings = network.config
    is_metric = settings.model_type in METRIC_MODELS or getattr(settings, "depth_estimation_type", "") == "metric"
    # Hints show the inverse of the distance, in which near things fill most of the range.
    return np.asarray((1 / depth.clamp(min=1e-3) if is_metric else depth).numpy())


def _load_depth_model(model: str | os.PathLike[str]) -> tuple[Any, Any]:
    """Return the image processor and the network of a model. Code that comes with a model never runs."""
    value: Any = model
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        raise invalid("model", value, "a folder or a Hub id of a depth estimation model of transformers")
    transformers = require("transformers", "a hint of depth", install="kandinsky22[depth]")
    name = os.fspath(model)
    try:
        network = transformers.AutoModelForDepthEstimation.from_pretrained(name)
        processor = transformers.AutoImageProcessor.from_pretrained(name)
    except ImportError as error:
        raise MissingDependencyError(f"the depth model {name} needs another package: {error}") from error
    except Exception as error:  # transformers raises many types of exceptions
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(f"{name} is not a depth estimation model that transformers can load: {reason}") from error
    return processor, network
