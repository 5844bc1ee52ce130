"""`--low-memory`: the same picture with one network in memory at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.cli.helpers import SIZE, SUBCOMMANDS, Command

from kandinsky22.runtime import device_offload, disk_offload

EVERY = {"generate": ("combined", ("a cat",)), **SUBCOMMANDS}


@pytest.fixture
def network_counts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of networks in memory, each time that one is onloaded."""
    counts: list[int] = []
    original = device_offload.ModelOffload.onload

    def onload(self: device_offload.ModelOffload, *args: Any) -> None:
        original(self, *args)
        counts.append(len(self.onloaded))

    monkeypatch.setattr(device_offload.ModelOffload, "onload", onload)
    return counts


@pytest.fixture
def pictures(tmp_path: Path) -> None:
    values = np.random.default_rng(3).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    for name in ("photo", "hint", "mask"):
        Image.fromarray(values).save(tmp_path / f"{name}.png")


@pytest.mark.parametrize("name", EVERY)
def test_the_same_picture(name: str, command: Command, models: Path, network_counts: list[int], pictures: None) -> None:
    folder, needed = EVERY[name]
    call = (name, *needed, "--model", models / folder, "--seed", 5)
    assert command(*call, "-o", "plain.png").code == 0
    assert not network_counts
    assert command(*call, "-o", "low.png", "--low-memory").code == 0
    assert set(network_counts) == {1}
    assert Path("low.png").read_bytes() == Path("plain.png").read_bytes()
    network_counts.clear()
    assert command(name, "--from", "low.png").paths == [Path("low-again.png")]  # the option is not part of the recipe
    assert not network_counts


@pytest.mark.parametrize("more", [("--quantize", "int8"), ("--cache-every", 2)], ids=str)
@pytest.mark.parametrize("name", EVERY)
def test_the_same_picture_with_other_options(
    name: str, more: tuple[Any, ...], command: Command, models: Path, pictures: None
) -> None:
    folder, needed = EVERY[name]
    call = (name, *needed, "--model", models / folder, "--seed", 5, *more)
    assert command(*call, "-o", "plain.png").code == 0
    assert command(*call, "-o", "low.png", "--low-memory").code == 0
    assert Path("low.png").read_bytes() == Path("plain.png").read_bytes()


def test_weights_are_read_from_the_models_own_files(
    command: Command, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_offload, "write_weight_files", lambda *_, **__: pytest.fail("a file was written"))
    for dtype in ("float32", "bfloat16"):
        assert command("generate", "a cat", "--model", model, "--low-memory", "--dtype", dtype, "-n", 2).code == 0


@pytest.mark.gpu
def test_on_a_gpu(command: Command, model: Path) -> None:
    peaks = []
    for more in ((), ("--low-memory",)):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        assert command("generate", "a cat", "--model", model, "--seed", 5, "--device", "cuda", *more).code == 0
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] < peaks[0]
