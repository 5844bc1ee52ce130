"""`--quality`: a preset for both stages; other options override it, and recipes record its settings."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tests.cli.helpers import Command, assert_one_line, pixels, stored
from tests.unit.adapter_layers import attention_layers, peft_layout, random_pairs

import kandinsky22
from kandinsky22.sampling import presets
from kandinsky22.sampling.presets import PRESETS, Preset, Sampler

DPM = "DPMSolverMultistepScheduler"
QUICK = Preset(
    decoder=Sampler(DPM, 3, {"timestep_spacing": "trailing"}),
    prior=Sampler(DPM, 2, {"timestep_spacing": "trailing"}),
    guidance_interval=(0.0, 0.5),
    prior_guidance_interval=(0.0, 0.4),
)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the preset `balanced` by a quick one."""
    monkeypatch.setattr(presets, "PRESETS", {**PRESETS, "balanced": QUICK})


def sampler_settings(path: str) -> dict[str, Any]:
    """Return the sampler settings in a picture's recipe."""
    recipe = stored(Path(path))
    ours = ("scheduler", "scheduler_settings", "steps", "prior_scheduler", "prior_scheduler_settings", "prior_steps")
    return {name: recipe.get(name) for name in (*ours, "guidance_interval", "prior_guidance_interval", "guidance")}


PRESET = {
    "scheduler": DPM,
    "scheduler_settings": {"timestep_spacing": "trailing"},
    "steps": 3,
    "prior_scheduler": DPM,
    "prior_scheduler_settings": {"timestep_spacing": "trailing"},
    "prior_steps": 2,
    "guidance_interval": [0.0, 0.5],
    "prior_guidance_interval": [0.0, 0.4],
    "guidance": 2.0,
}


def test_a_preset_equals_apply_quality_and_is_repeated(command: Command, model: Path) -> None:
    arguments = ("--model", model, "--seed", 5)
    assert command("generate", "a cat", *arguments, "--quality", "balanced").code == 0
    assert sampler_settings("picture.png") == PRESET
    pipe = kandinsky22.AutoPipelineForText2Image.from_pretrained(model)
    options = presets.apply_quality(pipe, "balanced")
    (image,) = pipe("a cat", generator=torch.Generator().manual_seed(5), **options).images
    assert np.array_equal(np.asarray(image), pixels(Path("picture.png")))
    result = command("generate", "--from", "picture.png")
    assert "warning: the result may not be bit-identical" not in result.err
    assert Path("picture-again.png").read_bytes() == Path("picture.png").read_bytes()
    printed = command("info", "picture.png").out
    assert f"{DPM}, timestep_spacing=trailing" in printed
    assert re.search("^guided from +0 to 0.5$", printed, re.MULTILINE)
    assert re.search("^prior guided from +0 to 0.4$", printed, re.MULTILINE)


@pytest.mark.parametrize(
    ("arguments", "changes"),
    [
        (("--steps", "4"), {"steps": 4}),
        (("--prior-steps", "4"), {"prior_steps": 4}),
        (("--scheduler", "ddim"), {"scheduler": "DDIMScheduler", "scheduler_settings": None}),
        (("--prior-scheduler", "unclip"), {"prior_scheduler": "UnCLIPScheduler", "prior_scheduler_settings": None}),
        (("--guidance-interval", "0", "1"), {"guidance_interval": [0.0, 1.0]}),
        (("--prior-guidance-interval", "0.1", "1"), {"prior_guidance_interval": [0.1, 1.0]}),
        (("--guidance", "3"), {"guidance": 3.0}),
    ],
)
def test_other_options_override_the_preset(
    command: Command, model: Path, arguments: tuple[str, ...], changes: dict[str, Any]
) -> None:
    assert command("generate", "a cat", "--model", model, "--quality", "balanced", *arguments).code == 0
    assert sampler_settings("picture.png") == PRESET | changes


def test_a_preset_overrides_a_recipe_and_a_named_scheduler_overrides_both(command: Command, model: Path) -> None:
    command(
        "generate",
        "a cat",
        "--model",
        model,
        "--steps",
        5,
        "--seed",
        5,
        "--guidance-interval",
        "0.1",
        "1",
        "--prior-guidance-interval",
        "0.3",
        "1",
    )
    command("generate", "--from", "picture.png", "--quality", "balanced", "-o", "better.png")
    assert sampler_settings("better.png") == PRESET
    command("generate", "--from", "better.png", "--scheduler", "ddim", "-o", "ddim.png")
    assert sampler_settings("ddim.png") == PRESET | {"scheduler": "DDIMScheduler", "scheduler_settings": None}


def add_distilled_adapter(model: Path, folder: Path) -> Path:
    """Return a copy of a model with a distilled adapter of random values."""
    copy = Path(shutil.copytree(model, folder))
    unet = kandinsky22.KandinskyV22CombinedPipeline.from_pretrained(copy).unet
    (copy / "distilled").mkdir()
    tensors = peft_layout(random_pairs(unet, attention_layers(unet)))
    path = copy / "distilled" / "pytorch_lora_weights.safetensors"
    save_file(tensors, path, metadata={"num_inference_steps": "2"})
    return copy


@pytest.fixture
def distilled(model: Path, tmp_path: Path) -> Path:
    return add_distilled_adapter(model, tmp_path / "distilled-model")


def draw(command: Command, name: str, *options: object) -> dict[str, Any]:
    """Return the recipe of an image."""
    result = command("generate", *options, "-o", name)
    assert result.code == 0, result.err
    return stored(Path(name))


def test_instant_equals_apply_quality_and_is_repeated(command: Command, distilled: Path) -> None:
    recipe = draw(command, "instant.png", "a cat", "--model", distilled, "--seed", 5, "--quality", "instant")
    assert (recipe["scheduler"], recipe["steps"], recipe["guidance"]) == ("LCMScheduler", 2, 1.0)
    (adapter,) = recipe["lora"]
    assert (adapter["name"], adapter["weight"]) == (f"{distilled}/distilled", 1.0)
    pipe = kandinsky22.AutoPipelineForText2Image.from_pretrained(distilled)
    options = presets.apply_quality(pipe, "instant")
    (image,) = pipe("a cat", generator=torch.Generator().manual_seed(5), **options).images
    assert np.array_equal(np.asarray(image), pixels(Path("instant.png")))
    assert command("generate", "--from", "instant.png").code == 0
    assert Path("instant-again.png").read_bytes() == Path("instant.png").read_bytes()


def test_another_preset_leaves_nothing_of_instant(command: Command, distilled: Path) -> None:
    options = ("a cat", "--model", distilled, "--seed", 5)
    draw(command, "instant.png", *options, "--quality", "instant")
    plain = draw(command, "draft.png", *options, "--quality", "draft")
    assert draw(command, "again.png", "--from", "instant.png", "--quality", "draft") == plain
    assert draw(command, "back.png", "--from", "draft.png", "--quality", "instant") == stored(Path("instant.png"))


def test_instant_is_added_to_adapters_and_stays_without_them(command: Command, distilled: Path, tmp_path: Path) -> None:
    style = tmp_path / "style.safetensors"
    shutil.copy(distilled / "distilled" / "pytorch_lora_weights.safetensors", style)
    options = ("a cat", "--model", distilled, "--seed", 5, "--quality", "instant")
    recipe = draw(command, "both.png", *options, "--lora", f"{style}:0.5")
    assert [adapter["name"] for adapter in recipe["lora"]] == [f"{distilled}/distilled", str(style)]
    alone = draw(command, "alone.png", "--from", "both.png", "--lora", "none")
    assert [adapter["name"] for adapter in alone["lora"]] == [f"{distilled}/distilled"]


def test_instant_leaves_a_step_at_any_strength(command: Command, distilled: Path) -> None:
    draw(command, "photo.png", "a cat", "--model", distilled, "--quality", "instant")
    arguments = ("img2img", "a cat", "--image", "photo.png", "--model", distilled)
    for strength, steps in ((None, 4), (0.2, 5), (1, 2), (0, 2)):
        options = () if strength is None else ("--strength", strength)
        result = command(*arguments, *options, "--quality", "instant", "-o", f"{strength}.png")
        assert result.code == 0, result.err
        assert stored(Path(f"{strength}.png"))["steps"] == steps
        assert ("leaves no step" in result.err) == (strength == 0)
    result = command(*arguments, "--quality", "instant", "--steps", 2, "-o", "explicit.png")
    assert "--strength 0.3 leaves no step of 2" in result.err


def test_instant_precedes_the_guidance_of_the_settings_file(
    command: Command, distilled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KANDINSKY22_GUIDANCE", "6")
    options = ("a cat", "--model", distilled)
    assert draw(command, "instant.png", *options, "--quality", "instant")["guidance"] == 1.0
    assert draw(command, "balanced.png", *options, "--quality", "balanced")["guidance"] == 6.0
    monkeypatch.setenv("KANDINSKY22_QUALITY", "instant")
    assert draw(command, "settings.png", *options)["guidance"] == 1.0
    assert draw(command, "own.png", *options, "--quality", "instant", "--guidance", 2)["guidance"] == 2.0


def test_instant_needs_a_distilled_adapter(command: Command, model: Path) -> None:
    result = command("generate", "a cat", "--model", model, "--quality", "instant")
    assert_one_line(result, 1, f"the model {model} has no distilled adapter", "kandinsky22 train distill")


@pytest.mark.usefixtures("embedded")
@pytest.mark.parametrize("name", ["mix", "variations", "control"])
def test_other_subcommands_accept_presets(command: Command, name: str) -> None:
    command("generate", "a circle", "-o", "photo.png")
    needed = {
        "mix": ("--text", "a circle", "--image", "photo.png"),
        "variations": ("photo.png",),
        "control": ("a circle", "--hint", "photo.png"),
    }
    assert command(name, *needed[name], "--quality", "balanced").code == 0
    assert sampler_settings("picture.png") == PRESET
