"""Feature caching in pipelines: an option of the pipeline, a cache of the generation."""

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


def draw(pipe: Any, steps: int = 5, **given: Any) -> torch.Tensor:
    options: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": steps, "output_type": "pt"}
    return pipe(**{**pair(), **options, "generator": seeded(3), **given}).images


def full_steps(pipe: Any) -> list[int]:
    """Grows by one whenever all levels of the UNet run."""
    seen: list[int] = []
    pipe.unet.mid_block.register_forward_hook(lambda *_: seen.append(1))
    return seen


def test_every_1_changes_nothing_and_every_2_only_what_it_says(decoder: KandinskyV22Pipeline) -> None:
    plain = draw(decoder)
    decoder.enable_feature_caching(every=1)
    assert torch.equal(draw(decoder), plain)
    decoder.enable_feature_caching()
    seen = full_steps(decoder)
    cached = draw(decoder)
    assert len(seen) == 3
    assert not torch.equal(cached, plain)
    decoder.disable_feature_caching()
    assert torch.equal(draw(decoder), plain)


def test_nothing_stays_from_one_call_to_the_next(decoder: KandinskyV22Pipeline) -> None:
    decoder.enable_feature_caching(every=3)
    first = draw(decoder, steps=2)
    draw(decoder, steps=4, num_images_per_prompt=2, guidance_scale=1.0)  # ends between full steps
    with pytest.raises(RuntimeError, match="stop"):
        draw(decoder, callback_on_step_end=_stop)
    assert torch.equal(draw(decoder, steps=2), first)
    gc.collect()
    assert not [thing for thing in gc.get_objects() if type(thing) is FeatureCache]


def _stop(*_: Any) -> Any:
    raise RuntimeError("stop")


def test_a_new_condition_starts_with_all_levels(decoder: KandinskyV22Pipeline) -> None:
    """Guidance that ends on the way halves the batch; embeddings that change belong to other features."""
    decoder.enable_feature_caching(every=4)
    seen = full_steps(decoder)

    def guidance_ends(pipe: Any, step: int, timestep: Any, tensors: Any) -> Any:
        if step == 1:
            pipe._guidance_scale = 1.0
        return {}

    assert torch.isfinite(draw(decoder, callback_on_step_end=guidance_ends)).all()
    assert len(seen) == 2  # the first step, and the third, which is the first without guidance

    def other_embeddings(pipe: Any, step: int, timestep: Any, tensors: Any) -> Any:
        return {"image_embeds": -tensors["image_embeds"]} if step == 2 else {}

    seen.clear()
    draw(decoder, callback_on_step_end=other_embeddings, callback_on_step_end_tensor_inputs=["image_embeds"])
    assert len(seen) == 2


@pytest.mark.parametrize("mode", ["Img2Img", "Inpaint", "Controlnet", "ControlnetImg2Img"])
def test_every_mode_can(make_pipeline: Callable[[str], Any], mode: str) -> None:
    pipe, picture = make_pipeline(mode), torch.rand(1, 3, 64, 64, generator=seeded(5))
    given: dict[str, Any] = {"image": picture} if mode != "Controlnet" else {}
    given |= {"hint": picture} if "Controlnet" in mode else {}
    given |= {"mask_image": (picture[:, 0] > 0.5).float()} if mode == "Inpaint" else {}
    given |= {"strength": 0.8} if "Img2Img" in mode else {}
    pipe.enable_feature_caching(every=2)
    seen = full_steps(pipe)
    assert torch.isfinite(draw(pipe, **given)).all()
    assert len(seen) == (2 if "Img2Img" in mode else 3)


def test_combined_pipelines_pass_it_on(combined: KandinskyV22CombinedPipeline) -> None:
    combined.enable_feature_caching(every=2)
    seen = full_steps(combined)
    combined("a red cat", height=64, width=64, num_inference_steps=4, prior_num_inference_steps=1)
    assert len(seen) == 2
    decoder = KandinskyV22Pipeline.from_pipe(combined)
    draw(decoder, steps=4)
    assert len(seen) == 4
    combined.disable_feature_caching()
    combined("a red cat", height=64, width=64, num_inference_steps=4, prior_num_inference_steps=1)
    assert len(seen) == 8


@pytest.mark.parametrize("bad", [{"every": 0}, {"every": True}, {"every": 1.5}, {"levels": 0}, {"levels": 2}])
def test_what_cannot_be_is_refused(decoder: KandinskyV22Pipeline, bad: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"{next(iter(bad))}=.*accepted"):
        decoder.enable_feature_caching(**bad)
    assert decoder._feature_caching is None


def test_pipelines_without_a_unet_say_so(prior: KandinskyV22PriorPipeline) -> None:
    with pytest.raises(InputError, match="has no unet"):
        prior.enable_feature_caching()
