"""Offloading: networks whose weights are on their device only while they are used.

With `ModelOffload` one network at a time is on the device: the method that runs it moves its weights there from their
storage (the CPU's memory, or files), and the weights of the network that ran before back to theirs. With
`SequentialOffload` the layers of a network are moved one by one. Both hook `ENTRY_POINTS` besides `forward`, because
pipelines run networks by more methods than that.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kandinsky22.errors import MissingDependencyError
from kandinsky22.kernels.linear import drop_packed, packing_layers
from kandinsky22.kernels.locks import ObjectLock
from kandinsky22.runtime.network_locks import holding
from kandinsky22.runtime.network_state import attached_state, state_of, unwrapped

ENTRY_POINTS = ("encode_condition", "denoise", "post_process_latents", "encode", "decode")
"""Methods besides `forward` that run a network's layers or read its weights."""

LAYER_ENTRY_POINTS = ("scale_shift",)
"""Methods besides `forward` of layers inside a network that read their weights."""


class Offloaded(Protocol):
    """Offloading of one network."""

    @property
    def method(self) -> str:
        """Name of the pipeline's method that offloaded the network."""

    @property
    def device(self) -> torch.device:
        """Device that the network runs on."""

    @property
    def lock(self) -> ObjectLock:
        """Lock that a call holds: only one thread at a time may move weights."""

    def offload_alike(self, network: nn.Module) -> None:
        """Offload another network in the same way.

        Args:
            network: A network that is not offloaded.
        """

    def free(self) -> None:
        """Move everything that is still on the device back to its storage."""

    def remove(self, network: nn.Module) -> None:
        """Turn the network into an ordinary one on the CPU again.

        Args:
            network: The network that is offloaded.
        """


class WeightStorage(Protocol):
    """Storage of one network's weights while it is not used."""

    def offload(self, network: nn.Module) -> None:
        """Move the weights from the device to the storage.

        Args:
            network: The network that owns the weights.
        """

    def onload(self, network: nn.Module) -> None:
        """Move the weights from the storage to the device.

        Args:
            network: The network that owns the weights.
        """

    def close(self, network: nn.Module) -> None:
        """Leave the weights in the CPU's memory; the storage is not used afterwards.

        Args:
            network: The network that owns the weights.
        """


def offload_of(network: nn.Module) -> Offloaded | None:
    """Return how a network is offloaded, None if it is not.

    Args:
        network: Any module, compiled or not.
    """
    return state_of(network).offload


def remove_offload(network: nn.Module) -> None:
    """Turn a network into an ordinary one on the CPU again if it is offloaded.

    Args:
        network: Any module, compiled or not.
    """
    state = state_of(network)
    if state.offload is not None:
        state.offload.remove(unwrapped(network))
        state.offload = None


@contextlib.contextmanager
def weights_in_memory(network: nn.Module) -> Iterator[None]:
    """Return a context manager in which all weights of a network can be changed, and which offloads them again.

    Whole networks that wait in the CPU's memory need nothing. The weights of those that are offloaded to files, or by
    layers, are read.

    Args:
        network: Any module, compiled or not.

    Returns:
        The context manager.
    """
    offload = offload_of(network)
    if offload is None or offload.method == "enable_model_cpu_offload":
        yield
        return
    with offload.lock:
        remove_offload(network)
        try:
            yield
        finally:
            offload.offload_alike(network)


def accelerate_hooks() -> Any:
    """Import the module of accelerate's hooks.

    Returns:
        The module `accelerate.hooks`.

    Raises:
        MissingDependencyError: If accelerate is not installed.
    """
    if importlib.util.find_spec("accelerate") is None:
        raise MissingDependencyError(
            "offloading to the CPU needs accelerate, which is not installed: pip install 'kandinsky22[offload]'; "
            "enable_low_memory() works without it"
        )
    import accelerate.hooks

    return accelerate.hooks


# One network at a time


class ModelOffload:
    """Several networks of which one at a time is on the device.

    Attributes:
        method: Name of the pipeline's method that offloaded the networks.
        device: Device that the networks run on.
        lock: Lock of the thread that uses the networks.
    """

    def __init__(
        self, method: str, device: torch.device, make_storage: Callable[[], WeightStorage], *, use_accelerate: bool
    ) -> None:
        """Create the offload without networks.

        Args:
            method: Name of the pipeline's method that offloads the networks.
            device: Device that the networks run on.
            make_storage: Returns a new storage, for one network.
            use_accelerate: Whether accelerate's hooks call ours, so that other users of accelerate recognise the
                networks as offloaded.
        """
        self.method, self.device, self.lock = method, device, ObjectLock()
        self._make_storage, self._use_accelerate = make_storage, use_accelerate
        self._onloaded: list[tuple[OffloadHook, nn.Module]] = []

    @property
    def onloaded(self) -> list[nn.Module]:
        """The networks whose weights are on the device now."""
        return [network for _, network in self._onloaded]

    def add(self, network: nn.Module, *, stays_until_freed: bool = False) -> None:
        """Offload a network until it is called.

        Args:
            network: Any module, compiled or not.
            stays_until_freed: Whether the network, once it was called, stays on the device until `free`. It does not
                evict other networks then.
        """
        remove_offload(network)
        network = unwrapped(network)
        hook = OffloadHook(self, self._make_storage(), stays_until_freed)
        hook.storage.offload(network)
        attached_state(network).offload = hook
        if self._use_accelerate:
            accelerate_hooks().add_hook_to_module(network, hook)
            _hook_methods(network, hook, ENTRY_POINTS)
        else:  # weights in such a storage are invisible: `state_dict` has to load them too
            _hook_methods(network, hook, ("forward", "state_dict", *ENTRY_POINTS))

    def onload(self, hook: OffloadHook, network: nn.Module) -> None:
        """Move a network to the device, after those that it does not share it with have gone back to their storage.

        Args:
            hook: The hook of `network`.
            network: A network that was added.
        """
        if any(network is other for other in self.onloaded):
            return
        self._offload(self._evicted_by(hook, network))
        try:
            hook.storage.onload(network)
        except BaseException:  # too little memory, for example: the part that was moved must not stay
            hook.storage.offload(network)
            raise
        self._onloaded.append((hook, network))

    def _evicted_by(self, hook: OffloadHook, network: nn.Module) -> list[tuple[OffloadHook, nn.Module]]:
        """Return the entries that leave the device before a network comes."""
        return [] if hook.stays_until_freed else [entry for entry in self._onloaded if not entry[0].stays_until_freed]

    def free(self) -> None:
        """Move all networks back to their storage."""
        self._offload(self._onloaded)

    def discard(self, network: nn.Module) -> None:
        """Remove a network from those on the device, without moving it.

        Args:
            network: A network that was added.
        """
        self._onloaded = [entry for entry in self._onloaded if entry[1] is not network]

    def _offload(self, entries: Iterable[tuple[OffloadHook, nn.Module]]) -> None:
        for entry in list(entries):
            self._onloaded.remove(entry)
            entry[0].storage.offload(entry[1])


class OffloadHook:
    """Hook of one network in a `ModelOffload`; it has the interface that accelerate expects of its hooks.

    Attributes:
        group: The networks that share the device with this one.
        storage: Storage of this network's weights.
        stays_until_freed: See `ModelOffload.add`.
        no_grad: False, so that accelerate leaves torch's gradient mode alone.
    """

    no_grad = False

    def __init__(self, group: ModelOffload, storage: WeightStorage, stays_until_freed: bool) -> None:
        self.group, self.storage, self.stays_until_freed = group, storage, stays_until_freed

    @property
    def method(self) -> str:
        """Name of the pipeline's method that offloaded the network."""
        return self.group.method

    @property
    def device(self) -> torch.device:
        """Device that the network runs on."""
        return self.group.device

    @property
    def lock(self) -> ObjectLock:
        """Lock of the thread that uses the networks of the group."""
        return self.group.lock

    @property
    def execution_device(self) -> torch.device:
        """The same device, by the name that users of accelerate read."""
        return self.group.device

    def offload_alike(self, network: nn.Module) -> None:
        """Let another network share the device with this group.

        Args:
            network: A network that is not offloaded.
        """
        self.group.add(network)

    def free(self) -> None:
        """Move all networks of the group back to their storage."""
        self.group.free()

    def remove(self, network: nn.Module) -> None:
        """Turn the network into an ordinary one on the CPU again.

        Args:
            network: The network of this hook.
        """
        _unhook(network)
        self.storage.close(network)
        self.group.discard(network)

    def init_hook(self, network: nn.Module) -> nn.Module:
        """Return the network unchanged; accelerate calls this when it attaches the hook.

        Args:
            network: The network of this hook.
        """
        return network

    def detach_hook(self, network: nn.Module) -> nn.Module:
        """Return the network unchanged; accelerate calls this when it detaches the hook.

        Args:
            network: The network of this hook.
        """
        return network

    def pre_forward(self, network: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Move the network and its arguments to the device, before each call.

        Args:
            network: The network of this hook.
            *args: Positional arguments of the call.
            **kwargs: Keyword arguments of the call.

        Returns:
            The arguments, tensors among them on the device.
        """
        self.group.onload(self, network)
        return tuple(map(self._moved, args)), {name: self._moved(value) for name, value in kwargs.items()}

    def post_forward(self, network: nn.Module, output: Any) -> Any:
        """Return the output unchanged, after each call. The network stays: pipelines call it many times in a row.

        Args:
            network: The network of this hook.
            output: Result of the call.
        """
        return output

    def _moved(self, value: Any) -> Any:
        return value.to(self.device) if isinstance(value, Tensor) else value


# One layer at a time


class SequentialOffload:
    """A network whose weights are in the CPU's memory and whose layers are on the device one at a time.

    Attributes:
        method: Name of the pipeline's method that offloads networks like this.
        device: Device that the network runs on.
        lock: Lock of the thread that uses the network.
    """

    method = "enable_sequential_cpu_offload"

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        """Offload a network.

        Args:
            network: Any module, compiled or not.
            device: Device that the network runs on.
        """
        remove_offload(network)
        network = unwrapped(network).to("cpu")
        drop_packed(network)
        self.device, self.lock = device, ObjectLock()
        stored = dict(network.state_dict())
        # what the network computes with: its state dict has no adapters
        weights = {**stored, **{name: parameter.detach() for name, parameter in network.named_parameters()}}
        hooks = accelerate_hooks()
        # The first steps of accelerate.cpu_offload, which would also store a second copy of the weights map.
        hooks.add_hook_to_module(network, hooks.AlignDevicesHook(io_same_device=True))
        hooks.attach_align_device_hook(
            network,
            execution_device=device,
            offload=True,
            offload_buffers=bool(network._parameters),
            weights_map=weights,
            preload_module_classes=_classes_that_read_child_weights(network),
        )
        for layer in packing_layers(network):
            # a layer that leaves the device after each call would use its copy once
            layer.__dict__["pack_weights"] = False
        _hook_methods(network, network._hf_hook, ENTRY_POINTS)
        for module in network.modules():
            if hasattr(module, "_hf_hook"):
                _hook_methods(module, module._hf_hook, LAYER_ENTRY_POINTS)
        network.__dict__["state_dict"] = functools.partial(_copy_of, stored)
        attached_state(network).offload = self

    def offload_alike(self, network: nn.Module) -> None:
        """Offload another network to the same device.

        Args:
            network: A network that is not offloaded.
        """
        SequentialOffload(network, self.device)

    def free(self) -> None:
        """Do nothing: no layer stays on the device after its call."""

    def remove(self, network: nn.Module) -> None:
        """Turn the network into an ordinary one on the CPU again.

        Args:
            network: The network that is offloaded.
        """
        _unhook(network)
        network.to("cpu")  # buffers that no checkpoint contains were on the device all the time
        for layer in packing_layers(network):
            layer.__dict__.pop("pack_weights", None)
        empty_cache(self.device)


# Shared helpers


def reads_child_weights(module: nn.Module) -> bool:
    """Return whether a module reads the weights of its children itself instead of only calling them.

    Such classes say so by a class attribute `reads_child_weights = True`. Their weights are moved together, and their
    children are not quantized.

    Args:
        module: Any module.
    """
    return getattr(type(module), "reads_child_weights", False) is True


def has_offload_forward(module: nn.Module) -> bool:
    """Return whether the `forward` of an object is what offloading put there, around that of its class.

    Args:
        module: A module of a network that this module offloaded.
    """
    function = getattr(module.__dict__.get("forward"), "func", None)
    if function is _call_with_hook:
        return True
    original = getattr(module.__dict__.get("_old_forward"), "__func__", None)
    return getattr(function, "__module__", None) == "accelerate.hooks" and original is type(module).forward


def empty_cache(device: torch.device) -> None:
    """Return the memory that torch's allocator caches to the device.

    Args:
        device: Any device; one whose allocator has no cache is left alone.
    """
    backend: Any = getattr(torch, device.type, None)
    if hasattr(backend, "empty_cache"):
        backend.empty_cache()


def _hook_methods(network: nn.Module, hook: Any, names: Iterable[str]) -> None:
    """Have a hook's `pre_forward` and `post_forward` run around those of these methods that the network has."""
    for name in names:
        if hasattr(type(network), name):
            hooked = functools.partial(_call_with_hook, hook, network, name)
            network.__dict__[name] = functools.update_wrapper(hooked, getattr(type(network), name))


def _call_with_hook(hook: Any, network: nn.Module, name: str, *args: Any, **kwargs: Any) -> Any:
    with holding(hook.lock) if isinstance(hook, OffloadHook) else contextlib.nullcontext():
        args, kwargs = hook.pre_forward(network, *args, **kwargs)
        return hook.post_forward(network, getattr(type(network), name)(network, *args, **kwargs))


def _unhook(network: nn.Module) -> None:
    """Undo `_hook_methods` and the changes that accelerate made."""
    if hasattr(network, "_hf_hook"):
        accelerate_hooks().remove_hook_from_module(network, recurse=True)
        for module in network.modules():  # accelerate restores methods as attributes of the object
            for name in ("forward", *LAYER_ENTRY_POINTS):
                module.__dict__.pop(name, None)
    for name in ("forward", "state_dict", *ENTRY_POINTS):
        network.__dict__.pop(name, None)


def _copy_of(weights: dict[str, Tensor], *_args: Any, **_kwargs: Any) -> dict[str, Tensor]:
    """Replace `state_dict` for a network whose parameters are on the meta device."""
    return dict(weights)


def _classes_that_read_child_weights(network: nn.Module) -> list[str]:
    """Return class names, by which accelerate identifies modules that are moved together with their children."""
    return sorted({type(module).__name__ for module in network.modules() if reads_child_weights(module)})
