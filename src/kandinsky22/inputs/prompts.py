"""Prompts: one string or a list of them, brought to equally long lists."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from kandinsky22.errors import InputError

logger = logging.getLogger(__name__)


def texts(name: str, value: Any) -> list[str]:
    """A list of at least one string, from a string or a list of strings."""
    if isinstance(value, str):
        return [_text(name, value)]
    if not isinstance(value, list | tuple):
        raise InputError(f"{name}: a string or a list of strings is needed, not {type(value).__name__}")
    if not value:
        raise InputError(f"{name}: an empty list was given; at least one string is needed")
    for index, item in enumerate(value):
        if not isinstance(item, str):
            raise InputError(f"{name}[{index}]: a string is needed, not {type(item).__name__}")
        _text(f"{name}[{index}]", item)
    return list(value)


def pairs(prompt: Any, negative_prompt: Any) -> tuple[list[str], list[str] | None]:
    """Prompts and their negatives, equally many: a single one on either side serves all of the other side."""
    positive = texts("prompt", prompt)
    if negative_prompt is None:
        return positive, None
    negative = texts("negative_prompt", negative_prompt)
    count = max(len(positive), len(negative))
    if len(positive) not in (1, count) or len(negative) not in (1, count):
        raise InputError(
            f"negative_prompt: {len(negative)} strings were given for {len(positive)} prompts; "
            "equal numbers, or 1, are needed"
        )
    return positive * (count // len(positive)), negative * (count // len(negative))


def tokens(tokenizer: Any, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Token numbers and which of them are text, (texts, length) each; what is too long is cut off with a warning."""
    length = tokenizer.model_max_length
    made = tokenizer(list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    for text in texts:
        ids = tokenizer(text).input_ids
        if len(ids) > length:
            lost = tokenizer.decode(ids[length - 1 : -1])
            logger.warning("CLIP reads %d tokens, so the end of the prompt is ignored: %r", length, lost)
    return made.input_ids, made.attention_mask.bool()


def _text(name: str, value: str) -> str:
    """The string itself, unless it holds what no text does: halves of characters, as of bytes that were none."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{name}: {value!r} is no text: {error.reason}") from error
    return value
