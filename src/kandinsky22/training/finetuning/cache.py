"""Stored embeddings and latents: a file per picture or text, named by a digest of everything that it depends on."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from kandinsky22.checkpoints.atomic_files import atomic_write
from kandinsky22.checkpoints.weights import read_tensors
from kandinsky22.errors import CheckpointError

logger = logging.getLogger(__name__)
VERSION = 1  # of the tensors in a file


class TensorCache:
    """Folder of safetensors files with names such as `ab/ab12....safetensors`.

    Several processes may use it: a file appears complete or not at all.

    Args:
        folder: The folder, which is created with the first file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, key: Mapping[str, Any]) -> Path:
        """Return the path of the file for a key.

        Args:
            key: Everything that the tensors depend on, as JSON.
        """
        text = json.dumps({"version": VERSION, **key}, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()
        return self.folder / digest[:2] / f"{digest}.safetensors"

    def read(self, path: Path) -> dict[str, Tensor] | None:
        """Return the tensors in a file; None if there is none. A damaged file counts as none, with a warning.

        Args:
            path: Result of `path`.
        """
        if not path.is_file():
            return None
        try:
            return {name: tensor.clone() for name, tensor in read_tensors(path)}
        except (OSError, ValueError) as error:
            logger.warning("the cache file %s is damaged and is computed again: %s", path, error)
            return None

    def write(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        """Write a file.

        Args:
            path: Result of `path`.
            tensors: Contiguous tensors by name.

        Raises:
            CheckpointError: The file cannot be written.
        """
        stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        try:
            with atomic_write(path, flush=False) as temporary:
                save_file(stored, str(temporary))
        except Exception as error:  # SafetensorError derives from Exception alone
            raise CheckpointError(f"the cache file {path} cannot be written: {error}") from error
