"""A fake accelerator: tensors on it compute on the CPU, but operations refuse to mix them with CPU tensors.

It fakes the placement rules of a device such as a GPU, so that tests of offloading see every tensor that was left on
the wrong device. It goes by the name of torch's meta device, which exists on every machine and holds no data.
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
COPY = torch.ops.aten.copy_.default
# Operations that may mix devices: copies, and indexing, whose indices may stay on the CPU.
MIXING = (COPY, torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default)


@contextlib.contextmanager
def fake_accelerator() -> Iterator[torch.device]:
    """Make the fake device available; gradients are not supported."""
    with torch.no_grad(), _FakeOperations(), _FakeFunctions():
        yield DEVICE


class FakeDeviceTensor(Tensor):
    """A tensor on the fake device, backed by a CPU tensor."""

    _inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> FakeDeviceTensor:
        options: dict[str, Any] = {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        options |= {"dtype": inner.dtype, "device": DEVICE}
        tensor: FakeDeviceTensor = torch.Tensor._make_wrapper_subclass(cls, inner.shape, **options)
        tensor._inner = inner
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _FakeOperations(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _FakeFunctions(TorchFunctionMode):
    """Handles functions that never arrive as dispatched operations."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.tolist and isinstance(args[0], FakeDeviceTensor):
            return args[0]._inner.tolist()
        if func is Tensor.__getitem__ and isinstance(args[1], list):  # would become an index without content
            args = (args[0], torch.tensor(args[1]))
        if func in (torch.tensor, torch.as_tensor) and _is_fake(kwargs.get("device")):
            return func(*args, **{**kwargs, "device": "cpu"}).to(DEVICE)
        return func(*args, **kwargs)


def _is_fake(device: Any) -> bool:
    return device is not None and torch.device(device).type == DEVICE.type


def _run(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Run an operation on the CPU tensors behind its arguments, or raise RuntimeError if it mixes devices."""
    tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
    fake = [tensor for tensor in tensors if isinstance(tensor, FakeDeviceTensor)]
    on_cpu = [tensor for tensor in tensors if not isinstance(tensor, FakeDeviceTensor) and tensor.dim() > 0]
    if fake and on_cpu and func not in MIXING:
        raise RuntimeError(f"{func}: tensors on the accelerator and on the CPU")
    options = {**kwargs, "device": torch.device("cpu")} if _is_fake(kwargs.get("device")) else dict(kwargs)
    inner = tree_map(lambda value: value._inner if isinstance(value, FakeDeviceTensor) else value, (args, options))
    result = func(*inner[0], **inner[1])
    if func is COPY:
        return args[0]
    if not (fake if kwargs.get("device") is None else _is_fake(kwargs["device"])):
        return result
    wrapped = tree_map(lambda value: FakeDeviceTensor(value) if isinstance(value, Tensor) else value, result)
    return return_and_correct_aliasing(func, args, dict(kwargs), wrapped) if fake else wrapped
