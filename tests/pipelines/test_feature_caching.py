"""Feature caching in pipelines: the pipeline holds the setting, each generation its own cache."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.pipelines.tiny import pair, seeded

from kandinsky22 import KandinskyV22CombinedPipeline, KandinskyV22Pipeline, KandinskyV22PriorPipeline
from kandinsky22.errors import InputError
from kandinsky22.models.feature_cache import FeatureCache


def generate(pipe: Any, steps: int = 5, **arguments: Any) -> torch.Tensor:
    options: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": steps, "output_type": "pt"}
    return pipe(**{**pair(), **options, "generator": seeded(3), **arguments}).images


def full_steps(pipe: Any) -> list[int]:
    """Return a list that grows by one whenever all levels of the UNet run."""
    full: list[int] = []
    pipe.unet.mid_block.register_forward_hook(lambda *_: full.append(1))
    return full


def test_every_1_changes_nothing_and_every_2_skips_half_of_the_steps(decoder: KandinskyV22Pipeline) -> None:
    baseline = generate(decoder)
    decoder.enable_feature_caching(every=1)
    assert torch.equal(generate(decoder), baseline)
    decoder.enable_feature_caching()
    full = full_steps(decoder)
    cached = generate(decoder)
    assert len(full) == 3
    assert not torch.equal(cached, baseline)
    decoder.disable_feature_caching()
    assert torch.equal(generate(decoder), baseline)


def test_cached_features_end_with_the_call(decoder: KandinskyV22Pipeline) -> None:
    decoder.enable_feature_caching(every=3)
    first = generate(decoder, steps=2)
    generate(decoder, steps=4, num_images_per_prompt=2, guidance_scale=1.0)  # ends between full steps
    with pytest.raises(RuntimeError, match="stop"):
        generate(decoder, callback_on_step_end=_stop)
    assert torch.equal(generate(decoder, steps=2), first)
    gc.collect()
    assert not [thing for thing in gc.get_objects() if type(thing) is FeatureCache]


def _stop(*_: Any) -> Any:
    raise RuntimeError("stop")


def test_a_new_condition_starts_with_all_levels(decoder: KandinskyV22Pipeline) -> None:
    """All levels run after guidance has ended, which halves the batch, and after embeddings have changed."""
    decoder.enable_feature_caching(every=4)
    full = full_steps(decoder)

    def guidance_ends(pipe: Any, step: int, timestep: Any, tensors: Any) -> Any:
        if step == 1:
            pipe._guidance_scale = 1.0
        return {}

    assert torch.isfinite(generate(decoder, callback_on_step_end=guidance_ends)).all()
    assert len(full) == 2  # the first step, and the third, which is the first without guidance

    def other_embeddings(pipe: Any, step: int, timestep: Any, tensors: Any) -> Any:
        return {"image_embeds": -tensors["image_embeds"]} if step == 2 else {}

    full.clear()
    generate(decoder, callback_on_step_end=other_embeddings, callback_on_step_end_tensor_inputs=["image_embeds"])
    assert len(full) == 2


@pytest.mark.parametrize("mode", ["Img2Img", "Inpaint", "Controlnet", "ControlnetImg2Img"])
def test_every_mode_can(make_pipeline: Callable[[str], Any], mode: str) -> None:
    pipe, picture = make_pipeline(mode), torch.rand(1, 3, 64, 64, generator=seeded(5))
    arguments: dict[str, Any] = {"image": picture} if mode != "Controlnet" else {}
    arguments |= {"hint": picture} if "Controlnet" in mode else {}
    arguments |= {"mask_image": (picture[:, 0] > 0.5).float()} if mode == "Inpaint" else {}
    arguments |= {"strength": 0.8} if "Img2Img" in mode else {}
    pipe.enable_feature_caching(every=2)
    full = full_steps(pipe)
    assert torch.isfinite(generate(pipe, **arguments)).all()
    assert len(full) == (2 if "Img2Img" in mode else 3)


def test_combined_pipelines_pass_it_on(combined: KandinskyV22CombinedPipeline) -> None:
    combined.enable_feature_caching(every=2)
    full = full_steps(combined)
    combined("a red cat", height=64, width=64, num_inference_steps=4, prior_num_inference_steps=1)
    assert len(full) == 2
    decoder = KandinskyV22Pipeline.from_pipe(combined)
    generate(decoder, steps=4)
    assert len(full) == 4
    combined.disable_feature_caching()
    combined("a red cat", height=64, width=64, num_inference_steps=4, prior_num_inference_steps=1)
    assert len(full) == 8


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        *(("every", value, "an integer of at least 1") for value in (0, True, 1.5)),
        *(("levels", value, "an integer") for value in (0, 2)),
    ],
)
def test_invalid_settings_are_refused(decoder: KandinskyV22Pipeline, name: str, value: Any, expected: str) -> None:
    with pytest.raises(InputError, match=f"{name}={value} is invalid: expected {expected}"):
        decoder.enable_feature_caching(**{name: value})
    assert decoder._feature_caching is None


def test_feature_caching_needs_a_unet(prior: KandinskyV22PriorPipeline) -> None:
    with pytest.raises(InputError, match="has no unet"):
        prior.enable_feature_caching()
