"""The world the embedded model knows: flat geometric compositions, sampled and drawn without a single photograph.

A scene is one or two shapes on a coloured background. Coordinates are fractions of the picture's side, x to the right
and y downwards, so a scene can be drawn at any size.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

# Chosen so that any two differ by at least a third of the unit cube's side: a pixel judge never has to guess.
Palette = dict[str, tuple[float, ...]]
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
PLACES = ("center", "left", "right", "top", "bottom")
RELATIONS = ("left of", "right of", "above", "below")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

PLACE_CENTERS = {
    "center": (0.5, 0.5),
    "left": (0.26, 0.5),
    "right": (0.74, 0.5),
    "top": (0.5, 0.26),
    "bottom": (0.5, 0.74),
}
RADII = {"small": (0.105, 0.115), "large": (0.173, 0.183)}
JITTER = 0.015  # how far a centre strays from its place
OUTLINE = 2.5 / 128  # width of the lines in hints
CONTRAST = 0.4  # least distance of arbitrary colours that touch, in the unit cube
SPREAD = 0.25  # distance of each of two centres from the middle of the picture

# Half the side of a square and the outer radius of a triangle or star, in units of the shape's `radius`. They make the
# four kinds look equally large and keep any two large shapes apart at SPREAD.
SQUARE_HALF_SIDE = 0.90
TRIANGLE_RADIUS = 1.28
STAR_RADIUS = 1.28
STAR_INNER = 0.48  # inner radius of a star over its outer radius

# Left out of training on purpose, to measure whether the model composes attributes or recalls pictures.
HELD_OUT_SHAPES = frozenset({("star", "purple"), ("triangle", "orange"), ("square", "green"), ("circle", "white")})
HELD_OUT_GROUNDS = frozenset({("blue", "white"), ("yellow", "purple"), ("black", "orange"), ("red", "green")})
HELD_OUT_PAIR_MODULUS = 16  # one unordered pair of coloured shapes in this many


@dataclass(frozen=True)
class Shape:
    """One coloured shape: its centre is (x, y), its nominal radius `radius`, all as fractions of the picture's side."""

    kind: str
    color: str
    size: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """A background colour and one or two shapes; of two, the left or upper one comes first."""

    background: str
    shapes: tuple[Shape, ...]

    @property
    def place(self) -> str | None:
        """Where a single shape lies, one of PLACES; None for two shapes."""
        if len(self.shapes) != 1:
            return None
        shape = self.shapes[0]
        return min(PLACES, key=lambda p: math.hypot(shape.x - PLACE_CENTERS[p][0], shape.y - PLACE_CENTERS[p][1]))

    @property
    def relation(self) -> str | None:
        """How the first shape stands to the second, "left of" or "above"; None for a single shape."""
        if len(self.shapes) != 2:
            return None
        first, second = self.shapes
        return "left of" if abs(first.x - second.x) > abs(first.y - second.y) else "above"


def _pair_is_held_out(first: Shape, second: Shape) -> bool:
    codes = sorted(SHAPES.index(s.kind) * len(COLORS) + list(COLORS).index(s.color) for s in (first, second))
    return (codes[0] * 5 + codes[1] * 11) % HELD_OUT_PAIR_MODULUS == 0


def is_held_out(scene: Scene) -> bool:
    """Whether the scene contains a combination of attributes that training never shows."""
    if any((s.kind, s.color) in HELD_OUT_SHAPES for s in scene.shapes):
        return True
    if any((s.color, scene.background) in HELD_OUT_GROUNDS for s in scene.shapes):
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


def _sample_any(rng: np.random.Generator, count: int) -> Scene:
    names = list(COLORS)
    background = names[rng.integers(len(names))]
    colors = [name for name in names if name != background]
    if count == 1:
        return Scene(background, (_sample_shape(rng, colors, PLACE_CENTERS[PLACES[rng.integers(len(PLACES))]]),))
    near, far = 0.5 - SPREAD, 0.5 + SPREAD
    centers = ((near, 0.5), (far, 0.5)) if rng.random() < 0.5 else ((0.5, near), (0.5, far))
    while True:
        first, second = (_sample_shape(rng, colors, center) for center in centers)
        # Two shapes that differ in nothing a caption would say first make sentences nobody writes.
        if (first.kind, first.color) != (second.kind, second.color):
            return Scene(background, (first, second))


def sample_scene(rng: np.random.Generator, *, shapes: int | None = None, held_out: bool = False) -> Scene:
    """Draw a random scene.

    `shapes` is 1, 2 or None for either with equal chance; `held_out` chooses between the scenes training never shows
    and those it does. Two shapes stand side by side or one above the other, never overlap and never look the same.
    """
    if shapes not in (None, 1, 2):
        raise ValueError(f"a scene has 1 or 2 shapes, not {shapes}")
    count = int(rng.integers(1, 3)) if shapes is None else shapes
    while True:
        scene = _sample_any(rng, count)
        if is_held_out(scene) == held_out:
            return scene


# The signed distances below take offsets (dx, dy) from the centre and the radius, and are negative inside. Outside of a
# corner they are distances to the nearest extended edge, not to the corner, which keeps the corners sharp.


def _circle(dx: torch.Tensor, dy: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    return torch.hypot(dx, dy) - radius


def _square(dx: torch.Tensor, dy: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    return torch.maximum(dx.abs(), dy.abs()) - SQUARE_HALF_SIDE * radius


def _triangle(dx: torch.Tensor, dy: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    # The bounding box's middle, not the centroid, stands at (x, y): a triangle then looks centred.
    dy = dy - TRIANGLE_RADIUS * radius / 4
    slanted = dx.abs() * math.cos(math.pi / 6) - dy / 2
    return torch.maximum(slanted, dy) - TRIANGLE_RADIUS * radius / 2


def _star(dx: torch.Tensor, dy: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    # Mirror the plane into the 36 degree wedge between the upper tip's axis and the notch next to it, where one edge is
    # left: two folds over the line through the notch, each followed by one over the axis, reach every point.
    tip = STAR_RADIUS * radius
    # As for the triangle, the bounding box is centred: it ends at the tip above and at cos(36 degrees) of it below.
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


def _coverage(shapes: Sequence[Shape], size: int, inset: float = 0.0) -> torch.Tensor:
    """Fraction of every pixel that each shape covers, (len(shapes), size, size) in [0, 1].

    `inset` takes off a rim of that width, as a fraction of the side.
    """
    grid = (torch.arange(size, dtype=torch.float32) + 0.5) / size
    coverage = torch.empty(len(shapes), size, size)
    for kind, distance in _DISTANCES.items():
        index = [i for i, shape in enumerate(shapes) if shape.kind == kind]
        if not index:
            continue
        x, y, radius = torch.tensor([[shapes[i].x, shapes[i].y, shapes[i].radius] for i in index]).T[:, :, None, None]
        dx, dy = torch.broadcast_tensors(grid[None, None, :] - x, grid[None, :, None] - y)
        coverage[index] = (0.5 - size * (distance(dx, dy, radius) + inset)).clamp_(0.0, 1.0)
    return coverage


def repaint(scene: Scene, rng: np.random.Generator) -> Palette:
    """Colours of any kind in the place of the scene's own, easy to tell apart where they touch.

    Those whose nearest names would make a combination left out of training are left out as well.
    """
    names = [scene.background, *(shape.color for shape in scene.shapes)]
    while True:
        palette: Palette = {name: tuple(rng.random(3).tolist()) for name in sorted(set(names))}
        ground = np.array(palette[scene.background])
        if min(np.linalg.norm(ground - palette[name]) for name in names[1:]) < CONTRAST:
            continue
        if not is_held_out(renamed(scene, palette)):
            return palette


def renamed(scene: Scene, palette: Palette) -> Scene:
    """The scene with the names nearest to the colours that it has under a palette."""
    known = {name: nearest_color(color) for name, color in palette.items()}
    shapes = tuple(dataclasses.replace(shape, color=known[shape.color]) for shape in scene.shapes)
    return Scene(known[scene.background], shapes)


def mixed_palettes(scenes: Sequence[Scene], rng: np.random.Generator, share: float) -> list[Palette]:
    """The named colours for most scenes, and any colours for a `share` of them."""
    return [repaint(scene, rng) if rng.random() < share else COLORS for scene in scenes]


def nearest_color(color: Sequence[float]) -> str:
    """The name of the colour nearest to an RGB value."""
    return min(COLORS, key=lambda name: float(np.linalg.norm(np.subtract(COLORS[name], color))))


def render(scenes: Sequence[Scene], size: int = 128, palettes: Sequence[Palette] | None = None) -> torch.Tensor:
    """Draw scenes with analytic anti-aliasing: (len(scenes), 3, size, size) float32 RGB in [0, 1].

    A palette for each scene says which colours stand for the names of its own.
    """
    palettes = [COLORS] * len(scenes) if palettes is None else palettes
    ground = torch.tensor([palette[scene.background] for scene, palette in zip(scenes, palettes, strict=True)])
    images = ground[:, :, None, None].repeat(1, 1, size, size)
    for layer in range(max((len(scene.shapes) for scene in scenes), default=0)):
        rows = [i for i, scene in enumerate(scenes) if len(scene.shapes) > layer]
        shapes = [scenes[i].shapes[layer] for i in rows]
        paint = torch.tensor([palettes[i][scenes[i].shapes[layer].color] for i in rows])[:, :, None, None]
        images[rows] = torch.lerp(images[rows], paint, _coverage(shapes, size)[:, None])
    return images


def draw_hints(scenes: Sequence[Scene], size: int = 128, *, outlines: Sequence[bool] | bool = False) -> torch.Tensor:
    """What guides the hint UNet, without any colour: (len(scenes), 3, size, size) float32 grey in [0, 1].

    A layer map, like a depth map: the background is far (0), shapes are near (1). Or, where `outlines` says so, their
    edges: lines of OUTLINE's width, white on black.
    """
    lines = torch.as_tensor(outlines).expand(len(scenes))
    near = torch.zeros(len(scenes), size, size)
    for layer in range(max((len(scene.shapes) for scene in scenes), default=0)):
        rows = [i for i, scene in enumerate(scenes) if len(scene.shapes) > layer]
        shapes = [scenes[i].shapes[layer] for i in rows]
        inner = _coverage(shapes, size, OUTLINE) * lines[rows, None, None]
        near[rows] = torch.maximum(near[rows], _coverage(shapes, size) - inner)
    return near[:, None].repeat(1, 3, 1, 1)
