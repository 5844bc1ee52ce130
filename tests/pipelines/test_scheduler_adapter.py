"""Schedulers of both libraries in our pipelines: which work, which are refused by name, and custom steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from tests.pipelines.calls import SMALL_LATENTS, inputs
from tests.pipelines.tiny import PRIOR_SCHEDULER, difference, seeded

import kandinsky22
from kandinsky22 import InputError, schedulers
from kandinsky22.sampling.scheduler_adapter import TimestepOptions, TimestepSchedule, schedule_timesteps

# Schedulers of the reference that its own pipelines support, or would if they dropped the learned variance.
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
WITHOUT_CLEAN_SAMPLES = {
    "EDMDPMSolverMultistepScheduler",
    "EDMEulerScheduler",
    "EulerAncestralDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
}
OURS = sorted({*schedulers.__all__} - {"Scheduler", "SchedulerOutput", "UnCLIPScheduler"})
V_LEARNED = {"prediction_type": "v_prediction", "variance_type": "learned_range"}


def generate(pipe: Any, steps: int = 4, **options: Any) -> torch.Tensor:
    """Return what a prior or decoder generates from one seed."""
    if isinstance(pipe, kandinsky22.KandinskyV22PriorPipeline):
        return pipe("a red square", num_inference_steps=steps, generator=seeded(0), **options).image_embeds
    return pipe(**inputs(""), **{**SMALL_LATENTS, "num_inference_steps": steps}, generator=seeded(0), **options).images


@pytest.mark.parametrize("name", THEIRS)
@pytest.mark.parametrize("settings", [{}, V_LEARNED], ids=["file", "velocity"])
def test_schedulers_of_the_reference_draw(decoder: Any, name: str, settings: dict[str, Any]) -> None:
    pipe = decoder
    pipe.scheduler = getattr(diffusers, name).from_config({**pipe.scheduler.config, **settings})
    results = [generate(pipe), generate(pipe)]
    assert torch.isfinite(results[0]).all() and torch.equal(*results)


@pytest.mark.parametrize("name", [name for name in THEIRS if name not in WITHOUT_CLEAN_SAMPLES])
def test_schedulers_of_the_reference_make_embeddings(prior: Any, name: str) -> None:
    prior.scheduler = getattr(diffusers, name).from_config(dict(prior.scheduler.config))
    results = [generate(prior), generate(prior)]
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
def test_schedulers_of_both_libraries_give_equal_samples(decoder: Any, name: str, settings: dict[str, Any]) -> None:
    """Both run in our loop with noise from the same generator; the file asks for a learned variance."""
    config = {**decoder.scheduler.config, **settings}
    assert config["variance_type"] == "learned_range"
    results = []
    for kinds in (kandinsky22, diffusers):
        decoder.scheduler = getattr(kinds, name).from_config(config)
        results.append(generate(decoder, 5))
    assert difference(*results) < 2e-4 * float(results[0].abs().max())


@pytest.mark.parametrize("sde", ["sde-dpmsolver++", "dpmsolver++"])
def test_learned_variances_are_dropped_for_rgb_schedulers(decoder: Any, sde: str) -> None:
    """The noise drawn while sampling does not depend on the reshaping, with one generator per item too."""
    config = {**decoder.scheduler.config, "algorithm_type": sde}
    call = {**inputs(""), **SMALL_LATENTS, "num_images_per_prompt": 2}
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
    *(("prior", name, {}, "a step") for name in sorted(WITHOUT_CLEAN_SAMPLES)),
    ("prior", "DPMSolverMultistepScheduler", {"num_inference_steps": -3}, "num_inference_steps=-3"),
    ("decoder", "EulerDiscreteScheduler", {"timesteps": [10, 500], "sigmas": [3.0, 1.0]}, "timesteps and sigmas"),
    (
        "decoder",
        "LMSDiscreteScheduler",
        {"timesteps": [500, 10]},
        r"timesteps=\[500, 10\] is invalid: expected None, since LMSDiscreteScheduler",
    ),
]


@pytest.mark.usefixtures("no_network_runs")
@pytest.mark.parametrize(("stage", "name", "call", "message"), UNUSABLE, ids=lambda value: str(value)[:40])
def test_unsupported_schedules_are_refused_before_networks_run(
    prior: Any, decoder: Any, stage: str, name: str, call: dict[str, Any], message: str
) -> None:
    pipe = {"prior": prior, "decoder": decoder}[stage]
    pipe.scheduler = getattr(diffusers, name).from_config(dict(pipe.scheduler.config))
    with pytest.raises(InputError, match=message):
        generate(
            pipe, call.get("num_inference_steps", 4), **{k: v for k, v in call.items() if k != "num_inference_steps"}
        )


class MinimalScheduler:
    """A scheduler with the required methods only: no generator, order, learned variance or alphas."""

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


def test_minimal_schedulers_work_everywhere(prior: Any, decoder: Any) -> None:
    for pipe in (prior, decoder):
        pipe.scheduler = MinimalScheduler()
        assert torch.isfinite(generate(pipe)).all()


def test_trying_a_scheduler_leaves_it_and_the_generators_alone(decoder: Any) -> None:
    decoder.scheduler = diffusers.EulerAncestralDiscreteScheduler.from_config(dict(decoder.scheduler.config))
    torch.manual_seed(5)
    state = torch.get_rng_state()
    decoder(**inputs(""), **SMALL_LATENTS, generator=seeded(0))
    assert torch.equal(torch.get_rng_state(), state)


# One and two steps


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("steps", [1, 2])
def test_one_and_two_steps(prior: Any, decoder: Any, name: str, steps: int) -> None:
    kind = getattr(kandinsky22, name)
    config = decoder.scheduler.config
    for settings in ({}, V_LEARNED):
        decoder.scheduler = kind.from_config({**config, **settings})
        assert torch.isfinite(generate(decoder, steps)).all()
    prior.scheduler = kind.from_config(prior.scheduler.config)
    embeds = generate(prior, steps)
    assert torch.isfinite(embeds).all()
    assert float(embeds.abs().max()) < 100


# Fast solvers of the prior


def gaussian_prior(prior: Any, monkeypatch: pytest.MonkeyPatch, mean: torch.Tensor, spread: torch.Tensor) -> None:
    """Replace the prior's network by the best one for embeddings of independent normally distributed values."""
    table = kandinsky22.UnCLIPScheduler(**PRIOR_SCHEDULER).alphas_cumprod.double()

    def best(sample: torch.Tensor, timestep: Any, condition: Any) -> torch.Tensor:
        alpha = float(np.interp(float(timestep), np.arange(len(table)), table.numpy()))
        gain = alpha**0.5 * spread**2 / (alpha * spread**2 + 1 - alpha)
        return mean + gain * (sample - alpha**0.5 * mean)

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
    """From noise z the probability flow ends at mean + spread z; bounds are on the largest absolute error."""
    dim = prior.prior.config.embedding_dim
    mean, spread = torch.linspace(-1, 1, dim), torch.linspace(0.3, 0.9, dim)
    gaussian_prior(prior, monkeypatch, mean, spread)
    prior.scheduler = getattr(kandinsky22, name).from_config(prior.scheduler.config, **settings)
    noise = torch.randn(1, dim, generator=seeded(3))
    errors = {}
    for steps, bound in bounds.items():
        result = prior("a cat", num_inference_steps=steps, latents=noise, guidance_scale=1.0).image_embeds
        errors[steps] = float((result - (mean + spread * noise)).abs().max())
        assert errors[steps] < bound, errors


# Custom steps


def schedule_of(pipe: Any, steps: int = 100, **custom: Any) -> TimestepSchedule:
    """The schedule that a call with these options makes; the pipeline's own scheduler stays as it is."""
    options = TimestepOptions(steps, custom.get("timesteps"), custom.get("sigmas"))
    return schedule_timesteps(pipe.scheduler, options, shape=(1, 4, 8, 8), device=torch.device("cpu"))


@pytest.mark.parametrize("name", [*OURS, "UnCLIPScheduler"])
def test_custom_timesteps_are_followed(decoder: Any, prior: Any, name: str) -> None:
    pipe = prior if name == "UnCLIPScheduler" else decoder
    kind = getattr(kandinsky22, name)
    pipe.scheduler = kind.from_config(pipe.scheduler.config)
    requested = [999, 850, 500, 120, 3]
    result = generate(pipe, 100, timesteps=requested)
    assert torch.isfinite(result).all()
    # These also evaluate at timesteps in between.
    between = name in ("DPMSolverSDEScheduler", "PNDMScheduler") or name.startswith("KDPM2")
    evaluated = schedule_of(pipe, timesteps=requested).timesteps.tolist()
    assert set(requested) <= set(evaluated) if between else list(dict.fromkeys(evaluated)) == requested
    assert torch.equal(generate(pipe, 100, timesteps=torch.tensor(requested)), result)


def test_custom_timesteps_equal_the_same_step_count(decoder: Any) -> None:
    by_number = generate(decoder, 4)
    timesteps = schedule_of(decoder, 4).timesteps.tolist()
    assert torch.equal(generate(decoder, 100, timesteps=timesteps), by_number)


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "HeunDiscreteScheduler"])
def test_custom_sigmas_are_followed(decoder: Any, name: str) -> None:
    decoder.scheduler = getattr(kandinsky22, name).from_config(decoder.scheduler.config)
    sigmas = [10.0, 4.0, 1.0, 0.2, 0.0]
    result = generate(decoder, sigmas=sigmas)
    assert torch.isfinite(result).all()
    evaluated = schedule_of(decoder, sigmas=sigmas).scheduler.sigmas.tolist()
    assert sorted({round(sigma, 4) for sigma in evaluated}, reverse=True) == sigmas
    assert difference(result, generate(decoder)) > 1e-4


def test_strength_leaves_out_the_first_of_them(make_pipeline: Callable[[str], Any]) -> None:
    pipe = make_pipeline("Img2Img")
    visited: list[int] = []
    pipe(
        **{**SMALL_LATENTS, **inputs("Img2Img"), "strength": 0.5},
        timesteps=[900, 600, 300, 10],
        generator=seeded(0),
        callback=lambda step, timestep, latents: visited.append(int(timestep)),
        callback_steps=1,
    )
    assert visited == [300, 10]


def test_stages_have_separate_custom_timesteps(combined: Any) -> None:
    early: list[int] = []
    late: list[int] = []

    def note(visited: list[int]) -> Callable[..., None]:
        return lambda pipe, step, timestep, tensors: visited.append(int(timestep))

    combined(
        "a cat",
        **SMALL_LATENTS,
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
        ({"sigmas": [3.0, 0.0]}, r"sigmas=\[3.0, 0.0\] is invalid: expected None, since DDPMScheduler"),
        ({"sigmas": [3.0, 0.0], "timesteps": [3]}, "timesteps and sigmas"),
        ({"timesteps": [5, 3], "num_inference_steps": 0}, "num_inference_steps=0"),
    ],
    ids=str,
)
def test_invalid_steps_are_refused(decoder: Any, prior: Any, call: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        decoder(**{**inputs(""), **SMALL_LATENTS, **call})
    with pytest.raises(InputError, match=message.replace("DDPM", "UnCLIP")):
        prior("a cat", **call)
