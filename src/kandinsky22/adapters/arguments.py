"""Arguments of the methods for adapters: names, and weights by network."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

from torch import nn

from kandinsky22.adapters.formats import PRIOR, UNET
from kandinsky22.adapters.merging import adapters_of
from kandinsky22.errors import invalid

COMPONENTS = {"unet": UNET, "prior": PRIOR, "prior_prior": PRIOR}  # roles of the components that take adapters
MAX_NAME = 200  # characters of an adapter's name

Weight: TypeAlias = float | Mapping[str, float] | None
"""Weight of an adapter: one for all networks, or one per component name; None for 1."""


def all_names(networks: Mapping[str, nn.Module]) -> list[str]:
    """Return the names of all loaded adapters, each once.

    Args:
        networks: Networks by component name.
    """
    return list(dict.fromkeys(name for network in networks.values() for name in adapters_of(network).names))


def new_name(value: Any, networks: Mapping[str, nn.Module], *, replaces: bool) -> str:
    """Return the name of an adapter that is loaded now.

    Args:
        value: The argument `adapter_name`; None for "default_0" and so on.
        networks: Networks by component name.
        replaces: Whether the adapter replaces a loaded one of this name.

    Raises:
        InputError: If the name is no name, or is in use; with `replaces`, if it is not, or if the adapter is fused.
    """
    used = all_names(networks)
    if value is None:
        if replaces:
            raise invalid("adapter_name", None, "the name of the adapter that hotswap replaces")
        return next(name for name in map("default_{}".format, range(len(used) + 1)) if name not in used)
    if not isinstance(value, str) or not 0 < len(value.strip()) <= MAX_NAME:
        raise invalid("adapter_name", value, f"a name of at most {MAX_NAME} characters, or None")
    if not replaces and value in used:
        raise invalid("adapter_name", value, "a new name", "it is in use: pass hotswap=True to replace it")
    if replaces and value not in used:
        raise invalid("adapter_name", value, f"a loaded adapter: {', '.join(used) or 'there is none'}")
    if any(value in adapters_of(network).selection.fused for network in networks.values()):
        raise invalid("adapter_name", value, "an adapter that is not fused", "call unfuse_lora() first")
    return value


def loaded_names(value: Any, networks: Mapping[str, nn.Module]) -> list[str]:
    """Return names of loaded adapters.

    Args:
        value: The argument `adapter_names`: one name or several.
        networks: Networks by component name.

    Raises:
        InputError: If a name is unknown or repeated.
    """
    used = all_names(networks)
    names = [value] if isinstance(value, str) else list(value) if isinstance(value, Iterable) else None
    if names is None or len(names) != len({str(name) for name in names}) or any(name not in used for name in names):
        expected = f"different names of loaded adapters: {', '.join(used) or 'there are none'}"
        raise invalid("adapter_names", value, expected)
    return names


def weights_by_name(value: Any, names: list[str]) -> dict[str, Any]:
    """Return the weight of each adapter, as it was passed.

    Args:
        value: The argument `adapter_weights`: one weight, or one per name.
        names: Names of the adapters.

    Raises:
        InputError: If the number of weights is not that of names.
    """
    several = isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping)
    weights = list(value) if several else [value] * len(names)
    if len(weights) != len(names):
        raise invalid("len(adapter_weights)", len(weights), f"{len(names)}, one per name")
    return dict(zip(names, weights, strict=True))


def component_weight(value: Any, component: str, networks: Mapping[str, nn.Module]) -> float:
    """Return the weight of an adapter in a network.

    Args:
        value: A number, numbers by component name, or None for 1.
        component: Name of the network.
        networks: Networks by component name.

    Raises:
        InputError: If the weight is not a finite number, or is for a component that takes no adapters.
    """
    if isinstance(value, Mapping):
        if unknown := [name for name in value if name not in COMPONENTS]:
            expected = f"numbers by component: {', '.join(networks)}"
            raise invalid("adapter_weights", {unknown[0]: value[unknown[0]]}, expected)
        role = COMPONENTS[component]
        value = value.get(component, next((value[name] for name in value if COMPONENTS[name] == role), None))
    return 1.0 if value is None else finite_number("adapter_weights", value)


def finite_number(name: str, value: Any) -> float:
    """Return a number as a float.

    Args:
        name: Name of the argument, for messages.
        value: Its value.

    Raises:
        InputError: If it is not a finite number.
    """
    try:
        number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    except OverflowError:  # an integer beyond the range of floats
        number = math.inf
    if not math.isfinite(number):
        raise invalid(name, value, "a finite number")
    return number
