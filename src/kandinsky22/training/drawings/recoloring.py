"""Recolouring of drawings: the dominant colour becomes another one, and the other colours stay.

Colours are compared in OKLab (Björn Ottosson 2020, https://bottosson.github.io/posts/oklab), where distances and hues
match what people see.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from kandinsky22.training.drawings.vocabulary import Color

Floats: TypeAlias = npt.NDArray[np.float64]

_TO_LMS = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
_TO_LAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)
_FROM_LMS, _FROM_LAB = np.linalg.inv(_TO_LMS), np.linalg.inv(_TO_LAB)

MIN_CHROMA = 0.03  # below it a colour looks grey, and its hue means nothing
CHROMATIC_SHARE = 0.42  # area of the dominant hue from which on it counts as the colour of the drawing
HUE_RANGE, HUE_SOFTNESS = np.radians(60), np.radians(15)


def to_oklab(rgb: npt.ArrayLike) -> Floats:
    """Return OKLab coordinates (..., 3) of sRGB colours.

    Args:
        rgb: Colours (..., 3) in [0, 1].
    """
    values = np.asarray(rgb, dtype=np.float64)
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    lab: Floats = np.cbrt(linear @ _TO_LMS.T) @ _TO_LAB.T
    return lab


def from_oklab(lab: Floats) -> Floats:
    """Return sRGB colours (..., 3) in [0, 1].

    Args:
        lab: OKLab coordinates (..., 3).
    """
    linear = np.clip(((lab @ _FROM_LAB.T) ** 3) @ _FROM_LMS.T, 0.0, 1.0)
    rgb: Floats = np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)
    return rgb


class _Polar(NamedTuple):
    """Lightness, chroma and hue in radians."""

    lightness: Floats
    chroma: Floats
    hue: Floats


def _polar(lab: Floats) -> _Polar:
    return _Polar(lab[..., 0], np.hypot(lab[..., 1], lab[..., 2]), np.arctan2(lab[..., 2], lab[..., 1]))


class Dominant(NamedTuple):
    """The dominant colour of a drawing, and the pixels that have it.

    Attributes:
        membership: How much each pixel belongs to it, (h, w) in [0, 1].
        lightness: Median lightness.
        chroma: Median chroma; 0 for grey.
        turn: Angle from the dominant hue to that of each pixel, (h, w), in radians; zeros for grey.
    """

    membership: Floats
    lightness: float
    chroma: float
    turn: Floats


def dominant_color(rgb: Floats, opacity: Floats) -> Dominant:
    """Find the dominant colour of a drawing: its most frequent hue, or grey if no hue covers enough of it.

    Args:
        rgb: Colours (h, w, 3) in [0, 1].
        opacity: Opacity (h, w) in [0, 1].

    Returns:
        The dominant colour, and the pixels that belong to it.
    """
    lightness, chroma, hue = _polar(to_oklab(rgb))
    weight = np.clip((chroma - MIN_CHROMA) / 0.03, 0, 1) * np.minimum(chroma, 0.15) * opacity
    histogram, _ = np.histogram(hue, 72, (-np.pi, np.pi), weights=weight)
    kernel = np.exp(-0.5 * (np.arange(-8, 9) / 3) ** 2)
    smooth = np.convolve(np.concatenate([histogram[-8:], histogram, histogram[:8]]), kernel, "valid")
    turn = np.angle(np.exp(1j * (hue + np.pi - (smooth.argmax() + 0.5) * 2 * np.pi / 72)))
    membership = np.clip((HUE_RANGE - np.abs(turn)) / HUE_SOFTNESS, 0, 1) * np.clip((chroma - 0.02) / 0.025, 0, 1)
    if (area := (membership * opacity).sum()) < CHROMATIC_SHARE * opacity.sum():
        grey = np.clip((0.07 - chroma) / 0.03, 0, 1)
        bright, dark = ((grey * opacity * part).sum() for part in (lightness > 0.5, lightness <= 0.5))
        limit = (lightness - 0.4) if bright >= 0.4 * dark else (0.75 - lightness)
        grey = grey * np.clip(limit / 0.15, 0, 1)
        if (grey * opacity).sum() > area:
            return Dominant(grey, _median(lightness, grey * opacity), 0.0, np.zeros_like(hue))
    weight = membership * opacity
    return Dominant(membership, _median(lightness, weight), _median(chroma, weight), turn)


def recolor(drawing: npt.NDArray[np.uint8], color: Color) -> npt.NDArray[np.uint8]:
    """Return a drawing whose dominant colour is replaced; shading stays.

    Args:
        drawing: RGBA pixels (h, w, 4), not premultiplied.
        color: The new colour, RGB in [0, 1].
    """
    rgb, opacity = drawing[..., :3] / 255.0, drawing[..., 3] / 255.0
    lab = to_oklab(rgb)
    lightness, chroma, _ = _polar(lab)
    dominant = dominant_color(rgb, opacity)
    target = _polar(to_oklab(color))
    # Shading is compressed where the new colour is closer to white or black than the old one.
    above = min(1.0, (0.99 - float(target.lightness)) / max(1e-3, 1 - dominant.lightness) + 0.15)
    below = min(1.0, (float(target.lightness) - 0.08) / max(1e-3, dominant.lightness - 0.15) + 0.1)
    difference = lightness - dominant.lightness
    new_lightness = np.clip(target.lightness + difference * np.where(difference > 0, above, below), 0.05, 0.99)
    ratio = np.clip(chroma / dominant.chroma, 0.35, 1.25) if dominant.chroma > MIN_CHROMA else np.ones_like(chroma)
    new_chroma = target.chroma * ratio * np.clip((1.02 - new_lightness) / (1.02 - target.lightness), 0.2, 1.2)
    hue = target.hue + 0.5 * dominant.turn
    new = np.stack([new_lightness, new_chroma * np.cos(hue), new_chroma * np.sin(hue)], axis=-1)
    mixed = from_oklab(lab + (new - lab) * dominant.membership[..., None])
    return np.dstack([np.round(mixed * 255).astype(np.uint8), drawing[..., 3]])


def _median(values: Floats, weights: Any) -> float:
    order = np.argsort(values, axis=None)
    cumulated = np.cumsum(weights.ravel()[order])
    return float(values.ravel()[order[np.searchsorted(cumulated, cumulated[-1] / 2)]])
