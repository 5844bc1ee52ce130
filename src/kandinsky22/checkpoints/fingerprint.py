"""A short name for what networks know."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import nn

# Enough to tell any two trainings apart; reading all of a 10 GB checkpoint would take longer than drawing.
SAMPLES_PER_TENSOR = 64


def weights_digest(networks: Mapping[str, nn.Module]) -> str:
    """SHA-256 over names, shapes and evenly spread values of the tensors of `networks`, as 64 hexadecimal digits.

    It depends on neither file format, sharding nor device, but on the dtype the weights were loaded in.
    """
    digest = hashlib.sha256()
    for owner, network in sorted(networks.items()):
        for name, tensor in sorted(network.state_dict().items()):
            flat = tensor.detach().reshape(-1)
            stride = max(1, -(-flat.numel() // SAMPLES_PER_TENSOR))
            values = flat[::stride].to("cpu", torch.float64).numpy()
            digest.update(f"{owner}.{name} {tuple(tensor.shape)}\n".encode())
            digest.update(values.tobytes())
    return digest.hexdigest()
