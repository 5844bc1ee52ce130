"""Base of the priors: encoding of prompts and images, sampling of image embeddings, interpolation."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from kandinsky22.errors import invalid
from kandinsky22.inputs import interpolation, prompts, validation, weighted_prompts
from kandinsky22.kernels import host_memory
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
from kandinsky22.pipelines.embedding_cache import LastResults, cached_zero_embed
from kandinsky22.pipelines.network_calls import bind_prior, run_tower
from kandinsky22.pipelines.outputs import KandinskyPriorPipelineOutput, finite_result
from kandinsky22.runtime.calls import as_call
from kandinsky22.runtime.network_state import unwrapped
from kandinsky22.sampling.guidance import Guidance, Interval
from kandinsky22.sampling.loop import Denoise, LoopState, sample
from kandinsky22.sampling.scheduler_adapter import Sigmas, TimestepOptions, Timesteps, TimestepSchedule

PriorResult: TypeAlias = KandinskyPriorPipelineOutput | tuple[Any, ...]

PRIOR_OUTPUT_TYPES = ("pt", "np")


@dataclasses.dataclass(frozen=True)
class TextEncoding:
    """The text condition of the prior.

    Attributes:
        prompt_embeds: Projected pooled embeddings, (batch, embedding_dim).
        text_encoder_hidden_states: Last hidden states, (batch, tokens, width).
        text_mask: True at tokens that are text, (batch, tokens).
    """

    prompt_embeds: Tensor
    text_encoder_hidden_states: Tensor
    text_mask: Tensor

    def rows(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Return rows of each tensor, by field name.

        Args:
            indices: Indices of batch items.
        """
        tensors = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: tensor[list(indices)] for name, tensor in tensors.items()}


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


class PriorPipeline(PromptEncoding, DenoisingPipeline):
    """Base of both prior pipelines.

    Args:
        prior: The prior transformer.
        image_encoder: CLIP vision tower with projection.
        text_encoder: CLIP text tower with projection.
        tokenizer: CLIP tokenizer.
        scheduler: Any object with the scheduler protocol.
        image_processor: CLIP image processor.
    """

    prior: PriorTransformer
    image_encoder: Any
    text_encoder: Any
    tokenizer: Any
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
        self._text_encodings: LastResults[TextEncoding] = LastResults()
        self.register_modules(
            prior=prior,
            image_encoder=image_encoder,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            scheduler=scheduler,
            image_processor=image_processor,
        )

    # Encoding

    @torch.no_grad()  # the cache would hold the encoder's graph
    def encode_text(self, texts: Sequence[str], *, prompt_weights: bool = False) -> TextEncoding:
        """Encode texts with the CLIP text tower.

        Args:
            texts: The texts. Tokens beyond the context length are cut off, with a warning.
            prompt_weights: Whether brackets in the texts are weights, see `inputs.weighted_prompts`.

        Returns:
            One row per text.

        Raises:
            InputError: If weights are invalid.
        """
        if prompt_weights:
            return self._encode_weighted(texts)
        device, dtype = self._execution_device, unwrapped(self.prior).dtype

        def encode() -> TextEncoding:
            tokens = prompts.tokenize(self.tokenizer, texts)
            encoded = self._run_text_encoder(tokens.ids)
            return TextEncoding(
                encoded.text_embeds.to(dtype), encoded.last_hidden_state.to(dtype), tokens.mask.to(device)
            )

        return self._text_encodings.get(self.text_encoder, (tuple(texts), device, dtype, self.tokenizer), encode)

    def _run_text_encoder(self, ids: Tensor) -> Any:
        """Return the output of the text tower for token ids, (batch, length)."""
        with onednn_linear_layers():
            encoded = run_tower(self.text_encoder, ids.to(self._execution_device))
        host_memory.drop_large_mapped_pages(self.text_encoder.parameters())  # the prior runs without them
        return encoded

    def _encode_weighted(self, texts: Sequence[str]) -> TextEncoding:
        """Encode texts whose brackets are weights. Texts without weights are encoded together as usual."""
        parsed = [weighted_prompts.parse("prompt", text) for text in texts]
        simple = {index: "".join(part.text for part in parts) for index, parts in enumerate(parsed)}
        simple = {index: text for index, text in simple.items() if all(part.weight == 1 for part in parsed[index])}
        rows: dict[int, dict[str, Tensor]] = {}
        if simple:
            encoding = self.encode_text(list(simple.values()))
            rows = {index: encoding.rows([row]) for row, index in enumerate(simple)}
        for index, parts in enumerate(parsed):
            if index not in simple:
                rows[index] = vars(self._encode_weighted_prompt(parts))
        return TextEncoding(**{name: torch.cat([rows[index][name] for index in range(len(texts))]) for name in rows[0]})

    def _encode_weighted_prompt(self, parts: list[weighted_prompts.WeightedPart]) -> TextEncoding:
        """Encode one prompt, and the prompt without each of its weighted parts, and combine them."""
        device, dtype = self._execution_device, unwrapped(self.prior).dtype

        def encode() -> TextEncoding:
            weighted = weighted_prompts.tokenize_weighted(self.tokenizer, parts)
            encoded = self._run_text_encoder(weighted.tokens.ids)
            states, pooled = weighted_prompts.apply_weights(
                weighted, encoded.last_hidden_state.float(), encoded.text_embeds.float()
            )
            return TextEncoding(pooled.to(dtype)[None], states.to(dtype)[None], weighted.tokens.mask[:1].to(device))

        return self._text_encodings.get(self.text_encoder, (tuple(parts), device, dtype, self.tokenizer), encode)

    def encode_prompts(
        self,
        prompt: Sequence[str],
        negative: Sequence[str],
        copies: int,
        *,
        guided: bool,
        prompt_weights: bool = False,
    ) -> dict[str, Tensor]:
        """Encode the condition of the loop. Each distinct text is encoded once.

        Args:
            prompt: Texts of the conditional half.
            negative: As many texts of the unconditional half.
            copies: Rows per text.
            guided: Whether both halves are returned, the unconditional one first.
            prompt_weights: Whether brackets in the texts are weights, see `inputs.weighted_prompts`.

        Returns:
            The fields of `TextEncoding` by name.
        """
        texts = [*negative, *prompt] if guided else list(prompt)
        distinct = list(dict.fromkeys(texts))
        rows = [distinct.index(text) for text in texts for _ in range(copies)]
        return self.encode_text(distinct, prompt_weights=prompt_weights).rows(rows)

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Encode preprocessed images with the CLIP vision tower.

        Args:
            pixels: (batch, 3, size, size), as the image processor makes them.

        Returns:
            Image embeddings, (batch, embedding_dim).
        """
        pixels = pixels.to(device=self._execution_device, dtype=self.image_encoder.dtype)
        with onednn_linear_layers():
            embeds: Tensor = run_tower(self.image_encoder, pixels).image_embeds
        return embeds.to(unwrapped(self.prior).dtype)

    def encode_picture(self, picture: Tensor) -> Tensor:
        """Return image embeddings, (batch, embedding_dim).

        Args:
            picture: Preprocessed images (batch, 3, size, size), or embeddings, which are returned as they are.
        """
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
            weights: One number per item; it may be negative.
            num_images_per_prompt: Embeddings to return.
            num_inference_steps: Number of denoising steps per text.
            generator: One generator, a list with one per embedding, or None for torch's global generator.
            latents: Initial noise, (rows, embedding_dim); None draws it.
            negative_prior_prompt: Text whose embedding becomes the negative embedding; None for the all-zero image.
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
        items = interpolation.interpolation_items(
            images_and_prompts, weights, batch_size=copies, **self._image_options()
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
            self._plan(prompts.PromptPairs([item], against, prompt_weights), copies, sampling)
            if isinstance(item, str)
            else None
            for item in items
        ]
        dim = unwrapped(self.prior).config.embedding_dim
        total = torch.zeros(copies, dim, device=self._execution_device, dtype=unwrapped(self.prior).dtype)
        for item, weight, plan in zip(items, weights, plans, strict=True):
            if self._call_state.interrupted:
                break
            if plan is None:
                assert isinstance(item, Tensor)
                total = total + self.encode_picture(item) * weight
            else:
                total = total + self._sample_embeddings(plan).positive * weight
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
