"""Scenes of the embedded model's training: one to three things on a background, sampled at random.

Coordinates are fractions of the image's side, x to the right and y downwards, thus a scene can be rendered at any size.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kandinsky22.errors import invalid
from kandinsky22.training.drawings.vocabulary import (
    ARRANGEMENTS,
    BACKGROUNDS,
    COLORS,
    DRAWN_THINGS,
    GRADIENT,
    NATURAL,
    NATURAL_ONLY,
    PAINTED_SCENES,
    PLAIN,
    POSITIONS,
    SHAPES,
    STYLES,
    THINGS,
)

CENTERS = {
    "center": (0.5, 0.5),
    "left": (0.28, 0.5),
    "right": (0.72, 0.5),
    "top": (0.5, 0.28),
    "bottom": (0.5, 0.72),
}
JITTER = 0.02  # largest offset of a thing's centre from its nominal centre, in x and in y
RADIUS_JITTER = 0.02  # largest offset of a thing's extent from its nominal extent
CELLS = 32  # latents along each side of an image
# Longer side of a thing's bounding box, in whole latents. Where things are aligned, the latents of a thing in one size
# are nearly the same at every position.
SINGLE_EXTENTS = {"small": 10 / CELLS, "medium": 14 / CELLS, "large": 22 / CELLS}
PAIR_EXTENTS = {"small": 8 / CELLS, "medium": 10 / CELLS, "large": 14 / CELLS}
ON_EXTENTS = (14 / CELLS, 10 / CELLS)  # the lower thing and the one on it
FRONT_EXTENTS = (14 / CELLS, 10 / CELLS)  # the thing behind and the one in front
ROW_EXTENT = 8 / CELLS
PAIR_OFFSET = 0.24  # distance of each of two things' centres from the middle of the image
ON_CENTERS = ((0.5, 0.66), (0.5, 0.28))  # the row of the upper thing depends on the lower one
FRONT_CENTERS = ((0.44, 0.44), (0.62, 0.62))
ROW_CENTERS = ((0.19, 0.5), (0.5, 0.5), (0.81, 0.5))

# Combinations that are left out of training, to measure whether the model composes attributes or recalls images: one in
# so many, chosen by a checksum of their names.
HELD_OUT_COLORS = 12
HELD_OUT_STYLES = 24
HELD_OUT_PAIRS = 8
VARIANTS = 4  # of painted backgrounds
ATTEMPTS = 10_000  # a mixture that has no valid scene after so many attempts is refused


@dataclass(frozen=True)
class Background:
    """A background.

    Attributes:
        kind: "plain", "gradient" or "painted".
        name: Name of the colour, one of COLORS, or of the painted scene, one of PAINTED_SCENES.
        variant: Number of the variant of a painted scene, from 0 to below VARIANTS.
    """

    kind: str
    name: str
    variant: int = 0

    @property
    def index(self) -> int:
        """Index in BACKGROUNDS."""
        return BACKGROUNDS.index((self.kind, self.name))


@dataclass(frozen=True)
class Thing:
    """A thing. Lengths and coordinates are fractions of the image's side.

    Attributes:
        name: Its name, one of THINGS.
        color: Name of its colour, one of THING_COLORS.
        size: Its size, one of SIZES.
        x: Horizontal coordinate of its bounding box's centre, to the right.
        y: Vertical coordinate of its bounding box's centre, downwards.
        extent: Longer side of its bounding box.
    """

    name: str
    color: str
    size: str
    x: float
    y: float
    extent: float


@dataclass(frozen=True)
class Scene:
    """A background with one to three things.

    Attributes:
        style: Style of all drawings, one of STYLES.
        background: The background.
        things: The things from back to front: left before right, upper before lower, the lower one before the one on
            it, the one behind before the one in front.
        arrangement: Arrangement of several things, one of ARRANGEMENTS; None for one thing.
        position: Position of a single thing, one of POSITIONS; None for several.
    """

    style: str
    background: Background
    things: tuple[Thing, ...]
    arrangement: str | None = None
    position: str | None = None


def _is_one_in(count: int, *names: str) -> bool:
    return zlib.crc32(" ".join(names).encode()) % count == 0


def is_held_out(scene: Scene) -> bool:
    """Return whether a scene contains a combination of attributes that is left out of training.

    Args:
        scene: The scene.
    """
    for thing in scene.things:
        if thing.color != NATURAL and _is_one_in(HELD_OUT_COLORS, thing.name, thing.color):
            return True
        if thing.name not in SHAPES and _is_one_in(HELD_OUT_STYLES, thing.name, scene.style):
            return True
    names = [thing.name for thing in scene.things]
    pairs = [sorted((a, b)) for i, a in enumerate(names) for b in names[i + 1 :]]
    return any(_is_one_in(HELD_OUT_PAIRS, *pair, scene.arrangement or "") for pair in pairs)


@dataclass(frozen=True)
class Mixture:
    """Shares of what scenes consist of.

    Attributes:
        arrangements: Probability of each of ARRANGEMENTS; the rest are scenes of one thing.
        natural: Probability that a thing has its natural colours.
        painted: Probability of a painted background.
        gradient: Probability of a gradient.
        shapes: Probability that a thing is one of the four shapes.
        styles: Styles that are drawn.
        things: Things that are drawn, beside the shapes.
        aligned: Whether bounding boxes begin and end between latents; else their positions and sizes vary a little.
    """

    arrangements: tuple[float, ...] = (0.14, 0.12, 0.08, 0.06, 0.05)
    natural: float = 0.5
    painted: float = 0.25
    gradient: float = 0.2
    shapes: float = 0.06
    styles: Sequence[str] = STYLES
    things: Sequence[str] = tuple(name for name in THINGS if name not in SHAPES)
    aligned: bool = False


# What the decoder draws. Sharp before many: the two styles that share their outlines, and two thirds of the things.
DRAWN_STYLES = ("flat", "3D")
DRAWN = Mixture(styles=DRAWN_STYLES, things=DRAWN_THINGS, aligned=True)


def _pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


def sample_background(rng: np.random.Generator, mixture: Mixture) -> Background:
    """Return a random background.

    Args:
        rng: Random generator.
        mixture: Shares of the kinds.
    """
    uniform = rng.random()
    if uniform < mixture.painted:
        return Background("painted", _pick(rng, PAINTED_SCENES), int(rng.integers(VARIANTS)))
    kind = GRADIENT if uniform < mixture.painted + mixture.gradient else PLAIN
    return Background(kind, _pick(rng, tuple(COLORS)))


def _thing(
    rng: np.random.Generator,
    background: Background,
    mixture: Mixture,
    size: str,
    center: tuple[float, float],
    extent: float,
) -> Thing:
    name = _pick(rng, SHAPES if rng.random() < mixture.shapes else mixture.things)
    natural = name in NATURAL_ONLY or (name not in SHAPES and rng.random() < mixture.natural)
    # A thing in the colour of its background would be invisible.
    color = NATURAL if natural else _pick(rng, [color for color in COLORS if color != background.name])
    if mixture.aligned:
        x, y = (round((middle - extent / 2) * CELLS) / CELLS + extent / 2 for middle in center)
        return Thing(name, color, size, x, y, extent)
    dx, dy = rng.uniform(-JITTER, JITTER, 2)
    extent += float(rng.uniform(-RADIUS_JITTER, RADIUS_JITTER))
    return Thing(name, color, size, float(center[0] + dx), float(center[1] + dy), extent)


def _sample_scene(rng: np.random.Generator, mixture: Mixture, arrangement: str | None) -> Scene:
    """Sample a scene that may be held out."""
    background, style = sample_background(rng, mixture), _pick(rng, mixture.styles)
    near, far = 0.5 - PAIR_OFFSET, 0.5 + PAIR_OFFSET
    if arrangement is None:
        size = _pick(rng, ("small", "medium", "large", "large"))
        position = "center" if size == "large" else _pick(rng, POSITIONS)
        thing = _thing(rng, background, mixture, size, CENTERS[position], SINGLE_EXTENTS[size])
        return Scene(style, background, (thing,), None, position)
    if arrangement in ("beside", "above"):
        sizes = [_pick(rng, tuple(PAIR_EXTENTS)) for _ in range(2)]
        centers = [(near, 0.5), (far, 0.5)] if arrangement == "beside" else [(0.5, near), (0.5, far)]
        extents = [PAIR_EXTENTS[size] for size in sizes]
    elif arrangement == "on":
        sizes, centers, extents = ["medium", "small"], list(ON_CENTERS), list(ON_EXTENTS)
    elif arrangement == "front":
        sizes, centers, extents = ["medium", "medium"], list(FRONT_CENTERS), list(FRONT_EXTENTS)
    else:
        sizes, centers, extents = ["small"] * 3, list(ROW_CENTERS), [ROW_EXTENT] * 3
    for _ in range(ATTEMPTS):
        parts = zip(sizes, centers, extents, strict=True)
        things = tuple(_thing(rng, background, mixture, size, center, extent) for size, center, extent in parts)
        if len({thing.name for thing in things}) == len(things):
            return Scene(style, background, things, arrangement)
    raise invalid("mixture", mixture, "one with more different things")


def sample_scene(
    rng: np.random.Generator,
    mixture: Mixture | None = None,
    *,
    arrangement: str | None = "any",
    held_out: bool = False,
) -> Scene:
    """Return a random scene.

    Args:
        rng: Random generator.
        mixture: Shares of what scenes consist of; None takes the defaults.
        arrangement: One of ARRANGEMENTS; None for one thing, "any" for a random one.
        held_out: Whether the scene is one that is left out of training, or one that is not.

    Raises:
        InputError: The mixture has no such scene.
    """
    mixture = mixture or Mixture()
    if arrangement == "any":
        edges = np.cumsum(mixture.arrangements)
        index = int(np.searchsorted(edges, rng.random(), side="right"))
        arrangement = ARRANGEMENTS[index] if index < len(ARRANGEMENTS) else None
    for _ in range(ATTEMPTS):
        scene = _sample_scene(rng, mixture, arrangement)
        if is_held_out(scene) == held_out:
            return scene
    raise invalid("mixture", mixture, f"one that has scenes which are {'' if held_out else 'not '}held out")
