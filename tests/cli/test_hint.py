"""`kandinsky22 hint`: hints from photographs as files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from tests.cli.helpers import Command, assert_one_line
from tests.pipelines.pictures import photo

from kandinsky22 import make_edge_hint
from kandinsky22.cli import hint
from kandinsky22.inputs import hints


@pytest.fixture(autouse=True)
def _photo(command: Command) -> None:
    photo(1, 64, 48).save("photo.png")


def test_edges(command: Command) -> None:
    first = command("hint", "edges", "photo.png", "--low", 20, "--high", 60, "--sigma", 0.5)
    assert [str(path) for path in first.paths] == ["hint.png"], first.err
    with PIL.Image.open("hint.png") as saved, PIL.Image.open("photo.png") as image:
        expected = make_edge_hint(image, low=20, high=60, sigma=0.5)
        np.testing.assert_array_equal(np.asarray(saved), np.asarray(expected))
    assert command("hint", "edges", "photo.png").paths == [Path("hint-2.png")]
    assert command("hint", "edges", "photo.png", "--force").paths == [Path("hint.png")]


def test_the_hint_composes_a_picture(command: Command, models: Path) -> None:
    command("hint", "edges", "photo.png", "-o", "edges.png")
    result = command("control", "a cat", "--hint", "edges.png", "--model", models / "control/decoder", "--steps", 1)
    assert result.code == 0, result.err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("edges", "missing.png"), 1, ("missing.png",)),
        (("edges", "photo.png", "--low", "300"), 1, ("low=300", "200")),
        (("edges", "photo.png", "--low", "-1"), 2, ("--low", "0 to 1443")),
        (("edges", "photo.png", "-o", "hint.gif"), 1, ("hint.gif", ".png")),
        (("edges", "photo.png", "-o", "photo.png", "--force"), 1, ("photo.png", "input")),
        (("depth", "photo.png"), 1, ("--depth-model",)),
        (("depth", "missing.png"), 1, ("--depth-model",)),
        (("depth", "photo.png", "--depth-model", "no/such/folder"), 1, ("no/such/folder", "depth")),
        ((), 2, ("KIND",)),
    ],
)
def test_errors(command: Command, arguments: tuple[object, ...], code: int, words: tuple[str, ...]) -> None:
    assert_one_line(command("hint", *arguments), code, *words)


def test_defaults_are_those_of_the_function() -> None:
    for name in ("DEFAULT_LOW", "DEFAULT_HIGH", "DEFAULT_SIGMA"):
        assert getattr(hint, name) == getattr(hints, name)
