"""Messages on stderr; stdout is reserved for the paths of finished files."""

from __future__ import annotations

import sys


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
            message: The text.
        """
        if not self._quiet:
            print(f"kandinsky22: {message}", file=sys.stderr)

    def warn(self, message: str) -> None:
        """Print a line that begins with "warning:".

        Args:
            message: The text.
        """
        self.note(f"warning: {message}")
