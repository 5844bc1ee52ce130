"""The last recipe of the UNet: one network learns to repaint holes in a picture, to follow a hint of where things are,
to keep a picture that is all but there, to draw mixtures, and goes on learning to draw.

It has the inputs of all of them side by side, which stay zero where they are not used. The decoder and its variants are
this network without the inputs that they do not have: all their other weights are the same.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kandinsky22.inputs import masks
from kandinsky22.models.movq import VQModel
from kandinsky22.models.unet import UNet2DConditionModel, UNetCondition
from kandinsky22.schedulers import DDPMScheduler
from kandinsky22.training import decoder
from kandinsky22.training.clip import EMBEDDING, IMAGE_SIZE, Towers
from kandinsky22.training.decoder import (
    CONFIG,
    SCHEDULER,
    Bank,
    Examples,
    denoising,
    timestep_table,
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
    renamed,
    render,
    sample_scene,
)

Bools: TypeAlias = npt.NDArray[np.bool_]

OWN = ("conv_in.", "add_embedding.input_hint_block.")  # what the decoder and its variants do not share
INPAINT: dict[str, Any] = {"in_channels": 9}
HINT: dict[str, Any] = {"in_channels": 8, "addition_embed_type": "image_hint"}
# Inputs of the shared network: noisy latents, the hint's features, the kept part of the picture and where it is.
LATENTS, FEATURES, KEPT = range(0, 4), range(4, 8), range(8, 13)
SETTINGS = Settings(steps=6000, learning_rate=7e-4, warmup=200, average=0.998, bf16=True, seed=5)
BANK_START, BANK_GROWTH, BANK_SIZE = 2048, 3, 10240  # as the decoder's

CLEAR = 340  # timesteps below it leave no doubt about the picture
CONTRADICTED = 0.6  # how often the embedding is then another picture's
KEPT_WEIGHT = 0.3  # of errors where the picture is kept: the pipeline paints over them
SUBJECT = 0.5  # how often the embedding tells of nothing but the shape in the hole, if there is one
LOOSE = 0.5  # share of hints whose shapes lie where no caption could say
UNSETTLED = 0.5  # how often the embedding tells of another place and size than the hint shows
OUTLINES = 0.4  # share of hints that are edges
REACH = 1.28  # no shape reaches farther from its centre, in units of its radius
FREE_RADII = (0.09, 0.2)
FAINTEST = 0.25  # least distance of a mixture's two colours


class SharedUNet(nn.Module):
    """The decoder's UNet with the inputs of both variants, which begins as the equal of `plain`."""

    def __init__(self, plain: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = UNet2DConditionModel(**{**plain.config, "in_channels": KEPT.stop})
        state = dict(plain.state_dict())
        state["conv_in.weight"] = F.pad(state["conv_in.weight"], (0, 0, 0, 0, 0, KEPT.stop - LATENTS.stop))
        self.unet.load_state_dict(state)
        self.hint = UNet2DConditionModel(**{**plain.config, **HINT}).add_embedding.input_hint_block
        _awaken(self.hint)

    def encode_condition(
        self, image_embeds: Tensor, hint: Tensor | None = None, channels: Tensor | None = None
    ) -> UNetCondition:
        """As the UNet's own; a hint (batch, 3, H, W) or channels (batch, 5, h, w) that are not there count as zeros."""
        side = self.unet.config.sample_size
        assert side is not None
        empty = image_embeds.new_zeros(len(image_embeds), len(KEPT), side, side)
        features = empty[:, : len(FEATURES)] if hint is None else self.hint(hint)
        beside = torch.cat([features, empty if channels is None else channels], dim=1)
        return self.unet.encode_condition(image_embeds, channels=beside)

    def denoise(self, sample: Tensor, timestep: Tensor, condition: UNetCondition) -> Tensor:
        """Velocity and learned variance (batch, 8, h, w)."""
        return self.unet.denoise(sample, timestep, condition)

    def part(self, changes: Mapping[str, Any]) -> UNet2DConditionModel:
        """The decoder ({}), or with INPAINT or HINT one of its variants."""
        inputs = {LATENTS.stop: [*LATENTS], 8: [*LATENTS, *FEATURES], 9: [*LATENTS, *KEPT]}
        unet = UNet2DConditionModel(**{**self.unet.config, "in_channels": LATENTS.stop, **changes})
        state = dict(self.unet.state_dict())
        state["conv_in.weight"] = state["conv_in.weight"][:, inputs[unet.config.in_channels]]
        if unet.config.addition_embed_type == "image_hint":
            name = "add_embedding.input_hint_block"
            state |= {f"{name}.{key}": tensor for key, tensor in self.hint.state_dict().items()}
        unet.load_state_dict(state)
        return unet.eval().requires_grad_(False)


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


def train_shared(
    folder: str | Path,
    decoder_folder: str | Path,
    movq: VQModel,
    towers: Towers,
    settings: Settings = SETTINGS,
    *,
    bank_size: int = BANK_SIZE,
) -> SharedUNet:
    """Train the shared network from the decoder in `decoder_folder`, whose pictures it is shown again, or go on where
    `folder` stands."""
    torch.manual_seed(settings.seed)
    shared = SharedUNet(decoder.load_decoder(decoder_folder))
    sure = SureBank(Path(decoder_folder) / "bank", movq, towers, seed=decoder.SETTINGS.seed, size=decoder.BANK_SIZE)
    kinds = (BetweenBank, HoleBank, HintBank)
    banks = [kind(Path(folder) / kind.name, movq, towers, seed=kind.seeded, size=bank_size) for kind in kinds]
    train(shared, denoising(shared, [sure, *banks], zero_embedding(towers)), settings, folder)
    return shared


def load_shared(folder: str | Path) -> SharedUNet:
    """The network as far as `folder` has it."""
    shared = SharedUNet(UNet2DConditionModel(**CONFIG))
    load_average(shared, folder)
    return shared.eval().requires_grad_(False)


class SureBank(Bank):
    """Pictures, whose embeddings now and then contradict what little noise leaves no doubt about.

    Image to image needs that: a network that has only seen the two agree redraws any picture as its embedding says.
    """

    name, batch = "sure", 16

    def limit(self, step: int) -> int:
        return self.size  # they are there

    def examples(self, draw: Draw) -> Examples:
        shown = super().examples(draw)
        clear = int(self.batch * timestep_table(DDPMScheduler(**SCHEDULER).alphas_cumprod)[CLEAR])
        wrong = torch.rand(self.batch, 1, generator=draw.torch) < CONTRADICTED
        wrong[clear:] = False  # timesteps are drawn in order
        return Examples(shown.latents, torch.where(wrong, shown.embeds.roll(1, 0), shown.embeds))


class SmallBank(Bank):
    """A bank for what the network begins to learn late."""

    seeded: int

    def limit(self, step: int) -> int:
        return min(BANK_START + BANK_GROWTH * step, self.size) // self.chunk * self.chunk


# Mixtures


class BetweenBank(SmallBank):
    """Pictures of one shape half-way, or another part of the way, between two others, as their embeddings are."""

    name, seeded, batch = "between", 7, 6

    def chunk_at(self, first: int) -> tuple[Sequence[Scene], Sequence[Palette], Tensor]:
        rng = np.random.default_rng([self.seed, 2**31, first])
        mixed = [between(rng) for _ in range(self.chunk)]
        starts, ends = (
            self.embed(scenes, [COLORS] * self.chunk, rng) for scenes in zip(*(m.ends for m in mixed), strict=False)
        )
        parts = torch.tensor([[m.part] for m in mixed], dtype=starts.dtype)
        return [m.middle for m in mixed], [m.palette for m in mixed], torch.lerp(starts, ends, parts)


@dataclass(frozen=True)
class Mixture:
    """A scene whose palette, place and size lie between those of two others, nearer to the second as `part` says."""

    ends: tuple[Scene, Scene]
    part: float
    middle: Scene
    palette: Palette


def between(rng: np.random.Generator) -> Mixture:
    """A mixture of two scenes of one shape that differ in one to four of place, size, colour and background."""
    while True:
        first, other = (sample_scene(rng, shapes=1) for _ in range(2))
        own, new = first.shapes[0], other.shapes[0]
        place, size, color, ground = rng.random(4) < 0.4
        changes: dict[str, Any] = {"x": new.x, "y": new.y} if place else {}
        changes |= {"size": new.size, "radius": new.radius} if size else {}
        changes |= {"color": new.color} if color else {}
        shape = dataclasses.replace(own, **changes)
        second = Scene(other.background if ground else first.background, (shape,))
        if second == first or shape.color == second.background or is_held_out(second):
            continue
        part = float(rng.random())
        x, y, radius = ((1 - part) * getattr(own, n) + part * getattr(shape, n) for n in ("x", "y", "radius"))
        middle = Scene(first.background, (dataclasses.replace(own, x=x, y=y, radius=radius),))
        palette = {
            name: tuple(np.add((1 - part) * np.array(COLORS[name]), part * np.array(COLORS[to])).tolist())
            for name, to in ((first.background, second.background), (own.color, shape.color))
        }
        if math.dist(*palette.values()) > FAINTEST and not is_held_out(renamed(middle, palette)):
            return Mixture((first, second), part, middle, palette)


class SceneBank(SmallBank):
    """A bank that knows the scenes of its pictures."""

    def __init__(self, folder: Path, movq: VQModel, towers: Towers, *, seed: int, size: int) -> None:
        super().__init__(folder, movq, towers, seed=seed, size=size)
        self._chunks: dict[int, list[Scene]] = {}

    def _known(self, numbers: npt.NDArray[np.int64]) -> list[Scene]:
        """The scenes of these pictures."""
        for chunk in {int(number) // self.chunk for number in numbers} - self._chunks.keys():
            self._chunks[chunk] = self.scenes(chunk * self.chunk)[0]
        return [self._chunks[int(number) // self.chunk][int(number) % self.chunk] for number in numbers]


# Inpainting


class HoleBank(SceneBank):
    """Pictures with holes. Of each there are three embeddings: its own, and those of each of its shapes alone."""

    name, seeded, batch = "holes", 3, 10
    embeds_shape = (3, EMBEDDING)

    def embed(self, scenes: Sequence[Scene], palettes: Sequence[Palette], rng: np.random.Generator) -> Tensor:
        told = [list(scenes)] + [
            [alone(scene, slot, rng, named=palette is COLORS) for scene, palette in zip(scenes, palettes, strict=True)]
            for slot in range(2)
        ]
        # a background that a palette does not know is one of the named colours
        full = [{**COLORS, **palette} for palette in palettes]
        return torch.stack([self.towers.embed_images(render(some, IMAGE_SIZE, full)) for some in told], dim=1)

    def examples(self, draw: Draw) -> Examples:
        chosen = self.choose(draw, self.batch)
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

    name, seeded, batch = "hints", 4, 12
    levels = 2

    def scene(self, rng: np.random.Generator) -> Scene:
        scene = super().scene(rng)
        return loosened(scene, rng) if rng.random() < LOOSE else scene

    def embed(self, scenes: Sequence[Scene], palettes: Sequence[Palette], rng: np.random.Generator) -> Tensor:
        return super().embed([settled(scene, rng) for scene in scenes], palettes, rng)

    def examples(self, draw: Draw) -> Examples:
        chosen = self.choose(draw, self.batch // self.levels)
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
