"""Kandinsky 2.2: a prior turns a prompt into an image embedding, a decoder turns the embedding into an image.

Public names are imported on first use, so that `import kandinsky22` is fast and does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from kandinsky22._exports import MODULE_OF
from kandinsky22.compat import modules

__version__ = "0.1.0"

__all__ = ["__version__", *MODULE_OF]

modules.install()


def __getattr__(name: str) -> Any:
    if name in modules.PACKAGES:
        return import_module(f"{__name__}.{name}")
    if name not in MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
