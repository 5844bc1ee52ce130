"""Memory of mapped weights is given back without anything being lost."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from kandinsky22.runtime import packed, pages
from kandinsky22.runtime.packed import Linear
from kandinsky22.runtime.pages import forget
from kandinsky22.weights import read_tensors

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


def test_unchanged_pages_go_and_come_back(mapped: Tensor) -> None:
    total, full = mapped.sum(), of_files()
    assert forget(mapped)
    assert full - of_files() > 0.9 * mapped.nbytes
    assert mapped.sum() == total


def test_what_was_written_stays(mapped: Tensor) -> None:
    mapped.numpy()[SIDE // 2, 7] = 5.0  # torch does not notice this
    mapped.sum()
    assert not forget(mapped)
    assert mapped[SIDE // 2, 7] == 5.0


def test_other_memory_stays() -> None:
    own = torch.randn(300, 300)
    total = own.sum()
    assert not forget(own)
    assert own.sum() == total
    assert not forget(torch.zeros(300, 300))
    assert not forget(torch.empty(3, 3, device="meta"))


@pytest.mark.skipif(not packed.DTYPES, reason="this torch has no packed products on this machine")
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

new_pages_are_seen = pytest.mark.skipif(pages._settings() is None, reason="memory is allocated by somebody else")


def new_pages(numbers: int = 2**24) -> int:
    """How many pages the system gives for two tensors one after the other, the second of which is counted."""
    torch.ones(numbers)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(numbers)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@new_pages_are_seen
def test_memory_is_kept_for_the_next_tensor_until_the_end() -> None:
    outside = new_pages()
    with pages.kept():
        assert new_pages() < outside / 10
        with pytest.raises(ZeroDivisionError), pages.kept():
            raise ZeroDivisionError
        assert new_pages() < outside / 10
        filled = in_memory()
    assert filled - in_memory() > 2**25
    assert new_pages() > outside / 2


@new_pages_are_seen
def test_keeping_memory_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "keeping", False)
    outside = new_pages()
    with pages.kept():
        assert new_pages() > outside / 2


@pytest.mark.parametrize("name", ["MALLOC_ARENA_MAX", "GLIBC_TUNABLES"])
def test_settings_of_the_environment_are_left_alone(name: str) -> None:
    code = "from kandinsky22.runtime import pages; print(pages._settings())"
    environment = {**os.environ, name: "1" if name.startswith("MALLOC") else "glibc.malloc.arena_max=1"}
    assert (
        subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True).stdout == "None\n"
    )


def in_memory() -> int:
    """Bytes that this process has in memory."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS")))
