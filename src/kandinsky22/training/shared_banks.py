"""Training examples of the shared UNet: text to image, interpolation, inpainting and hints."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kandinsky22.inputs import masks
from kandinsky22.models.movq import VQModel
from kandinsky22.schedulers import DDPMScheduler
from kandinsky22.training.clip import EMBEDDING, IMAGE_SIZE, Towers
from kandinsky22.training.decoder import SCHEDULER, Bank
from kandinsky22.training.denoising import Examples, timestep_distribution
from kandinsky22.training.loop import StepRandomness
from kandinsky22.training.movq import SIZE
from kandinsky22.training.scenes import (
    COLORS,
    JITTER,
    PAIR_OFFSET,
    POSITION_CENTERS,
    RADII,
    SIZES,
    Palette,
    Scene,
    Shape,
    is_held_out,
    rename_colors,
    render,
    render_hints,
    sample_scene,
)

Bools: TypeAlias = npt.NDArray[np.bool_]

# Number of images in a bank before the first step, new images per step, and largest number of images.
BANK_START, BANK_GROWTH, BANK_SIZE = 2048, 3, 10240

STRONG_SIGNAL_TIMESTEP = 340  # below this timestep the noisy latents determine the image
MISMATCH_SHARE = 0.6  # share of these examples that have another image's embedding
KNOWN_WEIGHT = 0.3  # weight of errors in the known region, which the pipeline overwrites
SINGLE_SHAPE_SHARE = 0.5  # share of the masks around a single shape whose embedding shows that shape alone
FREE_LAYOUT_SHARE = 0.5  # share of hints whose shapes are at positions that no caption describes
OTHER_LAYOUT_SHARE = 0.5  # share of hints whose embedding shows other positions and sizes than the hint
OUTLINE_SHARE = 0.4  # share of hints that show edges
MAX_EXTENT = 1.28  # largest distance of a shape's points from its centre, in units of its radius
FREE_RADII = (0.09, 0.2)
MIN_MIXTURE_CONTRAST = 0.25  # smallest distance between the two colours of an interpolated scene, in the unit cube


class StrongSignalBank(Bank):
    """Images of the decoder's bank; where noise is low, some have the embedding of another image.

    Image to image needs such examples: a network that is only trained on matching pairs changes any image into what its
    embedding describes.
    """

    name, batch = "strong_signal", 16

    def size_at(self, step: int) -> int:
        """Return the number of images, all of which exist.

        Args:
            step: Number of the step.
        """
        return self.size

    def examples(self, randomness: StepRandomness) -> Examples:
        """Return the examples of a step.

        Args:
            randomness: Random generators of the step.
        """
        examples = super().examples(randomness)
        distribution = timestep_distribution(DDPMScheduler(**SCHEDULER).alphas_cumprod)
        low_noise = int(self.batch * distribution[STRONG_SIGNAL_TIMESTEP])
        mismatched = torch.rand(self.batch, 1, generator=randomness.torch) < MISMATCH_SHARE
        mismatched[low_noise:] = False  # timesteps are in ascending order
        return Examples(examples.latents, torch.where(mismatched, examples.embeds.roll(1, 0), examples.embeds))


class VariantBank(Bank):
    """Bank of examples that are new in this stage, fewer than those of the decoder.

    Attributes:
        default_seed: Seed of the images.
    """

    default_seed: int

    def size_at(self, step: int) -> int:
        """Return the number of images that the bank holds at a step.

        Args:
            step: Number of the step, counted from 0.
        """
        return min(BANK_START + BANK_GROWTH * step, self.size) // self.chunk * self.chunk


# Interpolation


class InterpolationBank(VariantBank):
    """Images of one shape between two others, with embeddings at the same fraction between those of the two."""

    name, default_seed, batch = "interpolation", 7, 6

    def encode_chunk(self, first: int) -> tuple[Sequence[Scene], Sequence[Palette], Tensor]:
        """Return scenes, palettes and embeddings of a chunk of images.

        Args:
            first: Index of the first image.
        """
        rng = np.random.default_rng([self.seed, 2**31, first])
        mixtures = [sample_mixture(rng) for _ in range(self.chunk)]
        starts, ends = (
            self.embed(scenes, [COLORS] * self.chunk, rng)
            for scenes in zip(*(mixture.ends for mixture in mixtures), strict=False)
        )
        fractions = torch.tensor([[mixture.fraction] for mixture in mixtures], dtype=starts.dtype)
        scenes, palettes = [mixture.scene for mixture in mixtures], [mixture.palette for mixture in mixtures]
        return scenes, palettes, torch.lerp(starts, ends, fractions)


@dataclass(frozen=True)
class Mixture:
    """A scene between two others.

    Attributes:
        ends: The two scenes.
        fraction: Fraction of the way from the first to the second, from 0 to 1.
        scene: The scene between them; its colours are keys of the palette.
        palette: RGB in [0, 1] of its colours.
    """

    ends: tuple[Scene, Scene]
    fraction: float
    scene: Scene
    palette: Palette


def sample_mixture(rng: np.random.Generator) -> Mixture:
    """Return a random mixture of scenes of one shape that differ in position, size, colour or background.

    Args:
        rng: Random generator.
    """
    while True:
        first, other = (sample_scene(rng, shapes=1) for _ in range(2))
        start, source = first.shapes[0], other.shapes[0]
        position, size, color, background = rng.random(4) < 0.4
        changes: dict[str, Any] = {"x": source.x, "y": source.y} if position else {}
        changes |= {"size": source.size, "radius": source.radius} if size else {}
        changes |= {"color": source.color} if color else {}
        end = dataclasses.replace(start, **changes)
        second = Scene(other.background if background else first.background, (end,))
        if second == first or end.color == second.background or is_held_out(second):
            continue
        fraction = float(rng.random())
        x, y, radius = (
            (1 - fraction) * getattr(start, name) + fraction * getattr(end, name) for name in ("x", "y", "radius")
        )
        scene = Scene(first.background, (dataclasses.replace(start, x=x, y=y, radius=radius),))
        palette = {
            name: tuple(np.add((1 - fraction) * np.array(COLORS[name]), fraction * np.array(COLORS[to])).tolist())
            for name, to in ((first.background, second.background), (start.color, end.color))
        }
        if math.dist(*palette.values()) > MIN_MIXTURE_CONTRAST and not is_held_out(rename_colors(scene, palette)):
            return Mixture((first, second), fraction, scene, palette)


class SceneBank(VariantBank):
    """Bank whose examples depend on the scenes of its images.

    Args:
        folder: Folder of the files.
        movq: Trained MoVQ.
        towers: Trained CLIP towers.
        seed: Seed of the images.
        size: Largest number of images.
    """

    def __init__(self, folder: Path, movq: VQModel, towers: Towers, *, seed: int, size: int) -> None:
        super().__init__(folder, movq, towers, seed=seed, size=size)
        self._chunks: dict[int, list[Scene]] = {}

    def _scenes_at(self, indices: npt.NDArray[np.int64]) -> list[Scene]:
        """Return the scenes of images."""
        for chunk in {int(index) // self.chunk for index in indices} - self._chunks.keys():
            self._chunks[chunk] = self.chunk_scenes(chunk * self.chunk)[0]
        return [self._chunks[int(index) // self.chunk][int(index) % self.chunk] for index in indices]


# Inpainting


class InpaintBank(SceneBank):
    """Images with masks. Each image has three embeddings: its own, and those of each of its shapes alone."""

    name, default_seed, batch = "inpaint", 3, 10
    embeds_shape = (3, EMBEDDING)

    def embed(self, scenes: Sequence[Scene], palettes: Sequence[Palette], rng: np.random.Generator) -> Tensor:
        """Return the embeddings of images and of their shapes alone, (len(scenes), 3, D).

        Args:
            scenes: Scenes of the images.
            palettes: Palette of each scene.
            rng: Random generator.
        """
        groups = [list(scenes)] + [
            [
                single_shape(scene, slot, rng, other_background=palette is COLORS)
                for scene, palette in zip(scenes, palettes, strict=True)
            ]
            for slot in range(2)
        ]
        # A background that a palette lacks is one of the named colours.
        complete = [{**COLORS, **palette} for palette in palettes]
        embeds = [self.towers.embed_images(render(group, IMAGE_SIZE, complete)) for group in groups]
        return torch.stack(embeds, dim=1)

    def examples(self, randomness: StepRandomness) -> Examples:
        """Return the examples of a step.

        Args:
            randomness: Random generators of the step.
        """
        indices = self.sample_indices(randomness, self.batch)
        latents, embeds = self.read(indices)
        sampled = [sample_mask(scene, randomness.numpy) for scene in self._scenes_at(indices)]
        known = torch.cat([mask.known for mask in sampled])
        return Examples(
            latents,
            embeds[torch.arange(len(embeds)), torch.tensor([mask.embedding_index for mask in sampled])],
            channels=torch.cat([latents * known, known], dim=1),
            weight=1 - (1 - KNOWN_WEIGHT) * known,
        )


def single_shape(scene: Scene, slot: int, rng: np.random.Generator, *, other_background: bool) -> Scene:
    """Return a scene of one of the shapes, like that of a prompt about the masked region.

    The position is that of the image or any other.

    Args:
        scene: Scene of the image.
        slot: Index of the shape; a larger one than that of the last shape takes the last.
        rng: Random generator.
        other_background: Whether the background may differ from that of the image.
    """
    shape = scene.shapes[min(slot, len(scene.shapes) - 1)]
    if rng.random() < 0.5:
        center = list(POSITION_CENTERS.values())[rng.integers(len(POSITION_CENTERS))]
        x, y = center + rng.uniform(-JITTER, JITTER, 2)
        shape = dataclasses.replace(shape, x=float(x), y=float(y))
    other = Scene(list(COLORS)[rng.integers(len(COLORS))], (shape,))
    is_valid = other_background and other.background != shape.color and not is_held_out(other)
    return other if is_valid and rng.random() < 0.5 else Scene(scene.background, (shape,))


@dataclass(frozen=True)
class SampledMask:
    """Mask of an image for inpainting.

    Attributes:
        known: 1 for latents of the known region, 0 for others, (1, 1, h, w).
        embedding_index: Embedding of the example: 0 that of the image, 1 or 2 that of its first or second shape alone.
    """

    known: Tensor
    embedding_index: int


def sample_mask(scene: Scene, rng: np.random.Generator) -> SampledMask:
    """Return a random mask, reduced to latents as the inpainting pipeline does.

    Args:
        scene: Scene of the image.
        rng: Random generator.
    """
    repainted = torch.from_numpy(_repainted_pixels(scene, rng)).float()[None, None]
    known = masks.unmasked_latents(repainted, (SIZE // 8, SIZE // 8))
    inside = [not known[0, 0][_latent_box(shape)].any() for shape in scene.shapes]
    touched = [not known[0, 0][_latent_box(shape)].all() for shape in scene.shapes]
    candidates = [slot for slot, is_inside in enumerate(inside) if is_inside and sum(touched) == 1 and known.any()]
    return SampledMask(known, 1 + candidates[0] if candidates and rng.random() < SINGLE_SHAPE_SHARE else 0)


def _repainted_pixels(scene: Scene, rng: np.random.Generator) -> Bools:
    """Return a mask (h, w) of every eighth pixel, those that the pipeline takes when it reduces a mask to latents."""
    coordinates = (8 * np.arange(SIZE // 8) + 0.5) / SIZE
    xs, ys = np.meshgrid(coordinates, coordinates)
    shape = scene.shapes[rng.integers(len(scene.shapes))]
    extent = MAX_EXTENT * shape.radius
    left, top, right, bottom = extent + rng.uniform(0.0, 0.15, 4)
    box = (xs > shape.x - left) & (xs < shape.x + right) & (ys > shape.y - top) & (ys < shape.y + bottom)
    kind = rng.random()
    if kind < 0.5:
        return box
    if kind < 0.58:
        return np.hypot(xs - shape.x, ys - shape.y) < extent + 0.5 * left - 0.25 * extent
    if kind < 0.66:
        return ~box
    if kind < 0.82:
        half = (xs if rng.random() < 0.5 else ys) < rng.uniform(0.2, 0.8)
        return half if rng.random() < 0.5 else ~half
    if kind < 0.92:
        x, y = rng.uniform(0, 1, 2)
        return (abs(xs - x) < rng.uniform(0.1, 0.45)) & (abs(ys - y) < rng.uniform(0.1, 0.45))
    return np.ones_like(box)


def _latent_box(shape: Shape) -> tuple[slice, slice]:
    """Return the rows and columns of latents that a shape's bounding box touches."""
    side = SIZE // 8
    extent = MAX_EXTENT * shape.radius
    rows, columns = (
        slice(max(0, int((center - extent) * side)), math.ceil((center + extent) * side))
        for center in (shape.y, shape.x)
    )
    return rows, columns


# Hints


class HintBank(SceneBank):
    """Images with hints. Shapes may be anywhere; the embedding may show them at other positions and in other sizes."""

    name, default_seed, batch = "hints", 4, 12
    timesteps_per_example = 2

    def sample_scene(self, rng: np.random.Generator) -> Scene:
        """Return a random scene for an image.

        Args:
            rng: Random generator.
        """
        scene = super().sample_scene(rng)
        return free_layout(scene, rng) if rng.random() < FREE_LAYOUT_SHARE else scene

    def embed(self, scenes: Sequence[Scene], palettes: Sequence[Palette], rng: np.random.Generator) -> Tensor:
        """Return the embeddings of the scenes in layouts that captions can describe, (len(scenes), D).

        Args:
            scenes: Scenes of the images.
            palettes: Palette of each scene.
            rng: Random generator.
        """
        return super().embed([captionable_layout(scene, rng) for scene in scenes], palettes, rng)

    def examples(self, randomness: StepRandomness) -> Examples:
        """Return the examples of a step.

        Args:
            randomness: Random generators of the step.
        """
        indices = self.sample_indices(randomness, self.batch // self.timesteps_per_example)
        outlines = randomness.numpy.random(len(indices)) < OUTLINE_SHARE
        hints = render_hints(self._scenes_at(indices), SIZE, outlines=outlines.tolist())
        brightness = torch.from_numpy(randomness.numpy.uniform(0.6, 1.0, len(indices))).float()
        return Examples(*self.read(indices), hint=hints * brightness[:, None, None, None])


def free_layout(scene: Scene, rng: np.random.Generator) -> Scene:
    """Return a scene with its shapes at arbitrary positions and in arbitrary sizes, apart from each other.

    The left or upper one of two shapes still comes first.

    Args:
        scene: The scene.
        rng: Random generator.
    """
    while True:
        shapes = []
        for shape in scene.shapes:
            radius = rng.uniform(*FREE_RADII)
            x, y = rng.uniform(MAX_EXTENT * radius + 0.02, 0.98 - MAX_EXTENT * radius, 2)
            size = SIZES[int(radius > (RADII["small"][1] + RADII["large"][0]) / 2)]
            shapes.append(dataclasses.replace(shape, x=float(x), y=float(y), radius=float(radius), size=size))
        if len(shapes) == 1:
            return Scene(scene.background, tuple(shapes))
        first, second = shapes
        across, down = second.x - first.x, second.y - first.y
        is_apart = math.hypot(across, down) > MAX_EXTENT * (first.radius + second.radius)
        if is_apart and max(across, down, key=abs) > 0:
            return Scene(scene.background, (first, second))


def captionable_layout(scene: Scene, rng: np.random.Generator) -> Scene:
    """Return a scene with its shapes at positions and in sizes that captions can describe: the nearest, or any others.

    Args:
        scene: The scene.
        rng: Random generator.
    """
    other = sample_scene(rng, shapes=len(scene.shapes)) if rng.random() < OTHER_LAYOUT_SHARE else None
    layout = other or scene
    if len(scene.shapes) == 1:
        centers = [POSITION_CENTERS[layout.position or "center"]]
    else:
        near, far = 0.5 - PAIR_OFFSET, 0.5 + PAIR_OFFSET
        centers = [(near, 0.5), (far, 0.5)] if layout.relation == "left of" else [(0.5, near), (0.5, far)]
    shapes = []
    for shape, model, center in zip(scene.shapes, layout.shapes, centers, strict=True):
        x, y = center + rng.uniform(-JITTER, JITTER, 2)
        radius = float(rng.uniform(*RADII[model.size]))
        shapes.append(dataclasses.replace(shape, x=float(x), y=float(y), radius=radius, size=model.size))
    return Scene(scene.background, tuple(shapes))
