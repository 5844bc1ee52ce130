"""Several adapters of one network: which are loaded, applied and fused, and the weights that result.

Updates are merged into copies of the weights, so that a network with adapters runs as fast as without: its layers stay
plain layers, which multiply by packed weights, are compiled, offloaded and moved as before. The base weights are kept
in the CPU's memory. A network to which no adapter is applied has its base weights again, bit for bit.

Layers with quantized weights have nothing to merge into. They add the low-rank product to their own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from kandinsky22.adapters.updates import Adapter, LowRankUpdate, WeightUpdate, concatenated, merged
from kandinsky22.errors import InputError, NotFiniteError
from kandinsky22.kernels import host_memory
from kandinsky22.kernels.linear import TENSOR_TYPES
from kandinsky22.runtime.device_offload import weights_in_memory
from kandinsky22.runtime.network_state import attached_state, state_of, unwrapped
from kandinsky22.runtime.quantize import kind_of

WeightedUpdates = tuple[tuple[float, WeightUpdate], ...]


@dataclasses.dataclass(frozen=True)
class Selection:
    """The adapters of a network and how they are applied.

    Attributes:
        loaded: Adapters by name, in the order in which they were loaded.
        weights: Weight of each loaded adapter when it is active, and of those that only other networks have.
        active: Names of the active adapters.
        fused: Weights of the adapters that are part of the network's own weights.
        enabled: Whether active adapters are applied.
    """

    loaded: Mapping[str, Adapter] = dataclasses.field(default_factory=dict)
    weights: Mapping[str, float] = dataclasses.field(default_factory=dict)
    active: tuple[str, ...] = ()
    fused: Mapping[str, float] = dataclasses.field(default_factory=dict)
    enabled: bool = True

    def updates(self, *, fused_only: bool = False) -> dict[str, WeightedUpdates]:
        """Return the weighted updates by parameter. Their order, and rounding with it, is that of loading.

        Args:
            fused_only: Whether only fused adapters count.
        """
        applied = {name: self.weights[name] for name in self.active} if self.enabled and not fused_only else {}
        applied = {**applied, **self.fused}
        updates: dict[str, WeightedUpdates] = {}
        for name, adapter in self.loaded.items():
            if weight := applied.get(name, 0.0):
                for parameter, update in adapter.items():
                    updates[parameter] = (*updates.get(parameter, ()), (weight, update))
        return updates


def with_adapter(current: Selection, name: str, adapter: Adapter | None, *, keeps_active: bool) -> Selection:
    """Return a selection in which an adapter was added and activated.

    A network that the adapter has no tensors for keeps its other adapters as they are.

    Args:
        current: The selection before.
        name: Name of the new adapter.
        adapter: Its updates; None for a network that it has no tensors for.
        keeps_active: Whether the adapters that were active stay active.
    """
    weights = {**current.weights, name: 1.0}
    if adapter is None:
        return dataclasses.replace(current, weights=weights)
    active = (*current.active, name) if keeps_active else (name,)
    return dataclasses.replace(current, loaded={**current.loaded, name: adapter}, weights=weights, active=active)


def with_replaced(
    selections: Mapping[str, Selection], name: str, adapters: Mapping[str, Adapter | None]
) -> dict[str, Selection]:
    """Return selections in which a loaded adapter was replaced. All other adapters stay as they are.

    A network that the old adapter had no tensors for applies the new one if another network applied the old one.

    Args:
        selections: The selections before, by component.
        name: Name of the adapter, which is loaded in at least one network.
        adapters: The new updates by component; None for a network that the new adapter has no tensors for.
    """
    holders = [selection for selection in selections.values() if name in selection.loaded]
    is_active = any(name in selection.active for selection in holders)
    replaced: dict[str, Selection] = {}
    for component, current in selections.items():
        adapter = adapters[component]
        if adapter is None:
            replaced[component] = dataclasses.replace(
                current,
                loaded={other: each for other, each in current.loaded.items() if other != name},
                active=tuple(each for each in current.active if each != name),
            )
            continue
        changed = dataclasses.replace(current, loaded={**current.loaded, name: adapter})
        if name not in current.loaded:
            changed = dataclasses.replace(
                changed,
                weights={name: holders[0].weights[name], **current.weights},
                active=(*current.active, name) if is_active else current.active,
                enabled=current.enabled if current.loaded else all(selection.enabled for selection in holders),
            )
        replaced[component] = changed
    return replaced


@dataclasses.dataclass(frozen=True)
class Loading:
    """State that a network returns to after its own weights have been loaded.

    Attributes:
        before: The adapters and how they were applied.
        meanwhile: The selection while weights are loaded: no active adapters.
        fused: Copies, on the CPU, of the weights with fused adapters.
    """

    before: Selection
    meanwhile: Selection
    fused: Mapping[str, Tensor]


class NetworkAdapters:
    """The adapters of one network. Methods that change them take the network, so that copies of it have their own.

    A change that fails, for lack of memory for example, leaves everything as it was.

    Attributes:
        selection: The adapters and how they are applied.
        version: Counts the changes of weights, so that what was computed from others is not used.
    """

    def __init__(self) -> None:
        self.selection = Selection()
        self.version = 0
        self._base: dict[str, Tensor] = {}  # values without updates, of the parameters that have updates now
        self._applied: dict[str, WeightedUpdates] = {}
        self._loading: Loading | None = None

    @property
    def names(self) -> list[str]:
        """Names of the loaded adapters."""
        return list(self.selection.loaded)

    def select(self, network: nn.Module, selection: Selection, *, check_finite: bool = False) -> None:
        """Apply adapters in another way.

        Args:
            network: The network.
            selection: Its adapters and how they are applied.
            check_finite: Whether weights that are not finite are an error.

        Raises:
            InputError: If the network cannot be changed.
            NotFiniteError: If a weight would not be finite.
        """
        network = unwrapped(network)
        updates = selection.updates()
        if updates != self._applied:
            with weights_in_memory(network):
                self._merge(network, updates, check_finite)
            self.version += 1
        self.selection = selection

    def stored_tensors(self, network: nn.Module) -> dict[str, Tensor]:
        """Return the network's own weights, where they differ from those that it computes with: fused adapters count.

        Args:
            network: The network.
        """
        fused = self.selection.updates(fused_only=True)
        parameters = dict(network.named_parameters()) if self._base else {}
        stored: dict[str, Tensor] = {}
        for name, base in self._base.items():
            if (updates := fused.get(name)) != self._applied[name]:
                value = base if updates is None else merged(base, updates)
                stored[name] = value.detach().to(_device(parameters[name]))
        return stored

    def keep_fused(self, network: nn.Module) -> None:
        """Make fused adapters a permanent part of the network's own weights. Active ones are not applied any more.

        Args:
            network: The network.
        """
        self.select(network, dataclasses.replace(self.selection, active=()))
        self._base, self._applied = {}, {}
        self.selection = dataclasses.replace(self.selection, fused={})

    def begin_loading(self, network: nn.Module) -> None:
        """Give a network its own weights, which are about to be loaded, until `end_loading`.

        Args:
            network: The network. All its weights are in memory.
        """
        network = unwrapped(network)
        self.end_loading(network)  # of a load that another module's hook has stopped
        before = self.selection
        if not before.loaded:
            return
        try:
            self.select(network, dataclasses.replace(before, active=()))
            parameters = dict(network.named_parameters())
            fused = {name: parameters[name].detach().to("cpu", copy=True) for name in self._base}
        except BaseException:
            self.select(network, before)
            raise
        self._loading = Loading(before, self.selection, fused)

    def end_loading(self, network: nn.Module) -> None:
        """Apply the adapters again, after the network's own weights were loaded, or after that has failed.

        Fused adapters stay distinguished if the weights that they are part of have the same values as before. Otherwise
        they are no longer known: they are part of the weights that were loaded, or are not.

        Args:
            network: The network.
        """
        loading, self._loading = self._loading, None
        if loading is None or self.selection is not loading.meanwhile:
            return
        network = unwrapped(network)
        parameters = dict(network.named_parameters()) if loading.fused else {}
        if all(_is_unchanged(parameters[name], value) for name, value in loading.fused.items()):
            self.select(network, loading.before)
            return
        before = loading.before
        self._base, self._applied = {}, {}
        self.selection = dataclasses.replace(
            before,
            loaded={name: adapter for name, adapter in before.loaded.items() if name not in before.fused},
            weights={name: weight for name, weight in before.weights.items() if name not in before.fused},
            active=(),
            fused={},
        )
        active = tuple(name for name in before.active if name not in before.fused)
        self.select(network, dataclasses.replace(self.selection, active=active))

    def follow(self, network: nn.Module) -> None:
        """Convert the base weights to the type that the network was converted to.

        Args:
            network: The network.
        """
        parameters = dict(network.named_parameters()) if self._base else {}
        for name, base in self._base.items():
            if (parameter := parameters.get(name)) is not None and parameter.dtype != base.dtype:
                self._base[name] = _parameter_like(parameter, base.to(parameter.dtype))

    def _merge(self, network: nn.Module, updates: Mapping[str, WeightedUpdates], check_finite: bool) -> None:
        """Give the parameters their values with these updates; nothing has changed if that fails."""
        changed = [name for name in {**self._applied, **updates} if updates.get(name) != self._applied.get(name)]
        previous: list[tuple[nn.Module, str, nn.Parameter]] = []
        quantized: list[tuple[Any, Any]] = []
        base = dict(self._base)
        try:
            for name in changed:
                path, _, attribute = name.rpartition(".")
                module: Any = network.get_submodule(path)
                if hasattr(module, "set_low_rank"):
                    quantized.append((module, module.low_rank))
                    module.set_low_rank(_low_rank(name, updates.get(name)))
                    continue
                parameter = module._parameters[attribute]
                value = self._value(name, parameter, base, updates.get(name))
                if check_finite and not bool(value.isfinite().all()):
                    raise NotFiniteError(f"{name} would have values that are not finite: nothing was fused")
                previous.append((module, attribute, parameter))
                module._parameters[attribute] = value
        except BaseException:
            for module, attribute, parameter in previous:
                module._parameters[attribute] = parameter
            for module, low_rank in quantized:
                module.set_low_rank(low_rank)
            raise
        self._base, self._applied = base, dict(updates)

    @staticmethod
    def _value(
        name: str, parameter: nn.Parameter, base: dict[str, Tensor], updates: WeightedUpdates | None
    ) -> nn.Parameter:
        """Return a parameter with updates, or with its base value, which is removed from `base` then."""
        if updates is None:
            return _restored(parameter, base.pop(name))
        if name not in base:
            base[name] = parameter if parameter.device.type == "cpu" else parameter.detach().to("cpu")
        original = base[name].detach().to(_device(parameter), parameter.dtype)
        value = _parameter_like(parameter, merged(original, updates))
        if original.nbytes >= host_memory.LARGE_WEIGHT:
            host_memory.drop_mapped_pages(original)  # the file has them
        return value


def _restored(parameter: nn.Parameter, base: Tensor) -> nn.Parameter:
    """Return the parameter with its base value; the very object that it was, if the network has not moved since."""
    if isinstance(base, nn.Parameter) and base.device == parameter.device and base.dtype == parameter.dtype:
        return base
    with torch.inference_mode(False):
        return _parameter_like(parameter, base.detach().to(parameter.device, parameter.dtype))


def _is_unchanged(parameter: Tensor, value: Tensor) -> bool:
    """Return whether a parameter has the type and the values of a copy."""
    return parameter.dtype == value.dtype and torch.equal(parameter.detach().to("cpu"), value)


def _parameter_like(parameter: nn.Parameter, value: Tensor) -> nn.Parameter:
    with torch.inference_mode(False):
        return nn.Parameter(value, requires_grad=parameter.requires_grad)


def _device(parameter: Tensor) -> torch.device:
    """Return where the value of a parameter is; that of one offloaded by layers is on the CPU."""
    return torch.device("cpu") if parameter.is_meta else parameter.device


def _low_rank(name: str, updates: WeightedUpdates | None) -> tuple[Tensor, Tensor] | None:
    """Return the factors of the sum of updates that a quantized layer adds."""
    if updates is None:
        return None
    return concatenated([(weight, cast(LowRankUpdate, update)) for weight, update in updates])


# The adapters of a network


def adapters_of(network: nn.Module) -> NetworkAdapters:
    """Return the adapters of a network; empty ones, not attached to it, if it has none.

    Args:
        network: Any module; the wrapper of a compiled network shares the adapters of the network inside.
    """
    adapters = state_of(network).adapters
    return NetworkAdapters() if adapters is None else cast(NetworkAdapters, adapters)


def adapters_version(network: nn.Module) -> int:
    """Return a number that changes whenever adapters change the weights of a network.

    Args:
        network: Any module.
    """
    adapters = state_of(network).adapters
    return 0 if adapters is None else cast(NetworkAdapters, adapters).version


def attached_adapters(network: nn.Module) -> NetworkAdapters:
    """Return the adapters of a network for changing them, attaching an empty record if it has none.

    Args:
        network: Any module; the wrapper of a compiled network shares the adapters of the network inside.
    """
    state = attached_state(network)
    if state.adapters is None:
        state.adapters = NetworkAdapters()
    return cast(NetworkAdapters, state.adapters)


def check_adaptable(network: nn.Module, role: str, adapter: Adapter) -> None:
    """Check that an adapter's updates can be applied to the layers that a network has now.

    Args:
        network: The network.
        role: Its name, for messages.
        adapter: Updates whose parameters exist and have the same shapes.

    Raises:
        InputError: If a weight is of another library's type, or whole weights are for quantized layers.
    """
    network = unwrapped(network)
    kind = kind_of(network)
    for name, update in adapter.items():
        path, _, attribute = name.rpartition(".")
        module: Any = network.get_submodule(path)
        if hasattr(module, "set_low_rank"):
            if not isinstance(update, LowRankUpdate):
                raise InputError(
                    f"{role} is quantized ({kind}), and the adapter replaces its weight {name}: load the adapter "
                    "before quantize(), and make it part of the weights with fuse_lora() and unload_lora_weights()"
                )
            continue
        parameter = module._parameters.get(attribute)
        if type(parameter) not in TENSOR_TYPES or not parameter.is_floating_point():
            raise InputError(f"{role}: the weight {name} is a {type(parameter).__name__}, which takes no adapters")
