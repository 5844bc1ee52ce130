"""Trainings in processes of their own: killed, interrupted, and several at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.training import gradients

from kandinsky22.cli.main import main
from kandinsky22.training.finetuning import checkpoints

pytestmark = pytest.mark.slow

RESULT = "pytorch_lora_weights.safetensors"
LONGEST = 240  # seconds that a process may take


def environment() -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "CUDA_VISIBLE_DEVICES": "",
    }


def start(arguments: list[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "kandinsky22", "train", "lora", *arguments]
    return subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, errors = process.communicate(timeout=LONGEST)
    return process.returncode, errors


def wait_for(condition: Any, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + LONGEST
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.fixture
def arguments(model: Path, pictures: Path) -> Any:
    """Function that returns the command line of a training into a folder."""

    def make(out: Path, *further: object) -> list[str]:
        listed = {
            "--model": model,
            "--train-data-dir": pictures,
            "--output-dir": out,
            "--rank": 2,
            "--train-batch-size": 2,
            "--validation-images": 0,
            "--validation-steps": 1000,
            "--checkpointing-steps": 3,
            "--max-train-steps": 24,
            "--log-every": 1,
        }
        words = [str(word) for pair in listed.items() for word in pair]
        return [*words, "--use-ema", *(str(word) for word in further)]

    return make


def test_a_killed_training_ends_in_the_same_bits(
    arguments: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(["train", "lora", *arguments(whole)]) == 0
    log = parts / "decoder" / "log.jsonl"
    process = start(arguments(parts))
    wait_for(lambda: log.is_file() and log.read_text().count("\n") >= 8, process)
    process.send_signal(signal.SIGKILL)
    assert finished(process)[0] == -signal.SIGKILL
    last = checkpoints.checkpoints(parts / "decoder")[-1]
    assert last.name < "checkpoint-000024"
    assert main(["train", "lora", *arguments(parts, "--resume")]) == 0
    assert f"continues {last.name}" in capsys.readouterr().err
    ours, theirs = load_file(whole / RESULT), load_file(parts / RESULT)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    lines = [
        [json.loads(line)["step"] for line in path.read_text().splitlines()]
        for path in (whole / "decoder/log.jsonl", parts / "decoder/log.jsonl")
    ]
    assert lines[0] == lines[1] == list(range(1, 25))


def test_ctrl_c_saves(arguments: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start([*arguments(out), "--max-train-steps", "100000", "--checkpointing-steps", "100000"])
    log = out / "decoder" / "log.jsonl"
    wait_for(lambda: log.is_file() and log.read_text().count("\n") >= 3, process)
    process.send_signal(signal.SIGINT)
    code, errors = finished(process)
    assert code == 130
    assert errors.splitlines()[-1] == "kandinsky22: error: interrupted"
    (saved,) = checkpoints.checkpoints(out / "decoder")
    assert f"{saved} is written: --resume continues it" in errors
    assert checkpoints.read_checkpoint(saved)["step"] >= 3


def run_gradients(processes: int, options: dict[str, Any], folder: Path, kind: str) -> dict[str, torch.Tensor]:
    folder.mkdir()
    file, out = folder / "options.json", folder / "gradients.safetensors"
    file.write_text(json.dumps({**options, "output_dir": str(folder / "out")}))
    if processes == 1:
        gradients.main(str(file), str(out), kind)
        return load_file(out)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [*launcher, "-m", "tests.training.gradients", str(file), str(out), kind]
    done = subprocess.run(
        command, env=environment(), cwd=Path(__file__).parents[2], capture_output=True, timeout=LONGEST, check=False
    )
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    return load_file(out)


@pytest.mark.parametrize("kind", ["full", "distill"])
def test_two_processes_give_the_gradients_of_one_with_twice_the_batch(
    kind: str, model: Path, pictures: Path, tmp_path: Path
) -> None:
    options = {"model": str(model), "train_data_dir": str(pictures), "validation_images": 0, "aspect_buckets": True}
    one = run_gradients(1, {**options, "train_batch_size": 4}, tmp_path / "one", kind)
    two = run_gradients(2, {**options, "train_batch_size": 2}, tmp_path / "two", kind)
    assert (int(one.pop("processes")), int(two.pop("processes"))) == (1, 2)
    assert one.keys() == two.keys()
    largest = max(float(gradient.abs().max()) for gradient in one.values())
    for name, gradient in one.items():
        assert float((gradient - two[name]).abs().max()) < 1e-5 * max(largest, 1), name
