"""Picture files: where they go, whether they can, and writing them whole or not at all."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kandinsky22.checkpoints.atomic_files import written_whole
from kandinsky22.errors import InputError

if TYPE_CHECKING:
    from PIL import Image


def picture_paths(output: Path, count: int) -> list[Path]:
    """One path a picture: `output` itself, or for several picture-1.png, picture-2.png, ..."""
    if count == 1:
        return [output]
    digits = len(str(count))
    return [output.with_name(f"{output.stem}-{number:0{digits}d}.png") for number in range(1, count + 1)]


def sheet_path(output: Path) -> Path:
    """Where the contact sheet of several pictures goes: picture-sheet.png."""
    return output.with_name(f"{output.stem}-sheet.png")


def check_writable(paths: Sequence[Path]) -> None:
    """Find out now, not after minutes of sampling, whether pictures can be written there.

    Raises InputError for other file types, missing folders and folders in the place of files, OSError where the
    system refuses.
    """
    for path in paths:
        if path.suffix.lower() != ".png":
            given = f"the extension {path.suffix!r}" if path.suffix else "no extension"
            raise InputError(f"{path}: has {given}; pictures are PNG files, which carry their recipe: name it *.png")
        if path.is_dir():
            raise InputError(f"{path}: is a folder; name a .png file in it")
    folder = paths[0].parent
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; make it first, or choose another output")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"{paths[0]}: cannot be written ({error.strerror})") from error


def save_png(image: Image.Image, path: Path, text: Mapping[str, str]) -> None:
    """Write `image` with its text entries as a PNG file that appears at `path` complete, or not at all."""
    from PIL.PngImagePlugin import PngInfo

    entries = PngInfo()
    for keyword, value in text.items():
        # International text: prompts are in any language.
        entries.add_itxt(keyword, value)
    with written_whole(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=entries)


def contact_sheet(images: Sequence[Image.Image]) -> Image.Image:
    """All `images`, of one size, on one sheet that is about as wide as high; white where none is left."""
    from PIL import Image

    from kandinsky22 import make_image_grid

    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    empty = Image.new(images[0].mode, images[0].size, "white")
    return make_image_grid([*images, *[empty] * (rows * columns - len(images))], rows=rows, cols=columns)
