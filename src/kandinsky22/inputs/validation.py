"""Checks of single arguments.

Each function returns the value in the one form that the rest of the library uses, or raises an `InputError` that
names the argument, its value and what is accepted.
"""

from __future__ import annotations

import inspect
import math
import numbers
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from kandinsky22.errors import SHOWN_CHARACTERS, InputError, invalid

MAX_INTEGER = 2**31 - 1  # torch's kernels count in 32 bits
MAX_COPIES = 10_000  # images per prompt: more do not fit into any memory
MAX_BATCH_PIXELS = 2**30
MAX_SIDE = 16_384  # pixels: attention over more does not fit into any memory


def positive_int(argument: str, value: Any, highest: int = MAX_INTEGER) -> int:
    """Return an integer of at least 1.

    Args:
        argument: Name of the argument, for the message.
        value: Its value. NumPy integers are accepted, booleans and floats are not.
        highest: Largest accepted integer.

    Raises:
        InputError: If `value` is anything else.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or int(value) < 1:
        raise invalid(argument, value, "an integer of at least 1")
    if int(value) > highest:
        raise invalid(argument, value, f"an integer of at most {highest}")
    return int(value)


def copy_count(value: Any) -> int:
    """Return a valid `num_images_per_prompt`.

    Args:
        value: Its value.

    Raises:
        InputError: If `value` is not an integer from 1 to `MAX_COPIES`.
    """
    return positive_int("num_images_per_prompt", value, MAX_COPIES)


def finite_float(argument: str, value: Any) -> float:
    """Return a finite number.

    Args:
        argument: Name of the argument, for the message.
        value: Its value. NumPy numbers are accepted, booleans are not.

    Raises:
        InputError: If `value` is anything else, NaN, infinite or beyond the range of floating-point numbers.
    """
    try:
        number = math.nan if isinstance(value, bool) or not isinstance(value, numbers.Real) else float(value)
    except OverflowError:  # an integer or a fraction may be larger than any float
        number = math.inf
    if not math.isfinite(number):
        raise invalid(argument, value, "a finite number")
    return number


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


def names_among(argument: str, value: Any, accepted: Sequence[str], what: str) -> list[str]:
    """Return names of a list, a set or any other iterable, each once and in their order.

    Args:
        argument: Name of the argument, for the message.
        value: The names.
        accepted: The names that are accepted.
        what: Description of what they name, for the message, such as "networks that can be compiled".

    Raises:
        InputError: If `value` is a single string or no iterable, or if one of its items is not accepted.
    """
    expected = f"a list of names of {what} ({', '.join(accepted) or 'this pipeline has none'})"
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise invalid(argument, value, expected)
    names: dict[str, None] = {}
    try:
        for name in value:
            if not isinstance(name, str) or name not in accepted:
                raise invalid(argument, [name], expected)
            names[str(name)] = None
    except InputError:
        raise
    except Exception as error:  # an iterator may fail in any way
        raise invalid(argument, value, expected) from error
    return list(names)


def listed(argument: str, value: Any) -> list[Any]:
    """Return the items of a list or a tuple as a plain list.

    Args:
        argument: Name of the argument, for the message.
        value: An instance of a subclass of list or tuple, which somebody may have written.

    Raises:
        InputError: If the items cannot be read.
    """
    try:
        return list(value)
    except Exception as error:
        raise invalid(argument, value, "a list whose items can be read") from error


def existing_folder(argument: str, value: Any) -> str:
    """Return the path of an existing folder.

    Args:
        argument: Name of the argument, for the message.
        value: The path.

    Raises:
        InputError: If `value` is not a path, or the folder does not exist.
    """
    path: Any = None
    try:
        path = os.fspath(value) if isinstance(value, str | os.PathLike) else None
        is_folder = isinstance(path, str) and os.path.isdir(path)
    except Exception:  # a path-like object may fail in any way, and some characters are in no path
        is_folder = False
    if not is_folder:
        raise invalid(argument, value, "an existing folder")
    return str(path)


def usable_device(device: torch.device | str | int, argument: str = "device") -> torch.device:
    """Return a device after placing an empty tensor on it.

    Args:
        device: Any device of torch, or its name or index.
        argument: Name of the argument, for messages.

    Raises:
        InputError: If it is anything else, or tensors cannot be placed there.
    """
    if isinstance(device, bool) or not isinstance(device, torch.device | str | int):
        raise invalid(argument, device, "a torch.device, or the name or index of one")
    try:
        torch.empty(0, device=device)
        return torch.device(device)
    except Exception as error:  # the type depends on the backend
        reason = str(error).strip().split("\n")[0][:SHOWN_CHARACTERS]
        raise invalid(argument, device, "a device that torch can use here", f"torch reports: {reason}") from error


def storing_device(device: torch.device | str | int | None) -> torch.device | None:
    """Return a device on which tensors have values, or None.

    Args:
        device: Any device of torch but the meta device, or its name or index; None is the usual device.

    Raises:
        InputError: If it is anything else, or tensors cannot be placed there.
    """
    if device is None:
        return None
    usable = usable_device(device)
    # Subclasses of Tensor may report the meta device and store values of their own.
    if usable.type == "meta" and type(torch.empty(0, device=usable)) is Tensor:
        raise invalid("device", device, "a device that stores values, which 'meta' does not")
    return usable


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


def optional_callable(argument: str, value: Any, parameters: Sequence[str] = ()) -> Callable[..., Any] | None:
    """Return a callable or None.

    Args:
        argument: Name of the argument, for the message.
        value: Its value.
        parameters: Names of the positional arguments that the callable receives; none are not checked.

    Raises:
        InputError: If `value` is neither, or if the callable does not take these arguments.
    """
    if value is not None and not callable(value):
        raise invalid(argument, value, "a function or None")
    if value is not None and parameters and not _takes(value, len(parameters)):
        raise invalid(argument, value, f"a function of {len(parameters)} arguments ({', '.join(parameters)})")
    return value


def _takes(function: Callable[..., Any], count: int) -> bool:
    """Return whether a function can be called with this number of positional arguments, as far as Python knows."""
    if isinstance(function, torch.nn.Module):
        function = function.forward  # the class accepts anything
    try:
        signature = inspect.signature(function)
    except Exception:  # functions of extension modules, and objects with a broken `__signature__`
        return not isinstance(function, type)
    try:
        signature.bind(*[None] * count)
    except TypeError:
        return False
    return True


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
    if value is None:
        return None
    if isinstance(value, torch.Generator):
        return value
    generators: list[Any] = listed("generator", value) if isinstance(value, list | tuple) else [None]
    if not all(isinstance(item, torch.Generator) for item in generators):
        raise invalid("generator", value, "a torch.Generator, a list of them, or None")
    if len(generators) not in (1, num_images, batch_size):
        raise invalid("len(generator)", len(generators), f"1 or {num_images}, one generator per image")
    if len(generators) == 1:
        return cast(torch.Generator, generators[0])
    return generators * (batch_size // len(generators))


def initial_latents(value: Any, shape: tuple[int, ...]) -> Tensor:
    """Return initial noise of exactly one shape.

    Args:
        value: A tensor of real, finite values.
        shape: The shape it must have.

    Raises:
        InputError: If `value` is not such a tensor.
    """
    if not isinstance(value, Tensor) or dense("latents", value).is_complex() or tuple(value.shape) != shape:
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
        rows = listed(argument, value)
        if not rows:
            raise invalid(argument, value, "at least one embedding")
        for index, item in enumerate(rows):
            if isinstance(item, list | tuple):
                expected = f"a floating-point tensor or array of shape (batch, {width})"
                raise invalid(f"{argument}[{index}]", item, expected)
        return torch.cat([image_embeddings(f"{argument}[{index}]", item, width) for index, item in enumerate(rows)])
    embeds = value
    if isinstance(value, np.ndarray):
        array = plain_array(argument, value)
        if np.issubdtype(array.dtype, np.floating) and array.size <= MAX_COPIES * width:
            native_dtype = f"=f{min(array.dtype.itemsize, 8)}"  # torch reads neither other byte orders nor long doubles
            with np.errstate(over="ignore"):  # infinity is reported below
                embeds = torch.from_numpy(array.astype(native_dtype))
    if isinstance(embeds, Tensor):
        dense(argument, embeds)
    if isinstance(embeds, Tensor) and embeds.ndim == 1:
        embeds = embeds[None]
    if (
        not isinstance(embeds, Tensor)
        or not embeds.is_floating_point()
        or embeds.ndim != 2
        or embeds.shape[1] != width
        or not 1 <= embeds.shape[0] <= MAX_COPIES
    ):
        raise invalid(argument, value, f"a floating-point tensor or array of shape (batch, {width}), or a list of them")
    finite_tensor(argument, embeds)
    return embeds.float() if embeds.dtype.itemsize == 1 else embeds  # types of 8 bits cannot be concatenated


def dense(argument: str, value: Tensor) -> Tensor:
    """Return a tensor that stores all of its values, one number each.

    Args:
        argument: Name of the argument, for the message.
        value: The tensor.

    Raises:
        InputError: If the tensor is nested, sparse, quantized or on the meta device.
    """
    if value.is_nested:
        raise invalid(argument, value, "a tensor with one shape", "call to_padded_tensor(0.0) first")
    if value.layout != torch.strided:
        raise invalid(f"{argument}.layout", value.layout, "torch.strided", "call to_dense() first")
    if value.is_quantized:
        raise invalid(f"{argument}.dtype", value.dtype, "a type that is not quantized", "call dequantize() first")
    # Other subclasses may report the meta device and store values of their own.
    if value.is_meta and type(value) in (Tensor, torch.nn.Parameter):
        raise invalid(f"{argument}.device", value.device, "a device that stores values, which 'meta' does not")
    return value


def finite_tensor(argument: str, value: Tensor) -> Tensor:
    """Return a dense tensor whose values are finite as float32 too, which the networks' types do not exceed.

    Args:
        argument: Name of the argument, for the message.
        value: The tensor.

    Raises:
        InputError: If the tensor is not `dense`, or holds NaN, infinity or values beyond the range of float32.
    """
    # Types of 8 bits have no functions of their own.
    values = dense(argument, value)
    is_narrow = values.is_floating_point() and values.dtype.itemsize == 1
    values = values.float() if is_narrow or values.dtype == torch.float64 else values
    if not bool(torch.isfinite(values).all()):
        raise invalid(argument, value, "finite values, without NaN and infinity")
    return value


def plain_array(
    argument: str, value: np.ndarray[Any, Any], expected: str = "an array of numbers"
) -> np.ndarray[Any, Any]:
    """Return an array of numbers or booleans as an instance of `np.ndarray` itself, whose slices have its dimensions.

    Args:
        argument: Name of the argument, for the message.
        value: An array, possibly of a subclass such as `np.matrix`.
        expected: Description of the accepted arrays, for the message.

    Raises:
        InputError: If values are masked, or if the values are objects, texts, dates or records.
    """
    if isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(value):
        raise invalid(argument, value, "an array without masked values", "call filled() first")
    if value.dtype.kind not in "biufc":
        raise invalid(argument, value, expected)
    return np.asarray(value)


def pixel_count(argument: str, value: Any, shape: Sequence[int]) -> None:
    """Check that a batch of images is not larger than any memory.

    Args:
        argument: Name of the argument, for the message.
        value: A tensor or an array, which may repeat few values without storing them.
        shape: Its number of images, height and width.

    Raises:
        InputError: If the images have more than `MAX_BATCH_PIXELS` pixels in total.
    """
    if math.prod(shape) > MAX_BATCH_PIXELS:
        raise invalid(argument, value, f"at most {MAX_BATCH_PIXELS} pixels in total")


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
    if not isinstance(value, Tensor) or dense(argument, value).is_complex() or tuple(value.shape) not in shapes:
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
