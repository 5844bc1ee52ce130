"""The exception family: every error that kandinsky22 reports to its user derives from `KandinskyError`."""

from __future__ import annotations

from typing import TypeVar

E = TypeVar("E", bound="KandinskyError")

SHOWN_CHARACTERS = 120  # longest value that a message repeats


class KandinskyError(Exception):
    """Base class of all errors that kandinsky22 raises on purpose."""


class InputError(KandinskyError, ValueError):
    """An argument is invalid. The message names it, its value and what is accepted."""


class ConfigError(KandinskyError, ValueError):
    """A configuration is inconsistent, or asks for something that Kandinsky 2.2 does not have."""


class CheckpointError(KandinskyError, OSError):
    """A checkpoint file or folder is missing, damaged, or does not fit the network."""


class MissingDependencyError(KandinskyError, ImportError):
    """A feature needs an optional package that is not installed."""


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
    if isinstance(value, type):
        return f"the class {value.__name__}"
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if shape is not None and dtype is not None and tuple(shape) != ():
        return f"<{type(value).__name__} {str(dtype).removeprefix('torch.')} {tuple(shape)}>"
    try:
        text = " ".join(repr(value).split())
    except Exception:  # a broken __repr__ of somebody's class must not hide the message
        text = f"<{type(value).__name__}>"
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[: SHOWN_CHARACTERS - 3]}..."
