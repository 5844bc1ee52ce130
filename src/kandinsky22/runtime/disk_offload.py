"""A shelf made of files: weights that are not needed now are not in memory at all.

Networks that were loaded from a checkpoint and not changed since are read from it again. Others are written to a
temporary folder first. Changes that torch does not count, in place through `weight.data` or a numpy view, are noticed
if they concern one of the few numbers of a weight that are compared, as scalings, averages and merged adapters do; a
change to single numbers in its middle is not.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from kandinsky22.checkpoints.weights import find_weights, read_tensors, write_tensors
from kandinsky22.kernels import host_memory
from kandinsky22.kernels.linear import Packs
from kandinsky22.runtime.device_offload import drop_packs, plain

LARGE = 2**22  # bytes of a weight from which on its layer is worth a visit of its own

_SOURCE = "_source"  # attribute of a network that can be read again, in no state dict


class Snapshot:
    """The state that a network's weights are in."""

    def __init__(self, network: nn.Module) -> None:
        self._state = _state(network)
        self._few = [_few(p).clone() for p in network.parameters()]

    def holds(self, network: nn.Module) -> bool:
        """Whether the network has the same weights now, as far as can be seen without reading them all."""
        if self._state is None or self._state != _state(network):
            return False
        return all(torch.equal(few, _few(p)) for few, p in zip(self._few, network.parameters(), strict=True))


class _Source(Snapshot):
    """How to read a network again, and the state that its weights were in when it was read."""

    def __init__(self, read: Callable[[], nn.Module], network: nn.Module) -> None:
        super().__init__(network)
        self.read = read


def remember(network: nn.Module, read: Callable[[], nn.Module]) -> None:
    """Note that calling `read` gives this network once more, with the weights that it has now."""
    network.__dict__[_SOURCE] = _Source(read, network)


def unchanged(network: nn.Module) -> bool:
    """Whether the network has the weights that it was read with, as far as can be seen."""
    source: _Source | None = plain(network).__dict__.get(_SOURCE)
    return source is not None and source.holds(plain(network))


def _state(network: nn.Module) -> list[tuple[int, int, torch.device]] | None:
    """What tells of most changes: conversions and moves give a parameter other memory, changes in place count up its
    version. None if there are tensors of torch's inference mode, which count nothing."""
    parameters = list(network.parameters())
    if any(p.is_inference() for p in parameters):
        return None
    return [(p.data_ptr(), p._version, p.device) for p in parameters]


def _few(parameter: Tensor) -> Tensor:
    """The first and last number along each side: few, for weights may not have been read from their file yet."""
    return parameter.detach()[tuple(slice(None, None, max(1, side - 1)) for side in parameter.shape)]


class Visits:
    """Large layers of a network, each of whose weights is in memory only while the layer works.

    Weights that are mapped from a file come from there when they are read; after the layer's work their pages are given
    up again, and no rearranged copies are made. Weights that are in no file stay, but have no copies either. Pages can
    be given up on Linux only, so elsewhere there are no visits; and those of quantized layers, which are small, stay.
    """

    def __init__(self, network: nn.Module) -> None:
        kinds = (nn.Linear, nn.Conv2d) if sys.platform.startswith("linux") else ()
        layers = [m for m in network.modules() if isinstance(m, kinds) and m.weight.nbytes >= LARGE]
        self._handles = [layer.register_forward_hook(_leave) for layer in layers]
        self._packed = [layer for layer in layers if isinstance(layer, Packs) and "packing" not in layer.__dict__]
        for layer in self._packed:
            layer.packing = False

    def end(self) -> None:
        """Layers are as they were."""
        for handle in self._handles:
            handle.remove()
        for layer in self._packed:
            layer.__dict__.pop("packing", None)


def _leave(layer: nn.Module, *_: object) -> None:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    host_memory.forget(weight)


class InFiles:
    """A shelf in files: those that the network came from, or a temporary one in `folder` (the system's own if None).

    With `by_layer` large layers come and go one by one, see `Visits`.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None, *, by_layer: bool = True) -> None:
        self._folder, self._by_layer = folder, by_layer
        self._visits: Visits | None = None
        self._source: _Source | None = None
        self._written: tempfile.TemporaryDirectory[str] | None = None

    def put(self, network: nn.Module) -> None:
        """Let go of the network's weights. Changes made to them since they were fetched are lost."""
        if self._source is None and self._written is None:
            self._find_or_write(network)
        if self._by_layer and self._visits is None:
            self._visits = Visits(network)
        for module, name, _, parameter in _parameters(network):
            empty = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
            module._parameters[name] = empty
        drop_packs(network)
        host_memory.trim()

    def fetch(self, network: nn.Module) -> None:
        """Read them again, converted as they were when they were put here."""
        if self._source is not None:
            with torch.random.fork_rng(devices=()):  # so that nobody's random numbers depend on what was read when
                fresh = {path: p.detach() for _, _, path, p in _parameters(self._source.read())}
        else:
            assert self._written is not None
            files = find_weights(Path(self._written.name))
            fresh = {path: self._placed(tensor) for file in files for path, tensor in read_tensors(file)}
        for module, name, path, parameter in _parameters(network):
            module._parameters[name] = nn.Parameter(_laid_out(fresh[path], parameter), parameter.requires_grad)

    def close(self, network: nn.Module) -> None:
        """Leave the weights in memory: the shelf is not used any more."""
        if self._visits is not None:
            self._visits.end()
            self._visits = None
        if self._by_layer and self._written is not None:
            self._by_layer = False  # so that nothing is left of the file that goes now
            self.fetch(network)
        elif any(parameter.is_meta for parameter in network.parameters()):
            self.fetch(network)
        if self._source is not None:
            remember(network, self._source.read)
        if self._written is not None:
            self._written.cleanup()

    def _placed(self, tensor: Tensor) -> Tensor:
        # copied, for results depend (by rounding) on how weights are aligned, and in files they are not
        return tensor if self._by_layer and tensor.nbytes >= LARGE else tensor.clone()

    def _find_or_write(self, network: nn.Module) -> None:
        source: _Source | None = network.__dict__.get(_SOURCE)
        if source is not None and source.holds(network):
            self._source = source
            return
        self._written = tempfile.TemporaryDirectory(prefix="kandinsky22-", dir=self._folder, ignore_cleanup_errors=True)
        weights = {path: parameter for _, _, path, parameter in _parameters(network)}
        write_tensors(Path(self._written.name), weights, variant=None, max_shard_size="10GB", safe=True)


def _parameters(network: nn.Module) -> Iterator[tuple[nn.Module, str, str, nn.Parameter]]:
    """Each parameter with the module that has it, its name there, and its path from the network."""
    for prefix, module in plain(network).named_modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                yield module, name, f"{prefix}.{name}" if prefix else name, parameter


def _laid_out(tensor: Tensor, like: Tensor) -> Tensor:
    """The tensor with the type and strides of another, such as channels last."""
    if tensor.dtype == like.dtype and tensor.stride() == like.stride():
        return tensor
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype).copy_(tensor)
