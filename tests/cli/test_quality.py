"""`--quality`: a preset for both stages; other options override it, and recipes record its settings."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.cli.helpers import Command, pixels, stored

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
