"""The ten pipelines: the only place that joins networks, schedulers, inputs and checkpoints."""

from __future__ import annotations

import importlib
from typing import Any

from kandinsky22._exports import MODULE_OF


def __getattr__(name: str) -> Any:
    if not MODULE_OF.get(name, "").startswith("pipelines."):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"kandinsky22.{MODULE_OF[name]}"), name)
