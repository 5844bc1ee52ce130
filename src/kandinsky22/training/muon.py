"""Muon: momentum whose matrices are orthogonalised (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

# Coefficients of the Newton-Schulz iteration, from the source above. They drive singular values to between 0.7 and 1.2.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
# Factor that gives updates the root mean square of AdamW's, thus both use one learning rate (Liu et al. 2025,
# https://arxiv.org/abs/2502.16982, equation 4).
_SCALE = 0.2


class Muon(torch.optim.Optimizer):
    """Optimizer for weight matrices, and for kernels of convolutions as matrices (out, in x height x width).

    Each update costs several matrix products per matrix. Where they cost as much as the gradient, `interval` spreads
    them over several steps: the momentum, which covers about 1 / (1 - momentum) steps, hardly changes between two
    updates.

    Args:
        params: Parameters with at least two dimensions, or groups of them.
        lr: Learning rate, as for AdamW.
        momentum: Decay rate of the momentum.
        weight_decay: Decoupled weight decay.
        interval: Number of steps between two updates of a parameter, at least 1. Parameters take turns, and each update
            is as long as those of `interval` steps together.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float = 1e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        interval: int = 1,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "interval": interval, "steps": 0}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take one step.

        Args:
            closure: Not supported; None.
        """
        for group in self.param_groups:
            group["steps"] += 1
            lr = group["lr"] * group["interval"]
            for turn, parameter in enumerate(group["params"], start=group["steps"]):
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum: Tensor = state["momentum"]
                momentum.lerp_(parameter.grad, 1 - group["momentum"])
                if turn % group["interval"]:
                    continue
                update = orthogonalise(torch.lerp(parameter.grad, momentum, group["momentum"]).flatten(1))
                scale = _SCALE * max(update.shape) ** 0.5
                parameter.mul_(1 - lr * group["weight_decay"])
                parameter.add_(update.view_as(parameter), alpha=-lr * scale)


def orthogonalise(matrix: Tensor) -> Tensor:
    """Return a matrix with the same singular vectors, and singular values near 1.

    Each iteration multiplies x by the polynomial a + b g + c g^2 of g = x x^T. Polynomials of g commute, therefore the
    iteration runs on g, which is small, and x is multiplied once, by the product of the polynomials. g must be computed
    in single precision: rounding to bfloat16 gives it negative eigenvalues, which the iteration would enlarge without
    limit.

    Args:
        matrix: Tensor (rows, columns).
    """
    a, b, c = _COEFFICIENTS
    x = matrix.float()
    if tall := x.shape[0] > x.shape[1]:
        x = x.mT
    gram = x @ x.mT
    gram = gram / (gram.trace() + 1e-14)  # the trace is the squared norm of x
    scale = 1 / (x.norm() + 1e-7)
    identity = torch.eye(len(gram))
    product = identity
    for _ in range(_ITERATIONS):
        polynomial = a * identity + b * gram + c * gram @ gram
        gram = polynomial @ gram @ polynomial
        product = polynomial @ product
    update = (product * scale) @ x
    return (update.mT if tall else update).to(matrix.dtype)
