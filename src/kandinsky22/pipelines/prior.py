"""From prompts to image embeddings: the prior, and mixtures of texts and images."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import PIL.Image
import torch
from torch import Tensor

from kandinsky22.errors import InputError
from kandinsky22.inputs import checks, prompts
from kandinsky22.models import PriorTransformer
from kandinsky22.pipelines.outputs import KandinskyPriorPipelineOutput
from kandinsky22.pipelines.sampling import LATENTS, Denoise, Run, SamplingPipeline, sample
from kandinsky22.randomness import Generators

logger = logging.getLogger(__name__)

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


class PriorPipeline(SamplingPipeline):
    """Components and encodings that all priors share."""

    prior: PriorTransformer
    image_encoder: Any
    text_encoder: Any
    tokenizer: Any
    image_processor: Any
    model_cpu_offload_seq: ClassVar[str] = "text_encoder->image_encoder->prior"
    _exclude_from_cpu_offload: ClassVar[list[str]] = ["prior"]
    _callback_tensor_inputs: ClassVar[list[str]] = [
        "latents", "prompt_embeds", "text_encoder_hidden_states", "text_mask"
    ]  # fmt: skip

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

    def encode_text(self, texts: Sequence[str]) -> TextEncoding:
        """Encode texts with the CLIP text tower; what does not fit into its context is cut off with a warning."""
        length = self.tokenizer.model_max_length
        tokens = self.tokenizer(
            list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        for text in texts:
            ids = self.tokenizer(text).input_ids
            if len(ids) > length:
                lost = self.tokenizer.decode(ids[length - 1 : -1])
                logger.warning("CLIP reads %d tokens, so the end of the prompt is ignored: %r", length, lost)
        device = self._execution_device
        encoded = self.text_encoder(tokens.input_ids.to(device))
        dtype = self.prior.dtype
        return TextEncoding(
            encoded.text_embeds.to(dtype),
            encoded.last_hidden_state.to(dtype),
            tokens.attention_mask.bool().to(device),
        )

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
        embed = self.encode_pixels(torch.zeros(1, 3, size, size)).repeat(batch_size, 1)
        return embed if device is None else embed.to(device)

    def _bind(self, tensors: Mapping[str, Tensor]) -> Denoise:
        condition = self.prior.encode_condition(
            proj_embedding=tensors["prompt_embeds"],
            encoder_hidden_states=tensors["text_encoder_hidden_states"],
            attention_mask=tensors["text_mask"],
        )
        return lambda noisy, timestep: self.prior.denoise(noisy, timestep, condition)

    def _finish(self, embeds: Tensor, negative: Tensor, output_type: str, return_dict: bool) -> Any:
        self.maybe_free_model_hooks()
        pair: tuple[Any, Any] = (embeds, negative)
        if output_type == "np":
            pair = (embeds.float().cpu().numpy(), negative.float().cpu().numpy())  # numpy has no bfloat16
        return KandinskyPriorPipelineOutput(*pair) if return_dict else pair


class KandinskyV22PriorPipeline(PriorPipeline):
    """Image embeddings for prompts, by the unCLIP prior (Ramesh et al. 2022, arXiv 2204.06125)."""

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        num_inference_steps: int = 25,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        guidance_scale: float = 4.0,
        output_type: str = "pt",
        return_dict: bool = True,
        callback_on_step_end: Any = None,
        callback_on_step_end_tensor_inputs: list[str] | None = LATENTS,
    ) -> Any:
        """Image embeddings and negative image embeddings, each (prompts x num_images_per_prompt, embedding_dim).

        One negative prompt serves all prompts and the other way round. With negative prompts their own embeddings are
        sampled in the same batch, after the prompts', and returned as the negatives; otherwise the embedding of an
        all-zero picture is. `latents` is start noise (rows, embedding_dim), with negative prompts for both halves. A
        list of generators has one for each picture, which also draws for its negative. Guidance is off at 1 and
        below. `output_type` is "pt" or "np". Raises InputError before any network runs.
        """
        positive, negative = prompts.pairs(prompt, negative_prompt)
        copies = checks.whole("num_images_per_prompt", num_images_per_prompt)
        scale = checks.number("guidance_scale", guidance_scale)
        checks.choice("output_type", output_type, PRIOR_OUTPUT_TYPES)
        callbacks = self._check_callbacks(callback_on_step_end, callback_on_step_end_tensor_inputs)
        self._need("prior", "text_encoder", "tokenizer", "scheduler", *(["image_encoder"] if negative is None else []))
        texts = positive + (negative or [])
        shape = (len(texts) * copies, self.prior.config.embedding_dim)
        if latents is not None:
            latents = checks.latents(latents, shape)
        generators = _generators(generator, len(positive) * copies, shape[0])
        timesteps = self._set_timesteps(num_inference_steps)

        against = [""] * len(texts) if negative is None else negative * 2
        tensors = self.encode_prompts(texts, against, copies, guided=scale > 1)
        start = self._start_latents(shape, latents, generators, self.prior.dtype)
        run = Run(start, tensors, scale)
        embeds = self.prior.post_process_latents(self._denoise(run, timesteps, self._bind, generators, callbacks))
        if negative is None:
            negative_embeds = self.get_zero_embed(len(embeds))
        else:
            embeds, negative_embeds = embeds.chunk(2)
        return self._finish(embeds, negative_embeds, output_type, return_dict)

    @torch.no_grad()
    def interpolate(
        self,
        images_and_prompts: list[str | PIL.Image.Image | Tensor],
        weights: list[float],
        num_images_per_prompt: int = 1,
        num_inference_steps: int = 25,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        negative_prior_prompt: str | None = None,
        negative_prompt: str | list[str] = "",
        guidance_scale: float = 4.0,
        device: torch.device | str | None = None,
    ) -> KandinskyPriorPipelineOutput:
        """The weighted sum of the embeddings of texts and pictures, (num_images_per_prompt, embedding_dim).

        Each item is a prompt, a PIL image, a tensor of preprocessed pixels (3, size, size) or (1, 3, size, size), or
        an embedding (embedding_dim,) or (rows, embedding_dim). The negatives are the embedding of an all-zero
        picture, that of `negative_prior_prompt` if that is given, or that of `negative_prompt` if that is not "": one
        string, or one for each picture. Results are moved to `device` if that is given. Raises InputError before any
        network runs.
        """
        copies = checks.whole("num_images_per_prompt", num_images_per_prompt)
        items = self._check_mixture(images_and_prompts, weights, copies)
        against = prompts.texts("negative_prompt", negative_prompt)
        if len(against) not in (1, copies):
            raise InputError(f"negative_prompt: {len(against)} strings were given for {copies} pictures")
        options: dict[str, Any] = {
            "negative_prompt": negative_prior_prompt,
            "num_inference_steps": num_inference_steps,
            "generator": generator,
            "latents": latents,
            "guidance_scale": guidance_scale,
        }
        parts = []
        for item, weight in zip(items, weights, strict=True):
            if isinstance(item, str):
                embeds = self(item, num_images_per_prompt=copies, **options).image_embeds
            else:
                embeds = self.encode_pixels(item) if item.ndim == 4 else item.to(self._execution_device)
            parts.append(checks.same_batch("images_and_prompts", embeds, copies, "the result") * weight)
        mixed = torch.stack(parts).sum(dim=0)

        if negative_prompt == "" and negative_prior_prompt is None:
            self._discard_draws(copies, num_inference_steps, generator, latents)
            negatives = self.get_zero_embed(copies)
            self.maybe_free_model_hooks()
        else:
            out = self(against, num_images_per_prompt=copies // len(against), **options)
            negatives = out.negative_image_embeds if negative_prompt == "" else out.image_embeds
        if device is not None:
            mixed, negatives = mixed.to(device), negatives.to(device)
        return KandinskyPriorPipelineOutput(mixed, negatives)

    def _check_mixture(self, items: Any, weights: Any, copies: int) -> list[str | Tensor]:
        if not isinstance(items, list | tuple) or not isinstance(weights, list | tuple) or not items:
            raise InputError("images_and_prompts and weights: two lists with at least one entry are needed")
        if len(items) != len(weights):
            raise InputError(f"weights: {len(weights)} were given for {len(items)} images_and_prompts")
        for index, weight in enumerate(weights):
            checks.number(f"weights[{index}]", weight)
        return [self._check_item(f"images_and_prompts[{index}]", item, copies) for index, item in enumerate(items)]

    def _check_item(self, name: str, item: Any, copies: int) -> str | Tensor:
        """A text, pixels (1, 3, size, size), or embeddings (1 or copies, dim)."""
        if isinstance(item, str):
            return item
        if isinstance(item, PIL.Image.Image):
            pixels: Tensor = self.image_processor(item, return_tensors="pt").pixel_values
            return pixels
        if not isinstance(item, Tensor):
            raise InputError(f"{name}: a string, a PIL image or a tensor is needed, not {type(item).__name__}")
        if item.ndim <= 2:
            embeds = checks.embeddings(name, item, self.prior.config.embedding_dim)
            return checks.same_batch(name, embeds, copies, "the result").to(self.prior.dtype)
        size = self.image_encoder.config.image_size
        if tuple(item.shape) not in ((3, size, size), (1, 3, size, size)):
            raise InputError(f"{name} has shape {tuple(item.shape)}; pixels need (3, {size}, {size})")
        return checks.finite(name, item).reshape(1, 3, size, size)

    def _discard_draws(self, rows: int, steps: int, generator: Any, latents: Tensor | None) -> None:
        """Draw what a run would draw, without its network, so that the generator ends where the reference leaves it."""
        timesteps = self._set_timesteps(steps)
        generators = _generators(generator, rows, rows)
        start = self._start_latents((rows, self.prior.config.embedding_dim), latents, generators, self.prior.dtype)
        run = Run(start, {}, 1.0)
        for _ in sample(
            run, scheduler=self.scheduler, timesteps=timesteps, bind=lambda _: lambda noisy, _: noisy,
            generator=generators,
        ):  # fmt: skip
            pass


def _generators(value: Any, pictures: int, rows: int) -> Generators:
    """One generator for all rows, or a list with one each; pictures and their negatives share theirs."""
    if isinstance(value, list | tuple) and len(value) == rows:
        return checks.generators(value, rows)
    chosen = checks.generators(value, pictures)
    return chosen * (rows // pictures) if isinstance(chosen, list) else chosen
