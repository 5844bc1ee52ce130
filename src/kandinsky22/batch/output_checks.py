"""Checks of an output folder before a run writes into it: files of the user and of other programs are not replaced."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from kandinsky22.batch.formats import FORMATS
from kandinsky22.batch.manifest import MANIFEST, Manifest
from kandinsky22.batch.rows import is_address
from kandinsky22.batch.run_lock import LOCK_NAME, WORKERS_NAME
from kandinsky22.batch.shards import PREVIEWS
from kandinsky22.batch.storage import TEMPORARY, Folder
from kandinsky22.errors import InputError, invalid

if TYPE_CHECKING:
    from kandinsky22.batch.run import RunOptions

SHARD = re.compile(r"\d{5,}(\.tar|\.parquet)?")  # names of shards, which other programs use too
PREVIEW = re.compile(r"\d{5,}\.jpg")  # names in the folder of previews
OTHER_OUTPUTS = (MANIFEST, PREVIEWS, LOCK_NAME, WORKERS_NAME)


def check_input(location: str, output: str) -> None:
    """Raise an error if a run would write over its own input.

    Args:
        location: Path or address of the input: a file, or the output folder of an earlier run.
        output: Path or address of the output folder.

    Raises:
        InputError: If the input is the output folder, or has the name of a file that the run writes into it.
    """
    for parts in _parts_below(location, output):
        if not parts or parts[0] in OTHER_OUTPUTS or SHARD.fullmatch(parts[0]) or TEMPORARY.fullmatch(parts[0]):
            raise invalid(
                "input", location, f"a file that the batch does not write into {output}", "choose another --output"
            )


def _parts_below(location: str, output: str) -> list[tuple[str, ...]]:
    """Return the names that lead from the output folder to a location below it, with and without following links."""
    location, output = location.removeprefix("file://"), output.removeprefix("file://")
    if is_address(location) != is_address(output):
        return []
    if is_address(location):
        names, folders = location.rstrip("/").split("/"), output.rstrip("/").split("/")
        return [tuple(names[len(folders) :])] if names[: len(folders)] == folders else []
    found = []
    for path in (os.path.abspath(location), os.path.realpath(location)):
        for folder in (os.path.abspath(output), os.path.realpath(output)):
            if Path(path).is_relative_to(folder):
                found.append(Path(path).relative_to(folder).parts)
    return found


def check_folder(options: RunOptions, folder: Folder, manifest: Manifest) -> None:
    """Raise an error if an output folder contains files of another program that the run would replace.

    Args:
        options: The run.
        folder: Its output folder.
        manifest: The folder's manifest.

    Raises:
        InputError: If there is such a file; the message names it.
    """
    if manifest.is_foreign:
        raise InputError(
            f"{options.output} contains a {MANIFEST} that is not the manifest of a batch; choose another folder"
        )
    if not manifest.is_blank:
        return
    extension = re.escape(FORMATS[options.format].extension)
    # A file without text may be a manifest that was damaged: only what this run would replace is refused then.
    name = SHARD if not manifest.exists else re.compile(rf"\d{{5,}}{extension}")
    foreign = next(filter(name.fullmatch, folder.names()), None) or _preview(options, folder)
    if foreign is not None:
        raise InputError(f"{options.output} contains {foreign}, but no {MANIFEST} of a batch; choose another folder")


def has_results(options: RunOptions, folder: Folder, manifest: Manifest) -> bool:
    """Return whether an earlier run into a folder has left results, although it may not have entered them.

    Args:
        options: The run.
        folder: Its output folder.
        manifest: The folder's manifest.
    """
    if manifest.entries or manifest.damaged_lines:
        return True
    return any(map(SHARD.fullmatch, folder.names())) or _preview(options, folder) is not None


def _preview(options: RunOptions, folder: Folder) -> str | None:
    """Return the name of a file that the run's previews would replace, or None."""
    names = folder.names(PREVIEWS) if options.previews else ()
    return next((f"{PREVIEWS}/{name}" for name in names if PREVIEW.fullmatch(name)), None)
