"""Hints from pictures of the server."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from kandinsky22.errors import InputError
from kandinsky22.serve.failures import ApiError
from kandinsky22.serve.schemas import HintRequest
from kandinsky22.serve.settings import ServerSettings

if TYPE_CHECKING:
    from PIL.Image import Image

DEPTH_SECONDS = 300.0
_depth_process = threading.Lock()  # each one loads the model: several would exhaust the memory and the server's threads


def make_hint(hint: HintRequest, image: Image, settings: ServerSettings) -> Image:
    """Return the hint of a picture.

    Args:
        hint: Kind of the hint, with its thresholds.
        image: The picture.
        settings: Settings of the server.

    Raises:
        ApiError: If the server has no model for hints of this kind, or if it is in use.
        InputError: If a threshold is invalid, or if the model cannot run.
    """
    if hint.kind == "depth":
        if settings.depth_model is None:
            message = "this server has no model for depth; start it with --depth-model"
            raise ApiError(501, "not_available", message, "kind")
        if not _depth_process.acquire(blocking=False):
            raise ApiError(429, "busy", "the depth model is in use; try again later")
        try:
            return _depth(image, settings.depth_model)
        finally:
            _depth_process.release()
    from kandinsky22.inputs.hints import DEFAULT_HIGH, DEFAULT_LOW, make_edge_hint

    return make_edge_hint(
        image,
        low=DEFAULT_LOW if hint.low is None else hint.low,
        high=DEFAULT_HIGH if hint.high is None else hint.high,
    )


def _depth(image: Image, model: str) -> Image:
    """Run the depth model in a process of its own, whose memory is free again afterwards."""
    import PIL.Image

    with tempfile.TemporaryDirectory() as folder:
        source, result = Path(folder, "photo.png"), Path(folder, "hint.png")
        image.convert("RGB").save(source)
        command = [sys.executable, "-m", "kandinsky22", "hint", "depth", str(source), "-o", str(result)]
        try:
            done = subprocess.run(
                [*command, "--depth-model", model],
                capture_output=True,
                check=False,
                timeout=DEPTH_SECONDS,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            )
        except subprocess.TimeoutExpired:
            raise InputError(f"the depth model took more than {DEPTH_SECONDS:g} s") from None
        if done.returncode or not result.is_file():
            lines = done.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
            raise InputError(f"the depth model failed: {lines[-1]}")
        with PIL.Image.open(result) as hint:
            hint.load()
            return hint
