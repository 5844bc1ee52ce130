"""The tensors that a network is saved with: those of its class, whatever was attached to its layers."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from kandinsky22.errors import CheckpointError

logger = logging.getLogger(__name__)


def stored_tensors(network: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors that the published layout has for a network.

    Weights that are computed (parametrizations, pruning, weight norm) are stored as computed. Of a layer inside of an
    adapter the layer's own weights are stored, with a warning that the adapter is not.

    Args:
        network: The network.
        tensors: Its state dict.

    Returns:
        The same tensors if nothing was attached.

    Raises:
        CheckpointError: If a layer was replaced by one that has no such weights. Nothing has been written then.
    """
    with torch.device("meta"):
        expected = type(network).from_config(network.config).state_dict()
    if tensors.keys() == expected.keys():
        return tensors
    computed: dict[str, Tensor] = {}
    for name, tensor in expected.items():
        value = tensors.get(name)
        value = _find(network, name.split("."), tensor.shape) if value is None else value
        if value is None:
            raise CheckpointError(
                f"{type(network).__name__} cannot be saved: a module without the weight {name} replaced a layer; "
                "save its state_dict() instead, or put the layer back first"
            )
        computed[name] = value.detach()
    unsaved = tensors.keys() - expected.keys()
    if any("parametrizations" not in name and not name.endswith(("_orig", "_mask", "_g", "_v")) for name in unsaved):
        logger.warning(
            "%s: %d tensors of adapters are not saved", type(network).__name__, len(unsaved - computed.keys())
        )
    return computed


def _find(module: nn.Module, path: list[str], shape: torch.Size) -> Tensor | None:
    """Return the tensor at a path from a module, or from the layer inside of an adapter that took its position."""
    if len(path) == 1:
        value = getattr(module, path[0], None)
        if isinstance(value, Tensor) and value.shape == shape:
            return value
    elif path[0] in module._modules and (child := module._modules[path[0]]) is not None:
        return _find(child, path[1:], shape)
    found = (_find(child, path, shape) for child in module.children() if len(path) > 1 or not path[0].isdigit())
    return next((tensor for tensor in found if tensor is not None), None)
