"""Decoders: image embeddings to images, by latent diffusion and MoVQ."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from kandinsky22.inputs import masks
from kandinsky22.inputs.images import ImageInputs
from kandinsky22.noise import Generators
from kandinsky22.pipelines.building_blocks import ImageStart, NoiseStart
from kandinsky22.pipelines.decoder_base import (
    DecoderPipeline,
    DecoderPlan,
    EmbeddingOptions,
    Embeddings,
    ImageOptions,
    Images,
    OutputOptions,
    TensorNames,
)
from kandinsky22.pipelines.denoising import (
    LATENTS,
    Callbacks,
    LegacyCallback,
    SamplingOptions,
    StepEndCallback,
)
from kandinsky22.pipelines.outputs import pipeline_call
from kandinsky22.runtime.network_state import unwrapped
from kandinsky22.sampling.guidance import Guidance, Interval
from kandinsky22.sampling.loop import LoopState
from kandinsky22.sampling.scheduler_adapter import (
    Sigmas,
    TimestepOptions,
    Timesteps,
)


class KandinskyV22Pipeline(NoiseStart, DecoderPipeline):
    """Generate images from image embeddings."""

    @pipeline_call
    def __call__(
        self,
        image_embeds: Embeddings,
        negative_image_embeds: Embeddings | None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 100,
        guidance_scale: float = 4.0,
        num_images_per_prompt: int = 1,
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepEndCallback | None = None,
        callback_on_step_end_tensor_inputs: TensorNames = LATENTS,
        callback: LegacyCallback | None = None,
        callback_steps: int | None = None,
        guidance_rescale: float = 0.0,
        guidance_interval: Interval = None,
        guidance_threshold: float | None = None,
        timesteps: Timesteps = None,
        sigmas: Sigmas = None,
    ) -> Images:
        """Generate images from image embeddings.

        Args:
            image_embeds: Image embeddings of the prior, (batch, embedding_dim).
            negative_image_embeds: Negative embeddings, (batch, embedding_dim) or one row for all. None only without
                guidance.
            height: Height in pixels, rounded up to a multiple of 64; None for the model's default size.
            width: Width in pixels, likewise.
            num_inference_steps: Number of denoising steps.
            guidance_scale: Scale of classifier-free guidance; 1 and below disables it.
            num_images_per_prompt: Images per embedding.
            generator: One generator, a list with one per image, or None for torch's global generator.
            latents: Initial noise, (images, 4, height / 8, width / 8); None draws it.
            output_type: "pil", "np" (batch, H, W, 3) in [0, 1], "pt" (batch, 3, H, W) as decoded, about [-1, 1], or
                "latent".
            return_dict: Whether the output class is returned instead of a tuple.
            callback_on_step_end: `(pipe, step, timestep, tensors) -> dict | None`, called after each step; it may
                return tensors that replace those of the loop.
            callback_on_step_end_tensor_inputs: Tensors that it receives; None for none.
            callback: Legacy callback `(step, timestep, latents)`, which cannot change anything.
            callback_steps: `callback` runs every `callback_steps` steps; None means 1.
            guidance_rescale: See `Guidance.rescale`.
            guidance_interval: See `Guidance.interval`.
            guidance_threshold: See `Guidance.threshold`.
            timesteps: Descending timesteps instead of a number of steps, for schedulers that accept them.
            sigmas: Descending noise levels instead of a number of steps, for schedulers that accept them.

        Returns:
            The images, batch x num_images_per_prompt.

        Raises:
            InputError: If an argument is invalid; raised before any network runs.
        """
        return self._call(
            EmbeddingOptions(image_embeds, negative_image_embeds),
            SamplingOptions(
                TimestepOptions(num_inference_steps, timesteps, sigmas),
                Guidance(guidance_scale, guidance_rescale, guidance_interval, guidance_threshold),
                Callbacks(callback_on_step_end, callback_on_step_end_tensor_inputs, callback, callback_steps),
                generator,
                latents,
            ),
            OutputOptions(height, width, num_images_per_prompt, output_type, return_dict),
            ImageOptions(),
        )


class KandinskyV22Img2ImgPipeline(ImageStart, DecoderPipeline):
    """Generate images from image embeddings and an initial image."""

    _image_inputs = ("image",)
    _accepts_strength = True
    _pt_output_in_unit_range = True

    @pipeline_call
    def __call__(
        self,
        image_embeds: Embeddings,
        image: ImageInputs,
        negative_image_embeds: Embeddings | None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 100,
        guidance_scale: float = 4.0,
        strength: float = 0.3,
        num_images_per_prompt: int = 1,
        generator: Generators = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepEndCallback | None = None,
        callback_on_step_end_tensor_inputs: TensorNames = LATENTS,
        callback: LegacyCallback | None = None,
        callback_steps: int | None = None,
        guidance_rescale: float = 0.0,
        guidance_interval: Interval = None,
        guidance_threshold: float | None = None,
        timesteps: Timesteps = None,
        sigmas: Sigmas = None,
    ) -> Images:
        """Generate images from image embeddings, starting from `image`.

        Args:
            image_embeds: Image embeddings of the prior, (batch, embedding_dim).
            image: One image for all embeddings or one per embedding: anything that `inputs.images.images_to_tensor`
                reads, resized to height x width, or latents (batch, 4, height / 8, width / 8).
            negative_image_embeds: Negative embeddings, (batch, embedding_dim) or one row for all. None only without
                guidance.
            height: Height in pixels, rounded up to a multiple of 64; None for the model's default size.
            width: Width in pixels, likewise.
            num_inference_steps: Number of denoising steps at strength 1.
            guidance_scale: Scale of classifier-free guidance; 1 and below disables it.
            strength: Fraction of the steps that run, 0 to 1. At 1 almost nothing of the image remains; with strength 0
                the image is only encoded and decoded by MoVQ.
            num_images_per_prompt: Images per embedding.
            generator: One generator, a list with one per image, or None for torch's global generator.
            output_type: "pil", "np" (batch, H, W, 3) or "pt" (batch, 3, H, W), both in [0, 1], or "latent".
            return_dict: Whether the output class is returned instead of a tuple.
            callback_on_step_end: `(pipe, step, timestep, tensors) -> dict | None`, called after each step; it may
                return tensors that replace those of the loop.
            callback_on_step_end_tensor_inputs: Tensors that it receives; None for none.
            callback: Legacy callback `(step, timestep, latents)`, which cannot change anything.
            callback_steps: `callback` runs every `callback_steps` steps; None means 1.
            guidance_rescale: See `Guidance.rescale`.
            guidance_interval: See `Guidance.interval`.
            guidance_threshold: See `Guidance.threshold`.
            timesteps: Descending timesteps instead of a number of steps, for schedulers that accept them.
            sigmas: Descending noise levels instead of a number of steps, for schedulers that accept them.

        Returns:
            The images, batch x num_images_per_prompt.

        Raises:
            InputError: If an argument is invalid; raised before any network runs.
        """
        return self._call(
            EmbeddingOptions(image_embeds, negative_image_embeds),
            SamplingOptions(
                TimestepOptions(num_inference_steps, timesteps, sigmas),
                Guidance(guidance_scale, guidance_rescale, guidance_interval, guidance_threshold),
                Callbacks(callback_on_step_end, callback_on_step_end_tensor_inputs, callback, callback_steps),
                generator,
            ),
            OutputOptions(height, width, num_images_per_prompt, output_type, return_dict),
            ImageOptions(image=image, strength=strength),
        )


class KandinskyV22InpaintPipeline(NoiseStart, DecoderPipeline):
    """Repaint the masked part of an image, from image embeddings."""

    _callback_tensor_inputs: ClassVar = [*DecoderPipeline._callback_tensor_inputs, "masked_image", "mask_image"]
    _image_inputs = ("image", "mask_image")
    embedded_subfolder = "inpaint"
    _extra_unet_channels = 5
    _image_tensors_are_signed = True

    @pipeline_call
    def __call__(
        self,
        image_embeds: Embeddings,
        image: ImageInputs,
        mask_image: ImageInputs,
        negative_image_embeds: Embeddings | None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 100,
        guidance_scale: float = 4.0,
        num_images_per_prompt: int = 1,
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepEndCallback | None = None,
        callback_on_step_end_tensor_inputs: TensorNames = LATENTS,
        callback: LegacyCallback | None = None,
        callback_steps: int | None = None,
        keep_pixels: bool = False,
        guidance_rescale: float = 0.0,
        guidance_interval: Interval = None,
        guidance_threshold: float | None = None,
        timesteps: Timesteps = None,
        sigmas: Sigmas = None,
        padding_mask_crop: int | None = None,
    ) -> Images:
        """Repaint `image` where `mask_image` is white, from image embeddings.

        Args:
            image_embeds: Image embeddings of the prior, (batch, embedding_dim).
            image: One image for all embeddings or one per embedding: anything that `inputs.images.images_to_tensor`
                reads (float tensors in [-1, 1]), resized to height x width, or latents (batch, 4, height / 8, width /
                8).
            mask_image: One mask for all embeddings or one per embedding, white where the image is repainted: anything
                that `inputs.masks.masks_to_tensor` reads.
            negative_image_embeds: Negative embeddings, (batch, embedding_dim) or one row for all. None only without
                guidance.
            height: Height in pixels, rounded up to a multiple of 64; None for the model's default size.
            width: Width in pixels, likewise.
            num_inference_steps: Number of denoising steps.
            guidance_scale: Scale of classifier-free guidance; 1 and below disables it.
            num_images_per_prompt: Images per embedding.
            generator: One generator, a list with one per image, or None for torch's global generator.
            latents: Initial noise, (images, 4, height / 8, width / 8); None draws it.
            output_type: "pil", "np" (batch, H, W, 3) in [0, 1], "pt" (batch, 3, H, W) as decoded, about [-1, 1], or
                "latent".
            return_dict: Whether the output class is returned instead of a tuple.
            callback_on_step_end: `(pipe, step, timestep, tensors) -> dict | None`, called after each step; it may
                return tensors that replace those of the loop.
            callback_on_step_end_tensor_inputs: Tensors that it receives; None for none.
            callback: Legacy callback `(step, timestep, latents)`, which cannot change anything.
            callback_steps: `callback` runs every `callback_steps` steps; None means 1.
            keep_pixels: Whether the known pixels are those of the resized image, exactly. Otherwise they are decoded
                from the image's latents.
            guidance_rescale: See `Guidance.rescale`.
            guidance_interval: See `Guidance.interval`.
            guidance_threshold: See `Guidance.threshold`.
            timesteps: Descending timesteps instead of a number of steps, for schedulers that accept them.
            sigmas: Descending noise levels instead of a number of steps, for schedulers that accept them.
            padding_mask_crop: Pixels around the mask. The image is cropped to the mask with this padding, repainted at
                height x width there, and pasted back, so that the result has the size of `image` and its other pixels
                are exactly those of `image`. Requires output type "pil". None repaints the entire image.

        Returns:
            The images, batch x num_images_per_prompt.

        Raises:
            InputError: If an argument is invalid; raised before any network runs.
        """
        return self._call(
            EmbeddingOptions(image_embeds, negative_image_embeds),
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
        )

    def _generate(self, plan: DecoderPlan, tensors: dict[str, Tensor]) -> Images:
        image, noise = self._encode_image(plan), self._standard_noise(plan.sampling, unwrapped(self.unet).dtype)
        height, width = plan.sampling.shape[2:]
        known = self._expand_to_batch(plan, masks.unmasked_latents(plan.images["mask_image"], (height, width)))
        tensors = self._with_conditioning(plan, tensors, masked_image=image * known, mask_image=known)

        def restore_known(latents: Tensor, known_latents: Tensor) -> Tensor:
            mask = tensors["mask_image"][-len(latents) :]  # a callback may have replaced it
            return mask * known_latents + (1 - mask) * latents

        def post_step(latents: Tensor, state: LoopState) -> Tensor:
            return restore_known(latents, self._add_noise(plan, image, noise, step=state.index + 1))

        initial = noise * plan.sampling.schedule.scheduler.init_noise_sigma
        latents = self._denoise(plan.sampling, initial, tensors, post_step)
        return self._decode(plan, restore_known(latents, image))


class KandinskyV22ControlnetPipeline(NoiseStart, DecoderPipeline):
    """Generate images from image embeddings and a hint, such as a depth map."""

    _callback_tensor_inputs: ClassVar = [*DecoderPipeline._callback_tensor_inputs, "hint"]
    _image_inputs = ("hint",)
    embedded_subfolder = "control"
    _extra_unet_channels = 4
    _addition_embed_type = "image_hint"

    @pipeline_call
    def __call__(
        self,
        image_embeds: Embeddings,
        negative_image_embeds: Embeddings | None,
        hint: ImageInputs,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 100,
        guidance_scale: float = 4.0,
        num_images_per_prompt: int = 1,
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        callback: LegacyCallback | None = None,
        callback_steps: int | None = 1,
        return_dict: bool = True,
        callback_on_step_end: StepEndCallback | None = None,
        callback_on_step_end_tensor_inputs: TensorNames = LATENTS,
        guidance_rescale: float = 0.0,
        guidance_interval: Interval = None,
        guidance_threshold: float | None = None,
        timesteps: Timesteps = None,
        sigmas: Sigmas = None,
    ) -> Images:
        """Generate images from image embeddings, composed as `hint` shows.

        Args:
            image_embeds: Image embeddings of the prior, (batch, embedding_dim).
            negative_image_embeds: Negative embeddings, (batch, embedding_dim) or one row for all. None only without
                guidance.
            hint: One hint for all embeddings or one per embedding: anything that `inputs.images.hints_to_tensor` reads,
                resized to height x width.
            height: Height in pixels, rounded up to a multiple of 64; None for the model's default size.
            width: Width in pixels, likewise.
            num_inference_steps: Number of denoising steps.
            guidance_scale: Scale of classifier-free guidance; 1 and below disables it.
            num_images_per_prompt: Images per embedding.
            generator: One generator, a list with one per image, or None for torch's global generator.
            latents: Initial noise, (images, 4, height / 8, width / 8); None draws it.
            output_type: "pil", "np" (batch, H, W, 3) in [0, 1], "pt" (batch, 3, H, W) as decoded, about [-1, 1], or
                "latent".
            callback: Legacy callback `(step, timestep, latents)`, which cannot change anything.
            callback_steps: `callback` runs every `callback_steps` steps; None means 1.
            return_dict: Whether the output class is returned instead of a tuple.
            callback_on_step_end: `(pipe, step, timestep, tensors) -> dict | None`, called after each step; it may
                return tensors that replace those of the loop.
            callback_on_step_end_tensor_inputs: Tensors that it receives; None for none.
            guidance_rescale: See `Guidance.rescale`.
            guidance_interval: See `Guidance.interval`.
            guidance_threshold: See `Guidance.threshold`.
            timesteps: Descending timesteps instead of a number of steps, for schedulers that accept them.
            sigmas: Descending noise levels instead of a number of steps, for schedulers that accept them.

        Returns:
            The images, batch x num_images_per_prompt.

        Raises:
            InputError: If an argument is invalid; raised before any network runs.
        """
        return self._call(
            EmbeddingOptions(image_embeds, negative_image_embeds),
            SamplingOptions(
                TimestepOptions(num_inference_steps, timesteps, sigmas),
                Guidance(guidance_scale, guidance_rescale, guidance_interval, guidance_threshold),
                Callbacks(callback_on_step_end, callback_on_step_end_tensor_inputs, callback, callback_steps),
                generator,
                latents,
            ),
            OutputOptions(height, width, num_images_per_prompt, output_type, return_dict),
            ImageOptions(hint=hint),
        )


class KandinskyV22ControlnetImg2ImgPipeline(ImageStart, DecoderPipeline):
    """Generate images from image embeddings, an initial image and a hint."""

    _callback_tensor_inputs: ClassVar = KandinskyV22ControlnetPipeline._callback_tensor_inputs
    _image_inputs = ("image", "hint")
    _accepts_strength = True
    embedded_subfolder = "control"
    _extra_unet_channels = 4
    _addition_embed_type = "image_hint"
    _pt_output_in_unit_range = True

    @pipeline_call
    def __call__(
        self,
        image_embeds: Embeddings,
        image: ImageInputs,
        negative_image_embeds: Embeddings | None,
        hint: ImageInputs,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 100,
        guidance_scale: float = 4.0,
        strength: float = 0.3,
        num_images_per_prompt: int = 1,
        generator: Generators = None,
        output_type: str = "pil",
        callback: LegacyCallback | None = None,
        callback_steps: int | None = 1,
        return_dict: bool = True,
        callback_on_step_end: StepEndCallback | None = None,
        callback_on_step_end_tensor_inputs: TensorNames = LATENTS,
        guidance_rescale: float = 0.0,
        guidance_interval: Interval = None,
        guidance_threshold: float | None = None,
        timesteps: Timesteps = None,
        sigmas: Sigmas = None,
    ) -> Images:
        """Generate images from image embeddings, starting from `image` and composed as `hint` shows.

        Args:
            image_embeds: Image embeddings of the prior, (batch, embedding_dim).
            image: One image for all embeddings or one per embedding: anything that `inputs.images.images_to_tensor`
                reads, resized to height x width, or latents (batch, 4, height / 8, width / 8).
            negative_image_embeds: Negative embeddings, (batch, embedding_dim) or one row for all. None only without
                guidance.
            hint: One hint for all embeddings or one per embedding: anything that `inputs.images.hints_to_tensor` reads,
                resized to height x width.
            height: Height in pixels, rounded up to a multiple of 64; None for the model's default size.
            width: Width in pixels, likewise.
            num_inference_steps: Number of denoising steps at strength 1.
            guidance_scale: Scale of classifier-free guidance; 1 and below disables it.
            strength: Fraction of the steps that run, 0 to 1. At 1 almost nothing of the image remains; with strength 0
                the image is only encoded and decoded by MoVQ.
            num_images_per_prompt: Images per embedding.
            generator: One generator, a list with one per image, or None for torch's global generator.
            output_type: "pil", "np" (batch, H, W, 3) or "pt" (batch, 3, H, W), both in [0, 1], or "latent".
            callback: Legacy callback `(step, timestep, latents)`, which cannot change anything.
            callback_steps: `callback` runs every `callback_steps` steps; None means 1.
            return_dict: Whether the output class is returned instead of a tuple.
            callback_on_step_end: `(pipe, step, timestep, tensors) -> dict | None`, called after each step; it may
                return tensors that replace those of the loop.
            callback_on_step_end_tensor_inputs: Tensors that it receives; None for none.
            guidance_rescale: See `Guidance.rescale`.
            guidance_interval: See `Guidance.interval`.
            guidance_threshold: See `Guidance.threshold`.
            timesteps: Descending timesteps instead of a number of steps, for schedulers that accept them.
            sigmas: Descending noise levels instead of a number of steps, for schedulers that accept them.

        Returns:
            The images, batch x num_images_per_prompt.

        Raises:
            InputError: If an argument is invalid; raised before any network runs.
        """
        return self._call(
            EmbeddingOptions(image_embeds, negative_image_embeds),
            SamplingOptions(
                TimestepOptions(num_inference_steps, timesteps, sigmas),
                Guidance(guidance_scale, guidance_rescale, guidance_interval, guidance_threshold),
                Callbacks(callback_on_step_end, callback_on_step_end_tensor_inputs, callback, callback_steps),
                generator,
            ),
            OutputOptions(height, width, num_images_per_prompt, output_type, return_dict),
            ImageOptions(image=image, hint=hint, strength=strength),
        )
