"""The fast solvers against the reference's, step by step over the whole config space.

The reference computes its coefficients in single precision, in which small differences of noise levels cancel: with
1000 steps of order 3 it is off by 1e-3 of the true weights. It is given its own levels in double precision here, so
that what is compared is the method.
"""

from __future__ import annotations

import inspect
import math
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
WITHOUT_GRIDS = ["EulerAncestralDiscreteScheduler", "PNDMScheduler", "LCMScheduler"]
WITHOUT_SAMPLE = ["EulerAncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "PNDMScheduler"]


@st.composite
def configs(draw: st.DrawFn, name: str) -> dict[str, Any]:
    """Any subset of a class's settings that the reference can run; the rest stay at their defaults."""
    config = draw(st.fixed_dictionaries({}, optional=SPACES[name]))
    config["num_train_timesteps"] = draw(st.sampled_from([50, 100, 1000]) | st.integers(50, 400))
    if name not in WITHOUT_GRIDS:
        more = ["use_beta_sigmas", *(["use_lu_lambdas"] if name == "DPMSolverMultistepScheduler" else [])]
        grid = draw(st.sampled_from([None, *GRIDS, *more]))
        if grid is not None:
            config[grid] = True
    kind = config.get("algorithm_type", "")
    if kind in ("dpmsolver", "sde-dpmsolver"):
        config["final_sigmas_type"] = "sigma_min"  # the reference refuses the other
    if kind.startswith("sde"):
        config["solver_order"] = min(config.get("solver_order", 2), 2)  # see test_solvers in unit
    if config.get("prediction_type") == "sample" and name in WITHOUT_SAMPLE:
        config["prediction_type"] = "epsilon"
    if config.get("prediction_type") == "v_prediction" and name == "PNDMScheduler":
        config["prediction_type"] = "epsilon"  # the reference adds up velocities of different timesteps
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
    """Set timesteps on both and compare them; False where the reference has none that make sense."""
    total = len(ours)
    try:
        theirs.set_timesteps(steps)
    except (ValueError, IndexError):
        return False
    expected = theirs.timesteps.double()
    try:
        ours.set_timesteps(steps)
    except InputError as error:
        assert "steps_offset" in str(error)
        assert (steps - 1) * (total // steps) + ours.config.steps_offset >= total
        return False
    if steps == total and getattr(ours, "extra_timesteps", 0):
        return False  # no timestep can be spared: the reference visits some twice
    if ours.config.get("timestep_spacing") == "trailing" and len(expected) != len(ours.timesteps):
        return False  # the reference has a timestep -1 more for some numbers of steps
    assert ours.timesteps.shape == expected.shape
    tolerance = 0 if ours.timesteps.dtype == torch.int64 else 1e-3
    assert (ours.timesteps.double() - expected).abs().max() <= tolerance
    assert float(ours.init_noise_sigma) == pytest.approx(float(theirs.init_noise_sigma), rel=1e-6)
    for name in ("sigmas", "sigmas_interpol"):
        if hasattr(theirs, name):
            setattr(theirs, name, getattr(theirs, name).double())
    return True


def answer(sample: Tensor, generator: torch.Generator) -> Tensor:
    return torch.tanh(0.7 * sample) + 0.1 * torch.randn(sample.shape, generator=generator, dtype=sample.dtype)


def at_once(theirs: Any, *given: Any, **options: Any) -> Any:
    """A step of the reference, or None where it cannot solve for its coefficients."""
    try:
        return theirs.step(*given, **options)
    except torch.linalg.LinAlgError:
        return None


def same(ours: Tensor, theirs: Tensor, sample: Tensor, before: Tensor | None = None) -> bool:
    """Equal to 1e-5 of the largest numbers that a step handles, the sample `before` among them, from which methods of
    two stages start again; False if the reference has no number."""
    assert ours.shape == theirs.shape
    assert torch.isfinite(ours).all()
    if not torch.isfinite(theirs).all():
        return False
    assert ours.dtype == sample.dtype
    scale = max(1.0, *(float(x.abs().max()) for x in (theirs, sample, sample if before is None else before)))
    assert float((ours.double() - theirs.double()).abs().max()) <= 1e-5 * scale
    return True


def cancelled(ours: Any, visit: int) -> float:
    """How many times as large as a sample are the numbers whose difference is the next one. Solvers in terms of noise
    carry a sample from pure noise on that way, where single precision, the reference's, loses as many digits."""
    if getattr(ours.config, "algorithm_type", None) not in ("dpmsolver", "sde-dpmsolver"):
        return 1.0
    level, following = (1 + float(sigma) ** 2 for sigma in ours.sigmas[visit : visit + 2])
    return max(1.0, float((level / following) ** 0.5))


def run(ours: Any, theirs: Any, visits: range, seed: int, **told: Any) -> None:
    """Make these visits with both, each from what the reference reached; both steps are `told` the same.

    It is told where it begins: where rounding gives the first levels one timestep, it leaves the first out by itself,
    and then runs off its table.
    """
    if hasattr(theirs, "set_begin_index"):
        theirs.set_begin_index(visits.start)
    generator = torch.Generator().manual_seed(seed)
    noises = [torch.Generator().manual_seed(seed + 1) for _ in range(2)]
    takes = "generator" in inspect.signature(theirs.step).parameters
    options: list[dict[str, Any]] = [told | ({"generator": noise} if takes else {}) for noise in noises]
    assert takes == ("generator" in inspect.signature(ours.step).parameters)
    # In double precision, for differences of samples are divided by small levels; the reference narrows some.
    sample = torch.randn((2, 3, 4, 5), generator=generator, dtype=torch.float64)
    level = theirs.sigmas[visits.start] if hasattr(theirs, "sigmas") else torch.tensor(0.0)
    if float(ours.init_noise_sigma) != 1.0:
        sample = sample * (float(level) + 1)
    before = sample
    for visit in visits:
        mine, reference = ours.timesteps[visit], theirs.timesteps[visit]
        seen = theirs.scale_model_input(sample, reference)
        assert same(ours.scale_model_input(sample, mine), seen, sample)
        output, kept = answer(seen.to(sample), generator), sample.clone()
        result = ours.step(output, mine, sample, **options[0])
        expected = at_once(theirs, output, reference, sample, **options[1])
        assert torch.equal(sample, kept)
        if expected is None or not same(
            result.prev_sample, expected.prev_sample, sample, before * cancelled(ours, visit)
        ):
            return
        if "pred_original_sample" in expected and expected.pred_original_sample is not None:
            assert same(result.pred_original_sample, expected.pred_original_sample, sample)
        before, sample = sample, expected.prev_sample.to(sample)
    assert torch.equal(noises[0].get_state(), noises[1].get_state())


def compare(name: str, config: dict[str, Any], steps: int, seed: int, **told: Any) -> None:
    ours, theirs = pair(name, config)
    steps = min(steps, config["num_train_timesteps"])
    if not start(ours, theirs, steps):
        return
    visits = len(ours.timesteps)
    run(ours, theirs, range(min(visits, 16)), seed, **told)
    if visits > 16 and name not in ("PNDMScheduler", "LMSDiscreteScheduler", "LCMScheduler"):
        # Runs that begin near the end, as those from pictures do, where the place is clear from the timestep.
        first = visits - 5
        places = [i for i, t in enumerate(ours.timesteps.tolist()) if t == float(ours.timesteps[first])]
        if first == (places[1] if len(places) > 1 else places[0]) and start(ours, theirs, steps):
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
    """The reference as it comes, where its rounding is small; methods without levels are compared so everywhere."""
    ours, theirs = pair(name, {"beta_schedule": "scaled_linear", "num_train_timesteps": 1000})
    assert start(ours, theirs, steps)
    for levels in ("sigmas", "sigmas_interpol"):
        if hasattr(theirs, levels):
            setattr(theirs, levels, getattr(theirs, levels).float())
    run(ours, theirs, range(len(ours.timesteps)), steps)


@pytest.mark.parametrize("name", SPACES)
def test_betas_given_as_a_table_are_those_of_the_reference(name: str) -> None:
    betas = [0.0002 + 0.0003 * place for place in range(100)]
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
    ("name", "given"),
    [
        ("EulerDiscreteScheduler", {"timesteps": [900, 610, 40]}),
        ("EulerDiscreteScheduler", {"sigmas": [14.0, 3.0, 0.5, 0.0]}),
        ("HeunDiscreteScheduler", {"timesteps": [900, 610, 40]}),
    ],
)
def test_custom_levels_are_those_of_the_reference(name: str, given: dict[str, Any]) -> None:
    ours, theirs = pair(name, {})
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(**given)
    torch.testing.assert_close(ours.timesteps, theirs.timesteps, rtol=0, atol=1e-3)
    torch.testing.assert_close(ours.sigmas, theirs.sigmas)
    run(ours, theirs, range(len(ours.timesteps)), 0)


SOLVERS = [name for name in SPACES if name.startswith(("DPM", "UniPC", "DEIS"))]


@pytest.mark.parametrize("name", [*SOLVERS, "EulerAncestralDiscreteScheduler", "LMSDiscreteScheduler"])
@settings(max_examples=15, deadline=None, derandomize=True)
@given(data=st.data(), logs=st.lists(st.floats(-3.0, 3.0), min_size=1, max_size=7, unique_by=lambda log: round(log, 2)))
def test_steps_between_given_levels_are_those_of_the_reference(
    name: str, data: st.DataObject, logs: list[float]
) -> None:
    """The reference takes no levels of others here, so they are put where its own are."""
    config = data.draw(configs(name))
    for key in (*GRIDS, "use_beta_sigmas", "use_lu_lambdas", "rescale_betas_zero_snr", "lambda_min_clipped"):
        config.pop(key, None)
    ours, theirs = pair(name, config)
    levels = [math.exp(log) for log in sorted(logs, reverse=True)]
    last = 0.0 if config.get("final_sigmas_type", "zero") == "zero" else levels[-1] / 2
    ours.set_timesteps(sigmas=[*levels, last])
    theirs.set_timesteps(len(levels))
    theirs.sigmas, theirs.timesteps = torch.tensor([*levels, last], dtype=torch.float64), ours.timesteps.clone()
    torch.testing.assert_close(ours.sigmas.double(), theirs.sigmas, rtol=1e-6, atol=0)
    run(ours, theirs, range(len(levels)), len(levels))


@pytest.mark.parametrize("prediction", ["epsilon", "sample"])
@pytest.mark.parametrize("churn", [{"s_churn": 2.0}, {"s_churn": 40.0, "s_tmin": 0.5, "s_tmax": 10.0, "s_noise": 1.01}])
def test_churned_noise_is_that_of_the_reference(prediction: str, churn: dict[str, float]) -> None:
    ours, theirs = pair("EulerDiscreteScheduler", {"prediction_type": prediction})
    assert start(ours, theirs, 12)
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(2, 3, 4, 5, generator=generator) * 100
    for mine, reference in zip(ours.timesteps, theirs.timesteps, strict=True):
        seen = theirs.scale_model_input(sample, reference)
        ours.scale_model_input(sample, mine)
        output = answer(seen.float(), generator)
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
    for place in (0, 4):
        mine, reference = (scheduler.timesteps[[place]] for scheduler in (ours, theirs))
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
    """But for those of flow matching, which are refused."""
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
def test_numbers_of_steps_that_make_no_sense(name: str, steps: Any) -> None:
    with pytest.raises(InputError, match=r"num_inference_steps.* is invalid: expected"):
        getattr(ours_all, name)().set_timesteps(steps)


@pytest.mark.parametrize("name", SPACES)
@pytest.mark.parametrize("timesteps", [[], [1, 2, 3], [5, 5], [500, 3, -1], [1000, 3], [3.5, 1], ["a"], [True]])
def test_timesteps_that_make_no_sense(name: str, timesteps: Any) -> None:
    with pytest.raises(InputError, match=r"timesteps.* is invalid: expected"):
        getattr(ours_all, name)().set_timesteps(timesteps=timesteps)
