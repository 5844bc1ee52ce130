"""State of pipelines: components, copies, the scheduler of a call, and errors that name the argument of the caller."""

from __future__ import annotations

import copy
import pickle
import threading
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from tests.pipelines.tiny import pair, seeded
from torch import nn

from kandinsky22 import (
    DDIMScheduler,
    InputError,
    KandinskyV22Pipeline,
    KandinskyV22PriorPipeline,
)
from kandinsky22.runtime.device_offload import offload_of
from kandinsky22.runtime.lazy_component import LazyComponent
from kandinsky22.runtime.network_state import state_of
from kandinsky22.sampling.scheduler_adapter import TimestepOptions, schedule_timesteps

CALL: dict[str, Any] = {**pair(), "num_inference_steps": 2, "output_type": "latent"}


@pytest.mark.parametrize("strength", [np.float32(0.29), Fraction(29, 100), 0.29], ids=repr)
def test_strength_counts_steps_in_double_precision(decoder: KandinskyV22Pipeline, strength: Any) -> None:
    schedule = schedule_timesteps(
        decoder.scheduler, TimestepOptions(100), shape=(1, 4, 8, 8), device=torch.device("cpu")
    )
    steps = len(schedule.after_strength(strength).timesteps)
    assert steps == int(100 * float(strength))


def test_components_registered_again_are_offloaded_like_the_others(decoder: KandinskyV22Pipeline) -> None:
    unet, movq = copy.deepcopy(decoder.unet), copy.deepcopy(decoder.movq)
    decoder.enable_low_memory()
    decoder.register_modules(unet=unet, movq=movq)
    assert offload_of(unet) is not None
    assert offload_of(movq) is not None


def test_an_invalid_component_leaves_the_old_one(decoder: KandinskyV22Pipeline) -> None:
    unet = decoder.unet
    with pytest.raises(InputError, match="unet"):
        decoder.register_modules(unet="a network")
    assert decoder.unet is unet


def test_copies_have_components_of_their_own(decoder: KandinskyV22Pipeline) -> None:
    scheduler, copied = decoder.scheduler, copy.copy(decoder)
    copied.scheduler = DDIMScheduler()
    assert decoder.scheduler is scheduler
    del copied.movq
    assert "movq" not in copied.components
    assert decoder.movq is not None


def test_reading_the_record_of_a_network_attaches_nothing() -> None:
    layer = nn.Linear(2, 2)
    assert state_of(layer).offload is offload_of(layer) is None
    assert b"kandinsky22" not in pickle.dumps(layer)


def test_callbacks_see_the_scheduler_of_the_call(decoder: KandinskyV22Pipeline) -> None:
    seen: list[tuple[int, list[int]]] = []

    def on_step_end(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> None:
        seen.append((int(timestep), pipe.active_scheduler.timesteps.tolist()))

    before = decoder.scheduler.timesteps.tolist()
    decoder(**CALL, callback_on_step_end=on_step_end)
    (first, timesteps), (second, _) = seen
    assert timesteps == [first, second]
    assert decoder.scheduler.timesteps.tolist() == before


def test_guidance_can_be_set_in_nested_calls_and_only_in_calls(decoder: KandinskyV22Pipeline) -> None:
    def on_step_end(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> None:
        if step == 0:
            pipe(**CALL, generator=seeded(1))
        pipe.guidance_scale = 2.0

    decoder(**CALL, callback_on_step_end=on_step_end)
    with pytest.raises(InputError, match="guidance_scale can be set only while a call runs"):
        decoder.guidance_scale = 2.0


class UncopyableScheduler(DDIMScheduler):
    """A scheduler that holds what cannot be copied."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.lock = threading.Lock()


def test_a_scheduler_that_cannot_be_copied_is_named(decoder: KandinskyV22Pipeline) -> None:
    decoder.scheduler = UncopyableScheduler()
    with pytest.raises(InputError, match="UncopyableScheduler cannot be copied"):
        decoder(**CALL)


def test_sizes_need_their_networks(decoder: KandinskyV22Pipeline) -> None:
    without = KandinskyV22Pipeline(unet=decoder.unet, scheduler=decoder.scheduler, movq=None)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="constructed without movq"):
        without.movq_scale_factor  # noqa: B018


def test_attributes_of_a_lazy_component_are_those_of_the_network(prior: KandinskyV22PriorPipeline) -> None:
    lazy = prior.components["image_encoder"]
    assert isinstance(lazy, LazyComponent)
    lazy.defer_to(None, torch.float64)
    assert lazy.dtype == torch.float64
    assert not lazy.is_loaded
    lazy.training = True
    assert lazy.load().training
    lazy.load().half()
    assert lazy.dtype == torch.float16
