"""Entry point of ``python -m kandinsky22``, the same as the command ``kandinsky22``."""

from __future__ import annotations

import sys

from kandinsky22.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
