"""One record per network for everything that the runtime knows about it besides its weights.

The record is an attribute of the network that no state dict contains: `state_of` returns it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

import torch
from torch import nn

from kandinsky22.checkpoints.fingerprint import TensorSample, WeightFingerprint
from kandinsky22.checkpoints.pinned_files import PinnedFiles
from kandinsky22.errors import InputError

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from kandinsky22.runtime.device_offload import Offloaded

_ATTRIBUTE = "_kandinsky22_state"
PARALLEL_WRAPPERS = ("DataParallel", "DistributedDataParallel")

N = TypeVar("N")


@dataclasses.dataclass(frozen=True)
class NetworkSource:
    """The checkpoint that a network was read from.

    Attributes:
        load: Reads the network again.
        fingerprint: State of the weights right after they were read.
        files_digest: Digest of its weight files when they were read (`checkpoints.fingerprint.files_digest`); None if
            they have none.
        dtype: Type of the weights after loading; None if unknown.
        samples: Returns the samples of the weights (`checkpoints.fingerprint.weight_samples`) once they were read;
            before that, None.
        unread_files: Files of the weights if these were not read when the network was made; None if they were.
    """

    load: Callable[[], nn.Module]
    fingerprint: WeightFingerprint
    files_digest: str | None = None
    dtype: torch.dtype | None = None
    samples: Callable[[], list[TensorSample] | None] = lambda: None
    unread_files: PinnedFiles | None = None

    def is_current(self, network: nn.Module) -> bool:
        """Return whether the network still has the weights that were read, as far as its fingerprint shows.

        Args:
            network: The network that was read from this source.
        """
        return self.fingerprint.matches(network)


class LoadedAdapters(Protocol):
    """The adapters of one network, as far as the runtime has to know of them."""

    @property
    def names(self) -> list[str]:
        """Names of the loaded adapters, applied or not."""


class Engine(Protocol):
    """Interface of an engine that runs a network instead of PyTorch."""

    def check(self, name: str, component: Any, network: nn.Module) -> None:
        """Check that the network is still the one that was exported.

        Args:
            name: Name of the component.
            component: The component as a pipeline has it.
            network: The network inside of wrappers.

        Raises:
            InputError: If it is not.
        """


@dataclasses.dataclass
class NetworkState:
    """Everything that the runtime knows about one network besides its weights.

    Attributes:
        source: The checkpoint it was read from; None for a network that was created in memory.
        adapters: Its adapters; None for a network that never had one.
        offload: How it is offloaded; None for a network that is not.
        quantization: One of `runtime.quantize.KINDS`; None for a network with its original weights.
        engine: What runs it in pipelines instead of PyTorch; None for PyTorch.
        compile_hooks: Hooks that mark the beginning of a step for CUDA graphs.
    """

    source: NetworkSource | None = None
    adapters: LoadedAdapters | None = None
    offload: Offloaded | None = None
    quantization: str | None = None
    engine: Engine | None = None
    compile_hooks: list[RemovableHandle] = dataclasses.field(default_factory=list)

    def __getstate__(self) -> dict[str, Any]:
        # The weights of a copy or a pickle were not read from a file, and were not exported. Its hooks are copied with
        # it and stay described.
        return {**vars(self), "source": None, "engine": None}


def unwrapped(network: N) -> N:
    """Return the network inside wrappers: those of `torch.compile`, of data parallelism and of adapter libraries.

    Args:
        network: Any module, or another component of a pipeline, which is returned as it is.
    """
    inner: Any = network
    while isinstance(inner, nn.Module):
        wrapped = inner.__dict__.get("_orig_mod", inner._modules.get("_orig_mod"))
        if wrapped is None and type(inner).__name__ in PARALLEL_WRAPPERS:
            wrapped = inner._modules.get("module")
        base_model: Any = getattr(type(inner), "get_base_model", None)
        if wrapped is None and base_model is not None:  # a PeftModel
            wrapped = base_model(inner)
        if not isinstance(wrapped, nn.Module) or wrapped is inner:
            break
        inner = wrapped
    return cast(N, inner)


def state_of(network: nn.Module) -> NetworkState:
    """Return the record of a network for reading; an empty one, not attached to it, if it has none.

    Args:
        network: Any module; the wrapper of a compiled network shares the record of the network inside.
    """
    state: NetworkState | None = unwrapped(network).__dict__.get(_ATTRIBUTE)
    return NetworkState() if state is None else state


def attached_state(network: nn.Module) -> NetworkState:
    """Return the record of a network for writing, attaching an empty one if it has none. It is part of no state dict.

    Args:
        network: Any module; the wrapper of a compiled network shares the record of the network inside.
    """
    state: NetworkState = unwrapped(network).__dict__.setdefault(_ATTRIBUTE, NetworkState())
    return state


def check_run_by_torch(components: Mapping[str, Any], method: str) -> None:
    """Check that PyTorch runs all networks, before a method that changes how it does.

    Args:
        components: Components of a pipeline by name; those that are not networks, or not loaded yet, do not count.
        method: The method, for the message.

    Raises:
        InputError: If OpenVINO runs one of them.
    """
    for name, component in components.items():
        if isinstance(component, nn.Module) and state_of(component).engine is not None:
            raise InputError(f"{method} has no effect on {name}, which runs by OpenVINO: call to_torch() first")


def record_source(
    network: nn.Module,
    load: Callable[[], nn.Module],
    *,
    files_digest: str | None = None,
    dtype: torch.dtype | None = None,
    samples: Callable[[], list[TensorSample] | None] = lambda: None,
    unread_files: PinnedFiles | None = None,
) -> None:
    """Record the checkpoint that the current weights of a network were read from.

    Args:
        network: A network that was just read.
        load: Reads the same network again.
        files_digest: Digest of its weight files when they were read (`checkpoints.fingerprint.files_digest`); None if
            they have none.
        dtype: Type of the weights after loading; None if unknown.
        samples: Returns the samples of the weights once they were read, before that None.
        unread_files: Files of the weights if these are still to be read; None if they were read.
    """
    network = unwrapped(network)
    source = NetworkSource(load, WeightFingerprint(network), files_digest, dtype, samples, unread_files)
    attached_state(network).source = source


def is_unread(network: nn.Module) -> bool:
    """Return whether the weights of a network were left in their files, to be read when it first runs.

    Args:
        network: Any module.
    """
    return unread_files(network) is not None


def unread_files(network: nn.Module) -> PinnedFiles | None:
    """Return the files in which the weights of a network were left until it first runs; None if they were read.

    Args:
        network: Any module.
    """
    source = state_of(network).source
    if source is None or not all(parameter.is_meta for parameter in network.parameters()):
        return None
    return source.unread_files
