"""What the modes of the embedded model are judged by: compositions, kept pixels, holes, places, mixtures. Pixels only.

Like `pixel_judge`, which reads attributes, nothing here is learned. Pictures are anything `to_array` takes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.pixel_judge import (
    BORDER,
    STRAY_AREA,
    STRAY_TOLERANCE,
    Bools,
    Floats,
    components,
    read_picture,
    to_array,
)
from kandinsky22.training.scenes import Scene, render

SAME_PLACE = 0.08  # from a shape's middle to where it was, in pictures; places lie 0.24 apart
SAME_AREA = 2.0  # how many times as large or as small a shape may have become; large ones are 2.7 times the small
SAME_COMPOSITION = 0.8  # overlap of what is painted in two pictures that show things in the same places
KEPT_ERROR = 2.0  # mean difference of pixels that inpainting keeps, of 255
BETWEEN = 0.1  # how far a mixture must be from either end, as a part of the ends' distance


def ground_of(pixels: Floats) -> Floats:
    """The colour (3,) of a picture's border, whatever its name."""
    width = max(1, round(BORDER * pixels.shape[0]))
    border = np.ones(pixels.shape[:2], dtype=bool)
    border[width:-width, width:-width] = False
    return np.median(pixels[border], axis=0).astype(np.float32)


def painted(image: Any) -> Bools:
    """Which pixels (H, W) do not have the background's colour."""
    pixels = to_array(image)
    return np.asarray(np.linalg.norm(pixels - ground_of(pixels), axis=-1) > STRAY_TOLERANCE)


def overlap(first: Bools, second: Bools) -> float:
    """Intersection over union of two masks; 1 for two empty ones."""
    union = int((first | second).sum())
    return int((first & second).sum()) / union if union else 1.0


def placement(image: Any, scene: Scene) -> float:
    """How well what is painted in a picture overlaps with the shapes of a scene, 0 to 1."""
    mask = painted(image)
    drawn = to_array(render([scene], size=mask.shape[0])[0])
    return overlap(mask, painted(drawn))


def composed(image: Any, scene: Scene) -> bool:
    """Whether a picture has as many things as a scene, of about its sizes and in its places, on its background."""
    drawn = to_array(render([scene], size=to_array(image).shape[0])[0])
    if np.linalg.norm(ground_of(to_array(image)) - ground_of(drawn)) > STRAY_TOLERANCE:
        return False
    found, wanted = (
        _things(painted(image)),
        [_things(painted(_only(scene, slot)))[0] for slot in range(len(scene.shapes))],
    )
    if len(found) != len(wanted):
        return False
    orders = (found, found[::-1])
    return any(all(map(_alike, order, wanted)) for order in orders)


def _only(scene: Scene, slot: int) -> Any:
    return render([Scene(scene.background, (scene.shapes[slot],))])[0]


def _things(mask: Bools) -> list[tuple[Floats, float]]:
    """Middle (x, y) and area of each patch of a mask, in pictures, but of specks."""
    things = []
    for part in components(mask):
        if part.mean() > STRAY_AREA:
            ys, xs = np.nonzero(part)
            things.append((np.array([xs.mean(), ys.mean()], dtype=np.float32) / mask.shape[0], float(part.mean())))
    return things


def _alike(first: tuple[Floats, float], second: tuple[Floats, float]) -> bool:
    times = first[1] / second[1]
    return float(np.linalg.norm(first[0] - second[0])) <= SAME_PLACE and 1 / SAME_AREA <= times <= SAME_AREA


def kept_error(image: Any, original: Any, hole: Bools) -> float:
    """Mean absolute difference, of 255, between a repainted picture and its original outside of the hole (H, W)."""
    difference = np.abs(to_array(image) - to_array(original))
    return float(255 * difference[~hole].mean())


ATTRIBUTES = ("background", "color", "size", "place")


def measure(image: Any, attribute: str, where: Bools | None = None) -> Floats:
    """One of ATTRIBUTES of a picture of one shape as a vector: an RGB colour, a square root of an area, a middle.

    The shape's colour is taken where the mask `where` (H, W) says, since a mixture may differ little from the ground.
    """
    pixels = to_array(image)
    if attribute == "background":
        return ground_of(pixels)
    mask = painted(image) if where is None else where
    if attribute == "color":
        return np.median(pixels[mask], axis=0).astype(np.float32) if mask.any() else np.full(3, np.nan, np.float32)
    if attribute == "size":
        return np.sqrt([mask.mean()]).astype(np.float32)
    things = _things(mask)
    # two shapes half-way are not one shape between them
    return things[0][0] if len(things) == 1 else np.full(2, np.nan, np.float32)


def between(middle: Floats, first: Floats, second: Floats) -> bool:
    """Whether a measure lies between two others: nearer to each of them than they are to one another, and like
    neither. What could not be measured does not."""
    whole = float(np.linalg.norm(first - second))
    parts = [float(np.linalg.norm(middle - end)) for end in (first, second)]
    return all(BETWEEN * whole < part < whole for part in parts)


def named_attribute(image: Any, attribute: str) -> str | None:
    """The name of the background's colour, or of the only shape's colour or kind, as `pixel_judge` reads it."""
    reading = read_picture(image)
    if attribute == "background":
        return reading.background
    return getattr(reading.shapes[0], attribute) if len(reading.shapes) == 1 else None
