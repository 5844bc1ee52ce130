"""Strength counts steps, whatever the number of network evaluations in each, and runs begin where a step begins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import PIL.Image
import pytest
import torch
from tests.pipelines.tiny import DIM, pair, seeded

import kandinsky22
from kandinsky22 import PNDMScheduler, schedulers
from kandinsky22.sampling.scheduler_adapter import TimestepOptions, TimestepSchedule, schedule_timesteps, step_starts

NAMES = sorted({*schedulers.__all__} - {"Scheduler", "SchedulerOutput"})


def schedule_of(scheduler: Any, steps: int) -> TimestepSchedule:
    """Return the schedule of a call."""
    return schedule_timesteps(scheduler, TimestepOptions(steps), shape=(1, 4, 8, 8), device=torch.device("cpu"))


@pytest.mark.parametrize("skips", [False, True])
@pytest.mark.parametrize(
    ("steps", "strength", "expected"),
    [
        (10, 0.3, [200, 100, 0]),
        (10, 0.5, [400, 300, 200, 100, 0]),
        (20, 0.3, [250, 200, 150, 100, 50, 0]),
        (5, 0.4, [200, 0]),
    ],
)
@pytest.mark.parametrize("name", ["Img2Img", "PriorEmb2Emb"])
def test_pndm_runs_whole_steps(
    name: str, steps: int, strength: float, expected: list[int], skips: bool, make_pipeline: Callable[[str], Any]
) -> None:
    """These runs leave out the Runge-Kutta steps, or the step that is taken twice, and evaluate once per step."""
    pipe = make_pipeline(name)
    pipe.scheduler = PNDMScheduler.from_config(pipe.scheduler.config, skip_prk_steps=skips)
    visited: list[int] = []

    def note(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> None:
        visited.append(int(timestep))

    call: dict[str, Any] = {"prompt": "a cat", "image": torch.zeros(1, DIM)}
    if name == "Img2Img":
        call = {**pair(), "image": PIL.Image.new("RGB", (32, 32)), "height": 32, "width": 32, "output_type": "latent"}
    options: dict[str, Any] = {"num_inference_steps": steps, "strength": strength, "generator": seeded(0)}
    pipe(**call, **options, callback_on_step_end=note)
    assert visited == expected
    pipe.scheduler.set_timesteps(steps)
    timesteps, count = pipe.get_timesteps(steps, strength)
    assert timesteps.tolist() == expected
    assert count == len(expected)


@pytest.mark.parametrize(("skips", "starts"), [(False, [0, 4, 8, 12, 13, 14]), (True, [0, 2, 3, 4, 5, 6])])
def test_steps_of_pndm_begin_at_known_evaluations(skips: bool, starts: list[int]) -> None:
    schedule = schedule_of(PNDMScheduler(skip_prk_steps=skips), 6)
    assert step_starts(schedule.scheduler) == schedule.scheduler.step_starts == starts
    assert len(schedule.timesteps) == starts[-1] + 1
    expected = [sum(start <= index for start in starts) - 1 for index in range(len(schedule.timesteps))]
    assert [schedule.progress(index) for index in range(len(schedule.timesteps))] == [step / 6 for step in expected]
    last = schedule.after_strength(0.5)
    assert [last.progress(index) for index in range(len(last.timesteps))] == [3 / 6, 4 / 6, 5 / 6]


@pytest.mark.parametrize("skips", [False, True])
@pytest.mark.parametrize("left_out", range(7))
def test_pndm_integrates_from_any_step(skips: bool, left_out: int) -> None:
    """The network predicts the noise of a clean sample of zeros exactly, thus each step is exact, and so is the end."""
    scheduler = PNDMScheduler(skip_prk_steps=skips, set_alpha_to_one=True)
    schedule = schedule_of(scheduler, 10).after_strength((10 - left_out) / 10)
    noise = torch.randn(1, 4, 2, 2, generator=seeded(0), dtype=torch.float64)
    zeros, stepping = torch.zeros_like(noise), schedule.scheduler
    sample = stepping.add_noise(zeros, noise, schedule.timesteps[:1])
    assert int(schedule.timesteps[0]) == (9 - left_out) * 100
    for index, timestep in enumerate(schedule.timesteps):
        expected = stepping.add_noise(zeros, noise, timestep[None])
        torch.testing.assert_close(sample, expected, rtol=0, atol=1e-9, msg=f"evaluation {index}")
        sample = stepping.step(noise, timestep, sample).prev_sample
    assert float(sample.abs().max()) < 1e-9


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("steps", [2, 5, 8])
def test_steps_are_counted_in_all_schedulers(name: str, steps: int, prior: Any, decoder: Any) -> None:
    config = (prior if name == "UnCLIPScheduler" else decoder).scheduler.config
    schedule = schedule_of(getattr(kandinsky22, name).from_config(config), steps)
    starts, timesteps = step_starts(schedule.scheduler), schedule.timesteps
    assert len(starts) == schedule.scheduler.num_inference_steps == steps
    for count in range(steps + 1):
        last = schedule.after_strength((count + 0.5) / steps if count < steps else 1)
        first = starts[steps - count] if count else len(timesteps)
        assert torch.equal(last.timesteps, timesteps[first:])


def test_schedulers_of_other_libraries_have_equal_steps() -> None:
    class Other:
        timesteps, order = torch.arange(9), 2

    class Without:
        timesteps = torch.arange(3)

    assert step_starts(Other()) == [0, 2, 4, 6, 8]
    assert step_starts(Without()) == [0, 1, 2]
