"""Networks of a pipeline whose weights are read when they first run."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from kandinsky22.kernels import host_memory
from kandinsky22.runtime.device_offload import ModelOffload, OffloadHook, WeightStorage

WEIGHT_COPIES = 2.2  # memory of a network that runs, in relation to its weights: these, packed copies, and features


class LoadingOnFirstUse(ModelOffload):
    """Networks whose weights are read when they first run.

    They stay in memory afterwards, unless each is used once, or the memory does not suffice for the next one.
    """

    def __init__(self, make_storage: Callable[[], WeightStorage], *, used_once: bool) -> None:
        """Create the group without networks.

        Args:
            make_storage: Returns a new storage, for one network.
            used_once: Whether a network leaves memory when the next one runs, and at the end of each call.
        """
        super().__init__("load_on_first_use", torch.device("cpu"), make_storage, use_accelerate=False)
        self._used_once = used_once

    def _evicted_by(self, hook: OffloadHook, network: nn.Module) -> list[tuple[OffloadHook, nn.Module]]:
        needed = WEIGHT_COPIES * sum(parameter.nbytes for parameter in network.parameters())
        return list(self._onloaded) if self._used_once or needed > host_memory.available_bytes() else []

    def free(self) -> None:
        """Drop the weights at the end of a call if networks are used once."""
        if self._used_once:
            super().free()
