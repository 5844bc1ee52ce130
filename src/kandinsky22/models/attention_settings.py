"""Settings of attention that scripts for the reference call, and that have nothing to set here."""

from __future__ import annotations

import logging
from typing import Any

from kandinsky22.verbosity import warn_once

logger = logging.getLogger(__name__)


class AttentionSettings:
    """Mixin of networks and pipelines: sliced and xformers attention, which torch's fused attention makes needless."""

    def set_attention_slice(self, slice_size: str | int | list[int] | None = "auto") -> None:
        """Do nothing: attention here never holds the scores of all tokens, which slicing would avoid.

        Args:
            slice_size: Ignored.
        """
        if slice_size is not None:
            warn_once(logger, "attention slicing has no effect: attention here never holds all scores in memory")

    def enable_xformers_memory_efficient_attention(self, attention_op: Any = None) -> None:
        """Do nothing: torch's fused attention, which is always used here, needs as little memory.

        Args:
            attention_op: Ignored.
        """
        warn_once(logger, "xformers has no effect: torch's fused attention is used, which needs as little memory")

    def disable_xformers_memory_efficient_attention(self) -> None:
        """Do nothing, see `enable_xformers_memory_efficient_attention`."""

    def set_use_memory_efficient_attention_xformers(self, valid: bool, attention_op: Any = None) -> None:
        """Do nothing, see `enable_xformers_memory_efficient_attention`.

        Args:
            valid: Whether xformers should be used.
            attention_op: Ignored.
        """
        if valid:
            self.enable_xformers_memory_efficient_attention(attention_op)
