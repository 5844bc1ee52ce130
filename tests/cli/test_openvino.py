"""`--engine openvino`: its effect, its entries in recipes, and refused combinations."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests.cli.helpers import Command

from kandinsky22.batch.row_settings import parse_settings
from kandinsky22.engines import openvino as engine
from kandinsky22.errors import InputError
from kandinsky22.generation.engine_names import OPENVINO_DEVICES
from kandinsky22.generation.recipe import read_recipe

pytest.importorskip("openvino")


@pytest.fixture(autouse=True)
def _stored_graphs(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KANDINSKY22_CACHE", str(tmp_path_factory.getbasetemp() / "openvino-graphs"))


def pixels(path: str) -> Any:
    return np.asarray(Image.open(path)).astype(int)


def test_names_are_those_of_the_devices() -> None:
    assert set(OPENVINO_DEVICES.values()) == set(engine.DEVICES)


def test_the_engine_acts_and_is_recorded(command: Command, model: Path) -> None:
    call = ("generate", "a cat", "--model", model, "--seed", 5)
    assert command(*call, "-o", "torch.png").code == 0
    assert command(*call, "--engine", "openvino", "-o", "engine.png").code == 0
    assert np.abs(pixels("engine.png") - pixels("torch.png")).max() <= 1
    recipe = read_recipe(Path("engine.png"))
    assert recipe.engine == "openvino"
    assert recipe.versions["openvino"] == importlib.metadata.version("openvino")
    assert "nncf" not in recipe.versions
    assert recipe.model_digest == read_recipe(Path("torch.png")).model_digest
    assert ["engine", "openvino"] in [line.split() for line in command("info", "engine.png").out.splitlines()]
    again = command("generate", "--from", "engine.png", "-o", "again.png")
    assert (again.code, "may not be bit-identical" in again.err) == (0, False)
    assert Path("again.png").read_bytes() == Path("engine.png").read_bytes()
    assert command("generate", "--from", "engine.png", "--engine", "torch", "-o", "back.png").code == 0
    assert Path("back.png").read_bytes() == Path("torch.png").read_bytes()
    assert read_recipe(Path("back.png")).engine is None


@pytest.mark.slow
def test_int8_of_the_engine(command: Command, model: Path) -> None:
    pytest.importorskip("nncf")
    call = ("generate", "a cat", "--model", model, "--seed", 5, "--engine", "openvino")
    assert command(*call, "-o", "whole.png").code == 0
    result = command(*call, "--quantize", "int8", "-o", "small.png")
    assert (result.code, result.paths) == (0, [Path("small.png")]), "nothing of NNCF is on standard output"
    assert 0 < np.abs(pixels("small.png") - pixels("whole.png")).mean() < 40
    recipe = read_recipe(Path("small.png"))
    assert (recipe.engine, recipe.quantize) == ("openvino", "int8")
    assert recipe.versions["nncf"] == importlib.metadata.version("nncf")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--quantize", "int8-dynamic"), "--quantize='int8-dynamic' is invalid: expected int8 with --engine openvino"),
        (("--cache-every", 2), "--cache-every=2 is invalid: expected 1 with --engine openvino"),
        (("--low-memory",), "--engine='openvino' is invalid: expected torch with --low-memory"),
        (("--compile",), "--engine='openvino' is invalid: expected torch with --compile"),
    ],
    ids=lambda value: str(value[0]) if isinstance(value, tuple) else "",
)
def test_what_has_no_effect_is_refused(options: tuple[Any, ...], words: str, command: Command, model: Path) -> None:
    result = command("generate", "a cat", "--model", model, "--engine", "openvino", *options)
    assert result.code == 1
    assert words in result.err.splitlines()[-1]
    assert not Path("picture.png").exists()


def test_a_missing_package_is_one_line(command: Command, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.importlib.util, "find_spec", lambda *_: None)
    result = command("generate", "a cat", "--model", model, "--engine", "openvino")
    assert result.code == 1
    assert "pip install 'kandinsky22[openvino]'" in result.err.splitlines()[-1]
    assert "Traceback" not in result.err


def test_servers_and_rows(command: Command) -> None:
    result = command("generate", "a cat", "--engine", "openvino", "--server", "http://127.0.0.1:1")
    assert "--engine would have no effect" in result.err
    assert parse_settings({"engine": "openvino"}).engine == "openvino"
    with pytest.raises(InputError, match="engine='other' is invalid: expected one of torch, openvino"):
        parse_settings({"engine": "other"})
