"""Prompts for judging the embedded model, and statistics of verdicts.

Prompts are captions like those of the training, from other seeds: each prompt has the generator
`default_rng([EVALUATION_SEED + seed, group, index])`, while the training uses small numbers as the first entry. For a
scene that is not held out, the training may have contained another image with the same attributes. Held-out scenes
contain a combination of attributes that is left out of training, and their prompts state it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.pixel_judge import ATTRIBUTES, Verdict, judge
from kandinsky22.training.captions import FULL, Detail, SceneDescription, caption
from kandinsky22.training.scenes import Scene, Shape, is_held_out, sample_scene

EVALUATION_SEED = 2_022_000_000
SHAPE_COUNTS = (1, 2)
DETAILS: dict[str, Detail | None] = {"usual": None, "full": FULL}
TARGETS = {1: 0.96, 2: 0.88}  # smallest share of correct images by number of shapes
MAX_GAP = 0.03  # largest difference between the shares of held-out and other prompts


@dataclass(frozen=True)
class Prompt:
    """A prompt of the benchmark.

    Attributes:
        text: Its text.
        description: Attributes that it states.
        scene: A scene that it describes.
        seed: Seed of the image.
        held_out: Whether it states a combination of attributes that is left out of training.
    """

    text: str
    description: SceneDescription
    scene: Scene
    seed: int
    held_out: bool

    @property
    def group(self) -> tuple[int, bool]:
        """Number of shapes, and whether the combination is held out."""
        return len(self.scene.shapes), self.held_out


def states_held_out(description: SceneDescription) -> bool:
    """Return whether the stated attributes alone contain a held-out combination.

    Args:
        description: Attributes that a caption states.
    """
    shapes = [Shape(shape.kind, shape.color, "", 0.0, 0.0, 0.0) for shape in description.shapes if shape.color]
    return is_held_out(Scene(description.background or "", tuple(shapes)))


def draw_prompt(index: int, *, shapes: int, held_out: bool = False, detail: str = "usual", seed: int = 0) -> Prompt:
    """Return one prompt.

    Args:
        index: Index among the prompts of its group.
        shapes: Number of shapes, 1 or 2.
        held_out: Whether it states a combination of attributes that is left out of training.
        detail: "usual" to leave attributes open as often as the training's captions do, "full" to state all of them.
        seed: Seed of the benchmark.
    """
    rng = np.random.default_rng([EVALUATION_SEED + seed, 2 * shapes + held_out, index])
    while True:
        scene = sample_scene(rng, shapes=shapes, held_out=held_out)
        result = caption(scene, rng, DETAILS[detail])
        if not held_out or states_held_out(result.description):
            return Prompt(result.text, result.description, scene, int(rng.integers(2**31)), held_out)


def draw_prompts(
    count: int, *, held_out: Sequence[bool] = (False, True), detail: str = "usual", seed: int = 0
) -> list[Prompt]:
    """Return prompts with one shape and prompts with two.

    Args:
        count: Number of prompts per group.
        held_out: Groups: False for combinations that are part of the training, True for held-out ones.
        detail: See `draw_prompt`.
        seed: Seed of the benchmark.
    """
    return [
        draw_prompt(index, shapes=shapes, held_out=kind, detail=detail, seed=seed)
        for kind in held_out
        for shapes in SHAPE_COUNTS
        for index in range(count)
    ]


def judge_all(images: Iterable[Any], prompts: Iterable[Prompt]) -> list[Verdict]:
    """Return the verdicts of images.

    Args:
        images: PIL images, arrays (H, W, 3) or tensors (3, H, W) in [0, 1].
        prompts: Their prompts, in the same order.
    """
    return [judge(image, prompt.description) for image, prompt in zip(images, prompts, strict=True)]


@dataclass(frozen=True)
class Share:
    """Share of correct items.

    Attributes:
        correct: Number of correct items.
        total: Number of items.
    """

    correct: int
    total: int

    @property
    def value(self) -> float:
        """The share from 0 to 1; NaN without items."""
        return self.correct / self.total if self.total else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Its 95 % confidence interval (Wilson 1927)."""
        if not self.total:
            return math.nan, math.nan
        z2 = 1.96**2
        middle = (self.correct + z2 / 2) / (self.total + z2)
        spread = 1.96 * math.sqrt(self.value * (1 - self.value) * self.total + z2 / 4) / (self.total + z2)
        return middle - spread, middle + spread

    def __str__(self) -> str:
        return f"{100 * self.value:5.1f} %" if self.total else "   -   "


Shares = dict[tuple[int, bool], dict[str, Share]]


def count(prompts: Sequence[Prompt], verdicts: Sequence[Verdict]) -> Shares:
    """Return the shares of correct images by group of prompts, for each attribute and for "all" stated attributes.

    Args:
        prompts: The prompts.
        verdicts: Their verdicts, in the same order.
    """
    shares: Shares = {}
    for group in sorted({prompt.group for prompt in prompts}, key=lambda group: (group[1], group[0])):
        members = [verdict for prompt, verdict in zip(prompts, verdicts, strict=True) if prompt.group == group]
        row = {"all": Share(sum(verdict.all_correct for verdict in members), len(members))}
        for name in ATTRIBUTES:
            stated = [verdict.correct[name] for verdict in members if name in verdict.correct]
            row[name] = Share(sum(stated), len(stated))
        shares[group] = row
    return shares


def table(shares: Shares) -> str:
    """Return the shares and their targets as a Markdown table.

    Args:
        shares: Result of `count`.
    """
    columns = ("all", *ATTRIBUTES)
    lines = [
        "| prompts | " + " | ".join(f"{name:>10}" for name in columns) + " | 95 % interval | target |",
        "|---|" + "---:|" * len(columns) + "---|---|",
    ]
    for (shapes, held_out), row in shares.items():
        low, high = row["all"].interval
        kind = "held out" if held_out else "seen"
        label = f"{('one shape', 'two shapes')[shapes - 1]}, {kind} ({row['all'].total})"
        cells = " | ".join(f"{row[name]!s:>10}" for name in columns)
        target = _target(shapes, held_out, shares)
        lines.append(f"| {label:<28} | {cells} | {100 * low:.1f} to {100 * high:.1f} % | {target} |")
    return "\n".join(lines)


def _target(shapes: int, held_out: bool, shares: Shares) -> str:
    value = shares[shapes, held_out]["all"].value
    if not held_out:
        target = TARGETS[shapes]
        return f"{100 * target:.0f} %: {'reached' if value >= target else 'missed'}"
    if (shapes, False) not in shares:
        return "-"
    gap = shares[shapes, False]["all"].value - value
    result = "reached" if gap <= MAX_GAP else "missed"
    return f"{100 * gap:+.1f} points below seen, at most {100 * MAX_GAP:.0f}: {result}"
