"""What can be asked of an embedding, and how embeddings add up from attributes: the auxiliary losses of CLIP.

All of it serves training and its evaluation; nothing here belongs to the published model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from kandinsky22.training.captions import Named
from kandinsky22.training.scenes import (
    COLORS,
    JITTER,
    PLACE_CENTERS,
    PLACES,
    RADII,
    SHAPES,
    SIZES,
    SPREAD,
    Palette,
    Scene,
    Shape,
)

# The questions, each with the number of its answers; the last six stand for the left or upper shape, then the other.
QUESTIONS = {
    "background": len(COLORS),
    "layout": len(PLACES) + 2,  # a place for one shape; side by side or one above the other for two
    "kind0": len(SHAPES), "color0": len(COLORS), "size0": len(SIZES),
    "kind1": len(SHAPES), "color1": len(COLORS), "size1": len(SIZES),
}  # fmt: skip
_FORMS = [name for name in QUESTIONS if name != "background" and not name.startswith("color")]
UNKNOWN = -100
PAINTS = 3  # background and two shapes
_MEASURES = 6  # of each of two shapes: offset from its place in x and y, and radius


def answers(scene: Scene) -> list[int]:
    """The true answer to each of QUESTIONS; UNKNOWN for the second shape of a scene that has one."""
    colors = list(COLORS)
    layout = PLACES.index(scene.place) if scene.place is not None else len(PLACES) + (scene.relation == "above")
    row = [colors.index(scene.background), layout]
    for shape in scene.shapes:
        row += [SHAPES.index(shape.kind), colors.index(shape.color), SIZES.index(shape.size)]
    return row + [UNKNOWN] * (len(QUESTIONS) - len(row))


def told(named: Named) -> list[int]:
    """The answers that a caption gives; UNKNOWN for what it leaves open."""
    colors = list(COLORS)
    row = [UNKNOWN] * len(QUESTIONS)
    if named.background is not None:
        row[0] = colors.index(named.background)
    if named.place is not None:
        row[1] = PLACES.index(named.place)
    if named.relation is not None:
        row[1] = len(PLACES) + (named.relation in ("above", "below"))
    shapes = named.shapes
    if len(shapes) == 2 and named.relation is None:
        return row  # which shape is meant to be the left or upper one is open
    if named.relation in ("right of", "below"):
        shapes = shapes[::-1]
    for slot, shape in enumerate(shapes):
        row[2 + 3 * slot] = SHAPES.index(shape.kind)
        if shape.color is not None:
            row[3 + 3 * slot] = colors.index(shape.color)
        if shape.size is not None:
            row[4 + 3 * slot] = SIZES.index(shape.size)
    return row


def _measures(scene: Scene) -> list[float]:
    """Offsets and radii of the shapes within what their place and size allow, each in about [-1, 1]."""
    row: list[float] = []
    for shape in scene.shapes:
        low, high = RADII[shape.size]
        # Nominal centres are a quarter apart, so the offset is what is left after rounding to quarters.
        dx, dy = (value - round(4 * value) / 4 for value in (shape.x, shape.y))
        row += [dx / JITTER, dy / JITTER, (2 * shape.radius - low - high) / (high - low)]
    return row + [0.0] * (_MEASURES - len(row))


@dataclasses.dataclass(frozen=True)
class Seen:
    """What can be seen in N pictures: `answers` (N, questions), `measures` (N, 6) and `paints` (N, 3, 3), the RGB of
    the background and of both shapes; not a number for the second shape where there is none."""

    answers: Tensor
    measures: Tensor
    paints: Tensor

    @classmethod
    def of(cls, scenes: Sequence[Scene], palettes: Sequence[Palette] | None = None) -> Seen:
        """All there is to see in scenes; the colours of `palettes` have no names."""
        labels = torch.tensor([answers(scene) for scene in scenes])
        if palettes is not None:
            labels[:, [index for index, name in enumerate(QUESTIONS) if name not in _FORMS]] = UNKNOWN
        paints = torch.full((len(scenes), PAINTS, 3), float("nan"))
        for row, scene in enumerate(scenes):
            palette = COLORS if palettes is None else palettes[row]
            for slot, name in enumerate([scene.background, *(shape.color for shape in scene.shapes)]):
                paints[row, slot] = torch.tensor(palette[name])
        return cls(labels, torch.tensor([_measures(scene) for scene in scenes]), paints)

    def followed_by(self, other: Seen) -> Seen:
        """These pictures, then those."""
        fields = [field.name for field in dataclasses.fields(self)]
        return Seen(*(torch.cat([getattr(self, name), getattr(other, name)]) for name in fields))


class Probe(nn.Module):
    """Linear questions to an embedding, the scene's attributes, exact positions and exact colours, and the way back.

    `compose` adds an embedding up from a part for each attribute. Pictures are trained to embed like that: only then
    does an attribute mean the same in a combination that training left out, to the prior as to the decoder.
    """

    def __init__(self, dimension: int) -> None:
        super().__init__()
        self.heads = nn.Linear(dimension, sum(QUESTIONS.values()))
        self.measures = nn.Linear(dimension, _MEASURES)
        self.paints = nn.Linear(dimension, 3 * PAINTS)
        self.parts = nn.Linear(sum(QUESTIONS[name] for name in _FORMS) + _MEASURES, dimension)
        self.paint_parts = nn.ModuleList(
            nn.Sequential(nn.Linear(3, 64), nn.GELU(), nn.Linear(64, dimension)) for _ in range(PAINTS)
        )

    def background_parts(self) -> Tensor:
        """What each of COLORS, as a background, contributes to an embedding, (colours, D)."""
        parts: Tensor = self.paint_parts[0](torch.tensor(list(COLORS.values())))
        return parts

    def compose(self, seen: Seen) -> Tensor:
        """The embeddings (N, D) that the attributes add up to."""
        forms = [
            functional.one_hot(label.clamp_min(0), QUESTIONS[name]) * (label != UNKNOWN)[:, None]
            for name, label in zip(QUESTIONS, seen.answers.T, strict=True)
            if name in _FORMS
        ]
        composed: Tensor = self.parts(torch.cat([*forms, seen.measures], dim=1))
        for slot, part in enumerate(self.paint_parts):
            composed = composed + part(seen.paints[:, slot].nan_to_num()) * ~seen.paints[:, slot, :1].isnan()
        return composed

    def picture_losses(self, embeddings: Tensor, seen: Seen) -> dict[str, Tensor]:
        """How badly attributes are read from the embeddings of pictures, and the share of the embeddings' variance
        that is not a sum of parts."""
        embeddings = embeddings.float()
        there = ~seen.paints.isnan()
        wrong = (self.paints(embeddings).view(-1, PAINTS, 3).float() - seen.paints.nan_to_num()) * there
        residue = (embeddings - self.compose(seen)).square().mean() / embeddings.var(0).mean()
        return {
            "seen": self.loss(embeddings, seen.answers),
            "measured": (self.measures(embeddings).float() - seen.measures).square().mean(),
            "painted": 10 * wrong.square().sum() / there.sum(),
            "residue": residue,
        }

    def logits(self, embeddings: Tensor) -> list[Tensor]:
        """Unnormalised log probabilities, one (N, answers) for each of QUESTIONS."""
        return list(self.heads(embeddings).split(list(QUESTIONS.values()), dim=1))

    def loss(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Mean cross entropy over the known answers, labels (N, questions)."""
        logits = self.logits(embeddings)
        losses = [
            functional.cross_entropy(logit.float(), label, ignore_index=UNKNOWN, reduction="sum")
            for logit, label in zip(logits, labels.T, strict=True)
        ]
        return torch.stack(losses).sum() / (labels != UNKNOWN).sum().clamp_min(1)

    @torch.no_grad()
    def right(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Whether each answer is right, (N, questions) bool; what is UNKNOWN counts as right."""
        guesses = torch.stack([logit.argmax(1) for logit in self.logits(embeddings)], dim=1)
        return (guesses == labels) | (labels == UNKNOWN)

    @torch.no_grad()
    def scenes(self, embeddings: Tensor) -> list[Scene]:
        """The scenes that the heads read from embeddings, with nominal positions and sizes."""
        answers = torch.stack([logit.argmax(1) for logit in self.logits(embeddings)], dim=1)
        return [scene_of(row) for row in answers.tolist()]


def scene_of(row: Sequence[int]) -> Scene:
    """The scene whose `answers` these are, with nominal positions and sizes."""
    background, layout = row[:2]
    near, far = 0.5 - SPREAD, 0.5 + SPREAD
    if layout < len(PLACES):
        centers = [PLACE_CENTERS[PLACES[layout]]]
    else:
        centers = [(near, 0.5), (far, 0.5)] if layout == len(PLACES) else [(0.5, near), (0.5, far)]
    colors, shapes = list(COLORS), []
    for center, first in zip(centers, (2, 5), strict=False):
        kind, color, size = row[first : first + 3]
        low, high = RADII[SIZES[size]]
        shapes.append(Shape(SHAPES[kind], colors[color], SIZES[size], *center, (low + high) / 2))
    return Scene(colors[background], tuple(shapes))
