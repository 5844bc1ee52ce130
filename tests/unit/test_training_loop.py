"""The training loop: what is resumed ends in the same bits, what is frozen stays, what is damaged is named."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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


def stored_groups(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Groups of the optimizers in a checkpoint."""
    optimizers = torch.load(folder / CHECKPOINT, weights_only=True)["optimizers"]
    return {name: state["param_groups"] for name, state in optimizers.items()}


def test_a_resumed_run_has_the_hyperparameters_of_its_settings(tmp_path: Path) -> None:
    before = Settings(steps=12, warmup=3, muon=True)
    after = dataclasses.replace(before, weight_decay=0.5, betas=(0.5, 0.6), muon_interval=4)
    net = network(16)
    train(net, objective(net, 16), before, tmp_path, stop_at=6)
    assert stored_groups(tmp_path)["muon"][0]["interval"] == 1
    net = network(16)
    summary = train(net, objective(net, 16), after, tmp_path)
    assert summary["settings"]["weight_decay"] == 0.5
    (matrices, vectors), (muon,) = stored_groups(tmp_path)["adamw"], stored_groups(tmp_path)["muon"]
    assert matrices["betas"] == vectors["betas"] == (0.5, 0.6)
    assert (matrices["weight_decay"], vectors["weight_decay"], muon["weight_decay"]) == (0.5, 0.0, 0.5)
    assert (muon["interval"], muon["steps"]) == (4, 12)


def test_another_weight_decay_changes_the_steps_after_it(tmp_path: Path) -> None:
    values = []
    for name, decay in (("same", 0.0), ("other", 0.5)):
        for settings, stop in ((SETTINGS, 6), (dataclasses.replace(SETTINGS, weight_decay=decay), None)):
            net = network()
            train(net, objective(net), settings, tmp_path / name, stop_at=stop)
        values.append(net.state_dict()["0.weight"])
    assert not torch.equal(*values)


@pytest.mark.parametrize("muon", [False, True])
def test_other_optimizers_than_those_of_a_checkpoint_are_refused(muon: bool, tmp_path: Path) -> None:
    settings, net = dataclasses.replace(SETTINGS, muon=muon), network(16)
    train(net, objective(net, 16), settings, tmp_path, stop_at=6)
    with pytest.raises(CheckpointError, match=f"was trained by adamw{' and muon, which' if muon else ', which'}"):
        train(net, objective(net, 16), dataclasses.replace(settings, muon=not muon), tmp_path)


def test_other_groups_of_an_optimizer_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, net = dataclasses.replace(SETTINGS, muon=True), nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 20))
    train(net, lambda _: {"loss": net(torch.ones(1, 16)).square().mean()}, settings, tmp_path, stop_at=2)
    # as if the rule which parameters Muon trains had changed since
    monkeypatch.setattr("kandinsky22.training.loop._optimizers", all_by_adamw)
    with pytest.raises(CheckpointError, match="does not fit the optimizer adamw"):
        train(net, lambda _: {}, settings, tmp_path)


def all_by_adamw(parameters: Mapping[str, nn.Parameter], settings: Settings) -> dict[str, torch.optim.Optimizer]:
    """AdamW for all parameters except one, which Muon trains."""
    *most, last = parameters.values()
    return {"adamw": torch.optim.AdamW(most), "muon": torch.optim.SGD([last])}


@pytest.mark.parametrize("content", [{}, {"step": 3, "average": {}}, [1]])
def test_files_that_are_no_checkpoints_are_named(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / CHECKPOINT)
    net = network()
    with pytest.raises(CheckpointError, match=f"{CHECKPOINT} is not a training checkpoint"):
        train(net, objective(net), SETTINGS, tmp_path)


class Named(nn.Module):
    """A network with parameters of these names, one of which may be frozen."""

    a: Tensor
    b: Tensor
    frozen: Tensor

    def __init__(self, *names: str, width: int = 4) -> None:
        super().__init__()
        for name in names:
            self.register_parameter(name, nn.Parameter(torch.ones(width)))


def test_an_average_of_another_network_is_refused(tmp_path: Path) -> None:
    net = Named("a", "b", "frozen")
    net.frozen.requires_grad_(False)
    train(net, lambda _: {"loss": (net.a + net.b).square().sum()}, SETTINGS, tmp_path)
    load_average(Named("a", "b", "frozen"), tmp_path)  # what was frozen is not loaded, whatever it is here
    for other, difference in (
        (Named("c"), "a, b, c"),
        (Named("a", "frozen"), "b"),
        (Named("a", "b", "frozen", "further"), "further"),
        (Named("a", "b", "frozen", width=5), "a, b"),
    ):
        before = {name: value.clone() for name, value in other.state_dict().items()}
        with pytest.raises(CheckpointError, match=f"belongs to another network; parameters differ: {difference}$"):
            load_average(other, tmp_path)
        assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_averages_of_earlier_checkpoints_are_loaded(tmp_path: Path) -> None:
    """Without names of frozen parameters, those that the checkpoint lacks count as frozen."""
    net = Named("a", "frozen")
    net.frozen.requires_grad_(False)
    train(net, lambda _: {"loss": net.a.square().sum()}, SETTINGS, tmp_path)
    checkpoint = torch.load(tmp_path / CHECKPOINT, weights_only=True)
    assert checkpoint.pop("frozen") == ["frozen"]
    torch.save(checkpoint, tmp_path / CHECKPOINT)
    other = Named("a", "frozen")
    assert load_average(other, tmp_path) == SETTINGS.steps
    assert torch.equal(other.a, checkpoint["average"]["a"])
    with pytest.raises(CheckpointError, match="parameters differ: a"):
        load_average(Named("frozen"), tmp_path)


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
