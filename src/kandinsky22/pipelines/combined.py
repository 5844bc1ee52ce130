"""Prior and decoder as one pipeline: prompts to images."""

from __future__ import annotations

from torch import Tensor

from kandinsky22.inputs.images import ImageInputs
from kandinsky22.noise import Generators
from kandinsky22.pipelines.combined_base import CombinedPipeline, PriorOptions, Texts
from kandinsky22.pipelines.decoder import (
    KandinskyV22Img2ImgPipeline,
    KandinskyV22InpaintPipeline,
    KandinskyV22Pipeline,
)
from kandinsky22.pipelines.decoder_base import ImageOptions, Images, OutputOptions, TensorNames
from kandinsky22.pipelines.denoising import LATENTS, Callbacks, LegacyCallback, SamplingOptions, StepEndCallback
from kandinsky22.pipelines.outputs import pipeline_call
from kandinsky22.sampling.guidance import Guidance, Interval
from kandinsky22.sampling.scheduler_adapter import Sigmas, TimestepOptions, Timesteps


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
