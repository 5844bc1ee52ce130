"""Detecting that the values of one tensor changed, without reading them all."""

from __future__ import annotations

import torch
from torch import Tensor


class TensorFingerprint:
    """State of a tensor at one moment, to be compared with its state later.

    Three kinds of changes are noticed:

    - Moves and conversions give the tensor other memory, another device or another dtype.
    - Changes in place, such as an optimizer step, increment the version counter of torch.
    - Changes that torch does not count (through ``tensor.data`` or a numpy view) are noticed if they concern one of the
      sampled elements. Scaling, weight averaging and merged adapters change these; an edit of single elements
      elsewhere is not noticed.

    Args:
        tensor: The tensor.
        samples_per_side: Sampled indices per dimension, from 2: the first, the last, and evenly spaced ones between.
            Two are read quickly from a tensor that is mapped from a file and was not read yet.
    """

    def __init__(self, tensor: Tensor, samples_per_side: int = 2) -> None:
        self._samples_per_side = samples_per_side
        self._state: tuple[object, ...] | None = None
        if not (tensor.is_inference() or tensor.is_meta):
            self._state = _state(tensor)
            self._samples = _sampled_elements(tensor, self._samples_per_side).clone()

    @property
    def is_valid(self) -> bool:
        """Whether the tensor can be recognised at all.

        False for tensors of torch's inference mode, which have no version counter, and for tensors on the meta device,
        which have no values.
        """
        return self._state is not None

    def matches(self, tensor: Tensor) -> bool:
        """Return whether a tensor still is what the fingerprint was taken from, as far as can be seen.

        Args:
            tensor: Tensor to compare, of any shape, dtype and device.
        """
        if self._state is None or tensor.is_inference() or tensor.is_meta or self._state != _state(tensor):
            return False
        return torch.equal(self._samples, _sampled_elements(tensor, self._samples_per_side))


def _state(tensor: Tensor) -> tuple[object, ...]:
    return tensor.data_ptr(), tensor._version, tensor.device, tensor.dtype, tensor.shape, tensor.stride()


def _sampled_elements(tensor: Tensor, samples_per_side: int) -> Tensor:
    """Return the elements at evenly spaced indices of every dimension, the first one included."""
    return tensor.detach()[
        tuple(slice(None, None, max(1, (size - 1) // (samples_per_side - 1))) for size in tensor.shape)
    ]
