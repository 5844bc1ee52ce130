"""Input images of a command: their pixels, and the records that a recipe keeps of them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from kandinsky22.cli.recipe import InputFile
from kandinsky22.cli.standard_input import STDIN, StandardInput
from kandinsky22.errors import InputError, invalid

if TYPE_CHECKING:
    from PIL.Image import Image

# Largest difference of two aspect ratios that still counts as equal, as a natural logarithm: the sides of scaled
# copies are rounded to pixels.
ASPECT_RATIO_TOLERANCE = 0.02


class InputImages:
    """The input image files of one command.

    Attributes:
        images: Opened images, upright, by record.
        paths: Paths of the opened files.
        changes: Messages about files that differ from the recipe's record.
        stdin: Standard input, for images named "-" and texts.
    """

    def __init__(self, recipe_source: Path | None) -> None:
        """Create an empty collection.

        Args:
            recipe_source: Image file whose recipe is repeated, or None.
        """
        self._recipe_source = recipe_source
        self.stdin = StandardInput()
        self.images: dict[InputFile, Image] = {}
        self.paths: list[Path] = []
        self.changes: list[str] = []

    def open(self, name: str, path: Path) -> InputFile:
        """Open an image that the command line names.

        Args:
            name: Name of the option without dashes, for error messages.
            path: The image file; "-" is standard input.

        Returns:
            The file's record.

        Raises:
            InputError: If the file is not a readable image.
            OSError: If the file cannot be opened.
        """
        check_text(name, str(path))
        content = self.stdin.read(name) if str(path) == STDIN else self._read(name, path)
        return self._open(name, path, content, str(path))

    def read_text(self, name: str, value: str) -> str:
        """Return a text of the command line, see `StandardInput.read_text`.

        Args:
            name: Name of the option without dashes, for error messages.
            value: Value on the command line.

        Raises:
            InputError: If a file or standard input is not a text.
        """
        text = self.stdin.read_text(name, value)
        if value.startswith("@") and not value.startswith("@@"):
            self.paths.append(Path(value[1:]))
        return text

    def open_recorded(self, name: str, record: InputFile) -> InputFile:
        """Open an image that the recipe names.

        The file is searched at its recorded path, then relative to the folder of the image whose recipe is repeated.

        Args:
            name: Name of the option without dashes, for error messages.
            record: The recipe's record.

        Returns:
            The file's current record, which differs from `record` if the file has changed.

        Raises:
            InputError: If the file is missing or is not a readable image.
            OSError: If the file cannot be opened.
        """
        if record.name == STDIN:
            raise InputError(
                f"{self._recipe_source} was generated from an image on standard input; pass that image with --{name}"
            )
        source_folder = Path() if self._recipe_source is None else self._recipe_source.parent
        recorded_path = Path(record.name)
        candidates = dict.fromkeys((recorded_path, source_folder / recorded_path, source_folder / recorded_path.name))
        existing = [path for path in candidates if path.is_file()]
        if not existing:
            raise InputError(
                f"{self._recipe_source} was generated from {recorded_path}, which is missing; restore the file or pass "
                "another one"
            )
        contents = {path: self._read(name, path) for path in existing}
        path = next((path for path, content in contents.items() if _sha256(content) == record.sha256), existing[0])
        current = self._open(name, path, contents[path], record.name)
        if current != record:
            self.changes.append(f"{path} has changed")
        return current

    def _read(self, name: str, path: Path) -> bytes:
        """Return the content of a file or a pipe, which can be read only once."""
        from kandinsky22.inputs.sources import read_bytes

        self.paths.append(path)
        return read_bytes(name, str(path))

    def _open(self, name: str, path: Path, content: bytes, recorded_name: str) -> InputFile:
        from kandinsky22.inputs.images import convert_mode
        from kandinsky22.inputs.sources import decode_image

        record = InputFile(recorded_name, _sha256(content))
        image = decode_image(name, content, str(path))
        convert_mode(name, image)  # raises InputError now if the image cannot be converted to RGB later
        self.images[record] = image
        return record


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def check_text(name: str, text: str) -> str:
    """Return a text from the command line, decoded as UTF-8 where the locale's encoding could not decode it.

    Args:
        name: Name of the option, for error messages.
        text: The text.

    Raises:
        InputError: If the text contains bytes that neither encoding can decode (lone surrogates).
    """
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError:
        raise invalid(name, text, "text in the encoding of the terminal, or in UTF-8") from None


def check_aspect_ratios(images: Mapping[str, Image]) -> None:
    """Raise an error unless images that are overlaid have the same aspect ratio.

    Args:
        images: Images by option.

    Raises:
        InputError: If two aspect ratios differ by more than `ASPECT_RATIO_TOLERANCE`.
    """
    for (first_name, first), (name, image) in zip(images.items(), list(images.items())[1:], strict=False):
        ratio = first.width * image.height / (first.height * image.width)
        if abs(math.log(ratio)) > ASPECT_RATIO_TOLERANCE:
            raise invalid(
                f"size of {name}",
                f"{image.width}x{image.height}",
                f"the aspect ratio of {first_name}, which is {first.width}x{first.height}",
                "crop or resize one of them",
            )


def fitting_size(image_size: tuple[int, int], default_side: int, multiple: int) -> tuple[int, int]:
    """Return the (width, height) that fits an image's aspect ratio best, then the area of the model's default size.

    Args:
        image_size: (width, height) of the image, in pixels.
        default_side: Side of the model's default square, in pixels.
        multiple: Width and height are multiples of this number of pixels.
    """
    width, height = image_size
    exact = default_side * math.sqrt(width / height), default_side * math.sqrt(height / width)
    near = [
        sorted({max(1, math.floor(side / multiple)) * multiple, math.ceil(side / multiple) * multiple})
        for side in exact
    ]
    candidates = [(wide, high) for wide in near[0] for high in near[1]]

    def deviation(size: tuple[int, int]) -> tuple[float, float]:
        wide, high = (math.log(rounded / side) for rounded, side in zip(size, exact, strict=True))
        return round(abs(wide - high), 9), abs(wide + high)

    return min(candidates, key=deviation)
