"""A network that is read from its files when it is first needed.

The image encoder of the published checkpoints is larger than all that text to image needs of the prior, and such calls
never run it. So what a checkpoint's loading gives in its place has the class and the config, and no weights: looking at
anything else, calling, moving, saving or copying it reads the files, and from then on it is an ordinary network.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

T = TypeVar("T")

enabled = True
"""False switches this off: everything is read when it is loaded."""

_SLEEP = "_sleep"
_UNASKED = {"_orig_mod", "_hf_hook"}  # what is looked for on any network, and absent from all that are new


class _Sleep:
    """How to wake a network, and what is to be done to it then."""

    def __init__(self, kind: type[nn.Module], read: Callable[[], nn.Module]) -> None:
        self.kind, self.read = kind, read
        self.dtype: torch.dtype | None = None
        self.moves: list[Callable[[Any], Any]] = []
        self.place: Callable[[Any], Any] | None = None


class _Asleep:
    """Comes before the network's own class until it wakes."""

    def __getattr__(self, name: str) -> Any:
        if name in _UNASKED or name.startswith("__") or not is_asleep(self):
            raise AttributeError(name)
        return getattr(wake(self), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(wake(self), name, value)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        network: Any = wake(self)
        return network(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return wake(self).__reduce_ex__(protocol)


@functools.cache
def _class_of(kind: Any) -> type[Any]:
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return type(kind.__name__, (_Asleep, kind), names)


def asleep(kind: Any, config: Any, read: Callable[[], nn.Module]) -> Any:
    """A network of this class and config whose weights, and all else, `read` gives when they are needed."""
    made = object.__new__(_class_of(kind))
    made.__dict__.update(config=config, **{_SLEEP: _Sleep(kind, read)})
    return made


def is_asleep(network: Any) -> bool:
    """Whether nothing but the config of this network is there."""
    return _SLEEP in getattr(network, "__dict__", ())


def wake(network: T) -> T:
    """Read the network now, if it is asleep; the same object."""
    if not is_asleep(network):
        return network
    sleep: _Sleep = network.__dict__[_SLEEP]
    with torch.random.fork_rng(devices=()):  # so that nobody's random numbers depend on what was read when
        read = sleep.read()
    network.__dict__.clear()
    object.__setattr__(network, "__class__", sleep.kind)
    network.__dict__.update(read.__dict__)
    for action in (*sleep.moves, *filter(None, [sleep.place])):
        action(network)
    return network


def move(network: nn.Module, device: torch.device | None, dtype: torch.dtype | None) -> None:
    """`network.to(...)`, at once or when it wakes."""
    if is_asleep(network):
        sleep: _Sleep = network.__dict__[_SLEEP]
        sleep.moves.append(lambda woken: woken.to(device=device, dtype=dtype))
        sleep.dtype = dtype or sleep.dtype
    else:
        network.to(device=device, dtype=dtype)


def settle(network: nn.Module, place: Callable[[Any], Any] | None) -> None:
    """Call `place` with the network, at once or when it wakes; None takes back what was settled before."""
    if is_asleep(network):
        network.__dict__[_SLEEP].place = place
    elif place is not None:
        place(network)


def coming_dtype(network: nn.Module) -> torch.dtype | None:
    """The type that a sleeping network was converted to."""
    dtype: torch.dtype | None = network.__dict__[_SLEEP].dtype
    return dtype
