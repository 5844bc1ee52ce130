"""Standard input and text files as values of options: "-" and "@FILE"."""

from __future__ import annotations

import sys

from kandinsky22.errors import InputError, invalid
from kandinsky22.generation.input_images import STDIN

MAX_TEXT_BYTES = 1 << 20  # of a prompt; longer files are no prompts
MAX_IMAGE_BYTES = 1 << 29


class StandardInput:
    """Standard input of a command, which is read at most once."""

    def __init__(self) -> None:
        """Create the object. Nothing is read yet."""
        self._content: bytes | None = None
        self._reader = self._text_reader = ""

    def read(self, name: str, *, limit: int = MAX_IMAGE_BYTES) -> bytes:
        """Return the whole content; images that name it repeatedly get the same bytes.

        Args:
            name: Name of the option, for error messages.
            limit: Largest accepted number of bytes.

        Raises:
            InputError: If standard input is closed, empty or longer than the limit, or if another kind of option has
                read it.
            OSError: If it cannot be read.
        """
        if self._text_reader:
            raise InputError(f"{name} and {self._text_reader} cannot both be read from standard input")
        if self._content is None:
            if sys.stdin is None:
                raise invalid(name, STDIN, "an open standard input")
            self._content = sys.stdin.buffer.read(limit + 1)
            self._reader = name
        if not self._content:
            raise invalid(name, STDIN, "standard input that is not empty")
        if len(self._content) > limit:
            raise invalid(name, STDIN, f"at most {limit} bytes from standard input")
        return self._content

    def read_text(self, name: str, value: str) -> str:
        """Return a text from the command line, from standard input if it is "-", or from a file if it is "@FILE".

        A text that begins with "@@" stands for itself with one "@". White space at the end of files is dropped.

        Args:
            name: Name of the option, for error messages.
            value: Value on the command line.

        Raises:
            InputError: If the file is missing, too long, empty, or not UTF-8, or if standard input is read twice.
        """
        if value.startswith("@@"):
            return value[1:]
        if value == STDIN:
            if self._reader:
                raise InputError(f"{name} and {self._reader} cannot both be read from standard input")
            content, origin = self.read(name, limit=MAX_TEXT_BYTES), "standard input"
            self._text_reader = name
        elif value.startswith("@"):
            content, origin = _read_file(name, value), value[1:]
        else:
            return value
        try:
            text = content.decode("utf-8-sig").rstrip()
        except UnicodeDecodeError:
            raise InputError(f"{name} cannot be read from {origin}: it is not text in UTF-8") from None
        if not text:
            raise InputError(f"{name} cannot be read from {origin}: it is empty")
        return text


def _read_file(name: str, value: str) -> bytes:
    from kandinsky22.inputs.sources import read_file  # imports PIL

    try:
        return read_file(value[1:], MAX_TEXT_BYTES)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        advice = "write @@ for a text that begins with @"
        raise invalid(name, value, f"@ and the path of a text file ({reason})", advice) from error
