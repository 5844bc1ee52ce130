"""Optimisations that the comparison switches off one by one, by their names in `kandinsky22.optimisations`."""

from __future__ import annotations

import contextlib
from typing import Any

# Fields of `kandinsky22.kernels.settings.Optimisations`, and the stages whose time they change. Other fields change
# loading, memory, or calls with the same inputs as an earlier one.
STAGES_BY_SWITCH: dict[str, tuple[str, ...]] = {
    "packed_linear": ("prior", "step", "decode"),
    "onednn_linear": ("prior",),
    "batched_timesteps": ("prior",),
    "packed_conv": ("step", "decode"),
    "fused_group_norm": ("step", "decode"),
    "chunked_attention": ("step", "decode"),
    "buffer_pool": ("decode",),
    "winograd": ("step", "decode"),
    "fused_upsample": ("step", "decode"),
}


def available(stage: str | None = None) -> list[str]:
    """Return the names of the optimisations that can be switched off.

    Args:
        stage: Stage whose time they change; None for all stages.
    """
    return [name for name, stages in STAGES_BY_SWITCH.items() if stage is None or stage in stages]


def without(name: str | None) -> contextlib.AbstractContextManager[Any]:
    """Return a context manager in which one optimisation is off.

    Args:
        name: Name of the optimisation; None leaves all of them on.

    Raises:
        TypeError: There is no optimisation of this name.
    """
    from kandinsky22.kernels.settings import optimisations

    return contextlib.nullcontext() if name is None else optimisations(**{name: False})
