"""Forked processes, and torch's settings of a process, which must not change results."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.pipelines.calls import CLASSES, PRIORS, inputs
from tests.pipelines.tiny import seeded
from tests.threads.random_calls import SAMPLERS

import kandinsky22
from kandinsky22 import KandinskyV22Pipeline

CALL_IN_A_CHILD = """
    import os, sys, threading, torch
    from kandinsky22 import KandinskyV22Pipeline
    from kandinsky22.errors import ForkError

    torch.set_num_threads(2)
    pipe = KandinskyV22Pipeline.from_pretrained(sys.argv[1])
    embeds = torch.ones(1, pipe.unet.config.encoder_hid_dim)

    def call():
        return pipe(embeds, embeds, height=16, width=16, num_inference_steps=1, output_type="latent").images

    torch.ones(2**20).sin()  # starts the threads of OpenMP
    call()
    if os.fork() == 0:
        try:
            call()
        except ForkError as error:
            print("refused:", error, flush=True)
        thread = threading.Thread(target=lambda: print("in a thread:", tuple(call().shape), flush=True))
        thread.start()
        thread.join()
        torch.set_num_threads(1)
        print("with one thread:", tuple(call().shape), flush=True)
        os._exit(0)
    os.wait()
    print("in the parent:", tuple(call().shape))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_process_is_refused_with_what_to_do(checkpoints: Path) -> None:
    program = [sys.executable, "-c", textwrap.dedent(CALL_IN_A_CHILD), str(checkpoints / "decoder")]
    done = subprocess.run(program, capture_output=True, text=True, timeout=120, check=False)
    lines = done.stdout.splitlines()
    assert "spawn" in lines[0], done.stderr
    assert "set_num_threads(1)" in lines[0]
    shape = "(1, 4, 8, 8)"
    assert lines[1:] == [f"in a thread: {shape}", f"with one thread: {shape}", f"in the parent: {shape}"], done.stderr


@contextlib.contextmanager
def default(setting: torch.dtype | str) -> Iterator[None]:
    """Return a context manager with another default dtype, or default device, of torch."""
    if isinstance(setting, str):
        torch.set_default_device(setting)
    else:
        torch.set_default_dtype(setting)
    try:
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


DEFAULTS = [torch.float64, torch.float16, torch.bfloat16, "meta"]


# Made before the tests change torch's defaults.
INPUTS = {name: inputs(name) for name in CLASSES}


def result(pipe: Any, name: str, **options: Any) -> list[Any]:
    """Return the arrays of a short call."""
    call = {**INPUTS[name], "num_inference_steps": 2, "generator": seeded(0), **options}
    if name not in PRIORS:
        call |= {"height": 32, "width": 32, "output_type": "np"}
    return [np.asarray(value) for value in vars(pipe(**call)).values()]


@pytest.mark.parametrize("setting", DEFAULTS, ids=str)
def test_defaults_of_torch_change_no_result(make_pipeline: Callable[..., Any], setting: Any) -> None:
    for name in ("PriorEmb2Emb", "InpaintCombined", "ControlnetImg2Img"):
        expected = result(make_pipeline(name), name)
        with default(setting):
            actual = result(make_pipeline(name), name)
        assert all(map(np.array_equal, actual, expected)), name


@pytest.mark.parametrize("setting", DEFAULTS, ids=str)
def test_defaults_of_torch_change_no_scheduler(prior: Any, setting: Any) -> None:
    config = prior.scheduler.config  # the cosine schedule
    for sampler in SAMPLERS:
        prior.scheduler = getattr(kandinsky22, sampler).from_config(config)
        expected = result(prior, "Prior", num_inference_steps=3)
        with default(setting):
            prior.scheduler = getattr(kandinsky22, sampler).from_config(config)
            actual = result(prior, "Prior", num_inference_steps=3)
        assert all(map(np.array_equal, actual, expected)), sampler


def test_a_first_call_in_inference_mode_leaves_ordinary_weights(prior: Any) -> None:
    with torch.inference_mode():
        first = prior("cat", generator=seeded(0))
    assert not any(parameter.is_inference() for parameter in prior.image_encoder.parameters())
    assert torch.equal(prior("cat", generator=seeded(0)).image_embeds, first.image_embeds)


def test_deterministic_algorithms_are_used_already(decoder: KandinskyV22Pipeline) -> None:
    expected = result(decoder, "")
    torch.use_deterministic_algorithms(True)
    try:
        actual = result(decoder, "")
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(map(np.array_equal, actual, expected))


class _Images(torch.utils.data.Dataset[Any]):
    """A data set that generates its items."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Any:
        return result(self.pipe, "")[0]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="workers are forked")
def test_workers_of_a_data_loader_call_a_pipeline_that_was_used(decoder: KandinskyV22Pipeline) -> None:
    expected = result(decoder, "")[0]
    loader = torch.utils.data.DataLoader(_Images(decoder), num_workers=1, timeout=60, multiprocessing_context="fork")
    for item in loader:
        assert np.array_equal(item[0].numpy(), expected)
