"""Tiled encoding and decoding equal the untiled results and need less memory."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from kandinsky22.kernels import attention
from kandinsky22.kernels.modules import internal_hook
from kandinsky22.models import VQModel, movq_tiling
from kandinsky22.runtime import device_offload

CONFIG: dict[str, Any] = {
    "block_out_channels": (32, 32, 64),
    "layers_per_block": 1,
    "num_vq_embeddings": 64,
    "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"),
}


@pytest.fixture(scope="module")
def movq() -> VQModel:
    torch.manual_seed(0)
    result = VQModel(**CONFIG).eval()
    for parameter in result.parameters():
        nn.init.normal_(parameter, std=0.15)
    return result


@pytest.fixture(autouse=True)
def untouched(movq: VQModel) -> Any:
    yield
    movq.disable_tiling()
    movq.disable_slicing()


def distance(ours: Tensor, exact: Tensor) -> float:
    assert ours.shape == exact.shape
    return ((ours.double() - exact.double()).abs().max() / exact.abs().max()).item()


def decoded(movq: VQModel, latents: Tensor) -> Tensor:
    out: Tensor = movq.decode(latents, force_not_quantize=True, return_dict=False)[0]
    return out


def encoded(movq: VQModel, pictures: Tensor) -> Tensor:
    out: Tensor = movq.encode(pictures, return_dict=False)[0]
    return out


@pytest.mark.parametrize("numbers", [2**8, 2**12, 2**13 + 5], ids=str)  # 16 rows, and more of the narrower levels
@pytest.mark.parametrize("size", [(16, 16), (24, 40), (6, 9)], ids=str)
@torch.no_grad()
def test_tiling_is_exact(movq: VQModel, numbers: int, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(movq_tiling, "BAND_ELEMENTS", numbers)
    latents, pictures = torch.randn(2, 4, *size), torch.randn(2, 3, 4 * size[0], 4 * size[1])
    exact = copy.deepcopy(movq).double()
    movq.enable_tiling()
    assert distance(decoded(movq, latents), decoded(exact, latents.double())) < 5e-6
    assert distance(encoded(movq, pictures), encoded(exact, pictures.double())) < 5e-6
    assert decoded(movq, latents).is_contiguous()


@torch.no_grad()
def test_networks_of_one_level_are_tiled_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(movq_tiling, "BAND_ELEMENTS", 2**8)
    small = VQModel(
        block_out_channels=(32,), down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",)
    ).eval()
    latents, pictures = torch.randn(1, 4, 40, 16), torch.randn(1, 3, 40, 16)
    untiled = decoded(small, latents), encoded(small, pictures)
    small.enable_tiling()
    assert distance(decoded(small, latents), untiled[0]) < 5e-6
    assert distance(encoded(small, pictures), untiled[1]) < 5e-6


@pytest.mark.gpu
@torch.no_grad()
def test_tiling_on_an_accelerator(movq: VQModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(movq_tiling, "BAND_ELEMENTS", 2**8)
    other = copy.deepcopy(movq).cuda()
    latents, pictures = torch.randn(2, 4, 16, 16).cuda(), torch.randn(2, 3, 64, 64).cuda()
    untiled = decoded(other, latents), encoded(other, pictures)
    other.enable_tiling()
    assert distance(decoded(other, latents), untiled[0]) < 1e-3
    assert distance(encoded(other, pictures), untiled[1]) < 1e-3


@torch.no_grad()
def test_bands_are_used_and_cover_every_row_once(movq: VQModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(movq_tiling, "BAND_ELEMENTS", 2**8)
    heights: list[int] = []
    # a hook of the user would switch tiling off
    record = internal_hook(lambda _, args, __: heights.append(args[0].shape[2]))
    conv = movq.decoder.conv_out.register_forward_hook(record)
    movq.enable_tiling()
    decoded(movq, torch.randn(1, 4, 16, 16))
    movq.disable_tiling()
    decoded(movq, torch.randn(1, 4, 16, 16))
    conv.remove()
    assert heights == [16, 16, 16, 16, 16, 64]  # rows 0-15, 14-29, 28-43, 42-57, 48-63; all


@pytest.mark.parametrize("sides", [(16, 40), (17, 16), (18, 16), (5, 16)], ids=str)
def test_rows_at_the_edges_of_bands_are_inside_another(sides: tuple[int, int]) -> None:
    rows = movq_tiling.TensorRows(torch.zeros(1, 1, *sides))
    for size in (4, 8, 16):
        result, last = [], 0
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(movq_tiling, "_band_height", lambda shape, size=size: min(size, shape[2]))
            for first, end in movq_tiling._bands(rows.shape):
                assert first == 0 or first <= last - 2
                result += range(first + (first > 0), end - (end < sides[0]))
                last = end
        assert set(result) == set(range(sides[0]))


class Memory(TorchDispatchMode):
    """Tracks the bytes of all live tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor) and not tensor.is_mkldnn:  # those cannot be asked; packed keys are small here
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: Any) -> None:
        address = storage._cdata
        if address in self._known:
            return
        self._known.add(address)
        size = storage.nbytes()
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._gone, address, size)

    def _gone(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.now -= size


def most(call: Callable[[], Any]) -> int:
    with Memory() as memory:
        call()
    return memory.most


@torch.no_grad()
def test_tiling_takes_less_memory(movq: VQModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(movq_tiling, "BAND_ELEMENTS", 2**8)
    monkeypatch.setattr(movq_tiling, "ROW_MULTIPLE", 1)
    monkeypatch.setattr(attention, "CHUNK_WEIGHTS", 2**16)  # otherwise as much as these small features
    latents, pictures = torch.randn(1, 4, 48, 16), torch.randn(1, 3, 192, 64)
    for call in (lambda: decoded(movq, latents), lambda: encoded(movq, pictures)):
        call()  # weights are packed
        untiled = most(call)
        movq.enable_tiling()
        call()
        tiled = most(call)
        movq.disable_tiling()
        features_size = 32 * 192 * 64 * 4  # bytes of features at the picture's resolution
        assert tiled < 3.1 * features_size < untiled  # input and output of a block, and modulations of a sixteenth


@torch.no_grad()
def test_slicing_is_exact(movq: VQModel) -> None:
    latents, pictures = torch.randn(3, 4, 8, 8), torch.randn(3, 3, 32, 32)
    untiled = decoded(movq, latents), encoded(movq, pictures)
    rows: list[int] = []
    hook = movq.decoder.register_forward_hook(lambda _, args, __: rows.append(len(args[0])))
    movq.enable_slicing()
    assert distance(decoded(movq, latents), untiled[0]) < 5e-6
    assert distance(encoded(movq, pictures), untiled[1]) < 5e-6
    hook.remove()
    assert rows == [1, 1, 1]


def test_training_is_not_tiled(movq: VQModel) -> None:
    movq.enable_tiling()
    decoded(movq, torch.randn(1, 4, 8, 8)).sum().backward()
    assert movq.decoder.conv_in.weight.grad is not None
    movq.zero_grad(set_to_none=True)


@torch.no_grad()
def test_tiling_in_bfloat16(movq: VQModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(movq_tiling, "BAND_ELEMENTS", 2**8)
    half, latents = copy.deepcopy(movq).bfloat16(), torch.randn(1, 4, 16, 16).bfloat16()
    exact = decoded(movq, latents.float())
    untiled = decoded(half, latents)
    half.enable_tiling()
    tiled = decoded(half, latents)
    assert tiled.dtype == torch.bfloat16
    assert (tiled - exact).square().mean() < 1.2 * (untiled - exact).square().mean()


@torch.no_grad()
def test_tiling_of_an_offloaded_network(movq: VQModel, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate")
    monkeypatch.setattr(movq_tiling, "BAND_ELEMENTS", 2**8)
    other, latents = copy.deepcopy(movq), torch.randn(1, 4, 16, 16)
    untiled = decoded(movq, latents)
    other.enable_tiling()
    device_offload.SequentialOffload(other, torch.device("cpu"))
    assert all(parameter.is_meta for parameter in other.parameters())
    assert distance(decoded(other, latents), untiled) < 1e-5
