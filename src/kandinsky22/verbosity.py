"""Which messages of kandinsky22 show, and whether progress bars do.

Messages go through the standard library's `logging`, under the logger "kandinsky22". Warnings show by default. The
functions have the names of the reference's `utils.logging`, and the module can be imported as
`kandinsky22.utils.logging` too.
"""

from __future__ import annotations

import logging
import threading
from logging import CRITICAL, DEBUG, ERROR, FATAL, INFO, NOTSET, WARN, WARNING

__all__ = [
    "CRITICAL",
    "DEBUG",
    "ERROR",
    "FATAL",
    "INFO",
    "NOTSET",
    "WARN",
    "WARNING",
    "disable_progress_bar",
    "enable_progress_bar",
    "get_logger",
    "get_verbosity",
    "is_progress_bar_enabled",
    "set_verbosity",
    "set_verbosity_debug",
    "set_verbosity_error",
    "set_verbosity_info",
    "set_verbosity_warning",
]

ROOT = "kandinsky22"

_lock = threading.Lock()
_shown: set[tuple[str, str]] = set()
_settings = {"progress_bar": True}


def get_logger(name: str | None = None) -> logging.Logger:
    """Return a logger.

    Args:
        name: Its name; None for that of the library.
    """
    return logging.getLogger(name or ROOT)


def get_verbosity() -> int:
    """Return the level from which messages of kandinsky22 show, such as `logging.WARNING`."""
    return get_logger().getEffectiveLevel()


def set_verbosity(verbosity: int) -> None:
    """Show messages of kandinsky22 from a level on, on standard error unless the program handles them itself.

    Args:
        verbosity: The level, such as `logging.INFO`.
    """
    logger = get_logger()
    logger.setLevel(verbosity)
    if not logger.hasHandlers():
        logger.addHandler(logging.StreamHandler())


def set_verbosity_debug() -> None:
    """Show all messages."""
    set_verbosity(DEBUG)


def set_verbosity_info() -> None:
    """Show messages of level INFO and above."""
    set_verbosity(INFO)


def set_verbosity_warning() -> None:
    """Show warnings and errors."""
    set_verbosity(WARNING)


def set_verbosity_error() -> None:
    """Show errors only."""
    set_verbosity(ERROR)


def enable_progress_bar() -> None:
    """Show progress bars again."""
    _settings["progress_bar"] = True


def disable_progress_bar() -> None:
    """Show no progress bars, in any pipeline."""
    _settings["progress_bar"] = False


def is_progress_bar_enabled() -> bool:
    """Return whether pipelines may show progress bars."""
    return _settings["progress_bar"]


def warn_once(logger: logging.Logger, message: str) -> None:
    """Log a warning, unless the same one was logged before.

    Args:
        logger: The logger.
        message: The warning.
    """
    with _lock:
        if (logger.name, message) in _shown:
            return
        _shown.add((logger.name, message))
    logger.warning(message)
