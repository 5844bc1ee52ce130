"""What was computed once and need not be again: the embedding of an all-zero picture, and texts drawn a moment ago."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kandinsky22.checkpoints.atomic_files import written_whole
from kandinsky22.runtime.device_offload import place_of
from kandinsky22.runtime.disk_offload import Snapshot, unchanged
from kandinsky22.runtime.lazy_component import coming_dtype, is_asleep

R = TypeVar("R")

CACHE = "KANDINSKY22_CACHE"  # environment variable: where to keep files; empty for nowhere
WORTHWHILE = 2**26  # bytes of an encoder below which it runs sooner than a file is worth
PARTS, PART = 64, 4096  # so many parts of a file, of so many bytes, stand for it

zero_images = True
"""False switches off that embeddings of all-zero pictures are kept in files."""

_FILES, _READ = "_files", "_files_read"  # attributes of a network, in no state dict


# The embedding of an all-zero picture


def name_files(network: nn.Module, files: Iterable[Path], dtype: torch.dtype | None) -> None:
    """Note which files a network was read from, or will be if it is asleep, and the type that its weights then have."""
    found = tuple(files)
    network.__dict__[_FILES] = found, dtype
    network.__dict__[_READ] = _digest(found)


def zero_embed(encoder: Any, dtype: torch.dtype, compute: Callable[[], Tensor]) -> Tensor:
    """What `compute` makes, in `dtype`, of an all-zero picture by this image encoder, on whatever device.

    It is a constant of the encoder, so it is kept in a file that is named by a digest of the encoder's own files. While
    it is there, an encoder that is asleep is not woken. Encoders that come from no files, or were changed since, have
    theirs computed; so have small ones, such as the embedded model's.
    """
    asleep = is_asleep(encoder)
    files, wanted = getattr(encoder, "__dict__", {}).get(_FILES, ((), None))
    if asleep:
        digest, wanted = _digest(files), coming_dtype(encoder) or wanted
    else:
        digest = encoder.__dict__.get(_READ) if files and unchanged(encoder) else None
    found = _read(_place(encoder, digest, wanted, dtype), dtype)
    if found is not None:
        return found
    made = compute()
    if asleep:
        digest = encoder.__dict__.get(_READ)  # of what was read by now
    place = _place(encoder, digest, wanted, dtype)
    if place is not None and bool(made.isfinite().all()):
        with contextlib.suppress(OSError, SafetensorError):  # a place that cannot be written to is no place
            place.parent.mkdir(parents=True, exist_ok=True)
            with written_whole(place) as temporary:
                save_file({"embed": made.detach().cpu().contiguous()}, temporary)
    return made


def _place(encoder: Any, digest: str | None, wanted: torch.dtype | None, dtype: torch.dtype) -> Path | None:
    """The file for an encoder of this digest and type; None if either is not known, or no files are wanted."""
    root = os.environ.get(CACHE)
    if not zero_images or root == "" or digest is None or wanted is None:
        return None
    name = hashlib.sha256(f"{digest} {wanted} {dtype} {encoder.config.image_size}".encode()).hexdigest()
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kandinsky22"
    return (Path(root) if root else base) / "zero-image" / f"{name}.safetensors"


def _read(place: Path | None, dtype: torch.dtype) -> Tensor | None:
    if place is not None and place.is_file():
        with contextlib.suppress(OSError, SafetensorError, KeyError):
            found = load_file(place)["embed"]
            if found.dtype == dtype:
                return found
    return None


def _digest(files: Iterable[Path]) -> str | None:
    """SHA-256 of names, sizes, times of change and evenly spread parts of files; None if one cannot be read, or
    they are too small for this.

    The whole would be gigabytes: as long as the encoder takes to run.
    """
    digest, total = hashlib.sha256(), 0
    for file in files:
        try:
            about = file.stat()
            total += about.st_size
            digest.update(f"{file.name} {about.st_size} {about.st_mtime_ns}\n".encode())
            with open(file, "rb") as opened:
                for index in range(PARTS):
                    opened.seek(about.st_size * index // PARTS)
                    digest.update(opened.read(PART))
        except OSError:
            return None
    return digest.hexdigest() if total >= max(1, WORTHWHILE) else None


# Texts


class Recent(Generic[R]):
    """The last results of one network, forgotten when its weights have changed. A `size` of 0 keeps none."""

    size: int = 16

    def __init__(self) -> None:
        self._results: OrderedDict[Hashable, R] = OrderedDict()
        self._made_by: tuple[nn.Module, Any] | None = None

    def get(self, network: nn.Module, key: Hashable, compute: Callable[[], R]) -> R:
        """The result for this key: an earlier one, or what `compute` gives."""
        if self._made_by is None or self._made_by[0] is not network or not _same(self._made_by[1], network):
            self._results.clear()
            self._made_by = None
        if key in self._results:
            self._results.move_to_end(key)
            return self._results[key]
        made = compute()
        if self._made_by is None:
            self._made_by = network, _present(network)
        self._results[key] = made
        while len(self._results) > self.size:
            self._results.popitem(last=False)
        return made


def _present(network: nn.Module) -> Any:
    """What tells whether a network is the same later: how it is offloaded to files, whose changes are lost anyway, or
    how its weights look."""
    place = place_of(network)
    if place is not None and place.method == "enable_low_memory":
        return place
    return None if any(p.is_meta for p in network.parameters()) else Snapshot(network)


def _same(before: Any, network: nn.Module) -> bool:
    if isinstance(before, Snapshot):
        return before.holds(network)
    return before is not None and before is place_of(network)
