"""`--tiny-decoder`: on the command line, in recipes, in batches and of the server."""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.cli.helpers import SUBCOMMANDS, Command, assert_one_line, pixels, stored

from kandinsky22 import KandinskyV22Pipeline, TinyDecoder
from kandinsky22.cli.serve import add_parser, server_settings
from kandinsky22.errors import InputError
from kandinsky22.generation.previews import DecodedPreviews
from kandinsky22.models.tiny_decoder import TinyDecoderConfig
from kandinsky22.serve.messages import WorkerOptions
from kandinsky22.serve.schemas import JobRequest
from kandinsky22.serve.settings import ServerSettings
from kandinsky22.serve.worker import Worker


def save_tiny_decoder(model: Path, folder: Path, seed: int = 1) -> Path:
    """Save a random tiny decoder for a model to a folder, and return the folder."""
    torch.manual_seed(seed)
    movq = KandinskyV22Pipeline.from_pretrained(model, unet=None).movq
    TinyDecoder(**TinyDecoderConfig.for_movq(movq, (8, 8))).save_pretrained(folder)
    return folder


@pytest.fixture
def tiny(model: Path, tmp_path: Path) -> Path:
    return save_tiny_decoder(model, tmp_path / "tiny")


def draw(command: Command, model: Path, name: str, *options: object) -> Path:
    result = command("generate", "a cat", "--model", model, "--seed", 5, "-o", name, *options)
    assert result.code == 0, result.err
    return Path(name)


def test_folder_and_file_give_the_same_image_and_are_recorded(command: Command, model: Path, tiny: Path) -> None:
    plain = pixels(draw(command, model, "plain.png"))
    image = draw(command, model, "image.png", "--tiny-decoder", tiny)
    assert not np.array_equal(pixels(image), plain)
    weights = tiny / "diffusion_pytorch_model.safetensors"
    assert np.array_equal(pixels(draw(command, model, "file.png", "--tiny-decoder", weights)), pixels(image))
    low = draw(command, model, "low.png", "--tiny-decoder", tiny, "--low-memory")
    assert np.abs(pixels(low).astype(int) - pixels(image)).max() <= 1
    recipe = stored(image)
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert recipe["tiny_decoder"] == {"name": str(tiny), "sha256": digest}
    assert recipe["model_digest"] == stored(Path("plain.png"))["model_digest"]
    assert f"{tiny} ({digest[:12]})" in command("info", image).out


def test_a_recipe_finds_its_tiny_decoder_and_notices_changes(command: Command, model: Path, tiny: Path) -> None:
    first = draw(command, model, "first.png", "--tiny-decoder", tiny.name)
    assert command("generate", "--from", first).code == 0
    assert Path("first-again.png").read_bytes() == first.read_bytes()
    Path("elsewhere").mkdir()
    first.rename("elsewhere/first.png")
    tiny.rename("elsewhere/tiny")
    first = Path("elsewhere/first.png")
    assert command("generate", "--from", first, "-o", "moved.png").code == 0
    assert np.array_equal(pixels(Path("moved.png")), pixels(first))
    save_tiny_decoder(model, Path("elsewhere/tiny"), seed=2)
    result = command("generate", "--from", first, "-o", "changed.png")
    assert result.code == 0 and "the tiny decoder elsewhere/tiny has changed" in result.err
    assert command("generate", "--from", first, "--tiny-decoder", "none", "-o", "without.png").code == 0
    assert "tiny_decoder" not in stored(Path("without.png"))
    Path("elsewhere/tiny").rename("gone")
    result = command("generate", "--from", first, "-o", "missing.png")
    assert_one_line(result, 1, "was generated with the tiny decoder tiny, which is missing")


@pytest.mark.parametrize("name", ["inpaint", "control", "mix"])
def test_every_subcommand_takes_it(command: Command, models: Path, model: Path, tiny: Path, name: str) -> None:
    checkpoint, arguments = SUBCOMMANDS[name]
    for picture in ("photo.png", "hint.png", "mask.png"):
        draw(command, model, picture)
    options = ("--model", models / checkpoint, "--seed", 5)
    assert command(name, *arguments, *options, "-o", "plain.png").code == 0
    result = command(name, *arguments, *options, "--tiny-decoder", tiny, "-o", "changed.png")
    assert result.code == 0, result.err
    assert not np.array_equal(pixels(Path("plain.png")), pixels(Path("changed.png")))


def test_wrong_ones_are_one_line(command: Command, model: Path, tiny: Path, embedded: None) -> None:
    base = ("generate", "a cat", "--model", model, "--tiny-decoder")
    assert_one_line(command(*base, "missing.safetensors"), 1, "no tiny decoder 'missing.safetensors'")
    assert_one_line(command(*base, model), 1, "has no tiny decoder", "kandinsky22 train tiny-decoder")
    assert_one_line(command(*base, "embedded"), 1, "embedded has no tiny decoder")
    assert_one_line(command(*base, model / "movq"), 1, "config of a VQModel")
    assert_one_line(command(*base, " "), 2, "--tiny-decoder")
    weights = tiny / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-20])
    assert_one_line(command(*base, tiny), 1, "diffusion_pytorch_model.safetensors")


@pytest.mark.slow
def test_rows_of_batches_have_their_own(command: Command, model: Path, tiny: Path) -> None:
    rows = [{"prompt": "a cat", "seed": 5}, {"prompt": "a cat", "seed": 5, "tiny_decoder": "tiny"}]
    Path("rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    result = command("batch", "rows.jsonl", "-o", "out", "--model", model)
    assert result.code == 0, result.err
    first, second = (pixels(path) for path in sorted(Path("out").rglob("*.png")))
    assert np.array_equal(first, pixels(draw(command, model, "plain.png")))
    assert np.array_equal(second, pixels(draw(command, model, "image.png", "--tiny-decoder", tiny)))


def parsed(*arguments: str) -> ServerSettings:
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    settings: ServerSettings = server_settings(parser.parse_args(["serve", *arguments]))
    return settings


def test_a_server_uses_it_for_the_models_that_are_named(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny.parent)
    path = str(tiny)
    assert [model.tiny_decoder for model in parsed("--tiny-decoder", "tiny").models] == [path] * 3
    own = parsed("--tiny-decoder", "tiny", "--model", "a=folder", "embedded").models
    assert {model.id: model.tiny_decoder for model in own} == {
        **{"a": path, "embedded": None},
        **{"embedded-inpaint": None, "embedded-control": None},
    }
    assert [model.tiny_decoder for model in parsed().models] == [None] * 3
    with pytest.raises(InputError, match="--tiny-decoder='no/such/file' is invalid"):
        parsed("--tiny-decoder", "no/such/file")


def test_a_worker_draws_and_previews_with_it(model: Path, tiny: Path, tmp_path: Path, embedded: None) -> None:
    settings = ServerSettings(models=parsed("--tiny-decoder", str(tiny)).models)
    connection, _ = multiprocessing.Pipe()
    worker = Worker(connection, WorkerOptions(settings, "cpu", str(tmp_path / "state")))
    request = worker._request(JobRequest(prompt="a cat"), settings.models[0], {})
    loaded = worker._loaded("generate", request)
    network = loaded.session.decoder.tiny_decoder
    weights = load_file(tiny / "diffusion_pytorch_model.safetensors")
    assert torch.equal(network.conv_in.weight, weights["conv_in.weight"])
    assert isinstance(worker._previews(loaded), DecodedPreviews)
