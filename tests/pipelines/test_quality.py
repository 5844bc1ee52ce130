"""Presets in Python: one call for any pipeline, and nothing left behind by the one before."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from kandinsky22 import (
    InputError,
    KandinskyV22CombinedPipeline,
    KandinskyV22Pipeline,
    KandinskyV22PriorPipeline,
    apply_quality,
)
from kandinsky22.quality import PRESETS

NAMES = ("draft", "balanced", "best")


def test_presets_grow_and_balanced_keeps_its_promise() -> None:
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
    assert type(combined.scheduler).__name__ == preset.decoder.scheduler
    assert type(combined.prior_scheduler).__name__ == preset.prior.scheduler
    assert combined.prior_scheduler.config.prediction_type == "sample"
    assert combined.generation_defaults["num_inference_steps"] == 77
    images = combined("a cat", generator=torch.Generator().manual_seed(0), output_type="pt", **arguments).images
    assert bool(images.isfinite().all())


def test_a_stage_alone_takes_its_part(decoder: KandinskyV22Pipeline, prior: KandinskyV22PriorPipeline) -> None:
    preset = PRESETS["balanced"]
    interval = {} if preset.guidance_interval is None else {"guidance_interval": preset.guidance_interval}
    assert apply_quality(decoder, "balanced") == {"num_inference_steps": preset.decoder.steps} | interval
    assert apply_quality(prior, "balanced") == {"num_inference_steps": preset.prior.steps}
    assert type(prior.scheduler).__name__ == preset.prior.scheduler
    assert bool(prior("a cat", **apply_quality(prior, "balanced")).image_embeds.isfinite().all())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("before", NAMES)
def test_a_preset_leaves_nothing_behind_for_the_next(decoder: KandinskyV22Pipeline, name: str, before: str) -> None:
    own = decoder.scheduler
    apply_quality(decoder, name)
    wanted = decoder.scheduler
    decoder.scheduler = own
    apply_quality(decoder, before)
    apply_quality(decoder, name)
    for steps in (wanted, decoder.scheduler):
        steps.set_timesteps(PRESETS[name].decoder.steps)
    assert torch.equal(wanted.timesteps, decoder.scheduler.timesteps)
    assert {key: wanted.config[key] for key in PRESETS[name].decoder.settings} == {
        key: decoder.scheduler.config[key] for key in PRESETS[name].decoder.settings
    }
    assert type(wanted) is type(decoder.scheduler)


@pytest.mark.parametrize("given", ["good", None, 3, ["best"]])
def test_other_names_are_refused(decoder: KandinskyV22Pipeline, given: Any) -> None:
    with pytest.raises(InputError, match=r"quality=.*draft, balanced, best"):
        apply_quality(decoder, given)


def test_the_example_on_the_page_runs(checkpoints: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "samplers-tradeoff.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    names: dict[str, Any] = {}
    exec(example.replace('"embedded"', repr(str(checkpoints / "combined"))), names)
    assert names["picture"].size
