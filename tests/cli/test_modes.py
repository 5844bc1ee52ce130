"""`kandinsky22 img2img`, `inpaint`, `control`, `mix`, `variations`: pictures equal the library's and repeat."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.cli.helpers import SIZE, SUBCOMMANDS, Command, pixels, save_png, stored

import kandinsky22
from kandinsky22.generation.sizes import fitting_size

DECODER = {"num_inference_steps": 2, "guidance_scale": 2.0}
PRIOR = {"num_inference_steps": 3, "guidance_scale": 1.5}


@pytest.fixture(autouse=True)
def files(tmp_path: Path) -> None:
    """A photo, a mask whose left half is repainted, and a hint."""
    rng = np.random.default_rng(3)
    for name in ("photo", "hint"):
        Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)).save(tmp_path / f"{name}.png")
    mask = np.zeros((SIZE, SIZE), np.uint8)
    mask[:, : SIZE // 2] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")


@pytest.fixture
def draw(command: Command, models: Path) -> Callable[..., Any]:
    """Run a subcommand with its required and more arguments."""

    def run(name: str, *more: object) -> Any:
        folder, needed = SUBCOMMANDS[name]
        return command(name, *needed, "--model", models / folder, *more)

    return run


def from_library(name: str, models: Path, photo: Image.Image) -> Image.Image:
    """Return the library's picture for the required arguments of a subcommand and seed 5."""
    generator = torch.Generator().manual_seed(5)
    folder = models / SUBCOMMANDS[name][0]
    both = {**DECODER, **{f"prior_{key}": value for key, value in PRIOR.items()}, "generator": generator}
    if name == "img2img":
        pipe: Any = kandinsky22.AutoPipelineForImage2Image.from_pretrained(folder)
        return pipe("a cat", image=photo, strength=0.6, **both).images[0]
    if name == "inpaint":
        pipe = kandinsky22.AutoPipelineForInpainting.from_pretrained(folder)
        return pipe("a cat", image=photo, mask_image=Image.open("mask.png"), **both).images[0]
    prior = kandinsky22.KandinskyV22PriorPipeline.from_pretrained(models / "b" / "prior")
    if name == "control":
        decoder: Any = kandinsky22.KandinskyV22ControlnetPipeline.from_pretrained(folder)
        embeds = prior("a cat", generator=generator, **PRIOR)
        return decoder(*embeds.to_tuple(), hint=Image.open("hint.png"), generator=generator, **DECODER).images[0]
    decoder = kandinsky22.KandinskyV22Pipeline.from_pretrained(models / "a" / "decoder")
    mixed: tuple[list[Any], list[float]] = (["a cat", photo], [0.6, 0.4]) if name == "mix" else ([photo], [1.0])
    embeds = prior.interpolate(*mixed, generator=generator, **PRIOR)
    return decoder(*embeds.to_tuple(), generator=generator, **DECODER).images[0]


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_each_draws_what_the_library_draws(draw: Callable[..., Any], models: Path, name: str) -> None:
    result = draw(name, "--seed", 5)
    assert (result.code, result.out) == (0, "picture.png\n"), result.err
    assert np.array_equal(pixels(Path("picture.png")), from_library(name, models, Image.open("photo.png")))
    recipe = stored(Path("picture.png"))
    assert (recipe["command"], recipe["seeds"], recipe["steps"], recipe["prior_steps"]) == (name, [5], 2, 3)


@pytest.mark.parametrize(
    ("name", "arguments", "entries"),
    [
        ("img2img", ("--strength", "1"), {"strength": 1.0}),
        ("img2img", ("--image", "hint.png"), {}),
        ("img2img", ("--negative-prompt", "a dog"), {"negative_prompt": "a dog"}),
        ("inpaint", ("--keep-pixels",), {"keep_pixels": True}),
        ("inpaint", ("--mask", "hint.png"), {}),
        ("control", ("--image", "photo.png"), {"strength": 0.3}),
        ("control", ("--image", "photo.png", "--strength", "0.7"), {"strength": 0.7}),
        ("control", ("--size", "40x36", "--scheduler", "ddim"), {"width": 40, "scheduler": "DDIMScheduler"}),
        ("mix", ("--text", "a dog", "-0.5"), {}),
        ("mix", ("--negative-prompt", "a dog"), {"negative_prompt": "a dog"}),
        ("variations", ("--negative-prompt", "a dog"), {"negative_prompt": "a dog"}),
        ("variations", ("--prompt", "a dog", "--strength", "0.8"), {"prompt": "a dog", "strength": 0.8}),
        ("variations", ("--prompt", "a dog", "--prior-steps", "8"), {"prompt": "a dog", "strength": 0.3}),
    ],
)
def test_options_act_and_are_recorded_and_repeated(
    draw: Callable[..., Any], command: Command, name: str, arguments: tuple[str, ...], entries: dict[str, Any]
) -> None:
    draw(name, "--seed", 5, "-o", "plain.png")
    assert draw(name, "--seed", 5, "-o", "other.png", *arguments).code == 0
    recipe = stored(Path("other.png"))
    assert {entry: recipe[entry] for entry in entries} == entries
    assert not np.array_equal(pixels(Path("plain.png")), pixels(Path("other.png")))
    result = command(name, "--from", "other.png")
    assert result.paths == [Path("other-again.png")]
    assert "warning: the result may not be bit-identical" not in result.err
    assert Path("other-again.png").read_bytes() == Path("other.png").read_bytes()


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_files_are_recorded_by_name_and_digest(draw: Callable[..., Any], command: Command, name: str) -> None:
    draw(name)
    recipe = stored(Path("picture.png"))
    recorded = [entry for entry in recipe.values() if isinstance(entry, dict) and "sha256" in entry]
    recorded += [part["image"] for part in recipe.get("parts", ()) if part["image"] is not None]
    used = {"img2img": ["photo"], "inpaint": ["photo", "mask"], "control": ["hint"]}.get(name, ["photo"])
    assert recorded == [
        {"name": f"{file}.png", "sha256": hashlib.sha256(Path(f"{file}.png").read_bytes()).hexdigest()} for file in used
    ]
    printed = command("info", "picture.png").out
    assert all(entry["name"] in printed and entry["sha256"] in printed for entry in recorded)


def test_a_mixture_is_described_by_its_parts(draw: Callable[..., Any], command: Command) -> None:
    draw("mix")
    printed = [line.split(maxsplit=2) for line in command("info", "picture.png").out.splitlines()]
    assert ["mixed", "in", "0.6 of a cat"] in printed
    assert any(words[2].startswith("0.4 of photo.png, sha256") for words in printed if words[:2] == ["mixed", "in"])
    with Image.open("picture.png") as picture:
        assert picture.info["parameters"].startswith("a cat + photo.png\n")


def test_a_mixture_without_weights_has_equal_shares(command: Command, model: Path) -> None:
    arguments = ("--model", model, "--seed", 5, "--text", "a cat")
    command("mix", *arguments, "--text", "a dog", "-o", "equal.png")
    command("mix", *arguments, "0.5", "--text", "a dog", "0.5", "-o", "half.png")
    assert Path("equal.png").read_bytes() == Path("half.png").read_bytes()


@pytest.mark.parametrize(("weights", "warned"), [((0.6, 0.4), False), ((1, 1), True), ((1.5, -0.5), False)])
def test_unusual_weights_are_reported(
    command: Command, model: Path, weights: tuple[float, float], warned: bool
) -> None:
    result = command("mix", "--model", model, "--text", "a cat", weights[0], "--image", "photo.png", weights[1])
    assert (result.code, "weights sum to 2" in result.err) == (0, warned)


def test_exact_compositing_keeps_every_pixel_and_the_other_way_is_close_by(draw: Callable[..., Any]) -> None:
    draw("inpaint", "--seed", 5, "--keep-pixels", "-o", "exact.png")
    draw("inpaint", "--seed", 5, "-o", "plain.png")
    unmasked, half = pixels(Path("photo.png"))[:, SIZE // 2 :], SIZE // 2
    assert np.array_equal(pixels(Path("exact.png"))[:, half:], unmasked)
    assert not np.array_equal(pixels(Path("plain.png"))[:, half:], unmasked)
    assert np.array_equal(pixels(Path("exact.png"))[:, :half], pixels(Path("plain.png"))[:, :half])


def test_an_option_of_the_recipe_can_be_taken_back(draw: Callable[..., Any], command: Command) -> None:
    draw("inpaint", "--seed", 5, "--keep-pixels", "-o", "exact.png")
    draw("inpaint", "--seed", 5, "-o", "plain.png")
    command("inpaint", "--from", "exact.png", "--no-keep-pixels", "-o", "again.png")
    assert np.array_equal(pixels(Path("again.png")), pixels(Path("plain.png")))


def test_several_pictures_and_their_sheet(draw: Callable[..., Any], command: Command) -> None:
    first = draw("variations", "--seed", 5, "-n", 2, "-o", "cat.png")
    assert [path.name for path in first.paths] == ["cat-seed5.png", "cat-seed6.png", "cat-sheet.png"]
    again = command("variations", "--from", "cat-sheet.png", "-o", "again.png")
    assert [path.read_bytes() for path in again.paths] == [path.read_bytes() for path in first.paths]


@pytest.mark.parametrize(
    ("shape", "size"),
    [((32, 32), (32, 32)), ((600, 600), (32, 32)), ((600, 400), (36, 24)), ((40, 90), (20, 48)), ((9, 900), (4, 320))],
)
def test_the_shape_follows_the_picture(shape: tuple[int, int], size: tuple[int, int]) -> None:
    assert fitting_size(shape, SIZE, 4) == size


def test_a_picture_of_another_shape_is_drawn_in_its_shape(draw: Callable[..., Any], command: Command) -> None:
    with Image.open("photo.png") as photo:
        photo.resize((60, 40)).save("wide.png")
    result = draw("img2img", "--image", "wide.png")
    assert "input size 60x40, output size 36x24" in result.err
    assert pixels(Path("picture.png")).shape == (24, 36, 3)
    command("img2img", "--from", "picture.png", "--image", "photo.png", "-o", "square.png")
    assert pixels(Path("square.png")).shape == (SIZE, SIZE, 3)


@pytest.mark.parametrize(
    ("name", "other"),
    [("inpaint", ("--mask", "hint.png")), ("control", ("--image", "photo.png")), ("variations", ("hint.png",))],
)
def test_another_picture_without_a_shape_leaves_the_size(
    draw: Callable[..., Any], command: Command, name: str, other: tuple[str, ...]
) -> None:
    draw(name, "--size", "40x36")
    assert command(name, *other, "--from", "picture.png", "-o", "again.png").code == 0
    assert pixels(Path("again.png")).shape == (36, 40, 3)


def test_inputs_are_found_next_to_the_picture(draw: Callable[..., Any], command: Command, tmp_path: Path) -> None:
    draw("img2img", "--seed", 5)
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for name in ("photo.png", "picture.png"):
        Path(name).rename(moved / name)
    Path("photo.png").write_bytes(Path("hint.png").read_bytes())  # another picture of that name
    assert command("img2img", "--from", moved / "picture.png").code == 0
    assert (moved / "picture-again.png").read_bytes() == (moved / "picture.png").read_bytes()


def test_changed_inputs_are_reported(draw: Callable[..., Any], command: Command) -> None:
    draw("img2img", "--seed", 5)
    Path("photo.png").write_bytes(Path("hint.png").read_bytes())
    result = command("img2img", "--from", "picture.png")
    assert result.code == 0
    assert "warning: the result may not be bit-identical to picture.png: photo.png has changed" in result.err
    digest = hashlib.sha256(Path("hint.png").read_bytes()).hexdigest()
    assert stored(Path("picture-again.png"))["image"] == {"name": "photo.png", "sha256": digest}


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_a_missing_input_is_an_error(draw: Callable[..., Any], command: Command, name: str) -> None:
    draw(name)
    for file in ("photo.png", "hint.png"):
        Path(file).unlink()
    result = command(name, "--from", "picture.png")
    last = result.err.splitlines()[-1]
    assert result.code == 1
    assert last.startswith("kandinsky22: error: picture.png was generated from ") and "is missing" in last
    assert not Path("picture-again.png").exists()


@pytest.mark.usefixtures("embedded")
@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_the_embedded_model_is_the_default(command: Command, name: str) -> None:
    result = command(name, *SUBCOMMANDS[name][1], "--steps", 1)
    assert result.code == 0, result.err
    assert stored(Path("picture.png"))["model"] == "embedded"
    assert ("not trained on these words: cat" in result.err) == (name != "variations")
    suited = {"inpaint": "decoder-inpaint", "control": "controlnet-depth"}.get(name, "decoder")
    assert f"--model kandinsky-community/kandinsky-2-2-{suited}\n" in result.err


def test_recipes_without_a_command_are_repeated(command: Command, model: Path) -> None:
    command("generate", "a cat", "--model", model, "--seed", 5)
    recipe = stored(Path("picture.png"))
    del recipe["command"]
    with Image.open("picture.png") as picture:
        save_png(picture.copy(), Path("old.png"), {"kandinsky22": json.dumps({**recipe, "negative_prompt": None})})
    assert command("generate", "--from", "old.png").code == 0
    assert Path("old-again.png").read_bytes() == Path("picture.png").read_bytes()


def test_the_digest_includes_the_image_encoder_only_if_it_runs(
    draw: Callable[..., Any], command: Command, model: Path
) -> None:
    digests = {}
    for name in ("img2img", "mix", "variations"):
        draw(name, "--force")
        digests[name] = stored(Path("picture.png"))["model_digest"]
    command("generate", "a cat", "--model", model, "--force")
    assert digests["img2img"] == stored(Path("picture.png"))["model_digest"]
    assert digests["mix"] == digests["variations"] != digests["img2img"]
