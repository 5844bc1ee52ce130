"""Auxiliary loss of the vision tower: reading from each patch which thing it shows, and in which colour.

An image has one embedding, but 64 patches, thus an image teaches the tower much more this way. Composed scenes have
such labels for free. The published model contains none of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from kandinsky22.training.drawings.probe import UNKNOWN
from kandinsky22.training.drawings.rendering import visible_shares
from kandinsky22.training.drawings.scenes import Scene
from kandinsky22.training.drawings.sprites import Sprites
from kandinsky22.training.drawings.vocabulary import THING_COLORS, THINGS

THING_SHARE = 0.35  # smallest share of a patch that a thing covers for the patch to be labelled as showing it
BACKGROUND_WEIGHT = 0.05  # most patches show the background, which is easy to recognise
BACKGROUND_SHARE = 0.05  # largest share of a patch that things cover for the patch to be labelled as background


@dataclass(frozen=True)
class PatchLabels:
    """Labels of the patches of N images; the last class is the background, UNKNOWN is left out of the loss.

    Attributes:
        things: Indices of things, (N, patches).
        colors: Indices of colours, (N, patches).
    """

    things: Tensor
    colors: Tensor

    @classmethod
    def of(cls, sprites: Sprites, scenes: Sequence[Scene], cells: int) -> PatchLabels:
        """Return the labels of rendered scenes.

        Args:
            sprites: Pixels of all things.
            scenes: The scenes.
            cells: Number of patches along each side of an image.
        """
        labels = [_labels(sprites, scene, cells) for scene in scenes]
        return cls(*torch.from_numpy(np.stack(labels, axis=1)))


def _labels(sprites: Sprites, scene: Scene, cells: int) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    """Return the labels of things and colours in a scene, (2, cells * cells)."""
    shares = visible_shares(sprites, scene, cells).reshape(len(scene.things), -1)
    classes = [(THINGS.index(thing.name), THING_COLORS.index(thing.color)) for thing in scene.things]
    labels = np.array(classes).T[:, shares.argmax(0)]
    labels[:, shares.max(0) < THING_SHARE] = UNKNOWN
    labels[:, shares.sum(0) <= BACKGROUND_SHARE] = [[len(THINGS)], [len(THING_COLORS)]]
    return labels


class PatchHeads(nn.Module):
    """Linear heads that read the thing and its colour from the tower's state of a patch.

    Args:
        width: Width of the tower.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.things = nn.Linear(width, len(THINGS) + 1)
        self.colors = nn.Linear(width, len(THING_COLORS) + 1)

    def loss(self, states: Tensor, labels: PatchLabels) -> Tensor:
        """Return the cross entropy of things and colours, a weighted average over the labelled patches.

        Args:
            states: Last states of the patches, (N, patches, width).
            labels: Labels of the patches.
        """
        states = self.norm(states.float())
        losses = [
            functional.cross_entropy(
                head(states).flatten(0, 1).float(), label.flatten(), _class_weights(head), ignore_index=UNKNOWN
            )
            for head, label in ((self.things, labels.things), (self.colors, labels.colors))
        ]
        return torch.stack(losses).sum()


def _class_weights(head: nn.Linear) -> Tensor:
    weights = torch.ones(head.out_features)
    weights[-1] = BACKGROUND_WEIGHT
    return weights
