"""Muon: orthogonalised updates, and the choice of the parameters that it trains."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from kandinsky22.training.loop import Settings, StepRandomness, train
from kandinsky22.training.muon import Muon, orthogonalise


def test_singular_values_become_one() -> None:
    torch.manual_seed(0)
    for shape in ((24, 80), (80, 24)):
        matrix = torch.randn(shape)
        update = orthogonalise(matrix)
        values = torch.linalg.svdvals(update)
        assert update.shape == matrix.shape
        assert values.min() > 0.5
        assert values.max() < 1.3


def test_updates_have_the_size_of_adamw() -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.zeros(32, 16, 3, 3))
    weight.grad = torch.randn_like(weight)
    Muon([weight], lr=0.1).step()
    assert 0.1 * 0.15 < weight.detach().square().mean().sqrt() < 0.1 * 0.25


def test_training_resumes_with_the_momentum(tmp_path: Path) -> None:
    def run(folder: Path, *stops: int) -> torch.Tensor:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(20, 32), nn.GELU(), nn.Linear(32, 20))

        def objective(randomness: StepRandomness) -> dict[str, torch.Tensor]:
            x = torch.randn(16, 20, generator=randomness.torch)
            return {"loss": (network(x) - x.flip(1)).square().mean()}

        settings = Settings(steps=12, muon=True, learning_rate=1e-2, warmup=2)
        losses = []
        for stop in (*stops, 12):
            train(network, objective, settings, folder, stop_at=stop)
            losses.append(objective(StepRandomness.of(1, 0))["loss"])
        return losses[-1].detach()

    whole, resumed = run(tmp_path / "a"), run(tmp_path / "b", 5)
    torch.testing.assert_close(whole, resumed)


def test_orthogonalisation_is_newton_schulz() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(12, 30)
    x = (matrix / matrix.norm()).double()
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    torch.testing.assert_close(orthogonalise(matrix), x.float(), atol=1e-4, rtol=1e-3)


def test_matrices_of_low_rank_stay_bounded() -> None:
    """Gradients have a few large singular values, and the rest are near 0, where rounding may change their sign."""
    torch.manual_seed(0)
    for rank in (1, 4):
        matrix = torch.randn(64, rank) @ torch.randn(rank, 200) + 1e-6 * torch.randn(64, 200)
        assert torch.linalg.svdvals(orthogonalise(matrix)).max() < 1.3
    assert not orthogonalise(torch.zeros(4, 6)).isnan().any()


def test_parameters_take_turns() -> None:
    weights = [torch.nn.Parameter(torch.eye(16)) for _ in range(4)]
    optimizer = Muon(weights, lr=0.1, interval=2)
    for weight in weights:
        weight.grad = torch.eye(16)
    optimizer.step()
    changed = [not torch.equal(weight.detach(), torch.eye(16)) for weight in weights]
    assert sorted(changed) == [False, False, True, True]
    optimizer.step()
    each_step = torch.nn.Parameter(torch.eye(16))
    each_step.grad = torch.eye(16)
    reference = Muon([each_step], lr=0.1)
    reference.step()
    reference.step()
    for weight in weights:
        torch.testing.assert_close(weight, each_step, atol=1e-5, rtol=0)
