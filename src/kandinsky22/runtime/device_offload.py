"""Networks that take memory where they work only while they work.

The networks of a pipeline work one after the other. In `Stages` they take turns: whoever is called is fetched from its
shelf (the CPU's memory, or its file), and whoever worked before goes back to its own. With `Streamed` every layer comes
and goes by itself. Both watch `ENTRY_POINTS` too, for pipelines call networks by more than `forward`.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kandinsky22.errors import MissingDependencyError
from kandinsky22.kernels.linear import Packs

ENTRY_POINTS = ("encode_condition", "denoise", "post_process_latents", "encode", "decode")
"""Methods besides `forward` that run a network's layers or read its weights."""

# classes that look at their layers' weights themselves
READ_BY_PARENT = ["TimeEmbedding", "VectorQuantizer", "SpatialNorm"]

_PLACE = "_offloaded"  # attribute of an offloaded network, in no state dict


class Place(Protocol):
    """How a network is offloaded: by which method of the pipeline, and to work on which device."""

    @property
    def method(self) -> str:
        """Name of the pipeline's method that made it so."""

    @property
    def device(self) -> torch.device:
        """Where the network works."""

    def join(self, network: nn.Module) -> None:
        """Offload another network in the same way."""

    def free(self) -> None:
        """Take away from the device what waits there for its next turn."""

    def leave(self, network: nn.Module) -> None:
        """Make it an ordinary network on the CPU again."""


class Shelf(Protocol):
    """Where a network is while it does not work."""

    def put(self, network: nn.Module) -> None:
        """Take the network's weights away from where it works."""

    def fetch(self, network: nn.Module) -> None:
        """Bring them there."""

    def close(self, network: nn.Module) -> None:
        """Leave them on the CPU: the shelf is not used any more."""


def plain(network: nn.Module) -> nn.Module:
    """The network itself, if this is its compiled form."""
    inner: nn.Module = getattr(network, "_orig_mod", network)
    return inner


def place_of(network: nn.Module) -> Place | None:
    """How the network is offloaded, None if it is not."""
    place: Place | None = plain(network).__dict__.get(_PLACE)
    return place


def release(network: nn.Module) -> None:
    """Make it an ordinary network on the CPU again if it is offloaded."""
    place = place_of(network)
    if place is not None:
        place.leave(plain(network))
        del plain(network).__dict__[_PLACE]


def accelerate_hooks() -> Any:
    """The module of accelerate's hooks; raises MissingDependencyError without it."""
    if importlib.util.find_spec("accelerate") is None:
        raise MissingDependencyError(
            "offloading to the CPU needs accelerate, which is not installed: pip install 'kandinsky22[offload]'; "
            "enable_low_memory() works without it"
        )
    import accelerate.hooks

    return accelerate.hooks


# One network at a time


class Stages:
    """Networks that take turns on a device. `method` is the pipeline's that asked for it, each network gets a `shelf`.

    `accelerated` networks are watched by accelerate's hooks, the others by ours alone.
    """

    def __init__(self, method: str, device: torch.device, shelf: Callable[[], Shelf], *, accelerated: bool) -> None:
        self.method, self.device = method, device
        self._shelf, self._accelerated = shelf, accelerated
        self._working: list[tuple[Turn, nn.Module]] = []

    @property
    def working(self) -> list[nn.Module]:
        """The networks that are off their shelves now."""
        return [network for _, network in self._working]

    def add(self, network: nn.Module, *, lasting: bool = False) -> None:
        """Put a network on its shelf until it is called. One that is `lasting` then stays until `free`, and sends
        nobody away."""
        release(network)
        network = plain(network)
        turn = Turn(self, self._shelf(), lasting)
        turn.shelf.put(network)
        network.__dict__[_PLACE] = turn
        if self._accelerated:
            accelerate_hooks().add_hook_to_module(network, turn)
            _watch(network, turn, ENTRY_POINTS)
        else:  # on such shelves weights cannot be seen, so saving them is work too
            _watch(network, turn, ("forward", "state_dict", *ENTRY_POINTS))

    def enter(self, turn: Turn, network: nn.Module) -> None:
        """It is this network's turn."""
        if any(network is other for other in self.working):
            return
        if not turn.lasting:
            self._shelve(entry for entry in self._working if not entry[0].lasting)
        try:
            turn.shelf.fetch(network)
        except BaseException:  # such as too little memory: what has arrived would stay there
            turn.shelf.put(network)
            raise
        self._working.append((turn, network))

    def free(self) -> None:
        """All go back to their shelves."""
        self._shelve(self._working)

    def forget(self, network: nn.Module) -> None:
        """The network takes part no more."""
        self._working = [entry for entry in self._working if entry[1] is not network]

    def _shelve(self, entries: Iterable[tuple[Turn, nn.Module]]) -> None:
        for entry in list(entries):
            self._working.remove(entry)
            entry[0].shelf.put(entry[1])


class Turn:
    """A network's part in `Stages`; also has all that accelerate asks of a hook."""

    no_grad = False

    def __init__(self, stages: Stages, shelf: Shelf, lasting: bool) -> None:
        self.stages, self.shelf, self.lasting = stages, shelf, lasting

    @property
    def method(self) -> str:
        """Name of the pipeline's method that made it so."""
        return self.stages.method

    @property
    def device(self) -> torch.device:
        """Where the network works."""
        return self.stages.device

    @property
    def execution_device(self) -> torch.device:
        """The same, under the name by which accelerate's users look for it."""
        return self.stages.device

    def join(self, network: nn.Module) -> None:
        """Let another network take turns with these."""
        self.stages.add(network)

    def free(self) -> None:
        """Let all networks go back to their shelves."""
        self.stages.free()

    def leave(self, network: nn.Module) -> None:
        """Make it an ordinary network on the CPU again."""
        _unwatch(network)
        self.shelf.close(network)
        self.stages.forget(network)

    def init_hook(self, network: nn.Module) -> nn.Module:
        """Nothing is left to do when accelerate takes the hook."""
        return network

    def detach_hook(self, network: nn.Module) -> nn.Module:
        """Nor when it gives it up."""
        return network

    def pre_forward(self, network: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Before each call: the network is fetched, and tensors follow it."""
        self.stages.enter(self, network)
        return tuple(map(self._moved, args)), {name: self._moved(value) for name, value in kwargs.items()}

    def post_forward(self, network: nn.Module, output: Any) -> Any:
        """After each call: the network stays, for pipelines call the same one many times."""
        return output

    def _moved(self, value: Any) -> Any:
        return value.to(self.device) if isinstance(value, Tensor) else value


class InMemory:
    """A shelf in the CPU's memory, for networks that work on `device`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def put(self, network: nn.Module) -> None:
        """Take the network's weights away from where it works."""
        network.to("cpu")
        drop_packs(network)
        empty_cache(self._device)

    def fetch(self, network: nn.Module) -> None:
        """Bring them there."""
        network.to(self._device)

    def close(self, network: nn.Module) -> None:
        """Leave them on the CPU: the shelf is not used any more."""
        self.put(network)


# One layer at a time


class Streamed:
    """A network whose weights stay with the CPU, and of which one layer at a time is on the device that it works on."""

    method = "enable_sequential_cpu_offload"

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        release(network)
        network = plain(network).to("cpu")
        drop_packs(network)
        self.device = device
        weights = dict(network.state_dict())
        hooks = accelerate_hooks()
        # this is how accelerate.cpu_offload begins, which holds on to a second copy of what is said here
        hooks.add_hook_to_module(network, hooks.AlignDevicesHook(io_same_device=True))
        hooks.attach_align_device_hook(
            network,
            execution_device=device,
            offload=True,
            offload_buffers=bool(network._parameters),
            weights_map=weights,
            preload_module_classes=READ_BY_PARENT,
        )
        for layer in _packing(network):
            layer.packing = False  # a layer that is gone after the call would be packed for one product
        _watch(network, network._hf_hook, ENTRY_POINTS)
        network.__dict__["state_dict"] = functools.partial(_kept, weights)
        network.__dict__[_PLACE] = self

    def join(self, network: nn.Module) -> None:
        """Stream another network to the same device."""
        Streamed(network, self.device)

    def free(self) -> None:
        """Nothing waits on the device."""

    def leave(self, network: nn.Module) -> None:
        """Make it an ordinary network on the CPU again."""
        _unwatch(network)
        network.to("cpu")  # buffers that are in no checkpoint stayed on the device
        for layer in _packing(network):
            del layer.packing
        empty_cache(self.device)


# Common ground


def _watch(network: nn.Module, hook: Any, names: Iterable[str]) -> None:
    """Let a hook know before and after each call of the network's methods of these names."""
    for name in names:
        if hasattr(type(network), name):
            watched = functools.partial(_through, hook, network, name)
            network.__dict__[name] = functools.update_wrapper(watched, getattr(type(network), name))


def _through(hook: Any, network: nn.Module, name: str, *args: Any, **kwargs: Any) -> Any:
    args, kwargs = hook.pre_forward(network, *args, **kwargs)
    return hook.post_forward(network, getattr(type(network), name)(network, *args, **kwargs))


def _kept(weights: dict[str, Tensor], *args: Any, **kwargs: Any) -> dict[str, Tensor]:
    """In place of a network's `state_dict`, for whoever saves it."""
    return dict(weights)


def _unwatch(network: nn.Module) -> None:
    """Undo `_watch`, and what accelerate did."""
    if hasattr(network, "_hf_hook"):
        accelerate_hooks().remove_hook_from_module(network, recurse=True)
        for module in network.modules():  # where it puts each method back as an attribute of the object
            module.__dict__.pop("forward", None)
    for name in ("forward", "state_dict", *ENTRY_POINTS):
        network.__dict__.pop(name, None)


def _packing(network: nn.Module) -> Iterable[Packs]:
    return (module for module in network.modules() if isinstance(module, Packs))


def drop_packs(network: nn.Module) -> None:
    """Forget the packed copies of weights that layers made for CPUs."""
    for layer in _packing(network):
        layer.__dict__.pop("_pack", None)


def empty_cache(device: torch.device) -> None:
    """Give memory that torch keeps for later back to the device."""
    backend: Any = getattr(torch, device.type, None)
    if hasattr(backend, "empty_cache"):
        backend.empty_cache()
