"""Options of guidance in all ten classes: defaults change nothing, steps outside the interval cost half, each acts."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.pipelines.test_modes_parity import box, embeds, hint, photo
from tests.pipelines.tiny import MODES, difference, seeded

import kandinsky22
from kandinsky22 import InputError

SMALL: dict[str, Any] = {"num_inference_steps": 4, "height": 32, "width": 32, "output_type": "latent"}
OPTIONS = ("guidance_rescale", "guidance_interval", "guidance_threshold")
STEPS = ("timesteps", "sigmas")
PRIORS = ("Prior", "PriorEmb2Emb")
COMBINED = ("Combined", "Img2ImgCombined", "InpaintCombined")
ACTING: list[dict[str, Any]] = [
    {"guidance_rescale": 0.7},
    {"guidance_interval": (0.25, 0.75)},
    {"guidance_threshold": 0.9},
]


def call_of(mode: str) -> dict[str, Any]:
    if mode in PRIORS:
        call: dict[str, Any] = {"prompt": "a red square", "num_inference_steps": 4}
        return call | ({"image": embeds(1, 7), "strength": 1.0} if mode == "PriorEmb2Emb" else {})
    call = {**SMALL, "image_embeds": embeds(1, 1), "negative_image_embeds": embeds(1, 2)}
    if "Img2Img" in mode:
        call |= {"image": photo(3), "strength": 1.0}
    if "Controlnet" in mode:
        call |= {"hint": hint(1, 5)}
    if mode == "Inpaint":
        call |= {"image": photo(3), "mask_image": box()}
    return call


@pytest.fixture
def build(
    prior: Any, decoder: Any, modes: Callable[[str], Any], checkpoints: Any
) -> Callable[[str], tuple[Any, dict[str, Any]]]:
    """A pipeline that runs alone, and a call of it, by mode."""

    def made(mode: str) -> tuple[Any, dict[str, Any]]:
        if mode == "PriorEmb2Emb":
            return kandinsky22.KandinskyV22PriorEmb2EmbPipeline.from_pipe(prior), call_of(mode)
        return {"Prior": prior, "": decoder}.get(mode) or modes(mode), call_of(mode)

    return made


def run(pipe: Any, call: dict[str, Any], **options: Any) -> torch.Tensor:
    return pipe(**call, **options, generator=seeded(0))[0]


def rows_seen(network: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each call of the network's `denoise` has, as a list that grows."""
    rows: list[int] = []
    denoise = network.denoise

    def counted(sample: torch.Tensor, *rest: Any) -> torch.Tensor:
        rows.append(len(sample))
        return denoise(sample, *rest)

    monkeypatch.setattr(network, "denoise", counted)
    return rows


ALONE = ("Prior", "PriorEmb2Emb", "", *MODES)


def same(mode: str, *ends: torch.Tensor) -> bool:
    """Bit for bit, but for priors: a text that is encoded beside another is rounded in another way."""
    return difference(*ends) < 1e-5 if mode in PRIORS else torch.equal(*ends)


@pytest.mark.parametrize("mode", ALONE)
def test_each_option_acts_and_none_does_by_default(build: Any, mode: str) -> None:
    pipe, call = build(mode)
    plain = run(pipe, call)
    off = {"guidance_rescale": 0.0, "guidance_interval": None, "guidance_threshold": None}
    assert torch.equal(run(pipe, call, **off), plain)
    assert torch.equal(run(pipe, call, guidance_interval=(0, 1)), plain)
    for options in ACTING:
        changed = run(pipe, call, **options)
        assert torch.isfinite(changed).all()
        assert difference(changed, plain) > 1e-4
        single = run(pipe, {**call, "guidance_scale": 1.0}, **options)
        assert torch.equal(single, run(pipe, {**call, "guidance_scale": 1.0})), "nothing to act on without guidance"


@pytest.mark.parametrize("mode", ALONE)
def test_steps_outside_the_interval_run_the_conditional_half(
    build: Any, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, call = build(mode)
    rows = rows_seen(pipe.prior if mode in PRIORS else pipe.unet, monkeypatch)
    run(pipe, {**call, "num_inference_steps": 10}, guidance_interval=(0.2, 0.7))
    assert rows == [1, 1, 2, 2, 2, 2, 2, 1, 1, 1]
    rows.clear()
    never = run(pipe, call, guidance_interval=(0.9, 1))
    assert rows == [1, 1, 1, 1]
    assert same(mode, never, run(pipe, {**call, "guidance_scale": 1.0}))


@pytest.mark.parametrize("mode", ALONE)
def test_before_the_interval_samples_are_those_of_the_condition_alone(build: Any, mode: str) -> None:
    pipe, call = build(mode)
    ways: list[list[torch.Tensor]] = []
    for options in ({"guidance_interval": (0.5, 1)}, {"guidance_scale": 1.0}, {}):
        way: list[torch.Tensor] = []
        run(
            pipe, call | options, callback=lambda _, __, latents, way=way: way.append(latents.clone()), callback_steps=1
        )
        ways.append(way)
    late, never, always = ways
    assert [same(mode, *pair) for pair in zip(late, never, strict=True)] == [True, True, False, False]
    assert not any(same(mode, *pair) for pair in zip(late, always, strict=True))


def test_the_interval_counts_the_steps_that_strength_leaves_out(
    modes: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where guidance matters is a matter of the noise that is left, not of where a run began."""
    pipe = modes("Img2Img")
    rows = rows_seen(pipe.unet, monkeypatch)
    call = {**call_of("Img2Img"), "num_inference_steps": 10, "strength": 0.5}
    run(pipe, call, guidance_interval=(0.2, 0.7))
    assert rows == [2, 2, 1, 1, 1]


@pytest.mark.parametrize("name", ["HeunDiscreteScheduler", "KDPM2DiscreteScheduler"])
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_both_visits_of_a_step_are_guided_or_none(
    modes: Callable[[str], Any], name: str, strength: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = modes("Img2Img")
    pipe.scheduler = getattr(kandinsky22, name).from_config(pipe.scheduler.config)
    rows = rows_seen(pipe.unet, monkeypatch)
    run(pipe, {**call_of("Img2Img"), "strength": strength}, guidance_interval=(0.5, 0.75))
    assert rows == [1, 1, 1, 1, 2, 2, 1][-7 if strength == 1 else -3 :]


def test_batches_with_options_equal_single_calls(decoder: Any) -> None:
    options = {"guidance_rescale": 0.5, "guidance_interval": (0.25, 1), "guidance_threshold": 0.95}
    both = {**SMALL, "image_embeds": embeds(2, 1), "negative_image_embeds": embeds(2, 2)}
    together = decoder(**both, **options, generator=[seeded(0), seeded(1)]).images
    for row in range(2):
        one = {name: value[row : row + 1] if "embeds" in name else value for name, value in both.items()}
        assert difference(decoder(**one, **options, generator=seeded(row)).images, together[row : row + 1]) < 1e-4


def test_the_rescaled_network_output_is_the_references(
    decoder: Any, oracles: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where guidance is strongest: what the scheduler is given, step by step, by way of the reference's function."""
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    outputs: list[torch.Tensor] = []
    denoise, step = decoder.unet.denoise, decoder.scheduler.step

    def seen(*given: Any) -> torch.Tensor:
        outputs.append(denoise(*given))
        return outputs[-1]

    def checked(output: torch.Tensor, timestep: Any, sample: torch.Tensor, **options: Any) -> Any:
        negative, positive = (half[:, :4] for half in outputs[-1].chunk(2))
        expected = rescale_noise_cfg(negative + 4 * (positive - negative), positive, guidance_rescale=0.7)
        assert difference(output[:, :4], expected) < 1e-6
        return step(output, timestep, sample, **options)

    monkeypatch.setattr(decoder.unet, "denoise", seen)
    monkeypatch.setattr(type(decoder.scheduler), "step", lambda self, *given, **options: checked(*given, **options))
    run(decoder, call_of(""), guidance_rescale=0.7)
    assert len(outputs) == 4


def test_a_callback_may_change_the_scale_within_an_interval(decoder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_seen(decoder.unet, monkeypatch)

    def switch(pipe: Any, step: int, timestep: Any, tensors: Any) -> None:
        pipe._guidance_scale = 1.0 if step == 2 else 3.0

    run(decoder, call_of(""), guidance_interval=(0.25, 1), callback_on_step_end=switch)
    assert rows == [1, 2, 2, 1]


def test_networks_are_bound_anew_where_guidance_begins_and_ends(decoder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    encode = decoder.unet.encode_condition
    monkeypatch.setattr(
        decoder.unet,
        "encode_condition",
        lambda **given: calls.append(len(given["image_embeds"])) or encode(**given),
    )
    run(decoder, {**call_of(""), "num_inference_steps": 8}, guidance_interval=(0.25, 0.75))
    assert calls == [1, 2, 1]


def test_mixtures_have_the_options_too(prior: Any) -> None:
    call = {"images_and_prompts": ["a cat", embeds(1, 3)], "weights": [0.4, 0.6], "num_inference_steps": 4}
    plain = prior.interpolate(**call, generator=seeded(0)).image_embeds
    assert torch.equal(prior.interpolate(**call, generator=seeded(0), guidance_interval=(0, 1)).image_embeds, plain)
    for options in ACTING:
        assert difference(prior.interpolate(**call, generator=seeded(0), **options).image_embeds, plain) > 1e-4


# Prior and decoder as one


def combined_call(mode: str) -> dict[str, Any]:
    call = {"prompt": "a red cat", "prior_num_inference_steps": 4, **SMALL}
    if mode == "Img2ImgCombined":
        call |= {"image": photo(3), "strength": 1.0}
    return call | ({"image": photo(3), "mask_image": box()} if mode == "InpaintCombined" else {})


@pytest.fixture
def joined(combined: Any, prior: Any, modes: Callable[[str], Any]) -> Callable[[str], Any]:
    """The pipelines that hold prior and decoder, by mode."""

    def made(mode: str) -> Any:
        if mode == "Combined":
            return combined
        parts = modes("Inpaint" if mode == "InpaintCombined" else "Img2Img").components
        pipe = getattr(kandinsky22, f"KandinskyV22{mode}Pipeline")(
            **parts, **{f"prior_{name}": part for name, part in prior.components.items()}
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return made


@pytest.mark.parametrize("mode", COMBINED)
def test_each_stage_has_options_of_its_own(
    joined: Callable[[str], Any], mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = joined(mode)
    early, late = rows_seen(pipe.prior_prior, monkeypatch), rows_seen(pipe.unet, monkeypatch)
    call = combined_call(mode)
    plain = run(pipe, call)
    for options in ACTING:
        for prefix in ("", "prior_"):
            changed = run(pipe, call, **{prefix + name: value for name, value in options.items()})
            assert difference(changed, plain) > 1e-5, prefix
    early.clear(), late.clear()
    run(pipe, call, guidance_interval=(0.5, 1), prior_guidance_interval=(0, 0.5))
    assert (early, late) == ([2, 2, 1, 1], [1, 1, 2, 2])


# Arguments


@pytest.mark.parametrize("mode", [*ALONE, *COMBINED])
def test_the_specifications_arguments_keep_their_places(mode: str) -> None:
    """Ours come after them."""
    kind = getattr(kandinsky22, f"KandinskyV22{mode}Pipeline")
    names = list(inspect.signature(kind.__call__).parameters)
    wanted = [*OPTIONS, *STEPS]
    if mode in COMBINED:
        wanted = [*OPTIONS, *(f"prior_{name}" for name in OPTIONS), *STEPS, *(f"prior_{name}" for name in STEPS)]
    assert names[-len(wanted) :] == wanted


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
def test_values_are_refused_before_any_network_runs(build: Any, joined: Callable[[str], Any], options: Any) -> None:
    name = next(iter(options))
    for mode in ALONE:
        pipe, call = build(mode)
        with pytest.raises(InputError, match=f"{name}="):
            run(pipe, call, **options)
    for mode in COMBINED:
        pipe = joined(mode)
        with pytest.raises(InputError, match=f"^{name}="):
            run(pipe, combined_call(mode), **options)
        with pytest.raises(InputError, match=f"of the prior.*{name}="):
            run(pipe, combined_call(mode), **{f"prior_{name}": options[name]})


@pytest.mark.usefixtures("no_network_runs")
def test_thresholds_need_a_scheduler_that_tells_clean_samples(decoder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(decoder.scheduler, "alphas_cumprod")
    with pytest.raises(InputError, match="guidance_threshold: DDPMScheduler"):
        run(decoder, call_of(""), guidance_threshold=0.9)


def test_cached_features_do_not_outlive_a_change_of_guidance(decoder: Any) -> None:
    """Where guidance begins or ends all levels run: kept features are those of another batch, or of long ago."""
    decoder.enable_feature_caching(every=4)
    call = {**call_of(""), "num_inference_steps": 6}
    kept: list[torch.Tensor] = []
    inner = decoder.unet.mid_block.forward

    def counted(features: torch.Tensor, *rest: Any) -> torch.Tensor:
        kept.append(features)
        return inner(features, *rest)

    decoder.unet.mid_block.forward = counted
    run(decoder, call, guidance_interval=(0.3, 0.6))
    assert [len(features) for features in kept] == [1, 2, 1]
