"""An accelerator that does not exist: tensors "on" it compute on the CPU, but refuse to mix with the CPU's own.

It goes by the name of torch's meta device, for that one is there on every machine and has nothing of its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("meta")
INTO = torch.ops.aten.copy_.default
MIXING = (INTO, torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default)  # indices may stay on the CPU


@contextlib.contextmanager
def accelerator() -> Iterator[torch.device]:
    """Within this, the pretended device is there. Gradients are not to be had on it."""
    with torch.no_grad(), _Operations(), _Functions():
        yield DEVICE


class Elsewhere(Tensor):
    """A tensor on the pretended device."""

    _inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Elsewhere:
        options: dict[str, Any] = {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        options |= {"dtype": inner.dtype, "device": DEVICE}
        made: Elsewhere = torch.Tensor._make_wrapper_subclass(cls, inner.shape, **options)
        made._inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """What would never arrive as an operation."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.tolist and isinstance(args[0], Elsewhere):
            return args[0]._inner.tolist()
        if func is Tensor.__getitem__ and isinstance(args[1], list):  # would become an index without content
            args = (args[0], torch.tensor(args[1]))
        if func in (torch.tensor, torch.as_tensor) and _is_there(kwargs.get("device")):
            return func(*args, **{**kwargs, "device": "cpu"}).to(DEVICE)
        return func(*args, **kwargs)


def _is_there(device: Any) -> bool:
    return device is not None and torch.device(device).type == DEVICE.type


def _run(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The operation on what tensors hold; raises RuntimeError if it needs tensors of both devices."""
    tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
    there = [tensor for tensor in tensors if isinstance(tensor, Elsewhere)]
    here = [tensor for tensor in tensors if not isinstance(tensor, Elsewhere) and tensor.dim() > 0]
    if there and here and func not in MIXING:
        raise RuntimeError(f"{func}: tensors on the accelerator and on the CPU")
    options = {**kwargs, "device": torch.device("cpu")} if _is_there(kwargs.get("device")) else dict(kwargs)
    inner = tree_map(lambda value: value._inner if isinstance(value, Elsewhere) else value, (args, options))
    result = func(*inner[0], **inner[1])
    if func is INTO:
        return args[0]
    if not (there if kwargs.get("device") is None else _is_there(kwargs["device"])):
        return result
    wrapped = tree_map(lambda value: Elsewhere(value) if isinstance(value, Tensor) else value, result)
    return return_and_correct_aliasing(func, args, dict(kwargs), wrapped) if there else wrapped
