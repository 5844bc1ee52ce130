"""Folder of files that are kept between processes, and the user's key for signing files."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

from kandinsky22.checkpoints.atomic_files import open_regular_file

CACHE_VARIABLE = "KANDINSKY22_CACHE"  # environment variable: folder of cache files; empty disables them
KEY_BYTES = 32


def cache_folder() -> Path | None:
    """Return the folder of cache files, which may not exist yet, or None if there is none."""
    root = os.environ.get(CACHE_VARIABLE)
    if root == "":
        return None
    return Path(root) if root else _default_cache_folder()


def signing_key(*, create: bool) -> bytes | None:
    """Return this user's secret key, which is a file of the cache folder; None if there is none.

    Args:
        create: Whether a missing key is made.
    """
    folder = cache_folder()
    if folder is None:
        return None
    path = folder / "signing.key"
    with contextlib.suppress(OSError, ValueError):  # ValueError: a name that no folder can have
        if create and not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            temporary = folder / f".signing-{secrets.token_hex(8)}"
            try:
                with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                    file.write(secrets.token_bytes(KEY_BYTES))
                _add_file(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
    try:
        with open_regular_file(path) as file:
            key = file.read(KEY_BYTES + 1)
    except (OSError, ValueError):
        return None
    return key if len(key) == KEY_BYTES else None


def _add_file(temporary: Path, path: Path) -> None:
    """Give a complete file its name, unless another process has made a file of this name."""
    try:
        os.link(temporary, path)  # unlike a rename, this never replaces a file
    except FileExistsError:
        return
    except OSError:  # the file system has no hard links
        os.replace(temporary, path)  # processes that start at the same moment may sign with different keys


def _default_cache_folder() -> Path | None:
    """Return the folder of cache files; None for a user without a home folder."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kandinsky22"
    except RuntimeError:
        return None
