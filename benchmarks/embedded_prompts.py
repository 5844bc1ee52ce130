"""Fresh prompts for judging the embedded model, and how a set of verdicts is counted.

Prompts are drawn from the same captions as the training's, from seeds of their own: every prompt has the generator
`default_rng([EVALUATION_SEED + seed, group, index])`, while the training recipes seed theirs with small numbers in the
first place. Of "seen" scenes training may have met another picture with the same attributes; "held-out" scenes contain
a combination of attributes that it never showed, and their prompts name it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.pixel_judge import ATTRIBUTES, Verdict, judge
from kandinsky22.training.captions import FULL, Detail, Named, caption
from kandinsky22.training.scenes import Scene, Shape, is_held_out, sample_scene

EVALUATION_SEED = 2_022_000_000
SHAPE_COUNTS = (1, 2)
DETAILS: dict[str, Detail | None] = {"usual": None, "full": FULL}
BARS = {1: 0.96, 2: 0.88}
MAX_GAP = 0.03


@dataclass(frozen=True)
class Prompt:
    """A prompt, what it names, a scene that it describes, and the seed to draw its picture with."""

    text: str
    named: Named
    scene: Scene
    seed: int
    held_out: bool

    @property
    def group(self) -> tuple[int, bool]:
        """Number of shapes, and whether the combination was held out of training."""
        return len(self.scene.shapes), self.held_out


def names_held_out(named: Named) -> bool:
    """Whether the words alone, without what they leave open, contain a combination that training never shows."""
    stated = [Shape(shape.kind, shape.color, "", 0.0, 0.0, 0.0) for shape in named.shapes if shape.color is not None]
    return is_held_out(Scene(named.background or "", tuple(stated)))


def draw_prompt(index: int, *, shapes: int, held_out: bool = False, detail: str = "usual", seed: int = 0) -> Prompt:
    """Draw the prompt with this `index` among those with as many `shapes`.

    `detail` is "usual" for captions that leave things open as often as the training's do, or "full" for those that
    state everything. A change of `seed` gives other prompts.
    """
    rng = np.random.default_rng([EVALUATION_SEED + seed, 2 * shapes + held_out, index])
    while True:
        scene = sample_scene(rng, shapes=shapes, held_out=held_out)
        words = caption(scene, rng, DETAILS[detail])
        if not held_out or names_held_out(words.named):
            return Prompt(words.text, words.named, scene, int(rng.integers(2**31)), held_out)


def draw_prompts(
    count: int, *, held_out: Sequence[bool] = (False, True), detail: str = "usual", seed: int = 0
) -> list[Prompt]:
    """Draw `count` prompts with one shape and `count` with two, of each kind in `held_out`."""
    return [
        draw_prompt(index, shapes=shapes, held_out=kind, detail=detail, seed=seed)
        for kind in held_out
        for shapes in SHAPE_COUNTS
        for index in range(count)
    ]


def judge_all(images: Iterable[Any], prompts: Iterable[Prompt]) -> list[Verdict]:
    """Judge pictures (PIL images, arrays (H, W, 3) or tensors (3, H, W) in [0, 1]) against their prompts, in order."""
    return [judge(image, prompt.named) for image, prompt in zip(images, prompts, strict=True)]


@dataclass(frozen=True)
class Share:
    """How many of how many were right."""

    right: int
    of: int

    @property
    def value(self) -> float:
        """The share itself, not a number where there was nothing to count."""
        return self.right / self.of if self.of else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % confidence interval after Wilson (1927)."""
        if not self.of:
            return math.nan, math.nan
        z2 = 1.96**2
        middle = (self.right + z2 / 2) / (self.of + z2)
        spread = 1.96 * math.sqrt(self.value * (1 - self.value) * self.of + z2 / 4) / (self.of + z2)
        return middle - spread, middle + spread

    def __str__(self) -> str:
        return f"{100 * self.value:5.1f} %" if self.of else "   -   "


Shares = dict[tuple[int, bool], dict[str, Share]]


def count(prompts: Sequence[Prompt], verdicts: Sequence[Verdict]) -> Shares:
    """Success by group of prompts (number of shapes, held out), by attribute and as "all" for everything named."""
    shares: Shares = {}
    for group in sorted({prompt.group for prompt in prompts}, key=lambda group: (group[1], group[0])):
        members = [verdict for prompt, verdict in zip(prompts, verdicts, strict=True) if prompt.group == group]
        row = {"all": Share(sum(verdict.all_right for verdict in members), len(members))}
        for name in ATTRIBUTES:
            named = [verdict.right[name] for verdict in members if name in verdict.right]
            row[name] = Share(sum(named), len(named))
        shares[group] = row
    return shares


def table(shares: Shares) -> str:
    """The shares as a table in Markdown, with the bars beside them."""
    columns = ("all", *ATTRIBUTES)
    lines = [
        "| prompts | " + " | ".join(f"{name:>10}" for name in columns) + " | 95 % interval | bar |",
        "|---|" + "---:|" * len(columns) + "---|---|",
    ]
    for (shapes, held_out), row in shares.items():
        low, high = row["all"].interval
        label = f"{('one shape', 'two shapes')[shapes - 1]}, {'held out' if held_out else 'seen'} ({row['all'].of})"
        cells = " | ".join(f"{row[name]!s:>10}" for name in columns)
        bar = _bar(shapes, held_out, shares)
        lines.append(f"| {label:<28} | {cells} | {100 * low:.1f} to {100 * high:.1f} % | {bar} |")
    return "\n".join(lines)


def _bar(shapes: int, held_out: bool, shares: Shares) -> str:
    value = shares[shapes, held_out]["all"].value
    if not held_out:
        return f"{100 * BARS[shapes]:.0f} %: {'reached' if value >= BARS[shapes] else 'missed'}"
    if (shapes, False) not in shares:
        return "-"
    gap = shares[shapes, False]["all"].value - value
    return f"{100 * gap:+.1f} points below seen, at most {100 * MAX_GAP:.0f}: {'held' if gap <= MAX_GAP else 'missed'}"
