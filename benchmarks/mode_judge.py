"""Measures of the embedded model's modes: compositions, known regions, overlap, attributes between two others.

All of them are pixel analysis, like `pixel_judge`, which reads attributes. Images are anything that `to_array` accepts.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.pixel_judge import (
    BORDER,
    MAX_STRAY_AREA,
    STRAY_TOLERANCE,
    Bools,
    Floats,
    components,
    read_image,
    to_array,
)
from kandinsky22.training.scenes import Scene, render

MAX_SHIFT = 0.08  # largest distance of a shape's middle from its original one, in images; positions are 0.24 apart
MAX_AREA_RATIO = 2.0  # largest ratio of a shape's area to its original one; large shapes are 2.7 times the small ones
MIN_OVERLAP = 0.8  # smallest intersection over union of the foregrounds of two images with the same composition
MAX_KNOWN_ERROR = 2.0  # largest mean difference of pixels in the known region of inpainting, of 255
MIN_END_DISTANCE = 0.1  # smallest distance of a mixture from either end, relative to the distance of the ends
ATTRIBUTES = ("background", "color", "size", "position")


def border_color(pixels: Floats) -> Floats:
    """Return the colour (3,) of an image's border.

    Args:
        pixels: RGB image (H, W, 3) in [0, 1].
    """
    width = max(1, round(BORDER * pixels.shape[0]))
    border = np.ones(pixels.shape[:2], dtype=bool)
    border[width:-width, width:-width] = False
    return np.median(pixels[border], axis=0).astype(np.float32)


def foreground(image: Any) -> Bools:
    """Return the mask (H, W) of the pixels that do not have the background's colour.

    Args:
        image: Any image that `to_array` accepts.
    """
    pixels = to_array(image)
    return np.asarray(np.linalg.norm(pixels - border_color(pixels), axis=-1) > STRAY_TOLERANCE)


def overlap(first: Bools, second: Bools) -> float:
    """Return the intersection over union of two masks; 1 if both are empty.

    Args:
        first: Mask (H, W).
        second: Mask (H, W).
    """
    union = int((first | second).sum())
    return int((first & second).sum()) / union if union else 1.0


def overlap_with_scene(image: Any, scene: Scene) -> float:
    """Return the intersection over union of an image's foreground and the shapes of a scene.

    Args:
        image: Any image that `to_array` accepts.
        scene: The scene.
    """
    mask = foreground(image)
    rendered = to_array(render([scene], size=mask.shape[0])[0])
    return overlap(mask, foreground(rendered))


def has_composition(image: Any, scene: Scene) -> bool:
    """Return whether an image has the composition of a scene.

    It has as many shapes, of similar sizes and at similar positions, on the same background. Their kinds and colours
    may differ.

    Args:
        image: Any image that `to_array` accepts.
        scene: The scene.
    """
    rendered = to_array(render([scene], size=to_array(image).shape[0])[0])
    if np.linalg.norm(border_color(to_array(image)) - border_color(rendered)) > STRAY_TOLERANCE:
        return False
    patches = _patches(foreground(image))
    expected = [_patches(foreground(_render_shape(scene, slot)))[0] for slot in range(len(scene.shapes))]
    if len(patches) != len(expected):
        return False
    return any(all(map(_is_similar, order, expected)) for order in (patches, patches[::-1]))


def _render_shape(scene: Scene, slot: int) -> Any:
    return render([Scene(scene.background, (scene.shapes[slot],))])[0]


def _patches(mask: Bools) -> list[tuple[Floats, float]]:
    """Return middle (x, y) and area of each component of a mask except specks, relative to an image of side 1."""
    patches = []
    for part in components(mask):
        if part.mean() > MAX_STRAY_AREA:
            ys, xs = np.nonzero(part)
            patches.append((np.array([xs.mean(), ys.mean()], dtype=np.float32) / mask.shape[0], float(part.mean())))
    return patches


def _is_similar(first: tuple[Floats, float], second: tuple[Floats, float]) -> bool:
    ratio = first[1] / second[1]
    is_near = float(np.linalg.norm(first[0] - second[0])) <= MAX_SHIFT
    return is_near and 1 / MAX_AREA_RATIO <= ratio <= MAX_AREA_RATIO


def known_region_error(image: Any, original: Any, mask: Bools) -> float:
    """Return the mean absolute difference, of 255, of an inpainted image and its original in the known region.

    Args:
        image: Any image that `to_array` accepts.
        original: Its original.
        mask: True for repainted pixels (H, W).
    """
    difference = np.abs(to_array(image) - to_array(original))
    return float(255 * difference[~mask].mean())


def measure(image: Any, attribute: str, mask: Bools | None = None) -> Floats:
    """Return an attribute of an image of one shape as a vector.

    Args:
        image: Any image that `to_array` accepts.
        attribute: "background" or "color" for an RGB colour, "size" for the square root of an area, "position" for the
            middle of the shape.
        mask: Pixels (H, W) of the shape; None takes the foreground. The colour of a mixture may differ little from the
            background, thus it needs a mask.

    Returns:
        The vector, NaN if the attribute cannot be measured.
    """
    pixels = to_array(image)
    if attribute == "background":
        return border_color(pixels)
    mask = foreground(image) if mask is None else mask
    if attribute == "color":
        return np.median(pixels[mask], axis=0).astype(np.float32) if mask.any() else np.full(3, np.nan, np.float32)
    if attribute == "size":
        return np.sqrt([mask.mean()]).astype(np.float32)
    patches = _patches(mask)
    # Two shapes half-way are not one shape between them.
    return patches[0][0] if len(patches) == 1 else np.full(2, np.nan, np.float32)


def is_between(middle: Floats, first: Floats, second: Floats) -> bool:
    """Return whether a measure is between two others: closer to both than they are to each other, and equal to neither.

    Args:
        middle: The measure; NaN is not between others.
        first: One end.
        second: The other end.
    """
    total = float(np.linalg.norm(first - second))
    parts = [float(np.linalg.norm(middle - end)) for end in (first, second)]
    return all(MIN_END_DISTANCE * total < part < total for part in parts)


def read_attribute(image: Any, attribute: str) -> str | None:
    """Return the name of an attribute of an image of one shape, as `pixel_judge` reads it.

    Args:
        image: Any image that `to_array` accepts.
        attribute: "background" for the background's colour, "color" or "kind" for those of the shape.

    Returns:
        The name, or None if there is not exactly one shape or the attribute cannot be read.
    """
    reading = read_image(image)
    if attribute == "background":
        return reading.background
    return getattr(reading.shapes[0], attribute) if len(reading.shapes) == 1 else None
