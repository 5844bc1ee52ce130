"""Which pictures each step trains on, and its random numbers: functions of the seed and the step alone.

A resumed run therefore needs no stored state of generators, and the number of processes and of passes per step changes
no picture, no noise and no timestep of a step.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kandinsky22.errors import CheckpointError
from kandinsky22.training.finetuning.cache import TensorCache
from kandinsky22.training.finetuning.preparation import Entry

MEMORY_BYTES = 2**30  # tensors that are kept in memory; others are read again from the cache


@dataclass(frozen=True)
class Draw:
    """One training example of a step.

    Attributes:
        index: Index of the picture.
        key: Seeds of its random numbers: those of the training, the step and the position in the step's batch.
        level: Position of its timestep in the schedule, from 0 to 1; None draws it.
    """

    index: int
    key: tuple[int, ...]
    level: float | None = None

    def generators(self) -> tuple[np.random.Generator, torch.Generator]:
        """Return new generators of numpy and torch (on the CPU), always in the same state."""
        numbers = np.random.default_rng(list(self.key))
        return numbers, torch.Generator().manual_seed(int(numbers.integers(2**62)))


class BatchPlan:
    """Order of the pictures. The pictures of a step have one size, and all pictures are equally frequent.

    Args:
        sizes: Size of each picture.
        count: Pictures per step, of all processes and passes together.
        seed: Seed of the training.
        stream: Number that tells apart several plans of one training.
    """

    def __init__(self, sizes: Sequence[tuple[int, int]], count: int, seed: int, stream: int = 0) -> None:
        groups: dict[tuple[int, int], list[int]] = {}
        for index, size in enumerate(sizes):
            groups.setdefault(size, []).append(index)
        self._groups = [np.array(group) for _, group in sorted(groups.items())]
        self._count, self._seed, self._stream = count, seed, stream
        self._choices = np.random.default_rng([seed, stream, 1])
        shares = np.array([len(group) for group in self._groups], dtype=np.float64)
        self._limits = np.cumsum(shares / shares.sum())
        self._steps: list[tuple[int, int]] = []  # group of each step, and how often it was chosen before
        self._used = [0] * len(self._groups)
        self._orders: dict[int, tuple[int, np.ndarray]] = {}

    def draws(self, step: int) -> list[Draw]:
        """Return the examples of a step.

        Args:
            step: Number of the step, counted from 0.
        """
        while len(self._steps) <= step:
            group = min(int(np.searchsorted(self._limits, self._choices.random(), "right")), len(self._groups) - 1)
            self._steps.append((group, self._used[group]))
            self._used[group] += 1
        group, used = self._steps[step]
        first = used * self._count
        return [
            Draw(self._at(group, first + position), (self._seed, self._stream, 2, step, position))
            for position in range(self._count)
        ]

    def _at(self, group: int, position: int) -> int:
        """Return an element of the infinite sequence of shuffled passes over a group."""
        members = self._groups[group]
        epoch, within = divmod(position, len(members))
        if self._orders.get(group, (-1,))[0] != epoch:
            order = np.random.default_rng([self._seed, self._stream, 3, group, epoch]).permutation(len(members))
            self._orders[group] = epoch, order
        return int(members[self._orders[group][1][within]])


class TensorStore:
    """Reader of cached tensors that keeps the last ones in memory.

    Args:
        cache: The cache.
        limit: Bytes that are kept.
    """

    def __init__(self, cache: TensorCache, limit: int = MEMORY_BYTES) -> None:
        self._cache, self._limit = cache, limit
        self._tensors: OrderedDict[Path, dict[str, Tensor]] = OrderedDict()
        self._bytes = 0

    def __getitem__(self, path: Path) -> dict[str, Tensor]:
        if path in self._tensors:
            self._tensors.move_to_end(path)
            return self._tensors[path]
        tensors = self._cache.read(path)
        if tensors is None:
            raise CheckpointError(f"the cache file {path} is missing: it was deleted while the training ran")
        self._tensors[path] = tensors
        self._bytes += _size(tensors)
        while self._bytes > self._limit and len(self._tensors) > 1:
            _, dropped = self._tensors.popitem(last=False)
            self._bytes -= _size(dropped)
        return tensors


def _size(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def split_held_out(entries: Sequence[Entry], count: int | None, seed: int) -> tuple[list[Entry], list[Entry]]:
    """Return the entries to train on and those to validate with.

    Args:
        entries: All entries.
        count: Number of entries to validate with; None for a tenth, at most 16. At least one remains to train on.
        seed: Seed of the training.
    """
    number = min(len(entries) // 10, 16) if count is None else min(count, len(entries) - 1)
    order = np.random.default_rng([seed, 4]).permutation(len(entries))
    held_out = set(order[:number].tolist())
    return (
        [entry for index, entry in enumerate(entries) if index not in held_out],
        [entry for index, entry in enumerate(entries) if index in held_out],
    )
