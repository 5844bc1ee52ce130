"""`kandinsky22 generate`: pictures, their metadata, and repeating them bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests.cli.helpers import DEFAULTS, SIZE, Command, pixels, save_png, stored

import kandinsky22


def test_a_picture_with_the_models_own_defaults(command: Command, model: Path) -> None:
    result = command("generate", "a cat", "--model", model, "--seed", 5, "-o", "cat.png")
    assert (result.code, result.out) == (0, "cat.png\n")
    recipe = stored(Path("cat.png"))
    assert recipe["prompt"] == "a cat"
    assert recipe["seeds"] == [5]
    assert (recipe["steps"], recipe["guidance"]) == (DEFAULTS["num_inference_steps"], DEFAULTS["guidance_scale"])
    assert recipe["prior_steps"] == DEFAULTS["prior_num_inference_steps"]
    assert recipe["prior_guidance"] == DEFAULTS["prior_guidance_scale"]
    assert (recipe["width"], recipe["height"]) == (SIZE, SIZE)
    assert recipe["scheduler"] == "DDPMScheduler"
    assert recipe["model"] == str(model)
    assert len(recipe["model_digest"]) == 64
    assert recipe["versions"]["kandinsky22"] == kandinsky22.__version__
    assert {"torch", "tokenizers"} <= recipe["versions"].keys()


def test_the_command_draws_what_the_library_draws(command: Command, model: Path) -> None:
    import torch

    command("generate", "a cat", "--model", model, "--seed", 5)
    pipe = kandinsky22.AutoPipelineForText2Image.from_pretrained(model)
    (image,) = pipe("a cat", generator=torch.Generator().manual_seed(5), **pipe.generation_defaults).images
    assert np.array_equal(np.asarray(image), pixels(Path("picture.png")))


def test_library_defaults_apply_when_a_model_has_none(command: Command, models: Path) -> None:
    arguments = ("--model", models / "a/decoder", "--prior", models / "b/prior", "--steps", 1, "--prior-steps", 2)
    assert command("generate", "a cat", *arguments).code == 0
    recipe = stored(Path("picture.png"))
    assert (recipe["guidance"], recipe["prior_guidance"]) == (4.0, 4.0)
    assert recipe["prior"] == str(models / "b/prior")


@pytest.mark.parametrize(
    ("arguments", "entries"),
    [
        (("--negative-prompt", "a dog"), {"negative_prompt": "a dog"}),
        (("--steps", "3"), {"steps": 3}),
        (("--prior-steps", "4"), {"prior_steps": 4}),
        (("--guidance", "3.5"), {"guidance": 3.5}),
        (("--guidance", "0"), {"guidance": 0.0}),
        (("--prior-guidance", "5"), {"prior_guidance": 5.0}),
        (("--size", "40x36"), {"width": 40, "height": 36}),
        (("--scheduler", "ddim"), {"scheduler": "DDIMScheduler"}),
        (("--scheduler", "EulerDiscreteScheduler"), {"scheduler": "EulerDiscreteScheduler"}),
        (("--prior-scheduler", "dpm"), {"prior_scheduler": "DPMSolverMultistepScheduler"}),
        (("--guidance-interval", "0.5", "1"), {"guidance_interval": [0.5, 1.0]}),
        (("--prior-guidance-interval", "0.5", "1"), {"prior_guidance_interval": [0.5, 1.0]}),
        (("--guidance-rescale", "0.7"), {"guidance_rescale": 0.7}),
        (("--guidance-threshold", "0.5"), {"guidance_threshold": 0.5}),
        (("--prompt-weights", "--negative-prompt", "(a:2) dog"), {"prompt_weights": True}),
        (("--dtype", "bf16"), {"dtype": "bfloat16"}),
        (("--seed", "6"), {"seeds": [6]}),
    ],
)
def test_every_option_acts_and_is_recorded(
    command: Command, model: Path, arguments: tuple[str, ...], entries: dict[str, Any]
) -> None:
    command("generate", "a cat", "--model", model, "--seed", 5, "-o", "plain.png")
    assert command("generate", "a cat", "--model", model, "--seed", 5, "-o", "other.png", *arguments).code == 0
    recipe = stored(Path("other.png"))
    assert {name: recipe[name] for name in entries} == entries
    assert not np.array_equal(pixels(Path("plain.png")), pixels(Path("other.png")))
    assert command("generate", "--from", "other.png").paths == [Path("other-again.png")]
    assert Path("other-again.png").read_bytes() == Path("other.png").read_bytes()


def test_prompt_weights(command: Command, model: Path) -> None:
    def image(prompt: str, *arguments: str) -> Any:
        assert (
            command("generate", prompt, "--model", model, "--seed", 5, "-o", "a.png", "--force", *arguments).code == 0
        )
        return pixels(Path("a.png"))

    assert not np.array_equal(image("a (cat:2)", "--prompt-weights"), image("a (cat:2)"))
    assert np.array_equal(image("a (cat:1)", "--prompt-weights"), image("a cat"))
    assert "prompt_weights" not in stored(Path("a.png"))
    result = command("generate", "a (cat", "--model", model, "--prompt-weights")
    assert result.code == 1
    assert "expected brackets in pairs" in result.err


@pytest.mark.parametrize(("device", "recorded"), [("cpu", "cpu"), ("auto", None)])
def test_devices(command: Command, model: Path, device: str, recorded: str | None) -> None:
    assert command("generate", "a cat", "--model", model, "--device", device).code == 0
    assert recorded is None or stored(Path("picture.png"))["device"] == recorded


def test_several_pictures_are_those_of_single_seeds_and_a_sheet(command: Command, model: Path) -> None:
    result = command("generate", "a cat", "--model", model, "--seed", 5, "-n", 3, "-o", "cat.png")
    assert [path.name for path in result.paths] == ["cat-seed5.png", "cat-seed6.png", "cat-seed7.png", "cat-sheet.png"]
    for index in range(3):
        command("generate", "a cat", "--model", model, "--seed", 5 + index, "-o", "single.png", "--force")
        assert Path("single.png").read_bytes() == result.paths[index].read_bytes()
    sheet = pixels(Path("cat-sheet.png"))
    assert sheet.shape == (2 * SIZE, 2 * SIZE, 3)
    assert np.array_equal(sheet[:SIZE, SIZE:], pixels(Path("cat-seed6.png")))
    assert (sheet[SIZE:, SIZE:] == 255).all()
    assert stored(Path("cat-sheet.png"))["seeds"] == [5, 6, 7]
    assert (stored(Path("cat-sheet.png"))["width"], stored(Path("cat-seed5.png"))["seeds"]) == (SIZE, [5])


def test_a_sheet_repeats_all_its_pictures(command: Command, model: Path) -> None:
    first = command("generate", "a cat", "--model", model, "--seed", 5, "-n", 2, "-o", "cat.png")
    again = command("generate", "--from", "cat-sheet.png", "-o", "again.png")
    assert [path.read_bytes() for path in again.paths] == [path.read_bytes() for path in first.paths]


def test_options_override_the_recipe(command: Command, model: Path) -> None:
    command("generate", "a cat", "--model", model, "--seed", 5, "--steps", 3)
    result = command("generate", "a dog", "--from", "picture.png", "--seed", 8, "-n", 2, "-o", "dog.png")
    assert result.code == 0
    recipe = stored(Path("dog-seed9.png"))
    assert (recipe["prompt"], recipe["seeds"], recipe["steps"]) == ("a dog", [9], 3)


def test_a_random_seed_is_printed_and_repeats_the_picture(command: Command, model: Path) -> None:
    result = command("generate", "a cat", "--model", model)
    (seed,) = stored(Path("picture.png"))["seeds"]
    assert f"seed {seed}" in result.err
    command("generate", "a cat", "--model", model, "--seed", seed, "-o", "again.png")
    assert Path("again.png").read_bytes() == Path("picture.png").read_bytes()
    command("generate", "a cat", "--model", model, "-o", "other.png")
    assert stored(Path("other.png"))["seeds"] != [seed]


def test_galleries_can_read_the_parameters(command: Command, model: Path) -> None:
    command("generate", "кот, a cat", "--negative-prompt", "dog", "--model", model, "--seed", 5)
    with Image.open("picture.png") as picture:
        prompt, negative, settings = picture.info["parameters"].split("\n")
        assert picture.info["Software"] == f"kandinsky22 {kandinsky22.__version__}"
    assert (prompt, negative) == ("кот, a cat", "Negative prompt: dog")
    assert settings.startswith(f"Steps: 2, Sampler: DDPMScheduler, CFG scale: 2, Seed: 5, Size: {SIZE}x{SIZE}")


@pytest.mark.usefixtures("embedded")
def test_the_embedded_model_is_the_default_and_is_described(command: Command) -> None:
    result = command("generate", "a red dragon on a blue square", "--steps", 1, "--prior-steps", 2)
    assert result.code == 0
    assert "--model kandinsky-community/kandinsky-2-2-decoder" in result.err
    assert "not trained on these words: dragon" in result.err
    assert stored(Path("picture.png"))["model"] == "embedded"
    known = command("generate", "a red circle on a blue background", "--steps", 1, "--prior-steps", 2)
    assert "not trained on" not in known.err


def test_quiet_prints_only_paths(command: Command, model: Path) -> None:
    result = command("generate", "a cat", "--model", model, "--quiet")
    assert (result.code, result.out, result.err) == (0, "picture.png\n", "")


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        ("versions", {"torch": "1.0"}, "torch was 1.0, is "),
        ("hardware", "abacus", "hardware was abacus, is "),
        ("model_digest", "0" * 64, "combined have changed"),
    ],
)
def test_changes_since_a_picture_was_generated_are_reported(
    command: Command, model: Path, entry: str, value: Any, message: str
) -> None:
    command("generate", "a cat", "--model", model)
    recipe = stored(Path("picture.png"))
    with Image.open("picture.png") as picture:
        save_png(picture.copy(), Path("old.png"), {"kandinsky22": json.dumps({**recipe, entry: value})})
    result = command("generate", "--from", "old.png")
    assert result.code == 0
    assert "warning" in result.err
    assert message in result.err


def test_an_existing_picture_is_replaced_atomically_by_force(command: Command, model: Path) -> None:
    Path("picture.png").write_bytes(b"old")
    assert command("generate", "a cat", "--model", model, "--force").code == 0
    assert pixels(Path("picture.png")).shape == (SIZE, SIZE, 3)
    assert list(Path().iterdir()) == [Path("picture.png")]
