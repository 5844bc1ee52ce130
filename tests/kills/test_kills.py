"""Killed saves leave the old model or the new one. `make kills N=500` interrupts 500 saves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks, which is safe on Linux only"),
]
KILLS = int(os.environ.get("KANDINSKY22_KILLS", "10"))
SEED = int(os.environ.get("KANDINSKY22_KILLS_SEED", "0"))


@pytest.fixture(scope="module")
def result() -> Any:
    """Outcomes counted by a separate process, because it forks: networks run in threads here."""
    command = [sys.executable, "-m", "tests.kills.saves", "--count", str(KILLS), "--seed", str(SEED)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "KANDINSKY22_CACHE": ""}
    done = subprocess.run(command, capture_output=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr.decode()[-4000:]
    counted = json.loads(done.stdout)
    print(json.dumps(counted))
    return counted


def test_interrupted_saves_leave_the_old_or_the_new_model(result: Any) -> None:
    assert result["kills"]["problems"] == []
    outcomes = result["kills"]["outcomes"]
    assert outcomes["old"] + outcomes["new"] == KILLS
    assert min(outcomes["old"], outcomes["new"], outcomes["interrupted with something left"]) > KILLS / 12


def test_of_two_saves_into_one_folder_one_wins_entirely(result: Any) -> None:
    assert result["races"]["problems"] == []
