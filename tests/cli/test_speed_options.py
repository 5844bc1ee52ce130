"""`--quantize`, `--cache-every` and `--compile`: their effects, their entries in recipes, and refused values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests.cli.helpers import Command

from kandinsky22 import KandinskyV22CombinedPipeline, KandinskyV22Pipeline
from kandinsky22.cli import options
from kandinsky22.generation import stages
from kandinsky22.generation.recipe import read_recipe
from kandinsky22.runtime.quantize import KINDS, kind_of


def pixels(path: str) -> Any:
    return np.asarray(Image.open(path)).astype(int)


def test_quantization_kinds_equal_the_librarys() -> None:
    assert set(options.QUANTIZATION_KINDS) == set(KINDS)


@pytest.mark.parametrize("kind", ["int8", "int8-dynamic"])
def test_quantize_acts_and_is_recorded(
    kind: str, command: Command, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = ("generate", "a cat", "--model", model, "--seed", 5)
    assert command(*call, "-o", "plain.png").code == 0
    kinds: list[Any] = []
    original = stages.generate_image

    def recorded(networks: Any, *option: Any) -> Any:
        kinds.append((kind_of(networks.prior.prior), kind_of(networks.decoder.unet), kind_of(networks.decoder.movq)))
        return original(networks, *option)

    monkeypatch.setattr(stages, "generate_image", recorded)
    assert command(*call, "-o", "small.png", "--quantize", kind).code == 0
    assert kinds == [(kind, kind, None)]
    assert 0 < np.abs(pixels("small.png") - pixels("plain.png")).mean() < 40
    assert read_recipe(Path("small.png")).quantize == kind
    assert read_recipe(Path("plain.png")).quantize is None
    assert command("generate", "--from", "small.png", "-o", "again.png").code == 0
    assert Path("again.png").read_bytes() == Path("small.png").read_bytes()
    lines = [line.split() for line in command("info", "small.png").out.splitlines()]
    assert ["quantized", kind] in lines
    assert command("generate", "--from", "small.png", "-o", "whole.png", "--quantize", "none").code == 0
    assert Path("whole.png").read_bytes() == Path("plain.png").read_bytes()
    assert read_recipe(Path("small.png")).model_digest == read_recipe(Path("plain.png")).model_digest


def test_int4_needs_bfloat16(command: Command, model: Path) -> None:
    result = command("generate", "a cat", "--model", model, "--quantize", "int4")
    assert result.code == 1
    expected = "--quantize='int4' is invalid: expected bfloat16 on a CPU for 4-bit weights, not float32 on cpu"
    assert expected in result.err.splitlines()[-1]
    assert not Path("picture.png").exists()


def test_cache_every_acts_and_is_recorded(command: Command, model: Path) -> None:
    call = ("generate", "a cat", "--model", model, "--seed", 5, "--steps", 6)
    assert command(*call, "-o", "plain.png").code == 0
    assert command(*call, "-o", "every.png", "--cache-every", 1).code == 0
    assert command(*call, "-o", "cached.png", "--cache-every", 3).code == 0
    assert Path("every.png").read_bytes() == Path("plain.png").read_bytes(), "nothing that changes nothing in recipes"
    assert (pixels("cached.png") != pixels("plain.png")).any()
    assert read_recipe(Path("cached.png")).cache_every == 3
    assert "all of the UNet every 3 steps" in command("info", "cached.png").out
    assert command("generate", "--from", "cached.png", "-o", "again.png").code == 0
    assert Path("again.png").read_bytes() == Path("cached.png").read_bytes()


def test_quantize_and_cache_every_apply_to_grids(
    command: Command, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(KandinskyV22CombinedPipeline, "quantize", lambda _, kind: calls.append(kind))
    monkeypatch.setattr(KandinskyV22Pipeline, "enable_feature_caching", lambda _, every: calls.append(every))
    grid = ("compare", "a cat", "--model", model, "--scheduler", "ddim", "--steps", "2", "--quantize", "int8")
    assert command(*grid, "--cache-every", 2).code == 0
    assert calls == ["int8", 2]
    described = Image.open("compare.png").info["Description"]
    assert "quantized: int8" in described
    assert "cached: all of the UNet every 2 steps" in described


def test_compile_is_not_part_of_the_recipe(command: Command, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []
    monkeypatch.setattr(KandinskyV22CombinedPipeline, "compile", lambda self: compiled.append(self))
    call = ("generate", "a cat", "--model", model, "--seed", 5)
    assert command(*call).code == 0
    assert not compiled
    assert command(*call, "--compile", "-o", "compiled.png").code == 0
    assert len(compiled) == 1
    assert Path("compiled.png").read_bytes() == Path("picture.png").read_bytes(), "the option is not part of the recipe"


@pytest.mark.parametrize("option", [("--quantize", "int3"), ("--cache-every", "0"), ("--cache-every", "x")], ids=str)
def test_other_values_are_refused(option: tuple[str, str], command: Command, model: Path) -> None:
    result = command("generate", "a cat", "--model", model, *option)
    assert result.code == 2
    assert option[0] in result.err
    assert option[1] in result.err
