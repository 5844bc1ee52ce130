"""What can go wrong for a user: one small family, so that one `except KandinskyError` catches all of it."""

from __future__ import annotations


class KandinskyError(Exception):
    """Anything this library reports to its user."""


class InputError(KandinskyError, ValueError):
    """An argument is wrong. The message names it, says what was given and what is accepted."""


class ConfigError(KandinskyError, ValueError):
    """A configuration is impossible, or asks for something Kandinsky 2.2 does not have."""


class CheckpointError(KandinskyError, OSError):
    """A checkpoint file or folder is missing, damaged, or does not fit the network."""


class MissingDependencyError(KandinskyError, ImportError):
    """An optional package is needed for what was asked, and is not installed."""
