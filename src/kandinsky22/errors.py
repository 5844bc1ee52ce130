"""The exception family: every error that kandinsky22 reports to its user derives from `KandinskyError`."""

from __future__ import annotations

import math
import re
import unicodedata
from typing import TypeVar

E = TypeVar("E", bound="KandinskyError")

SHOWN_CHARACTERS = 120  # longest value that a message repeats
LONGEST_MESSAGE = 3000  # characters


class KandinskyError(Exception):
    """Base class of all errors that kandinsky22 raises on purpose.

    Their messages are one line of printable text of at most `LONGEST_MESSAGE` characters; longer ones, which repeat
    what another library says, lose their middle.
    """

    def __str__(self) -> str:
        text = printable(super().__str__())
        if len(text) <= LONGEST_MESSAGE:
            return text
        return f"{text[: LONGEST_MESSAGE * 2 // 3]} ... {text[-LONGEST_MESSAGE // 4 :]}"


class InputError(KandinskyError, ValueError):
    """An argument is invalid. The message names it, its value and what is accepted."""


class ConfigError(KandinskyError, ValueError):
    """A configuration is inconsistent, or asks for something that Kandinsky 2.2 does not have."""


class CheckpointError(KandinskyError, OSError):
    """A checkpoint file or folder is missing, damaged, or does not fit the network."""


class VariantError(CheckpointError, ValueError):
    """A checkpoint has no weights of the requested variant. Scripts for the reference catch it as a ValueError."""


class NotFiniteError(KandinskyError, ArithmeticError):
    """A network or a scheduler produced NaN or infinity. No image is returned."""


class MissingDependencyError(KandinskyError, ImportError):
    """A feature needs an optional package that is not installed."""


class ForkError(KandinskyError, RuntimeError):
    """Networks cannot run in this process, because it was forked after they had run."""


class DeadlockError(KandinskyError, RuntimeError):
    """Threads wait for each other. One of them fails, so that the others go on."""


def invalid(
    argument: str,
    value: object,
    expected: str,
    advice: str | None = None,
    *,
    error: type[E] = InputError,  # type: ignore[assignment]  # a default for a type variable
) -> E:
    """Return the error ``{argument}={value!r} is invalid: expected {expected}[; {advice}]``, to be raised.

    Args:
        argument: Name of the argument, or an expression such as ``len(weights)`` or ``hint.shape``.
        value: Its value. Tensors and arrays are shown by dtype and shape, long values are shortened.
        expected: What is accepted, as a noun phrase.
        advice: What to do about it; None adds nothing.
        error: Class of the error.
    """
    message = f"{argument}={describe(value)} is invalid: expected {expected}"
    return error(message if advice is None else f"{message}; {advice}")


def describe(value: object) -> str:
    """Return a short, one-line description of a value for messages.

    Args:
        value: Any object. Tensors and arrays give dtype and shape, classes their name, everything else its repr,
            shortened to `SHOWN_CHARACTERS`.
    """
    try:
        text = " ".join(_description(value).split())
    except Exception:  # a broken __repr__ of somebody's class, or an integer beyond Python's limit of digits
        text = f"<{type(value).__name__}>"
    text = printable(text[: SHOWN_CHARACTERS + 1])
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[: SHOWN_CHARACTERS - 3]}..."


def _description(value: object) -> str:
    if isinstance(value, int) and value.bit_length() > 4 * SHOWN_CHARACTERS:
        return f"<int of about {round(value.bit_length() * math.log10(2))} digits>"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if shape is not None and dtype is not None and tuple(shape) != ():
        return f"<{type(value).__name__} {str(dtype).removeprefix('torch.')} {tuple(shape)}>"
    return repr(value)


def printable(text: str) -> str:
    r"""Return a text as one line that is safe to print: it cannot move the cursor, change colours or reverse letters.

    Line breaks become spaces. Other control characters, invisible formatting characters and lone surrogates become
    escapes such as ``\x1b``, as in string literals of Python. A printable text is returned unchanged.

    Args:
        text: Any text, such as a message that repeats a file name.
    """
    line = re.sub(r"\s*[\n\r]+\s*", " ", text)
    if line.isprintable():
        return line
    return "".join(
        character if character.isprintable() or unicodedata.category(character) == "Zs" else _escape(character)
        for character in line
    )


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
