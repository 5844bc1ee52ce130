"""Picture files that a command reads: their pixels, and what a recipe records so that it can tell them again."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kandinsky22.cli.recipe import InputFile
from kandinsky22.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

# How much wider or narrower two pictures may be that are to lie on each other: scaled copies are rounded to pixels.
SHAPE_TOLERANCE = 0.02


class Inputs:
    """The picture files of one command. `source` is the picture whose recipe is repeated, if there is one.

    `pictures` holds what was opened, upright, by record; `paths` where that lies; `changed` what is not as it was.
    """

    def __init__(self, source: Path | None) -> None:
        self._source = source
        self.pictures: dict[InputFile, Image] = {}
        self.paths: list[Path] = []
        self.changed: list[str] = []

    def given(self, option: str, path: Path) -> InputFile:
        """Open what an option names; raises InputError if it is no picture, OSError if there is no file."""
        return self._open(option, path, checked_text(option, str(path)))

    def recorded(self, option: str, then: InputFile) -> InputFile:
        """Open what the recipe names: where it was, or beside the picture that is repeated."""
        beside = Path() if self._source is None else self._source.parent
        name = Path(then.name)
        there = [place for place in dict.fromkeys((name, beside / name, beside / name.name)) if place.is_file()]
        if not there:
            raise InputError(f"{self._source} was made from {name}, which is not here; put it back, or give another")
        found = next((place for place in there if _digest(place) == then.sha256), there[0])
        now = self._open(option, found, then.name)
        if now != then:
            self.changed.append(f"{found} is another picture now")
        return now

    def _open(self, option: str, path: Path, name: str) -> InputFile:
        from kandinsky22.inputs import images

        file = InputFile(name, _digest(path))
        picture = images.opened(option, str(path))
        images.rgb(option, picture)  # raises for what has no colours
        self.pictures[file] = picture
        self.paths.append(path)
        return file


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def checked_text(what: str, text: str) -> str:
    """The text itself, unless the terminal handed over bytes that are no characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"the {what} {text!a} is not text in this terminal's encoding") from None
    return text


def check_shapes(pictures: Mapping[str, Image]) -> None:
    """Raise InputError unless the pictures, by option, are equally proportioned, as what lies on each other is."""
    for (first, picture), (option, other) in zip(pictures.items(), list(pictures.items())[1:], strict=False):
        ratio = picture.width * other.height / (picture.height * other.width)
        if abs(math.log(ratio)) > SHAPE_TOLERANCE:
            raise InputError(
                f"{option} is {other.width}x{other.height} and {first} {picture.width}x{picture.height}; they lie on "
                "each other, so equal proportions are needed"
            )


def fitting_size(shape: Sequence[int], side: int, multiple: int) -> tuple[int, int]:
    """Width and height, multiples of `multiple`, of a picture about as large as `side` squared and shaped as `shape`.

    The proportions come first, then the size.
    """
    width, height = shape
    exact = side * math.sqrt(width / height), side * math.sqrt(height / width)
    near = [sorted({max(1, math.floor(s / multiple)) * multiple, math.ceil(s / multiple) * multiple}) for s in exact]
    sizes = [(wide, high) for wide in near[0] for high in near[1]]

    def badness(size: tuple[int, int]) -> tuple[float, float]:
        wide, high = (math.log(made / wanted) for made, wanted in zip(size, exact, strict=True))
        return round(abs(wide - high), 9), abs(wide + high)

    return min(sizes, key=badness)
