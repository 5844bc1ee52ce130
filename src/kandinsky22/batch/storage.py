"""Output folders of runs: shards appear under their names complete or not at all, locally and where fsspec reaches."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kandinsky22.batch.formats import is_shard_file, shard_digest
from kandinsky22.batch.rows import is_address
from kandinsky22.checkpoints.atomic_files import atomic_write, flush_folder, flush_to_disk
from kandinsky22.errors import InputError, KandinskyError, MissingDependencyError, invalid

TEMPORARY = re.compile(r"\..*\.saving-[0-9a-f]+(\.\w+)?")  # names of unfinished files, also those of `atomic_write`
REPLACED = re.compile(r"\.(.*)\.replaced-[0-9a-f]+")  # names of folders of which only the user's files are left to move
WRITE_BITS = 0o222


class LocalFolder:
    """A folder of the local file system.

    Args:
        path: The folder, which is created.
    """

    is_local = True

    def __init__(self, path: Path) -> None:
        self.path = path

    def create(self) -> None:
        """Create the folder, and check that files can be written into it.

        Raises:
            InputError: If that is not possible.
        """
        with _errors_about(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            # The superuser may write anywhere; a folder without any write permission is protected on purpose.
            if not self.path.stat().st_mode & WRITE_BITS:
                raise InputError(f"{self.path} cannot be written: the folder is write-protected")
            probe = self.path / f".probe.saving-{secrets.token_hex(6)}"
            probe.write_bytes(b"")
            probe.unlink()

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """Yield a temporary path for a file or folder, and publish it under its name when the block ends.

        The content is on the disk before it gets its name. An older file or folder of that name is replaced. Files in
        an older folder that are not those of a shard move into the new folder.

        Args:
            name: Name in the folder, with "/" between parts.

        Raises:
            InputError: If it cannot be written, because of a full disk for example.
        """
        final = self.path / name
        with _errors_about(final):
            final.parent.mkdir(parents=True, exist_ok=True)
            temporary = final.parent / f".{final.name}.saving-{secrets.token_hex(6)}"
            try:
                yield temporary
                _flush(temporary)
                replaced = _set_aside(final)
                os.replace(temporary, final)
                if replaced is not None:
                    _keep_user_files(replaced, final)
                flush_folder(final.parent)
            finally:
                _remove(temporary)

    def names(self, subfolder: str = "") -> list[str]:
        """Return the names of the files and folders in the folder, or in a folder of it that need not exist.

        Args:
            subfolder: Name of the folder in it; "" for itself.

        Raises:
            InputError: If it is a file.
        """
        with contextlib.suppress(FileNotFoundError), _errors_about(self.path / subfolder):
            return sorted(path.name for path in (self.path / subfolder).iterdir())
        return []

    def digest(self, name: str) -> str | None:
        """Return the SHA-256 of a shard, or None if there is none.

        Args:
            name: Name in the folder.
        """
        try:
            return shard_digest(self.path / name)
        except FileNotFoundError:
            return None

    def read(self, name: str) -> bytes | None:
        """Return the content of a file, or None if there is none.

        Args:
            name: Name in the folder.
        """
        with contextlib.suppress(FileNotFoundError), _errors_about(self.path / name):
            return (self.path / name).read_bytes()
        return None

    def write(self, name: str, content: bytes) -> None:
        """Write a small file atomically.

        Args:
            name: Name in the folder.
            content: The content.
        """
        with _errors_about(self.path / name), atomic_write(self.path / name) as temporary:
            temporary.write_bytes(content)

    @contextlib.contextmanager
    def local_copy(self, name: str) -> Iterator[Path]:
        """Yield the path of a shard for reading.

        Args:
            name: Name in the folder.
        """
        yield self.path / name

    def remove_temporaries(self) -> None:
        """Remove what killed runs have left unfinished, except the user's files. No run may write meanwhile."""
        for path in list(self.path.iterdir()):
            if (match := REPLACED.fullmatch(path.name)) and path.is_dir():
                _keep_user_files(path, self.path / match[1])
        for folder in (self.path, *(path for path in self.path.glob("*") if path.name == "previews")):
            for path in folder.iterdir():
                if TEMPORARY.fullmatch(path.name):
                    _remove(path)


class RemoteFolder:
    """A folder of a file system that fsspec knows. Files are finished locally, then uploaded.

    Args:
        address: Address of the folder, such as "s3://bucket/run".
    """

    is_local = False

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/")

    def _find(self) -> tuple[Any, str]:
        try:
            import fsspec
        except ImportError:
            raise MissingDependencyError(f"{self.address} needs fsspec: pip install kandinsky22[batch]") from None
        try:
            file_system, root = fsspec.core.url_to_fs(self.address)
        except (ValueError, ImportError) as error:
            raise InputError(f"{self.address} cannot be opened: {error}") from error
        return file_system, root

    def create(self) -> None:
        """Create the folder, and check that files can be written into it.

        Raises:
            InputError: If that is not possible.
        """
        with _remote_errors(self.address):
            file_system, root = self._find()
            file_system.makedirs(root, exist_ok=True)
            file_system.pipe_file(f"{root}/.probe", b"")
            file_system.rm_file(f"{root}/.probe")

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """Yield a local path for a file or folder, and upload it under its name when the block ends.

        Args:
            name: Name in the folder, with "/" between parts.

        Raises:
            InputError: If it cannot be written.
        """
        with _errors_about(f"{self.address}/{name}"), tempfile.TemporaryDirectory() as folder:
            temporary = Path(folder) / Path(name).name
            yield temporary
            with _remote_errors(f"{self.address}/{name}"):
                self._upload(temporary, name)

    def _upload(self, path: Path, name: str) -> None:
        file_system, root = self._find()
        final = f"{root}/{name}"
        file_system.makedirs(final.rpartition("/")[0], exist_ok=True)
        if not path.is_dir():
            file_system.put_file(str(path), final)
            return
        for each in file_system.ls(final, detail=False) if file_system.isdir(final) else ():
            if is_shard_file(path.name, _last_part(each)):  # other files are the user's
                file_system.rm_file(each)
        file_system.makedirs(final, exist_ok=True)
        for file in sorted(path.iterdir()):
            file_system.put_file(str(file), f"{final}/{file.name}")

    def names(self, subfolder: str = "") -> list[str]:
        """Return the names of the files and folders in the folder, or in a folder of it that need not exist.

        Args:
            subfolder: Name of the folder in it; "" for itself.
        """
        with _remote_errors(self.address):
            file_system, root = self._find()
            folder = f"{root}/{subfolder}" if subfolder else root
            paths = file_system.ls(folder, detail=False) if file_system.exists(folder) else []
        return sorted(map(_last_part, paths))

    def digest(self, name: str) -> str | None:
        """Return the SHA-256 of a shard, or None if there is none.

        Args:
            name: Name in the folder.
        """
        try:
            with self.local_copy(name) as path:
                return shard_digest(path)
        except FileNotFoundError:
            return None

    def read(self, name: str) -> bytes | None:
        """Return the content of a file, or None if there is none.

        Args:
            name: Name in the folder.
        """
        with _remote_errors(f"{self.address}/{name}"):
            file_system, root = self._find()
            try:
                return bytes(file_system.cat_file(f"{root}/{name}"))
            except FileNotFoundError:
                return None

    def write(self, name: str, content: bytes) -> None:
        """Write a small file.

        Args:
            name: Name in the folder.
            content: The content.
        """
        with _remote_errors(f"{self.address}/{name}"):
            file_system, root = self._find()
            file_system.pipe_file(f"{root}/{name}", content)

    @contextlib.contextmanager
    def local_copy(self, name: str) -> Iterator[Path]:
        """Yield the path of a downloaded copy of a shard.

        Args:
            name: Name in the folder.

        Raises:
            FileNotFoundError: If there is none.
        """
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / Path(name).name
            with _remote_errors(f"{self.address}/{name}"):
                self._download(name, path)
            yield path

    def _download(self, name: str, path: Path) -> None:
        file_system, root = self._find()
        source = f"{root}/{name}"
        if not file_system.exists(source):
            raise FileNotFoundError(source)
        if not file_system.isdir(source):
            file_system.get_file(source, str(path))
            return
        path.mkdir()
        for each in file_system.ls(source, detail=False):
            if is_shard_file(path.name, name := _last_part(each)):
                file_system.get_file(each, str(path / name))

    def remove_temporaries(self) -> None:
        """Do nothing: uploads have no temporary names."""


Folder = LocalFolder | RemoteFolder


def open_folder(location: str) -> Folder:
    """Return the output folder at a path or an address.

    Args:
        location: The path or address.

    Raises:
        InputError: If it is empty, which would stand for the current folder.
    """
    path = location.removeprefix("file://")
    if not path:
        raise invalid("folder", location, "the path or the address of a folder", "write . for the current folder")
    return RemoteFolder(location) if is_address(path) else LocalFolder(Path(path))


@contextlib.contextmanager
def _errors_about(location: str | Path) -> Iterator[None]:
    """Name the output in errors of the system, which know only temporary files."""
    try:
        yield
    except (InputError, FileNotFoundError, MissingDependencyError):
        raise
    except OSError as error:
        raise InputError(f"{location} cannot be written: {error.strerror or error}") from error


@contextlib.contextmanager
def _remote_errors(location: str) -> Iterator[None]:
    """Name the output in errors of file systems, each of which has its own, about missing credentials for example."""
    try:
        yield
    except (KandinskyError, FileNotFoundError):
        raise
    except Exception as error:
        text = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
        raise InputError(f"{location} cannot be used: {text}") from error


def _flush(path: Path) -> None:
    """Wait until a file, or the files of a folder and their names, are on the disk."""
    if not path.is_dir():
        flush_to_disk(path)
        return
    for file in path.iterdir():
        flush_to_disk(file)
    flush_folder(path)


def _set_aside(path: Path) -> Path | None:
    """Rename a folder to a unique hidden name, and return the new path; None if the folder does not exist."""
    if not path.is_dir() or path.is_symlink():
        return None
    replaced = path.parent / f".{path.name}.replaced-{secrets.token_hex(6)}"
    os.rename(path, replaced)
    return replaced


def _keep_user_files(replaced: Path, final: Path) -> None:
    """Move what is not of a shard from the folder that was replaced into the one of its name, and remove the rest."""
    for path in [path for path in replaced.iterdir() if not is_shard_file(final.name, path.name)]:
        final.mkdir(exist_ok=True)  # a run that was killed may have had no time to write it
        target = final / path.name
        if os.path.lexists(target):
            target = final / f"{path.stem}-{secrets.token_hex(3)}{path.suffix}"
        os.rename(path, target)
    if final.is_dir():
        flush_folder(final)
    _remove(replaced)


def _last_part(path: str) -> str:
    """Return the name of a file or folder of a remote file system."""
    return path.rstrip("/").rpartition("/")[2]


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
