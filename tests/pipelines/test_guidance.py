"""Guidance options in all ten classes: they are off by default, each acts, and unguided steps cost half."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.pipelines.calls import CLASSES, COMBINED, PRIORS, SMALL_LATENTS, inputs, step_counts
from tests.pipelines.recording import record_batch_sizes
from tests.pipelines.tiny import difference, embeds, pair, seeded

import kandinsky22
from kandinsky22 import InputError

OPTIONS = ("guidance_rescale", "guidance_interval", "guidance_threshold")
STEPS = ("timesteps", "sigmas")
ALONE = tuple(name for name in CLASSES if name not in COMBINED)
ACTING: list[dict[str, Any]] = [
    {"guidance_rescale": 0.7},
    {"guidance_interval": (0.25, 0.75)},
    {"guidance_threshold": 0.9},
]


def call_of(name: str) -> dict[str, Any]:
    """Return a call of four steps per stage that ends in embeddings or latents."""
    return {**inputs(name), **({} if name in PRIORS else SMALL_LATENTS), **step_counts(name, 4)}


def run(pipe: Any, call: dict[str, Any], **options: Any) -> torch.Tensor:
    return pipe(**call, **options, generator=seeded(0))[0]


def same(mode: str, *ends: torch.Tensor) -> bool:
    """Return whether results are equal: bit for bit, except in priors, where rounding depends on the batch of texts."""
    return difference(*ends) < 1e-5 if mode in PRIORS else torch.equal(*ends)


@pytest.mark.parametrize("mode", ALONE)
def test_each_option_acts_and_none_does_by_default(make_pipeline: Callable[..., Any], mode: str) -> None:
    pipe, call = make_pipeline(mode), call_of(mode)
    baseline = run(pipe, call)
    off = {"guidance_rescale": 0.0, "guidance_interval": None, "guidance_threshold": None}
    assert torch.equal(run(pipe, call, **off), baseline)
    assert torch.equal(run(pipe, call, guidance_interval=(0, 1)), baseline)
    for options in ACTING:
        changed = run(pipe, call, **options)
        assert torch.isfinite(changed).all()
        assert difference(changed, baseline) > 1e-4
        single = run(pipe, {**call, "guidance_scale": 1.0}, **options)
        assert torch.equal(single, run(pipe, {**call, "guidance_scale": 1.0})), "the options need guidance"


@pytest.mark.parametrize("mode", ALONE)
def test_steps_outside_the_interval_run_the_conditional_half(
    make_pipeline: Callable[..., Any], mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, call = make_pipeline(mode), call_of(mode)
    rows = record_batch_sizes(pipe.prior if mode in PRIORS else pipe.unet, monkeypatch)
    run(pipe, {**call, "num_inference_steps": 10}, guidance_interval=(0.2, 0.7))
    assert rows == [1, 1, 2, 2, 2, 2, 2, 1, 1, 1]
    rows.clear()
    never = run(pipe, call, guidance_interval=(0.9, 1))
    assert rows == [1, 1, 1, 1]
    assert same(mode, never, run(pipe, {**call, "guidance_scale": 1.0}))


@pytest.mark.parametrize("mode", ALONE)
def test_before_the_interval_samples_are_those_of_the_condition_alone(
    make_pipeline: Callable[..., Any], mode: str
) -> None:
    pipe, call = make_pipeline(mode), call_of(mode)
    trajectories: list[list[torch.Tensor]] = []
    for options in ({"guidance_interval": (0.5, 1)}, {"guidance_scale": 1.0}, {}):
        trajectory: list[torch.Tensor] = []
        run(
            pipe,
            call | options,
            callback=lambda _, __, latents, trajectory=trajectory: trajectory.append(latents.clone()),
            callback_steps=1,
        )
        trajectories.append(trajectory)
    late, never, always = trajectories
    assert [same(mode, *pair) for pair in zip(late, never, strict=True)] == [True, True, False, False]
    assert not any(same(mode, *pair) for pair in zip(late, always, strict=True))


def test_the_interval_counts_the_steps_that_strength_leaves_out(
    make_pipeline: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interval is a fraction of the whole noise schedule, not of the steps that are run."""
    pipe = make_pipeline("Img2Img")
    rows = record_batch_sizes(pipe.unet, monkeypatch)
    call = {**call_of("Img2Img"), "num_inference_steps": 10, "strength": 0.5}
    run(pipe, call, guidance_interval=(0.2, 0.7))
    assert rows == [2, 2, 1, 1, 1]


@pytest.mark.parametrize("name", ["HeunDiscreteScheduler", "KDPM2DiscreteScheduler"])
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_both_evaluations_of_a_step_are_guided_or_neither(
    make_pipeline: Callable[[str], Any], name: str, strength: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = make_pipeline("Img2Img")
    pipe.scheduler = getattr(kandinsky22, name).from_config(pipe.scheduler.config)
    rows = record_batch_sizes(pipe.unet, monkeypatch)
    run(pipe, {**call_of("Img2Img"), "strength": strength}, guidance_interval=(0.5, 0.75))
    assert rows == [1, 1, 1, 1, 2, 2, 1][-7 if strength == 1 else -3 :]


def test_batches_with_options_equal_single_calls(decoder: Any) -> None:
    options = {"guidance_rescale": 0.5, "guidance_interval": (0.25, 1), "guidance_threshold": 0.95}
    both = {**SMALL_LATENTS, **pair(2, seed=1)}
    together = decoder(**both, **options, generator=[seeded(0), seeded(1)]).images
    for row in range(2):
        one = {name: value[row : row + 1] if "embeds" in name else value for name, value in both.items()}
        assert difference(decoder(**one, **options, generator=seeded(row)).images, together[row : row + 1]) < 1e-4


def test_the_rescaled_network_output_is_the_references(
    decoder: Any, oracles: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scheduler's inputs are compared step by step with those of the reference's function."""
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    outputs: list[torch.Tensor] = []
    denoise, step = decoder.unet.denoise, decoder.scheduler.step

    def recorded(*arguments: Any) -> torch.Tensor:
        outputs.append(denoise(*arguments))
        return outputs[-1]

    def checked(output: torch.Tensor, timestep: Any, sample: torch.Tensor, **options: Any) -> Any:
        negative, positive = (half[:, :4] for half in outputs[-1].chunk(2))
        expected = rescale_noise_cfg(negative + 4 * (positive - negative), positive, guidance_rescale=0.7)
        assert difference(output[:, :4], expected) < 1e-6
        return step(output, timestep, sample, **options)

    monkeypatch.setattr(decoder.unet, "denoise", recorded)
    monkeypatch.setattr(
        type(decoder.scheduler), "step", lambda self, *arguments, **options: checked(*arguments, **options)
    )
    run(decoder, call_of(""), guidance_rescale=0.7)
    assert len(outputs) == 4


def test_a_callback_may_change_the_scale_within_an_interval(decoder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = record_batch_sizes(decoder.unet, monkeypatch)

    def switch(pipe: Any, step: int, timestep: Any, tensors: Any) -> None:
        pipe._guidance_scale = 1.0 if step == 2 else 3.0

    run(decoder, call_of(""), guidance_interval=(0.25, 1), callback_on_step_end=switch)
    assert rows == [1, 2, 2, 1]


def test_conditions_are_bound_again_where_guidance_begins_and_ends(
    decoder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    encode = decoder.unet.encode_condition
    monkeypatch.setattr(
        decoder.unet,
        "encode_condition",
        lambda **arguments: calls.append(len(arguments["image_embeds"])) or encode(**arguments),
    )
    run(decoder, {**call_of(""), "num_inference_steps": 8}, guidance_interval=(0.25, 0.75))
    assert calls == [1, 2, 1]


def test_interpolate_has_the_options_too(prior: Any) -> None:
    call = {"images_and_prompts": ["a cat", embeds(1, 3)], "weights": [0.4, 0.6], "num_inference_steps": 4}
    baseline = prior.interpolate(**call, generator=seeded(0)).image_embeds
    assert torch.equal(prior.interpolate(**call, generator=seeded(0), guidance_interval=(0, 1)).image_embeds, baseline)
    for options in ACTING:
        assert difference(prior.interpolate(**call, generator=seeded(0), **options).image_embeds, baseline) > 1e-4


# Combined classes


@pytest.mark.parametrize("mode", COMBINED)
def test_each_stage_has_its_own_options(
    make_pipeline: Callable[..., Any], mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = make_pipeline(mode)
    early, late = record_batch_sizes(pipe.prior_prior, monkeypatch), record_batch_sizes(pipe.unet, monkeypatch)
    call = call_of(mode)
    baseline = run(pipe, call)
    for options in ACTING:
        for prefix in ("", "prior_"):
            changed = run(pipe, call, **{prefix + name: value for name, value in options.items()})
            assert difference(changed, baseline) > 1e-5, prefix
    early.clear(), late.clear()
    run(pipe, call, guidance_interval=(0.5, 1), prior_guidance_interval=(0, 0.5))
    assert (early, late) == ([2, 2, 1, 1], [1, 1, 2, 2])


# Arguments


@pytest.mark.parametrize("mode", [*ALONE, *COMBINED])
def test_our_arguments_follow_those_of_the_specification(mode: str) -> None:
    """Our own arguments follow those of the specification."""
    kind = getattr(kandinsky22, f"KandinskyV22{mode}Pipeline")
    names = list(inspect.signature(kind.__call__).parameters)
    own_arguments = [*OPTIONS, *STEPS]
    if mode in COMBINED:
        own_arguments = [*OPTIONS, *(f"prior_{name}" for name in OPTIONS), *STEPS, *(f"prior_{name}" for name in STEPS)]
    own_arguments += [name for name in ("padding_mask_crop", "prompt_weights") if name in names]
    assert names[-len(own_arguments) :] == own_arguments


BAD = [
    {"guidance_rescale": 1.5},
    {"guidance_rescale": None},
    {"guidance_interval": (0.7, 0.2)},
    {"guidance_interval": 0.5},
    {"guidance_threshold": 0.0},
    {"guidance_threshold": "0.9"},
]


@pytest.mark.usefixtures("no_network_runs")
@pytest.mark.parametrize("options", BAD, ids=str)
def test_values_are_refused_before_any_network_runs(make_pipeline: Callable[..., Any], options: Any) -> None:
    name = next(iter(options))
    for mode in ALONE:
        pipe, call = make_pipeline(mode), call_of(mode)
        with pytest.raises(InputError, match=f"{name}="):
            run(pipe, call, **options)
    for mode in COMBINED:
        pipe = make_pipeline(mode)
        with pytest.raises(InputError, match=f"^{name}="):
            run(pipe, call_of(mode), **options)
        with pytest.raises(InputError, match=f"^prior_{name}="):
            run(pipe, call_of(mode), **{f"prior_{name}": options[name]})


@pytest.mark.usefixtures("no_network_runs")
def test_thresholds_need_a_scheduler_with_alphas_cumprod(decoder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(decoder.scheduler, "alphas_cumprod")
    with pytest.raises(InputError, match="guidance_threshold is not supported by DDPMScheduler"):
        run(decoder, call_of(""), guidance_threshold=0.9)


def test_cached_features_do_not_outlive_a_change_of_guidance(decoder: Any) -> None:
    """All levels run where guidance begins or ends, because cached features belong to another batch or are outdated."""
    decoder.enable_feature_caching(every=4)
    call = {**call_of(""), "num_inference_steps": 6}
    inner_features: list[torch.Tensor] = []
    inner = decoder.unet.mid_block.forward

    def counted(features: torch.Tensor, *rest: Any) -> torch.Tensor:
        inner_features.append(features)
        return inner(features, *rest)

    decoder.unet.mid_block.forward = counted
    run(decoder, call, guidance_interval=(0.3, 0.6))
    assert [len(features) for features in inner_features] == [1, 2, 1]
