"""Prompts with weights: `(words)`, `(words:1.5)` and `[words]`, and how weights change a text encoding.

A weight w acts twice, because the prior reads a prompt twice:

- Hidden states: the state h of each token of the words becomes m + w (h - m), where m is the mean of the states of all
  tokens of the prompt. At 0 the token says nothing that distinguishes it.
- Pooled embedding: it gains (w - 1) (e - r), where e is the pooled embedding of the prompt and r that of the prompt
  without the words. If only one part is weighted, a weight of 0 gives exactly r. Several parts add up.

Weights of 1 change nothing. This is a method of kandinsky22, of the family that scales token states from a neutral
point; the text encoder was not trained for it, and weights far from 1 lead away from what the prior knows.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kandinsky22.errors import invalid
from kandinsky22.inputs.prompts import Tokens, warn_about_cut, word_tokens

STRONGER = 1.1  # factor of (words); [words] is divided by it
LARGEST_WEIGHT = 10.0
LARGEST_DEPTH = 20  # brackets within brackets
NUMBER = re.compile(r"\s*[+-]?(\d+(\.\d*)?|\.\d+)\s*")
OPENING, CLOSING = "([", ")]"


class WeightedPart(NamedTuple):
    """A part of a prompt.

    Attributes:
        text: The part, without brackets and escapes.
        weight: Its weight; 1 changes nothing.
    """

    text: str
    weight: float


class WeightedTokens(NamedTuple):
    """A tokenised prompt with weights.

    Attributes:
        tokens: The tokens of the prompt, (1, length), and of the prompt without each of the weighted parts, one row per
            part: (1 + parts, length).
        token_weights: Weight per token of the prompt, (length,).
        part_weights: Weight per weighted part, (parts,).
    """

    tokens: Tokens
    token_weights: Tensor
    part_weights: Tensor


def parse(argument: str, prompt: str) -> list[WeightedPart]:
    r"""Return the parts of a prompt in order.

    Round brackets multiply the weight of what they hold by the number after a colon at their end, or by 1.1 without
    one; square brackets divide it by 1.1. Brackets may be nested. A backslash makes a bracket, or a backslash, part of
    the text: ``\(``.

    Args:
        argument: Name of the argument, for messages.
        prompt: The prompt.

    Raises:
        InputError: If brackets do not match or are nested too deeply, or if a weight is not from 0 to 10.
    """
    parts: list[tuple[str, float]] = []
    open_brackets: list[tuple[str, int]] = []  # the bracket, and the index of the first part in it
    text = ""
    characters = iter(re.findall(r"\\[\\()\[\]]|.", prompt, flags=re.DOTALL))
    for character in characters:
        if character in OPENING:
            parts, text = [*parts, (text, 1.0)] if text else parts, ""
            open_brackets.append((character, len(parts)))
            if len(open_brackets) > LARGEST_DEPTH:
                raise invalid(argument, prompt, f"at most {LARGEST_DEPTH} brackets within each other")
        elif character in CLOSING:
            if not open_brackets or OPENING.index(open_brackets[-1][0]) != CLOSING.index(character):
                raise _unbalanced(argument, prompt)
            bracket, first = open_brackets.pop()
            factor = STRONGER if bracket == "(" else 1 / STRONGER
            words, colon, number = text.rpartition(":")
            if bracket == "(" and colon and NUMBER.fullmatch(number):
                text, factor = words, float(number)
            parts = [*parts, (text, 1.0)] if text else parts
            parts[first:] = [(part, weight * factor) for part, weight in parts[first:]]
            text = ""
        else:
            text += character[-1]
    if open_brackets:
        raise _unbalanced(argument, prompt)
    parts = [*parts, (text, 1.0)] if text else parts
    for _, weight in parts:
        if not 0 <= weight <= LARGEST_WEIGHT:
            raise invalid(f"a weight in {argument}", float(f"{weight:g}"), f"a number from 0 to {LARGEST_WEIGHT:g}")
    return [WeightedPart(part, weight) for part, weight in parts]


def _unbalanced(argument: str, prompt: str) -> Exception:
    return invalid(argument, prompt, "brackets in pairs", r"write \( and \[ for brackets that are text")


def tokenize_weighted(tokenizer: Any, parts: Sequence[WeightedPart]) -> WeightedTokens:
    """Return the tokens of a prompt with their weights.

    Parts are tokenised one by one, thus a bracket within a word divides it. A prompt with more tokens than the
    tokenizer's maximum is cut off, with a warning.

    Args:
        tokenizer: CLIP tokenizer.
        parts: The parts of the prompt.
    """
    room = tokenizer.model_max_length - 2  # start and end of text
    ids: list[int] = []
    owners: list[int] = []
    for index, part_ids in enumerate(word_tokens(tokenizer, [part.text for part in parts])):
        ids += part_ids
        owners += [index] * len(part_ids)
    if len(ids) > room:
        warn_about_cut(tokenizer, ids[room:], len(ids) + 2)
        ids, owners = ids[:room], owners[:room]
    weighted = [index for index, part in enumerate(parts) if part.weight != 1 and index in owners]
    rows = [ids, *([id_ for id_, owner in zip(ids, owners, strict=True) if owner != index] for index in weighted)]
    padded, masks = [], []
    for row in rows:
        padding = room - len(row)
        padded.append([tokenizer.bos_token_id, *row, tokenizer.eos_token_id, *[tokenizer.pad_token_id] * padding])
        masks.append([True] * (len(row) + 2) + [False] * padding)
    weights = [1.0, *(parts[owner].weight for owner in owners)]
    weights += [1.0] * (room + 2 - len(weights))
    return WeightedTokens(
        Tokens(torch.tensor(padded), torch.tensor(masks)),
        torch.tensor(weights, dtype=torch.float32),
        torch.tensor([parts[index].weight for index in weighted], dtype=torch.float32),
    )


def apply_weights(weighted: WeightedTokens, states: Tensor, pooled: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weighted hidden states and pooled embedding of a prompt, see the module's docstring.

    Args:
        weighted: Its tokens and weights.
        states: Hidden states (1 + parts, length, width) of the rows of its tokens; only the first row is read.
        pooled: Pooled embeddings (1 + parts, embedding_dim) of the rows.

    Returns:
        Hidden states (length, width) and pooled embedding (embedding_dim,).
    """
    weights = weighted.token_weights.to(states)[:, None]
    text = weighted.tokens.mask[0].to(states.device)
    mean = states[0][text].mean(dim=0)
    shares = (weighted.part_weights.to(pooled) - 1)[:, None]
    # a weight of exactly 1 leaves the state as it is, bit for bit
    scaled = torch.where(weights == 1, states[0], mean + weights * (states[0] - mean))
    return scaled, pooled[0] + (shares * (pooled[:1] - pooled[1:])).sum(dim=0)
