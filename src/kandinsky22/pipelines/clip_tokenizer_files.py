"""Files of CLIP's tokenizer: what transformers 4 and 5 write."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from tokenizers import AddedToken
from tokenizers.models import BPE

from kandinsky22.checkpoints.atomic_files import atomic_write, read_json
from kandinsky22.errors import CheckpointError, invalid

WHOLE_FILE, VOCABULARY_FILE, MERGES_FILE = "tokenizer.json", "vocab.json", "merges.txt"
CONFIG_FILE, SPECIAL_TOKENS_FILE, ADDED_TOKENS_FILE = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclasses.dataclass(frozen=True)
class StoredVocabulary:
    """Vocabulary of a tokenizer, as its files have it.

    Attributes:
        vocabulary: Index of each token.
        merges: Pairs of tokens, in the order in which they are merged.
        added: Added tokens by index.
    """

    vocabulary: Mapping[str, int]
    merges: Sequence[tuple[str, str]]
    added: Mapping[int, AddedToken]


def read_whole_file(path: Path) -> StoredVocabulary:
    """Return the vocabulary in `tokenizer.json`.

    Args:
        path: The file.

    Raises:
        CheckpointError: If it has none.
    """
    content = read_json(path)
    model = content.get("model")
    if not isinstance(model, Mapping) or not isinstance(model.get("vocab"), Mapping):
        raise CheckpointError(f"cannot read {path}: it has no vocabulary of byte pairs")
    pairs = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model.get("merges", [])]
    added = {int(token["id"]): as_added_token(token) for token in content.get("added_tokens") or []}
    return StoredVocabulary(model["vocab"], cast(list[tuple[str, str]], pairs), added)


def read_separate_files(folder: Path) -> StoredVocabulary:
    """Return the vocabulary in `vocab.json`, `merges.txt` and `added_tokens.json`.

    Args:
        folder: Folder of the files.

    Raises:
        CheckpointError: If they are missing or damaged.
    """
    try:
        vocabulary, merges = BPE.read_file(os.fspath(folder / VOCABULARY_FILE), os.fspath(folder / MERGES_FILE))
    except Exception as error:  # of the native code
        raise CheckpointError(f"cannot read {VOCABULARY_FILE} and {MERGES_FILE} of {folder}: {error}") from error
    added = read_if_present(folder / ADDED_TOKENS_FILE)
    return StoredVocabulary(
        vocabulary, merges, {index: AddedToken(token, normalized=False) for token, index in added.items()}
    )


def read_if_present(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file; an empty dictionary if there is no file.

    Args:
        path: The file.
    """
    return read_json(path) if os.path.lexists(path) else {}


def as_added_token(value: Any) -> AddedToken:
    """Return a token that a file describes by its content and flags.

    Args:
        value: Its entry in a file.

    Raises:
        InputError: If it has no content.
    """
    if isinstance(value, AddedToken):
        return value
    if not isinstance(value, Mapping) or not isinstance(value.get("content"), str) or not value["content"]:
        raise invalid("an added token", value, "a mapping with its content")
    return AddedToken(value["content"], **{name: bool(value[name]) for name in TOKEN_FLAGS if name in value})


def as_mapping(token: AddedToken) -> dict[str, Any]:
    """Return the entry of a token in a config file.

    Args:
        token: The token.
    """
    return {"content": token.content, **{name: getattr(token, name) for name in TOKEN_FLAGS}}


def write_text(path: Path, text: str) -> None:
    """Write a text file, all of it or nothing.

    Args:
        path: The file.
        text: Its content.
    """
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")
