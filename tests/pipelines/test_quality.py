"""Presets in Python: they apply to any pipeline, and nothing of an earlier preset remains."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.pipelines.recording import record_batch_sizes
from tests.pipelines.tiny import DIM

from kandinsky22 import (
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


def test_presets_grow_and_balanced_stays_within_its_steps() -> None:
    assert tuple(PRESETS) == NAMES
    for stage in ("decoder", "prior"):
        steps = [getattr(PRESETS[name], stage).steps for name in NAMES]
        assert steps == sorted(steps)
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
    for name, preset in PRESETS.items():
        arguments = apply_quality(combined, name)
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
    with pytest.raises(InputError, match=r"quality=.* is invalid: expected 'draft' or 'balanced' or 'best'"):
        apply_quality(decoder, quality)


def test_the_example_on_the_page_runs(checkpoints: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "samplers-tradeoff.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    names: dict[str, Any] = {}
    exec(example.replace('"embedded"', repr(str(checkpoints / "combined"))), names)
    assert names["image"].size
