"""Converted and downloaded checkpoints keep the distilled adapter and the tiny decoder of the original."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tests.hub_server import serving
from tests.unit.adapter_layers import attention_layers, flat_layout, peft_layout, random_pairs

from kandinsky22 import KandinskyV22Pipeline, TinyDecoder, apply_quality
from kandinsky22.adapters.files import DIGEST, distilled_steps, find_distilled_files, read_adapter, write_adapter
from kandinsky22.adapters.formats import UNET, match_updates
from kandinsky22.checkpoints.hub import CheckpointSource
from kandinsky22.errors import CheckpointError
from kandinsky22.kernels import half_precision, packed_memory
from kandinsky22.models.tiny_decoder import TinyDecoderConfig
from kandinsky22.pipelines.checkpoint_tools import convert, pull

ADAPTER = "distilled/pytorch_lora_weights.safetensors"
TINY = "tiny_decoder/diffusion_pytorch_model.safetensors"


@pytest.fixture
def source(checkpoints: Path, tmp_path: Path) -> Path:
    """A decoder with a distilled adapter for 3 steps, with an alpha, and a tiny decoder."""
    folder = tmp_path / "source" / "decoder"
    shutil.copytree(checkpoints / "decoder", folder)
    pipe: Any = KandinskyV22Pipeline.from_pretrained(folder)
    tensors = flat_layout(random_pairs(pipe.unet, attention_layers(pipe.unet)), alpha=2.0)
    adapters = match_updates(tensors, {UNET: pipe.unet}, origin="tensors")
    write_adapter(folder / "distilled", adapters, num_inference_steps=3)
    torch.manual_seed(5)
    TinyDecoder(**TinyDecoderConfig.for_movq(pipe.movq, (8, 8))).save_pretrained(folder / "tiny_decoder")
    (folder / "distilled" / "notes.txt").write_text("not part of the adapter")
    return folder


def check_extras(source: Path, output: Path, dtype: torch.dtype) -> None:
    """Check that the extras of a converted checkpoint are those of the source, in this type, and that they load."""
    for name in (ADAPTER, TINY):
        expected, actual = load_file(source / name), load_file(output / name)
        assert actual.keys() == expected.keys()
        assert {tensor.dtype for tensor in actual.values()} == {dtype}
        assert all(torch.equal(actual[key], expected[key].to(dtype)) for key in expected)
    original, new = read_adapter(source / "distilled"), read_adapter(output / "distilled")
    assert new.settings == original.settings and new.settings["lora_alpha"] == 2
    pipe: Any = KandinskyV22Pipeline.from_pretrained(output, torch_dtype=dtype)
    assert apply_quality(pipe, "instant")["num_inference_steps"] == distilled_steps(source / ADAPTER) == 3
    pipe.enable_tiny_decoder()
    assert pipe.get_active_adapters() == ["distilled"] and pipe.tiny_decoder.dtype == dtype
    assert pipe.tiny_decoder.config == TinyDecoder.from_pretrained(source / "tiny_decoder").config


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_converting_keeps_what_belongs_to_the_checkpoint(source: Path, tmp_path: Path, dtype: str) -> None:
    convert(CheckpointSource(source), tmp_path / "new", dtype=dtype)
    check_extras(source, tmp_path / "new", getattr(torch, dtype))
    assert not (tmp_path / "new" / "prior" / "distilled").exists()
    modes = {path.stat().st_mode for path in (tmp_path / "new").rglob("*.safetensors")}
    assert len(modes) == 1, "all files have the permissions of new ones"


def test_preparing_keeps_what_belongs_to_the_checkpoint(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if packed_memory.fingerprint() is None:
        pytest.skip("packed weights cannot be mapped here")
    monkeypatch.setenv("KANDINSKY22_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("kandinsky22.pipelines.checkpoint_tools.pack_checkpoint", lambda folder: ["unet"])
    convert(CheckpointSource(source), tmp_path / "new", dtype="float32", prepare=True, with_prior=False)
    check_extras(source, tmp_path / "new", torch.float32)
    pytest.importorskip("torchao")
    convert(CheckpointSource(source), tmp_path / "int8", dtype="int8", prepare=True, with_prior=False)
    slow = torch.bfloat16 in half_precision.SLOW_TYPES
    check_extras(source, tmp_path / "int8", torch.float32 if slow else torch.bfloat16)


@pytest.mark.parametrize("kind", ["decoder", "inpaint"])
def test_converting_the_embedded_model(kind: str, tmp_path: Path) -> None:
    """All kinds use the adapter and the tiny decoder of the decoder."""
    source = CheckpointSource("embedded", embedded_subfolder=kind)
    convert(source, tmp_path / "new", dtype="bfloat16", with_prior=False)
    original = find_distilled_files("embedded")[0]
    expected, actual = load_file(original), load_file(tmp_path / "new" / ADAPTER)
    assert all(torch.equal(actual[name], tensor.bfloat16()) for name, tensor in expected.items())
    assert distilled_steps(tmp_path / "new" / ADAPTER) == distilled_steps(original)
    weights = load_file(original.parent.parent / TINY)
    converted = load_file(tmp_path / "new" / TINY)
    assert all(torch.equal(converted[name], tensor.bfloat16()) for name, tensor in weights.items())


def test_converting_from_the_hub(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(source, tmp_path / "hub" / "someone" / "decoder")
    with serving(tmp_path / "hub", monkeypatch) as hub:
        remote = CheckpointSource("someone/decoder", cache_dir=tmp_path / "cache")
        convert(remote, tmp_path / "new", dtype="float16", with_prior=False)
        assert {ADAPTER, TINY} <= set(hub.fetched) and "distilled/notes.txt" not in hub.fetched
    check_extras(source, tmp_path / "new", torch.float16)


def test_pulling_fetches_them_for_offline_use(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(source, tmp_path / "hub" / "someone" / "decoder")
    with serving(tmp_path / "hub", monkeypatch) as hub:
        pull(CheckpointSource("someone/decoder", cache_dir=tmp_path / "cache", checks_digests=True))
        assert {ADAPTER, TINY, "tiny_decoder/config.json"} <= set(hub.fetched)
        hub.up = False
        offline = {"cache_dir": tmp_path / "cache", "local_files_only": True}
        pipe: Any = KandinskyV22Pipeline.from_pretrained("someone/decoder", **offline)
        assert apply_quality(pipe, "instant")["num_inference_steps"] == 3
        pipe.enable_tiny_decoder()


def test_adapters_in_other_forms_become_one_file(source: Path, tmp_path: Path) -> None:
    unet: Any = KandinskyV22Pipeline.from_pretrained(source).unet
    tensors = peft_layout(random_pairs(unet, attention_layers(unet)))
    folder = source / "distilled"
    shutil.rmtree(folder)
    folder.mkdir()
    torch.save(tensors, folder / "adapter_model.bin")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 8}')
    convert(CheckpointSource(source), tmp_path / "new", dtype="float16", with_prior=False)
    assert [path.name for path in (tmp_path / "new" / "distilled").iterdir()] == [Path(ADAPTER).name]
    assert read_adapter(tmp_path / "new" / "distilled").settings["lora_alpha"] == 8

    shutil.rmtree(folder)
    unet.save_pretrained(folder, max_shard_size="200KB")  # whole weights in several files
    convert(CheckpointSource(source), tmp_path / "whole", dtype="float16", with_prior=False)
    whole = load_file(tmp_path / "whole" / ADAPTER)
    assert all(torch.equal(whole[name], tensor.half()) for name, tensor in unet.state_dict().items())
    with safe_open(tmp_path / "whole" / ADAPTER, "pt") as file:
        assert DIGEST not in file.metadata()


def test_folders_without_files_are_left_out_and_damaged_ones_refused(source: Path, tmp_path: Path) -> None:
    (source / ADAPTER).write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="pytorch_lora_weights"):
        convert(CheckpointSource(source), tmp_path / "new", dtype="float16", with_prior=False)
    assert not (tmp_path / "new").exists()
    (source / ADAPTER).unlink()
    (source / "tiny_decoder" / "config.json").unlink()
    convert(CheckpointSource(source), tmp_path / "new", dtype="float16", with_prior=False)
    assert {path.name for path in (tmp_path / "new").iterdir() if path.is_dir()} == {"unet", "movq", "scheduler"}
