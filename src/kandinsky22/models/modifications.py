"""Whether something was attached to a network, so that it must run as a module instead of by its fast methods.

`encode_condition` and `denoise` compute what `forward` computes in fewer operations. They do not call all modules, and
those that they call see other numbers of tokens or fewer calls. Therefore they serve only networks whose modules are as
they were built. Layers may be replaced (adapters, quantized layers): these are called in every case.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from kandinsky22.kernels.modules import has_foreign_hooks
from kandinsky22.runtime.device_offload import has_offload_forward, offload_of


def find_modification(network: Any, *, inside: bool = True) -> str | None:
    """Return what was attached to a network or to one of its modules, as a phrase for messages.

    Offloading, quantization and the compilation of a pipeline's blocks are not modifications.

    Args:
        network: A network, or any object that a user put in its position.
        inside: Whether modules inside count, too.

    Returns:
        The phrase; None for a network that `encode_condition` and `denoise` may run.
    """
    kind = type(network)
    defined = getattr(kind, "defined_forward", None)
    if defined is None:
        return f"it is a {kind.__name__}"
    if kind.forward is not defined or kind.__call__ is not nn.Module.__call__:
        return f"{kind.__name__} has another forward"
    if not network.has_own_structure():
        return "one of its blocks was replaced"
    return modified_part(network, network, inside=inside)


def modified_part(network: Any, part: nn.Module, *, inside: bool = True) -> str | None:
    """Return what was attached to a part of a network, as a phrase for messages; None for nothing.

    Args:
        network: The network.
        part: The network itself, or one of its modules.
        inside: Whether modules inside of the part count, too.
    """
    if torch.compiler.is_compiling():  # hooks and forms are part of what is compiled
        return None
    is_offloaded = offload_of(network) is not None
    for module in part.modules() if inside else (part,):
        phrase = None
        if "forward" in module.__dict__ and not (is_offloaded and has_offload_forward(module)):
            phrase = "another forward"
        elif has_foreign_hooks(module):
            phrase = "hooks"
        elif module._compiled_call_impl is not None and not isinstance(module, network.compiled_blocks):
            phrase = "a compiled form"
        if phrase is not None:
            name = next(name for name, other in network.named_modules() if other is module)
            return f"{name or type(network).__name__} has {phrase}"
    return None
