"""Our optimisations that can be switched off, one by one.

Each entry says where its switch is: a module, a class in it (or "" for the module itself), an attribute, and the value
that means off. Those that this version of the package does not have are left out.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Switch:
    """A switch, what it is for, and the stages that it matters to."""

    module: str
    owner: str
    attribute: str
    stages: tuple[str, ...]
    off: Any = False

    def place(self) -> Any:
        """The class or module that has the attribute; None if there is none."""
        try:
            module = importlib.import_module(f"kandinsky22.{self.module}")
        except ModuleNotFoundError:
            return None
        place = getattr(module, self.owner, None) if self.owner else module
        return place if hasattr(place, self.attribute) else None


SWITCHES = {
    "packed linear weights": Switch("runtime.packed", "Linear", "packing", ("prior", "step", "decode")),
    "timesteps ahead": Switch("models.prior", "", "AHEAD", ("prior",), off=1),
    "packed and faster convolutions": Switch("runtime.convolution", "Conv2d", "packing", ("step", "decode")),
    "group norm in one pass": Switch("runtime.normalise", "", "enabled", ("step", "decode")),
    "large attention": Switch("runtime.large_attention", "", "enabled", ("step", "decode")),
    "memory that stays": Switch("runtime.pages", "", "keeping", ("decode",)),
    "Winograd": Switch("runtime.convolution", "Conv2d", "winograd", ("step", "decode")),
    "doubled pixels": Switch("runtime.convolution", "Conv2d", "doubling", ("step", "decode")),
}
_on: dict[str, Any] = {}  # values that mean on, of those that were switched


def available(stage: str | None = None) -> list[str]:
    """Those that this version has, for one stage or all."""
    return [name for name, switch in SWITCHES.items() if switch.place() and stage in (None, *switch.stages)]


def leave_off(name: str | None) -> None:
    """Everything on but this one, or everything. Raises KeyError for one that is not there."""
    for other, value in _on.items():
        setattr(SWITCHES[other].place(), SWITCHES[other].attribute, value)
    _on.clear()
    if name is not None:
        switch = SWITCHES[name]
        place = switch.place()
        if place is None:
            raise KeyError(f"this version of kandinsky22 has no {name}")
        _on[name] = getattr(place, switch.attribute)
        setattr(place, switch.attribute, switch.off)
