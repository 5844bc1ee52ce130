"""The training loop: what is resumed ends in the same bits, what is frozen stays, what is damaged is named."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from kandinsky22.errors import CheckpointError, InputError
from kandinsky22.training.loop import (
    CHECKPOINT,
    LOG,
    Objective,
    Settings,
    StepRandomness,
    is_finished,
    load_average,
    train,
)

SETTINGS = Settings(steps=12, warmup=3, log_every=4, average=0.9)


def network(width: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, width), nn.Dropout(0.5), nn.Linear(width, width))


def objective(net: nn.Module, width: int = 4) -> Objective:
    def losses(randomness: StepRandomness) -> dict[str, Tensor]:
        inputs = torch.randn(8, width, generator=randomness.torch)
        target = torch.from_numpy(randomness.numpy.normal(size=(8, width))).float()
        return {"loss": (net(inputs) - target).square().mean()}

    return losses


def test_a_resumed_run_ends_in_the_same_bits(tmp_path: Path) -> None:
    whole = network()
    train(whole, objective(whole), SETTINGS, tmp_path / "whole")
    for stop in (5, 8, None):
        parts = network()
        summary = train(parts, objective(parts), SETTINGS, tmp_path / "parts", stop_at=stop)
        assert summary["finished"] == is_finished(tmp_path / "parts") == (stop is None)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, parts.state_dict()[name]), name


def test_lengthening_a_run_before_its_decay_changes_no_earlier_step(tmp_path: Path) -> None:
    short, long = Settings(steps=12, warmup=2, decay=4), Settings(steps=30, warmup=2, decay=4)
    assert [short.learning_rate_at(step) for step in range(8)] == [long.learning_rate_at(step) for step in range(8)]
    assert short.learning_rate_at(11) < short.learning_rate_at(9) < short.learning_rate_at(7) == short.learning_rate
    assert short.learning_rate_at(0) == short.learning_rate / 2


def test_only_parameters_that_require_gradients_are_trained_and_averaged(tmp_path: Path) -> None:
    net = network()
    net[0].requires_grad_(False)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    train(net, objective(net), SETTINGS, tmp_path)
    after = net.state_dict()
    assert torch.equal(before["0.weight"], after["0.weight"])
    assert not torch.equal(before["2.weight"], after["2.weight"])
    assert not net.training
    other = network()
    assert load_average(other, tmp_path) == SETTINGS.steps
    assert torch.equal(other.state_dict()["2.weight"], after["2.weight"])


def test_the_log_adds_up_and_stays_readable(tmp_path: Path) -> None:
    net = network()
    train(net, objective(net), SETTINGS, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / LOG).read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines] == [4, 8, 12]
    assert all({"seconds", "loss", "norm"} <= line.keys() for line in lines)


def test_a_checkpoint_of_another_network_is_refused(tmp_path: Path) -> None:
    net = network()
    train(net, objective(net), SETTINGS, tmp_path)
    wider = network(5)
    with pytest.raises(CheckpointError, match="belongs to another network"):
        train(wider, objective(wider, 5), SETTINGS, tmp_path)


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    (tmp_path / CHECKPOINT).write_bytes(b"not a checkpoint")
    net = network()
    with pytest.raises(CheckpointError, match=CHECKPOINT):
        train(net, objective(net), SETTINGS, tmp_path)


def test_a_failed_save_leaves_the_last_checkpoint_intact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = network()
    train(net, objective(net), SETTINGS, tmp_path, stop_at=6)
    whole = (tmp_path / CHECKPOINT).read_bytes()

    def fail(state: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        train(net, objective(net), SETTINGS, tmp_path)
    assert (tmp_path / CHECKPOINT).read_bytes() == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.pt", "log.jsonl", "summary.json"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps=0 is invalid: expected an integer from 1"),
        ({"steps": 5, "average": 1.0}, "average=1.0 is invalid: expected a number from 0 to below 1"),
    ],
)
def test_invalid_settings_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        Settings(**settings)  # type: ignore[arg-type]


def test_a_network_with_nothing_to_train_is_refused(tmp_path: Path) -> None:
    net = network().requires_grad_(False)
    with pytest.raises(InputError, match="requires gradients"):
        train(net, objective(net), SETTINGS, tmp_path)
