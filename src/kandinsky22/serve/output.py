"""Pictures of the gallery in other file formats."""

from __future__ import annotations

import base64
import dataclasses
import io
from pathlib import Path

from kandinsky22.errors import InputError
from kandinsky22.generation.image_files import JPEG, PNG, WEBP, check_image, embedded_recipe, encode_image
from kandinsky22.generation.recipe import Recipe

FORMATS = {"png": PNG, "jpeg": JPEG, "webp": WEBP}


def encoded_image(path: Path, format_name: str, quality: int | None = None) -> bytes:
    """Return a picture of the gallery as a file of another format, with its recipe.

    Args:
        path: Path of the PNG file.
        format_name: "png", "jpeg" or "webp".
        quality: Quality from 0 to 100; None for the best one. PNG files have none.
    """
    import PIL.Image

    if format_name == "png":
        return path.read_bytes()
    format = FORMATS[format_name]
    if quality is not None:
        lossy = {"lossless": False} if format is WEBP else {}
        format = dataclasses.replace(format, options={**format.options, **lossy, "quality": quality})
    with PIL.Image.open(path) as image:
        image.load()
        text = embedded_recipe(image)
        texts = {} if text is None else Recipe.from_json(text, origin=path.name).texts()
        try:
            check_image(FORMATS[format_name], image.size, texts)
        except InputError:  # the recipe is too long for the format
            texts = {}
        return encode_image(image, format, texts)


def preview_image(url: str, size: tuple[int, int], format_name: str) -> bytes:
    """Return a preview as an image file in the size of the result.

    Args:
        url: Data URL of the preview.
        size: Width and height in pixels.
        format_name: "png", "jpeg" or "webp".
    """
    import PIL.Image

    with PIL.Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) as image:
        enlarged = image.convert("RGB").resize(size, PIL.Image.Resampling.BICUBIC)
    content = io.BytesIO()
    enlarged.save(content, FORMATS[format_name].name)
    return content.getvalue()
