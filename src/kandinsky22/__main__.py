"""`python -m kandinsky22` is the command `kandinsky22`."""

from __future__ import annotations

import sys

from kandinsky22.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
