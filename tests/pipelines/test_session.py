"""Networks that stay in memory: the same pictures as the command, whatever ran before."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kandinsky22.cli.command_inputs import CommandInputs
from kandinsky22.cli.main import build_parser, main
from kandinsky22.cli.request import read_request
from kandinsky22.errors import InputError
from kandinsky22.generation.modes import MODES
from kandinsky22.generation.request import Request
from kandinsky22.generation.session import Session, session_key

COMMANDS = {
    "generate": ["generate", "a red circle", "--steps", "2", "--prior-steps", "2"],
    "sampler": ["generate", "a red circle", "--quality", "draft", "--negative-prompt", "blue"],
    "img2img": ["img2img", "a red star", "--image", "photo.png", "--strength", "0.5", "--steps", "4"],
    "mix": ["mix", "--text", "a red star", "0.5", "--image", "photo.png", "0.5", "--steps", "2"],
    "variations": ["variations", "photo.png", "--prompt", "a star", "--steps", "2"],
}


def _request(arguments: list[str]) -> tuple[argparse.Namespace, Request, CommandInputs]:
    args = build_parser().parse_args([*arguments, "--seed", "5"])
    inputs = CommandInputs(None)
    return args, read_request(args, None, inputs), inputs


@pytest.fixture
def photo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Image.linear_gradient("L").convert("RGB").resize((96, 96)).save("photo.png")
    return tmp_path


def test_each_request_gives_the_picture_of_the_command(photo: Path) -> None:
    """One session serves all modes of the decoder; schedulers and settings of a request do not reach the next one."""
    session = None
    for _ in range(2):
        for name, arguments in COMMANDS.items():
            _, request, inputs = _request(arguments)
            mode = MODES[arguments[0]]
            session = session or Session(mode, request)
            assert session.serves(mode, request)
            result = session.prepare(mode, request, inputs.images).generate(5)
            assert main([*arguments, "--seed", "5", "-q", "--force", "-o", f"{name}.png"]) == 0
            with Image.open(f"{name}.png") as expected:
                np.testing.assert_array_equal(np.asarray(result.image), np.asarray(expected))
                assert result.recipe.to_json() == expected.info["kandinsky22"]


def test_other_weights_need_another_session() -> None:
    _, request, _ = _request(COMMANDS["generate"])
    key = session_key(MODES["generate"], request)
    assert session_key(MODES["mix"], request) == key
    assert session_key(MODES["inpaint"], request) != key
    for change in ({"dtype": "bfloat16"}, {"quantize": "int8"}, {"model_location": "other"}, {"cache_every": 2}):
        assert session_key(MODES["generate"], dataclasses.replace(request, **change)) != key


def test_images_of_other_aspect_ratios_are_refused_before_networks_run(photo: Path) -> None:
    Image.new("L", (200, 64), 255).save("mask.png")
    _, request, inputs = _request(["inpaint", "a star", "--image", "photo.png", "--mask", "mask.png"])
    with pytest.raises(InputError, match="aspect ratio"):
        Session(MODES["inpaint"], request).prepare(MODES["inpaint"], request, inputs.images)
