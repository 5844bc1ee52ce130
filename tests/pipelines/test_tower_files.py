"""Weight files of the CLIP towers, which transformers reads: wrong ones are refused by name, and nothing blocks."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.pipelines.tiny import load_quietly

from kandinsky22 import CheckpointError, KandinskyV22PriorPipeline

SINGLE, PICKLED, INDEX = "model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"
TOWERS = ("text_encoder", "image_encoder")


@pytest.fixture
def folder(checkpoints: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoints / "prior", tmp_path / "prior"))


def refused(folder: Path, *parts: str) -> None:
    with pytest.raises(CheckpointError) as raised:
        load_quietly(KandinskyV22PriorPipeline, folder)
    assert all(part in str(raised.value) for part in parts), raised.value


KINDS: dict[str, Callable[[torch.Tensor], Any]] = {
    "int64": lambda tensor: tensor.long(),
    "bool": lambda tensor: tensor > 0,
    "complex64": lambda tensor: tensor + 1j,
    "sparse": lambda tensor: tensor.to_sparse(),
    "meta": lambda tensor: tensor.to("meta"),
    "a list": lambda tensor: tensor.tolist(),
}


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize(
    ("name", "kind"),
    [*((PICKLED, kind) for kind in KINDS), *((SINGLE, kind) for kind in ("int64", "bool", "complex64"))],
)
def test_weights_of_other_kinds(tower: str, name: str, kind: str, folder: Path) -> None:
    path = folder / tower / SINGLE
    tensors: dict[str, Any] = load_file(path)
    last = next(reversed(tensors))
    tensors[last] = KINDS[kind](tensors[last])
    path.unlink()
    if name == PICKLED:
        torch.save(tensors, path.with_name(name))
    else:
        save_file(tensors, path, metadata={"format": "pt"})
    refused(folder, tower, name)


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("shard", ["../elsewhere.safetensors", "/etc/passwd", "", "absent.safetensors", "a.bin", 3])
def test_indices_that_list_other_files(tower: str, shard: Any, folder: Path) -> None:
    path = folder / tower / SINGLE
    tensors = load_file(path)
    shutil.copy(path, folder / "elsewhere.safetensors")
    path.unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, shard)}
    path.with_name(INDEX).write_text(json.dumps(index))
    refused(folder, tower)


@pytest.mark.skipif(os.name != "posix", reason="pipes of POSIX systems")
@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("name", ["config.json", SINGLE])
def test_pipes_never_block(tower: str, name: str, folder: Path) -> None:
    (folder / tower / name).unlink()
    os.mkfifo(folder / tower / name)
    refused(folder, tower)


def test_saving_over_other_shards_and_tokenizers_leaves_none_of_them(prior: Any, folder: Path) -> None:
    (folder / "tokenizer" / "added_tokens.json").write_text('{"<other>": 90}')
    (folder / "generation_defaults.json").write_text('{"guidance_scale": 9}')
    prior.save_pretrained(folder, max_shard_size="20KB")
    assert not (folder / "text_encoder" / SINGLE).exists()
    assert not (folder / "tokenizer" / "added_tokens.json").exists()
    loaded = load_quietly(KandinskyV22PriorPipeline, folder)
    assert loaded.generation_defaults == {}
    for tower in TOWERS:
        ours, theirs = getattr(prior, tower).state_dict(), getattr(loaded, tower).state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    prior.save_pretrained(folder)
    assert not list((folder / "text_encoder").glob("*-of-*"))
    assert not (folder / "text_encoder" / INDEX).exists()
