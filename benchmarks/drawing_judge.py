"""Judge of the embedded model's pictures: a classifier that is trained apart, on true renders.

It shares no weight and no network with the model: a small residual network of plain torch layers reads a picture and
says which things are where, in which colours, in which style and on which background. Its renders have another seed
than those of the model's training. They are blurred, noisy, slightly shifted in colour, or re-encoded by the model's
MoVQ. Held-out combinations are among them: the judge must know what the model has not seen.

``python -m benchmarks.drawing_judge --out training`` trains it, or resumes, and prints its accuracy on other renders.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kandinsky22.models.movq import VQModel
from kandinsky22.training.drawings.captions import SceneDescription
from kandinsky22.training.drawings.movq import load_movq
from kandinsky22.training.drawings.rendering import render
from kandinsky22.training.drawings.scenes import Mixture, Scene, sample_scene
from kandinsky22.training.drawings.sprites import Sprites
from kandinsky22.training.drawings.vocabulary import (
    ARRANGEMENTS,
    BACKGROUNDS,
    POSITIONS,
    SHAPES,
    STYLES,
    THING_COLORS,
    THINGS,
)
from kandinsky22.training.loop import Settings, StepRandomness, train

SIZE = 128  # side of the pictures that the judge reads, in pixels
RENDER_SIZE = 256
SLOTS = 3
LAYOUTS = (*POSITIONS, *ARRANGEMENTS)
HEADS = {"background": len(BACKGROUNDS), "style": len(STYLES), "layout": len(LAYOUTS)} | {
    f"{name}{slot}": count
    for slot in range(SLOTS)
    for name, count in (("thing", len(THINGS)), ("color", len(THING_COLORS)))
}
ABSENT = -100
BATCH = 64
REENCODED = 1024  # number of re-encoded pictures, which are made once
REENCODED_SHARE = 0.125
SEED = 90210
MIXTURE = Mixture(arrangements=(0.15, 0.12, 0.1, 0.1, 0.08))
SETTINGS = Settings(
    steps=6000, learning_rate=1e-3, warmup=200, decay=4000, weight_decay=0.05, average=0.998, bf16=True, muon=True
)


class _Block(nn.Module):
    """Residual block of two 3 x 3 convolutions.

    Args:
        channels: Channels of the input.
        out: Channels of the output.
        stride: Stride of the first convolution.
    """

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList(nn.GroupNorm(8, out) for _ in range(2))
        self.shortcut = nn.Conv2d(channels, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return features (batch, out, H / stride, W / stride).

        Args:
            x: Features (batch, channels, H, W).
        """
        y = F.relu(self.norms[0](self.first(x)))
        return F.relu(self.shortcut(x) + self.norms[1](self.second(y)))


class Judge(nn.Module):
    """Classifier of pictures."""

    def __init__(self) -> None:
        super().__init__()
        widths = (32, 64, 128, 192, 256)
        self.stem = nn.Conv2d(3, widths[0], 5, 2, 2)
        self.blocks = nn.Sequential(*(_Block(a, b, 2) for a, b in itertools.pairwise(widths)))
        self.neck = nn.Linear(widths[-1] * (SIZE // 32) ** 2, 512)
        self.heads = nn.Linear(512, sum(HEADS.values()))

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return unnormalised log probabilities, a tensor (N, answers) for each of HEADS.

        Args:
            images: RGB images (N, 3, H, W) in [0, 1]; sides other than SIZE are resized.
        """
        if images.shape[-1] != SIZE:
            images = F.interpolate(images, (SIZE, SIZE), mode="bilinear", antialias=True)
        features = self.blocks(F.relu(self.stem(images * 2 - 1)))
        logits: Tensor = self.heads(F.relu(self.neck(features.flatten(1))))
        return list(logits.split(list(HEADS.values()), dim=1))


def truth(scenes: Sequence[Scene]) -> Tensor:
    """Return the true answer of each of HEADS, (N, heads), ABSENT for things that a scene does not have.

    Args:
        scenes: The scenes.
    """
    rows = []
    for scene in scenes:
        layout = LAYOUTS.index(scene.position or scene.arrangement or "")
        row = [scene.background.index, STYLES.index(scene.style), layout]
        for thing in scene.things:
            row += [THINGS.index(thing.name), THING_COLORS.index(thing.color)]
        rows.append(row + [ABSENT] * (len(HEADS) - len(row)))
    return torch.tensor(rows)


def accepted_answers(description: SceneDescription) -> Tensor:
    """Return the answers to HEADS that agree with a caption, (R, heads), or ABSENT where any answer does.

    There are several rows if the caption does not say which of the things is where ("a cat next to a dog"). The four
    shapes look the same in all styles, so pictures of shapes alone have no style that could be read.

    Args:
        description: Attributes that the caption states.
    """
    layout = description.position or description.arrangement
    shows_style = any(thing.name not in SHAPES for thing in description.things)
    common = [
        ABSENT if description.background is None else description.background,
        STYLES.index(description.style) if description.style is not None and shows_style else ABSENT,
        ABSENT if layout is None else LAYOUTS.index(layout),
    ]
    orders = [description.things] if description.ordered else itertools.permutations(description.things)
    rows = []
    for things in orders:
        row = [answer for t in things for answer in (THINGS.index(t.name), THING_COLORS.index(t.color))]
        rows.append([*common, *row, *[ABSENT] * (len(HEADS) - len(common) - len(row))])
    return torch.tensor(rows)


def sample_scenes(rng: np.random.Generator, count: int) -> list[Scene]:
    """Return random scenes, some of which hold combinations that the model's training leaves out.

    Args:
        rng: Random generator.
        count: Number of scenes.
    """
    return [sample_scene(rng, MIXTURE, held_out=bool(rng.random() < 0.25)) for _ in range(count)]


def degrade(images: Tensor, randomness: StepRandomness) -> Tensor:
    """Return blurred, noisy and slightly shifted images, as generated ones may be.

    Args:
        images: RGB images (N, 3, H, W) in [0, 1].
        randomness: Random generators of the step.
    """
    rng = randomness.numpy
    if rng.random() < 0.5:
        size = int(rng.integers(images.shape[-1] // 3, images.shape[-1]))
        small = F.interpolate(images, (size, size), mode="bilinear", antialias=True)
        images = F.interpolate(small, images.shape[2:], mode="bicubic")
    shift = 0.03 * torch.randn(len(images), 3, 1, 1, generator=randomness.torch)
    noise = 0.04 * torch.rand(len(images), 1, 1, 1, generator=randomness.torch)
    return (images + shift + noise * torch.randn(images.shape, generator=randomness.torch)).clamp(0, 1)


@dataclass(frozen=True)
class Pool:
    """Re-encoded pictures.

    Attributes:
        images: RGB images (N, 3, SIZE, SIZE) in [0, 1].
        answers: True answers (N, heads).
    """

    images: Tensor
    answers: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, movq: VQModel, sprites: Sprites, count: int) -> Pool:
        """Return pictures that a MoVQ has encoded and decoded.

        Args:
            movq: The network.
            sprites: Pixels of all things.
            count: Number of pictures.
        """
        rng = np.random.default_rng([SEED, 1])
        scenes = sample_scenes(rng, count)
        images = []
        for first in range(0, count, 8):
            part = render(sprites, scenes[first : first + 8], RENDER_SIZE) * 2 - 1
            latents = movq.quant_conv(movq.encoder(part))
            decoded = movq.decode(latents, force_not_quantize=True).sample / 2 + 0.5
            images.append(F.interpolate(decoded.clamp(0, 1), (SIZE, SIZE), mode="bilinear", antialias=True))
        return cls(torch.cat(images), truth(scenes))


def train_judge(folder: Path, sprites: Sprites, pool: Pool, settings: Settings = SETTINGS) -> Judge:
    """Train the judge, or resume its training.

    Args:
        folder: Folder of the checkpoint.
        sprites: Pixels of all things.
        pool: Re-encoded pictures.
        settings: Hyperparameters.

    Returns:
        The judge.
    """
    torch.manual_seed(SEED)
    judge = Judge()

    def objective(randomness: StepRandomness) -> dict[str, Tensor]:
        rng = np.random.default_rng([SEED, randomness.step])
        chosen = torch.from_numpy(rng.integers(0, len(pool.images), int(BATCH * REENCODED_SHARE)))
        scenes = sample_scenes(rng, BATCH - len(chosen))
        images = degrade(torch.cat([render(sprites, scenes, SIZE), pool.images[chosen]]), randomness)
        answers = torch.cat([truth(scenes), pool.answers[chosen]])
        losses = [
            F.cross_entropy(logits.float(), answer, ignore_index=ABSENT)
            for logits, answer in zip(judge(images), answers.T, strict=True)
            if (answer != ABSENT).any()
        ]
        return {"loss": torch.stack(losses).sum()}

    train(judge, objective, settings, folder)
    return judge


@torch.no_grad()
def accuracy(judge: Judge, sprites: Sprites, *, count: int = 1000) -> dict[str, float]:
    """Return the share of correct answers on true renders that the training did not contain.

    Args:
        judge: Trained judge.
        sprites: Pixels of all things.
        count: Number of scenes.
    """
    rng = np.random.default_rng([SEED, 2])
    right = {name: [0, 0] for name in HEADS}
    for _ in range(0, count, 100):
        scenes = sample_scenes(rng, 100)
        logits = judge(render(sprites, scenes, RENDER_SIZE))
        for name, scores, answer in zip(HEADS, logits, truth(scenes).T, strict=True):
            known = answer != ABSENT
            right[name][0] += int((scores.argmax(1) == answer)[known].sum())
            right[name][1] += int(known.sum())
    return {name: round(good / max(total, 1), 4) for name, (good, total) in right.items()}


def main() -> None:
    """Train the judge and print its accuracy."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.drawing_judge", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("training"), help="folder of the training's stages")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sprites = Sprites(options.out)
    pool = Pool.of(load_movq(options.out / "movq", sprites), sprites, REENCODED)
    judge = train_judge(options.out / "judge", sprites, pool)
    print(json.dumps(accuracy(judge, sprites), indent=2))


if __name__ == "__main__":
    main()
