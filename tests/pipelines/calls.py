"""The ten pipeline classes, by the middle of their names, and one small call of each."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from tests.pipelines.pictures import box_mask_image, hint, photo
from tests.pipelines.tiny import DIM, pair


@dataclasses.dataclass(frozen=True)
class PipelineClass:
    """What a pipeline class is loaded from, and what a call of it runs.

    Attributes:
        checkpoint: Folder of the checkpoint, see the fixtures `checkpoints` and `mode_folder`.
        networks: Names of the networks that a call runs, in order.
    """

    checkpoint: str
    networks: str


PRIOR_NETWORKS = "prior_text_encoder prior_prior prior_image_encoder"
CLASSES = {
    "Prior": PipelineClass("prior", "text_encoder prior image_encoder"),
    "PriorEmb2Emb": PipelineClass("prior", "text_encoder image_encoder prior image_encoder"),
    "": PipelineClass("decoder", "unet movq"),
    "Img2Img": PipelineClass("Img2Img", "movq unet movq"),
    "Inpaint": PipelineClass("Inpaint", "movq unet movq"),
    "Controlnet": PipelineClass("Controlnet", "unet movq"),
    "ControlnetImg2Img": PipelineClass("ControlnetImg2Img", "movq unet movq"),
    "Combined": PipelineClass("combined", f"{PRIOR_NETWORKS} unet movq"),
    "Img2ImgCombined": PipelineClass("Img2Img", f"{PRIOR_NETWORKS} movq unet movq"),
    "InpaintCombined": PipelineClass("Inpaint", f"{PRIOR_NETWORKS} movq unet movq"),
}
PRIORS = ("Prior", "PriorEmb2Emb")
DECODERS = ("", "Img2Img", "Inpaint", "Controlnet", "ControlnetImg2Img")
COMBINED = ("Combined", "Img2ImgCombined", "InpaintCombined")

TEN = [f"KandinskyV22{middle}Pipeline" for middle in CLASSES]


def is_prior(name: str) -> bool:
    """Return whether a class's full name is that of a prior."""
    return name.startswith("KandinskyV22Prior")


def is_combined(name: str) -> bool:
    """Return whether a class's full name is that of a combined pipeline."""
    return name.endswith("CombinedPipeline")


# Options of a short decoder call that returns latents.
SMALL_LATENTS: dict[str, Any] = {"num_inference_steps": 4, "height": 32, "width": 32, "output_type": "latent"}


def inputs(name: str, seed: int = 1) -> dict[str, Any]:
    """Return the required arguments of a class: a prompt or embeddings, and pictures that depend on `seed`.

    Classes with a `strength` get 1.0, so that all steps run.
    """
    call: dict[str, Any] = pair(seed=seed) if name in DECODERS else {"prompt": "a red cat"}
    if "Img2Img" in name or "Emb2Emb" in name:
        call |= {"image": photo(seed), "strength": 1.0}
    if "Inpaint" in name:
        call |= {"image": photo(seed), "mask_image": box_mask_image()}
    if "Controlnet" in name:
        call |= {"hint": hint(1, seed)}
    return call


def small_call(name: str) -> dict[str, Any]:
    """Return a short call of a decoder or combined class: three steps that are all run, of 32 x 32 pixels."""
    call = {**inputs(name), "height": 32, "width": 32, "num_inference_steps": 3, "output_type": "np"}
    call |= pair() if name in DECODERS else {"prior_num_inference_steps": 2}
    return call | ({"num_inference_steps": 6, "strength": 0.5} if "Img2Img" in name else {})


def two_step_call(name: str) -> dict[str, Any]:
    """Return a call of two steps per stage that ends in tensors.

    Decoders get constant embeddings, for which the random networks magnify rounding least.
    """
    call = {**inputs(name), **step_counts(name, 2), "output_type": "pt"}
    if name in DECODERS:
        call |= {"image_embeds": torch.ones(1, DIM), "negative_image_embeds": torch.zeros(1, DIM)}
    return call


def step_counts(name: str, count: int) -> dict[str, int]:
    """Return the arguments that set the number of steps of every stage of a class."""
    stages = ("prior_", "") if name in COMBINED else ("",)
    return {f"{stage}num_inference_steps": count for stage in stages}
