"""Files of learned subjects: one image embedding, and what is known about the encoder that it belongs to."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from kandinsky22.checkpoints.atomic_files import atomic_write
from kandinsky22.checkpoints.weights import read_metadata, read_tensors
from kandinsky22.errors import CheckpointError, describe

TENSOR = "image_embeds"
SETTINGS = "kandinsky22_subject"  # entry of the header, as JSON
VERSION = 1


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

    Raises:
        CheckpointError: The file is missing, damaged, no subject, or for a model with other embeddings.
    """
    file = Path(path)
    if not file.is_file():
        raise CheckpointError(f"no subject {os.fspath(path)!r}: no such file exists")
    tensors, text = dict(read_tensors(file)), read_metadata(file).get(SETTINGS)
    embeds = tensors.get(TENSOR)
    if text is None or embeds is None or embeds.ndim != 2 or len(embeds) != 1 or not embeds.is_floating_point():
        raise CheckpointError(f"{file} is not a subject: expected a file that kandinsky22 train subject wrote")
    try:
        settings: Any = json.loads(text)
        subject = Subject(embeds.float().clone(), str(settings["image_encoder"]), int(settings["pictures"]))
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} is not a subject: its header is {describe(text)}") from error
    if not bool(embeds.isfinite().all()):
        raise CheckpointError(f"{file} is damaged: its embedding is not finite")
    if embedding_dim is not None and embeds.shape[1] != embedding_dim:
        raise CheckpointError(
            f"{file} was learned with another model: its embedding has {embeds.shape[1]} elements, expected "
            f"{embedding_dim}"
        )
    return subject
