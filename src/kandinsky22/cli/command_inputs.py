"""Input images and texts of a command, also from standard input."""

from __future__ import annotations

from pathlib import Path

from kandinsky22.cli.standard_input import StandardInput
from kandinsky22.generation.input_images import STDIN, InputImages
from kandinsky22.generation.recipe import InputFile


class CommandInputs(InputImages):
    """The input files of one command.

    Attributes:
        stdin: Standard input, for images named "-" and texts.
        contents: Bytes of the files, for a server.
    """

    def __init__(self, recipe_source: Path | None) -> None:
        """Create an empty collection.

        Args:
            recipe_source: Image file whose recipe is repeated, or None.
        """
        super().__init__(recipe_source)
        self.stdin = StandardInput()
        self.contents: dict[InputFile, bytes] = {}

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
        if str(path) != STDIN:
            return super().open(name, path)
        return self.add(name, self.stdin.read(name), STDIN)

    def add(self, name: str, content: bytes, recorded_name: str, *, path: Path | None = None) -> InputFile:
        """Decode an image, and keep it and its bytes.

        Args:
            name: Name of the option without dashes, for error messages.
            content: Content of the image file.
            recorded_name: Name of the file in the recipe.
            path: Path of the file for error messages; None stands for `recorded_name`.

        Returns:
            The file's record.

        Raises:
            InputError: If the content is not a readable image.
        """
        record = super().add(name, content, recorded_name, path=path)
        self.contents[record] = content
        return record

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
