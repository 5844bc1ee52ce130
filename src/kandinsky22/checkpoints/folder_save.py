"""Saves of several files with one commit point: after any interruption a folder has all of the old files or the new.

A save has four steps:

1. The new files are written to hidden staging folders, one per destination folder, and flushed to the disk.
2. A journal that lists them is renamed into the folder. That is the commit point: nothing visible has changed before.
3. The replaced files are moved into the staging folders, then the new files get their names. `model_index.json` goes
   first and comes last, therefore other programs never see a complete model of old and new files.
4. The journal and the staging folders are deleted.

A process that dies in step 1 leaves staging folders, which the next save deletes. One that dies in steps 3 or 4 leaves
the journal, and the next load or save by this library completes its work. Folders hold no trace of a completed save.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from kandinsky22.checkpoints.atomic_files import flush_folder, flush_to_disk, permissions, read_json
from kandinsky22.checkpoints.locks import LOCK_TIMEOUT, POLL_INTERVAL, abandoned, lock_file, locked_folders, open_folder
from kandinsky22.checkpoints.locks import unlock as release
from kandinsky22.errors import CheckpointError, KandinskyError

R = TypeVar("R")

JOURNAL = ".kandinsky22-save.json"
STAGING = re.compile(r"\.saving-[0-9a-f]{16}")
NEW, OLD = "new", "old"  # subfolders of a staging folder
PIPELINE_INDEX = "model_index.json"
HEADS = (PIPELINE_INDEX, "config.json", "scheduler_config.json")  # every save replaces at least one of them
READ_ATTEMPTS = 20  # how often a folder is read again because it was replaced meanwhile

ReplacedFiles = Callable[[list[str]], Iterable[str]]
"""Function that selects the old files that a save removes, from the names of all files of the destination folder."""


@dataclasses.dataclass
class Destination:
    """One folder that files are saved to.

    Attributes:
        subfolder: Its path within the saved folder; empty for that folder itself.
        staging: Name of the staging folder in it.
        new: Names of the new files, with `/` if they are in further subfolders.
        removed: Names of old files that no new file replaces.
    """

    subfolder: str
    staging: str
    new: list[str] = dataclasses.field(default_factory=list)
    removed: list[str] = dataclasses.field(default_factory=list)


class FolderSave:
    """One save into a folder: files are staged by destination folder, and appear together in `commit`."""

    def __init__(self, folder: Path) -> None:
        """Prepare a save, completing an interrupted one first.

        Args:
            folder: The folder, which is created if it is missing.
        """
        self.folder = folder
        self._destinations: dict[str, Destination] = {}
        self._replaced: dict[str, list[ReplacedFiles]] = {}
        self._locks: list[int] = []
        self._created: list[Path] = []
        try:
            self._stage_folder("")
        except BaseException:
            self.close()
            raise

    def stage(self, subfolder: str = "") -> Path:
        """Return the staging folder of a destination folder, for new files to be written to.

        Args:
            subfolder: Name of the destination folder within the saved folder; empty for the saved folder itself.
        """
        if subfolder not in self._destinations:
            self._stage_folder(subfolder)
        return self.folder / subfolder / self._destinations[subfolder].staging / NEW

    def replace(self, subfolder: str, select: ReplacedFiles) -> None:
        """Remove old files of a destination folder when the save is committed.

        Args:
            subfolder: Name of the destination folder.
            select: Selects the files. New files are never removed.
        """
        self._replaced.setdefault(subfolder, []).append(select)

    def commit(self) -> None:
        """Let the new files appear.

        Raises:
            CheckpointError: If the folder is locked by another process, or has a folder under the name of a new file.
            OSError: If a file cannot be written; the old files are left as they were.
        """
        for destination in self._destinations.values():
            new = self.stage(destination.subfolder)
            files = sorted(path for path in new.rglob("*") if not path.is_dir())
            destination.new = [path.relative_to(new).as_posix() for path in files]
            for file in files:
                flush_to_disk(file)
            flush_folder(new)
            flush_folder(new.parent)
        for created in self._created:
            flush_folder(created.parent)
        subfolders = sorted(self._destinations)
        while True:
            for subfolder in subfolders:
                complete_saves(self.folder / subfolder)
            with locked_folders(self.folder / subfolder for subfolder in subfolders):
                # Another process may have been killed between its commit and the lock.
                folders = [self.folder / subfolder for subfolder in subfolders]
                if not any(map(_has_journal, [_parent(self.folder), *folders])):
                    return self._replace_files()

    def close(self) -> None:
        """Delete what an uncommitted save has written."""
        if not os.path.lexists(self.folder / JOURNAL):  # otherwise, the next load or save completes it
            for destination in reversed(self._destinations.values()):
                shutil.rmtree(self.folder / destination.subfolder / destination.staging, ignore_errors=True)
            for folder in reversed(self._created):
                with contextlib.suppress(OSError):  # it is not empty if the save succeeded
                    folder.rmdir()
        for lock in self._locks:
            release(lock)
        self._locks = []

    def _stage_folder(self, subfolder: str) -> None:
        folder = self.folder / subfolder
        for missing in [path for path in (folder, *folder.parents) if not path.exists()][::-1]:
            with contextlib.suppress(FileExistsError):  # another process has created it meanwhile
                missing.mkdir()
                self._created.append(missing)
        complete_saves(folder)
        _delete_abandoned(folder)
        while True:
            name = f".saving-{secrets.token_hex(8)}"
            (folder / name).mkdir()
            lock = None
            with contextlib.suppress(FileNotFoundError):  # deleted by another process before it was locked
                lock = open_folder(folder / name)
                if lock is None:
                    break
                if lock_file(lock) is not False and (folder / name).exists():
                    self._locks.append(lock)
                    break
            if lock is not None:
                release(lock)
        self._destinations[subfolder] = Destination(subfolder, name)
        (folder / name / NEW).mkdir()
        (folder / name / OLD).mkdir()

    def _replace_files(self) -> None:
        """Write the journal and replace the files; the folders are locked."""
        destinations = list(self._destinations.values())
        for destination in destinations:
            folder = self.folder / destination.subfolder
            names = [entry.name for entry in os.scandir(folder) if not entry.is_dir(follow_symlinks=False)]
            for select in self._replaced.get(destination.subfolder, ()):
                destination.removed += sorted(set(select(names)) - set(destination.new) - set(destination.removed))
            for name in destination.new:
                if (folder / name).is_dir():
                    raise CheckpointError(f"{folder / name} is a folder: a file of this name must be written")
                if (mode := permissions(folder / name)) is not None:
                    os.chmod(folder / destination.staging / NEW / name, mode)
        staged = self.folder / self._destinations[""].staging / "journal.json"
        content = {"version": 1, "destinations": [dataclasses.asdict(destination) for destination in destinations]}
        staged.write_text(json.dumps(content), encoding="utf-8")
        flush_to_disk(staged)
        os.rename(staged, self.folder / JOURNAL)
        try:
            flush_folder(self.folder)
            _move_files(self.folder, destinations)
        except OSError:
            _restore_files(self.folder, destinations)
            raise
        except BaseException:  # an interruption by the user: what is committed is completed
            with contextlib.suppress(OSError):
                _move_files(self.folder, destinations)
                _end(self.folder, destinations)
            raise
        _end(self.folder, destinations)


@contextlib.contextmanager
def folder_save(folder: Path) -> Iterator[FolderSave]:
    """Yield a save, which is committed when the block ends, and discarded if it raises.

    Args:
        folder: The folder to save to.

    Raises:
        CheckpointError: If the files cannot be written. The old files are left as they were.
    """
    save = None
    try:
        try:
            save = FolderSave(folder)
            yield save
            save.commit()
        finally:
            if save is not None:
                save.close()
    except CheckpointError as error:
        message = re.sub(rf"[/\\\\]{STAGING.pattern}[/\\\\]{NEW}\b", "", str(error))
        if message == str(error):
            raise
        raise CheckpointError(message) from error
    except OSError as error:
        raise CheckpointError(f"cannot write {folder}: {error}") from error


# Steps after the commit point. Each may have been done, in part or entirely, by a process that was killed.


def _rank(name: str) -> int:
    """Order in which new files appear: files that a model is recognised by come last."""
    if name == PIPELINE_INDEX:
        return 2
    return 1 if name.endswith("config.json") or ".index." in name else 0


def _moves(folder: Path, destinations: Iterable[Destination]) -> list[tuple[Path, Path, Path]]:
    """Return the path, the staged path and the path of the replaced file of each new file, in order of appearance."""
    moves = [(_rank(name), folder / part.subfolder, part.staging, name) for part in destinations for name in part.new]
    moves.sort(key=lambda move: move[0])
    return [
        (parent / name, parent / staging / NEW / name, parent / staging / OLD / name)
        for _, parent, staging, name in moves
    ]


def _removals(folder: Path, destinations: Iterable[Destination]) -> list[tuple[Path, Path]]:
    """Return the path and the later path of each file that is removed."""
    return [
        (folder / part.subfolder / name, folder / part.subfolder / part.staging / OLD / name)
        for part in destinations
        for name in part.removed
    ]


def _move_files(folder: Path, destinations: list[Destination]) -> None:
    """Move the old files away and the new ones to their names, whatever has been moved before."""
    moves = _moves(folder, destinations)
    replaced = [(path, old) for path, new, old in reversed(moves) if os.path.lexists(new)]
    for path, old in [*replaced, *_removals(folder, destinations)]:
        if os.path.lexists(path):
            old.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, old)
    for path, new, _ in moves:
        if os.path.lexists(new):
            path.parent.mkdir(parents=True, exist_ok=True)
            os.replace(new, path)
    for part in destinations:
        flush_folder(folder / part.subfolder)


def _restore_files(folder: Path, destinations: list[Destination]) -> None:
    """Undo `_move_files` after it has failed: a file is write-protected, or open in another process on Windows."""
    moves = _moves(folder, destinations)
    for path, new, _ in reversed(moves):
        if not os.path.lexists(new):
            os.replace(path, new)
    for path, old in [*_removals(folder, destinations), *((path, old) for path, _, old in moves)]:
        if os.path.lexists(old):
            os.replace(old, path)
    for part in destinations:
        flush_folder(folder / part.subfolder)
    (folder / JOURNAL).unlink()


def _end(folder: Path, destinations: list[Destination]) -> None:
    """Delete the journal, then what is left in the staging folders, that of the saved folder last."""
    (folder / JOURNAL).unlink(missing_ok=True)
    flush_folder(folder)
    for part in reversed(destinations):
        shutil.rmtree(folder / part.subfolder / part.staging, ignore_errors=True)


# Interrupted saves


def complete_saves(folder: Path) -> None:
    """Complete saves that were interrupted after their commit point: into a folder, its parent or its subfolders.

    Args:
        folder: Folder of a pipeline or of one component.

    Raises:
        CheckpointError: If that fails, because the folder is read-only for example.
    """
    folder = Path(os.path.realpath(folder))
    candidates = [folder.parent, folder]
    with contextlib.suppress(OSError):
        if os.path.lexists(folder / PIPELINE_INDEX):
            candidates += [Path(entry.path) for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False)]
    for candidate in candidates:
        if _has_journal(candidate):
            try:
                _complete(candidate)
            except OSError as error:
                raise CheckpointError(
                    f"{candidate}: a save was interrupted, and it cannot be completed ({error}); load it once with "
                    "permission to write, or save again"
                ) from error


def _has_journal(folder: Path) -> bool:
    """Return whether a folder has the journal of a save, which other users may not forge.

    Raises:
        CheckpointError: If it is the journal of another user, who could let this process move files.
    """
    try:
        owner = os.lstat(folder / JOURNAL).st_uid
        is_shared = bool(folder.stat().st_mode & stat.S_ISVTX)  # such as /tmp, where everyone may create files
    except (OSError, ValueError):
        return False
    if os.name != "posix" or owner in (os.geteuid(), 0):
        return True
    if is_shared:
        return False
    raise CheckpointError(
        f"{folder}: a save of another user was interrupted; that user can complete it by loading the model once"
    )


def _complete(folder: Path) -> None:
    with locked_folders([folder]) as are_locked:
        if not are_locked:
            _wait_for_other_process(folder / JOURNAL)
        if not os.path.lexists(folder / JOURNAL):
            return  # a process that was saving has ended
        destinations = _read_journal(folder)
        subfolders = sorted(part.subfolder for part in destinations if part.subfolder)
        with locked_folders(folder / subfolder for subfolder in subfolders):
            _move_files(folder, destinations)
            _end(folder, destinations)


def _wait_for_other_process(journal: Path) -> None:
    """Wait until another process removes its journal, where there are no locks, or until it must have been killed."""
    with contextlib.suppress(OSError):
        while time.time() - journal.stat().st_mtime < LOCK_TIMEOUT:
            time.sleep(POLL_INTERVAL)


def _read_journal(folder: Path) -> list[Destination]:
    """Read a journal, which may be part of a downloaded checkpoint: it must concern nothing outside its folder."""
    path = folder / JOURNAL
    destinations = []
    try:
        for entry in read_json(path)["destinations"]:
            part = Destination(**entry)
            _check_name(part.subfolder or "top")
            for name in [*part.new, *part.removed]:
                _check_name(name)
            if not STAGING.fullmatch(part.staging):
                raise ValueError(f"staging folder {part.staging!r}")
            destinations.append(part)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"cannot read {path}: it is not the journal of a save ({error})") from error
    root = os.path.realpath(folder)
    files = [file for move in [*_moves(folder, destinations), *_removals(folder, destinations)] for file in move]
    for inside in {*(file.parent for file in files), *(folder / p.subfolder / p.staging for p in destinations)}:
        if not os.path.realpath(inside).startswith(os.path.join(root, "")) and os.path.realpath(inside) != root:
            raise CheckpointError(f"cannot read {path}: {inside} is in another folder")
    for part in destinations:
        (folder / part.subfolder).mkdir(parents=True, exist_ok=True)
    return destinations


def _check_name(name: Any) -> None:
    if not isinstance(name, str) or not all(part not in ("", ".", "..") for part in re.split(r"[/\\]", name)):
        raise ValueError(f"file {name!r}")
    if b"\0" in os.fsencode(name):
        raise ValueError(f"file {name!r}")


def _delete_abandoned(folder: Path) -> None:
    """Delete staging folders of processes that were killed before they committed, also those of its subfolders."""
    with contextlib.suppress(OSError):
        entries = list(os.scandir(folder))
        if any(STAGING.fullmatch(entry.name) for entry in entries):
            for entry in entries:
                if entry.is_dir(follow_symlinks=False) and not STAGING.fullmatch(entry.name):
                    _delete_abandoned_staging(Path(entry.path))
            _delete_abandoned_staging(folder)


def _delete_abandoned_staging(folder: Path) -> None:
    with contextlib.suppress(OSError), locked_folders([folder]):
        # Staging folders of a committed save are needed to complete it.
        if _has_journal(folder) or _has_journal(_parent(folder)):
            return
        for entry in [entry for entry in os.scandir(folder) if STAGING.fullmatch(entry.name)]:
            with abandoned(entry.path) as is_abandoned:
                if is_abandoned and entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path, ignore_errors=True)


def _parent(folder: Path) -> Path:
    return Path(os.path.realpath(folder)).parent


# Reading while another process may save


def read_consistently(folder: Path, read: Callable[[], R]) -> R:
    """Return what a function reads from a folder, none of it from a save that ended in the meantime.

    Args:
        folder: Folder of a pipeline or of one component.
        read: Reads the folder. It is called again if the folder was replaced while it ran.

    Raises:
        CheckpointError: If the folder is replaced all the time, or if an interrupted save cannot be completed.
    """
    for _ in range(READ_ATTEMPTS):
        complete_saves(folder)
        before = _state(folder)
        if before is None:
            continue
        try:
            result = read()
        except KandinskyError:  # files of two saves may also not fit each other
            if _state(folder) == before:
                raise
            continue
        if _state(folder) == before:
            return result
    raise CheckpointError(f"{folder} is being replaced by another process again and again; load it again later")


def _state(folder: Path) -> list[tuple[int, ...]] | None:
    """Return the identities of the files that every save replaces, or None while a save replaces files."""
    folder = Path(os.path.realpath(folder))
    folders = [folder]
    with contextlib.suppress(OSError):
        if os.path.lexists(folder / PIPELINE_INDEX):
            folders += sorted(folder / name for name in os.listdir(folder) if os.path.isdir(folder / name))
    if any(map(_has_journal, [folder.parent, *folders])):
        return None
    state: list[tuple[int, ...]] = []
    for file in [part / name for part in folders for name in HEADS]:
        try:
            status = os.stat(file)
            state.append((status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size))
        except OSError:
            state.append(())
    return state
