"""Fast solvers compared with the reference's, step by step over the whole config space.

The reference computes its coefficients in single precision, in which small differences of sigmas cancel: with 1000
steps of order 3 its weights are off by 1e-3. Here its sigmas are converted to double precision, so that the methods are
compared and not their rounding.
"""

from __future__ import annotations

import inspect
import itertools
import math
import operator
import warnings
from pathlib import Path
from typing import Any

import diffusers
import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

import kandinsky22.schedulers as ours_all
from kandinsky22.errors import InputError

diffusers.logging.set_verbosity_error()

TABLE: dict[str, st.SearchStrategy[Any]] = {
    "beta_start": st.floats(1e-5, 2e-3),
    "beta_end": st.floats(5e-3, 3e-2),
    "beta_schedule": st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2"]),
    "prediction_type": st.sampled_from(["epsilon", "sample", "v_prediction"]),
}
SPACING = {
    "timestep_spacing": st.sampled_from(["linspace", "leading", "trailing"]),
    "steps_offset": st.integers(0, 2),
}
TERMINAL = {"rescale_betas_zero_snr": st.booleans()}
THRESHOLD = {
    "thresholding": st.booleans(),
    "dynamic_thresholding_ratio": st.floats(0.5, 1.0),
    "sample_max_value": st.sampled_from([1.0, 1.5, 4.0]),
}
SOLVER = {"solver_order": st.integers(1, 3), "lower_order_final": st.booleans()}
FINAL = {"final_sigmas_type": st.sampled_from(["zero", "sigma_min"])}
BOUNDS = {"sigma_min": st.sampled_from([None, 0.05, 0.3]), "sigma_max": st.sampled_from([None, 5.0, 80.0])}
DPM = {
    **TABLE,
    **THRESHOLD,
    **SOLVER,
    **FINAL,
    "solver_type": st.sampled_from(["midpoint", "heun"]),
    "lambda_min_clipped": st.sampled_from([-float("inf"), -5.1, -2.0]),
}
GRIDS = ["use_karras_sigmas", "use_exponential_sigmas"]
SPACES: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "DPMSolverMultistepScheduler": {
        **DPM,
        **SPACING,
        **TERMINAL,
        "euler_at_final": st.booleans(),
        "algorithm_type": st.sampled_from(["dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++"]),
    },
    "DPMSolverSinglestepScheduler": {
        **DPM,
        "algorithm_type": st.sampled_from(["dpmsolver", "dpmsolver++", "sde-dpmsolver++"]),
    },
    "UniPCMultistepScheduler": {
        **TABLE,
        **SPACING,
        **TERMINAL,
        **THRESHOLD,
        **SOLVER,
        **FINAL,
        **BOUNDS,
        "solver_order": st.integers(1, 4),
        "solver_type": st.sampled_from(["bh1", "bh2"]),
        "predict_x0": st.booleans(),
        "disable_corrector": st.lists(st.integers(0, 5), max_size=3),
    },
    "DEISMultistepScheduler": {**TABLE, **SPACING, **THRESHOLD, **SOLVER},
    "EulerDiscreteScheduler": {
        **TABLE,
        **SPACING,
        **TERMINAL,
        **FINAL,
        **BOUNDS,
        "interpolation_type": st.sampled_from(["linear", "log_linear"]),
        "timestep_type": st.sampled_from(["discrete", "continuous"]),
    },
    "EulerAncestralDiscreteScheduler": {**TABLE, **SPACING, **TERMINAL},
    "HeunDiscreteScheduler": {
        **TABLE,
        **SPACING,
        "beta_schedule": st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2", "exp"]),
        "clip_sample": st.booleans(),
        "clip_sample_range": st.sampled_from([0.5, 2.0]),
    },
    "KDPM2DiscreteScheduler": {**TABLE, **SPACING},
    "KDPM2AncestralDiscreteScheduler": {**TABLE, **SPACING},
    "LMSDiscreteScheduler": {**TABLE, **SPACING},
    "PNDMScheduler": {**TABLE, **SPACING, "skip_prk_steps": st.booleans(), "set_alpha_to_one": st.booleans()},
    "LCMScheduler": {
        **TABLE,
        **SPACING,
        **THRESHOLD,
        "clip_sample": st.booleans(),
        "clip_sample_range": st.sampled_from([0.5, 2.0]),
        "set_alpha_to_one": st.booleans(),
        "timestep_scaling": st.sampled_from([1.0, 10.0]),
        "original_inference_steps": st.integers(1, 50),
    },
}
TOLERANCE = 1e-5
# The reference splits sigmas into noise added and removed in float32, where their difference cancels.
FLOAT32_TOLERANCES = {"KDPM2AncestralDiscreteScheduler": 1e-3}
WITHOUT_GRIDS = ["EulerAncestralDiscreteScheduler", "PNDMScheduler", "LCMScheduler"]
WITHOUT_SAMPLE = [
    "EulerAncestralDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "PNDMScheduler",
]


@st.composite
def configs(draw: st.DrawFn, name: str) -> dict[str, Any]:
    """Draw any subset of a class's settings that the reference can run."""
    config = draw(st.fixed_dictionaries({}, optional=SPACES[name]))
    config["num_train_timesteps"] = draw(st.sampled_from([50, 100, 1000]) | st.integers(50, 400))
    if name not in WITHOUT_GRIDS:
        more = ["use_beta_sigmas", *(["use_lu_lambdas"] if name == "DPMSolverMultistepScheduler" else [])]
        grid = draw(st.sampled_from([None, *GRIDS, *more]))
        if grid is not None:
            config[grid] = True
    kind = config.get("algorithm_type", "")
    if kind in ("dpmsolver", "sde-dpmsolver"):
        config["final_sigmas_type"] = "sigma_min"  # the reference refuses the other value
    if kind.startswith("sde"):
        config["solver_order"] = min(config.get("solver_order", 2), 2)  # see tests/unit/test_solvers.py
    if config.get("prediction_type") == "sample" and name in WITHOUT_SAMPLE:
        config["prediction_type"] = "epsilon"
    if config.get("prediction_type") == "v_prediction" and name == "PNDMScheduler":
        config["prediction_type"] = "epsilon"  # the reference adds velocities of different timesteps
    if (kind == "dpmsolver" and name == "DPMSolverSinglestepScheduler") or config.get("predict_x0") is False:
        config.pop("thresholding", None)  # the reference crashes, or ignores it
    if name == "LCMScheduler":
        config.pop("rescale_betas_zero_snr", None)
    return config


def pair(name: str, config: dict[str, Any]) -> tuple[Any, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(ours_all, name)(**config), getattr(diffusers, name)(**config)


def start(ours: Any, theirs: Any, steps: int) -> bool:
    """Set timesteps on both and compare them; return False where the reference has no valid ones."""
    total = len(ours)
    try:
        theirs.set_timesteps(steps)
    except (ValueError, IndexError):
        return False
    expected = theirs.timesteps.double()
    if not expected.isfinite().all():
        return False  # the reference takes the logarithm of a sigma of zero
    try:
        ours.set_timesteps(steps)
    except InputError as error:
        if "sigma_min" in str(error):  # the reference goes from the smaller sigma to the larger one
            first, last = theirs.sigmas[0], theirs.sigmas[-2]
            assert first < last or first < (ours.config.sigma_min or 0.0)
            return False
        assert "steps_offset" in str(error)
        assert (steps - 1) * (total // steps) + ours.config.steps_offset >= total
        return False
    if steps == total and getattr(ours, "extra_timesteps", 0):
        return False  # every timestep is used: the reference repeats some
    if ours.config.get("timestep_spacing") == "trailing" and len(expected) != len(ours.timesteps):
        return False  # the reference adds a timestep -1 for some step counts
    assert ours.timesteps.shape == expected.shape
    tolerance = 0 if ours.timesteps.dtype == torch.int64 else 1e-3
    if isinstance(ours, ours_all.KDPM2AncestralDiscreteScheduler):
        tolerance = 0.2  # the reference interpolates between logarithms of float32 sigmas, which cancels
    assert (ours.timesteps.double() - expected).abs().max() <= tolerance
    assert float(ours.init_noise_sigma) == pytest.approx(float(theirs.init_noise_sigma), rel=1e-6)
    for name in ("sigmas", "sigmas_interpol", "sigmas_up", "sigmas_down"):
        if hasattr(theirs, name):
            setattr(theirs, name, getattr(theirs, name).double())
    return True


def answer(sample: Tensor, generator: torch.Generator) -> Tensor:
    return torch.tanh(0.7 * sample) + 0.1 * torch.randn(sample.shape, generator=generator, dtype=sample.dtype)


def step_of_reference(theirs: Any, *arguments: Any, **options: Any) -> Any:
    """Return a step of the reference, or None where it cannot solve for its coefficients."""
    try:
        return theirs.step(*arguments, **options)
    except torch.linalg.LinAlgError:
        return None


def same(
    ours: Tensor, theirs: Tensor, sample: Tensor, before: Tensor | None = None, tolerance: float = TOLERANCE
) -> bool:
    """Assert equality relative to the largest value of a step, including the sample `before`, from which two-stage
    methods start again; return False if the reference is not finite."""
    assert ours.shape == theirs.shape
    assert torch.isfinite(ours).all()
    if not torch.isfinite(theirs).all():
        return False
    assert ours.dtype == sample.dtype
    scale = max(1.0, *(float(x.abs().max()) for x in (theirs, sample, sample if before is None else before)))
    assert float((ours.double() - theirs.double()).abs().max()) <= tolerance * scale
    return True


def cancelled(ours: Any, visit: int) -> float:
    """Return the factor by which the terms of a step exceed their difference, the next sample. It is large for solvers
    in terms of noise near pure noise, where the reference's single precision loses as many digits."""
    if getattr(ours.config, "algorithm_type", None) not in ("dpmsolver", "sde-dpmsolver"):
        return 1.0
    sigma, following = (1 + float(sigma) ** 2 for sigma in ours.sigmas[visit : visit + 2])
    return max(1.0, float((sigma / following) ** 0.5))


def run(ours: Any, theirs: Any, visits: range, seed: int, **options: Any) -> None:
    """Compare the steps of both at these positions, each from the sample that the reference reached.

    `options` go to both `step` methods. The reference's start index is set, because otherwise it skips the first sigma
    where rounding gives the first two the same timestep, and then leaves its table.
    """
    if hasattr(theirs, "set_begin_index"):
        theirs.set_begin_index(visits.start)
    generator = torch.Generator().manual_seed(seed)
    noises = [torch.Generator().manual_seed(seed + 1) for _ in range(2)]
    takes = "generator" in inspect.signature(theirs.step).parameters
    step_options: list[dict[str, Any]] = [options | ({"generator": noise} if takes else {}) for noise in noises]
    assert takes == ("generator" in inspect.signature(ours.step).parameters)
    # Double precision, because differences of samples are divided by small sigmas. The reference casts some down.
    sample = torch.randn((2, 3, 4, 5), generator=generator, dtype=torch.float64)
    sigma = theirs.sigmas[visits.start] if hasattr(theirs, "sigmas") else torch.tensor(0.0)
    if float(ours.init_noise_sigma) != 1.0:
        sample = sample * (float(sigma) + 1)
    before = sample
    for visit in visits:
        mine, reference = ours.timesteps[visit], theirs.timesteps[visit]
        model_input = theirs.scale_model_input(sample, reference)
        assert same(ours.scale_model_input(sample, mine), model_input, sample)
        output, unchanged = answer(model_input.to(sample), generator), sample.clone()
        result = ours.step(output, mine, sample, **step_options[0])
        expected = step_of_reference(theirs, output, reference, sample, **step_options[1])
        assert torch.equal(sample, unchanged)
        earlier = before * cancelled(ours, visit)
        tolerance = FLOAT32_TOLERANCES.get(type(ours).__name__, TOLERANCE)
        if expected is None or not same(result.prev_sample, expected.prev_sample, sample, earlier, tolerance):
            return
        if "pred_original_sample" in expected and expected.pred_original_sample is not None:
            assert same(result.pred_original_sample, expected.pred_original_sample, sample)
        before, sample = sample, expected.prev_sample.to(sample)
    assert torch.equal(noises[0].get_state(), noises[1].get_state())


def compare(name: str, config: dict[str, Any], steps: int, seed: int, **options: Any) -> None:
    ours, theirs = pair(name, config)
    steps = min(steps, config["num_train_timesteps"])
    if not start(ours, theirs, steps):
        return
    visits = len(ours.timesteps)
    run(ours, theirs, range(min(visits, 16)), seed, **options)
    if visits > 16 and name not in ("PNDMScheduler", "LMSDiscreteScheduler", "LCMScheduler"):
        # A run that starts near the end, like img2img, where the timestep identifies the position.
        first = visits - 5
        indices = [i for i, t in enumerate(ours.timesteps.tolist()) if t == float(ours.timesteps[first])]
        if first == (indices[1] if len(indices) > 1 else indices[0]) and start(ours, theirs, steps):
            run(ours, theirs, range(first, visits), seed + 2)


def test_a_step_that_cancels_large_numbers_is_near_the_reference() -> None:
    config = {"algorithm_type": "dpmsolver", "solver_order": 1, "thresholding": True, "final_sigmas_type": "sigma_min"}
    config |= {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 50}
    compare("DPMSolverMultistepScheduler", config, 1, 0)


@pytest.mark.parametrize("name", SPACES)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_every_step_is_that_of_the_reference(name: str, data: st.DataObject) -> None:
    config = data.draw(configs(name))
    steps = data.draw(st.sampled_from([1, 2, 3, 5, 10, 14, 15, 25, 50, 999, 1000]) | st.integers(1, 1000))
    compare(name, config, steps, data.draw(st.integers(0, 2**31 - 9)))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(data=st.data(), order=st.integers(1, 8), steps=st.integers(1, 60) | st.sampled_from([999, 1000]))
def test_every_order_of_linear_multistep_is_that_of_the_reference(data: st.DataObject, order: int, steps: int) -> None:
    compare("LMSDiscreteScheduler", data.draw(configs("LMSDiscreteScheduler")), steps, order, order=order)


@pytest.mark.parametrize("name", [name for name in SPACES if name not in ("PNDMScheduler", "LCMScheduler")])
@pytest.mark.parametrize("steps", [1, 2, 8, 20])
def test_coefficients_in_single_precision_are_near_enough(name: str, steps: int) -> None:
    """Single precision, where the reference's rounding is small; methods without sigmas are compared everywhere."""
    ours, theirs = pair(name, {"beta_schedule": "scaled_linear", "num_train_timesteps": 1000})
    assert start(ours, theirs, steps)
    for attribute in ("sigmas", "sigmas_interpol"):
        if hasattr(theirs, attribute):
            setattr(theirs, attribute, getattr(theirs, attribute).float())
    run(ours, theirs, range(len(ours.timesteps)), steps)


@pytest.mark.parametrize("name", SPACES)
def test_custom_betas_equal_the_reference(name: str) -> None:
    betas = [0.0002 + 0.0003 * index for index in range(100)]
    ours, theirs = pair(name, {"num_train_timesteps": 100, "trained_betas": betas})
    assert start(ours, theirs, 9)
    run(ours, theirs, range(len(ours.timesteps)), 9)


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"])
def test_custom_timesteps_are_those_of_the_reference(name: str) -> None:
    ours, theirs = pair(name, {})
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(timesteps=[900, 610, 300, 299, 40])
    theirs.sigmas = theirs.sigmas.double()
    assert ours.timesteps.tolist() == theirs.timesteps.tolist()
    run(ours, theirs, range(5), 0)


@pytest.mark.parametrize(
    ("name", "custom"),
    [
        ("EulerDiscreteScheduler", {"timesteps": [900, 610, 40]}),
        ("EulerDiscreteScheduler", {"sigmas": [14.0, 3.0, 0.5, 0.0]}),
        ("HeunDiscreteScheduler", {"timesteps": [900, 610, 40]}),
    ],
)
def test_custom_levels_are_those_of_the_reference(name: str, custom: dict[str, Any]) -> None:
    ours, theirs = pair(name, {})
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(**custom)
    torch.testing.assert_close(ours.timesteps, theirs.timesteps, rtol=0, atol=1e-3)
    torch.testing.assert_close(ours.sigmas, theirs.sigmas)
    run(ours, theirs, range(len(ours.timesteps)), 0)


SOLVERS = [name for name in SPACES if name.startswith(("DPM", "UniPC", "DEIS"))]


@pytest.mark.parametrize("name", [*SOLVERS, "EulerAncestralDiscreteScheduler", "LMSDiscreteScheduler"])
@settings(max_examples=15, deadline=None, derandomize=True)
@given(data=st.data(), largest=st.floats(0.0, 3.0), gaps=st.lists(st.floats(0.1, 1.0), max_size=6))
def test_steps_between_custom_sigmas_equal_the_reference(
    name: str, data: st.DataObject, largest: float, gaps: list[float]
) -> None:
    """The reference accepts no custom sigmas here, so its own are replaced.

    Multistep methods divide by differences of log(sigma). Sigmas are stored in single precision: if two differ by less
    than a few percent, errors from rounding exceed the tolerance.
    """
    config = data.draw(configs(name))
    for key in (*GRIDS, "use_beta_sigmas", "use_lu_lambdas", "rescale_betas_zero_snr", "lambda_min_clipped"):
        config.pop(key, None)
    ours, theirs = pair(name, config)
    sigmas = [math.exp(log) for log in itertools.accumulate(gaps, operator.sub, initial=largest)]
    last = 0.0 if config.get("final_sigmas_type", "zero") == "zero" else sigmas[-1] / 2
    ours.set_timesteps(sigmas=[*sigmas, last])
    theirs.set_timesteps(len(sigmas))
    theirs.sigmas, theirs.timesteps = torch.tensor([*sigmas, last], dtype=torch.float64), ours.timesteps.clone()
    torch.testing.assert_close(ours.sigmas.double(), theirs.sigmas, rtol=1e-6, atol=0)
    run(ours, theirs, range(len(sigmas)), len(sigmas))


@pytest.mark.parametrize("prediction", ["epsilon", "sample"])
@pytest.mark.parametrize("churn", [{"s_churn": 2.0}, {"s_churn": 40.0, "s_tmin": 0.5, "s_tmax": 10.0, "s_noise": 1.01}])
def test_churned_noise_is_that_of_the_reference(prediction: str, churn: dict[str, float]) -> None:
    ours, theirs = pair("EulerDiscreteScheduler", {"prediction_type": prediction})
    assert start(ours, theirs, 12)
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(2, 3, 4, 5, generator=generator) * 100
    for mine, reference in zip(ours.timesteps, theirs.timesteps, strict=True):
        model_input = theirs.scale_model_input(sample, reference)
        ours.scale_model_input(sample, mine)
        output = answer(model_input.float(), generator)
        result, expected = (
            scheduler.step(output, t, sample, generator=torch.Generator().manual_seed(3), **churn).prev_sample
            for scheduler, t in ((ours, mine), (theirs, reference))
        )
        assert same(result, expected, sample)
        sample = expected.float()


@pytest.mark.parametrize("name", [name for name in SPACES if not name.startswith("PNDM")])
def test_noise_is_added_as_the_reference_does(name: str) -> None:
    ours, theirs = pair(name, {})
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(10)
    sample, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    for index in (0, 4):
        mine, reference = (scheduler.timesteps[[index]] for scheduler in (ours, theirs))
        result = ours.add_noise(sample, noise, mine)
        torch.testing.assert_close(result, theirs.add_noise(sample, noise, reference), rtol=1e-5, atol=1e-4)
        assert torch.equal(ours.add_noise(sample, noise, mine.repeat(2)), result)


@pytest.mark.parametrize("options", [{"timesteps": [999, 499, 19]}, {"num_inference_steps": 3, "strength": 0.6}])
def test_consistency_timesteps_are_those_of_the_reference(options: dict[str, Any]) -> None:
    ours, theirs = pair("LCMScheduler", {})
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(**options)
    assert ours.timesteps.tolist() == theirs.timesteps.tolist()
    run(ours, theirs, range(3), 0)


@pytest.mark.parametrize("name", SPACES)
def test_settings_and_files_are_those_of_the_reference(name: str, tmp_path: Path) -> None:
    """Flow matching is refused; all other settings of the reference work."""
    ours, theirs = pair(name, {})
    supported = getattr(ours.config, "supported_values", {})
    expected = {k: v for k, v in dict(theirs.config).items() if not k.startswith("_") and k not in supported}
    mine = {k: list(v) if isinstance(v, tuple) else v for k, v in dict(ours.config).items() if not k.startswith("_")}
    assert mine == expected
    getattr(ours_all, name)(beta_end=0.013).save_pretrained(tmp_path)
    assert getattr(diffusers, name).from_pretrained(tmp_path).config.beta_end == 0.013
    getattr(diffusers, name)(beta_end=0.014).save_pretrained(tmp_path)
    again = getattr(ours_all, name).from_pretrained(tmp_path)
    assert again.config.beta_end == 0.014
    assert {name: again.config[name] for name in expected if name != "beta_end"} == {
        name: ours.config[name] for name in expected if name != "beta_end"
    }


@pytest.mark.parametrize("name", SPACES)
@pytest.mark.parametrize("steps", [0, -3, 1001, 2.5, "ten", True, None])
def test_invalid_step_counts_are_refused(name: str, steps: Any) -> None:
    with pytest.raises(InputError, match=r"num_inference_steps.* is invalid: expected"):
        getattr(ours_all, name)().set_timesteps(steps)


@pytest.mark.parametrize("name", SPACES)
@pytest.mark.parametrize("timesteps", [[], [1, 2, 3], [5, 5], [500, 3, -1], [1000, 3], [3.5, 1], ["a"], [True]])
def test_invalid_timesteps_are_refused(name: str, timesteps: Any) -> None:
    if timesteps == [3.5, 1] and getattr(ours_all, name).fractional_timesteps:
        pytest.skip("timesteps of this method need not be integers")
    with pytest.raises(InputError, match=r"timesteps.* is invalid: expected"):
        getattr(ours_all, name)().set_timesteps(timesteps=timesteps)
