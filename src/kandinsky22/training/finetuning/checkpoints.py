"""Checkpoints of a training: folders that appear under their name complete, and of which old ones are deleted."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from kandinsky22.checkpoints.atomic_files import flush_folder, flush_to_disk
from kandinsky22.errors import CheckpointError, InputError, KandinskyError

NAME = re.compile(r"checkpoint-(\d{6,})")
STAGING = re.compile(r"\.checkpoint-\d+\.(saving|old)-[0-9a-f]{8}")
STATE = "training_state.pt"


def checkpoint_name(step: int) -> str:
    """Return the name of a checkpoint's folder.

    Args:
        step: Number of steps that have been taken.
    """
    return f"checkpoint-{step:06d}"


def checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints in a folder, oldest first.

    Args:
        folder: Folder of a training.
    """
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if NAME.fullmatch(path.name) and (path / STATE).is_file()]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def delete_unfinished(folder: Path) -> None:
    """Delete what killed processes left of checkpoints that they were writing.

    Args:
        folder: Folder of a training.
    """
    if folder.is_dir():
        for path in [path for path in folder.iterdir() if STAGING.fullmatch(path.name)]:
            shutil.rmtree(path, ignore_errors=True)


def resumed_checkpoint(folder: Path, resume: str | None) -> Path | None:
    """Return the checkpoint that a training continues; None to begin.

    Args:
        folder: Folder of the training.
        resume: "latest", the name of a checkpoint in the folder, a path, or None.

    Raises:
        InputError: There is no such checkpoint; or the folder has checkpoints and `resume` is None.
    """
    existing = checkpoints(folder)
    if resume is None:
        if existing:
            raise InputError(
                f"{folder} has checkpoints up to {existing[-1].name}: add --resume to continue, or choose "
                "another --output-dir"
            )
        return None
    if resume == "latest":
        return existing[-1] if existing else None
    for path in (folder / resume, Path(resume)):
        if (path / STATE).is_file():
            return path
    names = ", ".join(path.name for path in existing) or "none"
    raise InputError(f"--resume {resume} is not a checkpoint: expected latest, a path or one of {folder}: {names}")


def save_checkpoint(
    folder: Path, step: int, state: Mapping[str, Any], write_results: Callable[[Path], None], limit: int | None
) -> Path:
    """Write a checkpoint, then delete those beyond the limit, oldest first.

    Args:
        folder: Folder of the training.
        step: Number of steps that have been taken.
        state: What continues the training: tensors, numbers and texts.
        write_results: Writes the weights in the form that pipelines load, into a folder.
        limit: Number of checkpoints that are kept; None keeps all.

    Returns:
        The checkpoint.

    Raises:
        CheckpointError: It cannot be written. Earlier checkpoints stay as they are.
    """
    final, token = folder / checkpoint_name(step), secrets.token_hex(4)
    staging = folder / f".{final.name}.saving-{token}"
    try:
        staging.mkdir(parents=True)
        # A file object of Python reports a full disk; torch's own writer reports a position.
        with open(staging / STATE, "wb") as file:
            torch.save(dict(state), file)
        write_results(staging)
        for path in sorted(staging.rglob("*")):
            if path.is_file():
                flush_to_disk(path)
        if final.exists():
            old = folder / f".{final.name}.old-{token}"
            os.replace(final, old)
        os.replace(staging, final)
        flush_folder(folder)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"checkpoint {final} cannot be written: {_reason(error)}{_last(folder)}") from error
    finally:
        with contextlib.suppress(OSError):
            shutil.rmtree(staging, ignore_errors=True)
    delete_unfinished(folder)
    if limit is not None:
        for path in checkpoints(folder)[:-limit]:
            shutil.rmtree(path, ignore_errors=True)
    return final


def _reason(error: BaseException) -> str:
    """Return what the operating system said: torch wraps its errors."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        if isinstance(cause, KandinskyError):
            return str(cause)
        cause = cause.__cause__ or cause.__context__
    return str(error)


def _last(folder: Path) -> str:
    existing = checkpoints(folder)
    return f"; the last complete one is {existing[-1].name}" if existing else ""


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return the state in a checkpoint, its tensors on the CPU.

    Args:
        path: The checkpoint's folder.

    Raises:
        CheckpointError: It is damaged.
    """
    try:
        state = torch.load(path / STATE, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types
        raise CheckpointError(f"checkpoint {path} cannot be read: {error}") from error
    if not isinstance(state, dict) or "step" not in state:
        raise CheckpointError(f"{path / STATE} is not the state of a training")
    return state
