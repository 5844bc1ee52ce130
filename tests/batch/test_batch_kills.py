"""Killed runs go on: exactly one result per row, equal to those of an uninterrupted run, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.batch.kills import contents, entries, run_with_kills, write_prompts
from tests.batch.stub_run import run

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
KILLS = int(os.environ.get("KANDINSKY22_BATCH_KILLS", "6"))
ROWS = int(os.environ.get("KANDINSKY22_BATCH_ROWS", "200"))


def _command(source: Path, output: Path, format: str, workers: int) -> list[str]:
    arguments = [source, output, format, workers, 10, 10]
    return [sys.executable, "-m", "tests.batch.stub_run", *map(str, arguments)]


@pytest.mark.slow
@pytest.mark.parametrize(("format", "workers"), [("webdataset", 1), ("files", 1), ("webdataset", 2)])
def test_a_killed_run_ends_with_one_result_per_row(tmp_path: Path, format: str, workers: int) -> None:
    source = tmp_path / "prompts.jsonl"
    write_prompts(source, ROWS)
    run(source, tmp_path / "whole", format=format)
    command = _command(source, tmp_path / "killed", format, workers)
    counts = run_with_kills(command, tmp_path / "killed", KILLS, longest=0.5, seed=workers, workers_too=workers > 1)
    assert counts["driver"] + counts["worker"] > KILLS / 3
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert entries(tmp_path / "killed") == entries(tmp_path / "whole")
    assert sum(int(str(entry["pictures"])) for entry in entries(tmp_path / "killed")) == ROWS


@pytest.mark.slow
def test_workers_end_with_their_driver(tmp_path: Path) -> None:
    """No orphan process draws on, and the next run waits for none."""
    from tests.batch.kills import workers_of

    source = tmp_path / "prompts.jsonl"
    write_prompts(source, 2000)
    command = _command(source, tmp_path / "out", "webdataset", 2)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("shard"):
            break
    workers = workers_of(process.pid)
    assert len(workers) == 2
    process.kill()
    process.wait()
    for _ in range(100):
        if not any(Path(f"/proc/{worker}").exists() for worker in workers):
            break
        subprocess.run(["sleep", "0.05"], check=True)
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
