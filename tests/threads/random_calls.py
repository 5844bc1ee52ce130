"""Random calls over all pipeline classes, samplers and settings, and running them one by one or in threads."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import queue
import random
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from tests.pipelines.calls import CLASSES, COMBINED, DECODERS, PRIORS, inputs
from tests.pipelines.pictures import photo
from tests.pipelines.tiny import embeds, seeded

import kandinsky22
from kandinsky22 import schedulers

SAMPLERS = sorted({*schedulers.__all__} - {"Scheduler", "SchedulerOutput", "UnCLIPScheduler"})
PRESETS = ("draft", "balanced", "best")
SETTINGS = ("plain", "plain", "plain", "feature caching", "tiling", "low memory", "int8")
PROMPTS = ("a red cat", "a cat", "red, on a cat", "", "one " * 90, "a cat on a red cat", "no cat")


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of one pipeline.

    Attributes:
        name: Middle of the class's name.
        setting: One of `SETTINGS`; pipelines of one setting share their networks.
        sampler: Class of the scheduler, name of a preset, or None for the checkpoint's scheduler.
        arguments: Arguments of the call without generator.
        seed: Seed of the generator.
        per_image: Whether there is one generator per image.
    """

    name: str
    setting: str
    sampler: str | None
    arguments: dict[str, Any]
    seed: int
    per_image: bool


def random_call(rng: random.Random) -> Call:
    """Return a call that is valid for its class."""
    name, setting = rng.choice(list(CLASSES)), rng.choice(SETTINGS)
    if name in PRIORS and setting in ("feature caching", "tiling"):
        setting = "plain"
    images = rng.choice((1, 1, 2))
    steps = rng.randint(1, 6)
    call: dict[str, Any] = {**inputs(name, seed=rng.randint(0, 5)), "num_inference_steps": steps}
    call |= {"guidance_scale": rng.choice((0.0, 1.0, 2.5, 4.0, 9.0)), "num_images_per_prompt": images}
    call["guidance_rescale"] = rng.choice((0.0, 0.0, 0.7))
    if rng.random() < 0.3:
        call["guidance_interval"] = rng.choice(((0.0, 0.5), (0.3, 0.9)))
    if "strength" in call:
        call["strength"] = rng.choice((0.0, 0.4, 0.8, 1.0))
    if name in DECODERS:
        call |= {"image_embeds": embeds(1, rng.randint(0, 9)), "negative_image_embeds": embeds(1, rng.randint(0, 9))}
    else:
        call["prompt"] = rng.choice(PROMPTS)
        call["negative_prompt"] = rng.choice((None, None, *PROMPTS))
    if name in COMBINED:
        call |= {"prior_num_inference_steps": rng.randint(1, 5), "prior_guidance_scale": rng.choice((1.0, 3.0))}
    if "image" in call and rng.random() < 0.5:
        call["image"] = photo(rng.randint(0, 9), 40, 56)
    if name not in PRIORS:
        side = 32 if "Controlnet" in name else None
        call |= {"height": side or rng.choice((16, 32, 48)), "width": side or rng.choice((16, 32))}
        call["output_type"] = rng.choice(("np", "np", "pt", "latent"))
    sampler = rng.choice((None, *SAMPLERS, *PRESETS))
    return Call(name, setting, sampler, call, rng.randint(0, 10**6), rng.random() < 0.3)


class Pipelines:
    """Pipelines for all calls. Those of one class and setting share networks, and all samplers share schedulers.

    Args:
        load: Loads the pipeline of a class by the middle of its name.
    """

    def __init__(self, load: Callable[[str], Any]) -> None:
        self._load = load
        self._pipes: dict[tuple[str, str, str | None], Any] = {}
        self._schedulers: dict[tuple[str, str], Any] = {}

    def prepare(self, calls: Sequence[Call]) -> None:
        """Make the pipelines of these calls. No network runs."""
        for call in calls:
            self._find(call)

    def run(self, call: Call) -> Any:
        """Run a call, and return its arrays."""
        arguments = {**call.arguments}
        images = arguments["num_images_per_prompt"]
        arguments["generator"] = seeded(call.seed)
        if call.per_image:
            arguments["generator"] = [seeded(call.seed + index) for index in range(images)]
        result = self._find(call)(**arguments)
        tensors = [getattr(result, field.name) for field in dataclasses.fields(result)]
        return [np.asarray(tensor) for tensor in tensors]

    def _find(self, call: Call) -> Any:
        key = call.name, call.setting, call.sampler
        if key not in self._pipes:
            self._pipes[key] = self._make(*key)
        return self._pipes[key]

    def _make(self, name: str, setting: str, sampler: str | None) -> Any:
        if sampler is None:
            return self._with_setting(name, setting)
        base_key = name, setting, None
        if base_key not in self._pipes:
            self._pipes[base_key] = self._with_setting(name, setting)
        base = self._pipes[base_key]
        pipe = type(base).from_pipe(base)
        stages = [stage for stage in ("scheduler", "prior_scheduler") if stage in pipe.components]
        if sampler in PRESETS:
            kandinsky22.apply_quality(pipe, sampler)
            return pipe
        for stage in stages:
            shared = sampler, f"{name in PRIORS or stage.startswith('prior')}"
            if shared not in self._schedulers:
                config = pipe.components[stage].config
                self._schedulers[shared] = getattr(kandinsky22, sampler).from_config(config)
            setattr(pipe, stage, self._schedulers[shared])
        return pipe

    def _with_setting(self, name: str, setting: str) -> Any:
        if setting == "feature caching":
            plain = self._pipes.get((name, "plain", None)) or self._load(name)
            pipe = type(plain).from_pipe(plain)
            pipe.enable_feature_caching(2)
            return pipe
        pipe = self._load(name)
        if setting == "tiling":
            pipe.movq.enable_tiling()
        elif setting == "low memory":
            pipe.enable_low_memory()
        elif setting == "int8":
            pipe.quantize("int8")
        return pipe


@contextlib.contextmanager
def frequent_switches() -> Iterator[None]:
    """Return a context manager in which Python switches between threads 500 times as often as usual."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)


def in_threads(functions: Sequence[Callable[[], Any]], threads: int = 4) -> list[Any]:
    """Run functions in threads, and return their results, or the exceptions that they raised, in the same order.

    Args:
        functions: The functions. Each thread takes the next one that none has taken.
        threads: Number of threads; they begin together.
    """
    results: list[Any] = [None] * len(functions)
    pending: queue.SimpleQueue[int] = queue.SimpleQueue()
    for index in range(len(functions)):
        pending.put(index)
    barrier = threading.Barrier(threads)

    def work() -> None:
        barrier.wait()
        while True:
            try:
                index = pending.get_nowait()
            except queue.Empty:
                return
            try:
                results[index] = functions[index]()
            except Exception as error:
                results[index] = error

    workers = [threading.Thread(target=work, daemon=True) for _ in range(threads)]
    with frequent_switches():
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(timeout=600)
            assert not worker.is_alive(), "a thread hangs"
    return results


def differing(
    calls: Sequence[Call], load: Callable[[str], Any], *, threads: int = 4, parallel_first: bool = True
) -> list[tuple[Call, Any]]:
    """Return the calls whose results in threads are not those of the same calls one by one, bit for bit.

    Serial and parallel calls use pipelines of their own, so that the parallel calls are the first ones of theirs.

    Args:
        calls: The calls.
        load: Loads the pipeline of a class by the middle of its name.
        threads: Number of threads.
        parallel_first: Whether the parallel calls run before the serial ones.
    """
    serial, parallel = Pipelines(load), Pipelines(load)
    parallel.prepare(calls)
    torch.manual_seed(0)
    actual: list[Any] = []
    if parallel_first:
        actual = in_threads([functools.partial(parallel.run, call) for call in calls], threads)
    expected: list[Any] = []
    for call in calls:
        try:
            expected.append(serial.run(call))
        except Exception as error:
            expected.append(error)
    if not parallel_first:
        actual = in_threads([functools.partial(parallel.run, call) for call in calls], threads)
    return [(call, got) for call, got, want in zip(calls, actual, expected, strict=True) if not _equal(got, want)]


def _equal(actual: Any, expected: Any) -> bool:
    if isinstance(actual, Exception) or isinstance(expected, Exception):
        return type(actual) is type(expected) and str(actual) == str(expected)
    return len(actual) == len(expected) and all(map(np.array_equal, actual, expected))
