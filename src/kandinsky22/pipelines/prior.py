"""From prompts to image embeddings: the prior, and mixtures of texts and images."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from kandinsky22.errors import InputError
from kandinsky22.inputs import interpolation, prompts, validation
from kandinsky22.kernels import host_memory
from kandinsky22.models import PriorTransformer
from kandinsky22.noise import Generators
from kandinsky22.pipelines.denoising import LATENTS, Denoise, Plan, Run, SamplingPipeline, sample
from kandinsky22.pipelines.embedding_cache import Recent, zero_embed
from kandinsky22.pipelines.outputs import KandinskyPriorPipelineOutput
from kandinsky22.runtime.device import usable_device
from kandinsky22.sampling.guidance import Guidance, Interval
from kandinsky22.sampling.scheduler_adapter import Levels, Steps, Times

PRIOR_OUTPUT_TYPES = ("pt", "np")


@dataclasses.dataclass(frozen=True)
class TextEncoding:
    """What the prior is told about texts: pooled embeddings (batch, dim), all hidden states (batch, tokens, dim) and
    which tokens are text (batch, tokens)."""

    prompt_embeds: Tensor
    text_encoder_hidden_states: Tensor
    text_mask: Tensor

    def rows(self, index: Sequence[int]) -> dict[str, Tensor]:
        """The given rows of each tensor, by name."""
        tensors = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: tensor[list(index)] for name, tensor in tensors.items()}


@dataclasses.dataclass(frozen=True)
class PriorPlan:
    """A checked call of the prior: `texts` holds the prompts, then their negatives if there are any. `given` are the
    pictures and embeddings to start from, instead of noise alone: one, or one for each prompt."""

    texts: list[str]
    against: list[str]
    copies: int
    has_negatives: bool
    sampling: Plan
    given: list[Tensor]


class PriorPipeline(SamplingPipeline):
    """Components and encodings that all priors share."""

    prior: PriorTransformer
    image_encoder: Any
    text_encoder: Any
    tokenizer: Any
    image_processor: Any
    embedded_part: ClassVar[str] = "prior"
    model_cpu_offload_seq: ClassVar[str] = "text_encoder->image_encoder->prior"
    _callback_tensor_inputs: ClassVar[list[str]] = [
        "latents", "prompt_embeds", "text_encoder_hidden_states", "text_mask"
    ]  # fmt: skip

    def __init__(
        self, prior: PriorTransformer, image_encoder: Any, text_encoder: Any, tokenizer: Any, scheduler: Any,
        image_processor: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self._texts: Recent[TextEncoding] = Recent()
        self.register_modules(
            prior=prior,
            image_encoder=image_encoder,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            scheduler=scheduler,
            image_processor=image_processor,
        )

    @torch.no_grad()  # a graph of the encoder would be kept with its results
    def encode_text(self, texts: Sequence[str]) -> TextEncoding:
        """Encode texts with the CLIP text tower; what does not fit into its context is cut off with a warning."""
        device, dtype = self._execution_device, self.prior.dtype

        def encode() -> TextEncoding:
            ids, mask = prompts.tokens(self.tokenizer, texts)
            made = self.text_encoder(ids.to(device))
            host_memory.forget_large(self.text_encoder.parameters())  # the prior works without them
            return TextEncoding(made.text_embeds.to(dtype), made.last_hidden_state.to(dtype), mask.to(device))

        return self._texts.get(self.text_encoder, (tuple(texts), device, dtype, self.tokenizer), encode)

    def encode_prompts(
        self, prompt: Sequence[str], negative: Sequence[str], copies: int, *, guided: bool
    ) -> dict[str, Tensor]:
        """The prior's tensors for equally many prompts and negatives, `copies` rows each, by name.

        With guidance the negatives' rows come first. Each distinct text is encoded once.
        """
        wanted = [*negative, *prompt] if guided else list(prompt)
        distinct = list(dict.fromkeys(wanted))
        rows = [distinct.index(text) for text in wanted for _ in range(copies)]
        return self.encode_text(distinct).rows(rows)

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Image embeddings (batch, dim) of preprocessed pictures (batch, 3, size, size)."""
        embeds: Tensor = self.image_encoder(
            pixels.to(device=self._execution_device, dtype=self.image_encoder.dtype)
        ).image_embeds
        return embeds.to(self.prior.dtype)

    def get_zero_embed(self, batch_size: int = 1, device: torch.device | str | None = None) -> Tensor:
        """The embedding of an all-zero picture, which stands for no condition: (batch_size, dim)."""
        size = self.image_encoder.config.image_size
        pixels = torch.zeros(1, 3, size, size)
        embed = zero_embed(self.image_encoder, self.prior.dtype, lambda: self.encode_pixels(pixels))
        return embed.repeat(batch_size, 1).to(self._execution_device if device is None else device)

    def encode_picture(self, picture: Tensor) -> Tensor:
        """Image embeddings (batch, dim) of preprocessed pictures; what already are embeddings stay as they are."""
        if picture.ndim == 4:
            return self.encode_pixels(picture)
        return picture.to(device=self._execution_device, dtype=self.prior.dtype)

    def _reading(self) -> dict[str, Any]:
        """How pictures are read and embeddings told from them: the options of `mixtures`."""
        self._need("prior", "image_encoder", "image_processor")
        size = self.image_encoder.config.image_size
        return {"dim": self.prior.config.embedding_dim, "size": size, "image_processor": self.image_processor}

    def _bind(self, tensors: Mapping[str, Tensor]) -> Denoise:
        condition = self.prior.encode_condition(
            proj_embedding=tensors["prompt_embeds"],
            encoder_hidden_states=tensors["text_encoder_hidden_states"],
            attention_mask=tensors["text_mask"],
            schedule=self.scheduler.timesteps[-self._num_timesteps :].tolist(),
        )
        return lambda noisy, timestep: self.prior.denoise(noisy, timestep, condition)

    def _plan(
        self, prompt: Any, negative_prompt: Any, copies: Any, *options: Any, given: list[Tensor] | None = None
    ) -> PriorPlan:
        positive, negative = prompts.pairs(prompt, negative_prompt)
        copies = validation.whole("num_images_per_prompt", copies)
        self._need("prior", "text_encoder", "tokenizer", "scheduler", *(() if negative else ("image_encoder",)))
        given = given or []
        if given:
            self._need_add_noise()
        count = sum(len(part) for part in given) or 1
        if len(positive) == 1:
            positive, negative = positive * count, negative and negative * count
        elif count not in (1, len(positive)):
            raise InputError(f"image: {count} were given for {len(positive)} prompts; equal numbers, or 1, are needed")
        texts = positive + (negative or [])
        shape = (len(texts) * copies, self.prior.config.embedding_dim)
        against = negative * 2 if negative else [""] * len(texts)
        sampling = self._schedule(shape, len(positive) * copies, *options)
        return PriorPlan(texts, against, copies, negative is not None, sampling, given)

    def _embed(self, plan: PriorPlan) -> tuple[Tensor, Tensor]:
        """Embeddings and negatives for a plan that was the last to be made."""
        sampling, dtype = plan.sampling, self.prior.dtype
        tensors = self.encode_prompts(plan.texts, plan.against, plan.copies, guided=sampling.guidance.on)
        if not plan.given:
            embeds = self.prior.post_process_latents(self._denoise(sampling, self._noise(sampling, dtype), tensors))
        else:
            embeds = torch.cat([self.encode_picture(part) for part in plan.given])
            embeds = embeds.repeat_interleave(plan.copies, dim=0)
            embeds = embeds.repeat(sampling.shape[0] // len(embeds), 1)
            if len(sampling.timesteps):
                noise, first = self._draw(sampling, dtype), sampling.timesteps[:1].repeat(len(embeds))
                latents = self.scheduler.add_noise(embeds, noise, first)
                embeds = self.prior.post_process_latents(self._denoise(sampling, latents, tensors))
        if plan.has_negatives:
            embeds, negatives = embeds.chunk(2)
            return embeds, negatives
        return embeds, self.get_zero_embed(len(embeds))

    def _return(self, embeds: Tensor, negatives: Tensor, output_type: str, return_dict: bool) -> Any:
        """The result of a call in the form that was asked for."""
        self.maybe_free_model_hooks()
        made: tuple[Any, Any] = embeds, negatives
        if output_type == "np":  # which has no bfloat16
            made = embeds.float().cpu().numpy(), negatives.float().cpu().numpy()
        return KandinskyPriorPipelineOutput(*made) if return_dict else made

    @torch.no_grad()
    def interpolate(
        self, images_and_prompts: list[Any], weights: list[float], num_images_per_prompt: int = 1,
        num_inference_steps: int = 25, generator: Generators = None,
        latents: Tensor | None = None, negative_prior_prompt: str | None = None,
        negative_prompt: str | list[str] = "", guidance_scale: float = 4.0, device: torch.device | str | None = None,
        guidance_rescale: float = 0.0, guidance_interval: Interval = None, guidance_threshold: float | None = None,
        timesteps: Times = None, sigmas: Levels = None,
    ) -> KandinskyPriorPipelineOutput:  # fmt: skip
        """The weighted sum of the embeddings of texts and pictures, (num_images_per_prompt, embedding_dim).

        Each item is a prompt, a picture (a PIL image, a path that is no string, an array), a tensor of prepared pixels
        (3, size, size) or (1, 3, size, size), or an embedding (embedding_dim,) or (rows, embedding_dim); their ranges
        are those of `image` in `KandinskyV22PriorEmb2EmbPipeline`. The negatives are the embedding of an all-zero
        picture, that of `negative_prior_prompt` if that is given, or that of `negative_prompt` if that is not "": one
        string, or one for each picture. Results are moved to `device` if that is given. After `interrupt()` the items
        that it has not come to are left out, negative prompts too. Raises InputError before any network runs.
        """
        copies = validation.whole("num_images_per_prompt", num_images_per_prompt)
        items = interpolation.parts(images_and_prompts, weights, rows=copies, **self._reading())
        place = None if device is None else usable_device(device)
        if not isinstance(negative_prior_prompt, str | None):
            raise InputError(f"negative_prior_prompt={negative_prior_prompt!r}: one string, or None, is needed")
        against = prompts.texts("negative_prompt", negative_prompt)
        if len(against) not in (1, copies):
            raise InputError(f"negative_prompt: {len(against)} strings were given for {copies} pictures")
        silent = self._check_callbacks(None, None)
        guidance = Guidance(guidance_scale, guidance_rescale, guidance_interval, guidance_threshold)

        def plan(texts: str | list[str], copies: int) -> PriorPlan:
            options = (Steps(num_inference_steps, timesteps, sigmas), guidance, generator, latents, silent)
            return self._plan(texts, negative_prior_prompt, copies, *options)

        plan(against, copies // len(against))  # checks all arguments
        dim = self.prior.config.embedding_dim
        mixed = torch.zeros(copies, dim, device=self._execution_device, dtype=self.prior.dtype)
        for item, weight in zip(items, weights, strict=True):
            if self._interrupted:
                break
            if isinstance(item, str):
                embeds, _ = self._embed(plan(item, copies))
            else:
                embeds = self.encode_picture(item)
            mixed = mixed + embeds * weight
        last = plan(against, copies // len(against))
        if self._interrupted or (negative_prompt == "" and negative_prior_prompt is None):
            self._discard_draws(last.sampling)
            negatives = self.get_zero_embed(copies)
        else:
            embeds, negatives = self._embed(last)
            negatives = negatives if negative_prompt == "" else embeds
        self.maybe_free_model_hooks()
        return KandinskyPriorPipelineOutput(mixed.to(place or mixed.device), negatives.to(place or mixed.device))

    def _discard_draws(self, plan: Plan) -> None:
        """Draw what a run would draw, without its network: the reference runs the prior here and does not use the
        result, and whoever draws next from the same generator is to get the same picture."""
        run = Run(self._noise(plan, self.prior.dtype), {}, Guidance(1.0))
        for _ in sample(run, self.scheduler, plan.timesteps, lambda _: lambda noisy, _: noisy, plan.generators):
            pass


class KandinskyV22PriorPipeline(PriorPipeline):
    """Image embeddings for prompts, by the unCLIP prior (Ramesh et al. 2022, arXiv 2204.06125)."""

    @torch.no_grad()
    def __call__(
        self, prompt: str | list[str], negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1, num_inference_steps: int = 25,
        generator: Generators = None, latents: Tensor | None = None,
        guidance_scale: float = 4.0, output_type: str = "pt", return_dict: bool = True,
        callback_on_step_end: Any = None, callback_on_step_end_tensor_inputs: list[str] | None = LATENTS,
        callback: Any = None, callback_steps: int | None = None,
        guidance_rescale: float = 0.0, guidance_interval: Interval = None, guidance_threshold: float | None = None,
        timesteps: Times = None, sigmas: Levels = None,
    ) -> Any:  # fmt: skip
        """Image embeddings and negative image embeddings, each (prompts x num_images_per_prompt, embedding_dim).

        One negative prompt serves all prompts and the other way round. With negative prompts their own embeddings are
        sampled in the same batch, after the prompts', and returned as the negatives; otherwise the embedding of an
        all-zero picture is. `latents` is start noise (rows, embedding_dim), with negative prompts for both halves. A
        list of generators has one for each picture, which also draws for its negative. Guidance is off at 1 and
        below, its options are those of `Guidance`; `timesteps` or `sigmas` as in KandinskyV22Pipeline. `output_type` is
        "pt" or "np". Raises InputError before any network runs.
        """
        validation.output(output_type, return_dict, PRIOR_OUTPUT_TYPES)
        told = callback_on_step_end, callback_on_step_end_tensor_inputs, callback, callback_steps
        guidance = Guidance(guidance_scale, guidance_rescale, guidance_interval, guidance_threshold)
        options = (
            Steps(num_inference_steps, timesteps, sigmas),
            guidance,
            generator,
            latents,
            self._check_callbacks(*told),
        )
        plan = self._plan(prompt, negative_prompt, num_images_per_prompt, *options)
        return self._return(*self._embed(plan), output_type, return_dict)


class KandinskyV22PriorEmb2EmbPipeline(PriorPipeline):
    """Image embeddings for prompts, starting from those of given pictures."""

    @torch.no_grad()
    def __call__(
        self, prompt: str | list[str], image: Any, strength: float = 0.3,
        negative_prompt: str | list[str] | None = None, num_images_per_prompt: int = 1, num_inference_steps: int = 25,
        generator: Generators = None, guidance_scale: float = 4.0,
        output_type: str = "pt", return_dict: bool = True,
        callback_on_step_end: Any = None, callback_on_step_end_tensor_inputs: list[str] | None = LATENTS,
        callback: Any = None, callback_steps: int | None = None,
        guidance_rescale: float = 0.0, guidance_interval: Interval = None, guidance_threshold: float | None = None,
        timesteps: Times = None, sigmas: Levels = None,
    ) -> Any:  # fmt: skip
        """Image embeddings and negative image embeddings, as those of `KandinskyV22PriorPipeline`.

        `image`, one for all prompts or one for each (or several for one prompt), is a path, an http(s) address, a PIL
        image of any mode, an array (H, W, C) of uint8 or of floats in [0, 1], prepared pixels (n, 3, size, size), an
        embedding (n, embedding_dim), or a list of those. The last int(num_inference_steps x strength) steps run, from
        its embedding under as much noise as belongs there: at 0 the embedding comes back as it is, at 1 little of it
        is left. Negative prompts start from the picture too; where no step is left to lead away from it, their
        embeddings are sampled from noise alone, in all steps. Raises InputError before any network runs.
        """
        validation.output(output_type, return_dict, PRIOR_OUTPUT_TYPES)
        told = callback_on_step_end, callback_on_step_end_tensor_inputs, callback, callback_steps
        guidance = Guidance(guidance_scale, guidance_rescale, guidance_interval, guidance_threshold)
        options = Steps(num_inference_steps, timesteps, sigmas), guidance, generator, None, self._check_callbacks(*told)
        given = interpolation.pictures("image", image, **self._reading())
        plan = self._plan(prompt, negative_prompt, num_images_per_prompt, *options, given=given)
        tail = self._tail(plan.sampling, strength)
        embeds, negatives = self._embed(dataclasses.replace(plan, sampling=tail))
        if plan.has_negatives and not len(tail.timesteps):
            negatives = self._embed(dataclasses.replace(plan, given=[]))[1]
        return self._return(embeds, negatives, output_type, return_dict)
