"""Kandinsky 2.2: a prior turns a prompt into an image embedding, a decoder turns the embedding into pixels.

Names are imported when they are first used, so `import kandinsky22` costs nothing and pulls in no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kandinsky22.errors import CheckpointError as CheckpointError
    from kandinsky22.errors import ConfigError as ConfigError
    from kandinsky22.errors import InputError as InputError
    from kandinsky22.errors import KandinskyError as KandinskyError
    from kandinsky22.errors import MissingDependencyError as MissingDependencyError
    from kandinsky22.inputs.images import load_image as load_image
    from kandinsky22.inputs.images import make_image_grid as make_image_grid
    from kandinsky22.models.movq import VQModel as VQModel
    from kandinsky22.models.prior import PriorTransformer as PriorTransformer
    from kandinsky22.models.unet import UNet2DConditionModel as UNet2DConditionModel
    from kandinsky22.pipelines.auto import AutoPipelineForImage2Image as AutoPipelineForImage2Image
    from kandinsky22.pipelines.auto import AutoPipelineForInpainting as AutoPipelineForInpainting
    from kandinsky22.pipelines.auto import AutoPipelineForText2Image as AutoPipelineForText2Image
    from kandinsky22.pipelines.base import DiffusionPipeline as DiffusionPipeline
    from kandinsky22.pipelines.combined import KandinskyV22CombinedPipeline as KandinskyV22CombinedPipeline
    from kandinsky22.pipelines.combined import (
        KandinskyV22Img2ImgCombinedPipeline as KandinskyV22Img2ImgCombinedPipeline,
    )
    from kandinsky22.pipelines.combined import (
        KandinskyV22InpaintCombinedPipeline as KandinskyV22InpaintCombinedPipeline,
    )
    from kandinsky22.pipelines.decoder import (
        KandinskyV22ControlnetImg2ImgPipeline as KandinskyV22ControlnetImg2ImgPipeline,
    )
    from kandinsky22.pipelines.decoder import (
        KandinskyV22ControlnetPipeline as KandinskyV22ControlnetPipeline,
    )
    from kandinsky22.pipelines.decoder import (
        KandinskyV22Img2ImgPipeline as KandinskyV22Img2ImgPipeline,
    )
    from kandinsky22.pipelines.decoder import (
        KandinskyV22InpaintPipeline as KandinskyV22InpaintPipeline,
    )
    from kandinsky22.pipelines.decoder import KandinskyV22Pipeline as KandinskyV22Pipeline
    from kandinsky22.pipelines.outputs import ImagePipelineOutput as ImagePipelineOutput
    from kandinsky22.pipelines.outputs import KandinskyPriorPipelineOutput as KandinskyPriorPipelineOutput
    from kandinsky22.pipelines.prior import KandinskyV22PriorEmb2EmbPipeline as KandinskyV22PriorEmb2EmbPipeline
    from kandinsky22.pipelines.prior import KandinskyV22PriorPipeline as KandinskyV22PriorPipeline
    from kandinsky22.sampling.presets import apply_quality as apply_quality
    from kandinsky22.schedulers import DDIMScheduler as DDIMScheduler
    from kandinsky22.schedulers import DDPMScheduler as DDPMScheduler
    from kandinsky22.schedulers import DEISMultistepScheduler as DEISMultistepScheduler
    from kandinsky22.schedulers import DPMSolverMultistepScheduler as DPMSolverMultistepScheduler
    from kandinsky22.schedulers import DPMSolverSinglestepScheduler as DPMSolverSinglestepScheduler
    from kandinsky22.schedulers import EulerAncestralDiscreteScheduler as EulerAncestralDiscreteScheduler
    from kandinsky22.schedulers import EulerDiscreteScheduler as EulerDiscreteScheduler
    from kandinsky22.schedulers import HeunDiscreteScheduler as HeunDiscreteScheduler
    from kandinsky22.schedulers import KDPM2DiscreteScheduler as KDPM2DiscreteScheduler
    from kandinsky22.schedulers import LCMScheduler as LCMScheduler
    from kandinsky22.schedulers import LMSDiscreteScheduler as LMSDiscreteScheduler
    from kandinsky22.schedulers import PNDMScheduler as PNDMScheduler
    from kandinsky22.schedulers import UnCLIPScheduler as UnCLIPScheduler
    from kandinsky22.schedulers import UniPCMultistepScheduler as UniPCMultistepScheduler

__version__ = "0.1.0"

_MODULE_OF = {
    "AutoPipelineForImage2Image": "pipelines.auto",
    "AutoPipelineForInpainting": "pipelines.auto",
    "AutoPipelineForText2Image": "pipelines.auto",
    "CheckpointError": "errors",
    "ConfigError": "errors",
    "DDIMScheduler": "schedulers",
    "DDPMScheduler": "schedulers",
    "DEISMultistepScheduler": "schedulers",
    "DPMSolverMultistepScheduler": "schedulers",
    "DPMSolverSinglestepScheduler": "schedulers",
    "DiffusionPipeline": "pipelines.base",
    "EulerAncestralDiscreteScheduler": "schedulers",
    "EulerDiscreteScheduler": "schedulers",
    "HeunDiscreteScheduler": "schedulers",
    "ImagePipelineOutput": "pipelines.outputs",
    "InputError": "errors",
    "KDPM2DiscreteScheduler": "schedulers",
    "KandinskyError": "errors",
    "KandinskyPriorPipelineOutput": "pipelines.outputs",
    "KandinskyV22CombinedPipeline": "pipelines.combined",
    "KandinskyV22ControlnetImg2ImgPipeline": "pipelines.decoder",
    "KandinskyV22ControlnetPipeline": "pipelines.decoder",
    "KandinskyV22Img2ImgCombinedPipeline": "pipelines.combined",
    "KandinskyV22Img2ImgPipeline": "pipelines.decoder",
    "KandinskyV22InpaintCombinedPipeline": "pipelines.combined",
    "KandinskyV22InpaintPipeline": "pipelines.decoder",
    "KandinskyV22Pipeline": "pipelines.decoder",
    "KandinskyV22PriorEmb2EmbPipeline": "pipelines.prior",
    "KandinskyV22PriorPipeline": "pipelines.prior",
    "LCMScheduler": "schedulers",
    "LMSDiscreteScheduler": "schedulers",
    "MissingDependencyError": "errors",
    "PNDMScheduler": "schedulers",
    "PriorTransformer": "models.prior",
    "UNet2DConditionModel": "models.unet",
    "UnCLIPScheduler": "schedulers",
    "UniPCMultistepScheduler": "schedulers",
    "VQModel": "models.movq",
    "apply_quality": "sampling.presets",
    "load_image": "inputs.images",
    "make_image_grid": "inputs.images",
}

__all__ = ["__version__", *_MODULE_OF]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
