"""Image files of the command: their formats, the texts inside them, and contact sheets."""

from __future__ import annotations

import dataclasses
import io
import math
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kandinsky22.errors import MissingDependencyError, invalid

if TYPE_CHECKING:
    from PIL import Image

RECIPE_KEYWORD = "kandinsky22"  # name of the text that contains the recipe as JSON
GALLERY_KEYWORD = "parameters"  # name of the summary that image galleries show

# EXIF tags (Exif 2.32, section 4.6). Galleries read the user comment; the maker note holds the recipe.
EXIF_IFD, USER_COMMENT, MAKER_NOTE, IMAGE_DESCRIPTION, SOFTWARE = 0x8769, 0x9286, 0x927C, 0x010E, 0x0131
UNICODE_COMMENT = b"UNICODE\0"  # code of UTF-16 user comments
RECIPE_NOTE = RECIPE_KEYWORD.encode() + b"\0"  # beginning of maker notes that are recipes
MAX_JPEG_EXIF_BYTES = 65533 - len(b"Exif\0\0")  # a JPEG segment has a 16-bit length
# What Pillow and EXIF parsing raise for damaged metadata.
DAMAGED = (SyntaxError, ValueError, KeyError, IndexError, TypeError, OverflowError, struct.error)


@dataclasses.dataclass(frozen=True)
class ImageFormat:
    """A file format that images are written in.

    Attributes:
        name: Name of the format for Pillow.
        extensions: File name extensions in lower case.
        max_side: Largest side in pixels that the format can store; None for 2**31 - 1.
        options: Options of Pillow's encoder.
    """

    name: str
    extensions: tuple[str, ...]
    max_side: int | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


PNG = ImageFormat("PNG", (".png",))
# Quality 95 without colour subsampling: differences from the PNG file are invisible.
JPEG = ImageFormat("JPEG", (".jpg", ".jpeg"), 65500, {"quality": 95, "subsampling": 0, "optimize": True})
WEBP = ImageFormat("WEBP", (".webp",), 16383, {"lossless": True, "exact": True})
FORMATS = (PNG, JPEG, WEBP)
EXTENSIONS = tuple(extension for format in FORMATS for extension in format.extensions)


def find_format(path: Path) -> ImageFormat | None:
    """Return the format that a file name's extension stands for, or None.

    Args:
        path: Path of an image file.
    """
    return next((format for format in FORMATS if path.suffix.lower() in format.extensions), None)


def check_image(format: ImageFormat, size: tuple[int, int], texts: Mapping[str, str]) -> None:
    """Raise an error if an image cannot be written in a format. Called before minutes of sampling, not after.

    Args:
        format: The format.
        size: Width and height in pixels.
        texts: Texts by name, as for `encode_image`.

    Raises:
        InputError: If the format has a limit that the size or the texts exceed.
        MissingDependencyError: If this installation of Pillow cannot write the format.
    """
    from PIL import features

    if format is WEBP and not features.check("webp"):
        raise MissingDependencyError("Pillow was built without WebP here; choose a .png file with -o")
    if format.max_side is not None and max(size) > format.max_side:
        raise invalid(
            "image size",
            f"{size[0]}x{size[1]}",
            f"sides of at most {format.max_side} pixels in a {format.name} file",
            "choose a .png file with -o",
        )
    if format is JPEG and len(exif := _exif(texts)) > MAX_JPEG_EXIF_BYTES:
        raise invalid(
            "size of the recipe",
            len(exif),
            f"at most {MAX_JPEG_EXIF_BYTES} bytes in a JPEG file",
            "choose a .png file with -o, or add --no-recipe",
        )


def encode_image(image: Image.Image, format: ImageFormat, texts: Mapping[str, str]) -> bytes:
    """Return the content of an image file.

    Args:
        image: The image.
        format: Format of the file.
        texts: Texts by name: text chunks of PNG files, EXIF entries of the other formats.
    """
    options = dict(format.options)
    if format is PNG:
        from PIL.PngImagePlugin import PngInfo

        options["pnginfo"] = png_info = PngInfo()
        for keyword, text in texts.items():
            # iTXt chunks are UTF-8; tEXt chunks are limited to Latin-1, which many prompts are not.
            png_info.add_itxt(keyword, text)
    elif texts:
        options["exif"] = _exif(texts)
    content = io.BytesIO()
    image.save(content, format=format.name, **options)
    return content.getvalue()


def _exif(texts: Mapping[str, str]) -> bytes:
    """Return texts as EXIF entries: the recipe, the galleries' summary, a description and the software."""
    from PIL.Image import Exif

    exif = Exif()
    details = exif.get_ifd(EXIF_IFD)
    if RECIPE_KEYWORD in texts:
        details[MAKER_NOTE] = RECIPE_NOTE + texts[RECIPE_KEYWORD].encode()
    if GALLERY_KEYWORD in texts:
        details[USER_COMMENT] = UNICODE_COMMENT + texts[GALLERY_KEYWORD].encode("utf-16-be")
    for name, tag in (("Description", IMAGE_DESCRIPTION), ("Software", SOFTWARE)):
        if name in texts:
            exif[tag] = texts[name].encode()
    return exif.tobytes()


def embedded_recipe(image: Image.Image) -> str | None:
    """Return the JSON of the recipe that an image file contains, or None.

    Args:
        image: Image from an opened file whose pixels have been read: PNG files may have texts after the pixels.
    """
    text = image.info.get(RECIPE_KEYWORD)
    if isinstance(text, str):
        return text
    try:
        note = image.getexif().get_ifd(EXIF_IFD).get(MAKER_NOTE)
        if isinstance(note, bytes) and note.startswith(RECIPE_NOTE):
            return note[len(RECIPE_NOTE) :].decode()
    except DAMAGED:
        pass
    return None


def contact_sheet_size(size: tuple[int, int], count: int) -> tuple[int, int]:
    """Return the (width, height) of the contact sheet of several images, in pixels.

    Args:
        size: Width and height of each image.
        count: Number of images.
    """
    columns, rows = _grid(count)
    return columns * size[0], rows * size[1]


def contact_sheet(images: Sequence[Image.Image]) -> Image.Image:
    """Return a grid of images that is about as wide as high; unused cells are white.

    Args:
        images: Images of one size.
    """
    from PIL import Image

    from kandinsky22 import make_image_grid

    columns, rows = _grid(len(images))
    empty = Image.new(images[0].mode, images[0].size, "white")
    return make_image_grid([*images, *[empty] * (rows * columns - len(images))], rows=rows, cols=columns)


def _grid(count: int) -> tuple[int, int]:
    """Return the columns and rows of a contact sheet."""
    columns = math.ceil(math.sqrt(count))
    return columns, math.ceil(count / columns)
