"""Prior and decoder as one pipeline: from prompts to pictures."""

from __future__ import annotations

from typing import Any, ClassVar, Generic, TypeAlias, TypeVar

import torch
from torch import Tensor

from kandinsky22.errors import InputError
from kandinsky22.inputs import images, prompts, validation
from kandinsky22.inputs.images import Pictures
from kandinsky22.models import PriorTransformer, UNet2DConditionModel, VQModel
from kandinsky22.noise import Generators
from kandinsky22.pipelines.base import DiffusionPipeline
from kandinsky22.pipelines.component_io import PRIOR_PREFIX
from kandinsky22.pipelines.decoder import (
    DecoderPipeline,
    KandinskyV22Img2ImgPipeline,
    KandinskyV22InpaintPipeline,
    KandinskyV22Pipeline,
    Names,
)
from kandinsky22.pipelines.denoising import LATENTS
from kandinsky22.pipelines.prior import KandinskyV22PriorPipeline
from kandinsky22.sampling.guidance import Guidance, Interval
from kandinsky22.sampling.scheduler_adapter import Levels, Steps, Times

Texts: TypeAlias = str | list[str]

OF_PRIOR = ("guidance_scale", "guidance_rescale", "guidance_interval", "guidance_threshold", "num_inference_steps",
            "timesteps", "sigmas")  # fmt: skip

D = TypeVar("D", bound=DecoderPipeline)
P = TypeVar("P", bound=DiffusionPipeline)


class CombinedPipeline(DiffusionPipeline, Generic[D]):
    """A decoder and its prior, whose components carry the prefix `prior_`.

    `prior_pipe` and `decoder_pipe` are pipelines of their own, made of the same components.
    """

    decoder_class: type[D]
    model_cpu_offload_seq: ClassVar[str] = "prior_text_encoder->prior_image_encoder->prior_prior->unet->movq"

    def __init__(
        self,
        unet: UNet2DConditionModel,
        scheduler: Any,
        movq: VQModel,
        prior_prior: PriorTransformer,
        prior_image_encoder: Any,
        prior_text_encoder: Any,
        prior_tokenizer: Any,
        prior_scheduler: Any,
        prior_image_processor: Any,
    ) -> None:
        super().__init__()
        self.register_modules(
            unet=unet,
            scheduler=scheduler,
            movq=movq,
            prior_prior=prior_prior,
            prior_image_encoder=prior_image_encoder,
            prior_text_encoder=prior_text_encoder,
            prior_tokenizer=prior_tokenizer,
            prior_scheduler=prior_scheduler,
            prior_image_processor=prior_image_processor,
        )
        self._prior_pipe = KandinskyV22PriorPipeline.from_pipe(self)
        self._decoder_pipe: D = self.decoder_class.from_pipe(self)

    @property
    def prior_pipe(self) -> KandinskyV22PriorPipeline:
        """The prior alone."""
        return self._current(self._prior_pipe, PRIOR_PREFIX)

    @property
    def decoder_pipe(self) -> D:
        """The decoder alone."""
        return self._current(self._decoder_pipe)

    def _current(self, pipe: P, prefix: str = "") -> P:
        """`pipe` with the components and settings that this pipeline has now: both may have been assigned to."""
        for name, component in pipe.components.items():
            if component is not getattr(self, prefix + name):
                setattr(pipe, name, getattr(self, prefix + name))
        pipe._progress_bar_config = self._progress_bar_config
        pipe._feature_caching = self._feature_caching
        return pipe

    def interrupt(self) -> None:
        """End the running call as soon as its current step is done; it returns what the decoder then has."""
        self._prior_pipe.interrupt()
        self._decoder_pipe.interrupt()

    def _call(
        self, texts: tuple[Any, Any, Any], size: tuple[Any, Any], steps: tuple[Any, Any, Any, Any],
        told: tuple[Any, Any, Any, Any], prior: tuple[Any, ...], early: tuple[Any, Any],
        output: tuple[Any, Any], **given: Any,
    ) -> Any:  # fmt: skip
        """A whole call. `texts` are prompts, negatives and the number for each; `steps`, `told` and `given` are as in
        the decoder's `_call`; `prior` are the arguments `OF_PRIOR`, `early` the prior's callbacks."""
        positive, _ = prompts.pairs(*texts[:2])
        copies = validation.whole("num_images_per_prompt", texts[2])
        validation.output(*output, images.OUTPUT_TYPES[: 3 if given.get("keep_pixels") else 4])
        decoder, first = self.decoder_pipe, self.prior_pipe
        *options, latents = steps
        of_prior = isinstance(latents, Tensor) and latents.ndim == 2
        options += [None if of_prior else latents, decoder._check_callbacks(*told)]
        plan = decoder._plan(len(positive) * copies, size, *options, copies=copies, **given)
        first._need("prior")
        made, read = first.prior.config.embedding_dim, decoder.unet.config.encoder_hid_dim
        if made != read:
            raise InputError(f"the prior makes embeddings of {made} numbers, the unet reads {read}: they do not fit")
        try:
            positives, negatives = first(
                *texts,
                generator=steps[2],
                latents=latents if of_prior else None,
                **dict(zip(OF_PRIOR, prior, strict=True)),
                callback_on_step_end=early[0],
                callback_on_step_end_tensor_inputs=early[1],
                return_dict=False,
            )
        except InputError as error:  # arguments of both stages have the same names, but for a prefix
            raise InputError(f"of the prior (prior_...): {error}") from error
        tensors = decoder._embeddings(positives, negatives, 1, plan.guidance.on)
        return decoder._generate(plan, tensors, *output)


class KandinskyV22CombinedPipeline(CombinedPipeline[KandinskyV22Pipeline]):
    """Pictures from prompts."""

    decoder_class = KandinskyV22Pipeline

    @torch.no_grad()
    def __call__(
        self, prompt: Texts, negative_prompt: Texts | None = None, num_inference_steps: int = 100,
        guidance_scale: float = 4.0, num_images_per_prompt: int = 1, height: int | None = None,
        width: int | None = None, prior_guidance_scale: float = 4.0, prior_num_inference_steps: int = 25,
        generator: Generators = None, latents: Tensor | None = None, output_type: str = "pil", callback: Any = None,
        callback_steps: int | None = 1, return_dict: bool = True, prior_callback_on_step_end: Any = None,
        prior_callback_on_step_end_tensor_inputs: Names = LATENTS, callback_on_step_end: Any = None,
        callback_on_step_end_tensor_inputs: Names = LATENTS,
        guidance_rescale: float = 0.0, guidance_interval: Interval = None, guidance_threshold: float | None = None,
        prior_guidance_rescale: float = 0.0, prior_guidance_interval: Interval = None,
        prior_guidance_threshold: float | None = None, timesteps: Times = None, sigmas: Levels = None,
        prior_timesteps: Times = None, prior_sigmas: Levels = None,
    ) -> Any:  # fmt: skip
        """Pictures, num_images_per_prompt for each prompt; arguments as of the two pipelines, in which they act.

        `latents` with four dimensions are start noise of the decoder, with two of the prior. The generators serve the
        prior first, then the decoder. Raises InputError before any network runs.
        """
        texts, output = (prompt, negative_prompt, num_images_per_prompt), (output_type, return_dict)
        guidance = Guidance(guidance_scale, guidance_rescale, guidance_interval, guidance_threshold)
        steps = (Steps(num_inference_steps, timesteps, sigmas), guidance, generator, latents)
        told = (callback_on_step_end, callback_on_step_end_tensor_inputs, callback, callback_steps)
        prior = (prior_guidance_scale, prior_guidance_rescale, prior_guidance_interval, prior_guidance_threshold)
        pace = (prior_num_inference_steps, prior_timesteps, prior_sigmas)
        early = (prior_callback_on_step_end, prior_callback_on_step_end_tensor_inputs)
        return self._call(texts, (height, width), steps, told, (*prior, *pace), early, output)


class KandinskyV22Img2ImgCombinedPipeline(CombinedPipeline[KandinskyV22Img2ImgPipeline]):
    """Pictures from prompts and a picture to start from."""

    decoder_class = KandinskyV22Img2ImgPipeline

    @torch.no_grad()
    def __call__(
        self, prompt: Texts, image: Pictures, negative_prompt: Texts | None = None, num_inference_steps: int = 100,
        guidance_scale: float = 4.0, strength: float = 0.3, num_images_per_prompt: int = 1,
        height: int | None = None, width: int | None = None, prior_guidance_scale: float = 4.0,
        prior_num_inference_steps: int = 25, generator: Generators = None, latents: Tensor | None = None,
        output_type: str = "pil", callback: Any = None, callback_steps: int | None = 1, return_dict: bool = True,
        prior_callback_on_step_end: Any = None, prior_callback_on_step_end_tensor_inputs: Names = LATENTS,
        callback_on_step_end: Any = None, callback_on_step_end_tensor_inputs: Names = LATENTS,
        guidance_rescale: float = 0.0, guidance_interval: Interval = None, guidance_threshold: float | None = None,
        prior_guidance_rescale: float = 0.0, prior_guidance_interval: Interval = None,
        prior_guidance_threshold: float | None = None, timesteps: Times = None, sigmas: Levels = None,
        prior_timesteps: Times = None, prior_sigmas: Levels = None,
    ) -> Any:  # fmt: skip
        """Pictures that lead away from `image`, num_images_per_prompt for each prompt.

        Image and strength are as in KandinskyV22Img2ImgPipeline, one image for all prompts or one for each. `latents`
        with four dimensions are the noise put on the image; the rest is as in KandinskyV22CombinedPipeline.
        """
        texts, output = (prompt, negative_prompt, num_images_per_prompt), (output_type, return_dict)
        guidance = Guidance(guidance_scale, guidance_rescale, guidance_interval, guidance_threshold)
        steps = (Steps(num_inference_steps, timesteps, sigmas), guidance, generator, latents)
        given = {"image": image, "strength": strength}
        told = (callback_on_step_end, callback_on_step_end_tensor_inputs, callback, callback_steps)
        prior = (prior_guidance_scale, prior_guidance_rescale, prior_guidance_interval, prior_guidance_threshold)
        pace = (prior_num_inference_steps, prior_timesteps, prior_sigmas)
        early = (prior_callback_on_step_end, prior_callback_on_step_end_tensor_inputs)
        return self._call(texts, (height, width), steps, told, (*prior, *pace), early, output, **given)


class KandinskyV22InpaintCombinedPipeline(CombinedPipeline[KandinskyV22InpaintPipeline]):
    """Pictures repainted where a mask says so, from prompts."""

    decoder_class = KandinskyV22InpaintPipeline
    embedded_part = "inpaint"

    @torch.no_grad()
    def __call__(
        self, prompt: Texts, image: Pictures, mask_image: Pictures, negative_prompt: Texts | None = None,
        num_inference_steps: int = 100, guidance_scale: float = 4.0, num_images_per_prompt: int = 1,
        height: int | None = None, width: int | None = None, prior_guidance_scale: float = 4.0,
        prior_num_inference_steps: int = 25, generator: Generators = None, latents: Tensor | None = None,
        output_type: str = "pil", return_dict: bool = True, prior_callback_on_step_end: Any = None,
        prior_callback_on_step_end_tensor_inputs: Names = LATENTS, callback_on_step_end: Any = None,
        callback_on_step_end_tensor_inputs: Names = LATENTS, callback: Any = None, callback_steps: int | None = None,
        keep_pixels: bool = False,
        guidance_rescale: float = 0.0, guidance_interval: Interval = None, guidance_threshold: float | None = None,
        prior_guidance_rescale: float = 0.0, prior_guidance_interval: Interval = None,
        prior_guidance_threshold: float | None = None, timesteps: Times = None, sigmas: Levels = None,
        prior_timesteps: Times = None, prior_sigmas: Levels = None,
    ) -> Any:  # fmt: skip
        """`image` repainted where `mask_image` is white, num_images_per_prompt for each prompt.

        Image, mask and keep_pixels are as in KandinskyV22InpaintPipeline, one for all prompts or one for each; the
        rest is as in KandinskyV22CombinedPipeline.
        """
        texts, output = (prompt, negative_prompt, num_images_per_prompt), (output_type, return_dict)
        guidance = Guidance(guidance_scale, guidance_rescale, guidance_interval, guidance_threshold)
        steps = (Steps(num_inference_steps, timesteps, sigmas), guidance, generator, latents)
        given = {"image": image, "mask_image": mask_image, "keep_pixels": keep_pixels}
        told = (callback_on_step_end, callback_on_step_end_tensor_inputs, callback, callback_steps)
        prior = (prior_guidance_scale, prior_guidance_rescale, prior_guidance_interval, prior_guidance_threshold)
        pace = (prior_num_inference_steps, prior_timesteps, prior_sigmas)
        early = (prior_callback_on_step_end, prior_callback_on_step_end_tensor_inputs)
        return self._call(texts, (height, width), steps, told, (*prior, *pace), early, output, **given)
