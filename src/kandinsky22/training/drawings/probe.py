"""Auxiliary losses of CLIP: reading a scene's attributes from an embedding, and composing an embedding from them.

All of it serves training and its evaluation. The published model contains none of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from kandinsky22.training.drawings.captions import SceneDescription
from kandinsky22.training.drawings.scenes import (
    CENTERS,
    FRONT_CENTERS,
    FRONT_EXTENTS,
    JITTER,
    ON_CENTERS,
    ON_EXTENTS,
    PAIR_EXTENTS,
    PAIR_OFFSET,
    RADIUS_JITTER,
    ROW_CENTERS,
    ROW_EXTENT,
    SINGLE_EXTENTS,
    Scene,
)
from kandinsky22.training.drawings.vocabulary import (
    ARRANGEMENTS,
    BACKGROUNDS,
    POSITIONS,
    SIZES,
    STYLES,
    THING_COLORS,
    THINGS,
)

SLOTS = 3
LAYOUTS = (*POSITIONS, *ARRANGEMENTS)
# Number of answers of each question. Things are numbered from back to front.
QUESTIONS = {
    "background": len(BACKGROUNDS),
    "style": len(STYLES),
    "layout": len(LAYOUTS),
    **{
        f"{name}{slot}": count
        for slot in range(SLOTS)
        for name, count in (("thing", len(THINGS)), ("color", len(THING_COLORS)), ("size", len(SIZES)))
    },
}
UNKNOWN = -100
_GEOMETRY = 3 * SLOTS  # offset in x and y from the nominal centre, and of the extent, for each thing


def scene_answers(scene: Scene) -> list[int]:
    """Return the true answer to each of QUESTIONS.

    Args:
        scene: The scene.

    Returns:
        Indices of answers; UNKNOWN for things that the scene does not have.
    """
    layout = LAYOUTS.index(scene.position or scene.arrangement or "")
    answers = [scene.background.index, STYLES.index(scene.style), layout]
    for thing in scene.things:
        answers += [THINGS.index(thing.name), THING_COLORS.index(thing.color), SIZES.index(thing.size)]
    return answers + [UNKNOWN] * (len(QUESTIONS) - len(answers))


def caption_answers(description: SceneDescription) -> list[int]:
    """Return the answers to QUESTIONS that a caption gives.

    Args:
        description: Attributes that the caption states.

    Returns:
        Indices of answers; UNKNOWN for attributes that the caption does not state.
    """
    answers = [UNKNOWN] * len(QUESTIONS)
    if description.background is not None:
        answers[0] = description.background
    if description.style is not None:
        answers[1] = STYLES.index(description.style)
    if layout := description.position or description.arrangement:
        answers[2] = LAYOUTS.index(layout)
    if not description.ordered:
        return answers
    for slot, thing in enumerate(description.things):
        answers[3 + 3 * slot] = THINGS.index(thing.name)
        answers[4 + 3 * slot] = THING_COLORS.index(thing.color)
        if thing.size is not None:
            answers[5 + 3 * slot] = SIZES.index(thing.size)
    return answers


def _nominal(scene: Scene) -> list[tuple[float, float, float]]:
    """Return centre and extent of each thing without the random offsets."""
    near, far = 0.5 - PAIR_OFFSET, 0.5 + PAIR_OFFSET
    if scene.position is not None:
        return [(*CENTERS[scene.position], SINGLE_EXTENTS[scene.things[0].size])]
    extents = [PAIR_EXTENTS[thing.size] for thing in scene.things]
    if scene.arrangement == "beside":
        return [(near, 0.5, extents[0]), (far, 0.5, extents[1])]
    if scene.arrangement == "above":
        return [(0.5, near, extents[0]), (0.5, far, extents[1])]
    if scene.arrangement == "on":
        return [(*center, extent) for center, extent in zip(ON_CENTERS, ON_EXTENTS, strict=True)]
    if scene.arrangement == "front":
        return [(*center, extent) for center, extent in zip(FRONT_CENTERS, FRONT_EXTENTS, strict=True)]
    return [(*center, ROW_EXTENT) for center in ROW_CENTERS]


def _geometry(scene: Scene) -> list[float]:
    """Return offsets of the things and of their extents, relative to their range, about [-1, 1]."""
    values: list[float] = []
    for thing, (x, y, extent) in zip(scene.things, _nominal(scene), strict=True):
        values += [(thing.x - x) / JITTER, (thing.y - y) / JITTER, (thing.extent - extent) / RADIUS_JITTER]
    return values + [0.0] * (_GEOMETRY - len(values))


# Each step of the optimizer changes all parts by the same small length. Without this factor they would need more than
# a thousand steps to become as long as embeddings are.
PARTS_GAIN = 8.0


@dataclass(frozen=True)
class SceneLabels:
    """Labels of N images.

    Attributes:
        answers: Indices of the answers to QUESTIONS, (N, questions), or UNKNOWN.
        geometry: Offsets of the things and of their extents, (N, 9), about [-1, 1].
    """

    answers: Tensor
    geometry: Tensor

    @classmethod
    def of(cls, scenes: Sequence[Scene]) -> SceneLabels:
        """Return the labels of rendered scenes.

        Args:
            scenes: The scenes.
        """
        return cls(
            torch.tensor([scene_answers(scene) for scene in scenes]),
            torch.tensor([_geometry(scene) for scene in scenes]),
        )


class Probe(nn.Module):
    """Linear heads that read a scene's attributes and exact positions, and a map in the other direction.

    `compose` adds up an embedding from one part per attribute. Image embeddings are trained to be such sums: only then
    does an attribute mean the same in a combination that is left out of training, for the prior and for the decoder.

    Args:
        dimension: Dimension D of the embeddings.
    """

    def __init__(self, dimension: int) -> None:
        super().__init__()
        self.heads = nn.Linear(dimension, sum(QUESTIONS.values()))
        self.measures = nn.Linear(dimension, _GEOMETRY)
        self.parts = nn.Linear(sum(QUESTIONS.values()) + _GEOMETRY, dimension)

    def compose(self, labels: SceneLabels) -> Tensor:
        """Return the sums of the parts of all attributes, (N, D).

        Args:
            labels: Labels of N images.
        """
        answers = [
            functional.one_hot(column.clamp_min(0), count) * (column != UNKNOWN)[:, None]
            for count, column in zip(QUESTIONS.values(), labels.answers.T, strict=True)
        ]
        composed: Tensor = PARTS_GAIN * self.parts(torch.cat([*answers, labels.geometry], dim=1))
        return composed

    def image_losses(self, embeddings: Tensor, labels: SceneLabels) -> dict[str, Tensor]:
        """Return the losses of image embeddings.

        Args:
            embeddings: Image embeddings (N, D).
            labels: Labels of the N images.

        Returns:
            "answers" and "geometry": errors of what the heads read. "residual": share of the embeddings' variance that
            is not a sum of parts. "parts": error of what the heads read from such sums.
        """
        embeddings = embeddings.float()
        composed = self.compose(labels).float()
        residual = (embeddings - composed).square().mean() / embeddings.var(0).mean()
        return {
            "answers": self.answer_loss(embeddings, labels.answers),
            "parts": self.answer_loss(composed, labels.answers),
            "geometry": 0.3 * (self.measures(embeddings).float() - labels.geometry).square().mean(),
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
        losses = [
            functional.cross_entropy(logit.float(), answer, ignore_index=UNKNOWN, reduction="sum")
            for logit, answer in zip(self.logits(embeddings), answers.T, strict=True)
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
