"""Files of learned subjects: one image embedding, and what is known about the encoder that it belongs to."""

from __future__ import annotations

import dataclasses
import json
import os
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from kandinsky22.checkpoints.atomic_files import atomic_write, open_regular_file
from kandinsky22.errors import CheckpointError, describe

TENSOR = "image_embeds"
SETTINGS = "kandinsky22_subject"  # entry of the header, as JSON
VERSION = 1
MAX_BYTES = 2**24  # an embedding has a few kilobytes
MAX_PICTURES = 2**31


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
    """A learned subject.

    Attributes:
        image_embeds: Image embedding (1, D), float32: an argument of decoders, and an item of `interpolate`.
        image_encoder: Fingerprint of the image encoder's weights, and of the settings of its image processor.
        pictures: Number of pictures that it was learned from.
    """

    image_embeds: Tensor
    image_encoder: str
    pictures: int


def save_subject(path: str | os.PathLike[str], subject: Subject) -> None:
    """Write a subject to a safetensors file.

    Args:
        path: The file.
        subject: The subject.

    Raises:
        CheckpointError: The file cannot be written.
    """
    embeds = subject.image_embeds.detach().float().cpu().contiguous()
    settings = {
        "version": VERSION,
        "embedding_dim": embeds.shape[1],
        "image_encoder": subject.image_encoder,
        "pictures": subject.pictures,
    }
    try:
        with atomic_write(path) as temporary:
            save_file({TENSOR: embeds}, temporary, {"format": "pt", SETTINGS: json.dumps(settings, sort_keys=True)})
    except (SafetensorError, RuntimeError, OSError) as error:
        raise CheckpointError(f"cannot write {os.fspath(path)}: {error}") from error


def load_subject(path: str | os.PathLike[str], *, embedding_dim: int | None = None) -> Subject:
    """Read a subject from a file that `kandinsky22 train subject` wrote.

    Args:
        path: The file.
        embedding_dim: Width of the model's image embeddings; None accepts any.

    Returns:
        The subject.

    Raises:
        CheckpointError: The file is missing, damaged, no subject, or for a model with other embeddings.
    """
    try:
        with open_regular_file(path) as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        reason = error.strerror or str(error)
        raise CheckpointError(f"subject {os.fspath(path)!r} cannot be read: {reason}") from error
    subject = parse_subject(content, os.fspath(path))
    if embedding_dim is not None and subject.image_embeds.shape[1] != embedding_dim:
        raise CheckpointError(
            f"{os.fspath(path)} was learned with another model: its embedding has {subject.image_embeds.shape[1]} "
            f"elements, expected {embedding_dim}"
        )
    return subject


def parse_subject(content: bytes, origin: str) -> Subject:
    """Return the subject in the content of a file.

    Args:
        content: The content.
        origin: Name of the file, for messages.

    Raises:
        CheckpointError: The content is damaged, or no subject.
    """
    try:
        if len(content) > MAX_BYTES:
            raise ValueError(f"it has more than {MAX_BYTES} bytes")
        embeds = load(content)[TENSOR]
        header: Any = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])  # the format of safetensors
        settings: Any = json.loads(header["__metadata__"][SETTINGS])
        image_encoder, pictures = settings["image_encoder"], settings["pictures"]
        if type(image_encoder) is not str or type(pictures) is not int or not 0 <= pictures < MAX_PICTURES:
            raise ValueError(f"image_encoder is {describe(image_encoder)}, pictures is {describe(pictures)}")
        if not embeds.is_floating_point():
            raise ValueError(f"its embedding is of the type {embeds.dtype}")
        subject = Subject(embeds.float().clone(), image_encoder, pictures)
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{origin} is not a subject: expected a file that kandinsky22 train subject wrote"
        ) from error
    if embeds.ndim != 2 or len(embeds) != 1 or not bool(subject.image_embeds.isfinite().all()):
        raise CheckpointError(f"{origin} is damaged: its embedding is {describe(embeds)}, or not finite")
    return subject
