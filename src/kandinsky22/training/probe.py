"""Auxiliary losses of CLIP: reading a scene's attributes from an embedding, and composing an embedding from them.

All of it serves training and its evaluation. The published model contains none of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from kandinsky22.training.captions import SceneDescription
from kandinsky22.training.scenes import (
    COLORS,
    JITTER,
    PAIR_OFFSET,
    POSITION_CENTERS,
    POSITIONS,
    RADII,
    SHAPES,
    SIZES,
    Palette,
    Scene,
    Shape,
)

# Number of answers of each question. The last six questions are about the left or upper shape, then about the other.
QUESTIONS = {
    "background": len(COLORS),
    "layout": len(POSITIONS) + 2,  # a position for one shape; side by side or one above the other for two
    "kind0": len(SHAPES),
    "color0": len(COLORS),
    "size0": len(SIZES),
    "kind1": len(SHAPES),
    "color1": len(COLORS),
    "size1": len(SIZES),
}
_FORM_QUESTIONS = [name for name in QUESTIONS if name != "background" and not name.startswith("color")]
UNKNOWN = -100
COLOR_SLOTS = 3  # background and two shapes
_GEOMETRY = 6  # offset in x and y from the nominal centre, and radius, for each of two shapes


def scene_answers(scene: Scene) -> list[int]:
    """Return the true answer to each of QUESTIONS.

    Args:
        scene: The scene.

    Returns:
        Indices of answers; UNKNOWN for the second shape of a scene with one shape.
    """
    colors = list(COLORS)
    layout = (
        POSITIONS.index(scene.position) if scene.position is not None else len(POSITIONS) + (scene.relation == "above")
    )
    answers = [colors.index(scene.background), layout]
    for shape in scene.shapes:
        answers += [SHAPES.index(shape.kind), colors.index(shape.color), SIZES.index(shape.size)]
    return answers + [UNKNOWN] * (len(QUESTIONS) - len(answers))


def caption_answers(description: SceneDescription) -> list[int]:
    """Return the answers to QUESTIONS that a caption gives.

    Args:
        description: Attributes that the caption states.

    Returns:
        Indices of answers; UNKNOWN for attributes that the caption does not state.
    """
    colors = list(COLORS)
    answers = [UNKNOWN] * len(QUESTIONS)
    if description.background is not None:
        answers[0] = colors.index(description.background)
    if description.position is not None:
        answers[1] = POSITIONS.index(description.position)
    if description.relation is not None:
        answers[1] = len(POSITIONS) + (description.relation in ("above", "below"))
    shapes = description.shapes
    if len(shapes) == 2 and description.relation is None:
        return answers  # the caption does not say which shape is the left or upper one
    if description.relation in ("right of", "below"):
        shapes = shapes[::-1]
    for slot, shape in enumerate(shapes):
        answers[2 + 3 * slot] = SHAPES.index(shape.kind)
        if shape.color is not None:
            answers[3 + 3 * slot] = colors.index(shape.color)
        if shape.size is not None:
            answers[4 + 3 * slot] = SIZES.index(shape.size)
    return answers


def _geometry(scene: Scene) -> list[float]:
    """Return offsets and radii of the shapes, relative to the range of their position and size, about [-1, 1]."""
    values: list[float] = []
    for shape in scene.shapes:
        low, high = RADII[shape.size]
        # Nominal centres are a quarter apart, thus the offset is the remainder after rounding to quarters.
        dx, dy = (value - round(4 * value) / 4 for value in (shape.x, shape.y))
        values += [dx / JITTER, dy / JITTER, (2 * shape.radius - low - high) / (high - low)]
    return values + [0.0] * (_GEOMETRY - len(values))


@dataclasses.dataclass(frozen=True)
class SceneLabels:
    """Labels of N images.

    Attributes:
        answers: Indices of the answers to QUESTIONS, (N, questions), or UNKNOWN.
        geometry: Offsets and radii of the shapes, (N, 6), about [-1, 1].
        colors: RGB in [0, 1] of the background and of both shapes, (N, 3, 3); NaN for a second shape that is missing.
    """

    answers: Tensor
    geometry: Tensor
    colors: Tensor

    @classmethod
    def of(cls, scenes: Sequence[Scene], palettes: Sequence[Palette] | None = None) -> SceneLabels:
        """Return the labels of rendered scenes.

        Args:
            scenes: The scenes.
            palettes: Palette of each scene, whose colours have no names; None for COLORS.
        """
        answers = torch.tensor([scene_answers(scene) for scene in scenes])
        if palettes is not None:
            answers[:, [index for index, name in enumerate(QUESTIONS) if name not in _FORM_QUESTIONS]] = UNKNOWN
        colors = torch.full((len(scenes), COLOR_SLOTS, 3), float("nan"))
        for index, scene in enumerate(scenes):
            palette = COLORS if palettes is None else palettes[index]
            for slot, name in enumerate([scene.background, *(shape.color for shape in scene.shapes)]):
                colors[index, slot] = torch.tensor(palette[name])
        return cls(answers, torch.tensor([_geometry(scene) for scene in scenes]), colors)

    def followed_by(self, other: SceneLabels) -> SceneLabels:
        """Return the labels of these images and then those of others.

        Args:
            other: Labels of the other images.
        """
        fields = [field.name for field in dataclasses.fields(self)]
        return SceneLabels(*(torch.cat([getattr(self, name), getattr(other, name)]) for name in fields))


class Probe(nn.Module):
    """Linear heads that read a scene's attributes, exact positions and exact colours, and a map in the other direction.

    `compose` adds up an embedding from one part per attribute. Image embeddings are trained to be such sums: only then
    does an attribute mean the same in a combination that is left out of training, for the prior and for the decoder.

    Args:
        dimension: Dimension D of the embeddings.
    """

    def __init__(self, dimension: int) -> None:
        super().__init__()
        # Checkpoints of the training contain these names.
        self.heads = nn.Linear(dimension, sum(QUESTIONS.values()))
        self.measures = nn.Linear(dimension, _GEOMETRY)
        self.paints = nn.Linear(dimension, 3 * COLOR_SLOTS)
        self.parts = nn.Linear(sum(QUESTIONS[name] for name in _FORM_QUESTIONS) + _GEOMETRY, dimension)
        self.paint_parts = nn.ModuleList(
            nn.Sequential(nn.Linear(3, 64), nn.GELU(), nn.Linear(64, dimension)) for _ in range(COLOR_SLOTS)
        )

    def background_parts(self) -> Tensor:
        """Return the contribution of each of COLORS, as the background, to an embedding, (colours, D)."""
        parts: Tensor = self.paint_parts[0](torch.tensor(list(COLORS.values())))
        return parts

    def compose(self, labels: SceneLabels) -> Tensor:
        """Return the sums of the parts of all attributes, (N, D).

        Args:
            labels: Labels of N images.
        """
        forms = [
            functional.one_hot(answers.clamp_min(0), QUESTIONS[name]) * (answers != UNKNOWN)[:, None]
            for name, answers in zip(QUESTIONS, labels.answers.T, strict=True)
            if name in _FORM_QUESTIONS
        ]
        composed: Tensor = self.parts(torch.cat([*forms, labels.geometry], dim=1))
        for slot, part in enumerate(self.paint_parts):
            composed = composed + part(labels.colors[:, slot].nan_to_num()) * ~labels.colors[:, slot, :1].isnan()
        return composed

    def image_losses(self, embeddings: Tensor, labels: SceneLabels) -> dict[str, Tensor]:
        """Return the losses of image embeddings.

        Args:
            embeddings: Image embeddings (N, D).
            labels: Labels of the N images.

        Returns:
            "answers", "geometry" and "colors": errors of what the heads read. "residual": share of the embeddings'
            variance that is not a sum of parts.
        """
        embeddings = embeddings.float()
        present = ~labels.colors.isnan()
        color_error = self.paints(embeddings).view(-1, COLOR_SLOTS, 3).float() - labels.colors.nan_to_num()
        color_error = color_error * present
        residual = (embeddings - self.compose(labels)).square().mean() / embeddings.var(0).mean()
        return {
            "answers": self.answer_loss(embeddings, labels.answers),
            "geometry": (self.measures(embeddings).float() - labels.geometry).square().mean(),
            "colors": 10 * color_error.square().sum() / present.sum(),
            "residual": residual,
        }

    def logits(self, embeddings: Tensor) -> list[Tensor]:
        """Return unnormalised log probabilities of the answers, a tensor (N, answers) for each of QUESTIONS.

        Args:
            embeddings: Embeddings (N, D).
        """
        return list(self.heads(embeddings).split(list(QUESTIONS.values()), dim=1))

    def answer_loss(self, embeddings: Tensor, answers: Tensor) -> Tensor:
        """Return the mean cross entropy over the known answers.

        Args:
            embeddings: Embeddings (N, D).
            answers: Indices of the true answers, (N, questions), or UNKNOWN.
        """
        logits = self.logits(embeddings)
        losses = [
            functional.cross_entropy(logit.float(), answer, ignore_index=UNKNOWN, reduction="sum")
            for logit, answer in zip(logits, answers.T, strict=True)
        ]
        return torch.stack(losses).sum() / (answers != UNKNOWN).sum().clamp_min(1)

    @torch.no_grad()
    def correct(self, embeddings: Tensor, answers: Tensor) -> Tensor:
        """Return whether each answer that is read from embeddings is correct, (N, questions) bool.

        Args:
            embeddings: Embeddings (N, D).
            answers: Indices of the true answers, (N, questions), or UNKNOWN, for which any answer counts as correct.
        """
        predictions = torch.stack([logit.argmax(1) for logit in self.logits(embeddings)], dim=1)
        return (predictions == answers) | (answers == UNKNOWN)

    @torch.no_grad()
    def read_scenes(self, embeddings: Tensor) -> list[Scene]:
        """Return the scenes that the heads read from embeddings, with nominal positions and sizes.

        Args:
            embeddings: Embeddings (N, D).
        """
        answers = torch.stack([logit.argmax(1) for logit in self.logits(embeddings)], dim=1)
        return [scene_of(row) for row in answers.tolist()]


def scene_of(answers: Sequence[int]) -> Scene:
    """Return the scene that answers describe, with nominal positions and sizes.

    Args:
        answers: Indices of the answers to QUESTIONS.
    """
    background, layout = answers[:2]
    near, far = 0.5 - PAIR_OFFSET, 0.5 + PAIR_OFFSET
    if layout < len(POSITIONS):
        centers = [POSITION_CENTERS[POSITIONS[layout]]]
    else:
        centers = [(near, 0.5), (far, 0.5)] if layout == len(POSITIONS) else [(0.5, near), (0.5, far)]
    colors, shapes = list(COLORS), []
    for center, first in zip(centers, (2, 5), strict=False):
        kind, color, size = answers[first : first + 3]
        low, high = RADII[SIZES[size]]
        shapes.append(Shape(SHAPES[kind], colors[color], SIZES[size], *center, (low + high) / 2))
    return Scene(colors[background], tuple(shapes))
