"""Pictures of requests in other forms than uploads: base64, data URLs, addresses, masks with transparency."""

from __future__ import annotations

import base64
import binascii
import io
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from kandinsky22.errors import InputError, invalid
from kandinsky22.serve.failures import ApiError
from kandinsky22.serve.files import checked_upload, open_picture
from kandinsky22.serve.schemas import Picture

if TYPE_CHECKING:
    from PIL.Image import Image

    from kandinsky22.serve.services import Services

DATA_URL_HEADER = 200  # longest part of a data URL before its data


def store_picture(server: Services, content: bytes) -> tuple[str, int, int]:
    """Store the bytes of an image file after checking them.

    Args:
        server: The server.
        content: Bytes of the file.

    Returns:
        Its id, width and height.

    Raises:
        ApiError: If the file is too large, or not an image in one of the accepted formats.
    """
    limit = server.settings.max_upload_bytes
    if len(content) > limit:
        raise ApiError(413, "too_large", f"the image file has more than {limit} bytes")
    try:
        width, height = checked_upload(content, server.settings.max_upload_pixels)
    except InputError as error:
        raise ApiError(415, "invalid_image", str(error)) from None
    return server.gallery.add_upload(content, (width, height)), width, height


def upload(server: Services, content: bytes) -> Picture:
    """Store the bytes of an image file.

    Args:
        server: The server.
        content: Bytes of the file.

    Returns:
        The reference to it.

    Raises:
        ApiError: If the file is too large, or not an image in one of the accepted formats.
    """
    return Picture(upload=store_picture(server, content)[0])


def decoded_picture(server: Services, name: str, text: str) -> bytes:
    """Return the bytes of an image that a request contains as base64, as data URL or by address.

    Args:
        server: The server.
        name: Name of the argument, for messages.
        text: The text.

    Raises:
        InputError: If the text is none of these, or if the server may not download from the address.
    """
    if text[:8].lower().startswith(("http://", "https://")):
        return _download(server, name, text)
    if text.startswith("data:"):
        header, separator, text = text.partition(",")
        if not separator or len(header) > DATA_URL_HEADER or not header.endswith(";base64"):
            raise invalid(name, "data:...", "a data URL in base64")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise invalid(name, text[:20], "an image in base64") from None


def transparent_mask(server: Services, content: bytes) -> bytes:
    """Return the mask, white where it is repainted, of an image that is transparent there.

    An image without transparency is a mask already.

    Args:
        server: The server.
        content: Bytes of the image file.

    Raises:
        InputError: If it is not an image.
    """
    with open_picture(content, server.settings.max_upload_pixels) as image:
        mask = repainted_area(image)
    return content if mask is None else encoded_png(mask)


def repainted_area(image: Image) -> Image | None:
    """Return a mask that is white where an image is transparent; None if it has no transparency.

    Args:
        image: The image.
    """
    if "A" not in image.getbands() and "transparency" not in image.info:
        return None
    alpha = image.convert("RGBA").getchannel("A")
    return alpha.point([255 - value for value in range(256)])


def encoded_png(image: Image) -> bytes:
    """Return an image as a PNG file.

    Args:
        image: The image.
    """
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


def _download(server: Services, name: str, address: str) -> bytes:
    from kandinsky22.serve.download import download

    host = urlsplit(address).hostname
    if host is None or host.lower() not in {each.lower() for each in server.settings.url_hosts}:
        raise invalid(name, address, "an image in base64", "this server downloads nothing from that host")
    return download(name, address, server.settings)
