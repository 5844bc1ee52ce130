"""Names and checks that tests of the command share."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from kandinsky22.generation.image_files import PNG, encode_image

SIZE = 32  # side of the tiny model's pictures
# Generation defaults that the tiny models are saved with.
DEFAULTS = {
    "num_inference_steps": 2,
    "guidance_scale": 2.0,
    "prior_num_inference_steps": 3,
    "prior_guidance_scale": 1.5,
}


@dataclasses.dataclass(frozen=True)
class Result:
    """Exit code and output of a run of the command."""

    code: int
    out: str
    err: str

    @property
    def paths(self) -> list[Path]:
        return [Path(line) for line in self.out.splitlines()]


Command = Callable[..., Result]

# Folder of the checkpoint and required arguments of each subcommand, except `generate`.
SUBCOMMANDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "img2img": ("combined", ("a cat", "--image", "photo.png", "--strength", "0.6")),
    "inpaint": ("inpaint", ("a cat", "--image", "photo.png", "--mask", "mask.png")),
    "control": ("control/decoder", ("a cat", "--hint", "hint.png", "--prior-steps", "3", "--prior-guidance", "1.5")),
    "mix": ("combined", ("--text", "a cat", "0.6", "--image", "photo.png", "0.4")),
    "variations": ("combined", ("photo.png",)),
}


def assert_one_line(result: Result, code: int, *words: str) -> None:
    """Assert that a run failed with this exit code, one line that holds all `words`, and no other output."""
    last = result.err.splitlines()[-1]
    assert result.code == code
    assert last.startswith("kandinsky22: error: ")
    assert all(word in last for word in words), last
    assert "Traceback" not in result.err
    assert result.out == ""


def save_png(image: Image.Image, path: Path, text_chunks: dict[str, str]) -> None:
    """Write a PNG file with text chunks; an existing file is replaced."""
    path.write_bytes(encode_image(image, PNG, text_chunks))


def stored(path: Path) -> dict[str, Any]:
    """Return the recipe that is stored in a picture."""
    with Image.open(path) as picture:
        return json.loads(picture.info["kandinsky22"])


def pixels(path: Path) -> np.ndarray[Any, Any]:
    """Return the values of a picture (H, W, 3) from 0 to 255."""
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))
