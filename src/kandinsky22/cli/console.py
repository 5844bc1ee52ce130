"""Messages on stderr and paths of finished files on stdout. Text from users and files cannot control the terminal."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kandinsky22.errors import printable

MAX_LINE = 2000  # characters of a message; texts and paths on the command line may be longer


class Console:
    """Printer of notes and warnings on stderr."""

    def __init__(self, *, quiet: bool) -> None:
        """Create a console.

        Args:
            quiet: Whether nothing is printed.
        """
        self._quiet = quiet

    def note(self, message: str) -> None:
        """Print a line.

        Args:
            message: The text. Control characters are escaped.
        """
        if not self._quiet:
            print_message(f"kandinsky22: {message}")

    def warn(self, message: str) -> None:
        """Print a line that begins with "warning:".

        Args:
            message: The text. Control characters are escaped.
        """
        self.note(f"warning: {message}")


@contextlib.contextmanager
def silenced_libraries() -> Iterator[None]:
    """Return a context in which no library warns, logs or shows progress bars; errors are still printed."""
    variables = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    previous = {name: os.environ.get(name) for name in variables}
    disabled_level = logging.root.manager.disable
    os.environ.update(variables)
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled_level)
        for name, value in previous.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def print_message(message: str) -> None:
    """Print one line on stderr, with control characters escaped. A stderr that cannot be written to is ignored.

    Args:
        message: The text. The middle of a text with more than `MAX_LINE` characters is left out.
    """
    line = printable(message)
    if len(line) > MAX_LINE:
        line = f"{line[: MAX_LINE // 2]} ... {line[5 - MAX_LINE // 2 :]}"
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def print_path(path: Path | str) -> None:
    """Print the path of a finished file on stdout.

    Programs that read stdout receive the bytes of the path, terminals a printable text.

    Args:
        path: The path, or an address.
    """
    buffer = getattr(sys.stdout, "buffer", None)
    if sys.stdout.isatty() or buffer is None or os.name == "nt":
        print(printable(str(path)), flush=True)
        return
    sys.stdout.flush()
    buffer.write(os.fsencode(path) + b"\n")
    buffer.flush()


@contextlib.contextmanager
def safe_messages() -> Iterator[None]:
    """Print log records and warnings of any library as one line of printable text while the context is open.

    On entry, missing standard streams are replaced by the null device, and characters that the encoding of stdout or
    stderr lacks become escapes.

    Returns:
        The context.
    """
    factory = logging.getLogRecordFactory()

    class PrintableRecord(logging.LogRecord):
        """Log record whose message is one line of printable text."""

        def getMessage(self) -> str:
            """Return the message with its arguments."""
            return printable(super().getMessage())

    logging.setLogRecordFactory(PrintableRecord)
    library, handler = logging.getLogger("kandinsky22"), _WarningHandler()
    library.addHandler(handler)
    try:
        with contextlib.ExitStack() as context, warnings.catch_warnings():
            _repair_streams(context)
            warnings.showwarning = _show_warning  # type: ignore[assignment]  # typeshed names six arguments
            yield
    finally:
        library.removeHandler(handler)
        logging.setLogRecordFactory(factory)


class _WarningHandler(logging.Handler):
    """Printer of the library's warnings, each of them once: a series of images would repeat it for every image."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._printed: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message not in self._printed:
            self._printed.add(message)
            print_message(f"kandinsky22: warning: {message}")


def _show_warning(message: Any, *details: Any) -> None:
    """Print a warning without the line of source code that caused it."""
    print_message(f"kandinsky22: warning: {message}")


def _set_errors(stream: io.TextIOWrapper, errors: str | None) -> None:
    with contextlib.suppress(OSError, ValueError):  # changing it flushes the stream, whose reader may be gone
        stream.reconfigure(errors=errors)


def _repair_streams(context: contextlib.ExitStack) -> None:
    """Prepare the standard streams; `context` restores how they treat characters that their encoding lacks."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            # Otherwise, the next opened file gets this number, and other libraries would write messages into it.
            os.open(os.devnull, os.O_RDWR)
    if sys.stdout is None:
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115  # open until the process ends
    if sys.stderr is None:
        sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            context.callback(_set_errors, stream, stream.errors)
            stream.reconfigure(errors="backslashreplace")
