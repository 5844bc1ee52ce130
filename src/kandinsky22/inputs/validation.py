"""Checks of single arguments.

Each function returns the value in the one form that the rest of the library uses, or raises an `InputError` that
names the argument, its value and what is accepted.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kandinsky22.errors import invalid


def positive_int(argument: str, value: Any) -> int:
    """Return an integer of at least 1.

    Args:
        argument: Name of the argument, for the message.
        value: Its value. NumPy integers are accepted, booleans and floats are not.

    Raises:
        InputError: If `value` is anything else.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or int(value) < 1:
        raise invalid(argument, value, "an integer of at least 1")
    return int(value)


def non_negative_int(argument: str, value: Any) -> int:
    """Return an integer of at least 0.

    Args:
        argument: Name of the argument, for the message.
        value: Its value. NumPy integers are accepted, booleans and floats are not.

    Raises:
        InputError: If `value` is anything else.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or int(value) < 0:
        raise invalid(argument, value, "an integer of at least 0")
    return int(value)


def finite_float(argument: str, value: Any) -> float:
    """Return a finite number.

    Args:
        argument: Name of the argument, for the message.
        value: Its value. NumPy numbers are accepted, booleans are not.

    Raises:
        InputError: If `value` is anything else, NaN or infinite.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise invalid(argument, value, "a finite number")
    return float(value)


def strict_bool(argument: str, value: Any) -> bool:
    """Return True or False; other values that Python treats as true or false are refused.

    Args:
        argument: Name of the argument, for the message.
        value: Its value.

    Raises:
        InputError: If `value` is not a bool.
    """
    if not isinstance(value, bool):
        raise invalid(argument, value, "True or False")
    return value


def one_of(argument: str, value: Any, accepted: Sequence[str]) -> str:
    """Return one of the accepted strings.

    Args:
        argument: Name of the argument, for the message.
        value: Its value.
        accepted: The strings that are accepted.

    Raises:
        InputError: If `value` is not one of them.
    """
    if not isinstance(value, str) or value not in accepted:
        raise invalid(argument, value, f"one of {', '.join(map(repr, accepted))}")
    return value


def subset_of(argument: str, value: Any, accepted: Sequence[str]) -> tuple[str, ...]:
    """Return a tuple of some of the accepted strings.

    Args:
        argument: Name of the argument, for the message.
        value: A sequence of strings. None means no strings.
        accepted: The strings that are accepted.

    Raises:
        InputError: If `value` is not a sequence, or if one of its items is not accepted.
    """
    if value is None:
        return ()
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise invalid(argument, value, f"a list of names out of {', '.join(map(repr, accepted))}")
    return tuple(one_of(argument, item, accepted) for item in value)


def output_format(output_type: Any, return_dict: Any, accepted: Sequence[str]) -> None:
    """Check the two arguments that select the form of a pipeline's result.

    Args:
        output_type: Name of the form, one of `accepted`.
        return_dict: True for a result with named fields, False for a tuple.
        accepted: The output types of this pipeline.

    Raises:
        InputError: If either of the two is not accepted.
    """
    one_of("output_type", output_type, accepted)
    strict_bool("return_dict", return_dict)


def optional_callable(argument: str, value: Any) -> Callable[..., Any] | None:
    """Return a callable or None.

    Args:
        argument: Name of the argument, for the message.
        value: Its value.

    Raises:
        InputError: If `value` is neither.
    """
    if value is not None and not callable(value):
        raise invalid(argument, value, "a function or None")
    return value


def generators_per_item(value: Any, num_images: int, batch_size: int) -> torch.Generator | list[torch.Generator] | None:
    """Return the random generators of a batch.

    Args:
        value: One generator for all batch items, a list of one, a list with one per image or per batch item, or
            None for torch's global generator. A list with one generator per image is repeated where an image has
            several batch items (the prior's negative embedding, for example).
        num_images: Number of images to generate.
        batch_size: Number of batch items, a multiple of `num_images`.

    Returns:
        None, one generator, or a list of `batch_size` generators.

    Raises:
        InputError: If `value` is not a generator, a list of the right length, or None.
    """
    if value is None or isinstance(value, torch.Generator):
        return value
    if not isinstance(value, list | tuple) or not all(isinstance(item, torch.Generator) for item in value):
        raise invalid("generator", value, "a torch.Generator, a list of them, or None")
    if len(value) not in (1, num_images, batch_size):
        raise invalid("len(generator)", len(value), f"1 or {num_images}, one generator per image")
    return value[0] if len(value) == 1 else [*value] * (batch_size // len(value))


def initial_latents(value: Any, shape: tuple[int, ...]) -> Tensor:
    """Return initial noise of exactly one shape.

    Args:
        value: A tensor of real, finite values.
        shape: The shape it must have.

    Raises:
        InputError: If `value` is not such a tensor.
    """
    if not isinstance(value, Tensor) or value.is_complex() or tuple(value.shape) != shape:
        raise invalid("latents", value, f"a tensor of real numbers of shape {shape}")
    return finite_tensor("latents", value)


def image_embeddings(argument: str, value: Any, width: int) -> Tensor:
    """Return image embeddings as one tensor (batch, width).

    Args:
        argument: Name of the argument, for messages.
        value: A floating-point tensor or array (batch, width) or (width,), or a list of those.
        width: Number of values of one embedding.

    Raises:
        InputError: If `value` has another type or shape, or holds NaN or infinity.
    """
    if isinstance(value, list | tuple):
        if not value:
            raise invalid(argument, value, "at least one embedding")
        items = [image_embeddings(f"{argument}[{index}]", item, width) for index, item in enumerate(value)]
        return torch.cat(items)
    embeds = value
    if isinstance(value, np.ndarray) and np.issubdtype(value.dtype, np.floating):
        native_dtype = f"=f{min(value.dtype.itemsize, 8)}"  # torch reads neither foreign byte orders nor long doubles
        embeds = torch.from_numpy(value.astype(native_dtype))
    if isinstance(embeds, Tensor) and embeds.ndim == 1:
        embeds = embeds[None]
    if (
        not isinstance(embeds, Tensor)
        or not embeds.is_floating_point()
        or embeds.ndim != 2
        or embeds.shape[1] != width
        or embeds.shape[0] == 0
    ):
        raise invalid(argument, value, f"a floating-point tensor or array of shape (batch, {width}), or a list of them")
    return finite_tensor(argument, embeds)


def dense(argument: str, value: Tensor) -> Tensor:
    """Return a tensor that stores all of its values.

    Args:
        argument: Name of the argument, for the message.
        value: The tensor.

    Raises:
        InputError: If the tensor is sparse or on the meta device.
    """
    if value.layout != torch.strided:
        raise invalid(f"{argument}.layout", value.layout, "torch.strided", "call to_dense() first")
    if value.is_meta and type(value) is Tensor:  # a subclass may report the meta device and store values of its own
        raise invalid(f"{argument}.device", value.device, "a device that stores values, which 'meta' does not")
    return value


def finite_tensor(argument: str, value: Tensor) -> Tensor:
    """Return a dense tensor without NaN or infinity.

    Args:
        argument: Name of the argument, for the message.
        value: The tensor.

    Raises:
        InputError: If the tensor is sparse, on the meta device, or holds NaN or infinity.
    """
    if not bool(torch.isfinite(dense(argument, value)).all()):
        raise invalid(argument, value, "finite values, without NaN and infinity")
    return value


def values_in_range(argument: str, low: float, high: float, limits: tuple[float, float], expected: str) -> None:
    """Check the smallest and the largest value of a tensor or an array.

    Args:
        argument: Name of the argument, for the message.
        low: Its smallest value.
        high: Its largest value.
        limits: Smallest and largest value that are accepted.
        expected: Description of the accepted values, for the message.

    Raises:
        InputError: If `low` or `high` is outside `limits`, or NaN.
    """
    if not low >= limits[0]:
        raise invalid(f"{argument}.min()", float(f"{low:g}"), expected)
    if not high <= limits[1]:
        raise invalid(f"{argument}.max()", float(f"{high:g}"), expected)


def replacement_tensor(
    argument: str, value: Any, current: Tensor | None, other_batch_size: int | None = None
) -> Tensor:
    """Return a tensor that replaces another one, with the dtype and device of that one.

    Args:
        argument: Name of the argument, for the message.
        value: A real tensor of the shape of `current`.
        current: The tensor to replace; None if there is none.
        other_batch_size: Another batch size that `value` may have; None accepts only that of `current`.

    Raises:
        InputError: If `value` is not such a tensor, or if there is nothing to replace.
    """
    if current is None:
        raise invalid(argument, value, "no tensor of this name", "this call has no such tensor to replace")
    batch_sizes = dict.fromkeys((len(current), other_batch_size))
    shapes = [(batch_size, *current.shape[1:]) for batch_size in batch_sizes if batch_size is not None]
    if not isinstance(value, Tensor) or value.is_complex() or tuple(value.shape) not in shapes:
        raise invalid(argument, value, f"a real tensor of shape {' or '.join(map(str, shapes))}")
    return dense(argument, value).to(current)


def batch_of_size(argument: str, value: Tensor, batch_size: int, other: str) -> Tensor:
    """Return a tensor with `batch_size` batch items; a single item is repeated.

    Args:
        argument: Name of the argument, for the message.
        value: Tensor (1, ...) or (batch_size, ...).
        batch_size: The batch size it must have.
        other: Name of the argument that has this batch size, for the message.

    Raises:
        InputError: If `value` has another batch size.
    """
    if value.shape[0] == 1:
        return value.expand(batch_size, *value.shape[1:])
    if value.shape[0] != batch_size:
        raise invalid(f"len({argument})", value.shape[0], f"1 or {batch_size}, the batch size of {other}")
    return value
