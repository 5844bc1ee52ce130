"""Opening a finished image with the viewer of the system."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from kandinsky22.cli.console import Console


def open_image_file(path: Path, console: Console) -> None:
    """Open an image in the system's viewer, which keeps running. If there is none, a note says so.

    Args:
        path: The image file.
        console: Receives the note.
    """
    target = path.absolute()
    if os.name == "nt":
        os.startfile(target)  # type: ignore[attr-defined,unused-ignore]  # Windows only
        return
    program = "open" if sys.platform == "darwin" else "xdg-open"
    if shutil.which(program) is None:
        console.note(f"{path} was not opened: {program} is not installed")
    elif sys.platform != "darwin" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        console.note(f"{path} was not opened: there is no display")
    else:
        _start([program, str(target)])


def _start(command: list[str]) -> None:
    """Start a program that outlives this one and shares no stream with it."""
    null = subprocess.DEVNULL
    subprocess.Popen(command, stdin=null, stdout=null, stderr=null, start_new_session=True)
