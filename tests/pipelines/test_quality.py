"""Presets in Python: they apply to any pipeline, and nothing of an earlier preset remains."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tests.pipelines.recording import record_batch_sizes
from tests.pipelines.tiny import DIM
from tests.unit.adapter_layers import attention_layers, peft_layout, random_pairs

from kandinsky22 import (
    CheckpointError,
    InputError,
    KandinskyV22CombinedPipeline,
    KandinskyV22Pipeline,
    KandinskyV22PriorEmb2EmbPipeline,
    KandinskyV22PriorPipeline,
    apply_quality,
)
from kandinsky22.sampling import presets
from kandinsky22.sampling.presets import PRESETS, Preset, Sampler

NAMES = ("draft", "balanced", "best")


@pytest.fixture
def distilled(checkpoints: Path, tmp_path: Path) -> Path:
    """A checkpoint with a distilled adapter of random values."""
    folder = Path(shutil.copytree(checkpoints / "combined", tmp_path / "distilled-model"))
    (folder / "distilled").mkdir()
    save_file(adapter_tensors(folder, seed=1), folder / "distilled" / "pytorch_lora_weights.safetensors")
    return folder


def adapter_tensors(folder: Path, seed: int) -> dict[str, torch.Tensor]:
    unet = KandinskyV22CombinedPipeline.from_pretrained(folder).unet
    return peft_layout(random_pairs(unet, attention_layers(unet), seed=seed))


def draw(pipe: KandinskyV22CombinedPipeline, arguments: dict[str, Any]) -> torch.Tensor:
    images: torch.Tensor = pipe(
        "a cat", generator=torch.Generator().manual_seed(0), output_type="pt", **arguments
    ).images
    return images


def test_instant_samples_with_the_distilled_adapter(distilled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = KandinskyV22CombinedPipeline.from_pretrained(distilled)
    before = draw(pipe, apply_quality(pipe, "draft"))
    arguments = apply_quality(pipe, "instant")
    assert (type(pipe.scheduler).__name__, arguments["guidance_scale"]) == ("LCMScheduler", 1.0)
    assert arguments["num_inference_steps"] == PRESETS["instant"].decoder.steps
    assert pipe.get_active_adapters() == ["distilled"]
    sizes = record_batch_sizes(pipe.unet, monkeypatch)
    image = draw(pipe, arguments)
    assert sizes == [1] * PRESETS["instant"].decoder.steps
    pipe.disable_lora()
    assert not torch.equal(draw(pipe, arguments), image)
    pipe.enable_lora()
    again = draw(pipe, apply_quality(pipe, "instant"))
    assert torch.equal(again, image)
    assert torch.equal(draw(pipe, apply_quality(pipe, "draft")), before)
    assert pipe.get_list_adapters() == {}
    save_file(
        adapter_tensors(distilled, seed=1),
        distilled / "distilled" / "pytorch_lora_weights.safetensors",
        metadata={"num_inference_steps": "3"},
    )
    assert apply_quality(pipe, "instant")["num_inference_steps"] == 3


def test_instant_keeps_the_adapters_of_the_user(distilled: Path) -> None:
    pipe = KandinskyV22CombinedPipeline.from_pretrained(distilled)
    pipe.load_lora_weights(adapter_tensors(distilled, seed=2), adapter_name="style")
    pipe.set_adapters("style", 0.5)
    before = draw(pipe, apply_quality(pipe, "draft"))
    apply_quality(pipe, "instant")
    assert pipe.get_active_adapters() == ["style", "distilled"]
    pipe.set_adapters("style", 0.5)
    pipe.load_distilled_adapter()
    assert pipe.get_active_adapters() == ["style", "distilled"]
    assert torch.equal(draw(pipe, apply_quality(pipe, "draft")), before)
    assert pipe.get_active_adapters() == ["style"]


def test_instant_of_a_prior_alone_samples_the_prior(prior: KandinskyV22PriorPipeline) -> None:
    preset = PRESETS["instant"]
    expected = {"num_inference_steps": preset.prior.steps, "guidance_interval": preset.prior_guidance_interval}
    assert apply_quality(prior, "instant") == expected


def test_instant_without_distilled_adapter_changes_nothing(checkpoints: Path, decoder: KandinskyV22Pipeline) -> None:
    for pipe, error in (
        (KandinskyV22CombinedPipeline.from_pretrained(checkpoints / "combined"), CheckpointError),
        (KandinskyV22Pipeline(**decoder.components), InputError),
    ):
        scheduler = pipe.scheduler
        with pytest.raises(error, match="distilled"):
            apply_quality(pipe, "instant")
        assert pipe.scheduler is scheduler and pipe.get_list_adapters() == {}


def test_presets_grow_and_balanced_stays_within_its_steps() -> None:
    assert tuple(PRESETS) == ("instant", *NAMES)
    for stage in ("decoder", "prior"):
        steps = [getattr(PRESETS[name], stage).steps for name in NAMES]
        assert steps == sorted(steps)
    assert PRESETS["instant"].decoder.steps <= PRESETS["draft"].decoder.steps
    assert PRESETS["balanced"].decoder.steps <= 12
    assert PRESETS["balanced"].prior.steps <= 5


@pytest.mark.parametrize("name", NAMES)
def test_both_stages_are_sampled_as_the_preset_says(combined: KandinskyV22CombinedPipeline, name: str) -> None:
    combined.generation_defaults = {"guidance_scale": 2.0, "num_inference_steps": 77}
    arguments = apply_quality(combined, name)
    preset = PRESETS[name]
    assert arguments["guidance_scale"] == 2.0
    assert arguments["num_inference_steps"] == preset.decoder.steps
    assert arguments["prior_num_inference_steps"] == preset.prior.steps
    assert arguments.get("guidance_interval") == preset.guidance_interval
    assert arguments.get("prior_guidance_interval") == preset.prior_guidance_interval
    assert type(combined.scheduler).__name__ == preset.decoder.scheduler
    assert type(combined.prior_scheduler).__name__ == preset.prior.scheduler
    assert combined.prior_scheduler.config.prediction_type == "sample"
    assert combined.generation_defaults["num_inference_steps"] == 77
    images = combined("a cat", generator=torch.Generator().manual_seed(0), output_type="pt", **arguments).images
    assert bool(images.isfinite().all())


def test_a_single_stage_gets_its_part_of_a_preset(
    decoder: KandinskyV22Pipeline, prior: KandinskyV22PriorPipeline
) -> None:
    preset = PRESETS["balanced"]
    expected = {"num_inference_steps": preset.decoder.steps, "guidance_interval": preset.guidance_interval}
    assert apply_quality(decoder, "balanced") == expected
    expected = {"num_inference_steps": preset.prior.steps, "guidance_interval": preset.prior_guidance_interval}
    assert apply_quality(prior, "balanced") == expected
    assert type(prior.scheduler).__name__ == preset.prior.scheduler
    assert bool(prior("a cat", **apply_quality(prior, "balanced")).image_embeds.isfinite().all())


def test_each_stage_ends_its_guidance_where_the_preset_says(
    combined: KandinskyV22CombinedPipeline, emb2emb: KandinskyV22PriorEmb2EmbPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    three, four = (Sampler("DPMSolverMultistepScheduler", steps) for steps in (3, 4))
    preset = Preset(decoder=three, prior=four, guidance_interval=(0.0, 0.3), prior_guidance_interval=(0.0, 0.5))
    monkeypatch.setattr(presets, "PRESETS", {"balanced": preset})
    early, late = record_batch_sizes(combined.prior_prior, monkeypatch), record_batch_sizes(combined.unet, monkeypatch)
    combined("a cat", **apply_quality(combined, "balanced"))
    assert (early, late) == ([2, 2, 1, 1], [2, 1, 1])
    alone = record_batch_sizes(emb2emb.prior, monkeypatch)
    emb2emb("a cat", image=torch.zeros(1, DIM), strength=1.0, **apply_quality(emb2emb, "balanced"))
    assert alone == [2, 2, 1, 1]


def test_unset_preset_fields_keep_the_models_defaults(combined: KandinskyV22CombinedPipeline) -> None:
    combined.generation_defaults = {"guidance_interval": (0.1, 0.6), "prior_guidance_interval": (0.2, 1.0)}
    for name in NAMES:
        arguments, preset = apply_quality(combined, name), PRESETS[name]
        for interval in ("guidance_interval", "prior_guidance_interval"):
            expected = getattr(preset, interval) or combined.generation_defaults[interval]
            assert arguments[interval] == expected


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("before", NAMES)
def test_a_preset_leaves_nothing_behind_for_the_next(decoder: KandinskyV22Pipeline, name: str, before: str) -> None:
    own_scheduler = decoder.scheduler
    apply_quality(decoder, name)
    expected_scheduler = decoder.scheduler
    decoder.scheduler = own_scheduler
    apply_quality(decoder, before)
    apply_quality(decoder, name)
    for steps in (expected_scheduler, decoder.scheduler):
        steps.set_timesteps(PRESETS[name].decoder.steps)
    assert torch.equal(expected_scheduler.timesteps, decoder.scheduler.timesteps)
    assert {key: expected_scheduler.config[key] for key in PRESETS[name].decoder.settings} == {
        key: decoder.scheduler.config[key] for key in PRESETS[name].decoder.settings
    }
    assert type(expected_scheduler) is type(decoder.scheduler)


@pytest.mark.parametrize("quality", ["good", None, 3, ["best"]])
def test_other_names_are_refused(decoder: KandinskyV22Pipeline, quality: Any) -> None:
    with pytest.raises(
        InputError, match=r"quality=.* is invalid: expected 'instant' or 'draft' or 'balanced' or 'best'"
    ):
        apply_quality(decoder, quality)


def test_the_example_on_the_page_runs(checkpoints: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "samplers-tradeoff.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    names: dict[str, Any] = {}
    exec(example.replace('"embedded"', repr(str(checkpoints / "combined"))), names)
    assert names["image"].size
