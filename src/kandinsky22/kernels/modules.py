"""Recognition of modules whose result may be computed without calling them.

Fused code reads a layer's weight instead of calling the layer. That is the same only while nothing was attached to the
layer: a hook, a replaced `forward`, a compiled form. Everything else must go through the call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn
from torch.nn.modules import module as torch_module

# Hooks of all modules of a process (`torch.nn.modules.module.register_module_forward_hook`); torch never rebinds them.
_GLOBAL_HOOKS = (
    torch_module._global_forward_hooks,
    torch_module._global_forward_pre_hooks,
    torch_module._global_backward_hooks,
    torch_module._global_backward_pre_hooks,
)
_INTERNAL_HOOKS: set[Callable[..., Any]] = set()

H = TypeVar("H", bound=Callable[..., Any])


def internal_hook(hook: H) -> H:
    """Mark a function as a hook of this library, which changes and stores nothing that passes through the module.

    Args:
        hook: Hook of a module.

    Returns:
        The same function.
    """
    _INTERNAL_HOOKS.add(hook)
    return hook


def has_global_hooks() -> bool:
    """Return whether there are hooks of all modules of the process."""
    return any(_GLOBAL_HOOKS)


def has_foreign_hooks(module: nn.Module) -> bool:
    """Return whether a call of the module runs hooks of the user, its own or those of all modules.

    Args:
        module: Any module.
    """
    own = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    if not any(own):
        return any(_GLOBAL_HOOKS)
    return any(_GLOBAL_HOOKS) or not all(_INTERNAL_HOOKS.issuperset(hooks.values()) for hooks in own)


def runs_own_forward(module: nn.Module) -> bool:
    """Return whether a call of the module runs the `forward` of its class, and nothing else.

    Args:
        module: Any module.
    """
    return not (
        "forward" in module.__dict__
        or module._compiled_call_impl is not None
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or any(_GLOBAL_HOOKS)
    )
