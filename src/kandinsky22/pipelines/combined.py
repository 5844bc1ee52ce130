"""Prior and decoder as one pipeline: from prompts to pictures."""

from __future__ import annotations

from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from kandinsky22.components import PRIOR_PREFIX
from kandinsky22.errors import InputError
from kandinsky22.inputs import checks, images, prompts
from kandinsky22.models import PriorTransformer, UNet2DConditionModel, VQModel
from kandinsky22.pipelines.base import DiffusionPipeline
from kandinsky22.pipelines.decoder import DecoderPipeline, KandinskyV22Pipeline
from kandinsky22.pipelines.prior import KandinskyV22PriorPipeline
from kandinsky22.pipelines.sampling import LATENTS, Plan

D = TypeVar("D", bound=DecoderPipeline)
P = TypeVar("P", bound=DiffusionPipeline)


class CombinedPipeline(DiffusionPipeline, Generic[D]):
    """A decoder and its prior, whose components carry the prefix `prior_`.

    `prior_pipe` and `decoder_pipe` are pipelines of their own, made of the same components.
    """

    decoder_class: type[D]
    model_cpu_offload_seq: ClassVar[str] = "prior_text_encoder->prior_image_encoder->unet->movq"
    _exclude_from_cpu_offload: ClassVar[list[str]] = ["prior_prior"]

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
        return pipe

    def _embed(self, plan: Plan, **arguments: Any) -> dict[str, Tensor]:
        """The decoder's embeddings for a planned call, from a call of the prior."""
        decoder, prior = self.decoder_pipe, self.prior_pipe
        prior._need("prior")
        made, read = prior.prior.config.embedding_dim, decoder.unet.config.encoder_hid_dim
        if made != read:
            raise InputError(f"the prior makes embeddings of {made} numbers, the unet reads {read}: they do not fit")
        out = prior(**arguments)
        guided = plan.guidance_scale > 1
        return decoder._embeddings(out.image_embeds, out.negative_image_embeds, 1, guided)


class KandinskyV22CombinedPipeline(CombinedPipeline[KandinskyV22Pipeline]):
    """Pictures from prompts."""

    decoder_class = KandinskyV22Pipeline

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        negative_prompt: str | list[str] | None = None,
        num_inference_steps: int = 100,
        guidance_scale: float = 4.0,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        prior_guidance_scale: float = 4.0,
        prior_num_inference_steps: int = 25,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        callback: Any = None,
        callback_steps: int | None = 1,
        return_dict: bool = True,
        prior_callback_on_step_end: Any = None,
        prior_callback_on_step_end_tensor_inputs: list[str] | None = LATENTS,
        callback_on_step_end: Any = None,
        callback_on_step_end_tensor_inputs: list[str] | None = LATENTS,
    ) -> Any:
        """Pictures, num_images_per_prompt for each prompt; arguments as of the two pipelines, in which they act.

        `latents` with four dimensions are start noise of the decoder, with two of the prior. The generators serve the
        prior first, then the decoder. Raises InputError before any network runs.
        """
        positive, _ = prompts.pairs(prompt, negative_prompt)
        copies = checks.whole("num_images_per_prompt", num_images_per_prompt)
        of_prior = isinstance(latents, Tensor) and latents.ndim == 2
        checks.choice("output_type", output_type, images.OUTPUT_TYPES)
        decoder = self.decoder_pipe
        callbacks = decoder._check_callbacks(
            callback_on_step_end, callback_on_step_end_tensor_inputs, callback, callback_steps
        )
        options = (num_inference_steps, guidance_scale, generator, None if of_prior else latents, callbacks)
        plan = decoder._plan(len(positive) * copies, (height, width), *options)
        embeds = self._embed(
            plan,
            prompt=prompt,
            negative_prompt=negative_prompt,
            num_images_per_prompt=copies,
            num_inference_steps=prior_num_inference_steps,
            generator=generator,
            latents=latents if of_prior else None,
            guidance_scale=prior_guidance_scale,
            callback_on_step_end=prior_callback_on_step_end,
            callback_on_step_end_tensor_inputs=prior_callback_on_step_end_tensor_inputs,
        )
        return decoder._generate(plan, embeds, output_type, return_dict)
