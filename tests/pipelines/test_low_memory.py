"""Memory of the low-memory mode, as reported by the operating system."""

from __future__ import annotations

import gc
import mmap
import os
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.pipelines.tiny import DECODER_SCHEDULER, difference, load_quietly, seeded
from torch import nn

import kandinsky22
from kandinsky22 import KandinskyV22PriorPipeline
from kandinsky22.errors import InputError
from kandinsky22.kernels import host_memory
from kandinsky22.kernels.conv import Conv2d
from kandinsky22.pipelines import network_reader
from kandinsky22.runtime import disk_offload

pytestmark = pytest.mark.skipif(not os.path.exists("/proc/self/pagemap"), reason="memory is read from Linux's /proc")


def resident() -> int:
    """Return the resident bytes of this process that are not mapped from files."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


def present(tensor: torch.Tensor) -> float:
    """Return the resident fraction of a tensor."""
    first, last = tensor.data_ptr() // mmap.PAGESIZE, (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE
    entries = host_memory._page_entries(first, last - first)
    return float(np.mean(entries & host_memory._PRESENT != 0))


@pytest.fixture
def large(tmp_path: Path) -> Iterator[Any]:
    """A decoder of two networks with about 100 MB each, converted while loading so that nothing is mapped."""
    unet = {"block_out_channels": (256, 384), "layers_per_block": 1, "attention_head_dim": 64}
    unet |= {"down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D")}
    unet |= {"up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D")}
    movq = {"block_out_channels": (256, 512), "layers_per_block": 1}
    movq |= {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    kandinsky22.KandinskyV22Pipeline(
        kandinsky22.UNet2DConditionModel(sample_size=8, **unet),
        kandinsky22.DDPMScheduler(**DECODER_SCHEDULER, variance_type="learned_range"),
        kandinsky22.VQModel(num_vq_embeddings=16, **movq),
    ).to(torch.bfloat16).save_pretrained(tmp_path)
    pipe = kandinsky22.KandinskyV22Pipeline.from_pretrained(tmp_path, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    yield pipe


def test_memory_is_freed(large: Any) -> None:
    sizes = {name: sum(p.nbytes for p in network.parameters()) for name, network in large._networks().items()}
    assert min(sizes.values()) > 50e6
    references = [weakref.ref(p) for network in large._networks().values() for p in network.parameters()]
    gc.collect()
    before = resident()
    large.enable_low_memory()
    gc.collect()
    assert not any(reference() is not None for reference in references)
    offloaded = resident()
    assert before - offloaded > 0.9 * sum(sizes.values())
    resident_bytes: list[int] = []
    embeds = {name: torch.zeros(1, 1280) for name in ("image_embeds", "negative_image_embeds")}
    options: dict[str, Any] = {"num_inference_steps": 1, "output_type": "pt", "height": 16, "width": 16}
    large(**embeds, **options, callback_on_step_end=lambda *_: resident_bytes.append(resident()) or {})
    # Converted weights stay resident while their network runs, without packed copies.
    assert 0.9 * sizes["unet"] < resident_bytes[0] - offloaded < 1.5 * sizes["unet"]
    gc.collect()
    assert resident() - offloaded < 0.25 * min(sizes.values())


@pytest.mark.parametrize("by_layer", [True, False])
def test_large_layers_are_in_memory_one_at_a_time(
    by_layer: bool, large: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_offload, "LARGE", 2**19)
    mapped = kandinsky22.KandinskyV22Pipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    mapped.set_progress_bar_config(disable=True)
    embeds = {name: torch.ones(1, 1280, dtype=torch.bfloat16) for name in ("image_embeds", "negative_image_embeds")}
    call: dict[str, Any] = {**embeds, "num_inference_steps": 2, "output_type": "pt", "height": 64, "width": 64}
    baseline = mapped(**call, generator=seeded(1)).images
    mapped.enable_low_memory(by_layer=by_layer)
    layers = [
        m for m in mapped.unet.modules() if isinstance(m, Conv2d | nn.Linear) and m.weight.nbytes >= disk_offload.LARGE
    ]
    assert len(layers) > 20
    fractions: list[float] = []

    def record(*_: Any) -> None:
        packs = sum(vars(layer).get("_packed_weight") is not None for layer in layers)
        shares = [present(layer.weight) for layer in layers]
        fractions.append((packs + sum(shares)) / len(layers))

    # The last layer records the state after nearly all have run. A hook changes the order of sums.
    hook = layers[-1].register_forward_pre_hook(record)
    hooked = mapped(**call, generator=seeded(1)).images
    hook.remove()
    assert len(fractions) == 2
    assert difference(hooked.float(), baseline.float()) < 0.02
    again = mapped(**call, generator=seeded(1)).images
    if by_layer:
        assert max(fractions) < 0.1
        assert (
            difference(again.float(), baseline.float()) < 0.02
        )  # bfloat16 has three digits, and rounding differs without packing
    else:
        assert min(fractions) > 0.9
        assert torch.equal(again, baseline)
    mapped.remove_all_hooks()
    assert all("pack_weights" not in vars(layer) and not layer._forward_hooks for layer in layers)
    assert torch.equal(mapped(**call, generator=seeded(1)).images, baseline)


def test_temporary_files_are_removed(large: Any, tmp_path: Path) -> None:
    call: dict[str, Any] = {name: torch.ones(1, 1280) for name in ("image_embeds", "negative_image_embeds")}
    call |= {"num_inference_steps": 1, "output_type": "pt", "height": 16, "width": 16}
    with torch.no_grad():
        large.unet.conv_in.weight.mul_(2)  # the weights now differ from those of the files
    baseline = large(**call, generator=seeded(1)).images
    (tmp_path / "offload").mkdir()
    large.enable_low_memory(tmp_path / "offload")
    again = large(**call, generator=seeded(1)).images
    assert difference(again, baseline) < 1e-4
    large.remove_all_hooks()
    assert list((tmp_path / "offload").iterdir()) == []
    assert str(tmp_path / "offload") not in Path("/proc/self/maps").read_text()
    assert difference(large(**call, generator=seeded(1)).images, baseline) < 1e-5


def test_layers_that_were_not_packed_stay_so(large: Any, tmp_path: Path) -> None:
    unpacked = next(m for m in large.unet.modules() if isinstance(m, Conv2d) and m.weight.nbytes >= disk_offload.LARGE)
    unpacked.pack_weights = False
    large.enable_low_memory(tmp_path)
    large.remove_all_hooks()
    assert unpacked.pack_weights is False
    assert all("pack_weights" not in vars(m) for m in large.unet.modules() if m is not unpacked)


@pytest.mark.parametrize("by_layer_value", ["False", None, 0, 3.5])
def test_by_layer_must_be_a_bool(by_layer_value: Any, decoder: Any) -> None:
    with pytest.raises(InputError, match="by_layer="):
        decoder.enable_low_memory(by_layer=by_layer_value)
    assert decoder._offloads() == []


@pytest.mark.parametrize("ends", ["offloaded", "kept", "removed"])
def test_a_large_image_encoder_among_small_networks(
    ends: str, checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only networks that are offloaded are made without weights; files that were opened may go."""
    expected = load_quietly(KandinskyV22PriorPipeline, checkpoints / "prior").get_zero_embed(1)
    encoder = (checkpoints / "prior" / "image_encoder" / "model.safetensors").stat().st_size
    monkeypatch.setattr(network_reader, "DEFERRED_BYTES", 0 if ends != "kept" else encoder)
    folder = shutil.copytree(checkpoints / "prior", tmp_path / "prior")
    with network_reader.deferred_weights():
        pipe = load_quietly(KandinskyV22PriorPipeline, folder)
    pipe.load_on_first_use(used_once=True)
    if ends == "removed":
        pipe.remove_all_hooks()
    shutil.rmtree(folder)
    torch.testing.assert_close(pipe.get_zero_embed(1), expected, rtol=0, atol=1e-6)
