"""Calls that run now: which thread runs which pipeline with which networks, and what has to wait or is refused.

Several threads may call one pipeline, or pipelines that share networks. Everything that a call changes belongs to the
call (`CallState`). What cannot be done in parallel is handled here:

- Calls with offloaded networks run one after another, because each of them moves weights.
- Methods that change networks, such as `to`, are refused while another thread's call uses these networks. Calls that
  begin during such a method wait until it ends.
- A `torch.Generator` serves one call at a time.
- A thread that used networks and then forked cannot run them in the new process, where it would wait forever.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar, cast

import torch
from torch import nn

from kandinsky22.errors import ForkError, InputError, invalid
from kandinsky22.runtime.device_offload import offload_of
from kandinsky22.runtime.lazy_component import LazyComponent, networks_in_memory
from kandinsky22.runtime.network_locks import holding
from kandinsky22.runtime.network_state import unwrapped

F = TypeVar("F", bound=Callable[..., Any])


@dataclasses.dataclass
class CallState:
    """Values of one call of one pipeline, which the pipeline shows as its attributes.

    Attributes:
        guidance_scale: Guidance scale of the coming steps.
        num_timesteps: Number of network evaluations of the call.
        active_scheduler: The call's copy of the scheduler; None before the steps are planned.
        interrupted: Whether the call ends after the current step.
    """

    guidance_scale: float = 1.0
    num_timesteps: int = 0
    active_scheduler: Any = None
    interrupted: bool = False


@dataclasses.dataclass(eq=False)
class _Use:
    """A call, or a method that changes networks, while it runs in a thread."""

    pipeline: Any
    name: str
    thread: int
    networks: dict[int, str]
    state: CallState = dataclasses.field(default_factory=CallState)
    generators: list[torch.Generator] = dataclasses.field(default_factory=list)


class _Registry:
    """All uses of networks in this process."""

    def __init__(self) -> None:
        self.reset()
        self.threads = threading.local()  # `used_networks` in threads that loaded or ran networks
        self.stale_thread: int | None = None  # the thread that forked, if it was one of these

    def reset(self) -> None:
        self.condition = threading.Condition(threading.RLock())
        self.calls: list[_Use] = []
        self.changes: list[_Use] = []

    def after_fork(self) -> None:
        """Keep the uses of the forking thread, the only one that exists in the new process."""
        calls, changes, thread = self.calls, self.changes, threading.get_ident()
        self.reset()
        self.calls = [call for call in calls if call.thread == thread]
        self.changes = [change for change in changes if change.thread == thread]
        self.stale_thread = thread if getattr(self.threads, "used_networks", False) else None


_registry = _Registry()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_registry.after_fork)


@contextlib.contextmanager
def running_call(pipeline: Any) -> Iterator[CallState]:
    """Return a context manager inside of which a call of a pipeline runs in this thread.

    Args:
        pipeline: The pipeline; its networks are its `components`.

    Raises:
        DeadlockError: If this call, inside of another one, waits for a thread that waits for this one.
        ForkError: See `check_fork`.
    """
    check_fork()
    _registry.threads.used_networks = True
    call = _Use(pipeline, "a call", threading.get_ident(), _networks(_parts(pipeline)))
    with _registry.condition:
        while _blocking(call, _registry.changes) is not None:
            _registry.condition.wait()
        _registry.calls.append(call)
    try:
        with contextlib.ExitStack() as stack:
            for lock in _offload_locks(_parts(pipeline)):
                stack.enter_context(holding(lock))
            stack.enter_context(_host_device())
            yield call.state
    finally:
        with _registry.condition:
            _registry.calls.remove(call)
            call.generators.clear()


def as_call(method: F) -> F:
    """Decorate a pipeline's method that runs networks as `__call__` does.

    Args:
        method: The method of a class with `components`.

    Returns:
        The method inside of `running_call`.
    """

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with running_call(self):
            return method(self, *args, **kwargs)

    return cast(F, call)


def current_state(pipeline: Any) -> CallState | None:
    """Return the state of the call of a pipeline that this thread runs; the innermost one of nested calls.

    Args:
        pipeline: The pipeline.

    Returns:
        None if this thread runs no call of the pipeline.
    """
    thread = threading.get_ident()
    with _registry.condition:
        calls = [call for call in _registry.calls if call.thread == thread and call.pipeline is pipeline]
    return calls[-1].state if calls else None


def running_states(pipeline: Any) -> list[CallState]:
    """Return the states of all running calls of a pipeline, of all threads.

    Args:
        pipeline: The pipeline.
    """
    with _registry.condition:
        return [call.state for call in _registry.calls if call.pipeline is pipeline]


def others_use(network: nn.Module) -> bool:
    """Return whether a call in another thread uses a network.

    Args:
        network: A network of the call in this thread.
    """
    thread, key = threading.get_ident(), id(unwrapped(network))
    with _registry.condition:
        return any(call.thread != thread and key in call.networks for call in _registry.calls)


def claim_generators(pipeline: Any, generators: Iterable[Any]) -> None:
    """Reserve generators for the call of a pipeline that this thread runs, until it ends.

    The numbers that a call draws would otherwise depend on the timing of the threads.

    Args:
        pipeline: The pipeline.
        generators: Generators of the call; anything else among them is left alone.

    Raises:
        InputError: If a call in another thread uses one of them.
    """
    thread = threading.get_ident()
    generators = [generator for generator in generators if isinstance(generator, torch.Generator)]
    with _registry.condition:
        used = [each for call in _registry.calls if call.thread != thread for each in call.generators]
        for generator in generators:
            if any(generator is other for other in used):
                advice = "the numbers that each of them draws would depend on timing"
                expected = "a generator that no running call in another thread uses"
                raise invalid("generator", generator, expected, advice)
        for call in reversed(_registry.calls):
            if call.thread == thread and call.pipeline is pipeline:
                call.generators.extend(generators)
                break


# Methods that change networks


def changes_networks(method: F) -> F:
    """Decorate a pipeline's method that changes its networks, so that no call in another thread sees the change.

    Args:
        method: The method of a class with `components`.

    Returns:
        The method. It raises InputError while a call in another thread uses one of the networks. Calls that begin while
        it runs wait for its end.
    """

    @functools.wraps(method)
    def exclusive(self: Any, *args: Any, **kwargs: Any) -> Any:
        with changing(self, f"{method.__name__}()"):
            return method(self, *args, **kwargs)

    return cast(F, exclusive)


@contextlib.contextmanager
def changing(pipeline: Any, name: str, components: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Return a context manager inside of which this thread may change networks.

    Args:
        pipeline: The pipeline.
        name: What changes them, for messages, such as "to()".
        components: The components that change; None for all of the pipeline.

    Raises:
        InputError: If a call in another thread uses one of the networks.
    """
    networks = _networks(_parts(pipeline) if components is None else components)
    change = _Use(pipeline, name, threading.get_ident(), networks)
    with _registry.condition:
        call = _blocking(change, _registry.calls)
        if call is not None:
            raise InputError(
                f"{name} cannot run now: a call of {type(call.pipeline).__name__} in another thread uses "
                f"{_shared_name(change, call)}; wait until the call ends"
            )
        while _blocking(change, _registry.changes) is not None:
            _registry.condition.wait()
        _registry.changes.append(change)
    try:
        yield
    finally:
        with _registry.condition:
            _registry.changes.remove(change)
            _registry.condition.notify_all()


def check_idle(pipeline: Any, change: str) -> None:
    """Check that no call of a pipeline runs in another thread.

    Args:
        pipeline: The pipeline.
        change: What is about to be changed, for messages, such as "unet".

    Raises:
        InputError: If one does.
    """
    thread = threading.get_ident()
    with _registry.condition:
        running = any(call.pipeline is pipeline and call.thread != thread for call in _registry.calls)
    if running:
        kind = type(pipeline).__name__
        raise InputError(
            f"{change} cannot be changed now: a call of this {kind} runs in another thread; wait until it ends, or "
            f"give each thread a pipeline around the same networks: {kind}.from_pipe(pipe)"
        )


def _blocking(use: _Use, others: Iterable[_Use]) -> _Use | None:
    """Return a use of the same networks by another thread."""
    return next((each for each in others if each.thread != use.thread and use.networks.keys() & each.networks), None)


def _shared_name(use: _Use, other: _Use) -> str:
    """Return the name of a network that both use."""
    return next(name for key, name in use.networks.items() if key in other.networks)


def _parts(pipeline: Any) -> Mapping[str, Any]:
    """Return the components of a pipeline, and the networks that it uses besides them."""
    parts: Mapping[str, Any] = getattr(pipeline, "_parts", None) or pipeline.components
    return parts


def _networks(components: Mapping[str, Any]) -> dict[int, str]:
    """Return the names of networks by identity. One that is loaded later is identified by its `LazyComponent` too."""
    networks = {id(unwrapped(network)): name for name, network in networks_in_memory(components).items()}
    return networks | {id(part): name for name, part in components.items() if isinstance(part, LazyComponent)}


def _offload_locks(components: Mapping[str, Any]) -> list[Any]:
    """Return the locks of offloaded networks, in an order that is the same in all threads.

    The lock of a network that will be offloaded when it is loaded stands for that of the network.
    """
    offloads = [offload_of(network) for network in networks_in_memory(components).values()]
    locks = {offload.lock.number: offload.lock for offload in offloads if offload is not None}
    lazy = [part for part in components.values() if isinstance(part, LazyComponent) and part.will_be_offloaded]
    locks |= {part.lock.number: part.lock for part in lazy}
    return [locks[number] for number in sorted(locks)]


def _host_device() -> contextlib.AbstractContextManager[Any]:
    """Return a context manager in which new tensors are on the CPU, whatever `torch.set_default_device` says.

    Networks and inputs name their device; everything else is computed on the CPU.
    """
    default: torch.device = (
        torch.get_default_device() if hasattr(torch, "get_default_device") else torch.empty(0).device
    )
    return contextlib.nullcontext() if default.type == "cpu" else torch.device("cpu")


# Forked processes


@contextlib.contextmanager
def loading_networks() -> Iterator[None]:
    """Return a context manager for reading networks into the CPU's memory, whatever torch's default device is.

    OpenMP may start threads for this one meanwhile, see `check_fork`.
    """
    _registry.threads.used_networks = True
    with _host_device():
        yield


def check_fork() -> None:
    """Check that this thread can run networks after a fork.

    OpenMP keeps threads for each thread that computes in parallel. They do not survive a fork, and OpenMP waits for
    them forever. There are none to wait for if torch uses a single thread, as in the workers of a DataLoader, or in a
    thread that was started after the fork.

    Raises:
        ForkError: If this thread used networks, forked, and runs in the new process, and torch uses several threads.
    """
    # torch initialises the number of threads here. Otherwise a new thread's first operation would do so, unless that is
    # one of oneDNN, which would run with another number of threads and round differently.
    threads = torch.get_num_threads()
    if threads > 1 and _registry.stale_thread == threading.get_ident():
        raise ForkError(
            f"this process was forked after networks had been loaded or had run, and {threads} threads of torch would "
            "wait forever here: start processes by multiprocessing.get_context('spawn') or 'forkserver', fork before "
            "networks are loaded, or call torch.set_num_threads(1) in the new process"
        )
