"""Schedulers of anyone's in our pipelines: what works, what is refused by name, and steps that are given by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from tests.pipelines.test_schedulers import SMALL, given
from tests.pipelines.tiny import PRIOR_SCHEDULER, difference, seeded

import kandinsky22
from kandinsky22 import InputError, schedulers

# Of the reference's, those that it can use itself on a system like this one, or could if they left its variance alone.
THEIRS = [
    "CMStochasticIterativeScheduler",
    "CogVideoXDDIMScheduler",
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EDMDPMSolverMultistepScheduler",
    "EDMEulerScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "IPNDMScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "SASolverScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
]
NOT_OF_CLEAN_SAMPLES = {
    "EDMDPMSolverMultistepScheduler",
    "EDMEulerScheduler",
    "EulerAncestralDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
}
OURS = sorted({*schedulers.__all__} - {"Scheduler", "SchedulerOutput", "UnCLIPScheduler"})
V_LEARNED = {"prediction_type": "v_prediction", "variance_type": "learned_range"}


def draw(pipe: Any, steps: int = 4, **options: Any) -> torch.Tensor:
    """What a prior or decoder makes of one seed."""
    if isinstance(pipe, kandinsky22.KandinskyV22PriorPipeline):
        return pipe("a red square", num_inference_steps=steps, generator=seeded(0), **options).image_embeds
    return pipe(**given(""), **{**SMALL, "num_inference_steps": steps}, generator=seeded(0), **options).images


@pytest.mark.parametrize("name", THEIRS)
@pytest.mark.parametrize("settings", [{}, V_LEARNED], ids=["file", "velocity"])
def test_schedulers_of_the_reference_draw(decoder: Any, name: str, settings: dict[str, Any]) -> None:
    pipe = decoder
    pipe.scheduler = getattr(diffusers, name).from_config({**pipe.scheduler.config, **settings})
    results = [draw(pipe), draw(pipe)]
    assert torch.isfinite(results[0]).all() and torch.equal(*results)


@pytest.mark.parametrize("name", [name for name in THEIRS if name not in NOT_OF_CLEAN_SAMPLES])
def test_schedulers_of_the_reference_make_embeddings(prior: Any, name: str) -> None:
    prior.scheduler = getattr(diffusers, name).from_config(dict(prior.scheduler.config))
    results = [draw(prior), draw(prior)]
    assert torch.isfinite(results[0]).all() and torch.equal(*results)


@pytest.mark.parametrize(
    "name",
    [
        *("DDIMScheduler", "DDPMScheduler", "DEISMultistepScheduler", "DPMSolverMultistepScheduler"),
        *("DPMSolverSinglestepScheduler", "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler"),
        *("HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "LCMScheduler", "UniPCMultistepScheduler"),
    ],
)
@pytest.mark.parametrize("settings", [{}, V_LEARNED], ids=["file", "velocity"])
def test_ours_and_theirs_draw_the_same(decoder: Any, name: str, settings: dict[str, Any]) -> None:
    """In our loop, with the noise drawn from the same generator; learned variances are on in the file."""
    config = {**decoder.scheduler.config, **settings}
    assert config["variance_type"] == "learned_range"
    results = []
    for kinds in (kandinsky22, diffusers):
        decoder.scheduler = getattr(kinds, name).from_config(config)
        results.append(draw(decoder, 5))
    assert difference(*results) < 2e-4 * float(results[0].abs().max())


@pytest.mark.parametrize("sde", ["sde-dpmsolver++", "dpmsolver++"])
def test_variances_are_kept_from_those_that_expect_pixels(decoder: Any, sde: str) -> None:
    """Noise drawn on the way is that of the same generator in whichever shape, for batches with generators too."""
    config = {**decoder.scheduler.config, "algorithm_type": sde}
    call = {**given(""), **SMALL, "num_images_per_prompt": 2}
    results = []
    for kinds in (kandinsky22, diffusers):
        decoder.scheduler = kinds.DPMSolverMultistepScheduler.from_config(config)
        results.append(decoder(**call, generator=[seeded(0), seeded(1)]).images)
    assert difference(*results) < 2e-4 * float(results[0].abs().max())


UNUSABLE = [
    ("decoder", "KarrasVeScheduler", {}, "a step.*sample"),
    ("decoder", "RePaintScheduler", {}, "a step"),
    ("decoder", "SCMScheduler", {}, "num_inference_steps=4"),
    ("decoder", "PNDMScheduler", {"num_inference_steps": 2}, "num_inference_steps=2"),
    ("prior", "UnCLIPScheduler", {"num_inference_steps": 1}, "num_inference_steps=1.*ZeroDivision"),
    *(("prior", name, {}, "a step") for name in sorted(NOT_OF_CLEAN_SAMPLES)),
    ("prior", "DPMSolverMultistepScheduler", {"num_inference_steps": -3}, "num_inference_steps=-3"),
    ("decoder", "EulerDiscreteScheduler", {"timesteps": [10, 500], "sigmas": [3.0, 1.0]}, "timesteps and sigmas"),
    ("decoder", "LMSDiscreteScheduler", {"timesteps": [500, 10]}, "timesteps: LMSDiscreteScheduler takes none"),
]


@pytest.mark.usefixtures("no_network_runs")
@pytest.mark.parametrize(("stage", "name", "call", "message"), UNUSABLE, ids=lambda value: str(value)[:40])
def test_what_a_scheduler_cannot_do_is_said_before_networks_run(
    prior: Any, decoder: Any, stage: str, name: str, call: dict[str, Any], message: str
) -> None:
    pipe = {"prior": prior, "decoder": decoder}[stage]
    pipe.scheduler = getattr(diffusers, name).from_config(dict(pipe.scheduler.config))
    with pytest.raises(InputError, match=message):
        draw(pipe, call.get("num_inference_steps", 4), **{k: v for k, v in call.items() if k != "num_inference_steps"})


class Plain:
    """The least that a scheduler may be: no generator, no order, no learned variance, no alphas."""

    def __init__(self) -> None:
        self.config = type("Config", (), {"prediction_type": "sample"})()
        self.init_noise_sigma = 1.0
        self.timesteps = torch.zeros(0)

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        self.timesteps = torch.arange(num_inference_steps, device=device).flip(0)

    def scale_model_input(self, sample: torch.Tensor, timestep: Any) -> torch.Tensor:
        return sample

    def step(self, output: torch.Tensor, timestep: Any, sample: torch.Tensor, return_dict: bool = True) -> Any:
        assert output.shape == sample.shape and not return_dict
        return (sample + (output - sample) / (float(timestep) + 1),)


def test_the_least_protocol_is_enough_everywhere(prior: Any, decoder: Any) -> None:
    for pipe in (prior, decoder):
        pipe.scheduler = Plain()
        assert torch.isfinite(draw(pipe)).all()


def test_trying_a_scheduler_leaves_it_and_the_generators_alone(decoder: Any) -> None:
    decoder.scheduler = diffusers.EulerAncestralDiscreteScheduler.from_config(dict(decoder.scheduler.config))
    torch.manual_seed(5)
    state = torch.get_rng_state()
    decoder(**given(""), **SMALL, generator=seeded(0))
    assert torch.equal(torch.get_rng_state(), state)


# One and two steps


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("steps", [1, 2])
def test_one_and_two_steps(prior: Any, decoder: Any, name: str, steps: int) -> None:
    kind = getattr(kandinsky22, name)
    own = decoder.scheduler.config
    for settings in ({}, V_LEARNED):
        decoder.scheduler = kind.from_config({**own, **settings})
        assert torch.isfinite(draw(decoder, steps)).all()
    prior.scheduler = kind.from_config(prior.scheduler.config)
    embeds = draw(prior, steps)
    assert torch.isfinite(embeds).all()
    assert float(embeds.abs().max()) < 100


# Fast solvers of the prior


def gaussian_prior(prior: Any, monkeypatch: pytest.MonkeyPatch, mean: torch.Tensor, spread: torch.Tensor) -> None:
    """The prior's network replaced by the best one for embeddings that are normally distributed, number by number."""
    table = kandinsky22.UnCLIPScheduler(**PRIOR_SCHEDULER).alphas_cumprod.double()

    def best(sample: torch.Tensor, timestep: Any, condition: Any) -> torch.Tensor:
        kept = float(np.interp(float(timestep), np.arange(len(table)), table.numpy()))
        gain = kept**0.5 * spread**2 / (kept * spread**2 + 1 - kept)
        return mean + gain * (sample - kept**0.5 * mean)

    monkeypatch.setattr(prior.prior, "denoise", best)
    monkeypatch.setattr(prior.prior, "post_process_latents", lambda latents: latents)


@pytest.mark.parametrize(
    ("name", "settings", "bounds"),
    [
        ("DPMSolverMultistepScheduler", {}, {5: 0.3, 10: 0.1, 25: 0.015}),
        ("DPMSolverMultistepScheduler", {"timestep_spacing": "trailing"}, {5: 0.3, 10: 0.1, 25: 0.015}),
        ("UniPCMultistepScheduler", {}, {5: 0.25, 10: 0.1, 25: 0.015}),
        ("DEISMultistepScheduler", {}, {5: 0.4, 10: 0.12, 25: 0.03}),
        ("LMSDiscreteScheduler", {}, {5: 0.5, 10: 0.12, 25: 0.03}),
        ("DDIMScheduler", {"clip_sample": False, "timestep_spacing": "trailing"}, {5: 0.6, 10: 0.35, 25: 0.15}),
    ],
)
def test_fast_solvers_of_the_prior_follow_the_exact_solution(
    prior: Any, monkeypatch: pytest.MonkeyPatch, name: str, settings: dict[str, Any], bounds: dict[int, float]
) -> None:
    """From noise z the probability flow ends at mean + spread z; bounds are on the largest error of a number."""
    dim = prior.prior.config.embedding_dim
    mean, spread = torch.linspace(-1, 1, dim), torch.linspace(0.3, 0.9, dim)
    gaussian_prior(prior, monkeypatch, mean, spread)
    prior.scheduler = getattr(kandinsky22, name).from_config(prior.scheduler.config, **settings)
    noise = torch.randn(1, dim, generator=seeded(3))
    errors = {}
    for steps, bound in bounds.items():
        made = prior("a cat", num_inference_steps=steps, latents=noise, guidance_scale=1.0).image_embeds
        errors[steps] = float((made - (mean + spread * noise)).abs().max())
        assert errors[steps] < bound, errors


# Steps given by hand


def pace(pipe: Any) -> list[float]:
    return pipe.scheduler.timesteps.tolist()


@pytest.mark.parametrize("name", [*OURS, "UnCLIPScheduler"])
def test_timesteps_given_by_hand(decoder: Any, prior: Any, name: str) -> None:
    pipe = prior if name == "UnCLIPScheduler" else decoder
    kind = getattr(kandinsky22, name)
    pipe.scheduler = kind.from_config(pipe.scheduler.config)
    wanted = [999, 850, 500, 120, 3]
    made = draw(pipe, 100, timesteps=wanted)
    assert torch.isfinite(made).all()
    between = name in ("KDPM2DiscreteScheduler", "PNDMScheduler")  # which visit timesteps between them too
    assert set(wanted) <= set(pace(pipe)) if between else list(dict.fromkeys(pace(pipe))) == wanted
    assert torch.equal(draw(pipe, 100, timesteps=torch.tensor(wanted)), made)


def test_the_same_timesteps_by_number_or_by_hand(decoder: Any) -> None:
    by_number = draw(decoder, 4)
    assert torch.equal(draw(decoder, 100, timesteps=pace(decoder)), by_number)


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "HeunDiscreteScheduler"])
def test_levels_given_by_hand(decoder: Any, name: str) -> None:
    decoder.scheduler = getattr(kandinsky22, name).from_config(decoder.scheduler.config)
    levels = [10.0, 4.0, 1.0, 0.2, 0.0]
    made = draw(decoder, sigmas=levels)
    assert torch.isfinite(made).all()
    assert sorted({round(level, 4) for level in decoder.scheduler.sigmas.tolist()}, reverse=True) == levels
    assert difference(made, draw(decoder)) > 1e-4


def test_strength_leaves_out_the_first_of_them(modes: Callable[[str], Any]) -> None:
    pipe = modes("Img2Img")
    seen: list[int] = []
    pipe(
        **{**SMALL, **given("Img2Img"), "strength": 0.5},
        timesteps=[900, 600, 300, 10],
        generator=seeded(0),
        callback=lambda step, timestep, latents: seen.append(int(timestep)),
        callback_steps=1,
    )
    assert seen == [300, 10]


def test_both_stages_have_their_own(combined: Any) -> None:
    early: list[int] = []
    late: list[int] = []

    def note(seen: list[int]) -> Callable[..., None]:
        return lambda pipe, step, timestep, tensors: seen.append(int(timestep))

    combined(
        "a cat",
        **SMALL,
        timesteps=[800, 200],
        prior_timesteps=[700, 400, 100],
        callback_on_step_end=note(late),
        prior_callback_on_step_end=note(early),
    )
    assert (early, late) == ([700, 400, 100], [800, 200])


@pytest.mark.usefixtures("no_network_runs")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"timesteps": []}, "timesteps="),
        ({"timesteps": [10, 500]}, "timesteps="),
        ({"timesteps": [500, 500]}, "timesteps="),
        ({"timesteps": [1000, 3]}, "timesteps"),
        ({"timesteps": [3.5, 1]}, "timesteps="),
        ({"timesteps": 5}, "timesteps"),
        ({"timesteps": "fast"}, "timesteps="),
        ({"sigmas": [3.0, 0.0]}, "sigmas: DDPMScheduler takes none"),
        ({"sigmas": [3.0, 0.0], "timesteps": [3]}, "timesteps and sigmas"),
        ({"timesteps": [5, 3], "num_inference_steps": 0}, "num_inference_steps=0"),
    ],
    ids=str,
)
def test_steps_that_make_no_sense_are_refused(decoder: Any, prior: Any, call: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        decoder(**{**given(""), **SMALL, **call})
    with pytest.raises(InputError, match=message.replace("DDPM", "UnCLIP")):
        prior("a cat", **call)
