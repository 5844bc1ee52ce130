"""Reads a picture of flat shapes back into words by pixel analysis alone, to judge the embedded model.

Nothing here is learned and nothing here draws with the renderer's code: the palette, the places and the proportions of
the shapes are all it shares with the training data. A picture is read in four steps:

1. the background is the palette colour that fills the border;
2. every other palette colour that fills a patch thick enough to survive an erosion is the seed of a shape, which keeps
   anti-aliased rims (red on yellow has an orange one) from counting as shapes;
3. a shape is what grows from its seed, as a soft coverage between the background's colour and its own;
4. its kind is the ideal outline, turned as the shape is, that overlaps it best.

`judge` compares that reading with what a caption names, and with nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from kandinsky22.training.captions import Named, NamedShape
from kandinsky22.training.scenes import (
    COLORS,
    PLACE_CENTERS,
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

# Distances in the RGB unit cube. The two nearest palette colours are 0.36 apart, so half of that is the largest error
# with only one possible reading; a little more is allowed, because the nearest colour decides anyway.
COLOR_TOLERANCE = 0.22
PAINT_TOLERANCE = 0.11  # from the background's measured colour to what may belong to a shape's soft edge
STRAY_TOLERANCE = 0.18  # and to what must belong to a shape
OFF_AXIS = 0.26  # how far a shape's pixel may lie from the straight line between its colour and the background

BORDER = 4 / 128  # widths and areas are for a picture of side 1
BORDER_SHARE = 0.7  # of the border must have the background's colour
CORE_DEPTH = 2.0 / 128  # a patch thinner than twice this is a rim or a speck
MIN_CORE_AREA = 12 / 128**2
STRAY_AREA = 40 / 128**2  # more than this much paint outside of all shapes is a mess, not a speck
MIN_FIT = 0.80  # overlap with the best ideal outline below which a shape is of no kind
PLACE_RADIUS = 0.12  # places lie 0.24 apart
SIZE_SPLIT = math.sqrt(RADII["small"][1] * RADII["large"][0])
MIN_DISTANCE = 0.15  # between the middles of two shapes that stand beside or above one another
PLAUSIBLE_RADIUS = (RADII["small"][0] * 0.75, RADII["large"][1] * 1.25)

# Ideal outlines as (fold, outer radius, inner radius) in units of a shape's nominal radius: `fold` tips at the outer
# radius, with straight lines to the points half-way between them at the inner radius.
OUTLINES: dict[str, tuple[int, float, float]] = {
    "square": (4, SQUARE_HALF_SIDE * math.sqrt(2), SQUARE_HALF_SIDE),
    "triangle": (3, TRIANGLE_RADIUS, TRIANGLE_RADIUS / 2),
    "star": (5, STAR_RADIUS, STAR_RADIUS * STAR_INNER),
}
AREAS: dict[str, float] = {"circle": math.pi} | {
    kind: fold * outer * inner * math.sin(math.pi / fold) for kind, (fold, outer, inner) in OUTLINES.items()
}


@dataclass(frozen=True)
class FoundShape:
    """A shape as measured: lengths and positions in fractions of the side, `fit` as overlap with its ideal outline."""

    kind: str | None
    color: str
    size: str | None
    x: float
    y: float
    radius: float
    fit: float

    @property
    def place(self) -> str | None:
        """The place whose centre is near enough to the middle of this shape, or None."""
        distance, place = min((math.hypot(self.x - x, self.y - y), name) for name, (x, y) in PLACE_CENTERS.items())
        return place if distance <= PLACE_RADIUS else None


@dataclass(frozen=True)
class Reading:
    """What is in a picture; `background` is None where no colour fills the border, `stray` the unexplained share."""

    background: str | None
    shapes: tuple[FoundShape, ...]
    stray: float

    @property
    def clean(self) -> bool:
        """Whether hardly any paint lies outside of the shapes."""
        return self.stray <= STRAY_AREA


def to_array(image: Any) -> Floats:
    """Bring a PIL image, an array (H, W, 3) or a tensor (3, H, W) to (H, W, 3) float32 in [0, 1].

    Integer arrays are in [0, 255], floating ones in [0, 1]. Raises ValueError for any other shape.
    """
    if hasattr(image, "detach"):
        image = (image.detach().float() if image.is_floating_point() else image).cpu().numpy()
        image = np.moveaxis(image, 0, -1) if image.ndim == 3 and image.shape[0] == 3 else image
    elif hasattr(image, "convert"):
        image = image.convert("RGB")
    array = np.asarray(image)
    if array.ndim != 3 or array.shape[2] != 3:
        raise ValueError(f"a picture has shape (height, width, 3), not {array.shape}")
    scale = 255.0 if np.issubdtype(array.dtype, np.integer) else 1.0
    # What is not a number becomes grey, which is no colour of the palette.
    return np.clip(np.nan_to_num(array / scale, nan=0.5), 0.0, 1.0).astype(np.float32)


def _shifted(mask: npt.NDArray[Any], dy: int, dx: int, fill: Any) -> npt.NDArray[Any]:
    moved = np.full_like(mask, fill)
    height, width = mask.shape
    moved[max(dy, 0) : height + min(dy, 0), max(dx, 0) : width + min(dx, 0)] = mask[
        max(-dy, 0) : height + min(-dy, 0), max(-dx, 0) : width + min(-dx, 0)
    ]
    return moved


CROSS = ((0, 1), (0, -1), (1, 0), (-1, 0))
DIAGONALS = ((1, 1), (1, -1), (-1, 1), (-1, -1))


def _erode(mask: Bools, depth: int) -> Bools:
    """Take off `depth` pixels; crosses and squares in turn make the eroding disc an octagon."""
    for step in range(depth):
        around = CROSS if step % 2 == 0 else CROSS + DIAGONALS
        mask = np.logical_and.reduce([mask, *(_shifted(mask, dy, dx, False) for dy, dx in around)])
    return mask


def components(mask: Bools) -> Iterator[Bools]:
    """Yield the 4-connected parts of a mask."""
    left = mask.copy()
    while left.any():
        part = np.zeros_like(left)
        part.flat[int(left.argmax())] = True
        size = 0
        while (grown := int(part.sum())) > size:
            size = grown
            for _ in range(4):
                part = np.logical_or.reduce([part, *(_shifted(part, dy, dx, False) for dy, dx in CROSS)]) & left
        left &= ~part
        yield part


def _smooth(pixels: Floats) -> Floats:
    """Average with the binomial 3 x 3 window: noise goes, outlines stay where they are."""
    padded = np.pad(pixels, ((1, 1), (1, 1), (0, 0)), mode="edge")
    rows = (padded[:-2] + 2 * padded[1:-1] + padded[2:]) / 4
    return ((rows[:, :-2] + 2 * rows[:, 1:-1] + rows[:, 2:]) / 4).astype(np.float32)


def _classify(pixels: Floats) -> Labels:
    """Index of each pixel's palette colour, -1 where none is near."""
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
    """Every thick patch of one colour other than the background's, as (colour, core of the patch)."""
    depth = max(1, round(CORE_DEPTH * labels.shape[0]))
    seeds = []
    for color in np.unique(labels):
        if color in (-1, background):
            continue
        for part in components(_erode(labels == color, depth)):
            if part.sum() >= MIN_CORE_AREA * labels.size:
                seeds.append((int(color), part))
    return seeds


def _grow(seeds: Sequence[Bools], painted: Bools, free_steps: int) -> Labels:
    """Grow all seeds at the same pace over painted pixels, and `free_steps` further over any: owner index or -1."""
    owner = np.full(painted.shape, -1, dtype=np.int64)
    for index, seed in enumerate(seeds):
        owner[seed] = index
    anywhere = np.ones_like(painted)
    for allowed, limit in ((painted, sum(painted.shape)), (anywhere, free_steps)):
        for step in range(limit):
            before = int((owner < 0).sum())
            for dy, dx in CROSS if step % 2 == 0 else CROSS + DIAGONALS:
                neighbour = _shifted(owner, dy, dx, -1)
                owner = np.where((owner < 0) & allowed, neighbour, owner)
            if step and int((owner < 0).sum()) == before:
                break
    return owner


def _soft_coverage(pixels: Floats, ground: Floats, paint: Floats) -> tuple[Floats, Bools]:
    """How much of each pixel is paint rather than ground, 0 to 1, and whether it is a mixture of the two at all."""
    axis = paint - ground
    along = ((pixels - ground) @ axis) / (axis @ axis)
    aside = np.linalg.norm(pixels - ground - np.clip(along, 0, 1)[..., None] * axis, axis=-1)
    # Symmetric about one half, so that blurred outlines keep their area while faint noise counts for nothing.
    mixed: Bools = aside <= OFF_AXIS
    return (np.clip((along - 0.2) / 0.6, 0.0, 1.0) * mixed).astype(np.float32), mixed


def _ideal(kind: str, radius: float, turn: float, dx: Floats, dy: Floats) -> Floats:
    """Coverage of an ideal shape of nominal `radius` around (0, 0), in pixels, with a tip towards angle `turn`."""
    distance = np.hypot(dx, dy)
    if kind == "circle":
        return np.clip(radius + 0.5 - distance, 0.0, 1.0).astype(np.float32)
    fold, outer, inner = OUTLINES[kind]
    # Seen from its tip's axis, every wedge of half an n-th turn holds the same one straight edge.
    angle = np.abs((np.arctan2(dy, dx) - turn + math.pi / fold) % (2 * math.pi / fold) - math.pi / fold)
    x, y = distance * np.cos(angle), distance * np.sin(angle)
    edge_x, edge_y = inner * math.cos(math.pi / fold) - outer, inner * math.sin(math.pi / fold)
    beyond = (edge_y * (x - outer * radius) - edge_x * y) / math.hypot(edge_x, edge_y)
    return np.clip(0.5 - beyond, 0.0, 1.0).astype(np.float32)


def _best_outline(coverage: Floats, dx: Floats, dy: Floats) -> tuple[str, float, float]:
    """The kind that overlaps a coverage best, its nominal radius in pixels, and the intersection over the union."""
    area = float(coverage.sum())
    best = ("circle", 0.0, 0.0)
    for kind, unit in AREAS.items():
        radius, turn = math.sqrt(area / unit), 0.0
        if kind in OUTLINES:
            # The n-th moment of a shape with n tips points to one of them.
            fold = OUTLINES[kind][0]
            moment = (coverage * ((dx + 1j * dy) / radius) ** fold).sum()
            turn = float(np.angle(moment)) / fold
        ideal = _ideal(kind, radius, turn, dx, dy)
        fit = float(np.minimum(ideal, coverage).sum() / np.maximum(ideal, coverage).sum())
        if fit > best[2]:
            best = (kind, radius, fit)
    return best


def _middle(profile: Floats) -> float:
    """The middle of the extent of a coverage summed along one axis, in pixels."""
    inside = np.flatnonzero(profile >= 1.0)
    return float(inside[0] + inside[-1] + 1) / 2 if inside.size else 0.0


def _measure(color: int, coverage: Floats) -> FoundShape:
    height, width = coverage.shape
    ys, xs = np.mgrid[0:height, 0:width].astype(np.float32) + np.float32(0.5)
    area = max(float(coverage.sum()), 1e-6)
    dx, dy = xs - (coverage * xs).sum() / area, ys - (coverage * ys).sum() / area
    kind, radius, fit = _best_outline(coverage, dx, dy)
    radius /= height
    small = radius < SIZE_SPLIT
    plausible = PLAUSIBLE_RADIUS[0] <= radius <= PLAUSIBLE_RADIUS[1]
    return FoundShape(
        kind=kind if fit >= MIN_FIT else None,
        color=NAMES[color],
        size=("small" if small else "large") if plausible else None,
        x=_middle(coverage.sum(0)) / width,
        y=_middle(coverage.sum(1)) / height,
        radius=radius,
        fit=fit,
    )


def read_picture(image: Any) -> Reading:
    """Read background and shapes out of a picture (anything `to_array` takes)."""
    pixels = _smooth(to_array(image))
    labels = _classify(pixels)
    background = _find_background(labels)
    if background is None:
        return Reading(None, (), 1.0)
    # The measured ground rather than the palette's: a tinted background must not count as paint.
    ground = np.median(pixels[labels == background], axis=0)
    contrast = np.linalg.norm(pixels - ground, axis=-1)
    seeds = _find_seeds(labels, background)
    owner = _grow([core for _, core in seeds], contrast > PAINT_TOLERANCE, free_steps=2)
    shapes, stray = [], contrast > STRAY_TOLERANCE
    for index, (color, core) in enumerate(seeds):
        own = owner == index
        coverage, mixed = _soft_coverage(pixels, ground, np.median(pixels[core], axis=0))
        stray &= ~(own & mixed)
        shapes.append(_measure(color, coverage * own))
    return Reading(NAMES[background], tuple(shapes), float(_erode(stray, 1).mean()))


ATTRIBUTES = ("background", "count", "shape", "color", "size", "place", "relation")


@dataclass(frozen=True)
class Verdict:
    """Which of the named attributes are right, by name, one of ATTRIBUTES; what is not named has no entry."""

    right: dict[str, bool]
    reading: Reading

    @property
    def all_right(self) -> bool:
        """Whether everything named is right."""
        return all(self.right.values())

    @property
    def wrong(self) -> tuple[str, ...]:
        """The named attributes that are not right."""
        return tuple(name for name, right in self.right.items() if not right)


def _relation_holds(relation: str, first: FoundShape | None, second: FoundShape | None) -> bool:
    if first is None or second is None:
        return False
    across, down = second.x - first.x, second.y - first.y
    along, aside = (across, down) if relation in ("left of", "right of") else (down, across)
    if relation in ("right of", "below"):
        along = -along
    return along >= MIN_DISTANCE and along > abs(aside)


def _compare(named: Named, found: Sequence[FoundShape | None]) -> dict[str, bool]:
    """Compare named shapes with found ones in the same order, attribute by attribute."""

    def agree(attribute: str, told: Sequence[str | None]) -> bool:
        pairs = zip(told, found, strict=True)
        return all(shape is not None and getattr(shape, attribute) == word for word, shape in pairs if word is not None)

    shapes: Sequence[NamedShape] = named.shapes
    right = {"shape": agree("kind", [shape.kind for shape in shapes])}
    for attribute in ("color", "size"):
        told = [getattr(shape, attribute) for shape in shapes]
        if any(word is not None for word in told):
            right[attribute] = agree(attribute, told)
    if named.place is not None:
        right["place"] = agree("place", [named.place] * len(shapes))
    if named.relation is not None:
        right["relation"] = _relation_holds(named.relation, found[0], found[1])
    return right


def judge(image: Any, named: Named) -> Verdict:
    """Judge whether a picture shows what a caption names.

    `image` is anything `to_array` takes. "count" is right when the picture holds as many shapes as are named and hardly
    any other paint. Shapes are matched with named ones in the order that makes most attributes right; a named shape
    without a match makes its attributes wrong. Raises ValueError where no shape is named: then nothing can be judged.
    """
    if not named.shapes:
        raise ValueError("a caption that names no shape cannot be judged")
    reading = read_picture(image)
    right: dict[str, bool] = {}
    if named.background is not None:
        right["background"] = reading.background == named.background
    right["count"] = reading.clean and len(reading.shapes) == len(named.shapes)
    missing: list[FoundShape | None] = [None] * max(0, len(named.shapes) - len(reading.shapes))
    orders = permutations([*reading.shapes, *missing], len(named.shapes))
    best = max((_compare(named, order) for order in orders), key=lambda found: sum(found.values()))
    return Verdict(right | best, reading)
