"""Sprites that need no drawings."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kandinsky22.training.drawings.sprites import SIDE, Sprites
from kandinsky22.training.drawings.vocabulary import COLORS


class SolidSprites(Sprites):
    """Every thing is a square in its colour, or grey if it is natural; a quarter of the side is empty at the top."""

    def __init__(self) -> None:
        pass

    def pixels(self, thing: str, style: str, color: str) -> npt.NDArray[np.uint8]:
        """Return a square with an empty part at the top."""
        pixels = np.zeros((SIDE, SIDE, 4), np.uint8)
        pixels[SIDE // 4 :, :, :3] = np.round(np.array(COLORS.get(color, (0.5, 0.5, 0.5))) * 255)
        pixels[SIDE // 4 :, :, 3] = 255
        return pixels
