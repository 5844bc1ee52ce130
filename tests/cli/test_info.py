"""`kandinsky22 info`: the recipe of a picture as text and as JSON."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.helpers import SIZE, Command


def test_info_prints_the_recipe(command: Command, model: Path) -> None:
    command("generate", "a cat", "--negative-prompt", "a dog", "--model", model, "--seed", 5, "--size", "40x36")
    result = command("info", "picture.png")
    lines = dict(line.split("  ", 1) for line in result.out.splitlines())
    values = {name: value.strip() for name, value in lines.items()}
    assert result.code == 0
    assert values["prompt"] == "a cat"
    assert values["negative prompt"] == "a dog"
    assert values["seed"] == "5"
    assert values["size"] == "40x36"
    assert values["steps"] == "2, prior 3"
    assert values["guidance"] == "2, prior 1.5"
    assert values["model"] == str(model)
    assert "torch" in values["versions"]


def test_info_prints_json_that_is_the_stored_recipe(command: Command, model: Path) -> None:
    command("generate", "a cat", "--model", model, "--seed", 5)
    recipe = json.loads(command("info", "picture.png", "--json").out)
    assert recipe["seeds"] == [5]
    assert (recipe["width"], recipe["height"], recipe["format"]) == (SIZE, SIZE, 1)
