"""Input images of a request: their pixels, and the records that a recipe keeps of them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from kandinsky22.errors import InputError, invalid
from kandinsky22.generation.recipe import InputFile

STDIN = "-"  # name of an image that was read from standard input
SUBJECT = "subject"  # name of the argument that holds the file of a learned subject


class InputImages:
    """The input images of one request.

    Attributes:
        images: Opened images, upright, by record; of learned subjects the image embedding, (1, D).
        paths: Paths of the opened files.
        changes: Messages about files that differ from the recipe's record.
    """

    def __init__(self, recipe_source: Path | None = None) -> None:
        """Create an empty collection.

        Args:
            recipe_source: Image file whose recipe is repeated, or None.
        """
        self._recipe_source = recipe_source
        self.images: dict[InputFile, Any] = {}
        self.paths: list[Path] = []
        self.changes: list[str] = []

    def open(self, name: str, path: Path) -> InputFile:
        """Open an image file.

        Args:
            name: Name of the argument, for error messages.
            path: The image file.

        Returns:
            The file's record.

        Raises:
            InputError: If the file is not a readable image.
            OSError: If the file cannot be opened.
        """
        check_text(name, str(path))
        return self.add(name, self._read(name, path), str(path))

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
        unchanged = (path for path, content in contents.items() if _sha256(content) == record.sha256)
        path = next(unchanged, existing[0])
        current = self.add(name, contents[path], record.name, path=path)
        if current != record:
            self.changes.append(f"{path} has changed")
        return current

    def add(self, name: str, content: bytes, recorded_name: str, *, path: Path | None = None) -> InputFile:
        """Decode an image, or the file of a subject, and add it.

        Args:
            name: Name of the argument, for error messages.
            content: Content of the file; that of a subject if `name` is "subject".
            recorded_name: Name of the file in the recipe.
            path: Path of the file for error messages; None stands for `recorded_name`.

        Returns:
            The file's record.

        Raises:
            InputError: If the content is not a readable image.
            CheckpointError: If the content is not a subject.
        """
        from kandinsky22.checkpoints.subject_file import parse_subject
        from kandinsky22.inputs.images import convert_mode
        from kandinsky22.inputs.sources import decode_image

        record = InputFile(recorded_name, _sha256(content))
        if name == SUBJECT:
            self.images[record] = parse_subject(content, recorded_name if path is None else str(path)).image_embeds
            return record
        image = decode_image(name, content, recorded_name if path is None else str(path))
        convert_mode(name, image)  # raises InputError now if the image cannot be converted to RGB later
        self.images[record] = image
        return record

    def _read(self, name: str, path: Path) -> bytes:
        """Return the content of a file or a pipe, which can be read only once."""
        from kandinsky22.inputs.sources import read_bytes

        self.paths.append(path)
        return read_bytes(name, str(path))


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def check_text(name: str, text: str) -> str:
    """Return a text, decoded as UTF-8 where the locale's encoding could not decode it.

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
