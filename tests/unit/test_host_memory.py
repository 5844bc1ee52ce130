"""Host memory: mapped pages are dropped without losing values, and large buffers are reused."""

from __future__ import annotations

import os
import resource
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from kandinsky22.checkpoints.weights import read_tensors
from kandinsky22.kernels import host_memory, linear
from kandinsky22.kernels.host_memory import drop_mapped_pages, empty_large, reuse_buffers
from kandinsky22.kernels.linear import apply_linear
from kandinsky22.kernels.settings import optimisations

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux has /proc/self/pagemap")
SIDE = 2048  # 16 MiB of weights, well above other changes of memory


def resident_file_bytes() -> int:
    """Return the resident bytes of mapped files of this process."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("RssFile")))


@pytest.fixture
def mapped(tmp_path: Path) -> Tensor:
    torch.manual_seed(0)
    save_file({"weight": torch.randn(SIDE, SIDE)}, tmp_path / "weights.safetensors")
    return dict(read_tensors(tmp_path / "weights.safetensors"))["weight"]


def test_dropping_pages_can_be_switched_off(mapped: Tensor) -> None:
    mapped.sum()
    with optimisations(drop_mapped_pages=False):
        assert not drop_mapped_pages(mapped)


def test_unchanged_pages_are_dropped_and_read_again(mapped: Tensor) -> None:
    total, full = mapped.sum(), resident_file_bytes()
    assert drop_mapped_pages(mapped)
    assert full - resident_file_bytes() > 0.9 * mapped.nbytes
    assert mapped.sum() == total


def test_written_pages_are_not_dropped(mapped: Tensor) -> None:
    mapped.numpy()[SIDE // 2, 7] = 5.0  # torch counts no version for this write
    mapped.sum()
    assert not drop_mapped_pages(mapped)
    assert mapped[SIDE // 2, 7] == 5.0


def test_unmapped_memory_is_not_dropped() -> None:
    unmapped = torch.randn(300, 300)
    total = unmapped.sum()
    assert not drop_mapped_pages(unmapped)
    assert unmapped.sum() == total
    assert not drop_mapped_pages(torch.zeros(300, 300))
    assert not drop_mapped_pages(torch.empty(3, 3, device="meta"))


@pytest.mark.skipif(not linear.ONEDNN_DTYPES, reason="this torch has no packed products on this machine")
@torch.no_grad()
def test_a_packed_layer_does_not_hold_its_weight_twice(mapped: Tensor) -> None:
    layer = nn.Linear(SIDE, SIDE, bias=False)
    layer.load_state_dict({"weight": mapped}, assign=True)
    features = torch.randn(200, SIDE)
    apply_linear(nn.Linear(SIDE, SIDE), features)  # warm-up: the code of the library becomes resident
    expected, full = torch.nn.functional.linear(features, layer.weight), resident_file_bytes()
    assert torch.allclose(apply_linear(layer, features), expected, atol=1e-3)
    assert full - resident_file_bytes() > 0.9 * mapped.nbytes
    assert torch.equal(layer.weight, mapped)


# The pool of large buffers

LARGE = host_memory.LARGE_BUFFER // 4  # elements of float32


def new_pages() -> int:
    """Return the number of new pages that the system maps for a large tensor."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    empty_large(torch.empty(0), LARGE).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_large_tensors_equal_ordinary_ones() -> None:
    like = torch.zeros(3, dtype=torch.bfloat16)
    for shape in ((2, 3), (2, host_memory.LARGE_BUFFER // 4, 1)):
        tensor = empty_large(like, *shape)
        assert (tensor.shape, tensor.dtype, tensor.is_contiguous()) == (shape, torch.bfloat16, True)
        tensor.fill_(2)
        other = tensor[1:]
        del tensor
        assert (other == 2).all(), "memory stays as long as a view exists"
    assert empty_large(torch.empty(0, device="meta"), LARGE).device.type == "meta"


def test_large_buffers_are_reused_until_the_pool_is_closed() -> None:
    assert new_pages() > 0 < new_pages()
    with reuse_buffers():
        assert new_pages() > 0
        assert new_pages() == 0
        with pytest.raises(ZeroDivisionError), reuse_buffers():
            raise ZeroDivisionError
        assert new_pages() == 0
        first, second = (empty_large(torch.empty(0), LARGE).fill_(number) for number in (1, 2))
        assert (first == 1).all()
        assert (second == 2).all()
        del first, second
        assert len(host_memory._free_buffers) == 2
        empty_large(torch.empty(0), 2 * LARGE)
        assert len(host_memory._free_buffers) == 1, "buffers that are too small are freed"
        empty_large(torch.empty(0), LARGE)
        assert [len(block) for block in host_memory._free_buffers] == [8 * LARGE]
    assert not host_memory._free_buffers
    assert new_pages() > 0
    with optimisations(buffer_pool=False), reuse_buffers():
        assert new_pages() > 0 < new_pages()


def test_threads_share_the_pool() -> None:
    with reuse_buffers(), ThreadPoolExecutor(4) as pool:
        for number in pool.map(
            lambda number: empty_large(torch.empty(0), LARGE).fill_(number).sum().item() / LARGE, range(32)
        ):
            assert number == int(number)
        assert 1 <= len(host_memory._free_buffers) <= 4
    assert not host_memory._free_buffers


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks here")
def test_forked_processes_start_with_an_empty_pool() -> None:
    with reuse_buffers():
        child = os.fork()
        if not child:
            os._exit(host_memory._nesting)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_out_of_memory_raises_torchs_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory.mmap, "mmap", lambda *_, **__: (_ for _ in ()).throw(OSError()))
    assert empty_large(torch.empty(0), LARGE).shape == (LARGE,)
    with pytest.raises(RuntimeError):
        empty_large(torch.empty(0), 2**60)
