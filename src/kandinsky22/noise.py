"""Normal noise that depends on the generators given, not on the device it ends up on or on the batch it is part of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from kandinsky22.errors import InputError

Generators: TypeAlias = torch.Generator | list[torch.Generator] | tuple[torch.Generator, ...] | None


def randn_tensor(
    shape: Sequence[int],
    generator: Generators = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Standard normal noise of `shape` on `device`, drawn in `dtype`.

    A list of generators gives one sample of the batch each, so a picture does not depend on its neighbours; a list of
    one counts as that generator. A CPU generator draws on the CPU whatever `device` is: the same seed,
    the same noise everywhere. Raises InputError if the number of generators is not the batch size, or if a generator
    lives on another accelerator.
    """
    device = torch.device("cpu" if device is None else device)
    if not isinstance(generator, list | tuple):
        return _draw(shape, generator, device, dtype)
    if len(generator) == 1:
        return _draw(shape, generator[0], device, dtype)
    if len(generator) != shape[0]:
        raise InputError(f"generator: {len(generator)} given for a batch of {shape[0]}; accepted: one, or one a sample")
    return torch.cat([_draw((1, *shape[1:]), one, device, dtype) for one in generator])


def _draw(shape: Sequence[int], generator: Generators, device: torch.device, dtype: torch.dtype | None) -> Tensor:
    if generator is not None and not isinstance(generator, torch.Generator):
        raise InputError(f"generator: {type(generator).__name__} given; accepted: torch.Generator, or a list of them")
    if generator is None or generator.device.type == device.type:
        return torch.randn(tuple(shape), generator=generator, device=device, dtype=dtype)
    if generator.device.type != "cpu":
        raise InputError(f"generator: on {generator.device}, noise needed on {device}; accepted: cpu or {device.type}")
    return torch.randn(tuple(shape), generator=generator, dtype=dtype).to(device)
