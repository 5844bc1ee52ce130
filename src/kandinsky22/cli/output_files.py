"""Output files of the command: free names, checks before sampling, and writing that loses nothing.

No file is replaced without `--force`. A file appears under its name complete or not at all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
import stat
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

from kandinsky22.errors import InputError, invalid

STDOUT = Path("-")  # value of --output that means standard output
WRITE_BITS = 0o222
OLD_TEMPORARY_SECONDS = 3600.0  # no file takes as long to write


@dataclasses.dataclass(frozen=True)
class OutputName:
    """Name of one output file of a command.

    Attributes:
        suffix: What follows the common beginning of the names, such as "-sheet"; "" for the file of `--output` itself.
        extension: Extension with its dot; None for that of `--output`.
        check_existing: Function that raises InputError if `--force` must not replace the file at a path; None accepts
            any file.
    """

    suffix: str = ""
    extension: str | None = None
    check_existing: Callable[[Path], None] | None = None


class OutputFiles:
    """The output files of one command.

    Their names begin with the name of `--output`. If one of them exists, all begin with NAME-2, NAME-3, ... instead;
    with `force` existing files are replaced. Links are followed. A FIFO or a device receives the bytes.
    """

    def __init__(
        self,
        output: Path,
        names: Sequence[OutputName],
        *,
        force: bool,
        inputs: Sequence[Path] = (),
        stdout: TextIO | None = None,
    ) -> None:
        """Choose names, and check that files can be written. Called before minutes of sampling, not after.

        Args:
            output: Value of `--output`; "-" is standard output.
            names: Names of all files that the command writes.
            force: Whether existing files are replaced.
            inputs: Files that are never replaced.
            stdout: Standard output; None if it is closed.

        Raises:
            InputError: If a file cannot be written, is an input, or exists and must not be replaced.
        """
        self._output, self._force, self._stdout = output, force, stdout
        self._inputs = [identity for path in inputs if (identity := _identity(path)) is not None]
        self._number = 1
        self.is_stream = is_stdout(output) or _is_stream(output)
        if self.is_stream:
            self._check_stream(names)
            return
        with _errors_about(output):
            self._check_folder()
            for name in names:
                self._check_path(name)
            while not force and any(_exists(self.path(name)) for name in names):
                self._number += 1
            for name in names if self._number > 1 else ():
                self._check_path(name)  # the longer name may be too long

    def path(self, name: OutputName) -> Path:
        """Return the current path of a file. It changes if another program takes the name before it is written.

        Args:
            name: One of the names.
        """
        number = "" if self._number == 1 else f"-{self._number}"
        extension = self._output.suffix if name.extension is None else name.extension
        return self._output.with_name(f"{self._output.stem}{number}{name.suffix}{extension}")

    def write(self, name: OutputName, content: bytes) -> Path | None:
        """Write a file.

        Args:
            name: One of the names.
            content: The whole content.

        Returns:
            Path of the file, or None for standard output.

        Raises:
            InputError: If a file has appeared that must not be replaced.
            OSError: If the file cannot be written.
        """
        if self.is_stream:
            return self._write_stream(content)
        while True:
            path = self.path(name)
            try:
                with _errors_about(path):
                    if self._force:
                        self._check_path(name)
                    _place(content, Path(os.path.realpath(path)), replace=self._force)
                return path
            except FileExistsError:
                self._number += 1

    def _check_stream(self, names: Sequence[OutputName]) -> None:
        if len(names) > 1:
            raise InputError(f"--output={str(self._output)!r} takes one file, but the command writes {len(names)}")
        if not is_stdout(self._output):
            if not os.access(self._output, os.W_OK):
                raise InputError(f"{self._output} cannot be written: it is write-protected")
        elif self._stdout is None:
            raise InputError("the image cannot be written to standard output, which is closed")
        elif self._stdout.isatty():
            raise InputError("the image is not written to a terminal; redirect standard output to a file or a program")

    def _write_stream(self, content: bytes) -> Path | None:
        if is_stdout(self._output) and self._stdout is not None:
            with _errors_about(Path("standard output")):
                self._stdout.buffer.write(content)
                self._stdout.buffer.flush()
            return None
        with _errors_about(self._output), open(self._output, "wb") as stream:
            stream.write(content)
        return self._output

    def _check_folder(self) -> None:
        """Raise an error unless a file can be created in the output's folder, or in that of the file it links to."""
        folder = self._output.parent
        if not folder.is_dir():
            raise InputError(f"{folder} is not an existing folder; create it or choose another output with -o")
        for place in dict.fromkeys((folder, Path(os.path.realpath(self._output)).parent)):
            # The superuser may write anywhere; a folder without any write permission is protected on purpose.
            if not place.stat().st_mode & WRITE_BITS:
                raise InputError(f"{self._output} cannot be written: the folder {place} is write-protected")
            with _temporary_file(place, b""):
                _remove_old_temporaries(place)

    def _check_path(self, name: OutputName) -> None:
        """Raise an error if the path of a file is a folder or an input, or if `--force` must not replace the file."""
        path = self.path(name)
        try:
            status = path.stat()
        except FileNotFoundError:
            return
        if stat.S_ISDIR(status.st_mode):
            raise InputError(f"{path} is a folder; choose another output with -o")
        if (status.st_dev, status.st_ino) in self._inputs:
            raise InputError(f"{path} is an input and would be overwritten; choose another output with -o")
        if not self._force:
            return
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{path} is not a regular file and is not replaced; choose another output with -o")
        if not (status.st_mode & WRITE_BITS and os.access(path, os.W_OK)):
            raise InputError(f"{path} cannot be written: it is write-protected; choose another output with -o")
        if name.check_existing is not None:
            name.check_existing(path)


def check_extension(output: Path, extensions: Sequence[str]) -> None:
    """Raise an error unless the name of an output file has one of some extensions.

    Args:
        output: Value of `--output`. Standard output, FIFOs and devices have any name.
        extensions: Accepted extensions in lower case, with dots.

    Raises:
        InputError: If the extension is another one, or if the output is a folder.
    """
    if is_stdout(output) or _is_stream(output):
        return
    if output.is_dir():
        raise InputError(f"{output} is a folder; name a {extensions[0]} file in it")
    if any(ord(character) < 32 or 127 <= ord(character) < 160 for character in str(output)):
        # Paths of finished files are printed, one per line.
        raise invalid("--output", str(output), "a path without control characters", "choose another one with -o")
    if output.suffix.lower() not in extensions:
        raise invalid(
            "--output", str(output), f"a file name ending in {', '.join(extensions[:-1])} or {extensions[-1]}"
        )


def is_stdout(output: Path) -> bool:
    """Return whether an output is standard output: "-", or a path of the file or pipe behind it.

    Args:
        output: Value of `--output`.
    """
    if output == STDOUT:
        return True
    try:
        return os.path.samestat(os.stat(output), os.fstat(sys.__stdout__.fileno()))  # type: ignore[union-attr]
    except (OSError, ValueError, AttributeError):  # no such file; standard output is closed or replaced
        return False


def _is_stream(path: Path) -> bool:
    """Return whether a path is a FIFO or a character device, such as /dev/null."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)


def _exists(path: Path) -> bool:
    """Return whether the path, or the file that it links to, exists."""
    return os.path.lexists(os.path.realpath(path))


def _identity(path: Path) -> tuple[int, int] | None:
    """Return device and inode of a file, or None if there is none."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino


@contextlib.contextmanager
def _errors_about(path: Path) -> Iterator[None]:
    """Name the output file in errors of the system, which know only temporary files."""
    try:
        yield
    except (FileExistsError, BrokenPipeError, InputError):
        raise
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}") from error
    except ValueError as error:  # a null byte
        raise invalid("--output", str(path), "a path of the file system") from error


def _place(content: bytes, final: Path, *, replace: bool) -> None:
    """Write a file that appears complete or not at all.

    Raises FileExistsError if `replace` is false and the file exists, however late it has appeared.
    """
    with _temporary_file(final.parent, content) as temporary:
        if replace:
            with contextlib.suppress(FileNotFoundError):
                os.chmod(temporary, stat.S_IMODE(final.stat().st_mode))
            os.replace(temporary, final)
        else:
            _rename_to_new(temporary, final)
    _sync_folder(final.parent)


def _rename_to_new(temporary: Path, final: Path) -> None:
    """Rename a file in one step that fails if the new name exists."""
    if os.name == "nt":
        os.rename(temporary, final)
        return
    try:
        os.link(temporary, final)
    except FileExistsError:
        raise
    except OSError:
        # A file system without hard links: an empty file holds the name until the rename.
        os.close(os.open(final, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        os.replace(temporary, final)


@contextlib.contextmanager
def _temporary_file(folder: Path, content: bytes) -> Iterator[Path]:
    """Yield a file with this content on the disk; afterwards it is deleted, unless it was renamed."""
    path = folder / f".kandinsky22-{secrets.token_hex(8)}.tmp"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        yield path
    finally:
        path.unlink(missing_ok=True)


def _remove_old_temporaries(folder: Path) -> None:
    """Delete the temporary files of killed commands."""
    for path in folder.glob(".kandinsky22-*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > OLD_TEMPORARY_SECONDS:
                path.unlink()


def _sync_folder(folder: Path) -> None:
    """Ask the system to keep the folder's new entry through a power failure, where it can."""
    if os.name == "nt":
        return
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
