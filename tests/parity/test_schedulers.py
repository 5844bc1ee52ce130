"""Schedulers compared with the reference's, step by step over the config space, and with closed-form derivations where
the reference is wrong or cannot run."""

from __future__ import annotations

from typing import Any

import diffusers
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from kandinsky22.errors import InputError
from kandinsky22.noise import randn_tensor
from kandinsky22.schedulers import DDIMScheduler, DDPMScheduler, UnCLIPScheduler

SHAPES = [(2, 3, 4, 5), (2, 6), (1, 1, 2, 2)]
BETA_SCHEDULES = ["linear", "scaled_linear", "squaredcos_cap_v2"]
VARIANCES = ["fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range"]


def whole_space(examples: int) -> settings:
    return settings(max_examples=examples, deadline=None, derandomize=True)


def clipping() -> dict[str, st.SearchStrategy[Any]]:
    return {"clip_sample": st.booleans(), "clip_sample_range": st.sampled_from([0.5, 1.0, 3, 10.0])}


def discrete(draw: st.DrawFn, beta_schedules: list[str], **more: st.SearchStrategy[Any]) -> dict[str, Any]:
    """Draw any subset of the settings of the discrete schedulers."""
    beta = st.floats(1e-5, 0.05)
    config = draw(
        st.fixed_dictionaries(
            {"num_train_timesteps": st.sampled_from([1, 2, 10, 50, 100, 1000]) | st.integers(1, 400)},
            optional={
                "beta_start": beta,
                "beta_end": beta,
                "beta_schedule": st.sampled_from(beta_schedules),
                "prediction_type": st.sampled_from(["epsilon", "sample", "v_prediction"]),
                "thresholding": st.booleans(),
                "dynamic_thresholding_ratio": st.floats(0.5, 1.0),
                "sample_max_value": st.sampled_from([1.0, 1.5, 4.0]),
                "timestep_spacing": st.sampled_from(["linspace", "leading", "trailing"]),
                "steps_offset": st.integers(0, 2),
                "rescale_betas_zero_snr": st.booleans(),
                **clipping(),
                **more,
            },
        )
    )
    if config["num_train_timesteps"] <= 10 and draw(st.booleans()):
        count = config["num_train_timesteps"]
        config["trained_betas"] = draw(st.lists(beta, min_size=count, max_size=count))
    if config["num_train_timesteps"] == 1:
        config.pop("rescale_betas_zero_snr", None)  # one step cannot be both the first and pure noise: 0 / 0
    if config.get("prediction_type", "epsilon") == "epsilon" and not config.get("clip_sample", True):
        config.pop("rescale_betas_zero_snr", None)  # from pure noise the reference divides by 0
    return config


@st.composite
def ddpm_configs(draw: st.DrawFn) -> dict[str, Any]:
    return discrete(draw, [*BETA_SCHEDULES, "laplace", "sigmoid"], variance_type=st.sampled_from(VARIANCES))


@st.composite
def ddim_configs(draw: st.DrawFn) -> dict[str, Any]:
    return discrete(draw, BETA_SCHEDULES, set_alpha_to_one=st.booleans())


def unclip_configs() -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {"num_train_timesteps": st.sampled_from([2, 10, 100, 1000]) | st.integers(2, 400)},
        optional={
            "variance_type": st.sampled_from(["fixed_small_log", "learned_range"]),
            "prediction_type": st.sampled_from(["epsilon", "sample"]),
            "beta_schedule": st.just("squaredcos_cap_v2"),
            **clipping(),
        },
    )


def tensors(
    shape: tuple[int, ...], seed: int, learned: bool, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Return a sample and a possible prediction for it."""
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randn(shape, generator=generator).to(dtype)
    output = torch.randn((shape[0], shape[1] * (1 + learned), *shape[2:]), generator=generator).to(dtype)
    if learned:
        output[:, shape[1] :] = output[:, shape[1] :].clamp(-1, 1)
    return sample, output


def assert_same(ours: Tensor, theirs: Tensor, tolerance: float = 1e-6) -> None:
    """Assert equality within `tolerance` of max(1, |x|) wherever the reference is finite."""
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    real = torch.isfinite(theirs)
    assert torch.isfinite(ours)[real].all()
    ours, theirs = ours[real].double(), theirs[real].double()
    assert ((ours - theirs).abs() <= tolerance * theirs.abs().clamp(min=1)).all()


def some(timesteps: list[int]) -> list[int]:
    """Return the first, the last and some timesteps in between."""
    return sorted({timesteps[i * (len(timesteps) - 1) // 3] for i in range(4)}, reverse=True)


def start(ours: Any, theirs: Any, steps: int) -> bool:
    """Set timesteps on both and compare them; return False if the reference would leave its own table."""
    theirs.set_timesteps(steps)
    # The reference's trailing spacing has one step too many, -1, for some numbers of steps.
    expected = theirs.timesteps[:steps].tolist()
    if expected[0] >= len(ours):
        with pytest.raises(InputError, match="steps_offset"):
            ours.set_timesteps(steps)
        return False
    ours.set_timesteps(steps)
    assert ours.timesteps.tolist() == expected
    assert ours.timesteps.dtype == torch.int64
    return True


def step_both(ours: Any, theirs: Any, sample: Tensor, output: Tensor, t: Any, seed: int, **kwargs: Any) -> None:
    generators = [torch.Generator().manual_seed(seed) for _ in range(2)]
    before = sample.clone(), output.clone()
    mine = ours.step(output, t, sample, generator=generators[0], **kwargs)
    reference = theirs.step(output, t, sample, generator=generators[1], **kwargs)
    assert_same(mine.pred_original_sample, reference.pred_original_sample)
    assert_same(mine.prev_sample, reference.prev_sample)
    assert torch.equal(generators[0].get_state(), generators[1].get_state())
    assert torch.equal(sample, before[0])
    assert torch.equal(output, before[1])


@given(ddpm_configs(), st.data())
@whole_space(160)
def test_ddpm_equals_the_reference_step_by_step(config: dict[str, Any], data: st.DataObject) -> None:
    ours = DDPMScheduler(**config)
    if config.get("variance_type") == "fixed_large_log":  # wrong in the reference, see below
        config = {**config, "variance_type": "fixed_large"}
    theirs = diffusers.DDPMScheduler(**config)
    assert_same(ours.alphas_cumprod, theirs.alphas_cumprod)
    shape = data.draw(st.sampled_from([SHAPES[0], SHAPES[2]] if config.get("thresholding") else SHAPES))
    learned = ours.config.variance_type.startswith("learned")
    if not start(ours, theirs, data.draw(st.integers(1, config["num_train_timesteps"]))):
        return
    for t in some(ours.timesteps.tolist()):
        sample, output = tensors(shape, t, learned)
        step_both(ours, theirs, sample, output, torch.tensor(t) if t % 2 else t, t)
        assert ours.previous_timestep(t) == int(theirs.previous_timestep(t))


@given(ddim_configs(), st.data())
@whole_space(160)
def test_ddim_equals_the_reference_step_by_step(config: dict[str, Any], data: st.DataObject) -> None:
    ours, theirs = DDIMScheduler(**config), diffusers.DDIMScheduler(**config)
    shape = data.draw(st.sampled_from([SHAPES[0], SHAPES[2]] if config.get("thresholding") else SHAPES))
    eta = data.draw(st.sampled_from([0.0, 0.3, 1.0]))
    clipped = data.draw(st.booleans())
    if not start(ours, theirs, data.draw(st.integers(1, config["num_train_timesteps"]))):
        return
    for t in some(ours.timesteps.tolist()):
        sample, output = tensors(shape, t, learned=False)
        step_both(ours, theirs, sample, output, t, t, eta=eta, use_clipped_model_output=clipped)
        noise = torch.randn(shape)
        mine = ours.step(output, t, sample, eta, clipped, variance_noise=noise, return_dict=False)
        reference = theirs.step(output, t, sample, eta, clipped, variance_noise=noise, return_dict=False)
        assert_same(mine[0], reference[0])


@given(unclip_configs(), st.data())
@whole_space(100)
def test_unclip_equals_the_reference_step_by_step(config: dict[str, Any], data: st.DataObject) -> None:
    ours, theirs = UnCLIPScheduler(**config), diffusers.UnCLIPScheduler(**config)
    assert_same(ours.betas, theirs.betas)
    shape = data.draw(st.sampled_from(SHAPES))
    passes_previous = data.draw(st.booleans())
    start(ours, theirs, data.draw(st.integers(2, config["num_train_timesteps"])))
    order = ours.timesteps.tolist()
    for t in some(order):
        sample, output = tensors(shape, t, ours.config.variance_type == "learned_range")
        after = order[order.index(t) + 1] if passes_previous and t else None
        step_both(ours, theirs, sample, output, t, t, prev_timestep=after)


@given(ddpm_configs(), st.sampled_from([torch.float32, torch.float64]), st.data())
@whole_space(40)
def test_noise_and_velocity_equal_the_reference(
    config: dict[str, Any], dtype: torch.dtype, data: st.DataObject
) -> None:
    ours, theirs = DDPMScheduler(**config), diffusers.DDPMScheduler(**config)
    sample, noise = tensors((2, 3, 4, 4), 0, learned=False, dtype=dtype)
    last = config["num_train_timesteps"] - 1
    timesteps = torch.tensor(data.draw(st.lists(st.integers(0, last), min_size=2, max_size=2)))
    assert_same(ours.add_noise(sample, noise, timesteps), theirs.add_noise(sample, noise, timesteps))
    assert_same(ours.get_velocity(sample, noise, timesteps), theirs.get_velocity(sample, noise, timesteps))
    assert_same(ours.add_noise(sample, noise, last), theirs.add_noise(sample, noise, torch.tensor([last])))


PUBLISHED = {
    "decoder": ("DDPMScheduler", {"beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}),
    "decoder, learned": ("DDPMScheduler", {"beta_schedule": "linear", "variance_type": "learned_range"}),
    "decoder, DDIM": ("DDIMScheduler", {"beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}),
    "prior": ("UnCLIPScheduler", {"prediction_type": "sample", "clip_sample_range": 5.0}),
}


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("generators", [1, 2])
def test_whole_trajectories_equal_the_reference(name: str, generators: int) -> None:
    kind, config = PUBLISHED[name]
    ends = []
    for library in (DDPMScheduler, DDIMScheduler, UnCLIPScheduler), (getattr(diffusers, kind),):
        scheduler: Any = next(cls for cls in library if cls.__name__ == kind)(**config)
        scheduler.set_timesteps(20)
        seeds = [torch.Generator().manual_seed(seed) for seed in range(generators)]
        generator = seeds if generators > 1 else seeds[0]
        sample, weights = tensors((2, 4, 8, 8), 3, learned=False)
        sample = sample * scheduler.init_noise_sigma
        for i, t in enumerate(scheduler.timesteps):
            output = torch.tanh(0.7 * scheduler.scale_model_input(sample, t) + 0.3 * weights)
            if config.get("variance_type") == "learned_range":
                output = torch.cat([output, output.flip(0)], dim=1)
            after = {"prev_timestep": scheduler.timesteps[i + 1]} if kind[0] == "U" and i < 19 else {}
            sample = scheduler.step(output, t, sample, generator=generator, **after).prev_sample
        ends.append(sample)
    assert_same(ends[0], ends[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("thresholding", [False, True])
def test_other_types_equal_the_reference(name: str, dtype: torch.dtype, thresholding: bool) -> None:
    kind, config = PUBLISHED[name]
    if kind != "UnCLIPScheduler":
        config = {**config, "thresholding": thresholding}
    classes = {cls.__name__: cls for cls in (DDPMScheduler, DDIMScheduler, UnCLIPScheduler)}
    ours, theirs = classes[kind](**config), getattr(diffusers, kind)(**config)
    ours.set_timesteps(7)
    theirs.set_timesteps(7)
    for t in ours.timesteps:
        sample, output = tensors((2, 4, 3, 3), int(t), config.get("variance_type") == "learned_range", dtype)
        step_both(ours, theirs, sample, output, t, 5)


def test_custom_timesteps_equal_the_reference() -> None:
    ours, theirs = DDPMScheduler(), diffusers.DDPMScheduler()
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(timesteps=[980, 500, 499, 20, 3])
    assert ours.timesteps.tolist() == theirs.timesteps.tolist()
    for t in ours.timesteps:
        step_both(ours, theirs, *tensors((2, 4, 3, 3), int(t), learned=False), t, 1)


@pytest.mark.parametrize("count", [1, 3])
def test_noise_of_several_generators_equals_the_reference(count: int) -> None:
    from diffusers.utils.torch_utils import randn_tensor as reference

    draws = [
        draw((3, 2, 5), [torch.Generator().manual_seed(seed) for seed in range(count)], dtype=torch.bfloat16)
        for draw in (randn_tensor, reference)
    ]
    assert torch.equal(draws[0], draws[1])


# Closed-form derivations, where the reference is wrong or cannot run.


def gaussian_posterior(before: float, after: float, clean: np.ndarray, noisy: np.ndarray) -> tuple[np.ndarray, float]:
    """Return mean and variance of x_s given x_0 and x_t: x_t = sqrt(r) x_s + noise of variance 1 - r, r = a_t / a_s."""
    ratio = before / after
    precision = 1 / (1 - after) + ratio / (1 - ratio)
    mean = (np.sqrt(after) * clean / (1 - after) + np.sqrt(ratio) * noisy / (1 - ratio)) / precision
    return mean, 1 / precision


@pytest.mark.parametrize("kind", [DDPMScheduler, UnCLIPScheduler, DDIMScheduler])
def test_a_step_draws_from_the_gaussian_posterior(kind: Any) -> None:
    """With the true clean sample predicted, each method (DDIM with eta 1) must follow Bayes' rule."""
    settings = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample", "clip_sample": False}
    scheduler = kind(**settings)
    scheduler.set_timesteps(timesteps=[900, 600, 100])
    clean, noisy = tensors((2, 3, 4, 4), 0, learned=False, dtype=torch.float64)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    how = {"eta": 1.0} if kind is DDIMScheduler else {"prev_timestep": 600} if kind is UnCLIPScheduler else {}
    out = scheduler.step(clean, 900, noisy, generator=torch.Generator().manual_seed(1), **how)
    a = scheduler.alphas_cumprod.double().numpy()
    mean, variance = gaussian_posterior(a[900], a[600], clean.numpy(), noisy.numpy())
    np.testing.assert_allclose(out.prev_sample.numpy(), mean + np.sqrt(variance) * noise.numpy(), rtol=1e-5, atol=1e-6)


def test_fixed_large_log_is_fixed_large() -> None:
    """The reference gives NaN, because it takes the square root of a logarithm."""
    sample, output = tensors((2, 3, 4, 4), 0, learned=False)
    ends = []
    for kind in ("fixed_large", "fixed_large_log"):
        scheduler = DDPMScheduler(variance_type=kind)
        scheduler.set_timesteps(10)
        ends.append(scheduler.step(output, 500, sample, torch.Generator().manual_seed(0)).prev_sample)
    assert_same(ends[1], ends[0])


@pytest.mark.parametrize(("total", "steps"), [(50, 29), (1000, 61), (1000, 397)])
def test_trailing_spacing_has_the_requested_steps(total: int, steps: int) -> None:
    """The reference adds a timestep -1 here, with the coefficients of the noisiest timestep."""
    scheduler = DDIMScheduler(num_train_timesteps=total, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    assert len(scheduler.timesteps) == steps
    assert scheduler.timesteps[0] == total - 1
    assert abs(int(scheduler.timesteps[-1]) - (total / steps - 1)) <= 0.5


def test_dynamic_thresholding_of_embeddings() -> None:
    """The reference thresholds images only; here every vector of a batch gets its own scale."""
    scheduler = DDPMScheduler(
        thresholding=True, dynamic_thresholding_ratio=0.5, sample_max_value=2, prediction_type="sample"
    )
    scheduler.set_timesteps(10)
    output = torch.tensor([[4.0, -1.5, 0.5], [0.2, -0.1, 3.0], [9.0, -8.0, 7.0]])
    original = scheduler.step(output, 100, torch.zeros(3, 3)).pred_original_sample
    # Medians of magnitudes 1.5, 0.2 and 8, clamped to [1, 2].
    expected = torch.tensor([[1.0, -1.0, 0.5 / 1.5], [0.2, -0.1, 1.0], [1.0, -1.0, 1.0]])
    torch.testing.assert_close(original, expected)


def test_one_step_of_unclip_ends_at_its_prediction() -> None:
    """The reference divides by zero; one step must lead from the noisiest timestep to a clean sample."""
    scheduler = UnCLIPScheduler(prediction_type="sample")
    scheduler.set_timesteps(1)
    assert scheduler.timesteps.tolist() == [999]
    sample, output = tensors((2, 8), 0, learned=False)
    out = scheduler.step(output, 999, sample)
    torch.testing.assert_close(out.prev_sample, output.clamp(-1, 1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", [DDPMScheduler, DDIMScheduler, UnCLIPScheduler])
def test_an_unused_learned_variance_is_dropped(kind: Any) -> None:
    """The reference adds six channels to three."""
    scheduler = kind()
    scheduler.set_timesteps(10)
    t = int(scheduler.timesteps[4])
    sample, output = tensors((2, 3, 4, 4), 0, learned=True)
    ends = [scheduler.step(o, t, sample, generator=torch.Generator().manual_seed(0)) for o in (output, output[:, :3])]
    assert torch.equal(ends[0].prev_sample, ends[1].prev_sample)


def test_ddim_stays_a_number_when_rounding_leaves_less_than_no_noise() -> None:
    """At zero signal and eta 1 all noise is fresh, and the weight of the predicted noise may round below 0."""
    for steps in range(2, 60):
        scheduler = DDIMScheduler(
            rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type="v_prediction", clip_sample=False
        )
        scheduler.set_timesteps(steps)
        sample, output = tensors((1, 2, 2, 2), steps, learned=False)
        prev = scheduler.step(output, 999, sample, eta=1.0, variance_noise=torch.zeros_like(sample)).prev_sample
        after = scheduler.alphas_cumprod[scheduler.previous_timestep(999)]
        torch.testing.assert_close(prev, -output * after**0.5, atol=1e-3, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_noise_levels_are_rounded_last(dtype: torch.dtype) -> None:
    """1 - a_t at small t vanishes if it is computed in half precision, as in the reference."""
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012)
    sample, noise = tensors((2, 3, 4, 4), 0, learned=False, dtype=dtype)
    noisy = scheduler.add_noise(sample, noise, 0)
    a = 1 - 0.00085
    exact = a**0.5 * sample.double() + (1 - a) ** 0.5 * noise.double()
    assert (noisy.double() - exact).abs().max() < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("name", ["laplace", "sigmoid"])
def test_ddim_takes_the_beta_schedules_of_ddpm(name: str) -> None:
    assert torch.equal(DDIMScheduler(beta_schedule=name).betas, DDPMScheduler(beta_schedule=name).betas)
