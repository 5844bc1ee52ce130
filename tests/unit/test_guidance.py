"""Arithmetic of guidance, its options and their refused values."""

from __future__ import annotations

import math
from typing import Any

import diffusers
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kandinsky22 import schedulers
from kandinsky22.errors import InputError
from kandinsky22.sampling.guidance import Guidance, x0_coefficients

KINDS = ("epsilon", "sample", "v_prediction")
FRACTIONS = st.floats(0, 1)
NO_NUMBERS = st.sampled_from([None, "1", True, math.nan, math.inf, [1.0], 1j])


def halves(rows: int = 2, channels: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return a network's output for unconditional and conditional rows, and its input."""
    generator = torch.Generator().manual_seed(seed)
    output = torch.randn(2 * rows, channels, 6, 6, generator=generator)
    return output, torch.randn(rows, 4, 6, 6, generator=generator)


def scheduler(kind: str = "epsilon") -> Any:
    noise_scheduler = schedulers.DDPMScheduler(prediction_type=kind, beta_schedule="scaled_linear")
    noise_scheduler.set_timesteps(10)
    return noise_scheduler


def combine(
    guidance: Guidance, output: Tensor, model_input: Tensor, kind: str = "epsilon", timestep: Any = 500
) -> Tensor:
    return guidance.combine(output, model_input, scheduler(kind), timestep)


def test_the_variance_is_left_to_the_conditional_half() -> None:
    output = torch.arange(16.0).reshape(2, 8, 1, 1)
    guided = combine(Guidance(3.0), output, torch.zeros(1, 4, 1, 1))
    assert guided.shape == (1, 8, 1, 1)
    assert guided[0, :4].flatten().tolist() == [24.0, 25.0, 26.0, 27.0]
    assert guided[0, 4:].flatten().tolist() == [12.0, 13.0, 14.0, 15.0]
    all_guided = combine(Guidance(3.0), output, torch.zeros(1, 8, 1, 1))
    assert all_guided.flatten().tolist() == [24.0 + i for i in range(8)]


@settings(max_examples=60, deadline=None)
@given(rescale=FRACTIONS, scale=st.floats(1.01, 30), rows=st.integers(1, 3), seed=st.integers(0, 1000))
def test_rescaling_equals_the_reference(rescale: float, scale: float, rows: int, seed: int) -> None:
    """The tolerance is relative to the guidance scale, with which values grow."""
    output, model_input = halves(rows, seed=seed)
    result = combine(Guidance(scale, rescale), output, model_input)
    base, conditional = (half[:, :4] for half in output.chunk(2))
    expected = rescale_noise_cfg(base + scale * (conditional - base), conditional, guidance_rescale=rescale)
    torch.testing.assert_close(result[:, :4], expected, rtol=1e-5, atol=1e-5 * scale)
    assert torch.equal(result[:, 4:], output[rows:, 4:])


def test_rescaled_in_full_each_sample_has_the_deviation_of_its_condition() -> None:
    output, model_input = halves(3)
    output[4] *= 5
    result = combine(Guidance(9.0, 1.0), output, model_input)[:, :4]
    torch.testing.assert_close(result.std(dim=(1, 2, 3)), output[3:, :4].std(dim=(1, 2, 3)))
    embeds = torch.randn(4, 64)  # the prior's predictions have no spatial positions
    result = combine(Guidance(9.0, 1.0), embeds, torch.randn(2, 64))
    torch.testing.assert_close(result.std(dim=1), embeds[2:].std(dim=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_predictions_without_any_deviation_stay_finite(dtype: torch.dtype) -> None:
    nothing = torch.zeros(2, 4, 4, 4, dtype=dtype)
    result = combine(Guidance(4.0, 0.7, threshold=0.9), nothing, nothing[:1], timestep=0)
    assert result.dtype == dtype and torch.isfinite(result).all()


# The threshold


def clean(prediction: Tensor, model_input: Tensor, kind: str, timestep: int) -> Tensor:
    """Return the clean sample that a prediction implies by definition, in double precision."""
    alpha = float(scheduler().alphas_cumprod[timestep])
    signal, noise, prediction, model_input = alpha**0.5, (1 - alpha) ** 0.5, prediction.double(), model_input.double()
    if kind == "sample":
        return prediction
    return (
        (model_input - noise * prediction) / signal if kind == "epsilon" else signal * model_input - noise * prediction
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("timestep", [10, 500, 950])
@pytest.mark.parametrize("ratio", [0.8, 0.995, 1.0])
def test_the_threshold_is_that_of_the_conditional_clean_sample(kind: str, timestep: int, ratio: float) -> None:
    output, model_input = halves(3, seed=timestep)
    output[1] = output[4]  # a sample whose two predictions are equal
    result = clean(
        combine(Guidance(6.0, threshold=ratio), output, model_input, kind, timestep)[:, :4], model_input, kind, timestep
    )
    unlimited = clean(combine(Guidance(6.0), output, model_input)[:, :4], model_input, kind, timestep)
    conditional = clean(output[3:, :4], model_input, kind, timestep)
    for row in range(3):
        size, range_ = (float(torch.quantile(each[row].abs(), ratio)) for each in (unlimited, conditional))
        limit = max(size, range_)
        expected = unlimited[row].clamp(-limit, limit) * (range_ / limit)
        torch.testing.assert_close(result[row], expected, rtol=1e-4, atol=1e-4 * range_)
        assert float(result[row].abs().max()) <= range_ * 1.001
    torch.testing.assert_close(unlimited[1], conditional[1])


def test_thresholds_of_half_precision_are_computed_in_single() -> None:
    output, model_input = halves()
    exact = combine(Guidance(8.0, threshold=0.95), output, model_input)
    rounded = combine(Guidance(8.0, threshold=0.95), output.bfloat16(), model_input.bfloat16())
    assert rounded.dtype == torch.bfloat16
    assert float((exact - rounded.float()).abs().max()) < 0.03 * float(exact.abs().max())


# Consistency models are left out, because their clean samples have other boundary conditions.
SOLVERS = sorted({*schedulers.__all__} - {"Scheduler", "SchedulerOutput", "LCMScheduler"})


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name in SOLVERS for kind in KINDS if (name, kind) != ("UnCLIPScheduler", "v_prediction")],
)
def test_clean_samples_are_those_the_schedulers_predict(name: str, kind: str) -> None:
    """Clean samples follow from the model input, at integer timesteps and in between."""
    noise_scheduler = getattr(schedulers, name)(prediction_type=kind)
    noise_scheduler.set_timesteps(7)
    sample = noise_scheduler.init_noise_sigma * torch.randn(1, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    timestep = noise_scheduler.timesteps[0]
    model_input = noise_scheduler.scale_model_input(sample, timestep)
    prediction = torch.tanh(model_input)
    coefficients = x0_coefficients(noise_scheduler, timestep)
    step = noise_scheduler.step(prediction, timestep, sample)
    limited = noise_scheduler.config.get("clip_sample") or noise_scheduler.config.get("thresholding")
    clean_sample = coefficients.input_factor * model_input + coefficients.prediction_factor * prediction
    expected = step.pred_original_sample
    assert expected is not None
    torch.testing.assert_close(clean_sample.clamp(-1, 1) if limited else clean_sample, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("timestep", [0, 999, 333.25])
def test_pure_noise_and_fractions_of_timesteps(timestep: float) -> None:
    noise_scheduler = schedulers.DDPMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    coefficients = x0_coefficients(noise_scheduler, torch.tensor(timestep))
    assert math.isfinite(coefficients.input_factor) and math.isfinite(coefficients.prediction_factor)
    output, model_input = halves()
    assert torch.isfinite(Guidance(5.0, threshold=0.9).combine(output, model_input, noise_scheduler, timestep)).all()


def test_schedulers_without_clean_samples_are_refused_by_name() -> None:
    matching = diffusers.FlowMatchEulerDiscreteScheduler()
    matching.set_timesteps(3)
    matching.register_to_config(prediction_type="flow_prediction")
    Guidance(4.0, 0.5, (0, 0.5)).check_scheduler(matching)
    with pytest.raises(InputError, match=r"guidance_threshold is not supported by FlowMatch.*alphas_cumprod"):
        Guidance(4.0, threshold=0.9).check_scheduler(matching)


# The interval


@settings(max_examples=200, deadline=None)
@given(start=FRACTIONS, end=FRACTIONS, progress=FRACTIONS)
def test_an_interval_has_its_beginning_and_not_its_end(start: float, end: float, progress: float) -> None:
    if start >= end:
        with pytest.raises(InputError, match="guidance_interval"):
            Guidance(4.0, interval=(start, end))
        return
    guidance = Guidance(4.0, interval=(start, end))
    assert guidance.enabled
    assert guidance.is_active(progress) == (start <= progress < end)
    assert guidance.is_active(start) and not guidance.is_active(end)
    assert not Guidance(1.0, interval=(start, end)).is_active(progress)


# Values


@settings(max_examples=200, deadline=None)
@given(
    name=st.sampled_from(["scale", "rescale", "threshold"]),
    value=NO_NUMBERS | st.floats(max_value=0, exclude_max=True) | st.floats(min_value=1, exclude_min=True),
)
def test_values_out_of_range_are_named(name: str, value: Any) -> None:
    number = isinstance(value, float) and math.isfinite(value)
    if (name == "scale" and number) or (name == "threshold" and value is None):
        assert getattr(Guidance(**{"scale": 4.0, name: value}), name) == value
        return
    with pytest.raises(InputError, match=f"guidance_{name}="):
        Guidance(**{"scale": 4.0, name: value})


@pytest.mark.parametrize(
    "interval",
    [
        0.5,
        "01",
        (),
        (0.1,),
        (0.1, 0.5, 0.9),
        (0.5, 0.5),
        (0.9, 0.1),
        (-0.1, 0.5),
        (0.5, 1.1),
        (0, math.nan),
        (None, 1),
        ("0", "1"),
        (False, True),
        {0.1, 0.5},
    ],
)
def test_invalid_intervals_are_refused(interval: Any) -> None:
    with pytest.raises(InputError, match="guidance_interval="):
        Guidance(4.0, interval=interval)


def test_a_list_read_from_a_file_is_an_interval() -> None:
    assert Guidance(4, interval=[0, 1]) == Guidance(4.0, 0.0, (0.0, 1.0), None)  # type: ignore[arg-type]
