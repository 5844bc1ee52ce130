"""Checks of single arguments. Each returns the value in the one form the rest of the library works with, or raises
`InputError` that names the argument, what was given and what is accepted."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kandinsky22.errors import InputError


def whole(name: str, value: Any, *, minimum: int = 1) -> int:
    """A whole number of at least `minimum`; numpy's integers count, booleans and floats do not."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or int(value) < minimum:
        raise InputError(f"{name}={value!r}: a whole number of at least {minimum} is needed")
    return int(value)


def number(name: str, value: Any) -> float:
    """A finite number."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise InputError(f"{name}={value!r}: a finite number is needed")
    return float(value)


def flag(name: str, value: Any) -> bool:
    """True or False, nothing that merely counts as one."""
    if not isinstance(value, bool):
        raise InputError(f"{name}={value!r}: True or False is needed")
    return value


def choice(name: str, value: Any, accepted: Sequence[str]) -> str:
    """One of the accepted words."""
    if not isinstance(value, str) or value not in accepted:
        raise InputError(f"{name}={value!r}: accepted are {', '.join(map(repr, accepted))}")
    return value


def output(output_type: Any, return_dict: Any, accepted: Sequence[str]) -> None:
    """In which form results are asked for: an output type of the accepted ones, named or as a tuple."""
    choice("output_type", output_type, accepted)
    flag("return_dict", return_dict)


def function(name: str, value: Any) -> Callable[..., Any] | None:
    """Something to call, or None."""
    if value is not None and not callable(value):
        raise InputError(f"{name}={value!r}: a function or None is needed")
    return value


def names(name: str, value: Any, accepted: Sequence[str]) -> tuple[str, ...]:
    """A list of some of the accepted words; None means none of them."""
    chosen = () if value is None else value
    if isinstance(chosen, str) or not isinstance(chosen, Sequence):
        raise InputError(f"{name}={value!r}: a list of names is needed, out of {', '.join(accepted)}")
    return tuple(choice(name, item, accepted) for item in chosen)


def generators(value: Any, pictures: int, rows: int) -> torch.Generator | list[torch.Generator] | None:
    """No generator, one for all, or a list with one for each of `rows` samples.

    A list with one for each picture is repeated where a picture has several samples (its negative, say).
    """
    if value is None or isinstance(value, torch.Generator):
        return value
    if not isinstance(value, list | tuple) or not all(isinstance(item, torch.Generator) for item in value):
        raise InputError(f"generator={value!r}: a torch.Generator, a list of them, or None is needed")
    if len(value) not in (1, pictures, rows):
        raise InputError(f"generator: a list of {len(value)} was given for {pictures} pictures; one each is needed")
    return value[0] if len(value) == 1 else [*value] * (rows // len(value))


def latents(value: Any, shape: tuple[int, ...]) -> Tensor:
    """Start noise of exactly this shape, real and without NaN or infinity."""
    if not isinstance(value, Tensor) or value.is_complex():
        given = str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
        raise InputError(f"latents: a tensor of real numbers is needed, not {given}")
    if tuple(value.shape) != shape:
        raise InputError(f"latents have shape {tuple(value.shape)}; this call needs {shape}")
    return finite("latents", value)


def embeddings(name: str, value: Any, width: int) -> Tensor:
    """Image embeddings as one tensor (batch, width), from a tensor, an array, or a list of those.

    A single vector counts as a batch of one.
    """
    if isinstance(value, list | tuple):
        if not value:
            raise InputError(f"{name}: an empty list was given; at least one embedding is needed")
        return torch.cat([embeddings(name, item, width) for item in value])
    if isinstance(value, np.ndarray) and np.issubdtype(value.dtype, np.floating):
        value = torch.from_numpy(value.astype(f"=f{min(value.dtype.itemsize, 8)}"))  # in the machine's order of bytes
    if not isinstance(value, Tensor) or not value.is_floating_point():
        given = f"numbers of {value.dtype}" if isinstance(value, Tensor | np.ndarray) else type(value).__name__
        raise InputError(f"{name}: a floating-point tensor (batch, {width}) or a list of them is needed, not {given}")
    if value.ndim == 1:
        value = value[None]
    if value.ndim != 2 or value.shape[1] != width or value.shape[0] == 0:
        raise InputError(f"{name} has shape {tuple(value.shape)}; this model needs (batch, {width})")
    return finite(name, value)


def plain(name: str, value: Tensor) -> Tensor:
    """`value` itself if it holds its numbers in the usual way; raises InputError for sparse and meta tensors."""
    empty = value.is_meta and type(value) is Tensor  # a subclass may say so and hold numbers of its own
    if value.layout != torch.strided or empty:
        kind = "meta" if empty else str(value.layout).removeprefix("torch.")
        raise InputError(f"{name}: a {kind} tensor was given; one that holds all its numbers is needed")
    return value


def finite(name: str, value: Tensor) -> Tensor:
    """The tensor itself, unless it holds NaN or infinity, or its numbers in an unusual way."""
    if not bool(torch.isfinite(plain(name, value)).all()):
        raise InputError(f"{name} holds NaN or infinite numbers")
    return value


def replacement(name: str, value: Any, current: Tensor | None, fewest: int | None = None) -> Tensor:
    """`value` in the type and place of the tensor `current`, whose shape it has, or `fewest` rows of that if given."""
    if current is None:
        raise InputError(f"{name}: this call has none that could be replaced")
    accepted = [(rows, *current.shape[1:]) for rows in dict.fromkeys((len(current), fewest)) if rows is not None]
    if not isinstance(value, Tensor) or value.is_complex() or tuple(value.shape) not in accepted:
        given = f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise InputError(f"{name}: a real tensor of shape {' or '.join(map(str, accepted))} is needed, not {given}")
    return value.to(current)


def same_batch(name: str, value: Tensor, batch: int, other: str) -> Tensor:
    """`value` with `batch` rows; a single row is repeated."""
    if value.shape[0] == 1:
        return value.expand(batch, *value.shape[1:])
    if value.shape[0] != batch:
        raise InputError(f"{name} has {value.shape[0]} rows and {other} has {batch}; equal numbers, or 1, are needed")
    return value
