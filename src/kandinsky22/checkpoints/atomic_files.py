"""Atomic file writing: a file appears under its name only when it is complete. Reading and writing of JSON."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from kandinsky22.checkpoints.locks import abandoned, lock_file, unlock
from kandinsky22.errors import CheckpointError, describe, invalid

MAX_JSON_DEPTH = 32  # no config of a checkpoint nests more than five
MAX_JSON_BYTES = 2**28  # larger than the index of any model; a damaged link must not fill the memory
LOCK_SUFFIX = ".lock"
NON_BLOCKING = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str], *, flush: bool = True) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`, and rename it to `path` when the block ends.

    The content is on the disk before the file gets its name, so that no power failure leaves an incomplete file. The
    temporary file is deleted if the block raises. Temporary files of killed processes are deleted by the next write of
    the same file. Readers that have the old file open or memory-mapped keep it. Missing folders are created. An OSError
    is raised if the folder is not writable.

    The block may write into the temporary file, or replace it as safetensors does. Therefore the lock that tells
    temporary files in use from abandoned ones is not held on them, but on lock files next to them.

    Args:
        path: The file to write or to replace.
        flush: Whether to wait until the content is on the disk.
    """
    final = Path(path)
    final.parent.mkdir(parents=True, exist_ok=True)
    _delete_abandoned(final)
    with _temporary_file(final) as temporary:
        new_mode = permissions(temporary)
        yield temporary
        mode = permissions(final)
        mode = new_mode if mode is None else mode  # libraries that replace the temporary file make a private one
        if mode is not None and mode != permissions(temporary):
            os.chmod(temporary, mode)
        if flush:
            flush_to_disk(temporary)
        os.replace(temporary, final)
        if flush:
            flush_folder(final.parent)


def _temporary_names(final: Path, token: str) -> tuple[Path, Path]:
    """Return the paths of the temporary file and of its lock file."""
    start, suffix = _ends_of_temporary_name(final)
    return final.parent / f"{start}{token}{suffix}", final.parent / f"{start}{token}{LOCK_SUFFIX}"


def _ends_of_temporary_name(final: Path) -> tuple[str, str]:
    # A name may have 255 bytes, and a character four.
    return f".{final.name[:40]}.saving-", "" if final.suffix == LOCK_SUFFIX else final.suffix[:12]


@contextlib.contextmanager
def _temporary_file(final: Path) -> Iterator[Path]:
    """Yield an empty file with a new name next to the final one, and delete it afterwards if it is still there."""
    mode = 0o666 if permissions(final) is None else 0o600  # the replaced file may be private
    temporary, lock_path, lock = _new_names(final)
    try:
        os.close(os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | NON_BLOCKING, mode))
        yield temporary
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if lock is not None:
            with contextlib.suppress(OSError):
                lock_path.unlink(missing_ok=True)
            unlock(lock)


def _new_names(final: Path) -> tuple[Path, Path, int | None]:
    """Return new paths of a temporary file and its lock file, and the locked descriptor of the latter.

    The lock file exists now: before the temporary file does, and longer. There is none on systems without locks.
    """
    while True:
        temporary, lock_path = _temporary_names(final, secrets.token_hex(6))
        if os.name != "posix":
            return temporary, lock_path, None
        try:
            descriptor = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_EXCL | NON_BLOCKING, 0o666)
        except FileExistsError:
            continue
        # Another process may have locked it first, to delete it.
        if lock_file(descriptor) is not False and os.path.exists(lock_path):
            return temporary, lock_path, descriptor
        unlock(descriptor)


def _delete_abandoned(final: Path) -> None:
    """Delete the temporary files of processes that were killed while they wrote this file, and their lock files."""
    start, suffix = map(re.escape, _ends_of_temporary_name(final))
    name = re.compile(rf"{start}([0-9a-f]{{12}})(?:{suffix}|{re.escape(LOCK_SUFFIX)})")
    with contextlib.suppress(OSError):
        entries = [entry.name for entry in os.scandir(final.parent)]
        for token in {match[1] for entry in entries if (match := name.fullmatch(entry))}:
            _delete_if_abandoned(*_temporary_names(final, token))


def _delete_if_abandoned(temporary: Path, lock: Path) -> None:
    """Delete a temporary file and its lock file if the process that wrote them has ended. Either may be missing."""
    with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
        # Where there are no locks, the age of both files counts.
        files = [path for path in (lock, temporary) if os.path.lexists(path)]
        if not all([stack.enter_context(abandoned(path)) for path in files]):
            return
        for path in reversed(files):
            if stat.S_ISREG(os.lstat(path).st_mode):
                os.unlink(path)


def permissions(path: Path) -> int | None:
    """Return the permissions of a file that will be replaced; None if there is none.

    Args:
        path: The file.
    """
    try:
        return path.stat().st_mode & 0o777
    except OSError:
        return None


def flush_to_disk(path: str | os.PathLike[str]) -> None:
    """Wait until the content of a file is on the disk, including what other programs wrote.

    Args:
        path: The file.
    """
    flags = os.O_RDONLY if os.name == "posix" else os.O_RDWR  # Windows flushes writable files only
    descriptor = os.open(path, flags | NON_BLOCKING)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_folder(folder: str | os.PathLike[str]) -> None:
    """Wait until the names in a folder are on the disk; without effect on systems that cannot do that.

    Args:
        folder: The folder.
    """
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY | NON_BLOCKING)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EROFS):  # some network file systems
            raise
    finally:
        os.close(descriptor)


def checked_save_path(save_directory: Any, argument: str = "save_directory") -> Path:
    """Return the folder to save to.

    Args:
        save_directory: The argument.
        argument: Its name, for messages.

    Raises:
        InputError: If it is not a path.
        CheckpointError: If it is a file.
    """
    expected = "the path of a folder"
    try:
        text = os.fspath(save_directory)
        os.fsencode(text)
    except Exception:  # not a path, a path-like object that fails, or characters that no path has
        raise invalid(argument, save_directory, expected) from None
    if not isinstance(text, str) or not text or "\0" in text:
        raise invalid(argument, save_directory, expected)
    folder = Path(text)
    try:
        mode = folder.stat().st_mode
    except (OSError, ValueError):  # most often, it does not exist yet
        return folder
    if not stat.S_ISDIR(mode):
        raise CheckpointError(f"{folder} is a file; {argument} must be a folder")
    return folder


@contextlib.contextmanager
def open_regular_file(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Yield a regular file, open for reading; a pipe or a device never blocks.

    Args:
        path: The file, or a link to one.

    Raises:
        OSError: If the file is missing, or is a pipe, a device or a folder.
    """
    descriptor = os.open(path, os.O_RDONLY | NON_BLOCKING)
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        yield file


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the JSON object in a file.

    Args:
        path: The file.

    Raises:
        CheckpointError: If the file is missing, or is not a JSON object.
    """
    try:
        with open_regular_file(path) as file:
            text = file.read(MAX_JSON_BYTES + 1)
        if len(text) > MAX_JSON_BYTES:
            raise ValueError(f"it is larger than {MAX_JSON_BYTES} bytes")
        content = json.loads(text.decode("utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"missing file: {path}") from error
    except (OSError, ValueError, RecursionError, MemoryError) as error:  # ValueError: not UTF-8, or not JSON
        raise CheckpointError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"cannot read {path}: it holds a JSON {type(content).__name__} instead of an object")
    if _is_nested_deeper(content, MAX_JSON_DEPTH):
        raise CheckpointError(f"cannot read {path}: lists and objects are nested more than {MAX_JSON_DEPTH} deep")
    return content


def _is_nested_deeper(content: Any, limit: int) -> bool:
    """Return whether lists and objects are nested more than `limit` deep; functions that recurse would fail later."""
    level = [content]
    for _ in range(limit):
        level = [
            item
            for parent in level
            for item in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(item, dict | list)
        ]
        if not level:
            return False
    return True


def write_json(path: str | os.PathLike[str], content: Mapping[str, Any], *, flush: bool = True) -> None:
    """Write a JSON object atomically, with sorted keys.

    Args:
        path: The file to write or to replace.
        content: The object.
        flush: Whether to wait until the content is on the disk.

    Raises:
        CheckpointError: If the file cannot be written, or if the content cannot be expressed in JSON.
    """
    try:
        text = json.dumps(content, indent=2, sort_keys=True) + "\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot write {path}: {describe(content)} is not JSON ({error})") from error
    try:
        with atomic_write(path, flush=flush) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error}") from error
