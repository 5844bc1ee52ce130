"""Gaussian noise that depends on the generators only, not on the device of the result or on the rest of the batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from kandinsky22.errors import invalid
from kandinsky22.kernels.locks import GLOBAL_RNG

Generators: TypeAlias = torch.Generator | list[torch.Generator] | tuple[torch.Generator, ...] | None


def randn_tensor(
    shape: Sequence[int],
    generator: Generators = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return standard normal noise.

    Args:
        shape: Shape of the result; the first dimension is the batch.
        generator: Generator of the whole batch, or a list with one generator per batch item, which makes an image
            independent of the others of its batch. A list of one counts as that generator. None uses torch's global
            generator. A CPU generator computes the noise on the CPU whatever `device` is: the same seed gives the
            same noise on all devices.
        device: Device of the result; None means the CPU.
        dtype: Dtype in which the noise is computed and returned; None means torch's default.

    Raises:
        InputError: If the number of generators is not the batch size, or if a generator belongs to another
            accelerator.
    """
    device = torch.device("cpu" if device is None else device)
    if not isinstance(generator, list | tuple):
        return _randn("generator", shape, generator, device, dtype)
    if len(generator) == 1:
        return _randn("generator[0]", shape, generator[0], device, dtype)
    if len(generator) != shape[0]:
        raise invalid("len(generator)", len(generator), f"1 or {shape[0]}, one generator per batch item")
    items = [
        _randn(f"generator[{index}]", (1, *shape[1:]), item, device, dtype) for index, item in enumerate(generator)
    ]
    return torch.cat(items)


def _randn(
    argument: str, shape: Sequence[int], generator: Generators, device: torch.device, dtype: torch.dtype | None
) -> Tensor:
    if generator is not None and not isinstance(generator, torch.Generator):
        raise invalid(argument, generator, "a torch.Generator, a list of them, or None")
    if generator is None:
        with GLOBAL_RNG:
            return torch.randn(tuple(shape), device=device, dtype=dtype)
    if generator.device.type == device.type:
        return torch.randn(tuple(shape), generator=generator, device=device, dtype=dtype)
    if generator.device.type != "cpu":
        raise invalid(f"{argument}.device", generator.device, f"cpu or {device.type}, the device of the noise")
    return torch.randn(tuple(shape), generator=generator, dtype=dtype).to(device)
