"""Caches of embeddings: that of an all-zero image, stored in a file, and the last text encodings, stored in memory."""

from __future__ import annotations

import contextlib
import hashlib
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from kandinsky22.checkpoints.atomic_files import atomic_write
from kandinsky22.checkpoints.cache_folder import cache_folder
from kandinsky22.checkpoints.fingerprint import WeightFingerprint, files_digest
from kandinsky22.checkpoints.weights import read_tensors
from kandinsky22.kernels import settings
from kandinsky22.kernels.locks import ObjectLock
from kandinsky22.kernels.modules import has_foreign_hooks, has_global_hooks
from kandinsky22.runtime.device_offload import Offloaded, has_offload_forward, offload_of
from kandinsky22.runtime.lazy_component import AnyNetwork, LazyComponent, loaded
from kandinsky22.runtime.network_state import state_of

R = TypeVar("R")

MIN_ENCODER_BYTES = 2**26  # smaller encoders run faster than a file is read
TEXT_CACHE_SIZE = 16  # text encodings in memory per pipeline


def encoder_files_digest(files: tuple[Path, ...]) -> str | None:
    """Return the digest of an image encoder's files, or None if the encoder is too small to cache its embedding.

    Args:
        files: Weight files of the encoder.
    """
    return files_digest(files, min_bytes=MIN_ENCODER_BYTES)


def cached_zero_embed(encoder: AnyNetwork, dtype: torch.dtype, compute: Callable[[], Tensor]) -> Tensor:
    """Return the embedding of an all-zero image, from a cache file if there is one.

    The embedding is a constant of the encoder's weights. It is stored in a file named by a digest of the encoder's
    files, so that a lazy encoder does not have to be loaded. Not cached are the embeddings of encoders that were not
    read from files, were modified since, have something attached to them (`has_attachments`), or are small (such as
    the embedded model's).

    Args:
        encoder: The image encoder.
        dtype: Type of the embedding.
        compute: Computes the embedding, (1, embedding_dim).

    Returns:
        The embedding, on the CPU if it was cached.
    """
    path = _cache_path(encoder, dtype)
    config: Any = encoder.config
    cached = _read(path, dtype, (1, config.projection_dim))
    if cached is not None:
        return cached
    is_lazy = isinstance(encoder, LazyComponent) and not encoder.is_loaded
    embed = compute()
    path = _cache_path(encoder, dtype, just_loaded=is_lazy)  # perhaps from newer files
    if path is not None and bool(embed.isfinite().all()):
        # An unwritable cache folder, whatever is wrong with it, disables the cache.
        with contextlib.suppress(Exception):
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as temporary:
                save_file({"embed": embed.detach().cpu().contiguous()}, temporary)
    return embed


def _cache_path(encoder: AnyNetwork, dtype: torch.dtype, *, just_loaded: bool = False) -> Path | None:
    """Return the cache file for this encoder, or None if its embedding cannot be cached.

    The weights of an encoder that was just loaded are those of its files, except for a deferred move or conversion.
    """
    root = cache_folder()
    if not settings.current().zero_embed_cache or root is None:
        return None
    if isinstance(encoder, LazyComponent) and not encoder.is_loaded:
        if has_global_hooks():  # they are hooks of the encoder too, once it is loaded
            return None
        digest, weights_dtype = encoder.files_digest(), encoder.dtype
    else:
        network = loaded(encoder)
        source = state_of(network).source
        if source is None or has_attachments(network) or not (just_loaded or source.is_current(network)):
            return None
        digest, weights_dtype = source.files_digest, source.dtype
        if isinstance(encoder, LazyComponent) and just_loaded:
            weights_dtype = encoder.dtype or weights_dtype
    if digest is None or weights_dtype is None:
        return None
    config: Any = encoder.config
    name = hashlib.sha256(f"{digest} {weights_dtype} {dtype} {config.image_size}".encode()).hexdigest()
    return root / "zero-image" / f"{name}.safetensors"


def _read(path: Path | None, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor | None:
    """Return the embedding in a cache file; None if there is none, or if it is not an embedding of this encoder."""
    if path is None:
        return None
    try:
        tensors = dict(read_tensors(path))
    except (OSError, ValueError):  # missing, unreadable, damaged; a name that no file can have
        return None
    embed = tensors.get("embed")
    if embed is None or embed.dtype != dtype or embed.shape != shape or not bool(embed.isfinite().all()):
        return None
    return embed.clone()  # the file may be replaced, or changed in place


class LastResults(Generic[R]):
    """The last results of one network, discarded when its weights change. Several threads may use it.

    The network itself is not kept in memory. A network that has something attached to it (`has_attachments`) computes
    each result again. Copies and pickles are empty.
    """

    def __init__(self) -> None:
        self._lock = ObjectLock()
        self._results: OrderedDict[Hashable, R] = OrderedDict()
        self._network: Callable[[], nn.Module | None] = _nothing
        self._state: WeightFingerprint | weakref.ref[Offloaded] | None = None

    def get(self, network: nn.Module, key: Hashable, compute: Callable[[], R]) -> R:
        """Return the result for a key.

        Args:
            network: The network that computes the result.
            key: Everything that the result depends on besides the network.
            compute: Computes the result if there is none.
        """
        if not settings.current().text_cache:
            return compute()
        with self._lock:
            self._discard_stale(network)
            result = self._results.get(key)
            if result is not None:
                self._results.move_to_end(key)
                return result
        result = compute()  # without the lock: other threads may compute other results
        with self._lock:
            self._discard_stale(network)
            if has_attachments(network):
                return result
            if self._network() is None:
                self._network, self._state = weakref.ref(network), _state(network)
            self._results[key] = result
            self._results.move_to_end(key)
            while len(self._results) > TEXT_CACHE_SIZE:
                self._results.popitem(last=False)
        return result

    def _discard_stale(self, network: nn.Module) -> None:
        if self._network() is not network or has_attachments(network) or not _is_unchanged(self._state, network):
            self._results.clear()
            self._network, self._state = _nothing, None

    def __reduce__(self) -> tuple[Any, ...]:
        return LastResults, ()


def has_attachments(network: nn.Module) -> bool:
    """Return whether a call of a network runs more than its classes define.

    That is the case if one of its modules has hooks, another `forward` or a compiled form. Offloading does not count.

    Args:
        network: Any module.
    """
    is_offloaded = offload_of(network) is not None
    return any(
        has_foreign_hooks(module)
        or module._compiled_call_impl is not None
        or ("forward" in module.__dict__ and not (is_offloaded and has_offload_forward(module)))
        for module in network.modules()
    )


def _nothing() -> None:
    """Stand for the reference to a network where there is none."""


def _state(network: nn.Module) -> WeightFingerprint | weakref.ref[Offloaded] | None:
    """Return what identifies the network's weights later.

    Changes to weights that are offloaded to files are lost anyway, so that the offloading itself identifies them.
    """
    offload = offload_of(network)
    if offload is not None and offload.method in ("enable_low_memory", "load_on_first_use"):
        return weakref.ref(offload)  # it may lead to the weights of other networks
    return None if any(parameter.is_meta for parameter in network.parameters()) else WeightFingerprint(network)


def _is_unchanged(state: WeightFingerprint | weakref.ref[Offloaded] | None, network: nn.Module) -> bool:
    if isinstance(state, WeightFingerprint):
        return state.matches(network)
    offload = None if state is None else state()
    return offload is not None and offload is offload_of(network)
