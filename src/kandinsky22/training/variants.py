"""The recipes of the two further UNets: one repaints holes in a picture, one follows a hint of where things are.

Both are the trained decoder with more to see at its input, and begin as its equals: the new channels count for nothing
at first. Only what reads the input is trained, the first level on the way down. The rest, and all that reads the image
embedding, stays the decoder's to the bit, so that each adds less than a megabyte to the package.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kandinsky22.inputs import masks
from kandinsky22.models.movq import VQModel
from kandinsky22.models.unet import UNet2DConditionModel
from kandinsky22.training.clip import EMBEDDING, IMAGE_SIZE, Towers
from kandinsky22.training.decoder import (
    BATCH,
    Bank,
    Examples,
    denoising,
    zero_embedding,
)
from kandinsky22.training.loop import Draw, Settings, load_average, train
from kandinsky22.training.movq import SIZE
from kandinsky22.training.scenes import (
    COLORS,
    JITTER,
    PLACE_CENTERS,
    RADII,
    SIZES,
    SPREAD,
    Palette,
    Scene,
    Shape,
    draw_hints,
    is_held_out,
    render,
    sample_scene,
)

Bools: TypeAlias = npt.NDArray[np.bool_]

TRAINED = ("conv_in.", "down_blocks.0.", "add_embedding.input_hint_block.")
INPAINT: dict[str, Any] = {"in_channels": 9}
HINT: dict[str, Any] = {"in_channels": 8, "addition_embed_type": "image_hint"}
INPAINT_SETTINGS = Settings(steps=2000, learning_rate=1e-3, warmup=100, decay=1000, average=0.998, bf16=True, seed=3)
HINT_SETTINGS = Settings(steps=1800, learning_rate=1e-3, warmup=100, decay=1000, average=0.998, bf16=True, seed=4)
BANK_START, BANK_GROWTH, BANK_SIZE = 2048, 3, 10240  # as the decoder's

KEPT_WEIGHT = 0.3  # of errors where the picture is kept: the pipeline paints over them
SUBJECT = 0.5  # how often the embedding tells of nothing but the shape in the hole, if there is one
LOOSE = 0.5  # share of hints whose shapes lie where no caption could say
UNSETTLED = 0.5  # how often the embedding tells of another place and size than the hint shows
OUTLINES = 0.4  # share of hints that are edges
REACH = 1.28  # no shape reaches farther from its centre, in units of its radius
FREE_RADII = (0.09, 0.2)


def grown(plain: UNet2DConditionModel, changes: dict[str, Any]) -> UNet2DConditionModel:
    """A UNet like `plain` with these changes of its config, which answers as `plain` does, ready for training."""
    unet = UNet2DConditionModel(**{**plain.config, **changes})
    state = dict(plain.state_dict())
    new = unet.config.in_channels - plain.config.in_channels
    state["conv_in.weight"] = F.pad(state["conv_in.weight"], (0, 0, 0, 0, 0, new))
    unet.load_state_dict(state, strict=False)
    if unet.config.addition_embed_type == "image_hint":
        _awaken(unet.add_embedding.input_hint_block)
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(name.startswith(TRAINED))
    return unet


@torch.no_grad()
def _awaken(block: nn.Module) -> None:
    """Start the hint's convolutions so that they pass hints on: with torch's own start, eight of them let nothing
    through."""
    rng = np.random.default_rng(0)
    hints = draw_hints([sample_scene(rng) for _ in range(16)], SIZE)
    convolutions = [layer for layer in block.modules() if isinstance(layer, nn.Conv2d)]
    for layer in convolutions:
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        assert layer.bias is not None
        nn.init.zeros_(layer.bias)
    features = block(hints)
    convolutions[-1].weight /= features.std((0, 2, 3))[:, None, None, None]


def load_variant(folder: str | Path, plain: UNet2DConditionModel, changes: dict[str, Any]) -> UNet2DConditionModel:
    """The network as far as `folder` has it."""
    unet = grown(plain, changes)
    load_average(unet, folder)
    return unet.eval().requires_grad_(False)


def train_inpaint(
    folder: str | Path,
    plain: UNet2DConditionModel,
    movq: VQModel,
    towers: Towers,
    settings: Settings = INPAINT_SETTINGS,
    *,
    bank_size: int = BANK_SIZE,
) -> UNet2DConditionModel:
    """Train the inpainting UNet from the trained decoder, or go on where `folder` stands."""
    return _train(grown(plain, INPAINT), HoleBank, folder, movq, towers, settings, bank_size)


def train_hint(
    folder: str | Path,
    plain: UNet2DConditionModel,
    movq: VQModel,
    towers: Towers,
    settings: Settings = HINT_SETTINGS,
    *,
    bank_size: int = BANK_SIZE,
) -> UNet2DConditionModel:
    """Train the hint UNet from the trained decoder, or go on where `folder` stands."""
    torch.manual_seed(settings.seed)
    return _train(grown(plain, HINT), HintBank, folder, movq, towers, settings, bank_size)


def _train(
    unet: UNet2DConditionModel,
    kind: type[Bank],
    folder: str | Path,
    movq: VQModel,
    towers: Towers,
    settings: Settings,
    bank_size: int,
) -> UNet2DConditionModel:
    bank = kind(Path(folder) / "bank", movq, towers, seed=settings.seed, size=bank_size)
    train(unet, denoising(unet, bank, zero_embedding(towers)), settings, folder)
    return unet


# Image to image


class SceneBank(Bank):
    """A bank that knows the scenes of its pictures."""

    def __init__(self, folder: Path, movq: VQModel, towers: Towers, *, seed: int, size: int) -> None:
        super().__init__(folder, movq, towers, seed=seed, size=size)
        self._chunks: dict[int, list[Scene]] = {}

    def _size(self, step: int) -> int:
        return min(BANK_START + BANK_GROWTH * step, self.size) // self.chunk * self.chunk

    def _known(self, numbers: npt.NDArray[np.int64]) -> list[Scene]:
        """The scenes of these pictures."""
        for chunk in {int(number) // self.chunk for number in numbers} - self._chunks.keys():
            self._chunks[chunk] = self.scenes(chunk * self.chunk)[0]
        return [self._chunks[int(number) // self.chunk][int(number) % self.chunk] for number in numbers]


# Inpainting


class HoleBank(SceneBank):
    """Pictures with holes. Of each there are three embeddings: its own, and those of each of its shapes alone."""

    embeds_shape = (3, EMBEDDING)

    def _embed(self, scenes: Sequence[Scene], palettes: Sequence[Palette], rng: np.random.Generator) -> Tensor:
        told = [list(scenes)] + [
            [alone(scene, slot, rng, named=palette is COLORS) for scene, palette in zip(scenes, palettes, strict=True)]
            for slot in range(2)
        ]
        # a background that a palette does not know is one of the named colours
        full = [{**COLORS, **palette} for palette in palettes]
        return torch.stack([self.towers.embed_images(render(some, IMAGE_SIZE, full)) for some in told], dim=1)

    def examples(self, draw: Draw) -> Examples:
        chosen = self.choose(draw, BATCH)
        latents, embeds = self.take(chosen)
        keeps, told = zip(*(sample_hole(scene, draw.numpy) for scene in self._known(chosen)), strict=True)
        kept = torch.cat(keeps)
        return Examples(
            latents,
            embeds[torch.arange(len(embeds)), torch.tensor(told)],
            channels=torch.cat([latents * kept, kept], dim=1),
            weight=1 - (1 - KEPT_WEIGHT) * kept,
        )


def alone(scene: Scene, slot: int, rng: np.random.Generator, *, named: bool) -> Scene:
    """One of the shapes, as someone tells of it who wants it in a hole: its place, and with `named` colours the
    background, are the picture's own or any other."""
    shape = scene.shapes[min(slot, len(scene.shapes) - 1)]
    if rng.random() < 0.5:
        x, y = list(PLACE_CENTERS.values())[rng.integers(len(PLACE_CENTERS))] + rng.uniform(-JITTER, JITTER, 2)
        shape = dataclasses.replace(shape, x=float(x), y=float(y))
    other = Scene(list(COLORS)[rng.integers(len(COLORS))], (shape,))
    free = named and other.background != shape.color and not is_held_out(other) and rng.random() < 0.5
    return other if free else Scene(scene.background, (shape,))


def sample_hole(scene: Scene, rng: np.random.Generator) -> tuple[Tensor, int]:
    """Which latents (1, 1, h, w) a hole keeps, as the inpainting pipeline has it, 1 or 0; and which of a picture's
    embeddings is told: 0 the whole, 1 or 2 only that shape."""
    hole = torch.from_numpy(_hole(scene, rng)).float()[None, None]
    kept = masks.kept(hole, (SIZE // 8, SIZE // 8))
    inside = [not kept[0, 0][_cells(shape)].any() for shape in scene.shapes]
    touched = [not kept[0, 0][_cells(shape)].all() for shape in scene.shapes]
    subjects = [slot for slot, whole in enumerate(inside) if whole and sum(touched) == 1 and kept.any()]
    return kept, 1 + subjects[0] if subjects and rng.random() < SUBJECT else 0


def _hole(scene: Scene, rng: np.random.Generator) -> Bools:
    # the pipeline shrinks masks by taking every eighth pixel
    steps = (8 * np.arange(SIZE // 8) + 0.5) / SIZE
    xs, ys = np.meshgrid(steps, steps)
    shape = scene.shapes[rng.integers(len(scene.shapes))]
    reach = REACH * shape.radius
    left, top, right, bottom = reach + rng.uniform(0.0, 0.15, 4)
    around = (xs > shape.x - left) & (xs < shape.x + right) & (ys > shape.y - top) & (ys < shape.y + bottom)
    kind = rng.random()
    if kind < 0.5:
        return around
    if kind < 0.58:
        return np.hypot(xs - shape.x, ys - shape.y) < reach + 0.5 * left - 0.25 * reach
    if kind < 0.66:
        return ~around
    if kind < 0.82:
        half = (xs if rng.random() < 0.5 else ys) < rng.uniform(0.2, 0.8)
        return half if rng.random() < 0.5 else ~half
    if kind < 0.92:
        x, y = rng.uniform(0, 1, 2)
        return (abs(xs - x) < rng.uniform(0.1, 0.45)) & (abs(ys - y) < rng.uniform(0.1, 0.45))
    return np.ones_like(around)


def _cells(shape: Shape) -> tuple[slice, slice]:
    """The latent cells of a shape's bounding box, rows then columns."""
    side = SIZE // 8
    reach = REACH * shape.radius
    rows, columns = (
        slice(max(0, int((middle - reach) * side)), math.ceil((middle + reach) * side)) for middle in (shape.y, shape.x)
    )
    return rows, columns


# Hints


class HintBank(SceneBank):
    """Pictures with hints. Shapes may lie anywhere in them; what is told of their places and sizes need not be true."""

    levels = 2

    def _scene(self, rng: np.random.Generator) -> Scene:
        scene = super()._scene(rng)
        return loosened(scene, rng) if rng.random() < LOOSE else scene

    def _embed(self, scenes: Sequence[Scene], palettes: Sequence[Palette], rng: np.random.Generator) -> Tensor:
        return super()._embed([settled(scene, rng) for scene in scenes], palettes, rng)

    def examples(self, draw: Draw) -> Examples:
        chosen = self.choose(draw, BATCH // self.levels)
        lines = draw.numpy.random(len(chosen)) < OUTLINES
        hints = draw_hints(self._known(chosen), SIZE, outlines=lines.tolist())
        bright = torch.from_numpy(draw.numpy.uniform(0.6, 1.0, len(chosen))).float()
        return Examples(*self.take(chosen), hint=hints * bright[:, None, None, None])


def loosened(scene: Scene, rng: np.random.Generator) -> Scene:
    """The shapes of a scene anywhere, in any size, apart from each other; the left or upper one still comes first."""
    while True:
        shapes = []
        for shape in scene.shapes:
            radius = rng.uniform(*FREE_RADII)
            x, y = rng.uniform(REACH * radius + 0.02, 0.98 - REACH * radius, 2)
            size = SIZES[int(radius > (RADII["small"][1] + RADII["large"][0]) / 2)]
            shapes.append(dataclasses.replace(shape, x=float(x), y=float(y), radius=float(radius), size=size))
        if len(shapes) == 1:
            return Scene(scene.background, tuple(shapes))
        first, second = shapes
        across, down = second.x - first.x, second.y - first.y
        if math.hypot(across, down) > REACH * (first.radius + second.radius) and max(across, down, key=abs) > 0:
            return Scene(scene.background, (first, second))


def settled(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene as a caption would have it: the nearest of the places and sizes there are words for, or any others."""
    other = sample_scene(rng, shapes=len(scene.shapes)) if rng.random() < UNSETTLED else None
    if len(scene.shapes) == 1:
        centers = [PLACE_CENTERS[(other or scene).place or "center"]]
    else:
        near, far = 0.5 - SPREAD, 0.5 + SPREAD
        across = (other or scene).relation == "left of"
        centers = [(near, 0.5), (far, 0.5)] if across else [(0.5, near), (0.5, far)]
    shapes = []
    for slot, (shape, center) in enumerate(zip(scene.shapes, centers, strict=True)):
        size = (other or scene).shapes[slot].size
        x, y = center + rng.uniform(-JITTER, JITTER, 2)
        radius = float(rng.uniform(*RADII[size]))
        shapes.append(dataclasses.replace(shape, x=float(x), y=float(y), radius=radius, size=size))
    return Scene(scene.background, tuple(shapes))
