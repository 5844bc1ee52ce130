"""Tiny decoder of a request: found, and recorded with its digest."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
from pathlib import Path

from kandinsky22.errors import CheckpointError, InputError
from kandinsky22.generation.adapters import existing_locations
from kandinsky22.generation.recipe import InputFile

NO_TINY_DECODER = "none"  # value that leaves out the recipe's tiny decoder


@dataclasses.dataclass(frozen=True)
class FoundTinyDecoder:
    """A tiny decoder whose files were found.

    Attributes:
        record: What the recipe records of it.
        location: The file, folder or Hub id that it is read from.
        paths: Its files.
        change: Message about a file that differs from the recipe's record; None if it does not.
    """

    record: InputFile
    location: str
    paths: tuple[Path, ...]
    change: str | None = None


def find_tiny_decoder(name: str) -> FoundTinyDecoder:
    """Return the tiny decoder that the user names.

    Args:
        name: A file, a folder or a Hub id.

    Raises:
        CheckpointError: If no tiny decoder is found there.
    """
    return _found(name, name)


def find_recorded_tiny_decoder(record: InputFile, recipe_source: Path | None) -> FoundTinyDecoder:
    """Return the tiny decoder that a recipe names, from files with the recorded digest wherever there are some.

    It is searched at its recorded path, then relative to the folder of the image whose recipe is repeated.

    Args:
        record: The recipe's record.
        recipe_source: The image whose recipe is repeated; None for a recipe without image.

    Raises:
        InputError: If it is missing.
        CheckpointError: If it cannot be read.
    """
    existing = existing_locations(record.name, recipe_source)
    try:
        found = [_found(record.name, location) for location in existing or [record.name]]
    except CheckpointError as error:
        if existing:
            raise
        raise InputError(
            f"{recipe_source} was generated with the tiny decoder {record.name}, which is missing ({error}); restore "
            f"it, or pass another one with --tiny-decoder, or {NO_TINY_DECODER}"
        ) from error
    current = next((each for each in found if each.record.sha256 == record.sha256), found[0])
    if current.record.sha256 == record.sha256:
        return current
    return dataclasses.replace(current, change=f"the tiny decoder {current.location} has changed")


def _found(name: str, location: str) -> FoundTinyDecoder:
    from kandinsky22.checkpoints.weights import find_weight_files
    from kandinsky22.pipelines import tiny_decoding

    path = tiny_decoding.find_tiny_decoder(location)
    paths = (path,) if path.is_file() else tuple(find_weight_files(path))
    states = tuple((str(each), each.stat().st_size, each.stat().st_mtime_ns) for each in paths)
    return FoundTinyDecoder(InputFile(name, _digest(states)), location, paths)


@functools.lru_cache(maxsize=16)
def _digest(states: tuple[tuple[str, int, int], ...]) -> str:
    """Return the digest of files (path, size, time of the last change), read once while these stay the same."""
    from kandinsky22.adapters.files import file_digest

    digests = [file_digest(os.fspath(path)) for path, _, _ in states]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
