"""Backgrounds: plain colours, gradients and simple painted scenes."""

from __future__ import annotations

from functools import lru_cache
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from kandinsky22.training.drawings.scenes import Background
from kandinsky22.training.drawings.vocabulary import COLORS, GRADIENT, PLAIN, Color

Pixels: TypeAlias = npt.NDArray[np.uint8]

_SUPERSAMPLING = 3
SKY, PALE_SKY = (0.45, 0.74, 0.98), (0.84, 0.94, 1.0)
# Top and bottom of the sky, and of the ground.
_PAINTS: dict[str, tuple[Color, Color, Color, Color]] = {
    "meadow": (SKY, PALE_SKY, (0.55, 0.82, 0.38), (0.33, 0.65, 0.28)),
    "sea": (SKY, (0.98, 0.93, 0.82), (0.13, 0.55, 0.80), (0.06, 0.36, 0.66)),
    "night": ((0.05, 0.06, 0.20), (0.20, 0.20, 0.45), (0.10, 0.14, 0.22), (0.05, 0.08, 0.14)),
    "desert": ((0.98, 0.72, 0.42), (1.0, 0.90, 0.68), (0.93, 0.76, 0.48), (0.84, 0.61, 0.33)),
    "snow": ((0.68, 0.80, 0.93), (0.90, 0.95, 1.0), (0.98, 0.99, 1.0), (0.85, 0.91, 0.98)),
    "room": ((0.96, 0.87, 0.76), (0.93, 0.82, 0.70), (0.66, 0.45, 0.29), (0.55, 0.36, 0.22)),
}


@lru_cache(maxsize=256)
def paint(background: Background, side: int) -> Pixels:
    """Return the pixels of a background, RGB (side, side, 3), which must not be changed.

    Args:
        background: The background.
        side: Side of the image in pixels.
    """
    if background.kind == PLAIN:
        color = np.round(np.array(COLORS[background.name]) * 255).astype(np.uint8)
        pixels = np.broadcast_to(color, (side, side, 3))
    elif background.kind == GRADIENT:
        color = np.array(COLORS[background.name])
        pixels = _vertical(color + (1 - color) * 0.55, color * 0.80, side)
    else:
        pixels = _painted(background, side)
    pixels = np.ascontiguousarray(pixels)
    pixels.flags.writeable = False
    return pixels


def _vertical(top: npt.ArrayLike, bottom: npt.ArrayLike, height: int, width: int | None = None) -> Pixels:
    """Return a gradient from top to bottom, (height, width, 3)."""
    share = ((np.arange(height) + 0.5) / height)[:, None, None]
    values = np.asarray(top) * (1 - share) + np.asarray(bottom) * share
    return np.repeat(np.round(values * 255).astype(np.uint8), width or height, axis=1)


def _painted(background: Background, side: int) -> Pixels:
    large = _SUPERSAMPLING * side
    sky_top, sky_bottom, ground_top, ground_bottom = _PAINTS[background.name]
    image = Image.fromarray(_vertical(sky_top, sky_bottom, large))
    ground = Image.fromarray(_vertical(ground_top, ground_bottom, large))
    draw = ImageDraw.Draw(image)
    rng = np.random.default_rng([background.variant, 5])
    _DETAILS[background.name](draw, large, rng)
    mask = Image.new("L", (large, large))
    ImageDraw.Draw(mask).polygon(_horizon(background, large), fill=255)
    image.paste(ground, (0, 0), mask)
    if background.name == "room":
        width = large // 60
        draw.rectangle((0, 0.66 * large - width, large, 0.66 * large + width), fill=(250, 244, 235))
    return np.asarray(image.resize((side, side), Image.Resampling.BOX))


def _horizon(background: Background, size: int) -> list[tuple[float, float]]:
    """Return the outline of the ground: hills of different heights, or a straight line."""
    x = np.linspace(0, 1, 65)
    phase = 1.6 * background.variant
    waves = {"meadow": (0.62, 0.05), "night": (0.78, 0.04), "desert": (0.66, 0.045), "snow": (0.64, 0.05)}
    height, amplitude = waves.get(background.name, (0.6 if background.name == "sea" else 0.66, 0.0))
    y = height + amplitude * np.sin(2 * np.pi * x * 0.9 + phase)
    points = [(float(a * size), float(b * size)) for a, b in zip(x, y, strict=True)]
    return [*points, (size, size), (0, size)]


def _disc(draw: ImageDraw.ImageDraw, size: int, x: float, y: float, radius: float, color: Color) -> None:
    box = [(x - radius) * size, (y - radius) * size, (x + radius) * size, (y + radius) * size]
    draw.ellipse(box, fill=tuple(round(255 * value) for value in color))


def _clouds(draw: ImageDraw.ImageDraw, size: int, rng: np.random.Generator) -> None:
    for x in (rng.uniform(0.08, 0.3), rng.uniform(0.68, 0.9)):
        y = rng.uniform(0.1, 0.25)
        for dx, dy, radius in ((-0.06, 0.015, 0.035), (0.0, 0.0, 0.05), (0.06, 0.015, 0.038)):
            _disc(draw, size, x + dx, y + dy, radius, (1.0, 1.0, 1.0))


def _sun(draw: ImageDraw.ImageDraw, size: int, rng: np.random.Generator) -> None:
    _disc(draw, size, rng.choice([0.18, 0.82]), 0.17, 0.08, (1.0, 0.95, 0.62))


def _stars(draw: ImageDraw.ImageDraw, size: int, rng: np.random.Generator) -> None:
    for _ in range(28):
        x, y = rng.uniform(0, 1), rng.uniform(0, 0.7)
        _disc(draw, size, x, y, rng.choice([0.005, 0.008]), (1.0, 0.98, 0.85))
    _disc(draw, size, rng.choice([0.18, 0.82]), 0.16, 0.07, (0.98, 0.95, 0.80))


def _flakes(draw: ImageDraw.ImageDraw, size: int, rng: np.random.Generator) -> None:
    for _ in range(30):
        _disc(draw, size, rng.uniform(0, 1), rng.uniform(0, 0.6), rng.choice([0.006, 0.010]), (1.0, 1.0, 1.0))


def _window(draw: ImageDraw.ImageDraw, size: int, rng: np.random.Generator) -> None:
    x = rng.choice([0.08, 0.66])
    frame = [x * size, 0.12 * size, (x + 0.26) * size, 0.42 * size]
    draw.rectangle(frame, fill=(170, 215, 250), outline=(250, 244, 235), width=size // 50)
    middle = (frame[0] + frame[2]) / 2
    draw.line([middle, frame[1], middle, frame[3]], fill=(250, 244, 235), width=size // 60)
    draw.line([frame[0], 0.27 * size, frame[2], 0.27 * size], fill=(250, 244, 235), width=size // 60)


_DETAILS = {"meadow": _clouds, "sea": _sun, "night": _stars, "desert": _sun, "snow": _flakes, "room": _window}
