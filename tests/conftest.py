"""Setup of every test: one torch thread and a fixed seed, so that results do not depend on the machine or the order."""

from __future__ import annotations

import os
import tempfile
import threading
from collections import Counter
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

# Helper modules assert too: their failures must show the compared values, as those of test modules do.
pytest.register_assert_rewrite("tests.cli", "tests.pipelines", "tests.unit")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
    # tqdm's own lock is shared with forked processes: one that is killed while it holds the lock would block all tests.
    tqdm.set_lock(threading.RLock())
    os.environ["KANDINSKY22_CONFIG"] = str(Path(tempfile.gettempdir(), "no", "settings.toml"))  # nor settings
    os.environ["KANDINSKY22_CACHE"] = ""  # no cache on disk: tests share nothing, and the user's cache stays untouched


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _full_float32_on_gpus(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Switch TensorFloat-32 off in tests marked `gpu`, because it rounds inputs to 10 bits of mantissa."""
    if request.node.get_closest_marker("gpu") and torch.cuda.is_available():
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
        monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # Files with the most slow tests come first, thus at the end of a run no process waits for another one.
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no accelerator here"))
