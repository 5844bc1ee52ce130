"""CLIP's tokenizer: texts to the token ids that the text tower reads.

Checkpoints name a class of transformers. The class here reads and writes the same files, takes the same arguments and
gives the same ids. The package tokenizers merges the byte pairs, as it does for transformers. Importing it takes a
hundredth of the time.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from kandinsky22.checkpoints.atomic_files import checked_save_path, write_json
from kandinsky22.errors import CheckpointError, invalid
from kandinsky22.inputs import validation
from kandinsky22.inputs.hub_uploads import requested_upload
from kandinsky22.outputs import Output
from kandinsky22.pipelines.clip_settings import is_integer
from kandinsky22.pipelines.clip_tokenizer_files import (
    CONFIG_FILE,
    MERGES_FILE,
    SPECIAL_TOKENS_FILE,
    VOCABULARY_FILE,
    WHOLE_FILE,
    as_added_token,
    as_mapping,
    read_if_present,
    read_separate_files,
    read_whole_file,
    write_text,
)

START, END = "<|startoftext|>", "<|endoftext|>"
SPECIAL_TOKENS: Mapping[str, str] = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
END_OF_WORD = "</w>"
NO_LIMIT = int(1e30)  # model_max_length of files without one, as in transformers
# Contractions, runs of letters, single digits, runs of other characters, as in OpenAI's implementation of CLIP.
WORD = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
CLASS_NAME = "CLIPTokenizer"

SIDES = ("left", "right")
Side = Literal["left", "right"]


@dataclasses.dataclass
class TokenizedTexts(Output):
    """Result of the tokenizer: token ids of texts.

    Attributes:
        input_ids: Token ids, (batch, length): a tensor or an array of integers, or lists without `return_tensors`; one
            list for a single text.
        attention_mask: 1 for tokens of the text, 0 for padding, in the same form; None if it is not asked for.
        length: Number of tokens of each text, padding included; None if it is not asked for.
    """

    input_ids: Any
    attention_mask: Any = None
    length: Any = None

    @property
    def data(self) -> dict[str, Any]:
        """The entries by name."""
        return dict(self.items())

    def to(self, *args: Any, **kwargs: Any) -> TokenizedTexts:
        """Return the result with its tensors on another device.

        Args:
            *args: Arguments of `Tensor.to`.
            **kwargs: Arguments of `Tensor.to`.
        """
        moved = {name: value.to(*args, **kwargs) for name, value in self.items() if isinstance(value, torch.Tensor)}
        return dataclasses.replace(self, **moved)


class CLIPTokenizer:
    """Splits texts into words and words into byte pairs, in lower case, between the start and the end of the text.

    Args:
        vocab: Index of each token.
        merges: Pairs of tokens, in the order in which they are merged.
        bos_token: Token at the start of each text.
        eos_token: Token at the end of each text.
        unk_token: Token of bytes without a token of their own.
        pad_token: Token after the end of shorter texts of a batch.
        model_max_length: Largest number of tokens that the text tower reads.
        padding_side: Where padding is added.
        truncation_side: Where texts that are too long lose tokens.
        added_tokens: Tokens that are found in texts before those are split into words.
        **others: Entries of the config file that have no effect; they are saved again.

    Special tokens may be strings, instances of `AddedToken`, or the mappings that config files have for them.

    Raises:
        InputError: A setting has a value that is not accepted.
    """

    model_input_names = ("input_ids", "attention_mask")

    def __init__(
        self,
        vocab: Mapping[str, int],
        merges: Iterable[tuple[str, str]],
        *,
        bos_token: Any = START,
        eos_token: Any = END,
        unk_token: Any = END,
        pad_token: Any = END,
        model_max_length: int = NO_LIMIT,
        padding_side: Side = "right",
        truncation_side: Side = "right",
        added_tokens: Iterable[AddedToken] = (),
        **others: Any,
    ) -> None:
        special = [
            _special_token(name, value)
            for name, value in zip(SPECIAL_TOKENS, (bos_token, eos_token, unk_token, pad_token), strict=True)
        ]
        self.bos_token, self.eos_token, self.unk_token, self.pad_token = (token.content for token in special)
        self.model_max_length = int(model_max_length)  # files may have 77.0
        validation.one_of("padding_side", padding_side, SIDES)
        validation.one_of("truncation_side", truncation_side, SIDES)
        self.padding_side, self.truncation_side = padding_side, truncation_side
        self._others = {name: value for name, value in others.items() if name != "tokenizer_class"}
        self._backend = Tokenizer(
            BPE(
                vocab=dict(vocab),
                merges=list(merges),
                unk_token=self.unk_token,
                continuing_subword_prefix="",
                end_of_word_suffix=END_OF_WORD,
                fuse_unk=False,
            )
        )
        self._backend.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
        )
        self._backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(WORD), behavior="removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        self._backend.decoder = decoders.ByteLevel()
        self.add_tokens([*added_tokens])
        self.add_tokens([token for token in special if token.content not in self.get_added_vocab()])

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], *, subfolder: str = "", **settings: Any
    ) -> CLIPTokenizer:
        """Return the tokenizer of a folder.

        Args:
            pretrained_model_name_or_path: The folder, or one that contains it. Pipelines load from the Hub.
            subfolder: Path of the tokenizer inside the folder.
            **settings: Settings that replace those of its config file.

        Raises:
            CheckpointError: If a file is missing or damaged.
        """
        folder = Path(pretrained_model_name_or_path, subfolder)
        if os.path.lexists(folder / WHOLE_FILE):
            stored = read_whole_file(folder / WHOLE_FILE)
        else:
            stored = read_separate_files(folder)
        config = read_if_present(folder / CONFIG_FILE)
        special = {
            name: value
            for name, value in read_if_present(folder / SPECIAL_TOKENS_FILE).items()
            if name in SPECIAL_TOKENS
        }
        recorded = config.pop("added_tokens_decoder", None) or {}
        added = {**stored.added, **{int(index): as_added_token(token) for index, token in recorded.items()}}
        arguments = {name: value for name, value in {**special, **config, **settings}.items() if value is not None}
        tokens = [token for _, token in sorted(added.items())]
        tokenizer = cls(stored.vocabulary, stored.merges, added_tokens=tokens, **arguments)
        for index, token in added.items():
            if (own := tokenizer._backend.token_to_id(token.content)) != index:
                raise CheckpointError(f"{folder}: the added token {token.content!r} is number {index}, but gets {own}")
        return tokenizer

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        return_tensors: Any = None,
        return_attention_mask: bool | None = None,
        return_length: bool = False,
        return_overflowing_tokens: bool = False,
        verbose: bool = True,
    ) -> TokenizedTexts:
        """Return the token ids of texts.

        Args:
            text: A text, or a list of texts.
            add_special_tokens: Whether texts get the tokens of their start and end.
            padding: Which texts get padding: True or "longest", up to the longest text of the batch; "max_length", up
                to `max_length`; False or "do_not_pad", none.
            truncation: Whether texts are cut off at `max_length`: True, "longest_first" or "only_first"; False or
                "do_not_truncate"; None cuts off if `max_length` is given and `padding` is False.
            max_length: Number of tokens; None for `model_max_length`.
            return_tensors: "pt" for tensors, "np" for arrays, None for lists.
            return_attention_mask: Whether the result has the attention mask; None for True.
            return_length: Whether the result has the numbers of tokens.
            return_overflowing_tokens: False: parts that are cut off are not returned.
            verbose: Accepted for transformers' sake: nothing is printed.

        Raises:
            InputError: If an argument is anything else, or texts of different lengths are to be stacked.
        """
        is_single = isinstance(text, str)
        texts = [text] if isinstance(text, str) else text
        if not isinstance(texts, list | tuple) or not texts or not all(isinstance(each, str) for each in texts):
            raise invalid("text", text, "a string or a list of at least one string")
        if return_overflowing_tokens:
            raise invalid("return_overflowing_tokens", return_overflowing_tokens, "False")
        kind = getattr(return_tensors, "value", return_tensors)  # transformers has an enumeration of these names
        if kind not in (None, "pt", "np"):
            raise invalid("return_tensors", return_tensors, "'pt', 'np' or None")
        cuts = _cuts(truncation, has_length=max_length is not None, pads=bool(padding))
        limit = self._checked_length(max_length, add_special_tokens)
        rows = [self._row(each, add_special_tokens, limit if cuts else None) for each in texts]
        length = _padded_length(padding, rows, limit)
        masks = [[1] * len(row) for row in rows]
        if length is not None:
            rows, masks = self._padded(rows, self.pad_token_id, length), self._padded(masks, 0, length)
        result: dict[str, Any] = {"input_ids": rows}
        if return_attention_mask in (None, True):
            result["attention_mask"] = masks
        if return_length:
            result["length"] = [len(row) for row in rows]
        if kind is None:
            return TokenizedTexts(**({name: values[0] for name, values in result.items()} if is_single else result))
        if len({len(row) for row in rows}) > 1:
            raise invalid("padding", padding, "'longest' or 'max_length' for texts of different lengths")
        stack = torch.tensor if kind == "pt" else np.array
        return TokenizedTexts(**{name: stack(values) for name, values in result.items()})

    def _checked_length(self, max_length: int | None, add_special_tokens: bool) -> int:
        length: Any = self.model_max_length if max_length is None else max_length
        least = 2 if add_special_tokens else 1
        if not is_integer(length) or length < least:
            raise invalid("max_length", length, f"an integer of at least {least}, or None")
        return int(length)

    def _row(self, text: str, add_special_tokens: bool, limit: int | None) -> list[int]:
        ids = self._ids(text)
        if limit is not None:
            room = limit - 2 if add_special_tokens else limit
            ids = ids[:room] if self.truncation_side == "right" else ids[max(0, len(ids) - room) :]
        return [self.bos_token_id, *ids, self.eos_token_id] if add_special_tokens else ids

    def _ids(self, text: str) -> list[int]:
        try:
            return list(self._backend.encode(text, add_special_tokens=False).ids)
        except (UnicodeEncodeError, TypeError) as error:
            raise invalid("text", text, "text without lone surrogates") from error

    def _padded(self, rows: list[list[int]], value: int, length: int) -> list[list[int]]:
        padding = [[value] * (length - len(row)) for row in rows]
        if self.padding_side == "right":
            return [row + more for row, more in zip(rows, padding, strict=True)]
        return [more + row for row, more in zip(rows, padding, strict=True)]

    def encode(self, text: str, add_special_tokens: bool = True, **options: Any) -> Any:
        """Return the token ids of a text.

        Args:
            text: The text.
            add_special_tokens: Whether it gets the tokens of its start and end.
            **options: Arguments of the call.

        Raises:
            InputError: If an argument is invalid.
        """
        return self(text, add_special_tokens=add_special_tokens, **options).input_ids

    def tokenize(self, text: str, add_special_tokens: bool = False) -> list[str]:
        """Return the tokens of a text.

        Args:
            text: The text.
            add_special_tokens: Whether it gets the tokens of its start and end.

        Raises:
            InputError: If `text` is not a string.
        """
        tokens = self.convert_ids_to_tokens(self.encode(text, add_special_tokens))
        return cast(list[str], tokens)

    def decode(self, token_ids: Any, skip_special_tokens: bool = False) -> str:
        """Return the text of tokens, in lower case.

        Args:
            token_ids: One token id, or several: a list, an array or a tensor.
            skip_special_tokens: Whether to leave out special tokens.

        Raises:
            InputError: If an id is not one of the vocabulary.
        """
        text = self._backend.decode(self._checked_ids(token_ids), skip_special_tokens=skip_special_tokens)
        return str(text).replace(END_OF_WORD, " ").strip()

    def batch_decode(self, sequences: Any, skip_special_tokens: bool = False) -> list[str]:
        """Return the texts of rows of tokens.

        Args:
            sequences: Token ids, (batch, length): lists, an array or a tensor.
            skip_special_tokens: Whether to leave out special tokens.

        Raises:
            InputError: If an id is not one of the vocabulary.
        """
        return [self.decode(row, skip_special_tokens) for row in sequences]

    def _checked_ids(self, token_ids: Any) -> list[int]:
        values = token_ids.tolist() if isinstance(token_ids, torch.Tensor | np.ndarray | np.generic) else token_ids
        ids = [values] if isinstance(values, int) else values
        if not isinstance(ids, list | tuple) or not all(
            isinstance(each, int) and 0 <= each < len(self) for each in ids
        ):
            raise invalid("token_ids", token_ids, f"integers from 0 to {len(self) - 1}")
        return list(ids)

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        """Return the token of an id, or those of a list of ids.

        Args:
            ids: An id, or several: a list, an array or a tensor.
            skip_special_tokens: Whether to leave out special tokens of a list.

        Raises:
            InputError: If an id is not one of the vocabulary.
        """
        checked = self._checked_ids(ids)
        tokens = [self._backend.id_to_token(index) for index in checked]
        if isinstance(ids, int):
            return tokens[0]
        special = set(self.all_special_tokens) if skip_special_tokens else set()
        return [token for token in tokens if token not in special]

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> Any:
        """Return the id of a token, or those of a list of tokens; that of `unk_token` for others.

        Args:
            tokens: A token, or a list of tokens.
        """
        if isinstance(tokens, str):
            index = self._backend.token_to_id(tokens)
            return self._backend.token_to_id(self.unk_token) if index is None else index
        return [self.convert_tokens_to_ids(token) for token in tokens]

    def add_tokens(self, new_tokens: Any, special_tokens: bool = False) -> int:
        """Add tokens that are found in texts before those are split into words.

        Args:
            new_tokens: A token, or a list of tokens: strings or instances of `AddedToken`.
            special_tokens: Whether strings become special tokens.

        Returns:
            The number of tokens that were not added before.

        Raises:
            InputError: If a token is anything else.
        """
        tokens = list(new_tokens) if isinstance(new_tokens, list | tuple) else [new_tokens]
        for token in tokens:
            if not isinstance(token, str | AddedToken) or not str(token):
                raise invalid("new_tokens", token, "strings or instances of AddedToken")
        if special_tokens:
            tokens = [AddedToken(token, special=True) if isinstance(token, str) else token for token in tokens]
        return int(self._backend.add_tokens(tokens))

    # Vocabulary

    def __len__(self) -> int:
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    @property
    def vocab_size(self) -> int:
        """Number of tokens without those that were added."""
        return int(self._backend.get_vocab_size(with_added_tokens=False))

    def get_vocab(self) -> dict[str, int]:
        """Return the index of each token, added ones included."""
        return dict(self._backend.get_vocab(with_added_tokens=True))

    def get_added_vocab(self) -> dict[str, int]:
        """Return the indices of the tokens that are found before texts are split into words."""
        return {token.content: index for index, token in self._backend.get_added_tokens_decoder().items()}

    @property
    def bos_token_id(self) -> int:
        """Index of the token at the start of each text."""
        return self._index("bos_token")

    @property
    def eos_token_id(self) -> int:
        """Index of the token at the end of each text."""
        return self._index("eos_token")

    @property
    def unk_token_id(self) -> int:
        """Index of the token of bytes without a token of their own."""
        return self._index("unk_token")

    @property
    def pad_token_id(self) -> int:
        """Index of the token that padding consists of."""
        return self._index("pad_token")

    def _index(self, name: str) -> int:
        token = getattr(self, name)
        index = self._backend.token_to_id(token) if isinstance(token, str) else None
        if index is None:
            raise invalid(name, token, "a token of the vocabulary")
        return int(index)

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """The special tokens by name."""
        return {name: getattr(self, name) for name in SPECIAL_TOKENS}

    @property
    def all_special_tokens(self) -> list[str]:
        """The special tokens, each once."""
        return list(dict.fromkeys(self.special_tokens_map.values()))

    @property
    def all_special_ids(self) -> list[int]:
        """Indices of the special tokens, each once."""
        return [int(self.convert_tokens_to_ids(token)) for token in self.all_special_tokens]

    # Saving

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **hub_options: Any
    ) -> None:
        """Write the files of the tokenizer, and upload them on request.

        Args:
            save_directory: Folder, which is created if it does not exist.
            push_to_hub: Whether all files of the folder are uploaded to the Hub afterwards.
            **hub_options: Arguments of the upload, see `save_pretrained` of pipelines.

        Raises:
            CheckpointError: A file cannot be written, or the upload fails.
            InputError: An argument is invalid.
            MissingDependencyError: huggingface_hub is required and not installed.
        """
        folder = checked_save_path(save_directory)
        upload = requested_upload(type(self).__name__, push_to_hub, hub_options, folder)
        added = self._backend.get_added_tokens_decoder()
        config = {
            **self._others,
            **self.special_tokens_map,
            "model_max_length": self.model_max_length,
            "padding_side": self.padding_side,
            "truncation_side": self.truncation_side,
            "added_tokens_decoder": {str(index): as_mapping(token) for index, token in added.items()},
            "tokenizer_class": CLASS_NAME,
        }
        whole = json.loads(self._backend.to_str())
        model = whole["model"]
        pairs = (pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"])
        write_json(folder / WHOLE_FILE, whole)
        write_json(folder / VOCABULARY_FILE, model["vocab"])
        write_text(folder / MERGES_FILE, "\n".join(["#version: 0.2", *pairs, ""]))
        write_json(folder / SPECIAL_TOKENS_FILE, self.special_tokens_map)
        write_json(folder / CONFIG_FILE, config)
        if upload is not None:
            upload.run(folder)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} tokens, model_max_length={self.model_max_length})"


def _special_token(name: str, value: Any) -> AddedToken:
    """Return a special token that a constructor's argument or a config file names."""
    if isinstance(value, str) and value:
        return AddedToken(value, normalized=False, special=True)
    try:
        token = as_added_token(value)
    except (TypeError, KeyError, ValueError):
        raise invalid(name, value, "a token") from None
    token.special = True
    return token


def _cuts(truncation: bool | str | None, *, has_length: bool, pads: bool) -> bool:
    """Return whether texts are cut off."""
    if truncation is None:
        return has_length and not pads
    if truncation in (True, "longest_first", "only_first"):
        return True
    if truncation in (False, "do_not_truncate"):
        return False
    raise invalid("truncation", truncation, "True, False, 'longest_first', 'only_first' or 'do_not_truncate'")


def _padded_length(padding: bool | str, rows: Sequence[Sequence[int]], limit: int) -> int | None:
    """Return the number of tokens that texts are padded to; None without padding."""
    if padding in (True, "longest"):
        return max(len(row) for row in rows)
    if padding == "max_length":
        return limit if limit < NO_LIMIT else None  # transformers does not pad without a limit either
    if padding in (False, "do_not_pad"):
        return None
    raise invalid("padding", padding, "True, False, 'longest', 'max_length' or 'do_not_pad'")
