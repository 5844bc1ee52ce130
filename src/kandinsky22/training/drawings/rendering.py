"""Images, layer maps and edges of scenes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from kandinsky22.training.drawings.backgrounds import paint
from kandinsky22.training.drawings.scenes import CELLS, Scene, Thing
from kandinsky22.training.drawings.sprites import SIDE, Sprites

Pixels: TypeAlias = npt.NDArray[np.uint8]

OVERLAP = 0.12  # how far a thing sinks into the one that it is on, in heights of its own
CELL_SIDE = 4  # pixels along each side of a cell, from which the share that a thing covers is computed
BEHIND, NEAR = 0.55, 1.0  # brightness of layer maps: of the thing behind, and of other things


@dataclass(frozen=True)
class Placement:
    """A thing in an image.

    Attributes:
        pixels: RGBA pixels (n, n, 4) with premultiplied opacity.
        left: Column of the first pixel, which may be negative.
        top: Row of the first pixel, which may be negative.
    """

    pixels: Pixels
    left: int
    top: int


def _scaled(sprites: Sprites, thing: Thing, style: str, side: int) -> Pixels:
    size = max(1, round(thing.extent * side))
    image = Image.fromarray(sprites.pixels(thing.name, style, thing.color), "RGBa")
    pixels = np.array(image.resize((size, size), Image.Resampling.BICUBIC, reducing_gap=2.0))
    # The filter overshoots at edges. Premultiplied colours above the opacity would exceed 255 over a background.
    np.minimum(pixels[..., :3], pixels[..., 3:], out=pixels[..., :3])
    return pixels


def _placements(sprites: Sprites, scene: Scene, side: int) -> list[Placement]:
    placements: list[Placement] = []
    for index, thing in enumerate(scene.things):
        pixels = _scaled(sprites, thing, scene.style, side)
        left, top = round(thing.x * side - len(pixels) / 2), round(thing.y * side - len(pixels) / 2)
        if scene.arrangement == "on" and index == 1:
            top = _aligned(_top_of(placements[0], left, pixels), side)
        placements.append(Placement(pixels, left, top))
    return placements


def _aligned(row: int, side: int) -> int:
    """Return the nearest row between two latents."""
    return round(row * CELLS / side) * side // CELLS


def _top_of(base: Placement, left: int, pixels: Pixels) -> int:
    """Return the row at which a thing stands on another one: where its middle columns first touch it."""
    size = len(pixels)
    rows = np.nonzero(pixels[..., 3].max(1) > 127)[0]
    bottom, height = int(rows[-1]) + 1, int(rows[-1] - rows[0]) + 1
    first = max(0, left + size // 3 - base.left)
    last = max(first + 1, left + size - size // 3 - base.left)
    visible = np.nonzero(base.pixels[:, first:last, 3].max(1) > 127)[0]
    surface = base.top + (int(visible[0]) if len(visible) else 0)
    return surface - bottom + round(OVERLAP * height)


def _window(placement: Placement, side: int) -> tuple[slice, slice, Pixels]:
    """Return rows and columns of the image that a thing covers, and its pixels there."""
    size = len(placement.pixels)
    top, left = max(0, placement.top), max(0, placement.left)
    bottom, right = min(side, placement.top + size), min(side, placement.left + size)
    part = placement.pixels[
        top - placement.top : bottom - placement.top, left - placement.left : right - placement.left
    ]
    return slice(top, bottom), slice(left, right), part


def render_pixels(sprites: Sprites, scene: Scene, side: int) -> Pixels:
    """Render a scene.

    Args:
        sprites: Pixels of all things.
        scene: The scene.
        side: Side of the image in pixels.

    Returns:
        RGB pixels (side, side, 3).
    """
    image = paint(scene.background, side).copy()
    for placement in _placements(sprites, scene, side):
        rows, columns, part = _window(placement, side)
        through = 255 - part[..., 3:].astype(np.uint16)
        image[rows, columns] = part[..., :3] + (image[rows, columns] * through // 255).astype(np.uint8)
    return image


def render(sprites: Sprites, scenes: Sequence[Scene], side: int) -> Tensor:
    """Render scenes.

    Args:
        sprites: Pixels of all things.
        scenes: The scenes.
        side: Side of the images in pixels.

    Returns:
        RGB images (len(scenes), 3, side, side), float32 in [0, 1].
    """
    pixels = np.stack([render_pixels(sprites, scene, side) for scene in scenes])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


def visible_shares(sprites: Sprites, scene: Scene, cells: int) -> npt.NDArray[np.float32]:
    """Return how much of each cell of a grid each thing covers, where no thing in front hides it.

    Args:
        sprites: Pixels of all things.
        scene: The scene.
        cells: Number of cells along each side of the image.

    Returns:
        Shares (things, cells, cells) in [0, 1].
    """
    side = CELL_SIDE * cells
    shares = np.zeros((len(scene.things), side, side), np.float32)
    for index, placement in enumerate(_placements(sprites, scene, side)):
        rows, columns, part = _window(placement, side)
        opacity = part[..., 3] / np.float32(255)
        shares[:, rows, columns] *= 1 - opacity
        shares[index, rows, columns] = opacity
    means: npt.NDArray[np.float32] = shares.reshape(-1, cells, CELL_SIDE, cells, CELL_SIDE).mean((2, 4))
    return means


def layer_map(sprites: Sprites, scene: Scene, side: int) -> npt.NDArray[np.float32]:
    """Return a layer map, similar to a depth map: the background is far (0), things are near (1).

    Args:
        sprites: Pixels of all things.
        scene: The scene.
        side: Side of the map in pixels.

    Returns:
        Values (side, side) in [0, 1].
    """
    depth = np.zeros((side, side), np.float32)
    for index, placement in enumerate(_placements(sprites, scene, side)):
        rows, columns, part = _window(placement, side)
        opacity = part[..., 3] / np.float32(255)
        near = BEHIND if scene.arrangement == "front" and index == 0 else NEAR
        depth[rows, columns] += (near - depth[rows, columns]) * opacity
    return depth


def edge_map(sprites: Sprites, scene: Scene, side: int) -> npt.NDArray[np.float32]:
    """Return the edges of the things and of the colours in them, white on black.

    Args:
        sprites: Pixels of all things.
        scene: The scene.
        side: Side of the map in pixels.

    Returns:
        Values (side, side) in [0, 1].
    """
    edges = np.zeros((side, side), np.float32)
    for placement in _placements(sprites, scene, side):
        rows, columns, part = _window(placement, side)
        width = max(1, round(side / 100))
        padded = Image.fromarray(np.pad(part[..., 3], width))  # the filter repeats the pixels at the border
        inner = np.asarray(padded.filter(ImageFilter.MinFilter(2 * width + 1)))[
            width:-width, width:-width
        ] / np.float32(255)
        opacity = part[..., 3] / np.float32(255)
        edges[rows, columns] *= 1 - opacity
        edges[rows, columns] = np.maximum(edges[rows, columns], opacity * (1 - inner))
    return edges


__all__ = ["SIDE", "Placement", "edge_map", "layer_map", "render", "render_pixels", "visible_shares"]
