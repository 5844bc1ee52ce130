"""Networks of a pipeline whose weights are read when they first run."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from kandinsky22.checkpoints.pinned_files import PinnedFiles
from kandinsky22.kernels import host_memory
from kandinsky22.runtime.device_offload import ModelOffload, OffloadHook, WeightStorage
from kandinsky22.runtime.network_state import unread_files
from kandinsky22.runtime.prepared import PACKED_FILE

WEIGHT_COPIES = 2.2  # memory of a network that runs, in relation to its weights: these, packed copies, and features


class LoadingOnFirstUse(ModelOffload):
    """Networks whose weights are read when they first run.

    They stay in memory afterwards, unless each is used once, or the memory does not suffice for the next one. While the
    first network runs, the system reads the files of the others into its cache.
    """

    def __init__(self, make_storage: Callable[[], WeightStorage], *, used_once: bool) -> None:
        """Create the group without networks.

        Args:
            make_storage: Returns a new storage, for one network.
            used_once: Whether a network leaves memory when the next one runs, and at the end of each call.
        """
        super().__init__("load_on_first_use", torch.device("cpu"), make_storage, use_accelerate=False)
        self._used_once = used_once
        self._added: list[nn.Module] = []

    def add(self, network: nn.Module, *, stays_until_freed: bool = False) -> None:
        """Leave the weights of a network in its files until it is called.

        Args:
            network: Any module, compiled or not.
            stays_until_freed: See `ModelOffload.add`.
        """
        super().add(network, stays_until_freed=stays_until_freed)
        self._added.append(network)

    def onload(self, hook: OffloadHook, network: nn.Module) -> None:
        """Read the weights of a network, after others have left memory if they have to.

        Args:
            hook: The hook of `network`.
            network: A network that was added.
        """
        super().onload(hook, network)
        files = [files for each in self._added if (files := unread_files(each)) is not None]
        self._added.clear()
        _read_ahead(files)

    def _evicted_by(self, hook: OffloadHook, network: nn.Module) -> list[tuple[OffloadHook, nn.Module]]:
        needed = WEIGHT_COPIES * sum(parameter.nbytes for parameter in network.parameters())
        return list(self._onloaded) if self._used_once or needed > host_memory.available_bytes() else []

    def free(self) -> None:
        """Drop the weights at the end of a call if networks are used once."""
        if self._used_once:
            super().free()


def _read_ahead(files: Sequence[PinnedFiles]) -> None:
    """Let the system read files into its cache in the background, if they take at most half of the free memory."""
    selected = [(each, _needed(each)) for each in files]
    size = sum(sum(paths.values()) for _, paths in selected)
    if not size or 2 * size > host_memory.available_bytes():
        return

    def read() -> None:
        with contextlib.suppress(OSError):
            for each, paths in selected:
                each.read_ahead(paths)

    threading.Thread(target=read, name="kandinsky22-read-ahead", daemon=True).start()


def _needed(files: PinnedFiles) -> dict[Path, int]:
    """Return the files that are read completely, with their sizes: of a prepared network those of packed weights."""
    sizes = dict(zip(files.paths, files.sizes, strict=True))
    packed = {path: size for path, size in sizes.items() if path.name == PACKED_FILE}
    return packed or sizes
