"""Networks: tensors in, tensors out. They are independent of pipelines, prompts, samplers and devices."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from kandinsky22.requirements import check_versions

if TYPE_CHECKING:
    from kandinsky22.models.base import Model
    from kandinsky22.models.movq import VQModel
    from kandinsky22.models.prior import PriorTransformer
    from kandinsky22.models.tiny_decoder import TinyDecoder
    from kandinsky22.models.unet import UNet2DConditionModel

__all__ = ["Model", "PriorTransformer", "TinyDecoder", "UNet2DConditionModel", "VQModel"]

check_versions()

_MODULE_OF = {
    "Model": "base",
    "PriorTransformer": "prior",
    "TinyDecoder": "tiny_decoder",
    "UNet2DConditionModel": "unet",
    "VQModel": "movq",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
