"""Prior and decoder as one pipeline: prompts to images."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar, Generic, TypeAlias, TypeVar

from torch import Tensor

from kandinsky22.errors import InputError, invalid
from kandinsky22.inputs import prompts, validation
from kandinsky22.inputs.images import ImageInputs
from kandinsky22.models import PriorTransformer, UNet2DConditionModel, VQModel
from kandinsky22.noise import Generators
from kandinsky22.pipelines.base import DiffusionPipeline
from kandinsky22.pipelines.consistency import check_consistency
from kandinsky22.pipelines.decoder import (
    KandinskyV22Img2ImgPipeline,
    KandinskyV22InpaintPipeline,
    KandinskyV22Pipeline,
)
from kandinsky22.pipelines.decoder_base import (
    DecoderPipeline,
    EmbeddingOptions,
    ImageOptions,
    Images,
    OutputOptions,
    TensorNames,
)
from kandinsky22.pipelines.denoising import LATENTS, Callbacks, LegacyCallback, SamplingOptions, StepEndCallback
from kandinsky22.pipelines.outputs import pipeline_call
from kandinsky22.pipelines.prior import KandinskyV22PriorPipeline
from kandinsky22.runtime.calls import running_call
from kandinsky22.sampling.guidance import Guidance, Interval
from kandinsky22.sampling.presets import PRIOR_PREFIX
from kandinsky22.sampling.scheduler_adapter import Sigmas, TimestepOptions, Timesteps

Texts: TypeAlias = str | list[str]

D = TypeVar("D", bound=DecoderPipeline)

P = TypeVar("P", bound=DiffusionPipeline)


@dataclasses.dataclass(frozen=True)
class PriorOptions:
    """The arguments of a combined call that begin with `prior_`. The prior validates them like its own.

    Attributes:
        num_inference_steps: Number of denoising steps.
        timesteps: Descending timesteps instead of a number; None leaves them to the scheduler.
        sigmas: Descending noise levels instead of a number; None leaves them to the scheduler.
        guidance_scale: See `Guidance.scale`.
        guidance_rescale: See `Guidance.rescale`.
        guidance_interval: See `Guidance.interval`.
        guidance_threshold: See `Guidance.threshold`.
        callback_on_step_end: See `Callbacks.on_step_end`.
        callback_on_step_end_tensor_inputs: See `Callbacks.tensor_inputs`.
    """

    num_inference_steps: int
    timesteps: Timesteps
    sigmas: Sigmas
    guidance_scale: float
    guidance_rescale: float
    guidance_interval: Interval
    guidance_threshold: float | None
    callback_on_step_end: StepEndCallback | None
    callback_on_step_end_tensor_inputs: TensorNames

    def sampling(self, generator: Generators, latents: Tensor | None) -> SamplingOptions:
        """Return the options as the prior takes them.

        Args:
            generator: Generators of the call.
            latents: Initial noise of the prior; None draws it.
        """
        return SamplingOptions(
            TimestepOptions(self.num_inference_steps, self.timesteps, self.sigmas),
            Guidance(self.guidance_scale, self.guidance_rescale, self.guidance_interval, self.guidance_threshold),
            Callbacks(self.callback_on_step_end, self.callback_on_step_end_tensor_inputs),
            generator,
            latents,
        )


class CombinedPipeline(DiffusionPipeline, Generic[D]):
    """A decoder and its prior, whose components carry the prefix `prior_`.

    `prior_pipe` and `decoder_pipe` are separate pipelines around the same components.

    Args:
        unet: The UNet of the decoder.
        scheduler: Scheduler of the decoder: any object with the scheduler protocol.
        movq: MoVQ of the decoder.
        prior_prior: The prior transformer.
        prior_image_encoder: CLIP vision tower with projection.
        prior_text_encoder: CLIP text tower with projection.
        prior_tokenizer: CLIP tokenizer.
        prior_scheduler: Scheduler of the prior: any object with the scheduler protocol.
        prior_image_processor: CLIP image processor.
    """

    unet: UNet2DConditionModel
    scheduler: Any
    movq: VQModel
    prior_prior: PriorTransformer
    prior_image_encoder: Any
    prior_text_encoder: Any
    prior_tokenizer: Any
    prior_scheduler: Any
    prior_image_processor: Any
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
        self._prior_pipe: KandinskyV22PriorPipeline = KandinskyV22PriorPipeline.from_pipe(self)
        self._decoder_pipe: D = self.decoder_class.from_pipe(self)

    @property
    def prior_pipe(self) -> KandinskyV22PriorPipeline:
        """The prior as a separate pipeline with the current components and settings of this one."""
        return self._synchronised(self._prior_pipe, PRIOR_PREFIX)

    @prior_pipe.setter
    def prior_pipe(self, pipe: KandinskyV22PriorPipeline) -> None:
        if not isinstance(pipe, KandinskyV22PriorPipeline):
            raise invalid("prior_pipe", pipe, "a KandinskyV22PriorPipeline")
        self._prior_pipe = pipe

    @property
    def decoder_pipe(self) -> D:
        """The decoder as a separate pipeline with the current components and settings of this one."""
        return self._synchronised(self._decoder_pipe)

    @decoder_pipe.setter
    def decoder_pipe(self, pipe: D) -> None:
        if not isinstance(pipe, self.decoder_class):
            raise invalid("decoder_pipe", pipe, f"a {self.decoder_class.__name__}")
        self._decoder_pipe = pipe

    def _synchronised(self, pipe: P, prefix: str = "") -> P:
        """Return a stage with the current components and settings of this pipeline, all of which may be assigned to."""
        for name, component in pipe._components.items():
            if component is not self._components[prefix + name]:
                setattr(pipe, name, self._components[prefix + name])
        pipe.origin, pipe._hub_options = self.origin, self._hub_options
        if self._generation_defaults and not pipe._generation_defaults:
            pipe._copy_defaults(self, prefix)
        pipe._progress_bar_config = self._progress_bar_config
        pipe._feature_caching = self._feature_caching
        pipe._cuda_graphs = self._cuda_graphs
        pipe._tiny_decoder = None if prefix else self._tiny_decoder
        return pipe

    def interrupt(self) -> None:
        """Stop running calls after their current step. They return what the decoder has by then.

        A callback stops its own call. Any other thread stops all running calls of this pipeline.
        """
        self._prior_pipe.interrupt()
        self._decoder_pipe.interrupt()

    def _call(
        self,
        prompt: Texts,
        negative_prompt: Texts | None,
        prior_options: PriorOptions,
        sampling: SamplingOptions,
        output: OutputOptions,
        inputs: ImageOptions,
        prompt_weights: bool,
    ) -> Images:
        """Run both stages as one call."""
        check_consistency(type(self).__name__, self._components)
        prior, decoder = self.prior_pipe, self.decoder_pipe
        with running_call(prior), running_call(decoder):
            pairs = prompts.prompt_pairs(prompt, negative_prompt, prompt_weights)
            return self._run_stages(prior, decoder, pairs, prior_options, sampling, output, inputs)

    @staticmethod
    def _run_stages(
        prior: KandinskyV22PriorPipeline,
        decoder: D,
        pairs: prompts.PromptPairs,
        prior_options: PriorOptions,
        sampling: SamplingOptions,
        output: OutputOptions,
        inputs: ImageOptions,
    ) -> Images:
        """Plan everything first, then run the prior, then the decoder."""
        latents = sampling.latents
        # latents with two dimensions are initial noise of the prior, with four of the decoder
        for_prior = isinstance(latents, Tensor) and latents.ndim == 2
        images_per_prompt = validation.copy_count(output.num_images_per_prompt)
        with _prior_arguments():
            prior_sampling = prior_options.sampling(sampling.generator, latents if for_prior else None)
            prior_plan = prior._plan(pairs, images_per_prompt, prior_sampling)
        sampling = dataclasses.replace(sampling, latents=None if for_prior else latents)
        plan = decoder._plan(len(pairs.prompts), sampling, output, inputs)
        with _prior_arguments():
            embeds = prior._sample_embeddings(prior_plan)
        prior.maybe_free_model_hooks()
        tensors = decoder._condition_tensors(
            EmbeddingOptions(embeds.positive, embeds.negative), 1, guided=sampling.guidance.enabled
        )
        return decoder._generate(plan, tensors)


@contextlib.contextmanager
def _prior_arguments() -> Iterator[None]:
    """Name arguments in errors as the combined call does: with the prefix `prior_`."""
    try:
        yield
    except InputError as error:
        message = str(error)
        names = ("scheduler", *(field.name for field in dataclasses.fields(PriorOptions)))
        if message.startswith(names):
            raise InputError(PRIOR_PREFIX + message) from error
        raise


class KandinskyV22CombinedPipeline(CombinedPipeline[KandinskyV22Pipeline]):
    """Generate images from prompts."""

    decoder_class = KandinskyV22Pipeline

    @pipeline_call
    def __call__(
        self,
        prompt: Texts,
        negative_prompt: Texts | None = None,
        num_inference_steps: int = 100,
        guidance_scale: float = 4.0,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        prior_guidance_scale: float = 4.0,
        prior_num_inference_steps: int = 25,
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        callback: LegacyCallback | None = None,
        callback_steps: int | None = 1,
        return_dict: bool = True,
        prior_callback_on_step_end: StepEndCallback | None = None,
        prior_callback_on_step_end_tensor_inputs: TensorNames = LATENTS,
        callback_on_step_end: StepEndCallback | None = None,
        callback_on_step_end_tensor_inputs: TensorNames = LATENTS,
        guidance_rescale: float = 0.0,
        guidance_interval: Interval = None,
        guidance_threshold: float | None = None,
        prior_guidance_rescale: float = 0.0,
        prior_guidance_interval: Interval = None,
        prior_guidance_threshold: float | None = None,
        timesteps: Timesteps = None,
        sigmas: Sigmas = None,
        prior_timesteps: Timesteps = None,
        prior_sigmas: Sigmas = None,
        prompt_weights: bool = False,
    ) -> Images:
        """Generate images from prompts.

        Args:
            prompt: One prompt or a list.
            negative_prompt: One negative prompt, or one per prompt; None for none.
            num_inference_steps: Number of denoising steps of the decoder.
            guidance_scale: Scale of classifier-free guidance of the decoder; 1 and below disables it.
            num_images_per_prompt: Images per prompt.
            height: Height in pixels, rounded up to a multiple of 64; None for the model's default size.
            width: Width in pixels, likewise.
            prior_guidance_scale: Scale of classifier-free guidance of the prior.
            prior_num_inference_steps: Number of denoising steps of the prior.
            generator: One generator, a list with one per image, or None for torch's global generator. It serves the
                prior first, then the decoder.
            latents: Initial noise of the decoder, (images, 4, height / 8, width / 8), or of the prior,
                (rows, embedding_dim); None draws both.
            output_type: "pil", "np" (batch, H, W, 3) in [0, 1], "pt" (batch, 3, H, W) as decoded, about [-1, 1],
                or "latent".
            callback: Legacy callback `(step, timestep, latents)` of the decoder, which cannot change anything.
            callback_steps: `callback` runs every `callback_steps` steps; None means 1.
            return_dict: Whether the output class is returned instead of a tuple.
            prior_callback_on_step_end: The same as `callback_on_step_end` for the prior, which it receives.
            prior_callback_on_step_end_tensor_inputs: Tensors that it receives; None for none.
            callback_on_step_end: `(pipe, step, timestep, tensors) -> dict | None`, called after each step of the
                decoder, which it receives; it may return tensors that replace those of the loop.
            callback_on_step_end_tensor_inputs: Tensors that it receives; None for none.
            guidance_rescale: See `Guidance.rescale`.
            guidance_interval: See `Guidance.interval`.
            guidance_threshold: See `Guidance.threshold`.
            prior_guidance_rescale: The same for the prior.
            prior_guidance_interval: The same for the prior.
            prior_guidance_threshold: The same for the prior.
            timesteps: Descending timesteps of the decoder instead of a number of steps.
            sigmas: Descending noise levels of the decoder instead of a number of steps.
            prior_timesteps: Descending timesteps of the prior.
            prior_sigmas: Descending noise levels of the prior.
            prompt_weights: Whether brackets in the prompts are weights: (words), (words:1.5) and [words]. See
                `inputs.weighted_prompts`.

        Returns:
            The images, prompts x num_images_per_prompt.

        Raises:
            InputError: If an argument is invalid; raised before any network runs.
        """
        return self._call(
            prompt,
            negative_prompt,
            PriorOptions(
                prior_num_inference_steps,
                prior_timesteps,
                prior_sigmas,
                prior_guidance_scale,
                prior_guidance_rescale,
                prior_guidance_interval,
                prior_guidance_threshold,
                prior_callback_on_step_end,
                prior_callback_on_step_end_tensor_inputs,
            ),
            SamplingOptions(
                TimestepOptions(num_inference_steps, timesteps, sigmas),
                Guidance(guidance_scale, guidance_rescale, guidance_interval, guidance_threshold),
                Callbacks(callback_on_step_end, callback_on_step_end_tensor_inputs, callback, callback_steps),
                generator,
                latents,
            ),
            OutputOptions(height, width, num_images_per_prompt, output_type, return_dict),
            ImageOptions(),
            prompt_weights,
        )


class KandinskyV22Img2ImgCombinedPipeline(CombinedPipeline[KandinskyV22Img2ImgPipeline]):
    """Generate images from prompts and an initial image."""

    decoder_class = KandinskyV22Img2ImgPipeline

    @pipeline_call
    def __call__(
        self,
        prompt: Texts,
        image: ImageInputs,
        negative_prompt: Texts | None = None,
        num_inference_steps: int = 100,
        guidance_scale: float = 4.0,
        strength: float = 0.3,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        prior_guidance_scale: float = 4.0,
        prior_num_inference_steps: int = 25,
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        callback: LegacyCallback | None = None,
        callback_steps: int | None = 1,
        return_dict: bool = True,
        prior_callback_on_step_end: StepEndCallback | None = None,
        prior_callback_on_step_end_tensor_inputs: TensorNames = LATENTS,
        callback_on_step_end: StepEndCallback | None = None,
        callback_on_step_end_tensor_inputs: TensorNames = LATENTS,
        guidance_rescale: float = 0.0,
        guidance_interval: Interval = None,
        guidance_threshold: float | None = None,
        prior_guidance_rescale: float = 0.0,
        prior_guidance_interval: Interval = None,
        prior_guidance_threshold: float | None = None,
        timesteps: Timesteps = None,
        sigmas: Sigmas = None,
        prior_timesteps: Timesteps = None,
        prior_sigmas: Sigmas = None,
        prompt_weights: bool = False,
    ) -> Images:
        """Generate images from prompts, starting from `image`.

        Args:
            prompt: One prompt or a list.
            image: One image for all prompts or one per prompt: anything that `inputs.images.images_to_tensor` reads,
                resized to height x width, or latents (batch, 4, height / 8, width / 8).
            negative_prompt: One negative prompt, or one per prompt; None for none.
            num_inference_steps: Number of denoising steps of the decoder.
            guidance_scale: Scale of classifier-free guidance of the decoder; 1 and below disables it.
            strength: Fraction of the decoder's steps that run, 0 to 1. At 1 almost nothing of the image remains; with
                strength 0 the image is only encoded and decoded by MoVQ.
            num_images_per_prompt: Images per prompt.
            height: Height in pixels, rounded up to a multiple of 64; None for the model's default size.
            width: Width in pixels, likewise.
            prior_guidance_scale: Scale of classifier-free guidance of the prior.
            prior_num_inference_steps: Number of denoising steps of the prior.
            generator: One generator, a list with one per image, or None for torch's global generator. It serves the
                prior first, then the decoder.
            latents: Initial noise of the decoder, (images, 4, height / 8, width / 8), or of the prior,
                (rows, embedding_dim); None draws both.
            output_type: "pil", "np" (batch, H, W, 3) or "pt" (batch, 3, H, W), both in [0, 1], or "latent".
            callback: Legacy callback `(step, timestep, latents)` of the decoder, which cannot change anything.
            callback_steps: `callback` runs every `callback_steps` steps; None means 1.
            return_dict: Whether the output class is returned instead of a tuple.
            prior_callback_on_step_end: The same as `callback_on_step_end` for the prior, which it receives.
            prior_callback_on_step_end_tensor_inputs: Tensors that it receives; None for none.
            callback_on_step_end: `(pipe, step, timestep, tensors) -> dict | None`, called after each step of the
                decoder, which it receives; it may return tensors that replace those of the loop.
            callback_on_step_end_tensor_inputs: Tensors that it receives; None for none.
            guidance_rescale: See `Guidance.rescale`.
            guidance_interval: See `Guidance.interval`.
            guidance_threshold: See `Guidance.threshold`.
            prior_guidance_rescale: The same for the prior.
            prior_guidance_interval: The same for the prior.
            prior_guidance_threshold: The same for the prior.
            timesteps: Descending timesteps of the decoder instead of a number of steps.
            sigmas: Descending noise levels of the decoder instead of a number of steps.
            prior_timesteps: Descending timesteps of the prior.
            prior_sigmas: Descending noise levels of the prior.
            prompt_weights: Whether brackets in the prompts are weights: (words), (words:1.5) and [words]. See
                `inputs.weighted_prompts`.

        Returns:
            The images, prompts x num_images_per_prompt.

        Raises:
            InputError: If an argument is invalid; raised before any network runs.
        """
        return self._call(
            prompt,
            negative_prompt,
            PriorOptions(
                prior_num_inference_steps,
                prior_timesteps,
                prior_sigmas,
                prior_guidance_scale,
                prior_guidance_rescale,
                prior_guidance_interval,
                prior_guidance_threshold,
                prior_callback_on_step_end,
                prior_callback_on_step_end_tensor_inputs,
            ),
            SamplingOptions(
                TimestepOptions(num_inference_steps, timesteps, sigmas),
                Guidance(guidance_scale, guidance_rescale, guidance_interval, guidance_threshold),
                Callbacks(callback_on_step_end, callback_on_step_end_tensor_inputs, callback, callback_steps),
                generator,
                latents,
            ),
            OutputOptions(height, width, num_images_per_prompt, output_type, return_dict),
            ImageOptions(image=image, strength=strength),
            prompt_weights,
        )


class KandinskyV22InpaintCombinedPipeline(CombinedPipeline[KandinskyV22InpaintPipeline]):
    """Repaint the masked part of an image, from prompts."""

    decoder_class = KandinskyV22InpaintPipeline
    embedded_subfolder = "inpaint"

    @pipeline_call
    def __call__(
        self,
        prompt: Texts,
        image: ImageInputs,
        mask_image: ImageInputs,
        negative_prompt: Texts | None = None,
        num_inference_steps: int = 100,
        guidance_scale: float = 4.0,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        prior_guidance_scale: float = 4.0,
        prior_num_inference_steps: int = 25,
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        prior_callback_on_step_end: StepEndCallback | None = None,
        prior_callback_on_step_end_tensor_inputs: TensorNames = LATENTS,
        callback_on_step_end: StepEndCallback | None = None,
        callback_on_step_end_tensor_inputs: TensorNames = LATENTS,
        callback: LegacyCallback | None = None,
        callback_steps: int | None = None,
        keep_pixels: bool = False,
        guidance_rescale: float = 0.0,
        guidance_interval: Interval = None,
        guidance_threshold: float | None = None,
        prior_guidance_rescale: float = 0.0,
        prior_guidance_interval: Interval = None,
        prior_guidance_threshold: float | None = None,
        timesteps: Timesteps = None,
        sigmas: Sigmas = None,
        prior_timesteps: Timesteps = None,
        prior_sigmas: Sigmas = None,
        padding_mask_crop: int | None = None,
        prompt_weights: bool = False,
    ) -> Images:
        """Repaint `image` where `mask_image` is white, from prompts.

        Args:
            prompt: One prompt or a list.
            image: One image for all prompts or one per prompt: anything that `inputs.images.images_to_tensor` reads
                (float tensors in [-1, 1]), resized to height x width, or latents (batch, 4, height / 8, width / 8).
            mask_image: One mask for all prompts or one per prompt, white where the image is repainted: anything that
                `inputs.masks.masks_to_tensor` reads.
            negative_prompt: One negative prompt, or one per prompt; None for none.
            num_inference_steps: Number of denoising steps of the decoder.
            guidance_scale: Scale of classifier-free guidance of the decoder; 1 and below disables it.
            num_images_per_prompt: Images per prompt.
            height: Height in pixels, rounded up to a multiple of 64; None for the model's default size.
            width: Width in pixels, likewise.
            prior_guidance_scale: Scale of classifier-free guidance of the prior.
            prior_num_inference_steps: Number of denoising steps of the prior.
            generator: One generator, a list with one per image, or None for torch's global generator. It serves the
                prior first, then the decoder.
            latents: Initial noise of the decoder, (images, 4, height / 8, width / 8), or of the prior,
                (rows, embedding_dim); None draws both.
            output_type: "pil", "np" (batch, H, W, 3) in [0, 1], "pt" (batch, 3, H, W) as decoded, about [-1, 1],
                or "latent".
            return_dict: Whether the output class is returned instead of a tuple.
            prior_callback_on_step_end: The same as `callback_on_step_end` for the prior, which it receives.
            prior_callback_on_step_end_tensor_inputs: Tensors that it receives; None for none.
            callback_on_step_end: `(pipe, step, timestep, tensors) -> dict | None`, called after each step of the
                decoder, which it receives; it may return tensors that replace those of the loop.
            callback_on_step_end_tensor_inputs: Tensors that it receives; None for none.
            callback: Legacy callback `(step, timestep, latents)` of the decoder, which cannot change anything.
            callback_steps: `callback` runs every `callback_steps` steps; None means 1.
            keep_pixels: Whether the known pixels are those of the resized image, exactly. Otherwise they are decoded
                from the image's latents.
            guidance_rescale: See `Guidance.rescale`.
            guidance_interval: See `Guidance.interval`.
            guidance_threshold: See `Guidance.threshold`.
            prior_guidance_rescale: The same for the prior.
            prior_guidance_interval: The same for the prior.
            prior_guidance_threshold: The same for the prior.
            timesteps: Descending timesteps of the decoder instead of a number of steps.
            sigmas: Descending noise levels of the decoder instead of a number of steps.
            prior_timesteps: Descending timesteps of the prior.
            prior_sigmas: Descending noise levels of the prior.
            padding_mask_crop: Pixels around the mask. The image is cropped to the mask with this padding, repainted at
                height x width there, and pasted back, so that the result has the size of `image` and its other pixels
                are exactly those of `image`. Requires output type "pil". None repaints the entire image.
            prompt_weights: Whether brackets in the prompts are weights: (words), (words:1.5) and [words]. See
                `inputs.weighted_prompts`.

        Returns:
            The images, prompts x num_images_per_prompt.

        Raises:
            InputError: If an argument is invalid; raised before any network runs.
        """
        return self._call(
            prompt,
            negative_prompt,
            PriorOptions(
                prior_num_inference_steps,
                prior_timesteps,
                prior_sigmas,
                prior_guidance_scale,
                prior_guidance_rescale,
                prior_guidance_interval,
                prior_guidance_threshold,
                prior_callback_on_step_end,
                prior_callback_on_step_end_tensor_inputs,
            ),
            SamplingOptions(
                TimestepOptions(num_inference_steps, timesteps, sigmas),
                Guidance(guidance_scale, guidance_rescale, guidance_interval, guidance_threshold),
                Callbacks(callback_on_step_end, callback_on_step_end_tensor_inputs, callback, callback_steps),
                generator,
                latents,
            ),
            OutputOptions(height, width, num_images_per_prompt, output_type, return_dict),
            ImageOptions(
                image=image, mask_image=mask_image, keep_pixels=keep_pixels, padding_mask_crop=padding_mask_crop
            ),
            prompt_weights,
        )
