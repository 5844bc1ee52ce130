"""The prior: prompts to image embeddings, and interpolation between texts and images."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from kandinsky22.errors import invalid
from kandinsky22.inputs import interpolation, prompts, validation
from kandinsky22.inputs.images import ImageInputs
from kandinsky22.noise import Generators
from kandinsky22.pipelines.building_blocks import ImageStart, NoiseStart
from kandinsky22.pipelines.denoising import (
    LATENTS,
    Callbacks,
    LegacyCallback,
    SamplingOptions,
    StepEndCallback,
)
from kandinsky22.pipelines.outputs import pipeline_call
from kandinsky22.pipelines.prior_base import PRIOR_OUTPUT_TYPES, ImageEmbeddings, PriorPipeline, PriorResult
from kandinsky22.sampling.guidance import Guidance, Interval
from kandinsky22.sampling.scheduler_adapter import Sigmas, TimestepOptions, Timesteps


class KandinskyV22PriorPipeline(NoiseStart, PriorPipeline):
    """Generate image embeddings from prompts, by the unCLIP prior (Ramesh et al. 2022, https://arxiv.org/abs/2204.06125)."""

    @pipeline_call
    def __call__(
        self,
        prompt: str | list[str],
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        num_inference_steps: int = 25,
        generator: Generators = None,
        latents: Tensor | None = None,
        guidance_scale: float = 4.0,
        output_type: str = "pt",
        return_dict: bool = True,
        callback_on_step_end: StepEndCallback | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = LATENTS,
        callback: LegacyCallback | None = None,
        callback_steps: int | None = None,
        guidance_rescale: float = 0.0,
        guidance_interval: Interval = None,
        guidance_threshold: float | None = None,
        timesteps: Timesteps = None,
        sigmas: Sigmas = None,
        prompt_weights: bool = False,
    ) -> PriorResult:
        """Generate image embeddings and negative image embeddings from prompts.

        With negative prompts, their own embeddings are sampled in the same batch, after those of the prompts, and
        returned as the negatives. Otherwise the embedding of an all-zero image is the negative.

        Args:
            prompt: One prompt or a list.
            negative_prompt: One negative prompt, or one per prompt; None for none. A single prompt serves several
                negative prompts too.
            num_images_per_prompt: Embeddings per prompt.
            num_inference_steps: Number of denoising steps.
            generator: One generator, a list with one per embedding, which also draws for its negative, or None for
                torch's global generator.
            latents: Initial noise (rows, embedding_dim), with negative prompts for both halves; None draws it.
            guidance_scale: Scale of classifier-free guidance; 1 and below disables it.
            output_type: "pt" for tensors or "np" for arrays.
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
            prompt_weights: Whether brackets in the prompts are weights: (words), (words:1.5) and [words]. See
                `inputs.weighted_prompts`.

        Returns:
            The embeddings, each (prompts x num_images_per_prompt, embedding_dim).

        Raises:
            InputError: If an argument is invalid; raised before any network runs.
        """
        validation.output_format(output_type, return_dict, PRIOR_OUTPUT_TYPES)
        sampling = SamplingOptions(
            TimestepOptions(num_inference_steps, timesteps, sigmas),
            Guidance(guidance_scale, guidance_rescale, guidance_interval, guidance_threshold),
            Callbacks(callback_on_step_end, callback_on_step_end_tensor_inputs, callback, callback_steps),
            generator,
            latents,
        )
        pairs = prompts.prompt_pairs(prompt, negative_prompt, prompt_weights)
        copies = validation.copy_count(num_images_per_prompt)
        plan = self._plan(pairs, copies, sampling)
        return self._result(self._sample_embeddings(plan), output_type, return_dict)


class KandinskyV22PriorEmb2EmbPipeline(ImageStart, PriorPipeline):
    """Generate image embeddings from prompts, starting from those of images."""

    @pipeline_call
    def __call__(
        self,
        prompt: str | list[str],
        image: ImageInputs | list[Tensor],
        strength: float = 0.3,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        num_inference_steps: int = 25,
        generator: Generators = None,
        guidance_scale: float = 4.0,
        output_type: str = "pt",
        return_dict: bool = True,
        callback_on_step_end: StepEndCallback | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = LATENTS,
        callback: LegacyCallback | None = None,
        callback_steps: int | None = None,
        guidance_rescale: float = 0.0,
        guidance_interval: Interval = None,
        guidance_threshold: float | None = None,
        timesteps: Timesteps = None,
        sigmas: Sigmas = None,
        prompt_weights: bool = False,
    ) -> PriorResult:
        """Generate image embeddings from prompts, starting from those of `image`.

        The last int(num_inference_steps x strength) steps run, from the image's embedding with the noise of the first
        of them. Negative prompts start from the image too. If no step remains to move away from it, the negative
        prompts' embeddings are sampled from noise alone, in all steps.

        Args:
            prompt: One prompt or a list.
            image: One image for all prompts or one per prompt, or several for one prompt: a path, an http(s) address, a
                PIL image of any mode, an array (H, W, C) of uint8 or of floats in [0, 1], preprocessed pixels (n, 3,
                size, size), an embedding (n, embedding_dim), or a list of those.
            strength: Fraction of the steps that run, 0 to 1. At 0 the embedding is returned as it is, at 1 almost
                nothing of it remains.
            negative_prompt: One negative prompt, or one per prompt; None for none.
            num_images_per_prompt: Embeddings per prompt.
            num_inference_steps: Number of denoising steps at strength 1.
            generator: One generator, a list with one per embedding, which also draws for its negative, or None for
                torch's global generator.
            guidance_scale: Scale of classifier-free guidance; 1 and below disables it.
            output_type: "pt" for tensors or "np" for arrays.
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
            prompt_weights: Whether brackets in the prompts are weights: (words), (words:1.5) and [words]. See
                `inputs.weighted_prompts`.

        Returns:
            The embeddings, each (prompts x num_images_per_prompt, embedding_dim).

        Raises:
            InputError: If an argument is invalid; raised before any network runs.
        """
        validation.output_format(output_type, return_dict, PRIOR_OUTPUT_TYPES)
        if image is None:
            raise invalid("image", None, "at least one image or embedding")
        sampling = SamplingOptions(
            TimestepOptions(num_inference_steps, timesteps, sigmas),
            Guidance(guidance_scale, guidance_rescale, guidance_interval, guidance_threshold),
            Callbacks(callback_on_step_end, callback_on_step_end_tensor_inputs, callback, callback_steps),
            generator,
        )
        pairs = prompts.prompt_pairs(prompt, negative_prompt, prompt_weights)
        copies = validation.copy_count(num_images_per_prompt)
        plan = self._plan(pairs, copies, sampling, image=image)
        shortened = dataclasses.replace(plan, sampling=plan.sampling.with_strength(strength))
        embeddings = self._sample_embeddings(shortened)
        if plan.has_negatives and not len(shortened.sampling.schedule.timesteps):
            from_noise = self._sample_embeddings(dataclasses.replace(plan, images=[]))
            embeddings = ImageEmbeddings(embeddings.positive, from_noise.negative)
        return self._result(embeddings, output_type, return_dict)

    def _encode_image(
        self, image: ImageInputs | list[Tensor], device: torch.device | str | None, num_images_per_prompt: int
    ) -> Tensor:
        """Return the embeddings of images, each `num_images_per_prompt` times."""
        parts = interpolation.image_items("image", image, **self._image_options())
        embeds = torch.cat([self.encode_picture(part) for part in parts])
        return embeds.repeat_interleave(num_images_per_prompt, dim=0).to(device)


KandinskyPriorPipeline = KandinskyV22PriorPipeline  # the name by which older guides load the prior of Kandinsky 2.2
