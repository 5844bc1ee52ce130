"""What code written for the reference does with schedulers: constructors, configs, indices, own timesteps, copies."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import warnings
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from kandinsky22 import schedulers
from kandinsky22.errors import ConfigError, InputError
from kandinsky22.sampling.scheduler_adapter import TimestepOptions, copied, schedule_timesteps
from kandinsky22.schedulers import substitutes
from kandinsky22.schedulers.brownian import BrownianPath
from kandinsky22.schedulers.sigmas import SigmaScheduler, StatefulScheduler, VarianceExplodingScheduler

ALL = sorted({*schedulers.__all__} - {"Scheduler", "SchedulerOutput"})
BY_SIGMA = [name for name in ALL if issubclass(getattr(schedulers, name), SigmaScheduler)]
pytestmark = pytest.mark.filterwarnings("ignore:Should have t[ab]")  # of torchsde: times are rounded
NEW = ["DPMSolverSDEScheduler", "KDPM2AncestralDiscreteScheduler"]


def make(name: str, *arguments: Any, **settings: Any) -> Any:
    return getattr(schedulers, name)(*arguments, **settings)


def reference(name: str, *arguments: Any, **settings: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(diffusers, name)(*arguments, **settings)


def public(config: Any) -> dict[str, Any]:
    return {name: value for name, value in config.items() if not name.startswith("_")}


def walk(scheduler: Any, steps: int = 6, **options: Any) -> Tensor:
    """Return the result of a generation with a fixed network."""
    scheduler.set_timesteps(**({"num_inference_steps": steps} | options))
    sample = torch.randn(1, 4, 6, 6, generator=torch.Generator().manual_seed(0)) * scheduler.init_noise_sigma
    torch.manual_seed(1)
    for timestep in scheduler.timesteps:
        output = torch.tanh(scheduler.scale_model_input(sample, timestep))
        sample = scheduler.step(output, timestep, sample, return_dict=False)[0]
    return sample


# Constructors and configs


@pytest.mark.parametrize("name", ALL)
def test_positional_arguments_are_those_of_the_reference(name: str) -> None:
    arguments: list[Any] = [500] if name == "UnCLIPScheduler" else [500, 0.0002, 0.01, "scaled_linear", None]
    if name == "DPMSolverSDEScheduler":
        arguments += ["v_prediction", True]
    ours, theirs = make(name, *arguments), reference(name, *arguments)
    shared = public(ours.config).keys() & public(theirs.config).keys()
    assert {key: ours.config[key] for key in shared if key != "disable_corrector"} == {
        key: theirs.config[key] for key in shared if key != "disable_corrector"
    }
    with pytest.raises(ConfigError, match="positional arguments=40"):
        make(name, *range(40))
    with pytest.raises(ConfigError, match="num_train_timesteps passed both"):
        make(name, 500, num_train_timesteps=500)


@pytest.mark.parametrize("name", ALL)
def test_config_methods_of_the_reference(name: str, tmp_path: Path) -> None:
    scheduler = make(name, num_train_timesteps=500)
    scheduler.register_to_config(num_train_timesteps=400, of_another_class=3)
    assert (scheduler.config.num_train_timesteps, scheduler.config.of_another_class) == (400, 3)
    assert len(scheduler.betas) == 500
    with pytest.warns(FutureWarning, match="of_another_class"):
        assert scheduler.of_another_class == 3
    with pytest.raises(AttributeError, match="no_such_thing"):
        scheduler.no_such_thing  # noqa: B018
    with pytest.raises(ConfigError, match="prediction_type"):
        scheduler.register_to_config(prediction_type="speed")
    scheduler.save_config(tmp_path / "folder")
    config = type(scheduler).load_config(tmp_path / "folder")
    assert config == json.loads(scheduler.to_json_string())
    assert type(scheduler).load_config(tmp_path / "folder", return_unused_kwargs=True, speed=2) == (
        config,
        {"speed": 2},
    )
    again, unused = type(scheduler).from_config(config, return_unused_kwargs=True)
    assert public(again.config) == public(scheduler.config)
    assert unused["of_another_class"] == 3


@pytest.mark.parametrize("name", ALL)
def test_configs_go_around_all_compatible_classes(name: str) -> None:
    scheduler = make(name, num_train_timesteps=300)
    assert type(scheduler) in scheduler.compatibles
    assert len(scheduler.compatibles) > 14
    for other in scheduler.compatibles:
        back = type(scheduler).from_config(other.from_config(scheduler.config).config)
        assert public(back.config).items() >= public(scheduler.config).items()
        assert torch.equal(back.betas, scheduler.betas)


@pytest.mark.parametrize("source", [name for name in ALL if name != "UnCLIPScheduler"])
@pytest.mark.parametrize("target", [name for name in ALL if name != "UnCLIPScheduler"])
def test_every_config_of_the_reference_loads_in_every_class(source: str, target: str, tmp_path: Path) -> None:
    """With explicit defaults, as in files: among them `variance_type: null`, which DDPM cannot use."""
    reference(source).save_pretrained(tmp_path)
    ema = {"decay": 0.999, "optimization_step": 7, "use_ema_warmup": False, "update_after_step": 0, "power": 0.75}
    config = {**json.loads((tmp_path / "scheduler_config.json").read_text()), **ema, "solver_order": 5}
    scheduler = getattr(schedulers, target).from_config(config)
    scheduler.set_timesteps(4)
    assert scheduler.config.decay == 0.999
    assert scheduler.config.get("variance_type", "fixed_small") in (None, "fixed_small")


@pytest.mark.parametrize("name", ALL)
def test_settings_that_are_none_are_what_the_reference_makes_of_them(name: str) -> None:
    kind = getattr(schedulers, name)
    scheduler = kind.from_config({setting: None for setting in kind.config_class.names()})
    for setting, value in public(scheduler.config).items():
        default = kind.config_class.__dataclass_fields__[setting].default
        assert value == (False if isinstance(default, bool) else default)
    flags = [setting for setting, value in public(kind().config).items() if isinstance(value, bool)]
    flags = [setting for setting in flags if setting not in getattr(kind.config_class, "sigma_schedules", ())]
    assert all(kind.from_config({setting: 1}).config[setting] is True for setting in flags)


def test_settings_of_other_classes_are_accepted_with_a_warning() -> None:
    config = schedulers.DDPMScheduler().config
    with pytest.warns(UserWarning, match=r"EulerDiscreteScheduler does not have the settings algorithm_type"):
        scheduler = schedulers.EulerDiscreteScheduler.from_config(config, algorithm_type="sde-dpmsolver++")
    assert (
        schedulers.DPMSolverMultistepScheduler.from_config(scheduler.config).config.algorithm_type == "sde-dpmsolver++"
    )
    inert = {"flow_shift": 3.0, "shift_terminal": 0.1, "use_flow_sigmas": False}
    assert schedulers.UniPCMultistepScheduler.from_config(inert).config.flow_shift == 3.0
    with pytest.raises(ConfigError, match="use_flow_sigmas"):
        schedulers.UniPCMultistepScheduler.from_config({**inert, "use_flow_sigmas": True})


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    "settings",
    [
        {"num_train_timesteps": 10**8},
        {"num_train_timesteps": 10**400},
        {"num_train_timesteps": "1000"},
        {"num_train_timesteps": [1000]},
        {"num_train_timesteps": True},
        {"beta_end": 0.5},
        {"beta_end": True},
        {"beta_end": [0.02]},
        {"beta_start": 1e-300},
        {"beta_start": math.nan},
        {"beta_start": "0.1"},
        {"beta_start": 0.4, "beta_end": 0.4},
        {"trained_betas": "linear"},
        {"trained_betas": {0: 0.1}},
        {"trained_betas": torch.zeros(10).to_sparse()},
        {"trained_betas": torch.zeros(10, device="meta")},
        {"trained_betas": np.full((10, 2), 0.1)},
        {"trained_betas": np.full(10, 0.1 + 0j)},
        {"trained_betas": np.zeros(10**7)},
        {"trained_betas": [True] * 10},
        {"trained_betas": [0.5] * 1000},
        {"clip_sample_range": 10**400},
        {"timestep_scaling": 1e300},
        {"sigma_min": 1e-300},
        {"steps_offset": 10**400},
        {"noise_sampler_seed": -1},
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_refused_at_once(name: str, settings: dict[str, Any]) -> None:
    kind = getattr(schedulers, name)
    if settings.keys() <= set(kind.config_class.names()):
        with pytest.raises(ConfigError, match=f"{name}: .*{next(iter(settings))}.* is invalid: expected"):
            kind(**settings)
        with pytest.raises(ConfigError, match=f"{name}: .*{next(iter(settings))}.* is invalid: expected"):
            kind.from_config(settings)


@pytest.mark.parametrize("config", [{1: 2}, [("beta_end", 0.1)], "folder", None, 5])
def test_configs_that_are_none_are_refused(config: Any) -> None:
    with pytest.raises(InputError, match="config="):
        schedulers.DDPMScheduler.from_config(config)


@pytest.mark.parametrize("defaulted", [5, "beta_end", [["beta_end"]], {"a": 1}, [3]])
def test_a_damaged_list_of_defaults_is_ignored(defaulted: Any) -> None:
    assert (
        schedulers.DDPMScheduler.from_config({"_use_default_values": defaulted, "beta_end": 0.01}).config.beta_end
        == 0.01
    )


def test_pure_noise_and_predicted_noise_exclude_each_other() -> None:
    scheduler = schedulers.DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    assert torch.isfinite(walk(scheduler)).all()  # samples are clipped
    scheduler = schedulers.DDIMScheduler.from_config(scheduler.config, clip_sample=False)
    with pytest.raises(InputError, match=r"prediction_type='epsilon'.*pure noise"):
        scheduler.set_timesteps(5)
    assert torch.isfinite(
        walk(schedulers.DDIMScheduler.from_config(scheduler.config, prediction_type="v_prediction"))
    ).all()


# Outputs and indices


def test_outputs_are_mappings_too() -> None:
    scheduler = schedulers.DDPMScheduler()
    out = scheduler.step(torch.zeros(1, 4), 5, torch.ones(1, 4))
    assert list(out.keys()) == ["prev_sample", "pred_original_sample"]
    assert [name for name, _ in out.items()] == list(out)
    assert [id(value) for value in out.values()] == [id(value) for value in out.to_tuple()]
    assert out.get("prev_sample") is out["prev_sample"] is out[0]
    assert out.get("missing", 3) == 3
    assert "prev_sample" in out and "missing" not in out


@pytest.mark.parametrize("name", [name for name in ALL if issubclass(getattr(schedulers, name), StatefulScheduler)])
def test_indices_are_those_of_the_reference(name: str) -> None:
    ours = make(name)
    ours.set_timesteps(10)
    assert (ours.step_index, ours.begin_index) == (None, None)
    index = 4 if ours.order == 1 else 6
    ours.set_begin_index(index)
    sample, timestep = torch.ones(1, 4, 4, 4), ours.timesteps[index]
    ours.scale_model_input(sample, timestep)
    ours.step(torch.zeros(1, 4, 4, 4), timestep, sample)
    assert (ours.step_index, ours.begin_index) == (index + 1, index)
    # In KDPM2AncestralDiscreteScheduler of the reference rounding makes equal timesteps differ.
    if hasattr(reference(name), "index_for_timestep") and name != "KDPM2AncestralDiscreteScheduler":
        theirs = reference(name)
        theirs.set_timesteps(10)
        assert [ours.index_for_timestep(t) for t in ours.timesteps] == [
            theirs.index_for_timestep(t) for t in theirs.timesteps
        ]
    ours.set_timesteps(10)
    assert (ours.step_index, ours.begin_index) == (None, None)
    for invalid in (-1, 1000, 1.5, True, "2"):
        with pytest.raises(InputError, match="begin_index="):
            ours.set_begin_index(invalid)


@pytest.mark.parametrize("name", [name for name in BY_SIGMA if make(name).steps_before_set_timesteps])
def test_steps_before_set_timesteps_are_those_of_the_reference(name: str) -> None:
    ours, theirs = make(name), reference(name)
    sample, results = torch.linspace(-1, 1, 64).reshape(1, 4, 4, 4), []
    for scheduler in (ours, theirs):
        timestep = scheduler.timesteps[0]
        torch.manual_seed(0)
        model_input = scheduler.scale_model_input(sample, timestep)
        results += [model_input, scheduler.step(torch.tanh(model_input), timestep, sample)[0]]
    torch.testing.assert_close(results[0], results[2])
    torch.testing.assert_close(results[1], results[3], rtol=1e-4, atol=1e-4)
    assert isinstance(ours.init_noise_sigma, Tensor)


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler", "UnCLIPScheduler"])
def test_variances_are_those_of_the_reference(name: str) -> None:
    ours, theirs = make(name), reference(name)
    for timestep in (3, 500, 999):
        arguments = [timestep, timestep - 1] if name == "DDIMScheduler" else [timestep]
        torch.testing.assert_close(ours._get_variance(*arguments), torch.as_tensor(theirs._get_variance(*arguments)))


def test_previous_timesteps_are_tensors_for_tensors() -> None:
    scheduler = schedulers.DDPMScheduler()
    scheduler.set_timesteps(timesteps=[100, 7, 0])
    assert [scheduler.previous_timestep(t).item() for t in scheduler.timesteps] == [7, 0, -1]
    assert scheduler.previous_timestep(100) == 7


@pytest.mark.parametrize("skip", [True, False])
def test_pndm_has_both_parts(skip: bool) -> None:
    ours, theirs = make("PNDMScheduler", skip_prk_steps=skip), reference("PNDMScheduler", skip_prk_steps=skip)
    samples = []
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(8)
        sample = torch.linspace(-1, 1, 64).reshape(1, 4, 4, 4)
        for timesteps, step in (("prk_timesteps", "step_prk"), ("plms_timesteps", "step_plms")):
            for timestep in getattr(scheduler, timesteps):
                sample = getattr(scheduler, step)(torch.tanh(sample), int(timestep), sample).prev_sample
        samples.append(sample)
    torch.testing.assert_close(*samples)
    with pytest.raises(InputError, match="after the last"):
        ours.step_plms(sample, 0, sample)
    if not skip:
        ours.set_timesteps(8)
        with pytest.raises(InputError, match="before the Runge-Kutta"):
            ours.step_plms(sample, 0, sample)


# Own timesteps and sigmas


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
def test_every_scheduler_accepts_its_own_timesteps(name: str, spacing: str) -> None:
    settings = {"timestep_spacing": spacing} if "timestep_spacing" in make(name).config.names() else {}
    scheduler, again = make(name, **settings), make(name, **settings)
    expected = walk(scheduler)
    result = walk(again, num_inference_steps=None, timesteps=scheduler.timesteps)
    assert torch.isfinite(result).all()
    one_evaluation = scheduler.order == 1 and name not in ("PNDMScheduler", "DDIMScheduler", "LCMScheduler")
    if one_evaluation or name == "HeunDiscreteScheduler":
        assert torch.equal(again.timesteps, scheduler.timesteps)
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in BY_SIGMA if not name.startswith("KDPM2") and name not in NEW])
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
def test_every_scheduler_accepts_its_own_sigmas(name: str, final: str) -> None:
    """With `sigma_min` the last two are equal: the last step has no length."""
    settings = {"final_sigmas_type": final} if "final_sigmas_type" in make(name).config.names() else {}
    scheduler, again = make(name, **settings), make(name, **settings)
    expected = walk(scheduler)
    result = walk(again, num_inference_steps=None, sigmas=scheduler.sigmas)
    torch.testing.assert_close(again.sigmas, scheduler.sigmas)
    torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", BY_SIGMA)
def test_a_last_step_without_length_changes_nothing(name: str) -> None:
    long, short = (walk(make(name), num_inference_steps=None, sigmas=[9.0, 2.0, 0.4, *more]) for more in ([0.4], []))
    assert torch.isfinite(long).all()
    # The orders of the last steps of these depend on the number of steps.
    if name not in ("DEISMultistepScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"):
        torch.testing.assert_close(long, short, rtol=1e-4, atol=1e-4)


# New methods


@pytest.mark.parametrize("name", NEW)
@pytest.mark.parametrize("settings", [{}, {"use_karras_sigmas": True}, {"prediction_type": "v_prediction"}], ids=str)
@pytest.mark.parametrize("steps", [1, 5, 25])
def test_new_methods_are_those_of_the_reference(name: str, settings: dict[str, Any], steps: int) -> None:
    """The noise is equal too. The reference draws that of DPMSolverSDEScheduler with torchsde."""
    if name == "DPMSolverSDEScheduler":
        pytest.importorskip("torchsde")
    ours, theirs = make(name, **settings), reference(name, **settings)
    results = [walk(scheduler, steps) for scheduler in (ours, theirs)]
    torch.testing.assert_close(ours.timesteps.double(), theirs.timesteps.double(), rtol=0, atol=2e-3)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5 * float(results[1].abs().max()))


def test_seeds_of_the_stochastic_solver() -> None:
    first = walk(make("DPMSolverSDEScheduler", noise_sampler_seed=3))
    assert torch.equal(first, walk(make("DPMSolverSDEScheduler", noise_sampler_seed=3)))
    assert not torch.equal(first, walk(make("DPMSolverSDEScheduler", noise_sampler_seed=4)))
    scheduler, sample = make("DPMSolverSDEScheduler"), torch.ones(2, 4, 6, 6)
    rows = []
    for seeds in ([1, 2], [2]):
        scheduler.set_timesteps(5)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        t, x = scheduler.timesteps[0], sample[: len(seeds)]
        rows.append(scheduler.step(torch.zeros_like(x), t, x, generator=generators)[0][-1:])
    assert torch.equal(*rows)
    scheduler = make("DPMSolverSDEScheduler", noise_sampler_seed=[1, 2, 3])
    scheduler.set_timesteps(5)
    with pytest.raises(InputError, match="number of seeds=3"):
        scheduler.step(sample, scheduler.timesteps[0], sample)


def test_noise_of_a_path_does_not_depend_on_the_order_of_queries() -> None:
    path, backwards = (BrownianPath(0.03, 15.0, 5, (200, 200)) for _ in range(2))
    times = [0.03, 0.5, 0.51, 2.0, 7.25, 15.0]
    forward = [path.increment(a, b) for a, b in itertools.pairwise(times)]
    reverse = [backwards.increment(b, a) for a, b in reversed(list(itertools.pairwise(times)))][::-1]
    for increment, opposite, length in zip(forward, reverse, np.diff(times), strict=True):
        assert torch.equal(increment, -opposite)
        assert float(increment.std()) == pytest.approx(length**0.5, rel=0.02)
    torch.testing.assert_close(sum(forward), path.increment(0.03, 15.0), rtol=0, atol=1e-5)
    assert abs(float((forward[1] * forward[2]).mean())) < 0.01


def test_paths_are_those_of_torchsde() -> None:
    torchsde = pytest.importorskip("torchsde")
    theirs = torchsde.BrownianInterval(
        t0=0.03, t1=15.0, size=(3, 4), dtype=torch.float32, entropy=9, tol=1e-6, pool_size=24, halfway_tree=True
    )
    ours = BrownianPath(0.03, 15.0, 9, (3, 4))
    for first, second in [(0.03, 15.0), (1.5, 2.25), (7.123456, 7.2), (0.031, 14.9)]:
        torch.testing.assert_close(ours.increment(first, second), theirs(first, second), rtol=1e-4, atol=1e-5)


# Checkpoints that name other classes


@pytest.mark.parametrize("name", sorted(substitutes.SUBSTITUTES))
def test_other_schedulers_of_the_reference_have_a_substitute(name: str, tmp_path: Path) -> None:
    if hasattr(diffusers, name):
        with contextlib.suppress(ImportError):  # of a package that the class needs
            reference(name).save_pretrained(tmp_path)
    if not (tmp_path / "scheduler_config.json").exists():
        (tmp_path / "scheduler_config.json").write_text(json.dumps({"_class_name": name, "beta_end": 0.012}))
    reader = substitutes.substitute_reader(name)
    assert reader is not None
    with pytest.warns(UserWarning, match=f"{name}.*{reader.substitute.name}") as record:
        scheduler = reader.from_pretrained(tmp_path)
    assert len(record) == 1
    assert type(scheduler).__name__ == reader.substitute.name
    assert torch.isfinite(walk(scheduler)).all()


def test_every_scheduler_of_the_reference_is_known() -> None:
    names = {name for name in dir(diffusers) if name.endswith("Scheduler") and not name.startswith(("_", "Flax"))}
    for name in names - set(ALL):
        assert (substitutes.substitute_reader(name) is None) != (substitutes.reason_against(name) is None), name


# Copies


@pytest.mark.parametrize("library", [schedulers, diffusers], ids=["ours", "theirs"])
@pytest.mark.parametrize("name", ALL)
def test_a_copy_in_the_middle_goes_on_alone(name: str, library: Any) -> None:
    if name == "DPMSolverSDEScheduler" and library is diffusers:
        pytest.skip("torchsde's trees cannot be copied in use; calls set timesteps on the copy, which drops the tree")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scheduler = getattr(library, name)()
    scheduler.set_timesteps(8)
    weight = torch.ones(1, 4, 4, 4, requires_grad=True)  # with a graph, as in training
    sample = weight * 0.5
    for timestep in scheduler.timesteps[:4]:
        model_input = scheduler.scale_model_input(sample, timestep)
        sample = scheduler.step(torch.tanh(model_input), timestep, sample, return_dict=False)[0]
    twin, results = copied(scheduler), []
    for each in (scheduler, twin):
        torch.manual_seed(0)
        x = sample.detach()
        for timestep in scheduler.timesteps[4:]:
            x = each.step(torch.tanh(each.scale_model_input(x, timestep)), timestep, x, return_dict=False)[0].detach()
        results.append(x)
    assert torch.equal(*results)


def test_a_replaced_method_of_a_scheduler_is_called() -> None:
    scheduler = schedulers.DDIMScheduler()
    original, calls = scheduler.step, []

    def step(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments[1])
        return original(*arguments, **options)

    scheduler.step = step  # type: ignore[method-assign]
    schedule = schedule_timesteps(scheduler, TimestepOptions(4), shape=(1, 4, 8, 8), device=torch.device("cpu"))
    sample = torch.ones(1, 4, 8, 8)
    out = schedule.scheduler.step(sample, schedule.timesteps[0], sample)[0]
    plain = schedulers.DDIMScheduler()
    plain.set_timesteps(4)
    assert torch.equal(out, plain.step(sample, plain.timesteps[0], sample)[0])
    assert len(calls) == 1


def test_variance_exploding_methods_have_a_tensor_of_initial_noise() -> None:
    for name in ALL:
        exploding = issubclass(getattr(schedulers, name), VarianceExplodingScheduler)
        assert isinstance(make(name).init_noise_sigma, Tensor) == exploding
