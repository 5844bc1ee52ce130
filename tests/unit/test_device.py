"""Names of dtypes, and the meaning of "auto" per device."""

from __future__ import annotations

import pytest
import torch

from kandinsky22.errors import InputError
from kandinsky22.runtime import device
from kandinsky22.runtime.device import computes_bfloat16, resolve_dtype

CPU, CUDA, MPS = torch.device("cpu"), torch.device("cuda"), torch.device("mps")


def test_default_precision_is_float32_on_cpus_and_float16_on_cuda() -> None:
    assert [resolve_dtype(None, target) for target in (CPU, MPS, CUDA)] == [torch.float32, torch.float32, torch.float16]


@pytest.mark.parametrize("native", [True, False])
def test_auto_is_the_fastest_type_that_the_device_has(monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    monkeypatch.setattr(device, "computes_bfloat16", lambda: native)
    assert resolve_dtype("auto", CPU) == (torch.bfloat16 if native else torch.float32)
    assert resolve_dtype("auto", CUDA) == resolve_dtype("auto", MPS) == torch.float16


@pytest.mark.parametrize(
    ("flags", "native"),
    [({"avx512_bf16"}, True), ({"amx_tile"}, True), ({"avx512", "avx2"}, False), (set[str](), False)],
)
def test_bfloat16_support_is_read_from_x86_flags(
    monkeypatch: pytest.MonkeyPatch, flags: set[str], native: bool
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    for name in ("avx512_bf16", "amx_tile"):
        monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda name=name: name in flags, raising=False)
    assert computes_bfloat16() is native


def test_bfloat16_support_is_false_on_releases_of_torch_without_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "AMD64")
    for name in ("avx512_bf16", "amx_tile"):
        monkeypatch.delattr(torch.cpu, f"_is_{name}_supported", raising=False)
    assert computes_bfloat16() is False


def test_other_names_are_refused() -> None:
    with pytest.raises(InputError, match=r"dtype='float7'.*auto, float32"):
        resolve_dtype("float7", CPU)
