"""Files of the server: pictures with their records, thumbnails and uploads. Each is written whole.

A picture ``images/ab/ID.png`` is the file that the command would write. Next to it, ``ID.json`` records what the file
does not say: its job, its group, its star. The record is written first, so a picture always has one.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import re
import threading
from base64 import urlsafe_b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kandinsky22.checkpoints.atomic_files import atomic_write
from kandinsky22.errors import InputError, invalid

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_ID = re.compile(r"[A-Za-z0-9_-]{22}")
UPLOAD_ID = re.compile(r"[0-9a-f]{64}")
UPLOAD_FORMATS = ("PNG", "JPEG", "WEBP")
THUMBNAIL_SIDE = 320
_decoding = threading.BoundedSemaphore(4)  # decoded pictures take up to 200 MB each


def image_id(job: str, index: int) -> str:
    """Return the id of a job's image. Whoever does not know the job's id cannot guess it.

    Args:
        job: Random id of the job.
        index: Index of the image in the job.
    """
    digest = hashlib.sha256(f"kandinsky22 image {job} {index}".encode()).digest()
    return urlsafe_b64encode(digest[:16]).decode().rstrip("=")


class Files:
    """Files below the server's state folder.

    Args:
        folder: The state folder. It is created if it is missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._images, self._thumbnails = folder / "images", folder / "thumbnails"
        self._uploads = folder / "uploads"
        for each in (self._images, self._thumbnails, self._uploads):
            each.mkdir(parents=True, exist_ok=True)

    @property
    def database(self) -> Path:
        """Path of the database."""
        return self.folder / "database.sqlite3"

    def image(self, id: str) -> Path:
        """Return the path of a picture, which need not exist.

        Args:
            id: Id of the picture.

        Raises:
            InputError: If it is not an id.
        """
        return self._path(self._images, id, ".png", IMAGE_ID)

    def record(self, id: str) -> Path:
        """Return the path of a picture's record.

        Args:
            id: Id of the picture.

        Raises:
            InputError: If it is not an id.
        """
        return self._path(self._images, id, ".json", IMAGE_ID)

    def thumbnail(self, id: str) -> Path:
        """Return the path of a picture's thumbnail.

        Args:
            id: Id of the picture.

        Raises:
            InputError: If it is not an id.
        """
        return self._path(self._thumbnails, id, ".webp", IMAGE_ID)

    def upload(self, id: str) -> Path:
        """Return the path of an upload.

        Args:
            id: SHA-256 of its bytes.

        Raises:
            InputError: If it is not an id.
        """
        return self._path(self._uploads, id, "", UPLOAD_ID)

    def save_image(self, id: str, content: bytes, record: dict[str, Any]) -> None:
        """Write a picture with its record. The picture appears last.

        Args:
            id: Id of the picture.
            content: Content of the PNG file.
            record: What the file does not say.
        """
        self.save_record(id, record)
        _write(self.image(id), content)

    def save_record(self, id: str, record: dict[str, Any]) -> None:
        """Write the record of a picture.

        Args:
            id: Id of the picture.
            record: The record.
        """
        _write(self.record(id), json.dumps(record, ensure_ascii=False).encode())

    def read_record(self, id: str) -> dict[str, Any]:
        """Return the record of a picture; empty if it is missing or damaged.

        Args:
            id: Id of the picture.
        """
        try:
            record = json.loads(self.record(id).read_bytes())
        except (OSError, ValueError):
            return {}
        return record if isinstance(record, dict) else {}

    def save_thumbnail(self, id: str, image: Image) -> bytes:
        """Write the thumbnail of a picture.

        Args:
            id: Id of the picture.
            image: The picture.

        Returns:
            Its content.
        """
        small = image.convert("RGB")
        small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
        content = io.BytesIO()
        small.save(content, "WEBP", quality=82)
        _write(self.thumbnail(id), content.getvalue(), flush=False)
        return content.getvalue()

    def save_upload(self, content: bytes) -> str:
        """Write an upload.

        Args:
            content: Bytes of the file, from `checked_upload`.

        Returns:
            Its id.
        """
        id = hashlib.sha256(content).hexdigest()
        path = self.upload(id)
        if not path.is_file():
            _write(path, content)
        return id

    def delete_image(self, id: str) -> None:
        """Remove a picture, its record and its thumbnail from the disk.

        Args:
            id: Id of the picture.
        """
        for path in (self.image(id), self.record(id), self.thumbnail(id)):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)

    def delete_upload(self, id: str) -> None:
        """Remove an upload from the disk.

        Args:
            id: SHA-256 of its bytes.
        """
        with contextlib.suppress(OSError):
            self.upload(id).unlink(missing_ok=True)

    def upload_time(self, id: str) -> float:
        """Return the time in seconds at which an upload was written; infinity if it is missing.

        Args:
            id: SHA-256 of its bytes.
        """
        try:
            return self.upload(id).stat().st_mtime
        except OSError:
            return math.inf

    def image_ids(self) -> Iterator[str]:
        """Yield the ids of all pictures on the disk."""
        for folder in sorted(self._images.iterdir()):
            if folder.is_dir():
                for path in sorted(folder.glob("*.png")):
                    if IMAGE_ID.fullmatch(path.stem):
                        yield path.stem

    def upload_ids(self) -> Iterator[str]:
        """Yield the ids of all uploads on the disk."""
        for folder in sorted(self._uploads.iterdir()):
            if folder.is_dir():
                for path in sorted(folder.iterdir()):
                    if UPLOAD_ID.fullmatch(path.name):
                        yield path.name

    def _path(self, folder: Path, id: str, extension: str, pattern: re.Pattern[str]) -> Path:
        if not pattern.fullmatch(id):
            raise invalid("id", id, "an id of this server")
        # Upper and lower case letters are different ids, also where file names ignore case.
        shard = hashlib.sha256(id.encode()).hexdigest()[:2]
        return folder / shard / f"{id}{extension}"


def checked_upload(content: bytes, max_pixels: int) -> tuple[int, int]:
    """Return the (width, height) of an uploaded image after decoding all of it.

    Args:
        content: Bytes of the file.
        max_pixels: Largest number of pixels.

    Raises:
        InputError: If it is not a PNG, JPEG or WebP file, if it is damaged, or if it has too many pixels.
    """
    with open_picture(content, max_pixels) as image:
        return image.size


@contextlib.contextmanager
def open_picture(content: bytes, max_pixels: int) -> Iterator[Image]:
    """Open an image file of unknown origin, decoded and upright.

    Args:
        content: Bytes of the file.
        max_pixels: Largest number of pixels; the header is checked before any pixel is decoded.

    Returns:
        A context with the image.

    Raises:
        InputError: If it is not a PNG, JPEG or WebP file, if it is damaged, or if it has too many pixels.
    """
    import PIL.Image
    import PIL.ImageOps

    with _decoding:
        with _opened(content, max_pixels) as opened:
            try:
                opened.load()
                upright = PIL.ImageOps.exif_transpose(opened)
            except Exception as error:
                raise InputError(f"the image is damaged: {str(error) or type(error).__name__}") from None
        yield upright


def _opened(content: bytes, max_pixels: int) -> Image:
    """Return an image file that is not yet decoded."""
    import PIL.Image

    try:
        opened = PIL.Image.open(io.BytesIO(content), formats=UPLOAD_FORMATS)
    except PIL.Image.DecompressionBombError:
        raise InputError(f"the image has more than {max_pixels} pixels") from None
    except Exception:  # PIL raises almost any class for damaged files
        raise InputError("the file is not a PNG, JPEG or WebP image") from None
    if opened.width * opened.height > max_pixels:
        raise InputError(f"the image has {opened.width}x{opened.height} pixels: expected at most {max_pixels}")
    return opened


def _write(path: Path, content: bytes, *, flush: bool = True) -> None:
    with atomic_write(path, flush=flush) as temporary:
        temporary.write_bytes(content)


def lock_folder(folder: Path) -> int:
    """Lock the state folder for this process.

    Args:
        folder: The state folder.

    Returns:
        The descriptor that holds the lock.

    Raises:
        InputError: If another server uses the folder.
    """
    from kandinsky22.checkpoints.locks import lock_file

    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / "server.lock", os.O_RDWR | os.O_CREAT, 0o600)
    if lock_file(descriptor) is False:
        owner = os.read(descriptor, 32).decode(errors="replace").strip() or "unknown"
        os.close(descriptor)
        raise InputError(f"{folder} is in use by another server, process {owner}")
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, str(os.getpid()).encode(), 0)
    return descriptor
