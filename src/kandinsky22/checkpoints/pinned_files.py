"""Files that are opened now and read later, with the content that they have now.

A network that is loaded lazily, or read again after an offload to files, must be the network of the checkpoint that the
pipeline was made from. Therefore its files are opened when the pipeline is made. Changing the working directory, and
renaming, replacing or deleting the files afterwards, then has no effect.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import stat
import tempfile
import weakref
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from kandinsky22.errors import CheckpointError, KandinskyError

# Files up to this size are copied into memory, which protects them from changes in place too. Larger ones are only
# opened: a change in place is noticed, but their earlier content no longer exists.
COPIED_BYTES = 2**22

READ_AHEAD = 2**17  # bytes per request: Linux ignores what is beyond a device's limit, which is this or more

# Folders in which the system lists the open files of this process, Linux first; other systems have none.
OPEN_FILES = next((folder for folder in ("/proc/self/fd", "/dev/fd") if os.path.isdir(folder)), None)


@dataclasses.dataclass(frozen=True)
class _Identity:
    """Inode, size and modification time of a file, one of which changes with its content."""

    inode: int
    size: int
    modified_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> _Identity:
        return cls(status.st_ino, status.st_size, status.st_mtime_ns)


@dataclasses.dataclass(frozen=True)
class _PinnedFile:
    """One file: its path, and an open handle of it (`is_copy` False) or of a copy; None if it could not be opened."""

    path: Path
    identity: _Identity
    handle: IO[bytes] | None
    is_copy: bool

    def current_path(self) -> str:
        """Return a path under which the content can be opened now.

        Raises:
            CheckpointError: If the content no longer exists.
        """
        try:
            if self.handle is None:
                status = os.stat(self.path)
            else:
                status = os.fstat(self.handle.fileno())
                os.lseek(self.handle.fileno(), 0, os.SEEK_SET)  # systems with /dev/fd share the position
        except OSError as error:
            raise CheckpointError(f"cannot read {self.path}: {error.strerror or error}") from error
        if not self.is_copy and _Identity.of(status) != self.identity:
            raise CheckpointError(f"{self.path} was changed after the pipeline was made: load the pipeline again")
        return str(self.path) if self.handle is None else f"{OPEN_FILES}/{self.handle.fileno()}"


class PinnedFiles:
    """The files of one component, open until the object is deleted.

    Attributes:
        origin: Folder of the component, as an absolute path.
        paths: Absolute paths of the files.
        sizes: Sizes of the files in bytes when they were opened, in the order of `paths`.
    """

    def __init__(self, origin: Path, files: Iterable[Path]) -> None:
        """Open files.

        Args:
            origin: Folder of the component.
            files: The files, each with another name. They need not be in `origin`.

        Raises:
            CheckpointError: If a file is missing, not readable, or not a regular file.
        """
        self.origin = Path(os.path.abspath(origin))
        self._files: list[_PinnedFile] = []
        weakref.finalize(self, _close, self._files)
        self._files.extend(_pin(Path(os.path.abspath(file))) for file in files)
        self.paths = tuple(file.path for file in self._files)
        self.sizes = tuple(file.identity.size for file in self._files)

    def __deepcopy__(self, memo: dict[int, Any]) -> PinnedFiles:
        return self  # copies of a network read the same files

    def read_ahead(self, paths: Collection[Path]) -> None:
        """Let the system read files into its cache; nothing happens on systems without posix_fadvise.

        Args:
            paths: Those of `paths` that are read.
        """
        if not hasattr(os, "posix_fadvise"):
            return
        for file in self._files:
            if file.path not in paths or file.handle is None or file.is_copy:
                continue
            for position in range(0, file.identity.size, READ_AHEAD):
                os.posix_fadvise(file.handle.fileno(), position, READ_AHEAD, os.POSIX_FADV_WILLNEED)

    @contextlib.contextmanager
    def folder(self) -> Iterator[Path]:
        """Yield a temporary folder with the files under their names; errors raised in the block name `origin`.

        Raises:
            CheckpointError: If a file was changed in place, or the folder cannot be made.
        """
        with contextlib.ExitStack() as stack:
            try:
                folder = stack.enter_context(
                    tempfile.TemporaryDirectory(prefix="kandinsky22-", ignore_cleanup_errors=True)
                )
                for file in self._files:
                    os.symlink(file.current_path(), os.path.join(folder, file.path.name))
            except KandinskyError:
                raise
            except (OSError, NotImplementedError) as error:
                if any(file.handle is not None for file in self._files) and OPEN_FILES is not None:
                    raise CheckpointError(f"cannot make a temporary folder to read {self.origin}: {error}") from error
                folder = str(self.origin)  # a system without links
            try:
                yield Path(folder)
            except KandinskyError as error:
                if folder in str(error):
                    raise type(error)(str(error).replace(folder, str(self.origin))) from error
                raise


def check_regular_file(path: str | os.PathLike[str]) -> os.stat_result:
    """Return the status of a regular file: a pipe or a device could block reading, or never end.

    Args:
        path: The file; links are followed.

    Raises:
        CheckpointError: If it is missing, cannot be reached, or is anything else.
    """
    try:
        status = os.stat(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"missing file: {path}") from error
    except (OSError, ValueError) as error:  # loops of links, unreadable folders, names that no file can have
        raise CheckpointError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"cannot read {path}: it is not a regular file")
    return status


def _pin(path: Path) -> _PinnedFile:
    """Open a file, or copy it into memory if it is small."""
    status = check_regular_file(path)
    if OPEN_FILES is None:
        return _PinnedFile(path, _Identity.of(status), None, is_copy=False)
    try:
        handle: IO[bytes] = open(path, "rb")  # noqa: SIM115 - held open on purpose
    except OSError as error:
        if "too many" in str(error).lower():  # the limit of open files; changes are then noticed, not survived
            return _PinnedFile(path, _Identity.of(status), None, is_copy=False)
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    status = os.fstat(handle.fileno())
    if status.st_size > COPIED_BYTES:
        return _PinnedFile(path, _Identity.of(status), handle, is_copy=False)
    with handle:
        copy = _memory_file()
        if copy is None:
            handle = open(path, "rb")  # noqa: SIM115 - held open on purpose
            return _PinnedFile(path, _Identity.of(os.fstat(handle.fileno())), handle, is_copy=False)
        shutil.copyfileobj(handle, copy)
    copy.flush()
    with contextlib.suppress(OSError, NotImplementedError):  # digests of files include their times
        os.utime(copy.fileno(), ns=(status.st_atime_ns, status.st_mtime_ns))
    return _PinnedFile(path, _Identity.of(status), copy, is_copy=True)


def _close(files: list[_PinnedFile]) -> None:
    for file in files:
        if file.handle is not None:
            file.handle.close()


def _memory_file() -> IO[bytes] | None:
    """Return an empty file without a name, in memory where the system can; None if none can be made."""
    with contextlib.suppress(OSError):
        if hasattr(os, "memfd_create"):
            return os.fdopen(os.memfd_create("kandinsky22"), "w+b")
        return tempfile.TemporaryFile()
    return None
