"""Threads: calls that run at the same time give the results of calls that run one after another, bit for bit.

`make threads N=1000 SEED=1` runs any number of random calls; the suite runs a few.
"""

from __future__ import annotations

import copy
import functools
import os
import pickle
import random
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import PIL.Image
import pytest
import torch
from tests.pipelines.pictures import photo
from tests.pipelines.tiny import pair, seeded
from tests.threads.random_calls import differing, in_threads, random_call

from kandinsky22 import DDIMScheduler, InputError, apply_quality
from kandinsky22.inputs import images, prompts
from kandinsky22.kernels import conv, linear
from kandinsky22.runtime import calls
from kandinsky22.runtime.lazy_component import LazyComponent

CALLS = int(os.environ.get("KANDINSKY22_THREAD_CALLS", "24"))
SEED = int(os.environ.get("KANDINSKY22_THREAD_SEED", "1"))


@pytest.fixture(params=["torch's layers", "packed layers"])
def layers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny layers are too small for the fast methods: have them used for all sizes."""
    if request.param == "packed layers":
        monkeypatch.setattr(linear, "MIN_MULTIPLICATIONS", 0)
        for name in ("MIN_MULTIPLICATIONS", "MIN_WINOGRAD_CHANNELS", "MIN_WINOGRAD_TILES"):
            monkeypatch.setattr(conv, name, 0)


@pytest.mark.usefixtures("layers")
def test_random_calls(make_pipeline: Callable[..., Any]) -> None:
    rng = random.Random(SEED)
    calls = [random_call(rng) for _ in range(max(1, CALLS // 2))]
    assert differing(calls, make_pipeline) == []


CALL: dict[str, Any] = {**pair(), "num_inference_steps": 4, "height": 16, "width": 16, "output_type": "latent"}


def latents(pipe: Any, **options: Any) -> torch.Tensor:
    """Return the result of a short call of a decoder."""
    images: torch.Tensor = pipe(**CALL | {"generator": seeded(0)} | options).images
    return images


class PausedCall:
    """A call in another thread that waits after its first step until the block ends.

    Args:
        call: Runs the call with the callback that it is given.
    """

    def __init__(self, call: Callable[[Callable[..., Any]], Any]) -> None:
        self._reached, self._continue = threading.Event(), threading.Event()
        self.result: Any = None
        self._thread = threading.Thread(target=self._run, args=(call,), daemon=True)

    def _run(self, call: Callable[[Callable[..., Any]], Any]) -> None:
        self.result = call(self._pause)

    def _pause(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 0:
            self._reached.set()
            assert self._continue.wait(60)
        return tensors

    def __enter__(self) -> PausedCall:
        self._thread.start()
        assert self._reached.wait(60)
        return self

    def __exit__(self, *_: object) -> None:
        self._continue.set()
        self._thread.join(60)
        assert not self._thread.is_alive()


def paused(pipe: Any, **options: Any) -> PausedCall:
    """Return a call of a decoder that waits after its first step."""
    return PausedCall(lambda callback: latents(pipe, callback_on_step_end=callback, **options))


def test_a_call_keeps_its_guidance_and_steps_while_another_one_runs(decoder: Any) -> None:
    expected = latents(decoder, guidance_scale=2.0)
    with paused(decoder, guidance_scale=2.0) as call:
        other = latents(decoder, guidance_scale=9.0, num_inference_steps=2)
    assert torch.equal(call.result, expected)
    assert torch.equal(other, latents(decoder, guidance_scale=9.0, num_inference_steps=2))


def test_a_callback_sees_and_sets_the_values_of_its_own_call(decoder: Any) -> None:
    def lower(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        values.append((pipe.num_timesteps, pipe.guidance_scale))
        pipe.guidance_scale = 1.5
        return tensors

    values: list[tuple[int, float]] = []
    expected = latents(decoder)
    with paused(decoder) as call:
        latents(decoder, num_inference_steps=2, guidance_scale=3.0, callback_on_step_end=lower)
    assert values == [(2, 3.0), (2, 1.5)]
    assert torch.equal(call.result, expected)


def test_a_callback_interrupts_its_own_call_only(decoder: Any) -> None:
    def stop(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        steps.append(step)
        pipe._interrupt = True
        return tensors

    steps: list[int] = []
    expected = latents(decoder)
    with paused(decoder) as call:
        latents(decoder, callback_on_step_end=stop)
    assert steps == [0]
    assert torch.equal(call.result, expected)


def test_another_thread_interrupts_running_calls(decoder: Any) -> None:
    with paused(decoder) as call:
        decoder.interrupt()
    assert not torch.equal(call.result, latents(decoder))


CHANGES: dict[str, Callable[[Any], Any]] = {
    "to()": lambda pipe: pipe.to(torch.bfloat16),
    "enable_low_memory()": lambda pipe: pipe.enable_low_memory(),
    "remove_all_hooks()": lambda pipe: pipe.remove_all_hooks(),
    "quantize()": lambda pipe: pipe.quantize(),
    "feature caching": lambda pipe: pipe.enable_feature_caching(),
    "scheduler": lambda pipe: setattr(pipe, "scheduler", DDIMScheduler()),
    "unet": lambda pipe: setattr(pipe, "unet", copy.deepcopy(pipe.unet)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changes_during_a_call_of_another_thread_are_refused_by_name(decoder: Any, name: str) -> None:
    expected = latents(decoder)
    with paused(decoder) as call, pytest.raises(InputError, match=rf"^{re.escape(name)} cannot .* in another thread"):
        CHANGES[name](decoder)
    assert torch.equal(call.result, expected)
    CHANGES[name](decoder)  # afterwards it works


def test_networks_shared_with_another_pipeline_are_protected(decoder: Any) -> None:
    other = type(decoder).from_pipe(decoder)
    with paused(decoder), pytest.raises(InputError, match="uses unet"):
        other.to(torch.bfloat16)
    assert decoder.unet.dtype == torch.float32


def test_a_preset_may_be_applied_again_while_calls_run(decoder: Any) -> None:
    options = apply_quality(decoder, "balanced")
    expected = latents(decoder, **options)
    with paused(decoder, **options) as call:
        apply_quality(decoder, "balanced")
    assert torch.equal(call.result, expected)


def test_one_generator_serves_one_call_at_a_time(decoder: Any) -> None:
    generator = seeded(3)
    with paused(decoder, generator=generator), pytest.raises(InputError, match=r"^generator=.* in another thread"):
        latents(decoder, generator=[generator])
    latents(decoder, generator=generator)


def test_calls_with_offloaded_networks_run_one_after_another(decoder: Any) -> None:
    expected = latents(decoder), latents(decoder, guidance_scale=1.0)
    decoder.enable_low_memory(by_layer=False)
    actual = in_threads([lambda: latents(decoder), lambda: latents(decoder, guidance_scale=1.0)] * 3, threads=3)
    assert all(torch.equal(got, want) for got, want in zip(actual, expected * 3, strict=True))


def test_threads_that_wait_for_each_other_end_with_an_error(make_pipeline: Callable[..., Any]) -> None:
    """Each of two calls runs a call of the other one's networks in its callback."""
    pipes = [make_pipeline(""), make_pipeline("")]
    for pipe in pipes:
        pipe.enable_low_memory()
    in_callbacks = threading.Barrier(2)

    def call(index: int) -> Any:
        def nested(*_: Any) -> None:
            in_callbacks.wait(60)
            latents(pipes[1 - index], num_inference_steps=1)

        return latents(pipes[index], num_inference_steps=1, callback_on_step_end=nested)

    results = in_threads([functools.partial(call, index) for index in range(2)], threads=2)
    assert sorted(type(result).__name__ for result in results) == ["DeadlockError", "Tensor"]


def test_the_image_encoder_is_loaded_once(prior: Any) -> None:
    loaded = []
    lazy = prior.components["image_encoder"]
    load = lazy._load
    lazy._load = lambda: (loaded.append(1), load())[1]
    in_threads([lambda: prior.get_zero_embed()] * 8, threads=8)
    assert loaded == [1]


def test_weights_are_packed_once(decoder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = []
    pack = linear._PackedWeight.__init__

    def counted(self: Any, weight: Any, *arguments: Any) -> None:
        packed.append(id(weight))
        pack(self, weight, *arguments)

    monkeypatch.setattr(linear, "MIN_MULTIPLICATIONS", 0)
    monkeypatch.setattr(linear._PackedWeight, "__init__", counted)
    in_threads([lambda: latents(decoder)] * 4)
    assert len(packed) == len(set(packed))
    assert bool(packed) == bool(linear.ONEDNN_DTYPES)


def test_the_tokenizer_serves_several_threads(prior: Any) -> None:
    texts = ["a cat", "a red cat " * 30, "red", ""] * 8
    expected = [prompts.tokenize(prior.tokenizer, [text]).ids for text in texts]
    actual = in_threads([functools.partial(prompts.tokenize, prior.tokenizer, [text]) for text in texts], threads=8)
    assert all(torch.equal(got.ids, want) for got, want in zip(actual, expected, strict=True))


def test_one_image_file_serves_several_threads(tmp_path: Path) -> None:
    photo(1, 300, 300).save(tmp_path / "photo.png")
    expected = images.load_image(tmp_path / "photo.png").tobytes()
    for _ in range(5):
        with PIL.Image.open(tmp_path / "photo.png") as file:
            actual = in_threads([lambda image=file: images.load_image(image).tobytes()] * 4)
        assert actual == [expected] * 4


def test_global_random_numbers_are_drawn_once(decoder: Any) -> None:
    """Calls without generator draw different numbers, whatever the threads load or try out meanwhile."""
    decoder.scheduler = diffusers.DDPMScheduler.from_config(dict(decoder.scheduler.config))
    torch.manual_seed(5)
    results = in_threads([lambda: decoder(**CALL).images] * 8)
    assert len({result.numpy().tobytes() for result in results}) == 8


def test_copies_and_pickles_have_locks_of_their_own(prior: Any) -> None:
    for copied in (copy.deepcopy(prior), pickle.loads(pickle.dumps(prior))):
        assert copied._text_encodings._lock is not prior._text_encodings._lock
        assert torch.equal(
            copied("cat", generator=seeded(0)).image_embeds, prior("cat", generator=seeded(0)).image_embeds
        )


def test_an_encoder_that_is_loaded_and_offloaded_during_a_call_is_locked(prior: Any) -> None:
    encoder = prior.components["image_encoder"]
    assert isinstance(encoder, LazyComponent)
    assert not encoder.is_loaded
    assert encoder.lock not in calls._offload_locks(prior.components)
    prior.enable_sequential_cpu_offload(device="cpu")
    assert encoder.lock in calls._offload_locks(prior.components)
    results = in_threads([lambda: prior("a cat", generator=seeded(0)).negative_image_embeds for _ in range(2)])
    assert encoder.is_loaded
    assert torch.equal(*results)
