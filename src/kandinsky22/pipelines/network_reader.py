"""Reading of a checkpoint's networks: at once, on first use, and again after an offload."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kandinsky22 import models
from kandinsky22.checkpoints.atomic_files import read_json
from kandinsky22.checkpoints.fingerprint import TensorSample, weight_samples
from kandinsky22.checkpoints.hub import embedded_fallback_folder
from kandinsky22.checkpoints.pinned_files import PinnedFiles
from kandinsky22.errors import KandinskyError
from kandinsky22.models.base import checked_dtype
from kandinsky22.pipelines import clip_files
from kandinsky22.pipelines.embedding_cache import encoder_files_digest
from kandinsky22.pipelines.load_options import LoadOptions, file_names, weight_paths
from kandinsky22.runtime.lazy_component import LazyComponent
from kandinsky22.runtime.network_state import record_source, state_of
from kandinsky22.runtime.prepared import PACKED_FILE

DEFERRED_BYTES = 2**28  # networks with smaller files are read at once

is_deferring: ContextVar[bool] = ContextVar("kandinsky22_deferred_weights", default=False)


@contextlib.contextmanager
def deferred_weights() -> Iterator[None]:
    """Return a context manager in which pipelines are loaded without the weights of large networks.

    `OffloadMixin.load_on_first_use` has to be called before such a pipeline is used.
    """
    token = is_deferring.set(True)
    try:
        yield
    finally:
        is_deferring.reset(token)


class NetworkReader:
    """Reads a network of a checkpoint, now and again later, from files that are opened when the reader is made.

    Args:
        network_class: Class of the network.
        folder: Folder of the network.
        options: How weights are loaded.

    Raises:
        CheckpointError: If a file is missing or cannot be opened.
    """

    def __init__(self, network_class: type[nn.Module], folder: Path, options: LoadOptions) -> None:
        self._class = network_class
        self._options = options.for_folder(folder)
        # Without weights, the network's own reading reports what the folder has.
        paths = _network_files(folder, self._options)
        self._files = PinnedFiles(folder, paths) if paths else None
        self._folder = folder
        self._digest: str | None = None
        self._keeps_samples = is_deferring.get()
        self._samples: list[TensorSample] | None = None

    def lazy(self) -> LazyComponent | None:
        """Return the network as a component that is loaded on first use.

        The result is None if the files look damaged, so that eager loading reports the error.
        """
        if self._files is None:
            return None
        network_class: Any = self._class
        with self._files.folder() as folder:
            try:
                config = clip_files.tower_config(network_class, folder)
            except KandinskyError:
                return None
            files = [folder / path.name for path in self._files.paths if path.name != "config.json"]
            if not clip_files.is_readable_tower(network_class, config, files):
                return None
        self._name_origin(config)
        dtype = torch.float32 if self._options.torch_dtype is None else self._options.torch_dtype
        if dtype == "auto":
            dtype = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)
        return LazyComponent(
            network_class,
            config,
            self.load_and_record,
            files=tuple(path for path in self._files.paths if path.name != "config.json"),
            dtype=dtype if isinstance(dtype, torch.dtype) else None,
            files_digest=self.digest,
            # an offload reads the weights again when the network runs: here they would be read for nothing
            load_offloaded=self._deferred_or_loaded if self._keeps_samples else None,
        )

    def deferred(self) -> nn.Module | None:
        """Return the network with its weights on the meta device; they are read when it is onloaded.

        The files' headers are read and checked. The result is None for a network that is small, quantized or has no
        weights.
        """
        if self._files is None or sum(self._files.sizes) < DEFERRED_BYTES:
            return None
        network = self.load(replace(self._options, torch_dtype="auto"))  # which maps the weights, without reading them
        if state_of(network).quantization is not None:
            return None
        dtype = checked_dtype(self._options.torch_dtype)
        for module in network.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    empty = torch.empty_like(parameter, dtype=dtype or parameter.dtype, device="meta")
                    module._parameters[name] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
        is_own = isinstance(network, models.Model)
        dtype = next(network.parameters()).dtype
        if not is_own:
            network.config.dtype = dtype
        digest = None if is_own else self.digest()
        record_source(
            network,
            self._load_sampled,
            files_digest=digest,
            dtype=dtype,
            samples=lambda: self._samples,
            unread_files=self._files,
        )
        return network

    def _deferred_or_loaded(self) -> nn.Module:
        return self.deferred() or self.load_and_record()

    def _load_sampled(self) -> nn.Module:
        network = self.load()
        if self._samples is None and self._keeps_samples:
            self._samples = weight_samples(network)
        return network

    def load_and_record(self) -> nn.Module:
        """Load the network, and record how it is read again.

        Returns:
            The network.
        """
        network = self._load_sampled()
        if issubclass(self._class, models.Model):
            record_source(network, self.load, samples=lambda: self._samples)
        else:
            dtype = next(network.parameters()).dtype
            digest = self.digest()
            record_source(network, self.load, files_digest=digest, dtype=dtype, samples=lambda: self._samples)
        return network

    def load(self, options: LoadOptions | None = None) -> nn.Module:
        """Load the network.

        Args:
            options: How weights are loaded; None for the reader's own options.

        Returns:
            The network.

        Raises:
            CheckpointError: If the files do not fit the class.
        """
        options = options or self._options
        if self._files is None:
            return self._load_from(self._folder, options)
        with self._files.folder() as folder, clip_files.reading(self._class.__name__, folder):
            network = self._load_from(folder, options)
        self._name_origin(network)
        self._name_origin(getattr(network, "config", None))
        return network

    def _load_from(self, folder: Path, options: LoadOptions) -> nn.Module:
        if issubclass(self._class, models.Model):
            return self._class.from_pretrained(folder, **vars(options))
        tower_class: Any = self._class
        return clip_files.load_tower(tower_class, folder, weight_paths(folder, options), options.torch_dtype)

    def digest(self) -> str | None:
        """Return the digest of the weight files (`embedding_cache.encoder_files_digest`); None if they are small."""
        if self._files is None:
            return None
        if self._digest is None:
            with self._files.folder() as folder:
                self._digest = encoder_files_digest(tuple(weight_paths(folder, self._options)))
        return self._digest

    def _name_origin(self, named: Any) -> None:
        """Replace the name of the temporary folder by that of the checkpoint."""
        assert self._files is not None
        for attribute in ("_name_or_path", "name_or_path"):
            if isinstance(vars(named).get(attribute) if hasattr(named, "__dict__") else None, str):
                setattr(named, attribute, str(self._files.origin))


def _network_files(folder: Path, options: LoadOptions) -> list[Path]:
    """Return the config and the weight files of a network; an empty list if it has no weights.

    Shards that the embedded model shares with its decoder are in the decoder's folder.
    """
    selected = options.weight_files(file_names(folder))
    if not selected:
        return []
    names = ["config.json", PACKED_FILE, *selected]
    if selected[0].endswith(".json"):
        weight_map = read_json(folder / selected[0]).get("weight_map")
        listed = weight_map.values() if isinstance(weight_map, dict) else []
        names += [name for name in listed if isinstance(name, str) and Path(name).name == name]
    folders = [folder, *filter(None, [embedded_fallback_folder(folder)])]
    paths = (next((place / name for place in folders if os.path.isfile(place / name)), None) for name in names)
    return list(dict.fromkeys(path for path in paths if path is not None))
