"""Threads: calls that run at the same time give the results of calls that run one after another, bit for bit.

`make threads N=1000 SEED=1` runs any number of random calls; the suite runs a few.
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.threads.random_calls import differing, random_call

from kandinsky22.kernels import conv, linear

CALLS = int(os.environ.get("KANDINSKY22_THREAD_CALLS", "60"))
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
