"""Prompts: checked strings, pairs of prompts and negative prompts, and tokens."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from kandinsky22.errors import invalid
from kandinsky22.kernels.locks import ObjectLock

logger = logging.getLogger(__name__)

_tokenizing = ObjectLock()  # tokenizers store padding and truncation of a call in themselves


class PromptPairs(NamedTuple):
    """Prompts with their negative prompts.

    Attributes:
        prompts: The prompts.
        negative_prompts: As many negative prompts; None if there are none.
    """

    prompts: list[str]
    negative_prompts: list[str] | None


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
    if not isinstance(value, list | tuple) or not value:
        raise invalid(argument, value, "a string or a list of at least one string")
    for index, item in enumerate(value):
        if not isinstance(item, str):
            raise invalid(f"{argument}[{index}]", item, "a string")
        _check_surrogates(f"{argument}[{index}]", item)
    return list(value)


def prompt_pairs(prompt: Any, negative_prompt: Any) -> PromptPairs:
    """Return prompts and negative prompts as lists of equal length; a single one serves all of the other list.

    Args:
        prompt: A string or a list of strings.
        negative_prompt: A string, a list of strings, or None for no negative prompts.

    Raises:
        InputError: If either is not text, or if the numbers differ and neither is 1.
    """
    prompts = text_list("prompt", prompt)
    if negative_prompt is None:
        return PromptPairs(prompts, None)
    negatives = text_list("negative_prompt", negative_prompt)
    count = max(len(prompts), len(negatives))
    if len(prompts) not in (1, count) or len(negatives) not in (1, count):
        raise invalid("len(negative_prompt)", len(negatives), f"1 or {len(prompts)}, the number of prompts")
    return PromptPairs(prompts * (count // len(prompts)), negatives * (count // len(negatives)))


def tokenize(tokenizer: Any, texts: Sequence[str]) -> Tokens:
    """Return the tokens of texts, padded to the tokenizer's maximum length.

    Texts with more tokens are cut off, and a warning shows the part that is lost.

    Args:
        tokenizer: CLIP tokenizer.
        texts: The texts.
    """
    length = tokenizer.model_max_length
    with _tokenizing:
        encoded = tokenizer(list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        untruncated = [tokenizer(text).input_ids for text in texts]
    for ids in untruncated:
        if len(ids) > length:
            lost = tokenizer.decode(ids[length - 1 : -1])
            logger.warning("CLIP reads %d tokens; the end of the prompt is ignored: %r", length, lost)
    return Tokens(encoded.input_ids, encoded.attention_mask.bool())


def _check_surrogates(argument: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise invalid(argument, text, "text without lone surrogates") from error
