"""Encoding of texts for the prior, each distinct text once."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kandinsky22.errors import invalid
from kandinsky22.inputs import prompts, validation, weighted_prompts
from kandinsky22.kernels import host_memory
from kandinsky22.kernels.linear import onednn_linear_layers
from kandinsky22.models import PriorTransformer
from kandinsky22.pipelines.base import DiffusionPipeline
from kandinsky22.pipelines.embedding_cache import LastResults
from kandinsky22.pipelines.network_calls import run_tower
from kandinsky22.runtime.network_state import unwrapped


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


class TextEncodingPipeline(DiffusionPipeline):
    """Base of pipelines with a CLIP text tower, which encodes texts in the type of their prior."""

    prior: PriorTransformer
    text_encoder: Any
    tokenizer: Any

    def __init__(self) -> None:
        super().__init__()
        self._text_encodings: LastResults[TextEncoding] = LastResults()

    def encode_text(self, texts: str | Sequence[str], *, prompt_weights: bool = False) -> TextEncoding:
        """Encode texts with the CLIP text tower.

        Args:
            texts: One text or a list. Tokens beyond the context length are cut off, with a warning.
            prompt_weights: Whether brackets in the texts are weights, see `inputs.weighted_prompts`.

        Returns:
            One row per text, in tensors that nothing else uses.

        Raises:
            InputError: If an argument is invalid, or the pipeline has no text encoder or tokenizer.
        """
        listed = prompts.text_list("texts", texts)
        validation.strict_bool("prompt_weights", prompt_weights)
        self._require("prior", "text_encoder", "tokenizer")
        encoding = self._encode_texts(listed, "texts", prompt_weights=prompt_weights)
        return TextEncoding(**encoding.rows(range(len(listed))))  # a copy: the cache keeps its own

    @torch.no_grad()  # the cache would hold the encoder's graph
    def _encode_texts(self, texts: Sequence[str], argument: str, *, prompt_weights: bool) -> TextEncoding:
        """Encode validated texts. The tensors may be those of the cache; `argument` is for messages."""
        if prompt_weights:
            return self._encode_weighted(texts, argument)
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

    def _encode_weighted(self, texts: Sequence[str], argument: str) -> TextEncoding:
        """Encode texts whose brackets are weights. Texts without weights are encoded together as usual."""
        parsed = [weighted_prompts.parse(argument, text) for text in texts]
        simple = {index: "".join(part.text for part in parts) for index, parts in enumerate(parsed)}
        simple = {index: text for index, text in simple.items() if all(part.weight == 1 for part in parsed[index])}
        rows: dict[int, dict[str, Tensor]] = {}
        if simple:
            encoding = self._encode_texts(list(simple.values()), argument, prompt_weights=False)
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
        prompt: str | Sequence[str],
        negative: str | Sequence[str],
        copies: int,
        *,
        guided: bool,
        prompt_weights: bool = False,
    ) -> dict[str, Tensor]:
        """Encode the condition of the loop. Each distinct text is encoded once.

        Args:
            prompt: Texts of the conditional half, one or a list.
            negative: As many texts of the unconditional half. They are not read unless `guided`.
            copies: Rows per text.
            guided: Whether both halves are returned, the unconditional one first.
            prompt_weights: Whether brackets in the texts are weights, see `inputs.weighted_prompts`.

        Returns:
            The fields of `TextEncoding` by name.

        Raises:
            InputError: If an argument is invalid, or the pipeline has no text encoder or tokenizer.
        """
        texts = prompts.text_list("prompt", prompt)
        copies = validation.positive_int("copies", copies, validation.MAX_COPIES)
        validation.strict_bool("prompt_weights", prompt_weights)
        if validation.strict_bool("guided", guided):
            negatives = prompts.text_list("negative", negative)
            if len(negatives) != len(texts):
                raise invalid("len(negative)", len(negatives), f"{len(texts)}, the number of prompts")
            texts = negatives + texts
        self._require("prior", "text_encoder", "tokenizer")
        distinct = list(dict.fromkeys(texts))
        rows = [distinct.index(text) for text in texts for _ in range(copies)]
        return self._encode_texts(distinct, "prompt", prompt_weights=prompt_weights).rows(rows)
