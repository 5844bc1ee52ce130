"""Storage of offloaded weights in the CPU's memory."""

from __future__ import annotations

import torch
from torch import nn

from kandinsky22.kernels.linear import drop_packed
from kandinsky22.runtime.device_offload import empty_cache


class CpuStorage:
    """Storage in the CPU's memory."""

    def __init__(self, device: torch.device) -> None:
        """Create the storage of one network.

        Args:
            device: Device that the network runs on.
        """
        self._device = device

    def offload(self, network: nn.Module) -> None:
        """Move the weights to the CPU.

        Args:
            network: The network that owns the weights.
        """
        network.to("cpu")
        drop_packed(network)
        empty_cache(self._device)

    def onload(self, network: nn.Module) -> None:
        """Move the weights to the device.

        Args:
            network: The network that owns the weights.
        """
        network.to(self._device)

    def close(self, network: nn.Module) -> None:
        """Leave the weights on the CPU.

        Args:
            network: The network that owns the weights.
        """
        self.offload(network)
