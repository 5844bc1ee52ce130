"""Output files: their paths, checks that they can be written, PNG files and contact sheets."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kandinsky22.checkpoints.atomic_files import atomic_write
from kandinsky22.errors import InputError, invalid

if TYPE_CHECKING:
    from PIL import Image


def output_paths(output: Path, count: int) -> list[Path]:
    """Return one path per image: `output` itself for one image, NAME-1.png, NAME-2.png, ... for several.

    Args:
        output: Output file on the command line.
        count: Number of images, at least 1.
    """
    if count == 1:
        return [output]
    digits = len(str(count))
    return [output.with_name(f"{output.stem}-{number:0{digits}d}.png") for number in range(1, count + 1)]


def contact_sheet_path(output: Path) -> Path:
    """Return the path of the contact sheet of several images, NAME-sheet.png.

    Args:
        output: Output file on the command line.
    """
    return output.with_name(f"{output.stem}-sheet.png")


def check_writable(paths: Sequence[Path]) -> None:
    """Raise an error if images cannot be written to `paths`. Called before minutes of sampling, not after.

    Args:
        paths: Output files, all in one folder.

    Raises:
        InputError: If a path does not end in .png or is a folder, if its folder does not exist, or if the folder is
            not writable.
    """
    for path in paths:
        if path.suffix.lower() != ".png":
            raise invalid("--output", str(path), "a file name ending in .png, because recipes are stored in PNG files")
        if path.is_dir():
            raise InputError(f"{path} is a folder; name a .png file in it")
    folder = paths[0].parent
    if not folder.is_dir():
        raise InputError(f"{folder} is not an existing folder; create it or choose another output with -o")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"{paths[0]} cannot be written: {error.strerror}") from error


def save_png(image: Image.Image, path: Path, text_chunks: Mapping[str, str]) -> None:
    """Write a PNG file with text chunks. The file appears complete or not at all.

    Args:
        image: The image.
        path: The PNG file; an existing file is replaced.
        text_chunks: Texts by keyword.

    Raises:
        OSError: If the file cannot be written.
    """
    from PIL.PngImagePlugin import PngInfo

    png_info = PngInfo()
    for keyword, text in text_chunks.items():
        # iTXt chunks are UTF-8; tEXt chunks are limited to Latin-1, which many prompts are not.
        png_info.add_itxt(keyword, text)
    with atomic_write(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=png_info)


def contact_sheet(images: Sequence[Image.Image]) -> Image.Image:
    """Return a grid of images that is about as wide as high; unused cells are white.

    Args:
        images: Images of one size.
    """
    from PIL import Image

    from kandinsky22 import make_image_grid

    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    empty = Image.new(images[0].mode, images[0].size, "white")
    return make_image_grid([*images, *[empty] * (rows * columns - len(images))], rows=rows, cols=columns)
