"""Compilation by torch.compile, block by block: one small graph serves all blocks that are alike.

Blocks get tensors only (conditions, times and schedules are dealt with outside), so a step, a prompt or a generation
compiles nothing anew; another size of pictures or another number of rows does once, or never if sizes are dynamic.

On x86 CPUs layers with packed weights (`packed.py`, `convolution.py`) stay as they are, outside of graphs: within them
they would take twice as long.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from kandinsky22.errors import InputError, MissingDependencyError
from kandinsky22.kernels.linear import DTYPES, Packs
from kandinsky22.runtime.device_offload import place_of, plain

GRAPHS = ("reduce-overhead", "max-autotune")  # modes that record CUDA graphs
MODES = ("default", *GRAPHS, "max-autotune-no-cudagraphs")
LIMIT = 128  # of different graphs for one class of blocks, beyond which torch would give up; a UNet has about 20 a size
_HOOKS = "_compile_hooks"  # attribute of a compiled network, in no state dict


class Compiles:
    """What pipelines can be told about compilation. A network that can be compiled names its `compiled_blocks`."""

    @property
    def components(self) -> dict[str, Any]:
        """All components by name."""
        raise NotImplementedError

    def compile(
        self,
        *,
        mode: str = "default",
        dynamic: bool = False,
        components: Iterable[str] | None = None,
        backend: str = "inductor",
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        """Have the blocks of networks compiled when they first run. Names of tensors, and what is saved, stay.

        Networks are those of the pipeline that have blocks, or the `components` named. `mode` and `backend` are those
        of torch.compile; "reduce-overhead" and "max-autotune" record CUDA graphs of the UNet and MoVQ, on CUDA only.
        With `dynamic`, code serves all sizes and is somewhat slower; without, each new size compiles once. (The prior's
        code always serves all lengths of prompts.) Code is kept between processes in `cache_dir`, in torch's own place
        (TORCHINDUCTOR_CACHE_DIR) unless given.
        Raises InputError for other names, and networks that are offloaded layer by layer, before anything changes;
        MissingDependencyError without what the backend needs: a C++ compiler on CPUs, triton on CUDA.
        """
        if mode not in MODES:
            raise InputError(f"mode={mode!r}; accepted: {', '.join(MODES)}")
        if not isinstance(dynamic, bool):
            raise InputError(f"dynamic={dynamic!r}; accepted: True or False")
        known = torch.compiler.list_backends(exclude_tags=())
        if backend not in known:
            raise InputError(f"backend={backend!r}; accepted: {', '.join(known)}")
        networks = self._compilable(components, mode)
        if backend == "inductor":
            for kind in {_device(network).type for network in networks.values()}:
                check_tools(kind)
        if cache_dir is not None:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.fspath(cache_dir)
        for name, network in networks.items():
            # prompts differ in length, so the prior's sizes always do
            varied = dynamic or name.endswith("prior")
            compile_blocks(network, mode=_mode(mode, name), dynamic=varied, backend=backend)

    def uncompile(self) -> None:
        """Run all networks as they are written again."""
        for network in self.components.values():
            if isinstance(network, nn.Module):
                release_blocks(plain(network))

    def _compilable(self, components: Iterable[str] | None, mode: str) -> dict[str, nn.Module]:
        parts = {name: plain(part) for name, part in self.components.items() if isinstance(part, nn.Module)}
        own = {name: part for name, part in parts.items() if getattr(part, "compiled_blocks", ())}
        for name in (names := list(own) if components is None else list(components)):
            if name not in own:
                raise InputError(f"components: {name!r} cannot be compiled; accepted: {', '.join(own) or 'none here'}")
            place = place_of(own[name])
            if place is not None and place.method == "enable_sequential_cpu_offload":
                raise InputError(f"components: {name} is offloaded layer by layer, which cannot be compiled")
            device = _device(own[name])
            if mode in GRAPHS and device.type != "cuda":
                raise InputError(f"mode={mode!r} records CUDA graphs, but {name} is on {device.type}: move it first")
        return {name: own[name] for name in names}


def _device(network: nn.Module) -> torch.device:
    """Where a network works."""
    place = place_of(network)
    return next(network.parameters()).device if place is None else place.device


def compile_blocks(network: Any, *, mode: str, dynamic: bool, backend: str) -> None:
    """Have each block of a network compiled when it first runs."""
    release_blocks(network)
    if dynamic:  # or code would be made for sides that are equal, if they are the first time
        shapes: Any = importlib.import_module("torch.fx.experimental._config")
        shapes.use_duck_shape = False
    options: dict[str, Any] = {"dynamic": dynamic, "backend": backend}
    options |= {} if mode == "default" or backend != "inductor" else {"mode": mode}
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        options["recompile_limit"] = LIMIT
    else:  # earlier releases have one number for everything
        settings: Any = torch._dynamo.config
        settings.cache_size_limit = max(settings.cache_size_limit, LIMIT)
    device = _device(network)
    for module in network.modules():
        if isinstance(module, network.compiled_blocks):
            module.compile(**options)
        elif isinstance(module, Packs) and DTYPES and device.type == "cpu":
            # partial, for copies are to be of their own
            module.__dict__["forward"] = functools.partial(_as_written(), module)
    if mode in GRAPHS:
        # the memory of graphs' results is used again after this; it is called by what runs first in each step
        first = [module for name, module in network.named_modules() if name.split(".")[-1] == "conv_in"]
        network.__dict__[_HOOKS] = [module.register_forward_pre_hook(_begin_step) for module in first]


@functools.cache
def _as_written() -> Any:
    """A layer's forward, which torch.compile leaves alone."""

    def forward(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return type(layer).forward(layer, *args, **kwargs)

    return torch.compiler.disable(forward)


def release_blocks(network: nn.Module) -> None:
    """Run a network's blocks as they are written again."""
    for module in network.modules():
        module._compiled_call_impl = None
        if isinstance(module, Packs):
            module.__dict__.pop("forward", None)
    for hook in network.__dict__.pop(_HOOKS, ()):
        hook.remove()


def check_tools(device: str) -> None:
    """Raise MissingDependencyError if torch's own compiler lacks what it needs for this type of device."""
    if device == "cuda" and importlib.util.find_spec("triton") is None:
        raise MissingDependencyError("compiling for CUDA needs triton, which is not installed: pip install triton")
    if device != "cpu":
        return
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler
    except ImportError:  # not part of torch's public interface
        return
    try:
        get_cpp_compiler()
    except Exception as error:  # releases raise different ones
        reason = str(error).strip().split("\n")[0]
        raise MissingDependencyError(
            f"compiling for a CPU needs a C++ compiler ({reason}): install g++ or clang, or name one in CXX"
        ) from error


def _mode(mode: str, name: str) -> str:
    # results of the prior's blocks outlive the step, and with it the memory of graphs
    if mode in GRAPHS and name.endswith("prior"):
        return "default" if mode == "reduce-overhead" else "max-autotune-no-cudagraphs"
    return mode


def _begin_step(*_: Any) -> None:
    torch.compiler.cudagraph_mark_step_begin()
