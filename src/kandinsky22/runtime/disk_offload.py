"""Disk offload: weights of networks that are not used are in files only, not in memory.

Networks that were loaded from a checkpoint and not changed since are read from it again. Others are written to a
temporary folder first. `WeightFingerprint` says which changes are noticed.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from kandinsky22.checkpoints.fingerprint import WeightFingerprint
from kandinsky22.checkpoints.weights import find_weight_files, read_tensors, write_weight_files
from kandinsky22.kernels import host_memory
from kandinsky22.kernels.linear import drop_packed, move_packed, packing_layers
from kandinsky22.kernels.locks import global_rng_restored
from kandinsky22.kernels.modules import internal_hook
from kandinsky22.runtime.network_state import NetworkSource, attached_state, is_unread, state_of, unwrapped

LARGE = 2**22  # smallest weight, in bytes, that is in memory only while its layer runs


class PerLayerLoading:
    """Large layers of a network, each of which has its weight in memory only while it runs.

    The weight of such a layer is mapped from a file. The system reads it when the layer runs; afterwards its pages are
    dropped. The layer makes no packed copy. Converted weights are not mapped and stay in memory, without packed copies
    either. Pages can be dropped on Linux only, so on other systems this does nothing. Quantized layers are not
    affected.
    """

    def __init__(self, network: nn.Module) -> None:
        """Begin to load layers one by one.

        Args:
            network: The network that owns the layers.
        """
        layer_types = (nn.Linear, nn.Conv2d) if sys.platform.startswith("linux") else ()
        layers = [m for m in network.modules() if isinstance(m, layer_types) and m.weight.nbytes >= LARGE]
        self._handles = [layer.register_forward_hook(_drop_pages) for layer in layers]
        packing = {id(layer) for layer in packing_layers(network)}
        self._unpacked = [layer for layer in layers if id(layer) in packing and "pack_weights" not in layer.__dict__]
        for layer in self._unpacked:
            layer.__dict__["pack_weights"] = False

    def end(self) -> None:
        """Restore the layers."""
        for handle in self._handles:
            handle.remove()
        for layer in self._unpacked:
            layer.__dict__.pop("pack_weights", None)


class DiskStorage:
    """Storage of one network's weights in files: those that it was read from, or a temporary one."""

    def __init__(self, folder: str | os.PathLike[str] | None = None, *, by_layer: bool = True) -> None:
        """Create a storage that reads or writes nothing yet.

        Args:
            folder: Where a temporary file is written if there is need of one; None for the system's temporary folder.
            by_layer: Whether large layers are loaded one by one (`PerLayerLoading`) while the network is used.
        """
        self._folder, self._by_layer = folder, by_layer
        self._per_layer: PerLayerLoading | None = None
        self._source: NetworkSource | None = None
        self._temporary: tempfile.TemporaryDirectory[str] | None = None

    def offload(self, network: nn.Module) -> None:
        """Release the weights from memory. Changes made since they were read are lost.

        Args:
            network: The network that owns the weights.
        """
        if self._source is None and self._temporary is None:
            self._find_or_write_files(network)
        if self._by_layer and self._per_layer is None:
            self._per_layer = PerLayerLoading(network)
        for module, name, _, parameter in _named_parameters(network):
            empty = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
            module._parameters[name] = empty
        drop_packed(network)
        host_memory.malloc_trim()

    def onload(self, network: nn.Module) -> None:
        """Read the weights, with the dtype and strides that they had when they were released.

        Args:
            network: The network that owns the weights.
        """
        if self._source is not None:
            # the user's random numbers, and the mode of later calls, must not depend on when this runs
            with global_rng_restored(), torch.inference_mode(False):
                read = self._source.load()
            weights: dict[str, Tensor] = {path: parameter for _, _, path, parameter in _named_parameters(read)}
        else:
            assert self._temporary is not None
            read, files = None, find_weight_files(Path(self._temporary.name))
            weights = {path: self._in_memory(tensor) for file in files for path, tensor in read_tensors(file)}
        for module, name, path, parameter in _named_parameters(network):
            weight = _with_layout_of(parameter, weights[path])
            if isinstance(weight, nn.Parameter):
                weight.requires_grad_(parameter.requires_grad)
                module._parameters[name] = weight
            else:
                module._parameters[name] = nn.Parameter(weight.detach(), requires_grad=parameter.requires_grad)
        if read is not None and not self._by_layer:
            move_packed(unwrapped(read), unwrapped(network))

    def close(self, network: nn.Module) -> None:
        """Leave the weights in memory and delete the temporary file; the storage is not used afterwards.

        Args:
            network: The network that owns the weights.
        """
        if self._per_layer is not None:
            self._per_layer.end()
            self._per_layer = None
        if self._by_layer and self._temporary is not None:
            self._by_layer = False  # so that no weight stays mapped from the file, which is deleted
            self.onload(network)
        elif any(parameter.is_meta for parameter in network.parameters()):
            self.onload(network)
        if self._source is not None:
            fingerprint = WeightFingerprint(network)
            attached_state(network).source = dataclasses.replace(self._source, fingerprint=fingerprint)
        if self._temporary is not None:
            self._temporary.cleanup()

    def _in_memory(self, tensor: Tensor) -> Tensor:
        # A copy, because results depend (by rounding) on the alignment of weights, which files do not preserve.
        return tensor if self._by_layer and tensor.nbytes >= LARGE else tensor.clone()

    def _find_or_write_files(self, network: nn.Module) -> None:
        source = state_of(network).source
        if source is not None and (is_unread(network) or source.is_current(network)):
            self._source = source
            return
        prefix = "kandinsky22-"
        self._temporary = tempfile.TemporaryDirectory(prefix=prefix, dir=self._folder, ignore_cleanup_errors=True)
        weights = {path: parameter for _, _, path, parameter in _named_parameters(network)}
        write_weight_files(Path(self._temporary.name), weights, variant=None, max_shard_size="10GB", safe=True)


def _named_parameters(network: nn.Module) -> Iterator[tuple[nn.Module, str, str, nn.Parameter]]:
    """Yield each parameter with the module that owns it, its name there, and its path from the network."""
    for prefix, module in unwrapped(network).named_modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                yield module, name, f"{prefix}.{name}" if prefix else name, parameter


def _with_layout_of(parameter: Tensor, tensor: Tensor) -> Tensor:
    """Return a tensor with the dtype and strides (channels last, for example) of a parameter."""
    if tensor.dtype == parameter.dtype and tensor.stride() == parameter.stride():
        return tensor
    return torch.empty_strided(parameter.shape, parameter.stride(), dtype=parameter.dtype).copy_(tensor.detach())


@internal_hook
def _drop_pages(layer: nn.Module, *_args: object) -> None:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    host_memory.drop_mapped_pages(weight)
