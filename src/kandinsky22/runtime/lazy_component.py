"""Lazy loading: a component whose files are read when it is first used.

The image encoder of the published checkpoints is larger than everything else that text to image needs from the prior
pipeline, and such calls never run it. A pipeline therefore holds a `LazyComponent` with its class and config, and loads
the network on first use.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias, TypeVar, overload

import torch
from torch import nn

from kandinsky22.kernels.locks import ObjectLock, global_rng_restored
from kandinsky22.runtime.network_locks import holding

T = TypeVar("T")

# Attributes of a LazyComponent itself; all others are those of the network.
OWN_ATTRIBUTES = {
    "component_class",
    "config",
    "files",
    "files_digest",
    "_dtype",
    "_load",
    "_load_offloaded",
    "_network",
    "_conversions",
    "_offload",
    "lock",
    "will_be_offloaded",
}


class LazyComponent:
    """A network of a checkpoint that is not loaded yet.

    Calling it, or reading an attribute that is not one of these, loads the network and forwards to it.

    Attributes:
        component_class: Class of the network.
        config: Its configuration.
        files: The weight files it will be read from, as absolute paths. They are open already, so that moving,
            replacing or deleting them changes nothing.
        files_digest: Returns the digest of these files; None if they are too small for one.
        lock: Held while the network is loaded, moved or offloaded.
    """

    def __init__(
        self,
        component_class: type[nn.Module],
        config: Any,
        load: Callable[[], nn.Module],
        *,
        files: tuple[Path, ...] = (),
        dtype: torch.dtype | None = None,
        files_digest: Callable[[], str | None] = lambda: None,
        load_offloaded: Callable[[], nn.Module] | None = None,
    ) -> None:
        self.component_class, self.config, self.files = component_class, config, files
        self.files_digest = files_digest
        self._dtype = dtype
        self._load, self._load_offloaded = load, load_offloaded or load
        self._network: nn.Module | None = None
        self._conversions: list[dict[str, Any]] = []
        self._offload: Callable[[nn.Module], Any] | None = None
        self.lock = ObjectLock()

    @property
    def dtype(self) -> torch.dtype | None:
        """Floating-point type of the weights, or that they will have once loaded; None if unknown."""
        if self._network is None:
            return self._dtype
        return next((p.dtype for p in self._network.parameters() if p.is_floating_point()), self._dtype)

    @property
    def will_be_offloaded(self) -> bool:
        """Whether loading the network offloads it."""
        return self._network is None and self._offload is not None

    @property
    def is_loaded(self) -> bool:
        """Whether the files were read."""
        return self._network is not None

    def load(self) -> nn.Module:
        """Return the network, reading its files on the first call.

        Moves, conversions and offloading that were requested before are applied then.

        Returns:
            The same network on every call.

        Raises:
            CheckpointError: If the files cannot be read.
        """
        with holding(self.lock):
            if self._network is None:
                # The user's random numbers, and the mode of later calls, must not depend on when this runs.
                with global_rng_restored(), torch.inference_mode(False):
                    network = self._load() if self._offload is None else self._load_offloaded()
                for conversion in self._conversions:
                    network.to(**conversion)
                if self._offload is not None:
                    self._offload(network)
                self._network = network
            return self._network

    def defer_to(self, device: torch.device | None, dtype: torch.dtype | None) -> None:
        """Apply `network.to(device, dtype)` now, or right after loading.

        Args:
            device: Where to move it; None leaves it where it is.
            dtype: Floating-point type to convert to; None leaves the type.
        """
        with holding(self.lock):
            if self._network is not None:
                self._network.to(device=device, dtype=dtype)
            else:
                self._conversions.append({"device": device, "dtype": dtype})
            self._dtype = dtype or self._dtype

    def defer_offload(self, offload: Callable[[nn.Module], Any] | None) -> None:
        """Offload the network now, or right after loading.

        Args:
            offload: Called with the network; None cancels what was requested before loading.
        """
        with holding(self.lock):
            if self._network is None:
                self._offload = offload
            elif offload is not None:
                offload(self._network)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in OWN_ATTRIBUTES:
            super().__setattr__(name, value)
        else:
            setattr(self.load(), name, value)

    def __getattr__(self, name: str) -> Any:
        # Protocol lookups (copying, pickling, compiled wrappers, accelerate's hooks) must not read gigabytes.
        if name.startswith("__") or name in ("_orig_mod", "_hf_hook"):
            raise AttributeError(name)
        return getattr(self.load(), name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the network, loading it first.

        Args:
            *args: Positional arguments of the network.
            **kwargs: Keyword arguments of the network.

        Returns:
            The network's result.
        """
        return self.load()(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        return copy.deepcopy(self.load(), memo)

    def __reduce__(self) -> tuple[Any, ...]:
        return _identity, (self.load(),)

    def __repr__(self) -> str:
        return f"LazyComponent({self.component_class.__name__}, {'loaded' if self.is_loaded else 'not loaded'})"


AnyNetwork: TypeAlias = "nn.Module | LazyComponent"


@overload
def loaded(component: LazyComponent) -> nn.Module: ...
@overload
def loaded(component: T) -> T: ...
def loaded(component: Any) -> Any:
    """Return the component itself, or the network that a `LazyComponent` loads.

    Args:
        component: Any component of a pipeline.
    """
    return component.load() if isinstance(component, LazyComponent) else component


def networks_in_memory(components: Mapping[str, Any]) -> dict[str, nn.Module]:
    """Return the networks among components by name, without those that are not loaded yet.

    Args:
        components: Components of a pipeline by name.
    """
    networks = {
        name: component._network if isinstance(component, LazyComponent) else component
        for name, component in components.items()
    }
    return {name: network for name, network in networks.items() if isinstance(network, nn.Module)}


def _identity(network: nn.Module) -> nn.Module:
    return network
