"""Scenes of the embedded model's training: flat geometric compositions, sampled at random and rendered.

A scene consists of one or two shapes on a coloured background. Coordinates are fractions of the image's side, x to the
right and y downwards, thus a scene can be rendered at any size.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch

from kandinsky22.errors import invalid

Palette: TypeAlias = dict[str, tuple[float, ...]]

# RGB in [0, 1]. Any two colours differ by at least a third of the unit cube's side, thus pixel analysis can always tell
# them apart.
COLORS: Palette = {
    "red": (0.84, 0.15, 0.17),
    "green": (0.18, 0.62, 0.30),
    "blue": (0.11, 0.37, 0.84),
    "yellow": (0.98, 0.84, 0.20),
    "orange": (0.94, 0.49, 0.11),
    "purple": (0.61, 0.23, 0.69),
    "black": (0.09, 0.09, 0.11),
    "white": (0.97, 0.97, 0.96),
}
SHAPES = ("circle", "square", "triangle", "star")
SIZES = ("small", "large")
POSITIONS = ("center", "left", "right", "top", "bottom")
RELATIONS = ("left of", "right of", "above", "below")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

POSITION_CENTERS = {
    "center": (0.5, 0.5),
    "left": (0.26, 0.5),
    "right": (0.74, 0.5),
    "top": (0.5, 0.26),
    "bottom": (0.5, 0.74),
}
RADII = {"small": (0.105, 0.115), "large": (0.173, 0.183)}
JITTER = 0.015  # largest offset of a shape's centre from its position, in x and in y
OUTLINE_WIDTH = 2.5 / 128  # line width in hints that show edges
MIN_CONTRAST = 0.4  # smallest distance of a background and a shape in arbitrary colours, in the unit cube
PAIR_OFFSET = 0.25  # distance of each of two shapes' centres from the middle of the image

# Half the side of a square and the outer radius of a triangle or star, in units of the shape's `radius`. They make the
# four kinds look equally large and keep any two large shapes apart at PAIR_OFFSET.
SQUARE_HALF_SIDE = 0.90
TRIANGLE_RADIUS = 1.28
STAR_RADIUS = 1.28
STAR_INNER = 0.48  # ratio of a star's inner to its outer radius

# Combinations that are left out of training, to measure whether the model composes attributes or recalls images.
HELD_OUT_SHAPES = frozenset({("star", "purple"), ("triangle", "orange"), ("square", "green"), ("circle", "white")})
HELD_OUT_BACKGROUNDS = frozenset({("blue", "white"), ("yellow", "purple"), ("black", "orange"), ("red", "green")})
HELD_OUT_PAIR_MODULUS = 16  # one in 16 unordered pairs of coloured shapes is held out


@dataclass(frozen=True)
class Shape:
    """A coloured shape. Lengths and coordinates are fractions of the image's side.

    Attributes:
        kind: Kind of shape, one of SHAPES.
        color: Name of its colour, one of COLORS.
        size: Its size, one of SIZES.
        x: Horizontal coordinate of its centre, to the right.
        y: Vertical coordinate of its centre, downwards.
        radius: Its nominal radius.
    """

    kind: str
    color: str
    size: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """A background with one or two shapes.

    Attributes:
        background: Name of the background's colour, one of COLORS.
        shapes: The shapes; the left or upper one of two comes first.
    """

    background: str
    shapes: tuple[Shape, ...]

    @property
    def position(self) -> str | None:
        """Position of a single shape, one of POSITIONS; None for two shapes."""
        if len(self.shapes) != 1:
            return None
        shape = self.shapes[0]

        def distance(position: str) -> float:
            x, y = POSITION_CENTERS[position]
            return math.hypot(shape.x - x, shape.y - y)

        return min(POSITIONS, key=distance)

    @property
    def relation(self) -> str | None:
        """Relation of the first shape to the second, "left of" or "above"; None for a single shape."""
        if len(self.shapes) != 2:
            return None
        first, second = self.shapes
        return "left of" if abs(first.x - second.x) > abs(first.y - second.y) else "above"


def _pair_is_held_out(first: Shape, second: Shape) -> bool:
    codes = sorted(SHAPES.index(s.kind) * len(COLORS) + list(COLORS).index(s.color) for s in (first, second))
    return (codes[0] * 5 + codes[1] * 11) % HELD_OUT_PAIR_MODULUS == 0


def is_held_out(scene: Scene) -> bool:
    """Return whether a scene contains a combination of attributes that is left out of training.

    Args:
        scene: The scene.
    """
    if any((s.kind, s.color) in HELD_OUT_SHAPES for s in scene.shapes):
        return True
    if any((s.color, scene.background) in HELD_OUT_BACKGROUNDS for s in scene.shapes):
        return True
    return len(scene.shapes) == 2 and _pair_is_held_out(*scene.shapes)


def _sample_shape(rng: np.random.Generator, colors: Sequence[str], center: tuple[float, float]) -> Shape:
    size = SIZES[int(rng.integers(len(SIZES)))]
    dx, dy = rng.uniform(-JITTER, JITTER, 2)
    return Shape(
        kind=SHAPES[int(rng.integers(len(SHAPES)))],
        color=colors[int(rng.integers(len(colors)))],
        size=size,
        x=float(center[0] + dx),
        y=float(center[1] + dy),
        radius=float(rng.uniform(*RADII[size])),
    )


def _sample_scene(rng: np.random.Generator, count: int) -> Scene:
    """Sample a scene that may be held out."""
    names = list(COLORS)
    background = names[rng.integers(len(names))]
    colors = [name for name in names if name != background]
    if count == 1:
        center = POSITION_CENTERS[POSITIONS[rng.integers(len(POSITIONS))]]
        return Scene(background, (_sample_shape(rng, colors, center),))
    near, far = 0.5 - PAIR_OFFSET, 0.5 + PAIR_OFFSET
    centers = ((near, 0.5), (far, 0.5)) if rng.random() < 0.5 else ((0.5, near), (0.5, far))
    while True:
        first, second = (_sample_shape(rng, colors, center) for center in centers)
        # Captions of two shapes of the same kind and colour would be unnatural.
        if (first.kind, first.color) != (second.kind, second.color):
            return Scene(background, (first, second))


def sample_scene(rng: np.random.Generator, *, shapes: int | None = None, held_out: bool = False) -> Scene:
    """Return a random scene.

    Two shapes are side by side or one above the other. They never overlap, and differ in kind or colour.

    Args:
        rng: Random generator.
        shapes: Number of shapes, 1 or 2; None takes either with equal probability.
        held_out: Whether the scene is one that is left out of training, or one that is not.

    Raises:
        InputError: `shapes` is invalid.
    """
    if shapes not in (None, 1, 2):
        raise invalid("shapes", shapes, "1, 2 or None")
    count = int(rng.integers(1, 3)) if shapes is None else shapes
    while True:
        scene = _sample_scene(rng, count)
        if is_held_out(scene) == held_out:
            return scene


# The signed distances below take offsets (dx, dy) from the centre and the radius, and are negative inside. Outside a
# corner they are distances to the nearest extended edge instead of the corner, which keeps corners sharp.


def _circle(dx: torch.Tensor, dy: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    return torch.hypot(dx, dy) - radius


def _square(dx: torch.Tensor, dy: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    return torch.maximum(dx.abs(), dy.abs()) - SQUARE_HALF_SIDE * radius


def _triangle(dx: torch.Tensor, dy: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    # The middle of the bounding box is at (x, y) instead of the centroid: a triangle then looks centred.
    dy = dy - TRIANGLE_RADIUS * radius / 4
    slanted = dx.abs() * math.cos(math.pi / 6) - dy / 2
    return torch.maximum(slanted, dy) - TRIANGLE_RADIUS * radius / 2


def _star(dx: torch.Tensor, dy: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    # The plane is mirrored into the 36 degree wedge between the upper tip's axis and the adjacent notch, which contains
    # a single edge. Two reflections at the line through the notch, each followed by one at the axis, suffice.
    tip = STAR_RADIUS * radius
    # As for the triangle, the bounding box is centred. It ends at the tip above and at tip * cos(36 degrees) below.
    x, y = dx.abs(), tip * (1 - math.cos(math.pi / 5)) / 2 - dy
    normal_x, normal_y = math.cos(math.pi / 5), -math.sin(math.pi / 5)
    for _ in range(2):
        over = 2 * (x * normal_x + y * normal_y).clamp_min(0.0)
        x, y = (x - over * normal_x).abs(), y - over * normal_y
    notch_x, notch_y = STAR_INNER * math.sin(math.pi / 5), STAR_INNER * math.cos(math.pi / 5)
    length = math.hypot(notch_x, 1 - notch_y)
    return (x * (1 - notch_y) + (y - tip) * notch_x) / length


_DISTANCES: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
}


def coverage(shapes: Sequence[Shape], size: int, inset: float = 0.0) -> torch.Tensor:
    """Return the fraction of each pixel that each shape covers.

    Args:
        shapes: The shapes.
        size: Side of the image in pixels.
        inset: Width of a rim by which shapes are reduced, as a fraction of the side; negative to enlarge them.

    Returns:
        Fractions (len(shapes), size, size) in [0, 1].
    """
    grid = (torch.arange(size, dtype=torch.float32) + 0.5) / size
    result = torch.empty(len(shapes), size, size)
    for kind, distance in _DISTANCES.items():
        indices = [i for i, shape in enumerate(shapes) if shape.kind == kind]
        if not indices:
            continue
        x, y, radius = torch.tensor([[shapes[i].x, shapes[i].y, shapes[i].radius] for i in indices]).T[:, :, None, None]
        dx, dy = torch.broadcast_tensors(grid[None, None, :] - x, grid[None, :, None] - y)
        result[indices] = (0.5 - size * (distance(dx, dy, radius) + inset)).clamp_(0.0, 1.0)
    return result


def random_palette(scene: Scene, rng: np.random.Generator) -> Palette:
    """Return arbitrary colours for a scene that are easy to tell apart where they touch.

    Colours whose nearest names make a held-out combination are excluded.

    Args:
        scene: The scene.
        rng: Random generator.

    Returns:
        RGB in [0, 1] by the name of the scene's colour that it replaces.
    """
    names = [scene.background, *(shape.color for shape in scene.shapes)]
    while True:
        palette: Palette = {name: tuple(rng.random(3).tolist()) for name in sorted(set(names))}
        background = np.array(palette[scene.background])
        if min(np.linalg.norm(background - palette[name]) for name in names[1:]) < MIN_CONTRAST:
            continue
        if not is_held_out(rename_colors(scene, palette)):
            return palette


def rename_colors(scene: Scene, palette: Palette) -> Scene:
    """Return a scene with the names that are nearest to its colours in a palette.

    Args:
        scene: The scene.
        palette: RGB in [0, 1] by name of each of the scene's colours.
    """
    nearest = {name: nearest_color(color) for name, color in palette.items()}
    shapes = tuple(dataclasses.replace(shape, color=nearest[shape.color]) for shape in scene.shapes)
    return Scene(nearest[scene.background], shapes)


def mixed_palettes(scenes: Sequence[Scene], rng: np.random.Generator, share: float) -> list[Palette]:
    """Return a palette for each scene: arbitrary colours for some of them, COLORS for the others.

    Args:
        scenes: The scenes.
        rng: Random generator.
        share: Probability of arbitrary colours, from 0 to 1.
    """
    return [random_palette(scene, rng) if rng.random() < share else COLORS for scene in scenes]


def nearest_color(color: Sequence[float]) -> str:
    """Return the name of the colour in COLORS that is nearest to a colour.

    Args:
        color: RGB in [0, 1].
    """
    return min(COLORS, key=lambda name: float(np.linalg.norm(np.subtract(COLORS[name], color))))


def render(scenes: Sequence[Scene], size: int = 128, palettes: Sequence[Palette] | None = None) -> torch.Tensor:
    """Render scenes with analytic anti-aliasing.

    Args:
        scenes: The scenes.
        size: Side of the images in pixels.
        palettes: Palette of each scene; None takes COLORS for all of them.

    Returns:
        RGB images (len(scenes), 3, size, size), float32 in [0, 1].
    """
    palettes = [COLORS] * len(scenes) if palettes is None else palettes
    ground = torch.tensor([palette[scene.background] for scene, palette in zip(scenes, palettes, strict=True)])
    images = ground[:, :, None, None].repeat(1, 1, size, size)
    for indices, shapes in _layers(scenes):
        paint = torch.tensor([palettes[i][shape.color] for i, shape in zip(indices, shapes, strict=True)])
        images[indices] = torch.lerp(images[indices], paint[:, :, None, None], coverage(shapes, size)[:, None])
    return images


def render_hints(scenes: Sequence[Scene], size: int = 128, *, outlines: Sequence[bool] | bool = False) -> torch.Tensor:
    """Render hints for the ControlNet UNet, without any colour.

    A hint is a layer map, similar to a depth map: the background is far (0), shapes are near (1). Or it shows the edges
    of the shapes as lines of OUTLINE_WIDTH, white on black.

    Args:
        scenes: The scenes.
        size: Side of the hints in pixels.
        outlines: Whether hints show edges, for all scenes or for each.

    Returns:
        Grey images (len(scenes), 3, size, size), float32 in [0, 1].
    """
    lines = torch.as_tensor(outlines).expand(len(scenes))
    near = torch.zeros(len(scenes), size, size)
    for indices, shapes in _layers(scenes):
        inner = coverage(shapes, size, OUTLINE_WIDTH) * lines[indices, None, None]
        near[indices] = torch.maximum(near[indices], coverage(shapes, size) - inner)
    return near[:, None].repeat(1, 3, 1, 1)


def _layers(scenes: Sequence[Scene]) -> Iterator[tuple[list[int], list[Shape]]]:
    """Yield the first shapes of all scenes, then the second ones, with the indices of the scenes that have them."""
    for layer in range(max((len(scene.shapes) for scene in scenes), default=0)):
        indices = [i for i, scene in enumerate(scenes) if len(scene.shapes) > layer]
        yield indices, [scenes[i].shapes[layer] for i in indices]
