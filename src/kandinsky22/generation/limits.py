"""Largest values that the command accepts. Larger ones are mistakes that would only exhaust memory or time."""

from __future__ import annotations

from collections.abc import Sequence

from kandinsky22.errors import invalid

# torch accepts seeds below 2**64. The limit for the first seed leaves room for the consecutive seeds of a series.
MAX_SEED = 2**63 - 1
MAX_TORCH_SEED = 2**64 - 1
MAX_IMAGES = 10_000
MAX_STEPS = 10_000  # ten times the training steps of the published checkpoints
# Memory and time of attention grow with the square of the number of pixels. The networks were trained with up to
# 1024 x 1024 pixels.
MAX_SIDE = 8192
MAX_PIXELS = 4096 * 4096
MAX_ASPECT_RATIO = 32
DEFAULT_STRENGTH = 0.3  # of the specification
DEFAULT_SUBJECT_WEIGHT = 0.5  # of a learned subject; the prompt has the other half

SIZE_LIMITS = (
    f"sides of at most {MAX_SIDE} pixels, at most {MAX_PIXELS} pixels in total and an aspect ratio of at most "
    f"{MAX_ASPECT_RATIO}, because memory grows with the square of the number of pixels"
)


def is_allowed_size(width: int, height: int) -> bool:
    """Return whether an image of this size is within the limits.

    Args:
        width: Width in pixels.
        height: Height in pixels.
    """
    sides = sorted((width, height))
    return (
        sides[0] >= 1
        and sides[1] <= MAX_SIDE
        and width * height <= MAX_PIXELS
        and sides[1] <= MAX_ASPECT_RATIO * sides[0]
    )


def check_size(name: str, size: tuple[int, int], advice: str | None = None) -> tuple[int, int]:
    """Return a size in pixels that is within the limits.

    Args:
        name: What has this size, for error messages.
        size: Width and height in pixels.
        advice: What to do about a size beyond the limits; None adds nothing.

    Raises:
        InputError: If the size is beyond a limit.
    """
    if not is_allowed_size(*size):
        raise invalid(name, f"{size[0]}x{size[1]}", SIZE_LIMITS, advice)
    return size


def check_interval(name: str, interval: Sequence[float]) -> None:
    """Raise an error unless an interval has two ends, the smaller one first.

    Args:
        name: Name of the setting.
        interval: Its numbers, each from 0 to 1.

    Raises:
        InputError: If it has not.
    """
    if len(interval) != 2 or not interval[0] < interval[1]:
        raise invalid(name, interval, "two numbers, the smaller one first")


def check_aspect_ratio(name: str, size: tuple[int, int], advice: str) -> None:
    """Raise an error unless a size, which may be scaled, has an aspect ratio within the limit.

    Args:
        name: What has this size, for error messages.
        size: Width and height in pixels.
        advice: What to do about another aspect ratio.

    Raises:
        InputError: If one side is more than `MAX_ASPECT_RATIO` times the other.
    """
    if max(size) > MAX_ASPECT_RATIO * min(size):
        raise invalid(name, f"{size[0]}x{size[1]}", f"an aspect ratio of at most {MAX_ASPECT_RATIO}", advice)
