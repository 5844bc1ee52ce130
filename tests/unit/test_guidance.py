"""The arithmetic of guidance, its options, and which values they refuse."""

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
from kandinsky22.sampling.guidance import Guidance, clean_weights

KINDS = ("epsilon", "sample", "v_prediction")
FRACTIONS = st.floats(0, 1)
NO_NUMBERS = st.sampled_from([None, "1", True, math.nan, math.inf, [1.0], 1j])


def halves(rows: int = 2, channels: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A network's output for unconditional and conditional rows, and what it was shown."""
    generator = torch.Generator().manual_seed(seed)
    output = torch.randn(2 * rows, channels, 6, 6, generator=generator)
    return output, torch.randn(rows, 4, 6, 6, generator=generator)


def scheduler(kind: str = "epsilon") -> Any:
    made = schedulers.DDPMScheduler(prediction_type=kind, beta_schedule="scaled_linear")
    made.set_timesteps(10)
    return made


def combine(guidance: Guidance, output: Tensor, seen: Tensor, kind: str = "epsilon", timestep: Any = 500) -> Tensor:
    return guidance.combine(output, seen, scheduler(kind), timestep)


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
    """To 1e-5 of the numbers' size, which grows with the scale."""
    output, seen = halves(rows, seed=seed)
    result = combine(Guidance(scale, rescale), output, seen)
    base, wanted = (half[:, :4] for half in output.chunk(2))
    expected = rescale_noise_cfg(base + scale * (wanted - base), wanted, guidance_rescale=rescale)
    torch.testing.assert_close(result[:, :4], expected, rtol=1e-5, atol=1e-5 * scale)
    assert torch.equal(result[:, 4:], output[rows:, 4:])


def test_rescaled_in_full_each_sample_has_the_deviation_of_its_condition() -> None:
    output, seen = halves(3)
    output[4] *= 5
    result = combine(Guidance(9.0, 1.0), output, seen)[:, :4]
    torch.testing.assert_close(result.std(dim=(1, 2, 3)), output[3:, :4].std(dim=(1, 2, 3)))
    embeds = torch.randn(4, 64)  # the prior's predictions have no places
    result = combine(Guidance(9.0, 1.0), embeds, torch.randn(2, 64))
    torch.testing.assert_close(result.std(dim=1), embeds[2:].std(dim=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_predictions_without_any_deviation_stay_finite(dtype: torch.dtype) -> None:
    nothing = torch.zeros(2, 4, 4, 4, dtype=dtype)
    result = combine(Guidance(4.0, 0.7, threshold=0.9), nothing, nothing[:1], timestep=0)
    assert result.dtype == dtype and torch.isfinite(result).all()


# The threshold


def clean(prediction: Tensor, seen: Tensor, kind: str, timestep: int) -> Tensor:
    """The clean sample that a prediction implies, from the definitions, in double precision."""
    kept = float(scheduler().alphas_cumprod[timestep])
    signal, noise, prediction, seen = kept**0.5, (1 - kept) ** 0.5, prediction.double(), seen.double()
    if kind == "sample":
        return prediction
    return (seen - noise * prediction) / signal if kind == "epsilon" else signal * seen - noise * prediction


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("timestep", [10, 500, 950])
@pytest.mark.parametrize("ratio", [0.8, 0.995, 1.0])
def test_the_threshold_is_that_of_the_conditional_clean_sample(kind: str, timestep: int, ratio: float) -> None:
    output, seen = halves(3, seed=timestep)
    output[1] = output[4]  # a sample in which guidance has nothing to do
    result = clean(combine(Guidance(6.0, threshold=ratio), output, seen, kind, timestep)[:, :4], seen, kind, timestep)
    plain = clean(combine(Guidance(6.0), output, seen)[:, :4], seen, kind, timestep)
    wanted = clean(output[3:, :4], seen, kind, timestep)
    for row in range(3):
        size, range_ = (float(torch.quantile(each[row].abs(), ratio)) for each in (plain, wanted))
        limit = max(size, range_)
        expected = plain[row].clamp(-limit, limit) * (range_ / limit)
        torch.testing.assert_close(result[row], expected, rtol=1e-4, atol=1e-4 * range_)
        assert float(result[row].abs().max()) <= range_ * 1.001
    torch.testing.assert_close(plain[1], wanted[1])


def test_thresholds_of_half_precision_are_computed_in_single() -> None:
    output, seen = halves()
    exact = combine(Guidance(8.0, threshold=0.95), output, seen)
    rounded = combine(Guidance(8.0, threshold=0.95), output.bfloat16(), seen.bfloat16())
    assert rounded.dtype == torch.bfloat16
    assert float((exact - rounded.float()).abs().max()) < 0.03 * float(exact.abs().max())


# without consistency models, whose clean samples have boundary conditions of their own
SOLVERS = sorted({*schedulers.__all__} - {"Scheduler", "SchedulerOutput", "LCMScheduler"})


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name in SOLVERS for kind in KINDS if (name, kind) != ("UnCLIPScheduler", "v_prediction")],
)
def test_clean_samples_are_those_the_schedulers_predict(name: str, kind: str) -> None:
    """Whatever way a scheduler goes, whole timesteps or between, clean samples follow from what the network saw."""
    made = getattr(schedulers, name)(prediction_type=kind)
    made.set_timesteps(7)
    sample = made.init_noise_sigma * torch.randn(1, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    timestep = made.timesteps[0]
    seen = made.scale_model_input(sample, timestep)
    prediction = torch.tanh(seen)
    carried, factor = clean_weights(made, timestep)
    step = made.step(prediction, timestep, sample)
    limited = made.config.get("clip_sample") or made.config.get("thresholding")
    own = carried * seen + factor * prediction
    expected = step.pred_original_sample
    assert expected is not None
    torch.testing.assert_close(own.clamp(-1, 1) if limited else own, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("timestep", [0, 999, 333.25])
def test_pure_noise_and_fractions_of_timesteps(timestep: float) -> None:
    made = schedulers.DDPMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    assert all(math.isfinite(weight) for weight in clean_weights(made, torch.tensor(timestep)))
    output, seen = halves()
    assert torch.isfinite(Guidance(5.0, threshold=0.9).combine(output, seen, made, timestep)).all()


def test_schedulers_that_tell_no_clean_sample_are_refused_by_name() -> None:
    matching = diffusers.FlowMatchEulerDiscreteScheduler()
    matching.set_timesteps(3)
    matching.register_to_config(prediction_type="flow_prediction")
    Guidance(4.0, 0.5, (0, 0.5)).check(matching)
    with pytest.raises(InputError, match=r"guidance_threshold: FlowMatch.*alphas_cumprod"):
        Guidance(4.0, threshold=0.9).check(matching)


# The interval


@settings(max_examples=200, deadline=None)
@given(start=FRACTIONS, end=FRACTIONS, progress=FRACTIONS)
def test_an_interval_has_its_beginning_and_not_its_end(start: float, end: float, progress: float) -> None:
    if start >= end:
        with pytest.raises(InputError, match="guidance_interval"):
            Guidance(4.0, interval=(start, end))
        return
    guidance = Guidance(4.0, interval=(start, end))
    assert guidance.on
    assert guidance.acts(progress) == (start <= progress < end)
    assert guidance.acts(start) and not guidance.acts(end)
    assert not Guidance(1.0, interval=(start, end)).acts(progress)


# Values


@settings(max_examples=200, deadline=None)
@given(
    name=st.sampled_from(["scale", "rescale", "threshold"]),
    value=NO_NUMBERS | st.floats(max_value=0, exclude_max=True) | st.floats(min_value=1, exclude_min=True),
)
def test_numbers_out_of_range_are_named(name: str, value: Any) -> None:
    number = isinstance(value, float) and math.isfinite(value)
    if (name == "scale" and number) or (name == "threshold" and value is None):
        assert getattr(Guidance(**{"scale": 4.0, name: value}), name) == value
        return
    with pytest.raises(InputError, match=f"guidance_{name}="):
        Guidance(**{"scale": 4.0, name: value})


@pytest.mark.parametrize(
    "interval",
    [0.5, "01", (), (0.1,), (0.1, 0.5, 0.9), (0.5, 0.5), (0.9, 0.1), (-0.1, 0.5), (0.5, 1.1), (0, math.nan),
     (None, 1), ("0", "1"), (False, True), {0.1, 0.5}],
)  # fmt: skip
def test_intervals_that_make_no_sense(interval: Any) -> None:
    with pytest.raises(InputError, match="guidance_interval="):
        Guidance(4.0, interval=interval)


def test_a_list_read_from_a_file_is_an_interval() -> None:
    assert Guidance(4, interval=[0, 1]) == Guidance(4.0, 0.0, (0.0, 1.0), None)  # type: ignore[arg-type]
