"""Gradient checkpointing (https://arxiv.org/abs/1604.06174): features of a block are computed again for its gradients.

A training step then stores the inputs of blocks instead of everything inside them, and takes about a third longer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

CheckpointFunction = Callable[..., Any]
"""Runs `module(*args)` without storing what its gradients need: (module, *args) -> output."""


class Checkpointing:
    """Mixin for modules that run blocks which can be checkpointed.

    Attributes:
        gradient_checkpointing: Whether blocks are checkpointed where gradients are needed.
    """

    gradient_checkpointing: bool = False
    _gradient_checkpointing_func: CheckpointFunction | None = None

    def run_block(self, block: nn.Module, *args: Any, **options: Any) -> Any:
        """Return the output of a block, checkpointed if that is enabled and gradients are needed.

        Args:
            block: The block.
            *args: Its arguments.
            **options: Arguments that matter only where no gradient is needed.
        """
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return (self._gradient_checkpointing_func or checkpoint)(block, *args)
        return block(*args, **options)


def checkpoint(module: nn.Module, *args: Any) -> Any:
    """Return module(*args), and compute its inner features again for the backward pass.

    Args:
        module: Any module.
        *args: Its arguments.
    """
    import torch.utils.checkpoint  # takes a tenth of a second, and only training needs it

    return torch.utils.checkpoint.checkpoint(module, *args, use_reentrant=False)
