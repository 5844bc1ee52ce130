"""All things in all styles and colours as pixels, rendered once and kept in one file."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from kandinsky22.checkpoints.atomic_files import atomic_write
from kandinsky22.errors import MissingDependencyError
from kandinsky22.training.drawings import packs
from kandinsky22.training.drawings.recoloring import recolor
from kandinsky22.training.drawings.vocabulary import COLORS, NATURAL, SHAPES, STYLES, THING_COLORS, THINGS, Color

SIDE = 192  # pixels; the largest thing of a 256 pixel image is a little smaller
FILE = "sprites.npy"


class Sprites:
    """Pixels of all things, cut to their bounding boxes, whose longer side is SIDE.

    Args:
        folder: Folder of the file, which is written if it is missing. The drawings are downloaded then.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / FILE
        if not path.is_file():
            packs.fetch(folder / "packages")
            _write(path, packs.read_drawings(folder / "packages"))
        self._pixels: npt.NDArray[np.uint8] = np.load(path, mmap_mode="r")

    def pixels(self, thing: str, style: str, color: str) -> npt.NDArray[np.uint8]:
        """Return a thing in the middle of a square, RGBA pixels (SIDE, SIDE, 4) with premultiplied opacity.

        Args:
            thing: Name of the thing, one of THINGS.
            style: Name of the style, one of STYLES. The shapes are the same in all styles.
            color: Name of a colour, one of THING_COLORS.
        """
        sprite: npt.NDArray[np.uint8] = self._pixels[
            THINGS.index(thing), STYLES.index(style), THING_COLORS.index(color)
        ]
        return sprite


def _write(path: Path, drawings: dict[str, dict[str, str]]) -> None:
    shape = (len(THINGS), len(STYLES), len(THING_COLORS), SIDE, SIDE, 4)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        sprites = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=shape)
        for index, thing in enumerate(THINGS):
            for number, style in enumerate(STYLES):
                sprites[index, number] = thing_pixels(thing, drawings[style].get(thing, ""))
        sprites.flush()


def thing_pixels(thing: str, svg: str) -> npt.NDArray[np.uint8]:
    """Return a thing in all colours, (len(THING_COLORS), SIDE, SIDE, 4).

    Args:
        thing: Name of the thing, one of THINGS.
        svg: Its drawing, which the four shapes do not need.
    """
    if thing in SHAPES:
        sprites = [_shape(thing, COLORS.get(color, COLORS["black"])) for color in THING_COLORS]
    else:
        natural = _render(svg)
        sprites = [natural if color == NATURAL else recolor(natural, COLORS[color]) for color in THING_COLORS]
    return np.stack([_premultiplied(sprite) for sprite in sprites])


def _render(svg: str) -> npt.NDArray[np.uint8]:
    """Return a drawing whose bounding box touches two opposite sides of the square, RGBA."""
    try:
        import resvg_py
    except ImportError as error:
        raise MissingDependencyError("rendering drawings needs resvg-py: pip install 'kandinsky22[train]'") from error
    left, top, right, bottom = _bounding_box(_rasterise(resvg_py, svg, SIDE))
    size = round(SIDE * SIDE / max(right - left, bottom - top))
    pixels = _rasterise(resvg_py, svg, size)
    left, top, right, bottom = _bounding_box(pixels)
    part = pixels[top:bottom, left:right][:SIDE, :SIDE]
    square = np.zeros((SIDE, SIDE, 4), np.uint8)
    y, x = (SIDE - part.shape[0]) // 2, (SIDE - part.shape[1]) // 2
    square[y : y + part.shape[0], x : x + part.shape[1]] = part
    return square


def _rasterise(resvg: Any, svg: str, size: int) -> npt.NDArray[np.uint8]:
    image = Image.open(io.BytesIO(bytes(resvg.svg_to_bytes(svg_string=svg, width=size, height=size))))
    return np.asarray(image.convert("RGBA"))


def _bounding_box(pixels: npt.NDArray[np.uint8]) -> tuple[int, int, int, int]:
    """Return left, top, right and bottom of what is visible."""
    rows, columns = np.nonzero(pixels[..., 3] > 16)
    return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1


def _premultiplied(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    opacity = pixels[..., 3:]
    return np.concatenate([(pixels[..., :3].astype(np.uint16) * opacity // 255).astype(np.uint8), opacity], axis=-1)


def _corners(shape: str) -> Sequence[tuple[float, float]]:
    """Return the corners of a polygon in the unit square."""
    if shape == "square":
        return [(0.05, 0.05), (0.95, 0.05), (0.95, 0.95), (0.05, 0.95)]
    if shape == "triangle":
        return [(0.5, 0.067), (1.0, 0.933), (0.0, 0.933)]
    radii = [0.525 if i % 2 == 0 else 0.525 * 0.48 for i in range(10)]
    angles = [math.pi * i / 5 for i in range(10)]
    return [(0.5 + r * math.sin(a), 0.5225 - r * math.cos(a)) for r, a in zip(radii, angles, strict=True)]


def _shape(shape: str, color: Color) -> npt.NDArray[np.uint8]:
    """Return a flat geometric shape, RGBA, antialiased by drawing it four times as large."""
    large = 4 * SIDE
    mask = Image.new("L", (large, large))
    draw = ImageDraw.Draw(mask)
    if shape == "circle":
        draw.ellipse((0, 0, large - 1, large - 1), fill=255)
    else:
        draw.polygon([(x * large, y * large) for x, y in _corners(shape)], fill=255)
    opacity = np.asarray(mask.resize((SIDE, SIDE), Image.Resampling.BOX))
    paint = np.broadcast_to(np.round(np.array(color) * 255).astype(np.uint8), (SIDE, SIDE, 3))
    return np.dstack([paint, opacity])
