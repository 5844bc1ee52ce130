"""Base of the priors: encoding of prompts and images, sampling of image embeddings, interpolation."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from kandinsky22.errors import invalid
from kandinsky22.inputs import interpolation, prompts, validation, weighted_prompts
from kandinsky22.kernels.linear import onednn_linear_layers
from kandinsky22.models import PriorTransformer
from kandinsky22.noise import Generators
from kandinsky22.pipelines.building_blocks import PromptEncoding
from kandinsky22.pipelines.denoising import (
    LATENTS,
    Callbacks,
    DenoisingPipeline,
    SamplingOptions,
    SamplingPlan,
    StepEndCallback,
)
from kandinsky22.pipelines.embedding_cache import cached_zero_embed
from kandinsky22.pipelines.network_calls import bind_prior, run_tower
from kandinsky22.pipelines.outputs import KandinskyPriorPipelineOutput, finite_result
from kandinsky22.pipelines.text_encoding import TextEncodingPipeline
from kandinsky22.runtime.calls import as_call
from kandinsky22.runtime.network_state import unwrapped
from kandinsky22.sampling.guidance import Guidance, Interval
from kandinsky22.sampling.loop import Denoise, LoopState, sample
from kandinsky22.sampling.scheduler_adapter import Sigmas, TimestepOptions, Timesteps, TimestepSchedule

PriorResult: TypeAlias = KandinskyPriorPipelineOutput | tuple[Any, ...]

PRIOR_OUTPUT_TYPES = ("pt", "np")


@dataclasses.dataclass(frozen=True)
class ImageEmbeddings:
    """Image embeddings and negative image embeddings, each (batch, embedding_dim).

    Attributes:
        positive: Image embeddings.
        negative: Negative image embeddings.
    """

    positive: Tensor
    negative: Tensor


@dataclasses.dataclass(frozen=True)
class PriorPlan:
    """A validated call of the prior. No network has run yet.

    Attributes:
        texts: Prompts, followed by negative prompts if there are any: an embedding is sampled for each.
        unconditional_texts: As many texts for the unconditional half of guided steps.
        copies: Embeddings per text.
        has_negatives: Whether the second half of `texts` are negative prompts.
        weighted: Whether brackets in the texts are weights.
        sampling: Plan of the denoising loop.
        images: Images and embeddings to start from: one, or one per prompt; empty starts from noise.
    """

    texts: list[str]
    unconditional_texts: list[str]
    copies: int
    has_negatives: bool
    sampling: SamplingPlan
    images: list[Tensor]
    weighted: bool = False


class PriorPipeline(PromptEncoding, TextEncodingPipeline, DenoisingPipeline):
    """Base of both prior pipelines.

    Args:
        prior: The prior transformer.
        image_encoder: CLIP vision tower with projection.
        text_encoder: CLIP text tower with projection.
        tokenizer: CLIP tokenizer.
        scheduler: Any object with the scheduler protocol.
        image_processor: CLIP image processor.
    """

    image_encoder: Any
    image_processor: Any
    embedded_subfolder: ClassVar[str] = "prior"
    model_cpu_offload_seq: ClassVar[str] = "text_encoder->image_encoder->prior"
    _callback_tensor_inputs: ClassVar[list[str]] = [
        "latents",
        "prompt_embeds",
        "text_encoder_hidden_states",
        "text_mask",
    ]

    def __init__(
        self,
        prior: PriorTransformer,
        image_encoder: Any,
        text_encoder: Any,
        tokenizer: Any,
        scheduler: Any,
        image_processor: Any,
    ) -> None:
        super().__init__()
        self.register_modules(
            prior=prior,
            image_encoder=image_encoder,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            scheduler=scheduler,
            image_processor=image_processor,
        )

    # Encoding

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Encode preprocessed images with the CLIP vision tower.

        Args:
            pixels: (batch, 3, size, size), as the image processor makes them.

        Returns:
            Image embeddings, (batch, embedding_dim).

        Raises:
            InputError: If `pixels` has another shape, or the pipeline has no image encoder.
        """
        self._require("prior", "image_encoder")
        _check_dimensions("pixels", pixels, (4,), "a tensor (batch, 3, size, size)")
        pixels = pixels.to(device=self._execution_device, dtype=self.image_encoder.dtype)
        with onednn_linear_layers():
            embeds: Tensor = run_tower(self.image_encoder, pixels).image_embeds
        return embeds.to(unwrapped(self.prior).dtype)

    def encode_picture(self, picture: Tensor) -> Tensor:
        """Return image embeddings, (batch, embedding_dim).

        Args:
            picture: Preprocessed images (batch, 3, size, size), or embeddings, which are returned as they are.

        Raises:
            InputError: If `picture` is neither, or the pipeline has no image encoder and needs it.
        """
        _check_dimensions("picture", picture, (2, 4), "a tensor (batch, 3, size, size) or (batch, embedding_dim)")
        if picture.ndim == 4:
            return self.encode_pixels(picture)
        return picture.to(device=self._execution_device, dtype=unwrapped(self.prior).dtype)

    def get_zero_embed(self, batch_size: int = 1, device: torch.device | str | None = None) -> Tensor:
        """Return the embedding of an all-zero image, which stands for "no condition", (batch_size, embedding_dim).

        Args:
            batch_size: Number of rows.
            device: Device of the result; None for the execution device.

        Raises:
            InputError: If an argument is invalid, or the pipeline has no image encoder.
        """
        validation.positive_int("batch_size", batch_size, validation.MAX_COPIES)
        target = None if device is None else validation.usable_device(device)
        self._require("prior", "image_encoder")
        encoder = self._components["image_encoder"]
        size = encoder.config.image_size
        black = torch.zeros(1, 3, size, size, dtype=torch.float32)
        embed = cached_zero_embed(encoder, unwrapped(self.prior).dtype, lambda: self.encode_pixels(black))
        finite_result("the embedding of the all-zero image", embed)
        return embed.repeat(int(batch_size), 1).to(self._execution_device if target is None else target)

    # Planning

    def _plan(
        self,
        pairs: prompts.PromptPairs,
        copies: int,
        sampling: SamplingOptions,
        *,
        image: Any = None,
    ) -> PriorPlan:
        """Validate a call, and read its images; `image` None starts from noise."""
        positive, negative = pairs.prompts, pairs.negative_prompts
        if pairs.weighted:
            for name, listed in (("prompt", positive), ("negative_prompt", negative or [])):
                for text in listed:
                    weighted_prompts.parse(name, text)
        images = [] if image is None else interpolation.image_items("image", image, **self._image_options())
        self._require("prior", "text_encoder", "tokenizer", "scheduler", *(() if negative else ("image_encoder",)))
        self._check_engines()
        if images:
            self._require_add_noise()
        count = sum(len(part) for part in images) or 1
        if len(positive) == 1:
            positive, negative = positive * count, negative and negative * count
        elif count not in (1, len(positive)):
            raise invalid("len(image)", count, f"1 or {len(positive)}, the number of prompts")
        texts = positive + (negative or [])
        unconditional = negative * 2 if negative else [""] * len(texts)
        shape = (len(texts) * copies, unwrapped(self.prior).config.embedding_dim)
        plan = self._plan_sampling(sampling, shape=shape, images=len(positive) * copies)
        return PriorPlan(texts, unconditional, copies, negative is not None, plan, images, pairs.weighted)

    def _image_options(self) -> dict[str, Any]:
        """Return the options with which `inputs.interpolation` reads images and recognises embeddings."""
        self._require("prior", "image_encoder", "image_processor")
        return {
            "embedding_dim": unwrapped(self.prior).config.embedding_dim,
            "image_size": self._components["image_encoder"].config.image_size,
            "image_processor": self.image_processor,
        }

    # Sampling

    def _bind_condition(self, tensors: Mapping[str, Tensor], schedule: TimestepSchedule) -> Denoise:
        return bind_prior(lambda: self.prior, tensors, schedule.timesteps.tolist())

    def _sample_embeddings(self, plan: PriorPlan) -> ImageEmbeddings:
        """Run a plan."""
        sampling, dtype = plan.sampling, unwrapped(self.prior).dtype
        tensors = self.encode_prompts(
            plan.texts,
            plan.unconditional_texts,
            plan.copies,
            guided=sampling.guidance.enabled,
            prompt_weights=plan.weighted,
        )
        if plan.images:
            embeds = torch.cat([self.encode_picture(part) for part in plan.images])
            embeds = embeds.repeat_interleave(plan.copies, dim=0)
            embeds = embeds.repeat(sampling.shape[0] // len(embeds), 1)
        if not plan.images or len(sampling.schedule.timesteps):
            noise, scheduler = self._standard_noise(sampling, dtype), sampling.schedule.scheduler
            if plan.images:
                latents = scheduler.add_noise(embeds, noise, sampling.schedule.timesteps[:1].repeat(len(embeds)))
            else:
                latents = noise * scheduler.init_noise_sigma
            embeds = unwrapped(self.prior).post_process_latents(self._denoise(sampling, latents, tensors))
        finite_result("image_embeds", embeds)
        if plan.has_negatives:
            positive, negative = embeds.chunk(2)
            return ImageEmbeddings(positive, negative)
        return ImageEmbeddings(embeds, self.get_zero_embed(len(embeds)))

    def _result(self, embeddings: ImageEmbeddings, output_type: str, return_dict: bool) -> PriorResult:
        """Return the result of a call in the requested form."""
        self.maybe_free_model_hooks()
        positive: Any = embeddings.positive
        negative: Any = embeddings.negative
        if output_type == "np":  # numpy has no bfloat16
            positive, negative = (value.float().cpu().numpy() for value in (positive, negative))
        return KandinskyPriorPipelineOutput(positive, negative) if return_dict else (positive, negative)

    # Interpolation

    @as_call
    @torch.no_grad()
    def interpolate(
        self,
        images_and_prompts: list[Any],
        weights: list[float],
        num_images_per_prompt: int = 1,
        num_inference_steps: int = 25,
        generator: Generators = None,
        latents: Tensor | None = None,
        negative_prior_prompt: str | None = None,
        negative_prompt: str | list[str] = "",
        guidance_scale: float = 4.0,
        device: torch.device | str | None = None,
        guidance_rescale: float = 0.0,
        guidance_interval: Interval = None,
        guidance_threshold: float | None = None,
        timesteps: Timesteps = None,
        sigmas: Sigmas = None,
        prompt_weights: bool = False,
        callback_on_step_end: StepEndCallback | None = None,
    ) -> KandinskyPriorPipelineOutput:
        """Return the weighted sum of the embeddings of texts and images.

        After `interrupt`, the remaining items and the negative prompts are skipped.

        Args:
            images_and_prompts: Items: a prompt (a string), an image (a PIL image, a path that is not a string, an
                array), preprocessed pixels (3, size, size) or (1, 3, size, size), or an embedding (embedding_dim,) or
                (num_images_per_prompt, embedding_dim). Value ranges are those of `image` in
                `KandinskyV22PriorEmb2EmbPipeline`.
            weights: One number per item, finite in the type of the prior; it may be negative.
            num_images_per_prompt: Embeddings to return.
            num_inference_steps: Number of denoising steps per text.
            generator: One generator, a list with one per embedding, or None for torch's global generator.
            latents: Initial noise, (rows, embedding_dim); None draws it.
            negative_prior_prompt: Text against which the prior is guided, for every item; None for the empty text. With
                `negative_prompt=""` its embedding is the negative embedding too, instead of that of the all-zero image.
            negative_prompt: Text, or one per embedding, whose embedding becomes the negative embedding; "" for none.
            guidance_scale: Scale of classifier-free guidance; 1 and below disables it.
            device: Device of the results; None for the execution device.
            guidance_rescale: See `Guidance.rescale`.
            guidance_interval: See `Guidance.interval`.
            guidance_threshold: See `Guidance.threshold`.
            timesteps: Descending timesteps instead of a number of steps, for schedulers that accept them.
            sigmas: Descending noise levels instead of a number of steps, for schedulers that accept them.
            prompt_weights: Whether brackets in the texts are weights: (words), (words:1.5) and [words]. See
                `inputs.weighted_prompts`.
            callback_on_step_end: `(pipe, step, timestep, tensors) -> None`, called after each step of each text with
                its latents.

        Returns:
            The interpolated embeddings and their negatives, each (num_images_per_prompt, embedding_dim).

        Raises:
            InputError: If an argument is invalid; raised before any network runs.
        """
        copies = validation.copy_count(num_images_per_prompt)
        dtype = unwrapped(self.prior).dtype
        items = interpolation.interpolation_items(
            images_and_prompts, weights, dtype=dtype, batch_size=copies, **self._image_options()
        )
        target = None if device is None else validation.usable_device(device)
        if negative_prior_prompt is not None and not isinstance(negative_prior_prompt, str):
            raise invalid("negative_prior_prompt", negative_prior_prompt, "a string or None")
        against = (
            None if negative_prior_prompt is None else prompts.text_list("negative_prior_prompt", negative_prior_prompt)
        )
        negatives = prompts.text_list("negative_prompt", negative_prompt)
        validation.strict_bool("prompt_weights", prompt_weights)
        if len(negatives) not in (1, copies):
            raise invalid("len(negative_prompt)", len(negatives), f"1 or {copies}, the number of embeddings")
        sampling = SamplingOptions(
            TimestepOptions(num_inference_steps, timesteps, sigmas),
            Guidance(guidance_scale, guidance_rescale, guidance_interval, guidance_threshold),
            Callbacks(callback_on_step_end, tensor_inputs=None if callback_on_step_end is None else LATENTS),
            generator,
            latents,
        )
        negative_pairs = prompts.PromptPairs(negatives, against and against * len(negatives), prompt_weights)
        negative_plan = self._plan(negative_pairs, copies // len(negatives), sampling)
        plans = [
            self._plan(prompts.PromptPairs([item.content], against, prompt_weights), copies, sampling)
            if isinstance(item.content, str)
            else None
            for item in items
        ]
        dim = unwrapped(self.prior).config.embedding_dim
        total = torch.zeros(copies, dim, device=self._execution_device, dtype=dtype)
        for item, plan in zip(items, plans, strict=True):
            if self._call_state.interrupted:
                break
            if plan is None:
                assert isinstance(item.content, Tensor)
                total = total + self.encode_picture(item.content) * item.weight
            else:
                total = total + self._sample_embeddings(plan).positive * item.weight
        if self._call_state.interrupted or (negative_prompt == "" and negative_prior_prompt is None):
            self._consume_noise(negative_plan.sampling)
            negative = self.get_zero_embed(copies)
        else:
            embeddings = self._sample_embeddings(negative_plan)
            negative = embeddings.negative if negative_prompt == "" else embeddings.positive
        finite_result("image_embeds", total)
        self.maybe_free_model_hooks()
        target = target or total.device
        return KandinskyPriorPipelineOutput(total.to(target), negative.to(target))

    def _consume_noise(self, plan: SamplingPlan) -> None:
        """Draw the noise of a run without its network.

        The reference runs the prior here and discards the result. Drawing the same noise leaves the generator in the
        same state, so that the next image from it is the same.
        """
        latents = self._standard_noise(plan, unwrapped(self.prior).dtype) * plan.schedule.scheduler.init_noise_sigma
        state = LoopState(latents, {}, Guidance(1.0))
        for _ in sample(state, plan.schedule, lambda _: lambda latents, _: latents, plan.generators):
            pass


def _check_dimensions(argument: str, value: Any, dimensions: tuple[int, ...], expected: str) -> None:
    if not isinstance(value, Tensor) or value.ndim not in dimensions:
        raise invalid(argument, value, expected)
