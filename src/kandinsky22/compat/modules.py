"""Import paths of the reference: which names each of them offers, and where kandinsky22 defines those.

All of them are thin: a path leads to names that are defined elsewhere, and is looked up only when a script imports it.
Type checkers do not see these paths.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Any

from kandinsky22._exports import MODULE_OF
from kandinsky22.requirements import require

ROOT = "kandinsky22"

# Modules that define names which are not public names of kandinsky22.
_FUNCTIONS = f"{ROOT}.compat.functions"
_TRAINING = f"{ROOT}.compat.training"
_ATTENTION = (
    "AttnAddedKVProcessor AttnAddedKVProcessor2_0 AttnProcessor AttnProcessor2_0 SlicedAttnAddedKVProcessor "
    "SlicedAttnProcessor XFormersAttnAddedKVProcessor XFormersAttnProcessor"
)
_SCHEDULES = (
    "SchedulerType get_constant_schedule get_constant_schedule_with_warmup get_cosine_schedule_with_warmup "
    "get_cosine_with_hard_restarts_schedule_with_warmup get_linear_schedule_with_warmup "
    "get_polynomial_decay_schedule_with_warmup"
)
SOURCE_OF = {
    **dict.fromkeys(_ATTENTION.split(), f"{ROOT}.models.attention_processors"),
    "BaseOutput": f"{ROOT}.compat.functions",
    "CLIPImageProcessor": "transformers",
    "CLIPTextModelWithProjection": "transformers",
    "CLIPTokenizer": "transformers",
    "CLIPVisionModelWithProjection": "transformers",
    "EMAModel": _TRAINING,
    "DecoderOutput": f"{ROOT}.models.movq",
    "ModelMixin": _FUNCTIONS,
    "PriorTransformerOutput": f"{ROOT}.models.prior",
    "UNet2DConditionOutput": f"{ROOT}.models.unet",
    "VQEncoderOutput": f"{ROOT}.models.movq",
    "SchedulerMixin": _FUNCTIONS,
    "SchedulerOutput": _FUNCTIONS,
    "VaeImageProcessor": f"{ROOT}.inputs.image_processor",
    "cast_training_params": _TRAINING,
    "compute_snr": _TRAINING,
    "free_memory": _TRAINING,
    **dict.fromkeys(_SCHEDULES.split(), "transformers"),
    "get_scheduler": _TRAINING,
    "logging": f"{ROOT}.verbosity",
    "randn_tensor": f"{ROOT}.noise",
    "set_seed": _TRAINING,
}
FUNCTIONS = (
    "CONFIG_NAME",
    "PIL_INTERPOLATION",
    "SAFETENSORS_WEIGHTS_NAME",
    "WEIGHTS_NAME",
    "check_min_version",
    "downscale_height_and_width",
    "export_to_gif",
    "export_to_video",
    "is_accelerate_available",
    "is_accelerate_version",
    "is_compiled_module",
    "is_peft_available",
    "is_safetensors_available",
    "is_torch_available",
    "is_torch_npu_available",
    "is_torch_version",
    "is_torch_xla_available",
    "is_transformers_available",
    "is_wandb_available",
    "is_xformers_available",
    "numpy_to_pil",
    "prepare_image",
    "prepare_mask",
    "prepare_mask_and_masked_image",
    "pt_to_pil",
    "replace_example_docstring",
)
_OF_PIPELINES = "downscale_height_and_width prepare_image prepare_mask prepare_mask_and_masked_image"
_UTILS = " ".join(name for name in FUNCTIONS if name not in (*_OF_PIPELINES.split(), "is_compiled_module"))
_AVAILABILITY = " ".join(name for name in _UTILS.split() if name.startswith("is_"))

_PRIOR_PARTS = (
    "CLIPImageProcessor CLIPTextModelWithProjection CLIPTokenizer CLIPVisionModelWithProjection "
    "KandinskyPriorPipelineOutput PriorTransformer UnCLIPScheduler"
)
_DECODER_PARTS = "DDPMScheduler ImagePipelineOutput UNet2DConditionModel VQModel downscale_height_and_width"
_PIPELINES = " ".join(name for name in MODULE_OF if name.startswith("KandinskyV22"))
_SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "deis_multistep": "DEISMultistepScheduler",
    "dpmsolver_multistep": "DPMSolverMultistepScheduler",
    "dpmsolver_sde": "DPMSolverSDEScheduler",
    "dpmsolver_singlestep": "DPMSolverSinglestepScheduler",
    "euler_ancestral_discrete": "EulerAncestralDiscreteScheduler",
    "euler_discrete": "EulerDiscreteScheduler",
    "heun_discrete": "HeunDiscreteScheduler",
    "k_dpm_2_ancestral_discrete": "KDPM2AncestralDiscreteScheduler",
    "k_dpm_2_discrete": "KDPM2DiscreteScheduler",
    "lcm": "LCMScheduler",
    "lms_discrete": "LMSDiscreteScheduler",
    "pndm": "PNDMScheduler",
    "unclip": "UnCLIPScheduler",
    "unipc_multistep": "UniPCMultistepScheduler",
    "utils": "SchedulerMixin SchedulerOutput",
}
_22 = "pipelines.kandinsky2_2"

# The names of each path; "*" stands for those of a whole module.
NAMES: dict[str, str] = {
    "image_processor": "VaeImageProcessor",
    "optimization": f"{_SCHEDULES} get_scheduler",
    "training_utils": "EMAModel cast_training_params compute_snr free_memory set_seed",
    "utils": f"{_UTILS} BaseOutput load_image logging make_image_grid randn_tensor",
    "utils.export_utils": "export_to_gif export_to_video",
    "utils.import_utils": _AVAILABILITY,
    "utils.loading_utils": "load_image",
    "utils.logging": "*",
    "utils.outputs": "BaseOutput",
    "utils.pil_utils": "PIL_INTERPOLATION make_image_grid numpy_to_pil pt_to_pil",
    "utils.torch_utils": "is_compiled_module randn_tensor",
    "models.attention_processor": _ATTENTION,
    "models.autoencoders": "VQModel",
    "models.autoencoders.vae": "DecoderOutput",
    "models.autoencoders.vq_model": "VQEncoderOutput VQModel",
    "models.modeling_utils": "ModelMixin",
    "models.prior_transformer": "PriorTransformer PriorTransformerOutput",
    "models.transformers": "PriorTransformer",
    "models.transformers.prior_transformer": "PriorTransformer PriorTransformerOutput",
    "models.unet_2d_condition": "UNet2DConditionModel UNet2DConditionOutput",
    "models.unets": "UNet2DConditionModel",
    "models.unets.unet_2d_condition": "UNet2DConditionModel UNet2DConditionOutput",
    "models.vq_model": "VQEncoderOutput VQModel",
    "pipelines.auto_pipeline": "AutoPipelineForImage2Image AutoPipelineForInpainting AutoPipelineForText2Image",
    "pipelines.kandinsky": "KandinskyPriorPipeline KandinskyPriorPipelineOutput",
    "pipelines.kandinsky.pipeline_kandinsky_img2img": "prepare_image",
    "pipelines.kandinsky.pipeline_kandinsky_inpaint": "prepare_mask prepare_mask_and_masked_image",
    "pipelines.kandinsky.pipeline_kandinsky_prior": "KandinskyPriorPipeline KandinskyPriorPipelineOutput",
    "pipelines.pipeline_utils": "DiffusionPipeline ImagePipelineOutput",
    _22: _PIPELINES,
    f"{_22}.pipeline_kandinsky2_2": f"KandinskyV22Pipeline {_DECODER_PARTS}",
    f"{_22}.pipeline_kandinsky2_2_combined": (
        "KandinskyV22CombinedPipeline KandinskyV22Img2ImgCombinedPipeline KandinskyV22InpaintCombinedPipeline "
        f"KandinskyV22Img2ImgPipeline KandinskyV22InpaintPipeline KandinskyV22Pipeline KandinskyV22PriorPipeline "
        f"{_DECODER_PARTS} {_PRIOR_PARTS}"
    ),
    f"{_22}.pipeline_kandinsky2_2_controlnet": f"KandinskyV22ControlnetPipeline {_DECODER_PARTS}",
    f"{_22}.pipeline_kandinsky2_2_controlnet_img2img": (
        f"KandinskyV22ControlnetImg2ImgPipeline VaeImageProcessor prepare_image {_DECODER_PARTS}"
    ),
    f"{_22}.pipeline_kandinsky2_2_img2img": (
        f"KandinskyV22Img2ImgPipeline VaeImageProcessor prepare_image {_DECODER_PARTS}"
    ),
    f"{_22}.pipeline_kandinsky2_2_inpainting": (
        f"KandinskyV22InpaintPipeline prepare_mask prepare_mask_and_masked_image {_DECODER_PARTS}"
    ),
    f"{_22}.pipeline_kandinsky2_2_prior": f"KandinskyV22PriorPipeline {_PRIOR_PARTS}",
    f"{_22}.pipeline_kandinsky2_2_prior_emb2emb": f"KandinskyV22PriorEmb2EmbPipeline {_PRIOR_PARTS}",
    **{f"schedulers.scheduling_{file}": names for file, names in _SCHEDULERS.items()},
}
WHOLE_MODULES = {"utils.logging": f"{ROOT}.verbosity"}

PACKAGES = {"models", "pipelines", "schedulers", *(path.partition(".")[0] for path in NAMES)}  # attributes of the root


def source_of(name: str) -> str:
    """Return the module that defines a name.

    Args:
        name: One of the names in `NAMES`.
    """
    if name in MODULE_OF:
        return f"{ROOT}.{MODULE_OF[name]}"
    return _FUNCTIONS if name in FUNCTIONS else SOURCE_OF[name]


def _import(module: str, name: str) -> Any:
    if module == "transformers":
        return require(module, name, install="kandinsky22[train]")
    return importlib.import_module(module)


class ReferenceModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finder and loader of the paths in `NAMES`, for Python's import system."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return the specification of a module; None if this is not one of the paths.

        Args:
            fullname: Name of the module.
            path: Ignored.
            target: Ignored.
        """
        relative = fullname.removeprefix(f"{ROOT}.")
        if relative == fullname or relative not in NAMES:
            return None
        is_package = any(name.startswith(f"{relative}.") for name in NAMES)
        return importlib.util.spec_from_loader(fullname, self, is_package=is_package)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        """Return None: an ordinary module is created.

        Args:
            spec: Ignored.
        """
        return None

    def exec_module(self, module: ModuleType) -> None:
        """Give a module its names. They are imported on first use.

        Args:
            module: The new module.
        """
        relative = module.__name__.removeprefix(f"{ROOT}.")
        names: Iterable[str] = NAMES[relative].split()
        whole = importlib.import_module(WHOLE_MODULES[relative]) if relative in WHOLE_MODULES else None
        if whole is not None:
            names = [name for name in getattr(whole, "__all__", vars(whole)) if not name.startswith("_")]
        names = list(names)

        def get_name(name: str) -> Any:
            if name not in names:
                raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")
            if name == "logging":
                value: Any = importlib.import_module(f"{ROOT}.utils.logging")
            else:
                value = getattr(whole or _import(source_of(name), name), name)
            setattr(module, name, value)
            return value

        module.__doc__ = f"Names of kandinsky22 under a path of the reference: {', '.join(names)}."
        vars(module).update(__getattr__=get_name, __all__=names, __dir__=lambda: sorted({*vars(module), *names}))


def install() -> None:
    """Make the paths importable."""
    if not any(type(finder).__qualname__ == ReferenceModules.__qualname__ for finder in sys.meta_path):
        sys.meta_path.append(ReferenceModules())
