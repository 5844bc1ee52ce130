"""Fingerprints of tensors match until the tensor changes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kandinsky22.kernels.fingerprint import TensorFingerprint

CHANGES: dict[str, Callable[[Tensor], object]] = {
    "in place": lambda tensor: tensor.mul_(2),
    "data in place": lambda tensor: tensor.data.mul_(2),  # torch does not count this
    "through numpy": lambda tensor: tensor.numpy().fill(0.25),  # nor this
    "other data": lambda tensor: setattr(tensor, "data", tensor.data.clone()),
    "another dtype": lambda tensor: setattr(tensor, "data", tensor.data.double()),
    "another shape": lambda tensor: setattr(tensor, "data", tensor.data.view(-1)),
    "first element": lambda tensor: tensor.data[(0,) * tensor.ndim].fill_(7),
    "last element": lambda tensor: tensor.data[(-1,) * tensor.ndim].fill_(7),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("shape", [(24, 40), (8, 6, 3, 3), (1, 5)], ids=str)
def test_changes_are_noticed(shape: tuple[int, ...], change: str) -> None:
    tensor = torch.randn(shape)
    fingerprint = TensorFingerprint(tensor)
    assert fingerprint.is_valid
    assert fingerprint.matches(tensor)
    assert fingerprint.matches(tensor.detach()), "the same memory and version"
    CHANGES[change](tensor)
    assert not fingerprint.matches(tensor)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,)], ids=str)
def test_any_shape_has_a_fingerprint(shape: tuple[int, ...]) -> None:
    tensor = torch.zeros(shape)
    assert TensorFingerprint(tensor).matches(tensor)
    assert not TensorFingerprint(tensor).matches(torch.zeros(5))


def test_tensors_without_versions_or_values_never_match() -> None:
    with torch.inference_mode():
        inference = torch.randn(3, 4)
    counted = torch.randn(3, 4)
    for tensor in (inference, torch.randn(3, 4, device="meta")):
        fingerprint = TensorFingerprint(tensor)
        assert not fingerprint.is_valid
        assert not fingerprint.matches(tensor)
        assert not fingerprint.matches(counted)
        assert not TensorFingerprint(counted).matches(tensor)


def test_more_samples_notice_changes_inside() -> None:
    weight = torch.zeros(64, 64)
    fingerprints = [TensorFingerprint(weight, samples_per_side=number) for number in (2, 5)]
    weight.data[16:48] += 1
    assert [fingerprint.matches(weight) for fingerprint in fingerprints] == [True, False]
