"""Fast solvers compared with closed-form solutions for normally distributed data (see `gaussian`)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tests.unit.gaussian import MEAN, SPREAD, best_prediction, flow, make_scheduler, reverse_diffusion_mean
from torch import Tensor

import kandinsky22.schedulers as schedulers
from kandinsky22.errors import ConfigError, InputError
from kandinsky22.schedulers.base import Scheduler
from kandinsky22.schedulers.exponential_integrator import phi_ratios
from kandinsky22.schedulers.sigmas import SigmaScheduler, VarianceExplodingScheduler, beta_quantiles

SOLVERS = sorted(
    {*schedulers.__all__} - {"Scheduler", "SchedulerOutput", "DDIMScheduler", "DDPMScheduler", "UnCLIPScheduler"}
)
OF_SIGMAS = sorted(name for name in SOLVERS if issubclass(getattr(schedulers, name), SigmaScheduler))
TAKES_NOISE = {
    "DPMSolverSDEScheduler",
    "EulerAncestralDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "LCMScheduler",
}


def sigma_at(scheduler: Any, index: int) -> float:
    return float(scheduler.sigmas[index])


def follow(scheduler: Any, sample: Tensor, **options: Any) -> list[Tensor]:
    """Return the variance-preserving samples before and after every step of a scheduler of sigmas."""
    exploding = isinstance(scheduler, VarianceExplodingScheduler)
    samples = [sample]
    kind = scheduler.config.prediction_type
    if exploding:
        sample = sample * math.hypot(sigma_at(scheduler, 0), 1)
    for index, timestep in enumerate(scheduler.timesteps):
        model_input = scheduler.scale_model_input(sample, timestep)
        output = best_prediction(model_input, sigma_at(scheduler, index), kind)
        sample = scheduler.step(output, timestep, sample, **options).prev_sample
        samples.append(sample / math.hypot(sigma_at(scheduler, index + 1), 1) if exploding else sample)
    return samples


def order_of(
    build: Callable[[], Any], solution: Callable[..., Tensor] = flow, without_warm_up: bool = False, **options: Any
) -> float:
    """Measure the order of convergence of the largest error on the trajectory, with steps evenly spaced in lambda.

    Multistep methods start with lower orders. Tiny steps at the beginning make these errors negligible, so that the
    method's own order is measured. `without_warm_up` leaves them out, for methods whose steps are groups of sigmas.
    """
    errors, counts = [], (48, 96)
    start = torch.linspace(-2, 2, 9, dtype=torch.float64).reshape(1, 1, 3, 3)
    for count in counts:
        scheduler = build()
        length = math.log(8 / 0.1) / count
        tiny = [] if without_warm_up else [index * 0.1 * length**2 for index in range(4)]
        lambdas = [*tiny, *(len(tiny) * 0.1 * length**2 + index * length for index in range(count + 1))]
        scheduler.set_timesteps(sigmas=[8 * math.exp(-each) for each in lambdas])
        first = sigma_at(scheduler, 0)
        stride = 6 * getattr(scheduler, "order", 1)  # positions where steps of every order end
        samples = list(enumerate(follow(scheduler, start, **options)))[len(tiny) * scheduler.order :: stride]
        errors.append(max(float((x - solution(start, first, sigma_at(scheduler, k))).abs().max()) for k, x in samples))
    return math.log2(errors[0] / errors[1])


def dpm(kind: str, order: int, solver: str = "midpoint") -> tuple[str, dict[str, Any]]:
    final = {"algorithm_type": kind, "solver_order": order, "solver_type": solver, "final_sigmas_type": "sigma_min"}
    return "DPMSolverMultistepScheduler", final


def single(kind: str, order: int, solver: str) -> tuple[str, dict[str, Any]]:
    return "DPMSolverSinglestepScheduler", dpm(kind, order, solver)[1]


def unipc(order: int, **more: Any) -> tuple[str, dict[str, Any]]:
    return "UniPCMultistepScheduler", {"solver_order": order, "lower_order_final": False, **more}


BOTH = ("dpmsolver", "dpmsolver++")
UNCORRECTED = {"disable_corrector": list(range(100))}
ORDERS = [
    *((dpm(kind, 1), 1) for kind in BOTH),
    *((dpm(kind, 2, solver), 2) for kind in BOTH for solver in ("midpoint", "heun")),
    *((dpm(kind, 3), 2) for kind in BOTH),  # as published, with half of the second difference
    *((single(kind, 1, "heun"), 1) for kind in BOTH),
    *((single(kind, 2, solver), 2) for kind in BOTH for solver in ("midpoint", "heun")),
    *((single(kind, 3, solver), 3) for kind in BOTH for solver in ("midpoint", "heun")),
    *((unipc(order, solver_type=solver), order + 1) for order in (1, 2, 3) for solver in ("bh1", "bh2")),
    *((unipc(order, predict_x0=False), order + 1) for order in (1, 2, 3)),
    *((unipc(order, **UNCORRECTED), order) for order in (1, 2, 3)),
    *((("DEISMultistepScheduler", {"solver_order": order}), order) for order in (1, 2, 3)),
    (("EulerDiscreteScheduler", {}), 1),
    (("HeunDiscreteScheduler", {}), 2),
    (("KDPM2DiscreteScheduler", {}), 2),
]


@pytest.mark.parametrize(("method", "order"), ORDERS, ids=lambda value: str(value)[:90])
def test_order_of_convergence(method: tuple[str, dict[str, Any]], order: int) -> None:
    measured = order_of(lambda: make_scheduler(method[0], **method[1]), without_warm_up="Single" in method[0])
    assert order - 0.25 < measured < order + 0.6, measured


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_order_of_convergence_of_linear_multistep(order: int) -> None:
    assert order - 0.3 < order_of(lambda: make_scheduler("LMSDiscreteScheduler"), order=order) < order + 0.8


@pytest.mark.parametrize(
    ("method", "order"),
    [(dpm("sde-dpmsolver", 1), 1), *((dpm("sde-dpmsolver", 2, solver), 2) for solver in ("midpoint", "heun"))],
    ids=str,
)
def test_order_of_convergence_of_the_mean(method: tuple[str, dict[str, Any]], order: int) -> None:
    """Without its noise, a stochastic method follows the mean, because everything is linear."""
    silent = torch.zeros(1, 1, 3, 3, dtype=torch.float64)
    measured = order_of(lambda: make_scheduler(method[0], **method[1]), reverse_diffusion_mean, variance_noise=silent)
    assert order - 0.25 < measured < order + 0.6, measured


@pytest.mark.parametrize(
    "method", [*(dpm("sde-dpmsolver++", order) for order in (1, 2, 3)), single("", 3, "heun")], ids=str
)
def test_the_mean_of_clean_samples_is_followed_exactly(
    method: tuple[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The estimate of the clean sample is constant in the mean, and therefore every order is exact."""
    monkeypatch.setattr("kandinsky22.schedulers.dpm_solver.randn_tensor", lambda shape, *_: torch.zeros(tuple(shape)))
    scheduler = make_scheduler(method[0], **{**method[1], "algorithm_type": "sde-dpmsolver++"})
    scheduler.set_timesteps(12)
    start = torch.linspace(-2, 2, 9, dtype=torch.float64).reshape(1, 1, 3, 3)
    end = follow(scheduler, start)[-1]
    torch.testing.assert_close(end, reverse_diffusion_mean(start, sigma_at(scheduler, 0), sigma_at(scheduler, -1)))


@pytest.mark.parametrize("kind", ["dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_steps_integrate_the_polynomial_through_their_predictions(kind: str, order: int) -> None:
    """The third order uses half of the second difference, as published; the reference has a wrong sign there in the
    stochastic case. The integrals of variation of constants are computed by fine summation."""
    of_noise, stochastic = not kind.endswith("++"), kind.startswith("sde")
    scheduler = make_scheduler(*dpm(kind, order)[:1], **dpm(kind, order, "heun")[1], lower_order_final=False)
    scheduler = type(scheduler).from_config(scheduler.config, prediction_type="epsilon" if of_noise else "sample")
    scheduler.set_timesteps(sigmas=[5.0, 3.1, 1.4, 0.9])
    silent = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    lambdas = [-math.log(sigma_at(scheduler, index)) for index in range(4)]
    parabola = [0.7, -0.4, 0.3][:order]
    for index, timestep in enumerate(scheduler.timesteps):
        sample = torch.full((1, 1, 1, 1), 1.3, dtype=torch.float64)
        output = torch.full_like(sample, sum(c * lambdas[index] ** k for k, c in enumerate(parabola)))
        result = float(scheduler.step(output, timestep, sample, variance_noise=silent).prev_sample)
    start, end = lambdas[2:]
    u = start + (np.arange(100_000) + 0.5) / 100_000 * (end - start)
    values = sum(c * u**k for k, c in enumerate(parabola)) - (0.15 * (u - start) ** 2 if order == 3 else 0)
    signals, noises = (
        [f(each) for each in (start, end)]
        for f in (lambda x: (1 + math.exp(-2 * x)) ** -0.5, lambda x: (1 + math.exp(2 * x)) ** -0.5)
    )
    times = 2 if stochastic else 1
    if of_noise:
        carry, kernel = signals[1] / signals[0], -times * signals[1] * np.exp(-u)
    else:
        carry = noises[1] / noises[0] * (math.exp(start - end) if stochastic else 1)
        kernel = times * signals[1] * np.exp(times * (u - end))
    assert result == pytest.approx(carry * 1.3 + float((kernel * values).mean()) * (end - start), rel=1e-8)


@pytest.mark.parametrize("skip", [True, False])
def test_order_of_convergence_of_pseudo_numerical_methods(skip: bool) -> None:
    """The order is two, as in the paper: between timesteps DDIM's formula is exact for constant noise only."""
    errors = []
    for steps in (50, 100, 200):
        scheduler = make_scheduler("PNDMScheduler", skip_prk_steps=skip)
        scheduler.set_timesteps(steps)
        table = ((1 - scheduler.alphas_cumprod.double()) / scheduler.alphas_cumprod.double()) ** 0.5
        order = scheduler.timesteps.tolist()
        sample = begin = torch.linspace(-2, 2, 9, dtype=torch.float64).reshape(1, 1, 3, 3)
        stop = len(order) - 1 - order[::-1].index(200)
        for timestep in order[:stop]:
            output = best_prediction(sample, float(table[timestep]))
            sample = scheduler.step(output, timestep, sample).prev_sample
        expected = flow(begin, float(table[order[0]]), float(table[200]))
        errors.append(float((sample - expected).abs().max()))
    assert 1.6 < math.log2(errors[1] / errors[2]) < 2.4
    assert errors[2] < errors[1] < errors[0] < 1e-3


@pytest.mark.parametrize("index", [0, 3, 8])
def test_an_ancestral_step_draws_from_the_gaussian_posterior(index: int) -> None:
    """Given the clean sample, x at a lower sigma is normal with the summed precisions of both neighbours."""
    scheduler = make_scheduler("EulerAncestralDiscreteScheduler", prediction_type="sample")
    scheduler.set_timesteps(10)
    start, end = sigma_at(scheduler, index), sigma_at(scheduler, index + 1)
    clean, sample = torch.randn(2, 3, 4, 4, dtype=torch.float64), 5 * torch.randn(2, 3, 4, 4, dtype=torch.float64)
    noise = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    t = scheduler.timesteps[index]
    out = scheduler.step(clean, t, sample, generator=torch.Generator().manual_seed(1)).prev_sample
    precisions = 1 / end**2, 1 / (start**2 - end**2)
    mean = (precisions[0] * clean + precisions[1] * sample) / sum(precisions)
    torch.testing.assert_close(out, mean + noise / sum(precisions) ** 0.5)


@pytest.mark.parametrize("name", [name for name in SOLVERS if name not in TAKES_NOISE])
@pytest.mark.parametrize("schedule", ["scaled_linear", "squaredcos_cap_v2"])
def test_samples_do_not_depend_on_the_prediction_type(name: str, schedule: str) -> None:
    """Predictions of noise, clean sample and velocity are equivalent and give equal samples."""
    ends = []
    for kind in ("epsilon", "sample", "v_prediction"):
        scheduler = make_scheduler(name, prediction_type=kind, beta_schedule=schedule)
        scheduler.set_timesteps(7)
        sample = torch.linspace(-2, 2, 12, dtype=torch.float64).reshape(2, 6) * float(scheduler.init_noise_sigma)
        table = ((1 - scheduler.alphas_cumprod.double()) / scheduler.alphas_cumprod.double()) ** 0.5
        for index, timestep in enumerate(scheduler.timesteps):
            model_input = scheduler.scale_model_input(sample, timestep)
            sigma = sigma_at(scheduler, index) if name in OF_SIGMAS else float(table[int(timestep)])
            sample = scheduler.step(best_prediction(model_input, sigma, kind), timestep, sample).prev_sample
        ends.append(sample)
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ends[0], ends[2], rtol=1e-6, atol=1e-6)


def solve(name: str, steps: int, dtype: torch.dtype = torch.float32, **config: Any) -> Tensor:
    """Run a scheduler with the best network for normally distributed data."""
    scheduler = make_scheduler(name, **config)
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn((1, 3, 16, 16), generator=generator, dtype=dtype) * float(scheduler.init_noise_sigma)
    options = {"generator": generator} if name in TAKES_NOISE else {}
    table = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod) ** 0.5
    for timestep in scheduler.timesteps:
        model_input = scheduler.scale_model_input(sample, timestep)
        sigma = float(np.interp(float(timestep), np.arange(1000), table))
        output = best_prediction(model_input, max(sigma, 1e-6), scheduler.config.prediction_type)
        sample = scheduler.step(output.to(dtype), timestep, sample, **options).prev_sample
        assert sample.dtype == dtype
    return sample


@pytest.mark.parametrize("name", [name for name in SOLVERS if name != "LCMScheduler"])
@pytest.mark.parametrize("steps", [1, 2, 3, 40, 1000])
def test_any_number_of_steps_ends_at_the_data(name: str, steps: int) -> None:
    """The reference's UniPC gives NaN at few steps with noise prediction; some schedulers repeat timesteps at 1000."""
    end = solve(name, steps, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    assert torch.isfinite(end).all()
    assert abs(float(end.mean()) - MEAN) < (0.15 if steps > 3 else 0.6)
    if steps > 3:
        assert abs(float(end.std()) - SPREAD) < 0.12


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize(
    "config",
    [
        {"predict_x0": False},
        {"lower_order_final": False},
        {"solver_order": 4, "lower_order_final": False, "predict_x0": False},
        {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min"},
        {"use_exponential_sigmas": True, "final_sigmas_type": "sigma_min", "predict_x0": False},
    ],
)
def test_unipc_is_always_finite(steps: int, config: dict[str, Any]) -> None:
    """In the reference each of these gives NaN, from 0 / 0 or 0 times infinity."""
    end = solve("UniPCMultistepScheduler", steps, **config)
    assert torch.isfinite(end).all()
    if config.get("predict_x0", True):  # a long step with constant noise has a large error
        assert abs(float(end.mean()) - MEAN) < 0.35


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near(name: str, dtype: torch.dtype) -> None:
    near, far = (solve(name, 12, kind, beta_schedule="scaled_linear") for kind in (torch.float32, dtype))
    if name in TAKES_NOISE:
        assert torch.isfinite(far).all()  # noise is drawn in the sample's dtype and differs
    else:
        assert float((near - far.float()).abs().mean()) < 0.05


@pytest.mark.parametrize("name", SOLVERS)
def test_a_learned_variance_is_dropped(name: str) -> None:
    """The reference keeps it, or always keeps three channels."""
    ends = []
    for channels in (8, 4):
        scheduler = make_scheduler(name, beta_schedule="scaled_linear")
        scheduler.set_timesteps(4)
        sample = torch.randn((2, 4, 6, 6), generator=torch.Generator().manual_seed(0))
        options = {"generator": torch.Generator().manual_seed(1)} if name in TAKES_NOISE else {}
        for timestep in scheduler.timesteps:
            scheduler.scale_model_input(sample, timestep)
            output = torch.tanh(torch.cat([sample, sample + 1], dim=1))[:, :channels]
            sample = scheduler.step(output, timestep, sample, **options).prev_sample
        ends.append(sample)
    assert torch.equal(*ends)


# Mathematical functions


def test_beta_quantiles_are_those_of_the_distribution() -> None:
    """Integrals of the density give the quantiles; the substitution x = sin^2(u) removes its poles."""
    probabilities = np.array([0.0, 0.01, 0.2, 0.5, 0.77, 0.999, 1.0])
    quantiles = beta_quantiles(probabilities)
    total = math.gamma(0.6) ** 2 / math.gamma(1.2)
    for quantile, probability in zip(quantiles, probabilities, strict=True):
        edges = np.linspace(0, math.asin(math.sqrt(quantile)), 200_001)
        u = (edges[1:] + edges[:-1]) / 2
        density = 2 * np.sin(u) ** 0.2 * np.cos(u) ** 0.2
        assert float(density.sum() * (edges[1] - edges[0])) / total == pytest.approx(probability, abs=1e-6)


@pytest.mark.parametrize("z", [-40.0, -1.0, -0.999, -1e-9, 1e-9, 0.5, 1.0, 3.0])
def test_phi_functions_are_integrals(z: float) -> None:
    """phi_k(z) is the integral of e^(z (1 - u)) u^(k - 1) / (k - 1)! over u from 0 to 1."""
    u = (np.arange(400_000) + 0.5) / 400_000
    integrals = [float((np.exp(z * (1 - u)) * u**k / math.factorial(k)).mean()) for k in range(4)]
    assert phi_ratios(z, 4) == pytest.approx([value / integrals[0] for value in integrals], rel=1e-7)


# Arguments


@pytest.mark.parametrize("name", OF_SIGMAS)
@pytest.mark.parametrize(
    "sigmas", [[], [1.0], [1.0, 2.0], [2.0, 2.0, 0.0], [1.0, -1.0], [math.inf, 1.0], ["a", "b"], 3.0]
)
def test_invalid_sigmas_are_refused(name: str, sigmas: Any) -> None:
    with pytest.raises(InputError, match=r"sigmas=.*expected two or more"):
        make_scheduler(name).set_timesteps(sigmas=sigmas)


@pytest.mark.parametrize("name", [name for name in OF_SIGMAS if name != "EulerAncestralDiscreteScheduler"])
@pytest.mark.parametrize("arguments", [{"timesteps": [500, 20]}, {"sigmas": [5.0, 0.0]}])
def test_custom_sigmas_exclude_sigma_schedules(name: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"{next(iter(arguments))}=.*expected None.*use_karras_sigmas=True"):
        make_scheduler(name, use_karras_sigmas=True).set_timesteps(**arguments)
    with pytest.raises(InputError, match="exactly one"):
        make_scheduler(name).set_timesteps(5, **arguments)


@pytest.mark.parametrize("name", [name for name in SOLVERS if name != "LCMScheduler"])
def test_steps_outside_the_timesteps_are_refused(name: str) -> None:
    """As in the reference, methods on variance-exploding samples step along all training timesteps at first."""
    scheduler, zeros = make_scheduler(name), torch.zeros(1, 3, 2, 2)
    if issubclass(getattr(schedulers, name), VarianceExplodingScheduler):
        assert scheduler.scale_model_input(zeros, 0.0).shape == zeros.shape
        assert torch.isfinite(scheduler.step(zeros, 999, zeros)[0]).all()
    else:
        with pytest.raises(InputError, match="before set_timesteps"):
            scheduler.step(zeros, 999, zeros)
    scheduler.set_timesteps(4)
    for timestep in (17, -1, None, "soon", torch.tensor([1, 2])):
        with pytest.raises(InputError, match=r"timestep=.*expected one of"):
            scheduler.step(zeros, timestep, zeros)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_new_run_starts_fresh(name: str) -> None:
    """No state of a run affects the next, whether timesteps are set again or not."""
    scheduler, ends = make_scheduler(name), []
    for again in (True, False, True):
        if again:
            scheduler.set_timesteps(5)
        sample = torch.linspace(-3, 3, 24).reshape(2, 3, 2, 2)
        options = {"generator": torch.Generator().manual_seed(1)} if name in TAKES_NOISE else {}
        for timestep in scheduler.timesteps[: 3 if len(ends) == 2 else None]:
            model_input = scheduler.scale_model_input(sample, timestep)
            sample = scheduler.step(torch.tanh(model_input), timestep, sample, **options).prev_sample
        ends.append(sample)
    assert torch.equal(ends[0], ends[1])


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("DPMSolverMultistepScheduler", {"solver_order": 4}, "solver_order=4.*from 1 to 3"),
        ("DPMSolverMultistepScheduler", {"solver_order": True}, "solver_order=True"),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "ddim"}, r"algorithm_type='ddim'.*dpmsolver\+\+"),
        ("DPMSolverMultistepScheduler", {"solver_type": "bh2"}, "solver_type='bh2'.*midpoint, heun"),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver"}, "final_sigmas_type='zero'.*sigma_min"),
        (
            "DPMSolverMultistepScheduler",
            {"use_flow_sigmas": True},
            "use_flow_sigmas=True is invalid: expected False or None",
        ),
        ("DPMSolverMultistepScheduler", {"prediction_type": "flow_prediction"}, "prediction_type='flow_prediction'"),
        ("DPMSolverMultistepScheduler", {"lambda_min_clipped": math.nan}, "lambda_min_clipped=nan"),
        (
            "DPMSolverMultistepScheduler",
            {"use_lu_lambdas": True, "use_karras_sigmas": True},
            r"\(use_karras_sigmas, use_lu_lambdas\)=\(True, True\)",
        ),
        ("DPMSolverSinglestepScheduler", {"algorithm_type": "sde-dpmsolver"}, "algorithm_type='sde-dpmsolver'"),
        ("DPMSolverSinglestepScheduler", {"timestep_spacing": "leading"}, "timestep_spacing"),
        ("UniPCMultistepScheduler", {"solver_order": 0}, "solver_order=0"),
        ("UniPCMultistepScheduler", {"disable_corrector": [-1]}, "disable_corrector"),
        ("UniPCMultistepScheduler", {"sigma_min": 0.0}, "sigma_min=0.0.*above 0"),
        ("DEISMultistepScheduler", {"solver_type": "heun"}, "solver_type='heun'.*logrho"),
        ("EulerDiscreteScheduler", {"interpolation_type": "cubic"}, "interpolation_type='cubic'.*log_linear"),
        ("EulerDiscreteScheduler", {"final_sigmas_type": "min"}, "final_sigmas_type='min'"),
        ("EulerAncestralDiscreteScheduler", {"use_karras_sigmas": True}, "use_karras_sigmas"),
        ("HeunDiscreteScheduler", {"clip_sample_range": 0}, "clip_sample_range=0"),
        ("KDPM2DiscreteScheduler", {"use_beta_sigmas": 1}, "use_beta_sigmas=1.*True or False"),
        ("PNDMScheduler", {"skip_prk_steps": None}, "skip_prk_steps=None"),
        ("LCMScheduler", {"original_inference_steps": 0}, "original_inference_steps=0"),
    ],
)
def test_invalid_settings_are_named(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_scheduler(name, **settings)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_inference_steps": 51}, "num_inference_steps=51.*from 1 to 50"),
        ({"num_inference_steps": 4, "original_inference_steps": 1001}, "original_inference_steps=1001"),
        ({"num_inference_steps": 4, "strength": 0.0}, "strength=0.0"),
        ({"timesteps": [900, 20], "strength": 0.1}, "strength=0.1 .*at least one of 2"),
    ],
)
def test_arguments_of_consistency_timesteps(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_scheduler("LCMScheduler").set_timesteps(**arguments)


def test_arguments_that_contradict_the_config_are_named() -> None:
    continuous = make_scheduler("EulerDiscreteScheduler", timestep_type="continuous", prediction_type="v_prediction")
    with pytest.raises(InputError, match=r"timesteps=\[3\] .*None.*timestep_type='continuous'.*sigmas"):
        continuous.set_timesteps(timesteps=[3])
    with pytest.raises(InputError, match=r"lambda_min_clipped=9\.0 .*leaves a timestep"):
        make_scheduler("DPMSolverMultistepScheduler", lambda_min_clipped=9.0).set_timesteps(3)


def test_flow_matching_is_refused_in_files_too() -> None:
    with pytest.raises(ConfigError, match="use_flow_sigmas"):
        schedulers.DPMSolverMultistepScheduler.from_config({"use_flow_sigmas": True})


@pytest.mark.parametrize("source", sorted({*schedulers.__all__} - {"Scheduler", "SchedulerOutput"}))
@pytest.mark.parametrize("name", SOLVERS)
def test_any_config_becomes_any_solver(source: str, name: str) -> None:
    """Kandinsky's decoder and prior settings name variances that the solvers do not have."""
    arguments: type[Scheduler] = getattr(schedulers, source)
    for stored in (
        dict(arguments().config),
        {"variance_type": "learned_range", "clip_sample": False, "beta_schedule": "linear", "beta_end": 0.012},
        {"variance_type": "fixed_small_log", "prediction_type": "sample", "beta_schedule": "squaredcos_cap_v2"},
    ):
        solver = getattr(schedulers, name).from_config({"_class_name": source, **stored})
        solver.set_timesteps(3)
        assert solver.num_inference_steps == 3
        assert solver.config["prediction_type"] == stored.get("prediction_type", "epsilon")
