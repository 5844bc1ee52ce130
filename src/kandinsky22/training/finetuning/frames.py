"""What a network sees of a picture: sizes (aspect buckets), random parts and mirroring."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np
import PIL.Image
from PIL.Image import Image
from torch import Tensor

from kandinsky22.inputs import images

MAX_ASPECT = 2.0  # longest side of a bucket by its shortest


@dataclass(frozen=True)
class Frame:
    """A part of a picture at the size of a bucket.

    Attributes:
        size: Width and height in pixels.
        position: Position of the part along its free direction, from 0 (left or top) to 1; 0.5 is the centre.
        flip: Whether the part is mirrored.
    """

    size: tuple[int, int]
    position: float = 0.5
    flip: bool = False

    def cut(self, image: Image, scale: int = 1, *, nearest: bool = False) -> Image:
        """Return the part of an image.

        Args:
            image: The image.
            scale: Factor of the size, for hints of networks with another factor between pixels and latents.
            nearest: Whether the nearest pixel is taken instead of an average, for masks.
        """
        width, height = self.size[0] * scale, self.size[1] * scale
        ratio = min(image.width / width, image.height / height)
        part = width * ratio, height * ratio
        left, top = ((have - need) * self.position for have, need in zip(image.size, part, strict=True))
        box = (left, top, min(left + part[0], image.width), min(top + part[1], image.height))
        filter_ = PIL.Image.Resampling.NEAREST if nearest else PIL.Image.Resampling.LANCZOS
        cut = image.resize((width, height), filter_, box=box)
        return cut.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT) if self.flip else cut


def buckets(resolution: int, multiple: int, *, aspects: bool) -> list[tuple[int, int]]:
    """Return the sizes (width, height) that pictures are cut to.

    Args:
        resolution: Side of the square; other sizes have at most its area.
        multiple: Number that all sides are multiples of; `resolution` is one.
        aspects: Whether there are other sizes than the square.
    """
    if not aspects:
        return [(resolution, resolution)]
    sizes = set()
    for width in range(multiple, int(resolution * MAX_ASPECT) + 1, multiple):
        height = int(resolution**2 / width) // multiple * multiple
        if height >= multiple and max(width / height, height / width) <= MAX_ASPECT:
            sizes |= {(width, height), (height, width)}
    return sorted(sizes | {(resolution, resolution)})


def nearest_bucket(size: tuple[int, int], sizes: list[tuple[int, int]]) -> tuple[int, int]:
    """Return the bucket whose proportions are nearest to those of a picture; of equal ones the largest.

    Args:
        size: Width and height of the picture.
        sizes: The buckets.
    """
    aspect = math.log(size[0] / size[1])
    return min(sizes, key=lambda bucket: (abs(math.log(bucket[0] / bucket[1]) - aspect), -bucket[0] * bucket[1]))


def frames(digest: str, size: tuple[int, int], *, crops: int | None, flips: bool) -> list[Frame]:
    """Return the parts of a picture that are trained on.

    Args:
        digest: Digest of the picture's file, which determines the positions of random parts.
        size: Its bucket.
        crops: Number of random parts; None takes the centre.
        flips: Whether each part is also mirrored.
    """
    positions = [0.5]
    if crops is not None:
        words = hashlib.sha256(f"{digest} crops".encode()).digest()
        positions = np.random.default_rng(list(words)).random(crops).round(6).tolist()
    return [Frame(size, position, flip) for position in positions for flip in ((False, True) if flips else (False,))]


def to_tensor(image: Image) -> Tensor:
    """Return an RGB image as a tensor (3, height, width) in [-1, 1], as pipelines do.

    Args:
        image: The image.
    """
    return images.images_to_tensor("image", image, (image.height, image.width))[0]


def edges(image: Image) -> Image:
    """Return the edges of an image as white lines on black: the magnitude of Sobel's gradient of the brightness.

    Args:
        image: The image, RGB.
    """
    grey = np.pad(np.asarray(image.convert("L"), dtype=np.float32), 1, mode="edge")
    rows = grey[:-2] + 2 * grey[1:-1] + grey[2:]
    columns = grey[:, :-2] + 2 * grey[:, 1:-1] + grey[:, 2:]
    magnitude = np.hypot(rows[:, 2:] - rows[:, :-2], columns[2:] - columns[:-2])
    return PIL.Image.fromarray(np.clip(magnitude / 2, 0, 255).astype(np.uint8)).convert("RGB")
