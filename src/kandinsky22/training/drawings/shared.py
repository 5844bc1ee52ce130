"""Last stage of the embedded UNet: one network that serves text to image, inpainting, hints and image to image.

All are trained together from the start of the full size: examples of inpainting and of hints teach drawing, too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kandinsky22.inputs import masks
from kandinsky22.models.movq import VQModel
from kandinsky22.models.unet import UNet2DConditionModel
from kandinsky22.schedulers import DDPMScheduler
from kandinsky22.training.denoising import Examples, denoising_objective, timestep_distribution
from kandinsky22.training.drawings import decoder
from kandinsky22.training.drawings.clip import Clip
from kandinsky22.training.drawings.decoder import BANK, CHUNK, SCHEDULER, Bank
from kandinsky22.training.drawings.movq import FACTOR, SIZE
from kandinsky22.training.drawings.probe import SceneLabels
from kandinsky22.training.drawings.rendering import edge_map, layer_map
from kandinsky22.training.drawings.scenes import DRAWN, SINGLE_EXTENTS, Scene, sample_scene
from kandinsky22.training.drawings.sprites import Sprites
from kandinsky22.training.loop import Settings, StepRandomness, load_average, train
from kandinsky22.training.shared_network import SharedUNet

STRONG_SIGNAL_TIMESTEP = 340  # below this timestep the noisy latents determine the image
MISMATCH_SHARE = 0.6  # share of these examples that have another image's embedding
KNOWN_WEIGHT = 0.3  # weight of errors in the known region, which the pipeline overwrites
SINGLE_THING_SHARE = 0.5  # share of the masks around a thing whose embedding shows that thing alone
OTHER_LAYOUT_SHARE = 0.5  # share of hints whose embedding shows other positions and sizes than the hint
EDGE_SHARE = 0.4  # share of hints that show edges
# Number of examples per step. A hint costs about twice as much to encode as an image to denoise.
BATCHES = {"text_to_image": 21, "inpaint": 7, "hints": 4}
SETTINGS = Settings(
    steps=10000,
    learning_rate=2e-3,
    warmup=200,
    decay=4500,
    average=0.999,
    bf16=True,
    muon=True,
    muon_interval=4,
    seed=5,
)


@dataclass(frozen=True)
class SampledImages:
    """Random images of a bank.

    Attributes:
        indices: Indices in the bank, (n,).
        latents: Latents (n, c, h, w).
        scenes: The n scenes.
    """

    indices: npt.NDArray[np.int64]
    latents: Tensor
    scenes: list[Scene]


class SceneBank:
    """Examples whose images are those of a bank, and whose embeddings are sums of parts.

    Args:
        bank: The bank.
    """

    name: str
    timesteps_per_example = 1

    def __init__(self, bank: Bank) -> None:
        self.bank = bank
        self._chunks: dict[int, Sequence[Scene]] = {}

    def examples(self, randomness: StepRandomness) -> Examples:
        """Return the examples of a step.

        Args:
            randomness: Random generators of the step.
        """
        raise NotImplementedError

    def sample(self, randomness: StepRandomness) -> SampledImages:
        """Return random images.

        Args:
            randomness: Random generators of the step.
        """
        indices = self.bank.sample(BATCHES[self.name], randomness)
        latents = torch.from_numpy(self.bank.latents[indices]).float()
        return SampledImages(indices, latents, [self._scene(int(index)) for index in indices])

    def _scene(self, index: int) -> Scene:
        chunk = index // CHUNK
        if chunk not in self._chunks:
            self._chunks[chunk] = self.bank.chunk_scenes(chunk * CHUNK)
        return self._chunks[chunk][index % CHUNK]

    def embed(self, scenes: Sequence[Scene], randomness: StepRandomness) -> Tensor:
        """Return embeddings (len(scenes), D) with noise, some of them replaced by the negative embedding.

        Args:
            scenes: The scenes.
            randomness: Random generators of the step.
        """
        with torch.no_grad():
            embeds = self.bank.clip.probe.compose(SceneLabels.of(scenes)).float()
        return self.bank.perturb(embeds, randomness)


class TextToImageBank(SceneBank):
    """Images with embeddings of both kinds; where noise is low, some have the embedding of another image.

    Image to image needs such examples: a network that is only trained on matching pairs changes any image into what its
    embedding describes.
    """

    name = "text_to_image"

    def examples(self, randomness: StepRandomness) -> Examples:
        """Return the examples of a step.

        Args:
            randomness: Random generators of the step.
        """
        images = self.sample(randomness)
        embeds = self.bank.perturb(self.bank.stored_embeds(images.indices, randomness), randomness)
        distribution = timestep_distribution(DDPMScheduler(**SCHEDULER).alphas_cumprod)
        mismatched = torch.rand(len(embeds), 1, generator=randomness.torch) < MISMATCH_SHARE
        mismatched[int(len(embeds) * distribution[STRONG_SIGNAL_TIMESTEP]) :] = False  # timesteps ascend
        return Examples(images.latents, torch.where(mismatched, embeds.roll(1, 0), embeds))


class InpaintBank(SceneBank):
    """Images with masks around a thing or elsewhere."""

    name = "inpaint"

    def examples(self, randomness: StepRandomness) -> Examples:
        """Return the examples of a step.

        Args:
            randomness: Random generators of the step.
        """
        images = self.sample(randomness)
        latents, scenes = images.latents, images.scenes
        rng = randomness.numpy
        sampled = [sample_mask(scene, rng) for scene in scenes]
        known = torch.cat([mask.known for mask in sampled])
        described = [single_thing(scene, mask.slot, rng) for scene, mask in zip(scenes, sampled, strict=True)]
        return Examples(
            latents,
            self.embed(described, randomness),
            channels=torch.cat([latents * known, known], dim=1),
            weight=1 - (1 - KNOWN_WEIGHT) * known,
        )


@dataclass(frozen=True)
class SampledMask:
    """Mask of an image for inpainting.

    Attributes:
        known: 1 for latents of the known region, 0 for others, (1, 1, h, w).
        slot: Index of the thing that the mask surrounds; None for other masks.
    """

    known: Tensor
    slot: int | None


def sample_mask(scene: Scene, rng: np.random.Generator) -> SampledMask:
    """Return a random mask, reduced to latents as the inpainting pipeline does.

    Args:
        scene: Scene of the image.
        rng: Random generator.
    """
    side = SIZE // FACTOR
    xs, ys = np.meshgrid(*[(np.arange(side) + 0.5 / FACTOR) / side] * 2)
    slot = int(rng.integers(len(scene.things)))
    thing = scene.things[slot]
    left, top, right, bottom = thing.extent / 2 + rng.uniform(0.02, 0.14, 4)
    repainted = (xs > thing.x - left) & (xs < thing.x + right) & (ys > thing.y - top) & (ys < thing.y + bottom)
    kind = rng.random()
    surrounds = kind < 0.55 and scene.arrangement not in ("on", "front")
    if kind >= 0.9:
        repainted = np.ones_like(repainted)
    elif kind >= 0.7:
        half = (xs if rng.random() < 0.5 else ys) < rng.uniform(0.2, 0.8)
        repainted = half if rng.random() < 0.5 else ~half
    elif kind >= 0.55:
        x, y = rng.uniform(0, 1, 2)
        repainted = (abs(xs - x) < rng.uniform(0.1, 0.45)) & (abs(ys - y) < rng.uniform(0.1, 0.45))
    pixels = torch.from_numpy(repainted).float()[None, None]
    return SampledMask(masks.unmasked_latents(pixels, (side, side)), slot if surrounds else None)


def single_thing(scene: Scene, slot: int | None, rng: np.random.Generator) -> Scene:
    """Return a scene of one of the things, like that of a prompt about the masked region.

    Args:
        scene: Scene of the image.
        slot: Index of the thing; None returns the scene itself.
        rng: Random generator.
    """
    if slot is None or rng.random() >= SINGLE_THING_SHARE:
        return scene
    thing = dataclasses.replace(scene.things[slot], size="large", x=0.5, y=0.5, extent=SINGLE_EXTENTS["large"])
    return Scene(scene.style, scene.background, (thing,), None, "center")


class HintBank(SceneBank):
    """Images with hints. The embedding may show the things at other positions and in other sizes."""

    name = "hints"

    def examples(self, randomness: StepRandomness) -> Examples:
        """Return the examples of a step.

        Args:
            randomness: Random generators of the step.
        """
        images = self.sample(randomness)
        latents, scenes = images.latents, images.scenes
        rng = randomness.numpy
        maps = [(edge_map if rng.random() < EDGE_SHARE else layer_map)(self.bank.sprites, s, SIZE) for s in scenes]
        brightness = torch.from_numpy(rng.uniform(0.6, 1.0, len(scenes))).float()[:, None, None, None]
        hints = torch.from_numpy(np.stack(maps))[:, None].repeat(1, 3, 1, 1) * brightness
        described = [other_layout(s, rng) if rng.random() < OTHER_LAYOUT_SHARE else s for s in scenes]
        return Examples(latents, self.embed(described, randomness), hint=hints)


def other_layout(scene: Scene, rng: np.random.Generator) -> Scene:
    """Return a scene of the same things in another place and size.

    Args:
        scene: The scene.
        rng: Random generator.
    """
    other = sample_scene(rng, DRAWN, arrangement=scene.arrangement)
    things = tuple(
        dataclasses.replace(place, name=thing.name, color=thing.color)
        for thing, place in zip(scene.things, other.things, strict=True)
    )
    return dataclasses.replace(scene, things=things, position=other.position)


def example_hints(sprites: Sprites) -> Tensor:
    """Return some hints (16, 3, SIZE, SIZE), from which the convolutions of hints are initialised.

    Args:
        sprites: Pixels of all things.
    """
    rng = np.random.default_rng(0)
    maps = [layer_map(sprites, sample_scene(rng), SIZE) for _ in range(16)]
    return torch.from_numpy(np.stack(maps))[:, None].repeat(1, 3, 1, 1)


def train_shared(
    folder: Path,
    unet: UNet2DConditionModel,
    movq: VQModel,
    clip: Clip,
    sprites: Sprites,
    settings: Settings = SETTINGS,
) -> SharedUNet:
    """Train the shared network, or resume its training.

    Args:
        folder: Folder of the stage.
        unet: Decoder, trained on images of half the size.
        movq: Trained MoVQ.
        clip: Trained CLIP, whose towers are finished.
        sprites: Pixels of all things.
        settings: Hyperparameters.

    Returns:
        The trained network.
    """
    torch.manual_seed(settings.seed)
    shared = SharedUNet(unet, example_hints(sprites))
    bank = Bank(folder / BANK, movq, clip, sprites, seed=settings.seed)
    sources = [TextToImageBank(bank), InpaintBank(bank), HintBank(bank)]
    train(shared, denoising_objective(shared, DDPMScheduler(**SCHEDULER), sources), settings, folder)
    return shared


def load_shared(folder: Path, sprites: Sprites) -> SharedUNet:
    """Return the network in its current state of training, frozen.

    Args:
        folder: Folder of the stage.
        sprites: Pixels of all things.
    """
    shared = SharedUNet(UNet2DConditionModel(**decoder.CONFIG), example_hints(sprites))
    load_average(shared, folder)
    return shared.eval().requires_grad_(False)
