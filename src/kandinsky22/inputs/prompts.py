"""Prompts: checked strings, pairs of prompts and negative prompts, and tokens."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from kandinsky22.errors import describe, invalid
from kandinsky22.inputs import validation
from kandinsky22.kernels.locks import ObjectLock

logger = logging.getLogger(__name__)

SHOWN_TOKENS = 16  # tokens that a warning shows

_tokenizing = ObjectLock()  # tokenizers store padding and truncation of a call in themselves


class PromptPairs(NamedTuple):
    """Prompts with their negative prompts.

    Attributes:
        prompts: The prompts.
        negative_prompts: As many negative prompts; None if there are none.
        weighted: Whether brackets in them are weights, see `inputs.weighted_prompts`.
    """

    prompts: list[str]
    negative_prompts: list[str] | None
    weighted: bool = False


class Tokens(NamedTuple):
    """Tokenised texts.

    Attributes:
        ids: Token ids (texts, length), integers.
        mask: Booleans (texts, length), False at padding.
    """

    ids: Tensor
    mask: Tensor


def text_list(argument: str, value: Any) -> list[str]:
    """Return a list of at least one string.

    Args:
        argument: Name of the argument, for messages.
        value: A string or a non-empty list of strings.

    Raises:
        InputError: If `value` is anything else, or if a string contains lone surrogates, which no text has.
    """
    if isinstance(value, str):
        _check_surrogates(argument, value)
        return [value]
    texts = validation.listed(argument, value) if isinstance(value, list | tuple) else []
    if not texts:
        raise invalid(argument, value, "a string or a list of at least one string")
    for index, item in enumerate(texts):
        if not isinstance(item, str):
            raise invalid(f"{argument}[{index}]", item, "a string")
        _check_surrogates(f"{argument}[{index}]", item)
    return texts


def prompt_pairs(prompt: Any, negative_prompt: Any, prompt_weights: Any = False) -> PromptPairs:
    """Return prompts and negative prompts as lists of equal length; a single one serves all of the other list.

    Args:
        prompt: A string or a list of strings.
        negative_prompt: A string, a list of strings, or None for no negative prompts.
        prompt_weights: Whether brackets in them are weights.

    Raises:
        InputError: If a prompt is not text, `prompt_weights` is not a bool, or if the numbers differ and neither is 1.
    """
    weighted = validation.strict_bool("prompt_weights", prompt_weights)
    prompts = text_list("prompt", prompt)
    if negative_prompt is None:
        return PromptPairs(prompts, None, weighted)
    negatives = text_list("negative_prompt", negative_prompt)
    count = max(len(prompts), len(negatives))
    if len(prompts) not in (1, count) or len(negatives) not in (1, count):
        raise invalid("len(negative_prompt)", len(negatives), f"1 or {len(prompts)}, the number of prompts")
    return PromptPairs(prompts * (count // len(prompts)), negatives * (count // len(negatives)), weighted)


def tokenize(tokenizer: Any, texts: Sequence[str]) -> Tokens:
    """Return the tokens of texts, padded to the tokenizer's maximum length.

    Texts with more tokens are cut off, and a warning of one line shows the part that is lost.

    Args:
        tokenizer: CLIP tokenizer.
        texts: The texts.
    """
    length = tokenizer.model_max_length
    with _tokenizing:
        encoded = tokenizer(list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        untruncated = [tokenizer(text, verbose=False).input_ids for text in texts]
    for ids in untruncated:
        if len(ids) > length:
            warn_about_cut(tokenizer, ids[length - 1 : -1], len(ids))
    return Tokens(encoded.input_ids, encoded.attention_mask.bool())


def word_tokens(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of texts, without those that mark the start and the end of a text.

    Args:
        tokenizer: CLIP tokenizer.
        texts: The texts.
    """
    with _tokenizing:
        return [list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids) for text in texts]


def warn_about_cut(tokenizer: Any, ids: Sequence[int], total: int) -> None:
    """Log a warning of one line that shows which part of a prompt is cut off.

    Args:
        tokenizer: CLIP tokenizer.
        ids: Tokens that are cut off.
        total: Number of tokens of the prompt, with those that mark its start and end.
    """
    shown = [ids] if len(ids) <= SHOWN_TOKENS else [ids[: SHOWN_TOKENS // 2], ids[-SHOWN_TOKENS // 2 :]]
    text = " ... ".join(" ".join(tokenizer.decode(part).split()) for part in shown)
    message = "the prompt has %d tokens, but CLIP reads %d: cut off is %s"
    logger.warning(message, total, tokenizer.model_max_length, describe(text))


def _check_surrogates(argument: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise invalid(argument, text, "text without lone surrogates") from error
