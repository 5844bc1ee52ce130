"""The manifest of a run: what it draws, and a line with the digest of each finished shard."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kandinsky22.batch.storage import Folder, LocalFolder
from kandinsky22.checkpoints.atomic_files import flush_folder
from kandinsky22.errors import InputError, describe

MANIFEST = "manifest.jsonl"
FORMAT = 1
FORMAT_FIELD = "kandinsky22_batch"  # of the header, with the number of the format
BEGINNING = f'{{"{FORMAT_FIELD}"'.encode()  # of every manifest
# Values of the header that a run goes on from.
HEADER = {
    "items": int,
    "batch_size": int,
    "batch_pixels": int | None,
    "folder": str,
    "versions": dict,
    "settings": dict,
}
UPLOAD_SECONDS = 30.0  # time between uploads of the manifest: remote files cannot be appended to


@dataclasses.dataclass(frozen=True, slots=True)
class ShardEntry:
    """A finished shard.

    Attributes:
        shard: Number of the shard.
        name: Name of the file or folder; None if no picture of the shard could be drawn.
        sha256: Digest of the shard, see `formats.shard_digest`; None without a file.
        pictures: Number of pictures.
        failed: Pictures that are missing, and why, by name of the sample.
        seconds: Time that drawing took.
        worker: Process that has drawn it.
    """

    shard: int
    name: str | None
    sha256: str | None
    pictures: int
    failed: Mapping[str, str]
    seconds: float
    worker: str

    @classmethod
    def from_json(cls, entry: Any) -> ShardEntry | None:
        """Return the entry of a line, or None if it is none.

        Args:
            entry: The parsed line.
        """
        if not isinstance(entry, dict) or not isinstance(entry.get("failed"), dict):
            return None
        try:
            result = cls(**entry)
        except TypeError:
            return None
        kinds = {"shard": int, "pictures": int, "name": str | None, "sha256": str | None}
        return result if all(isinstance(entry[name], kind) for name, kind in kinds.items()) else None


class Manifest:
    """The manifest of an output folder.

    Attributes:
        exists: Whether the folder has a file of the manifest's name.
        is_blank: Whether that file is missing or has no text.
        is_foreign: Whether that file has text, but neither the beginning of a manifest nor an entry of one.
        header: What the run draws; None for a new folder.
        entries: Shards by number that an earlier run has finished. With remote folders, also those of this run, from
            which the manifest is uploaded again; a local manifest is appended to, and memory does not grow with it.
        damaged_lines: Number of lines that could not be read, whose shards are drawn again.

    Args:
        folder: The output folder.
    """

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._uploaded = 0.0
        self.header: dict[str, Any] | None = None
        self.entries: dict[int, ShardEntry] = {}
        self.damaged_lines = 0
        content = folder.read(MANIFEST)
        self.exists = content is not None
        self.is_blank = not (content or b"").strip()
        self.is_foreign = not self.is_blank and not self._read(content or b"")

    def _read(self, content: bytes) -> bool:
        """Read the content of a manifest, and return whether it is one, as far as its damage lets that be seen."""
        is_ours = content.startswith(BEGINNING) or BEGINNING.startswith(content)
        # A line without its end was being written when the run was killed.
        for line in content.split(b"\n")[:-1]:
            try:
                parsed = json.loads(line)
            except (ValueError, RecursionError):
                parsed = None
            if isinstance(parsed, dict) and _is_header(parsed):
                self.header = parsed
                is_ours = True
            elif (entry := ShardEntry.from_json(parsed)) is not None:
                self.entries[entry.shard] = entry
                is_ours = True
            else:
                self.damaged_lines += 1
        self.damaged_lines += not content.endswith(b"\n") and content != b""
        if self.header is None:
            self.entries = {}
        return is_ours

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Raise an error unless the folder's earlier run, if there was one, had the same settings.

        Args:
            settings: Settings of this run, JSON values by name.

        Raises:
            InputError: If a setting differs.
        """
        if self.header is None:
            return
        old, new = self.header["settings"], json.loads(json.dumps(settings))
        if changed := [name for name in {**old, **new} if old.get(name) != new.get(name)]:
            changes = "; ".join(
                f"{name} was {describe(old.get(name))}, is {describe(new.get(name))}" for name in changed
            )
            raise InputError(
                f"the output folder belongs to a run with other settings: {changes}; choose another folder"
            )

    def start(self, header: Mapping[str, Any]) -> None:
        """Write the header of a new run, or the lines of an earlier one without damaged lines.

        Args:
            header: What the run draws, JSON values by name.
        """
        self.header = {FORMAT_FIELD: FORMAT, **header}
        self._rewrite()

    def has_settings(self, settings: Mapping[str, Any]) -> bool:
        """Return whether the folder's earlier run had the same settings.

        Args:
            settings: Settings of this run, JSON values by name.
        """
        return self.header is not None and self.header["settings"] == json.loads(json.dumps(settings))

    def forget_run(self) -> None:
        """Forget an earlier run, which has finished nothing. `start` writes the header of the new run."""
        self.header, self.entries = None, {}

    def discard(self, shard: int) -> None:
        """Forget a shard, which will be drawn again. `start` writes the rest.

        Args:
            shard: Number of the shard.
        """
        self.entries.pop(shard, None)

    def add(self, entry: ShardEntry) -> None:
        """Enter a finished shard, which is on the disk under its name.

        Args:
            entry: The shard.

        Raises:
            InputError: If the manifest cannot be written.
        """
        if isinstance(self._folder, LocalFolder):
            _append(self._folder.path / MANIFEST, _line(dataclasses.asdict(entry)))
            return
        self.entries[entry.shard] = entry
        if time.monotonic() - self._uploaded > UPLOAD_SECONDS:
            self._rewrite()

    def finish(self) -> None:
        """Write what remote folders do not have yet."""
        if not isinstance(self._folder, LocalFolder):
            self._rewrite()

    def _rewrite(self) -> None:
        lines = [self.header, *(dataclasses.asdict(self.entries[shard]) for shard in sorted(self.entries))]
        self._folder.write(MANIFEST, b"".join(_line(line) for line in lines))
        self._uploaded = time.monotonic()


def _is_header(line: Mapping[str, Any]) -> bool:
    """Return whether a line is the header of a manifest of this format.

    Raises:
        InputError: If it is the header of another format.
    """
    if (format := line.get(FORMAT_FIELD)) is None:
        return False
    if format != FORMAT:
        raise InputError(f"{MANIFEST} was written by another version of kandinsky22 in another format")
    return all(isinstance(line.get(name), kind) for name, kind in HEADER.items())


def _line(value: Any) -> bytes:
    return (json.dumps(value, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def _append(path: Path, line: bytes) -> None:
    """Append a line that is on the disk when the function returns, or leave the file as it was."""
    try:
        with path.open("ab") as file:
            size = file.tell()
            try:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(file.fileno(), size)
                raise
        flush_folder(path.parent)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}") from error
