"""Memory of mapped weights is given back without anything being lost."""

from __future__ import annotations

import os
import resource
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from kandinsky22.checkpoints.weights import read_tensors
from kandinsky22.kernels import host_memory, linear
from kandinsky22.kernels.host_memory import drop_mapped_pages, empty_large, reuse_buffers
from kandinsky22.kernels.linear import Linear
from kandinsky22.kernels.settings import optimisations

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux has /proc/self/pagemap")
SIDE = 2048  # 16 MiB of weights, well above what else comes and goes


def of_files() -> int:
    """Bytes of files that this process has in memory."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("RssFile")))


@pytest.fixture
def mapped(tmp_path: Path) -> Tensor:
    torch.manual_seed(0)
    save_file({"weight": torch.randn(SIDE, SIDE)}, tmp_path / "weights.safetensors")
    return dict(read_tensors(tmp_path / "weights.safetensors"))["weight"]


def test_forgetting_can_be_switched_off(mapped: Tensor) -> None:
    mapped.sum()
    with optimisations(drop_mapped_pages=False):
        assert not drop_mapped_pages(mapped)


def test_unchanged_pages_go_and_come_back(mapped: Tensor) -> None:
    total, full = mapped.sum(), of_files()
    assert drop_mapped_pages(mapped)
    assert full - of_files() > 0.9 * mapped.nbytes
    assert mapped.sum() == total


def test_what_was_written_stays(mapped: Tensor) -> None:
    mapped.numpy()[SIDE // 2, 7] = 5.0  # torch does not notice this
    mapped.sum()
    assert not drop_mapped_pages(mapped)
    assert mapped[SIDE // 2, 7] == 5.0


def test_other_memory_stays() -> None:
    own = torch.randn(300, 300)
    total = own.sum()
    assert not drop_mapped_pages(own)
    assert own.sum() == total
    assert not drop_mapped_pages(torch.zeros(300, 300))
    assert not drop_mapped_pages(torch.empty(3, 3, device="meta"))


@pytest.mark.skipif(not linear.ONEDNN_DTYPES, reason="this torch has no packed products on this machine")
@torch.no_grad()
def test_a_packed_layer_does_not_hold_its_weight_twice(mapped: Tensor) -> None:
    layer = Linear(SIDE, SIDE, bias=False)
    layer.load_state_dict({"weight": mapped}, assign=True)
    features = torch.randn(200, SIDE)
    Linear(SIDE, SIDE)(features)  # the library's own code comes into memory
    plain, full = torch.nn.functional.linear(features, layer.weight), of_files()
    assert torch.allclose(layer(features), plain, atol=1e-3)
    assert full - of_files() > 0.9 * mapped.nbytes
    assert torch.equal(layer.weight, mapped)


# Memory that is freed

LARGE = host_memory.LARGE_BUFFER // 4  # numbers, in float32


def new_pages() -> int:
    """How many pages the system gives for a large tensor that is filled."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    empty_large(torch.empty(0), LARGE).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_large_tensors_are_like_others() -> None:
    like = torch.zeros(3, dtype=torch.bfloat16)
    for shape in ((2, 3), (2, host_memory.LARGE_BUFFER // 4, 1)):
        made = empty_large(like, *shape)
        assert (made.shape, made.dtype, made.is_contiguous()) == (shape, torch.bfloat16, True)
        made.fill_(2)
        other = made[1:]
        del made
        assert (other == 2).all(), "memory stays as long as anything looks at it"
    assert empty_large(torch.empty(0, device="meta"), LARGE).device.type == "meta"


def test_memory_of_large_tensors_stays_for_the_next_ones_until_the_end() -> None:
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
        assert len(host_memory._free_buffers) == 1, "those that are too small are let go"
        empty_large(torch.empty(0), LARGE)
        assert [len(block) for block in host_memory._free_buffers] == [8 * LARGE]
    assert not host_memory._free_buffers
    assert new_pages() > 0
    with optimisations(buffer_pool=False), reuse_buffers():
        assert new_pages() > 0 < new_pages()


def test_threads_share_what_is_kept() -> None:
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
