"""CUDA graphs: the kernels of a denoising step are recorded once and replayed, instead of being launched one by one.

At small batch sizes a GPU finishes the kernels of a step faster than Python launches them. A replayed graph runs the
same kernels on the same values, so that results do not change.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from kandinsky22.errors import InputError
from kandinsky22.kernels.locks import ObjectLock
from kandinsky22.runtime.calls import check_idle
from kandinsky22.runtime.device_offload import offload_of

T = TypeVar("T")

WARM_UP_STEPS = 2  # steps before recording, in which libraries initialise and select algorithms
MAX_GRAPHS = 4  # recorded graphs per pipeline: each holds the features of a step


class CudaGraphMixin:
    """Mixin for pipelines with a UNet: enable and disable CUDA graphs."""

    _cuda_graphs: DenoisingGraphs | None = None

    @property
    def device(self) -> torch.device:
        """Device of the networks."""
        raise NotImplementedError

    def enable_cuda_graphs(self) -> None:
        """Record the UNet's step as a CUDA graph and replay it.

        The first call with a new size or batch size records a graph, which takes as long as three steps and holds the
        memory of a step's features. Later calls replay it. Results do not change. Feature caching and offloading
        exclude graphs, and so do hooks: steps run as usual then.
        Weights may change between calls, but must not be moved during one.

        Raises:
            InputError: If the networks are not on a CUDA device.
        """
        if self.device.type != "cuda":
            raise InputError(f"CUDA graphs need a CUDA device, but the networks are on {self.device}: move them first")
        check_idle(self, "CUDA graphs")
        self._cuda_graphs = DenoisingGraphs()

    def disable_cuda_graphs(self) -> None:
        """Run steps without CUDA graphs again, and free the memory of recorded ones."""
        check_idle(self, "CUDA graphs")
        self._cuda_graphs = None


class DenoisingGraphs:
    """Recorded graphs of denoising steps, the least recently used ones discarded first."""

    def __init__(self) -> None:
        self._graphs: OrderedDict[Hashable, _Graph] = OrderedDict()
        self._lock = ObjectLock()  # a graph has one set of inputs and outputs

    def bind(self, network: Any, condition: Any) -> Callable[[Tensor, Any], Tensor]:
        """Return the function (sample, timestep) -> prediction of a network with a condition.

        It replays a graph if the network is on a CUDA device and not offloaded, and runs the network otherwise.

        Args:
            network: A module with a method `denoise(sample, timestep, condition)` that depends on tensors only.
            condition: Result of the network's `encode_condition`.
        """
        if offload_of(network) is not None:
            return lambda sample, timestep: network.denoise(sample, timestep, condition)
        parameters = list(network.parameters())
        # A graph reads parameters and condition where they were when it was recorded.
        addresses = hash(tuple(parameter.data_ptr() for parameter in parameters))
        shapes = tuple((tensor.shape, tensor.dtype) for tensor in _tensors(condition))

        def denoise(sample: Tensor, timestep: Any) -> Tensor:
            if sample.device.type != "cuda":
                return network.denoise(sample, timestep, condition)
            timestep = torch.as_tensor(timestep, device=sample.device)
            key = (id(network), addresses, shapes, sample.shape, sample.dtype, timestep.shape, timestep.dtype)
            with self._lock:
                graph = self._graphs.get(key)
                if graph is None:
                    while len(self._graphs) >= MAX_GRAPHS:
                        self._graphs.popitem(last=False)
                    graph = self._graphs[key] = _Graph(network.denoise, sample, timestep, condition)
                self._graphs.move_to_end(key)
                return graph.replay(sample, timestep, condition)

        return denoise


class _Graph:
    """One recorded step, with the tensors that it reads and writes."""

    def __init__(self, step: Callable[..., Tensor], sample: Tensor, timestep: Tensor, condition: Any) -> None:
        self._step = step  # keeps the network alive, whose id is part of the key
        self._sample, self._timestep = sample.clone(), timestep.clone()
        self._condition = _map_tensors(condition, torch.clone)
        self._source = condition
        current, stream = torch.cuda.current_stream(sample.device), torch.cuda.Stream(sample.device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_STEPS):
                step(self._sample, self._timestep, self._condition)
        current.wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        self._replayed = torch.cuda.Event()
        # Other threads may use the device while this one records.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._output = step(self._sample, self._timestep, self._condition)

    def replay(self, sample: Tensor, timestep: Tensor, condition: Any) -> Tensor:
        """Run the step on other values of the same shapes."""
        stream = torch.cuda.current_stream(sample.device)
        stream.wait_event(self._replayed)  # the last replay may have been on another stream
        if condition is not self._source:
            for target, source in zip(_tensors(self._condition), _tensors(condition), strict=True):
                target.copy_(source)
            self._source = condition
        self._sample.copy_(sample)
        self._timestep.copy_(timestep)
        self._graph.replay()
        output = self._output.clone()  # the next replay overwrites it
        self._replayed.record(stream)
        return output


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested tuples and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _tensors(getattr(value, field.name))
    elif isinstance(value, tuple):
        for item in value:
            yield from _tensors(item)


def _map_tensors(value: T, function: Callable[[Tensor], Tensor]) -> T:
    """Return a copy of nested tuples and dataclasses with `function` applied to each tensor."""
    result: Any = value
    if isinstance(value, Tensor):
        result = function(value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {each.name: _map_tensors(getattr(value, each.name), function) for each in dataclasses.fields(value)}
        result = dataclasses.replace(value, **fields)
    elif isinstance(value, tuple):
        items = [_map_tensors(item, function) for item in value]
        result = type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return cast(T, result)
