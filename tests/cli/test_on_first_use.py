"""Weights that are read when their network first runs: the same picture and recipe, with less in memory."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest
from tests.cli.helpers import Command
from tests.cli.test_low_memory import EVERY, pictures  # noqa: F401 - a fixture
from torch import nn

from kandinsky22.checkpoints import pinned_files
from kandinsky22.kernels import host_memory
from kandinsky22.pipelines import network_reader
from kandinsky22.runtime.loading_on_first_use import LoadingOnFirstUse


@pytest.fixture
def in_memory(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Class names of the networks in memory, each time that one is read on first use."""
    names: list[list[str]] = []
    original = LoadingOnFirstUse.onload

    def onload(self: LoadingOnFirstUse, *args: Any) -> None:
        before = len(self.onloaded)
        original(self, *args)
        now = [type(network).__name__ for network in self.onloaded]
        if len(now) != before or before == 1:
            names.append(now)

    monkeypatch.setattr(LoadingOnFirstUse, "onload", onload)
    return names


@pytest.mark.usefixtures("pictures")
@pytest.mark.parametrize("name", EVERY)
def test_the_same_picture_and_recipe(
    name: str, command: Command, models: Path, in_memory: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, needed = EVERY[name]
    call = (name, *needed, "--model", models / folder, "--seed", 5)
    assert command(*call, "-o", "at-once.png").code == 0
    assert not in_memory
    monkeypatch.setattr(network_reader, "DEFERRED_BYTES", 0)
    assert command(*call, "-o", "deferred.png").code == 0
    assert all(len(names) == 1 for names in in_memory)  # each leaves before the next one comes
    used = {names[0] for names in in_memory}
    assert {"UNet2DConditionModel", "VQModel"} < used
    assert Path("deferred.png").read_bytes() == Path("at-once.png").read_bytes()  # the recipe is part of the file
    repeated = command(name, "--from", "at-once.png", "-o", "repeated.png")
    assert repeated.code == 0 and "bit-identical" not in repeated.err


@pytest.mark.parametrize("available", [0, 10**12])
def test_several_pictures(
    available: int, command: Command, model: Path, in_memory: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    call = ("generate", "a cat", "--model", model, "--seed", 5, 6)
    assert command(*call, "-o", "plain.png").code == 0
    monkeypatch.setattr(network_reader, "DEFERRED_BYTES", 0)
    monkeypatch.setattr(host_memory, "available_bytes", lambda: available)
    assert command(*call, "-o", "deferred.png").code == 0
    assert max(map(len, in_memory)) == (1 if available == 0 else 5)
    for seed in (5, 6):
        assert Path(f"deferred-seed{seed}.png").read_bytes() == Path(f"plain-seed{seed}.png").read_bytes()


def _run_uncompiled(module: nn.Module, **_: Any) -> None:
    module._compiled_call_impl = module._call_impl


@pytest.mark.parametrize(
    ("dtype", "option"), [("bfloat16", "--compile"), ("float32", "--low-memory")], ids=lambda value: value.strip("-")
)
def test_other_dtypes_and_options(
    dtype: str, option: str, command: Command, model: Path, in_memory: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    call = ("generate", "a cat", "--model", model, "--seed", 5, "--dtype", dtype)
    assert command(*call, "-o", "plain.png").code == 0
    monkeypatch.setattr(network_reader, "DEFERRED_BYTES", 0)
    assert command(*call, "-o", "deferred.png").code == 0
    assert Path("deferred.png").read_bytes() == Path("plain.png").read_bytes()
    in_memory.clear()
    # compiling takes minutes on a slow machine, and is not what this test is about
    monkeypatch.setattr(nn.Module, "compile", _run_uncompiled)
    assert command(*call, option, "-o", "other.png").code == 0  # the option reads everything itself
    assert not in_memory


def test_a_file_that_changes_in_between_is_an_error(
    command: Command, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network_reader, "DEFERRED_BYTES", 0)
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    content = weights.read_bytes()
    original = network_reader.NetworkReader.deferred

    def deferred(self: network_reader.NetworkReader) -> Any:
        network = original(self)
        if type(network).__name__ == "UNet2DConditionModel":
            weights.unlink()
            weights.write_bytes(content[:1000])
        return network

    monkeypatch.setattr(network_reader.NetworkReader, "deferred", deferred)
    try:
        result = command("generate", "a cat", "--model", model, "--seed", 5, "-o", "a.png")
    finally:
        weights.unlink()
        weights.write_bytes(content)
    assert result.code == 0  # the file that was opened is read, whatever happens to its name


def test_files_are_read_ahead_while_the_first_network_runs(
    command: Command, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network_reader, "DEFERRED_BYTES", 0)
    monkeypatch.setattr(pinned_files, "COPIED_BYTES", 0)
    asked: list[tuple[str, int]] = []
    monkeypatch.setattr(
        os, "posix_fadvise", lambda fd, position, size, _: asked.append((os.readlink(f"/proc/self/fd/{fd}"), position))
    )
    assert command("generate", "a cat", "--model", model, "--seed", 5, "-o", "a.png").code == 0
    _join_read_ahead()
    weights = [f"{name}/diffusion_pytorch_model.safetensors" for name in ("unet", "movq")]
    for name in weights:
        path = model / name
        positions = [position for other, position in asked if other == str(path)]
        assert positions == list(range(0, path.stat().st_size, pinned_files.READ_AHEAD))
    assert not any("text_encoder" in other for other, _ in asked)  # it has been read by then


def test_little_memory_reads_nothing_ahead(command: Command, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network_reader, "DEFERRED_BYTES", 0)
    monkeypatch.setattr(host_memory, "available_bytes", lambda: 2**20)
    asked: list[Any] = []
    monkeypatch.setattr(pinned_files.PinnedFiles, "read_ahead", lambda self, paths: asked.append(paths))
    assert command("generate", "a cat", "--model", model, "--seed", 5, "-o", "a.png").code == 0
    _join_read_ahead()
    assert not asked
    monkeypatch.setattr(host_memory, "available_bytes", lambda: 2**40)
    assert command("generate", "a cat", "--model", model, "--seed", 5, "-o", "b.png").code == 0
    _join_read_ahead()
    assert asked


def _join_read_ahead() -> None:
    for thread in threading.enumerate():
        if thread.name == "kandinsky22-read-ahead":
            thread.join()
