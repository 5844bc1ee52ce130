"""Compilation by torch.compile, block by block: one small graph serves all blocks that are alike.

Blocks receive tensors only, because conditions, timesteps and schedules are computed outside. Therefore another step,
prompt or call compiles nothing again. Another image size or batch size is compiled once, or never if sizes are dynamic.

On x86 CPUs layers with packed weights (`kernels/linear.py`, `kernels/conv.py`) stay outside of graphs: inside they
would take twice as long.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from kandinsky22.checkpoints.atomic_files import checked_save_path
from kandinsky22.errors import InputError, MissingDependencyError, invalid
from kandinsky22.inputs import validation
from kandinsky22.kernels.conv import apply_conv
from kandinsky22.kernels.linear import ONEDNN_DTYPES, apply_linear, packing_layers
from kandinsky22.kernels.modules import internal_hook
from kandinsky22.runtime.calls import changes_networks
from kandinsky22.runtime.device_offload import offload_of
from kandinsky22.runtime.lazy_component import networks_in_memory
from kandinsky22.runtime.network_state import attached_state, check_run_by_torch, state_of, unwrapped

CUDA_GRAPH_MODES = ("reduce-overhead", "max-autotune")  # modes that record CUDA graphs
MODES = ("default", *CUDA_GRAPH_MODES, "max-autotune-no-cudagraphs")
RECOMPILE_LIMIT = 128  # graphs per class of blocks after which torch stops compiling; a UNet has about 20 per size


class CompileMixin:
    """Mixin for classes with `components`: compiles the networks that name their `compiled_blocks`."""

    @property
    def components(self) -> dict[str, Any]:
        """All components by name."""
        raise NotImplementedError

    @changes_networks
    def compile(
        self,
        *,
        mode: str = "default",
        dynamic: bool = False,
        components: Iterable[str] | None = None,
        backend: str = "inductor",
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        """Have the blocks of networks compiled when they first run. Tensor names and saved files stay the same.

        Args:
            mode: Mode of torch.compile. "reduce-overhead" and "max-autotune" record CUDA graphs of the UNet and MoVQ,
                on CUDA only.
            dynamic: Whether the code serves all image sizes, which is somewhat slower. If False, each new size is
                compiled once. The prior's code always serves all lengths of prompts.
            components: Names of the networks; None for all that can be compiled.
            backend: Backend of torch.compile.
            cache_dir: Folder in which code is stored between processes. It is set as the environment variable
                TORCHINDUCTOR_CACHE_DIR of this process, for everything that torch compiles from now on. None leaves
                torch's setting.

        Raises:
            InputError: If an argument is invalid, a network is offloaded layer by layer, or OpenVINO runs one. Nothing
                has changed then.
            MissingDependencyError: If the backend needs something that is not installed: a C++ compiler on CPUs, triton
                on CUDA.
        """
        check_run_by_torch(self.components, "compile()")
        given: Any = mode
        if not isinstance(given, str) or given not in MODES:
            raise invalid("mode", mode, f"one of {', '.join(MODES)}")
        validation.strict_bool("dynamic", dynamic)
        backends, given = torch.compiler.list_backends(exclude_tags=()), backend
        if not isinstance(given, str) or given not in backends:
            raise invalid("backend", backend, f"one of {', '.join(backends)}")
        code_folder = None if cache_dir is None else checked_save_path(cache_dir, "cache_dir")
        networks = self._networks_to_compile(components, mode)
        if backend == "inductor":
            for device_type in {_device(network).type for network in networks.values()}:
                check_tools(device_type)
        if code_folder is not None:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(code_folder)
        for name, network in networks.items():
            # Prompts differ in length, and with them the prior's sizes.
            varied = dynamic or name.endswith("prior")
            compile_blocks(network, mode=_supported_mode(mode, name), dynamic=varied, backend=backend)

    @changes_networks
    def uncompile(self) -> None:
        """Undo `compile`."""
        for network in networks_in_memory(self.components).values():
            release_blocks(unwrapped(network))

    def _networks_to_compile(self, components: Iterable[str] | None, mode: str) -> dict[str, nn.Module]:
        networks = {name: unwrapped(part) for name, part in networks_in_memory(self.components).items()}
        networks = {name: network for name, network in networks.items() if getattr(network, "compiled_blocks", ())}
        names = list(networks)
        if components is not None:
            names = validation.names_among("components", components, names, "networks that can be compiled")
        for name in names:
            offload = offload_of(networks[name])
            if offload is not None and offload.method == "enable_sequential_cpu_offload":
                raise InputError(
                    f"{name} is offloaded layer by layer by {offload.method}(), and cannot be compiled; call "
                    "remove_all_hooks() first"
                )
            device = _device(networks[name])
            if mode in CUDA_GRAPH_MODES and device.type != "cuda":
                others = " or ".join(other for other in MODES if other not in CUDA_GRAPH_MODES)
                advice = "this mode records CUDA graphs: move the pipeline to CUDA first"
                raise invalid("mode", mode, f"{others}, because {name} is on {device.type}", advice)
        return {name: networks[name] for name in names}


def _device(network: nn.Module) -> torch.device:
    """Return the device that a network runs on."""
    offload = offload_of(network)
    return next(network.parameters()).device if offload is None else offload.device


def compile_blocks(network: Any, *, mode: str, dynamic: bool, backend: str) -> None:
    """Have each block of a network compiled when it first runs.

    Args:
        network: A network with `compiled_blocks`.
        mode: Mode of torch.compile.
        dynamic: Whether the code serves all sizes.
        backend: Backend of torch.compile.
    """
    release_blocks(network)
    options: dict[str, Any] = {"dynamic": dynamic, "backend": backend}
    options |= {} if mode == "default" or backend != "inductor" else {"mode": mode}
    overrides: list[tuple[Any, str, Any]] = []  # torch's settings during calls of the blocks: module, name, value
    shapes: Any = importlib.import_module("torch.fx.experimental._config")
    if dynamic and hasattr(shapes, "use_duck_shape"):  # from torch 2.5 on
        overrides.append((shapes, "use_duck_shape", False))  # else equal sides would have to be equal at all calls
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        options["recompile_limit"] = RECOMPILE_LIMIT
    else:
        config: Any = importlib.import_module("torch._dynamo.config")
        overrides.append((config, "cache_size_limit", max(RECOMPILE_LIMIT, config.cache_size_limit)))
    device = _device(network)
    for module in network.modules():
        if isinstance(module, network.compiled_blocks):
            module.compile(**options)
            if overrides:
                module._compiled_call_impl = functools.partial(_call_with, overrides, module._compiled_call_impl)
    if ONEDNN_DTYPES and device.type == "cpu":
        for layer in packing_layers(network):
            layer.__dict__["_outside_graphs"] = _outside_graphs(isinstance(layer, nn.Linear))
    if mode in CUDA_GRAPH_MODES:
        # Each step begins with this layer. The memory of earlier results of the graphs is reused from there on.
        first = [module for name, module in network.named_modules() if name.split(".")[-1] == "conv_in"]
        attached_state(network).compile_hooks = [module.register_forward_pre_hook(_begin_step) for module in first]


def _call_with(overrides: list[tuple[Any, str, Any]], function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a compiled function with other settings of torch, which matter if this call compiles.

    `config.patch` would take longer than the function's own checks. A setting that has the value already is not
    restored either, so that calls in two threads cannot leave it changed.
    """
    if torch.compiler.is_compiling():  # inside of a graph that the user compiles
        return function(*args, **kwargs)
    previous = []
    try:
        for config, name, value in overrides:
            if (before := getattr(config, name)) != value:
                previous.append((config, name, before))
                setattr(config, name, value)
        return function(*args, **kwargs)
    finally:
        for config, name, before in previous:
            setattr(config, name, before)


@functools.cache
def _outside_graphs(is_linear: bool) -> Any:
    """Return `apply_linear` or `apply_conv` as a function that torch.compile leaves alone."""
    return torch.compiler.disable(apply_linear if is_linear else apply_conv)


def release_blocks(network: nn.Module) -> None:
    """Undo `compile_blocks`.

    Args:
        network: Any module.
    """
    for module in network.modules():
        module._compiled_call_impl = None
        module.__dict__.pop("_outside_graphs", None)
    state = state_of(network)
    for hook in state.compile_hooks:
        hook.remove()
    state.compile_hooks = []


def check_tools(device: str) -> None:
    """Check that torch's compiler "inductor" has the tools that it needs.

    Args:
        device: Type of the device, such as "cuda".

    Raises:
        MissingDependencyError: If a C++ compiler (on CPUs) or triton (on CUDA) is missing.
    """
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
    except Exception as error:  # the type depends on the release of torch
        reason = str(error).strip().split("\n")[0]
        raise MissingDependencyError(
            f"compiling for a CPU needs a C++ compiler ({reason}): install g++ or clang, or name one in CXX"
        ) from error


def _supported_mode(mode: str, name: str) -> str:
    # The prior uses results of its blocks in later steps, when CUDA graphs would have overwritten their memory.
    if mode in CUDA_GRAPH_MODES and name.endswith("prior"):
        return "default" if mode == "reduce-overhead" else "max-autotune-no-cudagraphs"
    return mode


@internal_hook
def _begin_step(*_args: Any) -> None:
    torch.compiler.cudagraph_mark_step_begin()
