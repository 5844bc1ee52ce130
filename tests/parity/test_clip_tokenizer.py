"""CLIP's tokenizer against that of transformers: the same ids from the same files."""

from __future__ import annotations

import copy
import itertools
import json
import pickle
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from tests.pipelines.tiny import save_tokenizer

from kandinsky22 import CheckpointError, InputError, KandinskyV22PriorPipeline
from kandinsky22.checkpoints.hub import embedded_folder
from kandinsky22.pipelines import clip_files
from kandinsky22.pipelines.clip_tokenizer import CLIPTokenizer
from kandinsky22.training.towers import build_tokenizer

TEXTS = [
    "",
    " ",
    "a red cat, 4k photo",
    "A  RED\tCat\n on  a Mat",
    "it's they're we'll I'd you've don't 'S'T rock'n'roll",
    "cat2cat 1234 3.14 50% #1!!! ...?!",
    "über straße Ünïcödé \uff26\uff55\uff4c\uff2c e\u0301 é İstanbul ǅ ΣΑΣ",
    "кот и собака 猫と犬 강아지 عربى ไทย हिन्दी",
    "😀 👩‍🚀 ❤️ 🇫🇷 \u200b zero\u00adwidth\ufeff \u2028 line \x00 nul \x1f",
    "<|endoftext|> in <|startoftext|> a text <|ENDOFTEXT|> <|endoftext|>on",
    "a-b_c/d\\e (f) [g] {h} <i> \"j\" 'k'",
    "red " * 100,
    "x" * 300,
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tokenizer with all bytes, as the published one has, and a few words."""
    path = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(path, ["red", "cat", "on", "a", "photo", "the", "ing", "4k"])
    return path


@pytest.fixture(scope="module")
def pair(folder: Path) -> tuple[Any, Any]:
    """Return our tokenizer and that of transformers, of the same files."""
    return CLIPTokenizer.from_pretrained(folder), transformers.CLIPTokenizer.from_pretrained(str(folder))


def random_texts(count: int) -> list[str]:
    generator = random.Random(0)
    ranges = ((32, 127), (32, 127), (0, 0x250), (0x370, 0x530), (0x600, 0xE00), (0x3000, 0x9FFF), (0x1F300, 0x1FA00))
    kinds = [generator.choice(ranges) for _ in range(count)]
    return ["".join(chr(generator.randrange(*kind)) for _ in range(generator.randrange(1, 40))) for kind in kinds]


def test_ids_of_texts(pair: tuple[Any, Any]) -> None:
    ours, theirs = pair
    for text in TEXTS + random_texts(2000):
        actual, expected = ours(text), theirs(text, verbose=False)
        assert actual.input_ids == expected.input_ids, text
        assert actual["attention_mask"] == expected["attention_mask"]
        assert ours(text, add_special_tokens=False).input_ids == expected.input_ids[1:-1]
        assert ours.encode(text) == expected.input_ids
        assert ours.tokenize(text) == theirs.tokenize(text)


def test_texts_of_ids(pair: tuple[Any, Any]) -> None:
    ours, theirs = pair
    rows = [theirs(text, verbose=False).input_ids for text in TEXTS + random_texts(300)]
    for ids in rows:
        for skip in (False, True):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
            assert ours.convert_ids_to_tokens(ids, skip) == theirs.convert_ids_to_tokens(ids, skip)
        assert ours.convert_tokens_to_ids(ours.convert_ids_to_tokens(ids)) == ids
    assert ours.batch_decode(rows) == theirs.batch_decode(rows)
    tensor = torch.tensor(rows[2])
    assert ours.decode(tensor) == ours.decode(tensor.numpy()) == theirs.decode(tensor)
    assert ours.decode(int(tensor[1])) == theirs.decode([int(tensor[1])])
    assert ours.convert_ids_to_tokens(5) == theirs.convert_ids_to_tokens(5)
    assert ours.convert_tokens_to_ids("no such token") == ours.unk_token_id


@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize("truncation_side", ["right", "left"])
def test_padding_and_truncation(padding_side: Any, truncation_side: Any, folder: Path) -> None:
    sides = {"padding_side": padding_side, "truncation_side": truncation_side}
    ours = CLIPTokenizer.from_pretrained(folder, **sides)
    theirs = transformers.CLIPTokenizer.from_pretrained(str(folder), **sides)
    texts = ["a red cat on the photo", "cat", ""]
    paddings = (False, True, "longest", "max_length", "do_not_pad")
    truncations = (None, False, True, "longest_first", "do_not_truncate")
    for padding, truncation, length, special in itertools.product(paddings, truncations, (None, 5, 80), (True, False)):
        options = {"padding": padding, "max_length": length, "add_special_tokens": special}
        if truncation is not None:
            options["truncation"] = truncation
        actual, expected = ours(texts, **options), theirs(texts, **options, verbose=False)
        assert actual.input_ids == expected.input_ids, options
        assert actual.attention_mask == expected.attention_mask, options


@pytest.mark.parametrize("text", ["a red cat", ["a red cat", "cat"]])
def test_forms_of_the_result(text: Any, pair: tuple[Any, Any]) -> None:
    ours, theirs = pair
    options = {"padding": "max_length", "truncation": True, "return_length": True}
    for kind, array in (("pt", torch.Tensor), ("np", np.ndarray), (transformers.TensorType.PYTORCH, torch.Tensor)):
        actual, expected = (each(text, **options, return_tensors=kind) for each in pair)
        assert isinstance(actual.input_ids, array) and actual.input_ids.dtype == expected.input_ids.dtype
        for name in ("input_ids", "attention_mask", "length"):
            assert actual[name].tolist() == np.asarray(expected[name]).tolist()
    actual, expected = ours(text, **options), theirs(text, **options)
    assert (actual.input_ids, actual.attention_mask) == (expected.input_ids, expected.attention_mask)
    without = ours(text, return_attention_mask=False)
    assert "attention_mask" not in without and without.data == {"input_ids": without.input_ids}
    moved = ours(text, padding=True, return_tensors="pt").to("cpu")
    assert set({**moved}) == {"input_ids", "attention_mask"}


def test_vocabulary(pair: tuple[Any, Any], folder: Path) -> None:
    ours, theirs = pair
    assert len(ours) == len(theirs) and ours.vocab_size == theirs.vocab_size and ours.get_vocab() == theirs.get_vocab()
    for name in ("bos", "eos", "unk", "pad"):
        assert getattr(ours, f"{name}_token") == getattr(theirs, f"{name}_token")
        assert getattr(ours, f"{name}_token_id") == getattr(theirs, f"{name}_token_id")
    assert ours.model_max_length == theirs.model_max_length == 77
    assert sorted(ours.all_special_tokens) == sorted(theirs.all_special_tokens)
    assert sorted(ours.all_special_ids) == sorted(theirs.all_special_ids)
    assert ours.special_tokens_map == theirs.special_tokens_map
    more = copy.deepcopy(ours), copy.deepcopy(theirs)
    for each in more:
        assert each.add_tokens(["<thing>", "cat</w>", "<other thing>"]) == 3
        assert each.add_tokens("<thing>") == 0
    assert len(more[0]) == len(more[1]) == len(ours) + 2
    for text in ("a <thing> on <other thing>", "a<THING>on", "a cat</w>"):
        assert more[0](text).input_ids == more[1](text).input_ids
    assert more[0].get_added_vocab() == more[1].get_added_vocab()
    copied = pickle.loads(pickle.dumps(more[0]))
    assert copied.get_vocab() == more[0].get_vocab() and copied("a <thing>") == more[0]("a <thing>")
    assert len(ours) == len(theirs)


def test_files_are_those_of_transformers(folder: Path, tmp_path: Path) -> None:
    ours = CLIPTokenizer.from_pretrained(folder)
    ours.add_tokens(["<thing>"])
    ours.add_tokens(["<mark>"], special_tokens=True)
    ours.save_pretrained(tmp_path / "ours")
    theirs = transformers.CLIPTokenizer.from_pretrained(str(tmp_path / "ours"))
    theirs.save_pretrained(str(tmp_path / "theirs"))
    for name in ("ours", "theirs"):
        again = CLIPTokenizer.from_pretrained(tmp_path / name)
        assert again.get_vocab() == ours.get_vocab() == theirs.get_vocab()
        assert again.model_max_length == theirs.model_max_length == 77
        for text in [*TEXTS, "a <thing> on <mark>"]:
            assert again(text).input_ids == theirs(text, verbose=False).input_ids == ours(text).input_ids
            for skip in (False, True):
                ids = ours(text).input_ids
                assert again.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)
    (tmp_path / "ours" / "tokenizer.json").unlink()
    assert CLIPTokenizer.from_pretrained(tmp_path / "ours").get_vocab() == ours.get_vocab()


def test_files_of_earlier_releases(tmp_path: Path) -> None:
    """The published checkpoint was written by transformers 4: special tokens are mappings, and tokens have a file."""
    save_tokenizer(tmp_path)
    flags = {"__type": "AddedToken", "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    start, end = ({**flags, "content": f"<|{name}oftext|>"} for name in ("start", "end"))
    settings = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": "<|endoftext|>"}
    more = {"add_prefix_space": False, "do_lower_case": True, "errors": "replace", "tokenizer_class": "CLIPTokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, **more, "model_max_length": 77}))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(settings))
    theirs = transformers.CLIPTokenizer.from_pretrained(str(tmp_path))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<thing>": len(theirs)}))
    theirs.add_tokens([tokenizers.AddedToken("<thing>", normalized=False)])
    ours = clip_files.load_tokenizer(tmp_path)
    assert ours.get_vocab() == theirs.get_vocab()
    for text in [*TEXTS, "a <thing>on"]:
        assert ours(text).input_ids == theirs(text, verbose=False).input_ids
    ours.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved/tokenizer_config.json").read_text())["errors"] == "replace"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text": 3}, "text=3 is invalid"),
        ({"text": []}, "text=.* is invalid: expected a string or a list of at least one string"),
        ({"text": ["a", None]}, "text=.* is invalid"),
        ({"text": "a \ud800"}, "text=.* is invalid: expected text without lone surrogates"),
        ({"padding": "max"}, "padding='max' is invalid: expected True, False, 'longest', 'max_length'"),
        ({"truncation": "end"}, "truncation='end' is invalid"),
        ({"max_length": 1, "truncation": True}, "max_length=1 is invalid: expected an integer of at least 2"),
        ({"max_length": 7.0, "truncation": True}, r"max_length=7\.0 is invalid"),
        ({"return_tensors": "tf"}, "return_tensors='tf' is invalid: expected 'pt', 'np' or None"),
        ({"return_overflowing_tokens": True}, "return_overflowing_tokens=True is invalid: expected False"),
        ({"text": ["a", "a cat"], "return_tensors": "pt"}, "padding=False is invalid: expected 'longest'"),
    ],
)
def test_invalid_arguments(arguments: dict[str, Any], message: str, pair: tuple[Any, Any]) -> None:
    with pytest.raises(InputError, match=message):
        pair[0](**{"text": "a", **arguments})


@pytest.mark.parametrize("ids", [[10**9], [-1], 10**9, "a", [1.5], torch.tensor([0.5])])
def test_invalid_ids(ids: Any, pair: tuple[Any, Any]) -> None:
    with pytest.raises(InputError, match=r"token_ids=.* is invalid: expected integers from 0 to"):
        pair[0].decode(ids)


@pytest.mark.parametrize("token", ["", None, 3])
def test_invalid_tokens(token: Any, pair: tuple[Any, Any], folder: Path) -> None:
    with pytest.raises(InputError, match=r"new_tokens=.* is invalid"):
        pair[0].add_tokens([token])
    if token is not None:
        with pytest.raises(InputError, match=r"pad_token=.* is invalid"):
            CLIPTokenizer.from_pretrained(folder, pad_token=token)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "merges.txt").write_text("#version: 0.2\nre d cat\n"),
        lambda folder: (folder / "merges.txt").write_text("#version: 0.2\nq q\n"),
        lambda folder: (folder / "vocab.json").write_text('{"a": 0}'),
        lambda folder: (folder / "vocab.json").write_text('{"a": -1}'),
        lambda folder: (folder / "tokenizer.json").write_text("{}"),
        lambda folder: (folder / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}, "merges": 3}}'),
        lambda folder: (folder / "added_tokens.json").write_text('{"<thing>": 5}'),
    ],
)
def test_damaged_files(damage: Any, tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    damage(tmp_path)
    with pytest.raises(CheckpointError):
        clip_files.load_tokenizer(tmp_path)


def test_pipelines_take_either(pair: tuple[Any, Any]) -> None:
    pipe = KandinskyV22PriorPipeline.from_pretrained(embedded_folder("prior"))
    call = {"prompt": "a red circle, and more", "num_inference_steps": 2}
    own = pipe(**call, generator=torch.Generator().manual_seed(0)).image_embeds
    pipe.tokenizer = transformers.CLIPTokenizer.from_pretrained(str(embedded_folder("prior") / "tokenizer"))
    theirs = pipe(**call, generator=torch.Generator().manual_seed(0)).image_embeds
    assert torch.equal(own, theirs)


def test_pictures_are_drawn_without_transformers(tmp_path: Path) -> None:
    program = (
        "import sys; sys.modules['transformers'] = None\n"
        "from kandinsky22.cli.main import main\n"
        f"main(['generate', 'a red circle', '--steps', '1', '--prior-steps', '1', '-o', {str(tmp_path / 'a.png')!r}])\n"
        "from kandinsky22 import MissingDependencyError, make_depth_hint\n"
        "from kandinsky22.optimization import get_scheduler\n"
        "for call in (lambda: make_depth_hint('a.png', 'model'), lambda: get_scheduler('constant', None)):\n"
        "    try: call()\n"
        "    except MissingDependencyError as error: print(error)\n"
        "try: from kandinsky22.pipelines.kandinsky2_2.pipeline_kandinsky2_2_prior import CLIPTokenizer\n"
        "except MissingDependencyError as error: print(error)\n"
        "main(['serve', '--depth-model', 'model', '--port', '0'])\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, check=True)
    needed = "needs the package transformers: pip install 'kandinsky22[depth]'"
    assert result.stderr.endswith(f"kandinsky22: error: --depth-model {needed}\n")
    lines = result.stdout.splitlines()[-3:]
    assert lines == [
        f"a hint of depth {needed}",
        "get_scheduler needs the package transformers: pip install 'kandinsky22[train]'",
        "CLIPTokenizer needs the package transformers: pip install 'kandinsky22[train]'",
    ]
