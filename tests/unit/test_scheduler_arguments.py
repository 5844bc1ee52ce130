"""Every scheduler refuses invalid steps, timesteps, sigmas and settings at once and by name."""

from __future__ import annotations

import inspect
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from kandinsky22 import schedulers
from kandinsky22.errors import ConfigError, InputError, KandinskyError

ALL = sorted({*schedulers.__all__} - {"Scheduler", "SchedulerOutput"})
OF_LEVELS = [name for name in ALL if "sigmas" in inspect.signature(getattr(schedulers, name).set_timesteps).parameters]
FRACTIONAL = [name for name in ALL if getattr(schedulers, name).fractional_timesteps]
REPEATS_TIMESTEPS = [name for name in ALL if getattr(schedulers, name).order == 2] + ["PNDMScheduler"]
NO_COUNTS = [0, -1, -1000, 2.5, "4", True, math.nan, [4], torch.tensor([4, 5]), 1j, b"4"]
TOTAL = 200


def make(name: str, **config: Any) -> Any:
    return getattr(schedulers, name)(num_train_timesteps=TOTAL, **config)


def largest(name: str) -> int:
    """Return the largest number of steps of a class: consistency models have those of their distillation."""
    return 50 if name == "LCMScheduler" else TOTAL


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("steps", NO_COUNTS, ids=repr)
def test_invalid_step_counts_are_refused(name: str, steps: Any) -> None:
    with pytest.raises(InputError, match="num_inference_steps="):
        make(name).set_timesteps(steps)


@pytest.mark.parametrize("name", ALL)
@examples(max_examples=25, deadline=None)
@given(steps=st.integers(-(10**6), 10**6))
def test_any_number_of_steps_is_set_or_refused_by_name(name: str, steps: int) -> None:
    scheduler = make(name)
    if 0 < steps <= largest(name):
        scheduler.set_timesteps(steps)
        visits = scheduler.timesteps.tolist()
        assert len(visits) >= steps
        assert all(a >= b for a, b in itertools.pairwise(visits)) or name == "PNDMScheduler"
        assert min(visits) >= 0 and max(visits) < TOTAL
    else:
        with pytest.raises(InputError, match=f"num_inference_steps={steps}.*expected an integer from 1 to"):
            scheduler.set_timesteps(steps)


@pytest.mark.parametrize("name", ALL)
@examples(max_examples=40, deadline=None)
@given(
    timesteps=st.lists(st.integers(-3, TOTAL + 3), max_size=6),
    form=st.sampled_from([list, tuple, np.array, lambda steps: torch.tensor(steps, dtype=torch.int64)]),
)
def test_any_timesteps_are_visited_or_refused_by_name(name: str, timesteps: list[int], form: Any) -> None:
    scheduler = make(name)
    own = timesteps
    if name in REPEATS_TIMESTEPS:  # the form of its own timesteps: any but the first may be repeated once
        own = [step for index, step in enumerate(timesteps) if index < 2 or step != timesteps[index - 1]]
        own = own if all(timesteps.count(step) < 3 for step in timesteps) else timesteps
    fit = bool(timesteps) and all(a > b for a, b in itertools.pairwise(own))
    fit = fit and min(timesteps) >= 0 and max(timesteps) < TOTAL
    given_form = form(timesteps)
    if fit and (name != "LCMScheduler" or len(timesteps) <= 50):
        scheduler.set_timesteps(timesteps=given_form)
        assert {float(step) for step in timesteps} <= {float(step) for step in scheduler.timesteps.tolist()}
    else:
        with pytest.raises(InputError, match="timesteps"):
            scheduler.set_timesteps(timesteps=given_form)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("timesteps", [5, 3.5, "fast", None, [None], ["5"], [5.5, 2], [[9, 3], [1]], {5: 3}], ids=repr)
def test_invalid_timesteps_are_refused(name: str, timesteps: Any) -> None:
    if timesteps == [5.5, 2] and name in FRACTIONAL:
        make(name).set_timesteps(timesteps=timesteps)
        return
    with pytest.raises(InputError, match="timesteps"):
        make(name).set_timesteps(timesteps=timesteps)


@pytest.mark.parametrize("name", OF_LEVELS)
@examples(max_examples=40, deadline=None)
@given(sigmas=st.lists(st.floats(-1, 200, width=32) | st.just(math.nan) | st.just(math.inf), max_size=5))
def test_any_levels_are_visited_or_refused_by_name(name: str, sigmas: list[float]) -> None:
    scheduler = make(name)
    own = sigmas
    if name in REPEATS_TIMESTEPS and sigmas[:1] != sigmas[1:2] and all(sigmas.count(level) < 3 for level in sigmas):
        own = [level for index, level in enumerate(sigmas) if index == 0 or level != sigmas[index - 1]]
    fit = len(own) > 1 and all(a > b for a, b in itertools.pairwise(own[:-1])) and own[-2] >= own[-1] >= 0
    fit = fit and own[-2] >= 1e-6 and (own[-1] == 0 or own[-1] >= 1e-6)
    if fit and sigmas[0] < math.inf:
        scheduler.set_timesteps(sigmas=sigmas)
        reached = scheduler.sigmas.tolist()
        assert all(min(abs(level - each) for each in reached) < 1e-6 * max(1, level) for level in sigmas)
    else:
        with pytest.raises(InputError, match="sigmas="):
            scheduler.set_timesteps(sigmas=sigmas)


@pytest.mark.parametrize("name", ALL)
def test_refused_arguments_change_nothing(name: str) -> None:
    """Return the whole state of a scheduler's timesteps."""
    scheduler = make(name)
    scheduler.set_timesteps(7)
    before = scheduler.timesteps.clone()
    for wrong in ({"num_inference_steps": 0}, {"timesteps": [3, 9]}, {"num_inference_steps": 3, "timesteps": [3]}):
        with pytest.raises(InputError):
            scheduler.set_timesteps(**wrong)
        assert torch.equal(scheduler.timesteps, before)
        assert scheduler.num_inference_steps == (7 if name != "PNDMScheduler" else scheduler.num_inference_steps)
    again = make(name)
    again.set_timesteps(7)
    sample = torch.linspace(-1, 1, 8).reshape(1, 2, 2, 2)
    ends = []
    for each in (scheduler, again):
        model_input = each.scale_model_input(sample, each.timesteps[0])
        options = {"generator": torch.Generator().manual_seed(0)}
        accepted = inspect.signature(each.step).parameters
        given_options = {key: value for key, value in options.items() if key in accepted}
        ends.append(each.step(model_input, each.timesteps[0], sample, **given_options)[0])
    assert torch.equal(*ends)


# Settings


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("num_train_timesteps", 0),
        ("num_train_timesteps", 10.5),
        ("prediction_type", "noise"),
        ("prediction_type", None),
        ("beta_schedule", "circular"),
        ("no_such_setting", 1),
        ("thresholdin", True),
    ],
)
def test_invalid_and_unknown_settings_are_refused(name: str, setting: str, value: Any) -> None:
    kind = getattr(schedulers, name)
    for build in (lambda: kind(**{setting: value}), lambda: kind.from_config(kind().config, **{setting: value})):
        with pytest.raises(ConfigError, match=setting):
            build()


@pytest.mark.parametrize("name", ALL)
@examples(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_value_of_any_setting_works_or_is_named(name: str, data: st.DataObject) -> None:
    kind = getattr(schedulers, name)
    setting = data.draw(st.sampled_from(sorted(kind.config_class.names())))
    values: list[Any] = [
        None,
        0,
        -1,
        1,
        3,
        0.5,
        2.0,
        math.nan,
        math.inf,
        True,
        False,
        "",
        "zero",
        "linear",
        [],
        [0.1],
        {},
    ]
    value = data.draw(st.sampled_from(values))
    config = {"num_train_timesteps": 20, setting: value}
    try:
        scheduler = kind(**config)
        scheduler.set_timesteps(3)
    except KandinskyError as error:
        assert any(word in str(error) for word in (setting, "_inference_steps", "timesteps", "trained_betas"))
        return
    sample = torch.linspace(-1, 1, 8).reshape(1, 2, 2, 2)
    for timestep in scheduler.timesteps:
        model_input = scheduler.scale_model_input(sample, timestep)
        sample = scheduler.step(torch.tanh(model_input), timestep, sample)[0]
    assert sample.shape == (1, 2, 2, 2)
    assert torch.isfinite(sample).all()


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("options", [{"speed": 2}, {"num_inference_steps": 3, "gamma": 1}], ids=str)
def test_unknown_options_are_refused(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="unexpected keyword"):
        make(name).set_timesteps(**options)


@pytest.mark.parametrize("name", ALL)
def test_outputs_that_do_not_fit(name: str) -> None:
    scheduler = make(name)
    scheduler.set_timesteps(3)
    sample = torch.zeros(1, 4, 2, 2)
    for wrong in (torch.zeros(1, 5, 2, 2), torch.zeros(2, 4, 2, 2), torch.zeros(1, 4, 2, 3), torch.zeros(1, 12, 2, 2)):
        scheduler.scale_model_input(sample, scheduler.timesteps[0])
        with pytest.raises(InputError, match=r"model_output\.shape="):
            scheduler.step(wrong, scheduler.timesteps[0], sample)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    "device", ["meta", "", "nowhere", "cuda:99", -1, 2**70, True, 0.5, ["cpu"], np.zeros(2)], ids=repr
)
def test_invalid_devices_are_refused_and_change_nothing(name: str, device: Any) -> None:
    scheduler = make(name)
    scheduler.set_timesteps(4)
    before = scheduler.timesteps.tolist(), scheduler.num_inference_steps, scheduler.custom_timesteps
    with pytest.raises(InputError, match="device="):
        scheduler.set_timesteps(2, device=device)
    assert (scheduler.timesteps.tolist(), scheduler.num_inference_steps, scheduler.custom_timesteps) == before


@pytest.mark.parametrize("name", OF_LEVELS)
@pytest.mark.parametrize("argument", ["timesteps", "sigmas"])
@pytest.mark.parametrize(
    "value",
    [
        np.broadcast_to(np.float32(0.5), (1, 10**6, 10**6)),
        torch.zeros(1).expand(10**12),
        torch.zeros(3, device="meta"),
        range(10**12, 0, -1),
        ["2", "1"],
        [10**400, 0],
    ],
    ids=["three dimensions", "endless tensor", "meta", "endless range", "texts", "large"],
)
def test_schedules_of_any_size_and_kind_are_refused(name: str, argument: str, value: Any) -> None:
    scheduler = make(name)
    scheduler.set_timesteps(4)
    with pytest.raises(InputError, match=argument):
        scheduler.set_timesteps(**{argument: value})
    assert not scheduler.custom_timesteps
    assert scheduler.num_inference_steps == 4


@pytest.mark.parametrize(
    "strength", ["", "x", None, True, math.nan, 0, 1.5, np.zeros(2), torch.zeros(0), 10**400], ids=repr
)
def test_consistency_models_refuse_invalid_strengths(strength: Any) -> None:
    with pytest.raises(InputError, match="strength="):
        make("LCMScheduler").set_timesteps(2, strength=strength)


def test_long_names_of_settings_are_shortened() -> None:
    with pytest.raises(ConfigError) as caught:
        make("DDIMScheduler", **{"n" * 10**5: 1})
    assert len(str(caught.value)) < 4000
