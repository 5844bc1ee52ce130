"""Recording of what networks are called with."""

from __future__ import annotations

from typing import Any

import pytest
import torch


def record_batch_sizes(network: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows by the batch size of each call of the network's `denoise`."""
    sizes: list[int] = []
    denoise = network.denoise

    def recorded(sample: torch.Tensor, *rest: Any) -> torch.Tensor:
        sizes.append(len(sample))
        return denoise(sample, *rest)

    monkeypatch.setattr(network, "denoise", recorded)
    return sizes
