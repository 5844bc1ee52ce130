"""Judge of the embedded model: reads the attributes of flat shapes from an image, by pixel analysis alone.

The judge is not learned and does not use the renderer. It shares only the palette, the positions and the proportions of
the shapes with the training data. An image is read in four steps:

1. The background is the palette colour that fills the border.
2. Each patch of another palette colour that is thick enough to survive an erosion is the seed of a shape. Anti-aliased
   rims, such as the orange one of red on yellow, are too thin to count as shapes.
3. A shape is the region that grows from its seed, as a soft coverage between the background's colour and its own.
4. Its kind is that of the ideal outline, rotated like the shape, that overlaps it best.

`judge` compares the result with the attributes that a caption states.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from kandinsky22.training.captions import SceneDescription, ShapeDescription
from kandinsky22.training.scenes import (
    COLORS,
    POSITION_CENTERS,
    RADII,
    SQUARE_HALF_SIDE,
    STAR_INNER,
    STAR_RADIUS,
    TRIANGLE_RADIUS,
)

Floats: TypeAlias = npt.NDArray[np.float32]
Bools: TypeAlias = npt.NDArray[np.bool_]
Labels: TypeAlias = npt.NDArray[np.int64]

NAMES = tuple(COLORS)
PALETTE: Floats = np.array(list(COLORS.values()), dtype=np.float32)

# Distances in the RGB unit cube. The two nearest palette colours are 0.36 apart, thus errors up to half of that are
# unambiguous. A little more is allowed, since the nearest colour decides anyway.
COLOR_TOLERANCE = 0.22
EDGE_TOLERANCE = 0.11  # smallest distance from the background's measured colour of pixels at a shape's soft edge
STRAY_TOLERANCE = 0.18  # smallest distance from the background's measured colour of pixels that must be part of a shape
OFF_AXIS = 0.26  # largest distance of a shape's pixel from the straight line between its colour and the background

BORDER = 4 / 128  # widths and areas are relative to an image of side 1
BORDER_SHARE = 0.7  # smallest share of the border that has the background's colour
CORE_DEPTH = 2.0 / 128  # a patch thinner than twice this is a rim or a speck
MIN_CORE_AREA = 12 / 128**2
MAX_STRAY_AREA = 40 / 128**2  # largest foreground area outside all shapes that counts as a speck
MIN_FIT = 0.80  # smallest overlap of a shape with the best ideal outline
POSITION_RADIUS = 0.12  # largest distance of a shape from its position; positions are 0.24 apart
SIZE_SPLIT = math.sqrt(RADII["small"][1] * RADII["large"][0])
MIN_DISTANCE = 0.15  # smallest distance between the middles of two shapes that a relation describes
PLAUSIBLE_RADIUS = (RADII["small"][0] * 0.75, RADII["large"][1] * 1.25)

# Ideal outlines as (fold, outer radius, inner radius), in units of a shape's nominal radius: `fold` tips at the outer
# radius, joined by straight lines to points half-way between them at the inner radius.
OUTLINES: dict[str, tuple[int, float, float]] = {
    "square": (4, SQUARE_HALF_SIDE * math.sqrt(2), SQUARE_HALF_SIDE),
    "triangle": (3, TRIANGLE_RADIUS, TRIANGLE_RADIUS / 2),
    "star": (5, STAR_RADIUS, STAR_RADIUS * STAR_INNER),
}
AREAS: dict[str, float] = {"circle": math.pi} | {
    kind: fold * outer * inner * math.sin(math.pi / fold) for kind, (fold, outer, inner) in OUTLINES.items()
}


@dataclass(frozen=True)
class MeasuredShape:
    """A shape of an image. Lengths and coordinates are fractions of the image's side.

    Attributes:
        kind: Kind of shape, or None if it fits no ideal outline.
        color: Name of its colour.
        size: "small" or "large", or None if its radius is implausible.
        x: Horizontal coordinate of its middle, to the right.
        y: Vertical coordinate of its middle, downwards.
        radius: Its nominal radius.
        fit: Intersection over union with its ideal outline.
    """

    kind: str | None
    color: str
    size: str | None
    x: float
    y: float
    radius: float
    fit: float

    @property
    def position(self) -> str | None:
        """Position whose centre is close to the middle of this shape, or None."""
        distances = ((math.hypot(self.x - x, self.y - y), name) for name, (x, y) in POSITION_CENTERS.items())
        distance, position = min(distances)
        return position if distance <= POSITION_RADIUS else None


@dataclass(frozen=True)
class Reading:
    """Attributes that are read from an image.

    Attributes:
        background: Name of the background's colour, or None if no colour fills the border.
        shapes: The shapes.
        stray: Share of pixels that are part of neither the background nor a shape.
    """

    background: str | None
    shapes: tuple[MeasuredShape, ...]
    stray: float

    @property
    def is_clean(self) -> bool:
        """Whether nearly all pixels are part of the background or of a shape."""
        return self.stray <= MAX_STRAY_AREA


def to_array(image: Any) -> Floats:
    """Return an image as an array (H, W, 3), float32 in [0, 1].

    Args:
        image: PIL image, array (H, W, 3) or tensor (3, H, W). Integers are in [0, 255], floats in [0, 1].

    Raises:
        ValueError: The image has another shape.
    """
    if hasattr(image, "detach"):
        image = (image.detach().float() if image.is_floating_point() else image).cpu().numpy()
        image = np.moveaxis(image, 0, -1) if image.ndim == 3 and image.shape[0] == 3 else image
    elif hasattr(image, "convert"):
        image = image.convert("RGB")
    array = np.asarray(image)
    if array.ndim != 3 or array.shape[2] != 3:
        raise ValueError(f"image.shape={array.shape} is invalid: expected (height, width, 3)")
    scale = 255.0 if np.issubdtype(array.dtype, np.integer) else 1.0
    # NaN becomes grey, which is not a colour of the palette.
    return np.clip(np.nan_to_num(array / scale, nan=0.5), 0.0, 1.0).astype(np.float32)


def shifted(mask: npt.NDArray[Any], dy: int, dx: int, fill: Any) -> npt.NDArray[Any]:
    """Return an array (H, W, ...) moved down and to the right.

    Args:
        mask: The array.
        dy: Number of rows.
        dx: Number of columns.
        fill: Value of the rows and columns that become free.
    """
    moved = np.full_like(mask, fill)
    height, width = mask.shape[:2]
    moved[max(dy, 0) : height + min(dy, 0), max(dx, 0) : width + min(dx, 0)] = mask[
        max(-dy, 0) : height + min(-dy, 0), max(-dx, 0) : width + min(-dx, 0)
    ]
    return moved


CROSS = ((0, 1), (0, -1), (1, 0), (-1, 0))
DIAGONALS = ((1, 1), (1, -1), (-1, 1), (-1, -1))


def _erode(mask: Bools, depth: int) -> Bools:
    """Erode by `depth` pixels; alternating crosses and squares make the structuring element an octagon."""
    for step in range(depth):
        around = CROSS if step % 2 == 0 else CROSS + DIAGONALS
        mask = np.logical_and.reduce([mask, *(shifted(mask, dy, dx, False) for dy, dx in around)])
    return mask


def components(mask: Bools) -> Iterator[Bools]:
    """Yield the 4-connected components of a mask.

    Args:
        mask: Mask (H, W).
    """
    rest = mask.copy()
    while rest.any():
        part = np.zeros_like(rest)
        part.flat[int(rest.argmax())] = True
        size = 0
        while (grown := int(part.sum())) > size:
            size = grown
            for _ in range(4):
                part = np.logical_or.reduce([part, *(shifted(part, dy, dx, False) for dy, dx in CROSS)]) & rest
        rest &= ~part
        yield part


def _smooth(pixels: Floats) -> Floats:
    """Average with the binomial 3 x 3 window, which removes noise and does not move outlines."""
    padded = np.pad(pixels, ((1, 1), (1, 1), (0, 0)), mode="edge")
    rows = (padded[:-2] + 2 * padded[1:-1] + padded[2:]) / 4
    return ((rows[:, :-2] + 2 * rows[:, 1:-1] + rows[:, 2:]) / 4).astype(np.float32)


def _classify(pixels: Floats) -> Labels:
    """Return the index of each pixel's palette colour, or -1 if none is close."""
    distances = np.linalg.norm(pixels[:, :, None] - PALETTE, axis=-1)
    return np.where(distances.min(-1) <= COLOR_TOLERANCE, distances.argmin(-1), -1)


def _find_background(labels: Labels) -> int | None:
    width = max(1, round(BORDER * labels.shape[0]))
    border = np.ones(labels.shape, dtype=bool)
    border[width:-width, width:-width] = False
    counts = np.bincount(labels[border] + 1, minlength=len(NAMES) + 1)
    color = int(counts[1:].argmax())
    return color if counts[1 + color] >= BORDER_SHARE * border.sum() else None


def _find_seeds(labels: Labels, background: int) -> list[tuple[int, Bools]]:
    """Return the thick patches of other colours than the background's, as (colour, core of the patch)."""
    depth = max(1, round(CORE_DEPTH * labels.shape[0]))
    seeds = []
    for color in np.unique(labels):
        if color in (-1, background):
            continue
        for part in components(_erode(labels == color, depth)):
            if part.sum() >= MIN_CORE_AREA * labels.size:
                seeds.append((int(color), part))
    return seeds


def _grow(seeds: Sequence[Bools], foreground: Bools, free_steps: int) -> Labels:
    """Grow all seeds at the same rate over the foreground, and by `free_steps` over any pixels.

    Returns the index of each pixel's seed, or -1.
    """
    owner = np.full(foreground.shape, -1, dtype=np.int64)
    for index, seed in enumerate(seeds):
        owner[seed] = index
    everywhere = np.ones_like(foreground)
    for allowed, limit in ((foreground, sum(foreground.shape)), (everywhere, free_steps)):
        for step in range(limit):
            before = int((owner < 0).sum())
            for dy, dx in CROSS if step % 2 == 0 else CROSS + DIAGONALS:
                neighbour = shifted(owner, dy, dx, -1)
                owner = np.where((owner < 0) & allowed, neighbour, owner)
            if step and int((owner < 0).sum()) == before:
                break
    return owner


def _soft_coverage(pixels: Floats, background: Floats, color: Floats) -> tuple[Floats, Bools]:
    """Return the share of `color` in each pixel, 0 to 1, and whether the pixel is a mixture with the background."""
    axis = color - background
    along = ((pixels - background) @ axis) / (axis @ axis)
    off_axis = np.linalg.norm(pixels - background - np.clip(along, 0, 1)[..., None] * axis, axis=-1)
    mixed: Bools = off_axis <= OFF_AXIS
    # The clipping is symmetric about one half, thus blurred outlines keep their area, and faint noise has no effect.
    return (np.clip((along - 0.2) / 0.6, 0.0, 1.0) * mixed).astype(np.float32), mixed


def _ideal(kind: str, radius: float, rotation: float, dx: Floats, dy: Floats) -> Floats:
    """Return the coverage of an ideal shape around (0, 0), in pixels, with a tip at angle `rotation`."""
    distance = np.hypot(dx, dy)
    if kind == "circle":
        return np.clip(radius + 0.5 - distance, 0.0, 1.0).astype(np.float32)
    fold, outer, inner = OUTLINES[kind]
    # Relative to the axis of its tip, each wedge of 180 / fold degrees contains the same straight edge.
    angle = np.abs((np.arctan2(dy, dx) - rotation + math.pi / fold) % (2 * math.pi / fold) - math.pi / fold)
    x, y = distance * np.cos(angle), distance * np.sin(angle)
    edge_x, edge_y = inner * math.cos(math.pi / fold) - outer, inner * math.sin(math.pi / fold)
    beyond = (edge_y * (x - outer * radius) - edge_x * y) / math.hypot(edge_x, edge_y)
    return np.clip(0.5 - beyond, 0.0, 1.0).astype(np.float32)


def _best_outline(coverage: Floats, dx: Floats, dy: Floats) -> tuple[str, float, float]:
    """Return the kind that fits a coverage best, its nominal radius in pixels, and the intersection over union."""
    area = float(coverage.sum())
    best = ("circle", 0.0, 0.0)
    for kind, unit in AREAS.items():
        radius, rotation = math.sqrt(area / unit), 0.0
        if kind in OUTLINES:
            # The n-th moment of a shape with n tips points to one of them.
            fold = OUTLINES[kind][0]
            moment = (coverage * ((dx + 1j * dy) / radius) ** fold).sum()
            rotation = float(np.angle(moment)) / fold
        ideal = _ideal(kind, radius, rotation, dx, dy)
        fit = float(np.minimum(ideal, coverage).sum() / np.maximum(ideal, coverage).sum())
        if fit > best[2]:
            best = (kind, radius, fit)
    return best


def _middle(profile: Floats) -> float:
    """Return the middle of the extent of a coverage that is summed along one axis, in pixels."""
    inside = np.flatnonzero(profile >= 1.0)
    return float(inside[0] + inside[-1] + 1) / 2 if inside.size else 0.0


def _measure(color: int, coverage: Floats) -> MeasuredShape:
    height, width = coverage.shape
    ys, xs = np.mgrid[0:height, 0:width].astype(np.float32) + np.float32(0.5)
    area = max(float(coverage.sum()), 1e-6)
    dx, dy = xs - (coverage * xs).sum() / area, ys - (coverage * ys).sum() / area
    kind, radius, fit = _best_outline(coverage, dx, dy)
    radius /= height
    small = radius < SIZE_SPLIT
    plausible = PLAUSIBLE_RADIUS[0] <= radius <= PLAUSIBLE_RADIUS[1]
    return MeasuredShape(
        kind=kind if fit >= MIN_FIT else None,
        color=NAMES[color],
        size=("small" if small else "large") if plausible else None,
        x=_middle(coverage.sum(0)) / width,
        y=_middle(coverage.sum(1)) / height,
        radius=radius,
        fit=fit,
    )


def read_image(image: Any) -> Reading:
    """Return the background and the shapes of an image.

    Args:
        image: Any image that `to_array` accepts.
    """
    pixels = _smooth(to_array(image))
    labels = _classify(pixels)
    background = _find_background(labels)
    if background is None:
        return Reading(None, (), 1.0)
    # The measured colour is used instead of the palette's, since a tinted background must not count as foreground.
    background_color = np.median(pixels[labels == background], axis=0)
    contrast = np.linalg.norm(pixels - background_color, axis=-1)
    seeds = _find_seeds(labels, background)
    owner = _grow([core for _, core in seeds], contrast > EDGE_TOLERANCE, free_steps=2)
    shapes, stray = [], contrast > STRAY_TOLERANCE
    for index, (color, core) in enumerate(seeds):
        region = owner == index
        coverage, mixed = _soft_coverage(pixels, background_color, np.median(pixels[core], axis=0))
        stray &= ~(region & mixed)
        shapes.append(_measure(color, coverage * region))
    return Reading(NAMES[background], tuple(shapes), float(_erode(stray, 1).mean()))


ATTRIBUTES = ("background", "count", "shape", "color", "size", "position", "relation")


@dataclass(frozen=True)
class Verdict:
    """Judgement of an image.

    Attributes:
        correct: Whether each attribute that the caption states is correct, by its name in ATTRIBUTES.
        reading: Attributes that were read from the image.
    """

    correct: dict[str, bool]
    reading: Reading

    @property
    def all_correct(self) -> bool:
        """Whether all stated attributes are correct."""
        return all(self.correct.values())

    @property
    def wrong(self) -> tuple[str, ...]:
        """The stated attributes that are not correct."""
        return tuple(name for name, is_correct in self.correct.items() if not is_correct)


def _relation_holds(relation: str, first: MeasuredShape | None, second: MeasuredShape | None) -> bool:
    if first is None or second is None:
        return False
    across, down = second.x - first.x, second.y - first.y
    along, aside = (across, down) if relation in ("left of", "right of") else (down, across)
    if relation in ("right of", "below"):
        along = -along
    return along >= MIN_DISTANCE and along > abs(aside)


def _compare(description: SceneDescription, shapes: Sequence[MeasuredShape | None]) -> dict[str, bool]:
    """Compare stated shapes with measured ones in the same order, attribute by attribute."""

    def agree(attribute: str, stated: Sequence[str | None]) -> bool:
        pairs = [(value, shape) for value, shape in zip(stated, shapes, strict=True) if value is not None]
        return all(shape is not None and getattr(shape, attribute) == value for value, shape in pairs)

    stated_shapes: Sequence[ShapeDescription] = description.shapes
    correct = {"shape": agree("kind", [shape.kind for shape in stated_shapes])}
    for attribute in ("color", "size"):
        stated = [getattr(shape, attribute) for shape in stated_shapes]
        if any(value is not None for value in stated):
            correct[attribute] = agree(attribute, stated)
    if description.position is not None:
        correct["position"] = agree("position", [description.position] * len(stated_shapes))
    if description.relation is not None:
        correct["relation"] = _relation_holds(description.relation, shapes[0], shapes[1])
    return correct


def judge(image: Any, description: SceneDescription) -> Verdict:
    """Judge whether an image shows the attributes that a caption states.

    "count" is correct if the image has as many shapes as the caption and hardly any other foreground. Shapes are
    matched with stated ones in the order that makes most attributes correct. Attributes of a stated shape without a
    match are wrong.

    Args:
        image: Any image that `to_array` accepts.
        description: Attributes that the caption states.

    Returns:
        The verdict.

    Raises:
        ValueError: The caption states no shape.
    """
    if not description.shapes:
        raise ValueError("description.shapes=() is invalid: expected at least one shape")
    reading = read_image(image)
    correct: dict[str, bool] = {}
    if description.background is not None:
        correct["background"] = reading.background == description.background
    correct["count"] = reading.is_clean and len(reading.shapes) == len(description.shapes)
    missing: list[MeasuredShape | None] = [None] * max(0, len(description.shapes) - len(reading.shapes))
    orders = permutations([*reading.shapes, *missing], len(description.shapes))
    best = max((_compare(description, order) for order in orders), key=lambda result: sum(result.values()))
    return Verdict(correct | best, reading)
