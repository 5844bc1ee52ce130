"""Adapters of pipelines: LoRA and fine-tuned weights for the prior and the UNet, by the reference's method names."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from kandinsky22.adapters.arguments import (
    COMPONENTS,
    Weight,
    all_names,
    component_weight,
    finite_number,
    loaded_names,
    new_name,
    weights_by_name,
)
from kandinsky22.adapters.files import (
    AdapterSource,
    AdapterTensors,
    distilled_steps,
    find_distilled_files,
    read_adapter,
    write_adapter,
)
from kandinsky22.adapters.formats import PRIOR, UNET, match_updates
from kandinsky22.adapters.merging import (
    NetworkAdapters,
    Selection,
    adapters_of,
    attached_adapters,
    check_adaptable,
    with_adapter,
    with_replaced,
)
from kandinsky22.adapters.updates import Adapter
from kandinsky22.checkpoints.hub import DISTILLED
from kandinsky22.checkpoints.load_arguments import LoadArguments, check_use_safetensors, checked_flag
from kandinsky22.errors import InputError, invalid
from kandinsky22.inputs.validation import names_among
from kandinsky22.runtime.calls import changes_networks
from kandinsky22.runtime.network_state import check_run_by_torch, unwrapped
from kandinsky22.runtime.quantize import kind_of


class AdapterMixin:
    """Mixin for pipelines with a prior, a UNet or both: adapters of these networks.

    Adapters belong to the networks: pipelines that share a network share its adapters.
    """

    origin: str | None
    _hub_options: dict[str, Any]
    _components: dict[str, Any]

    @property
    def components(self) -> dict[str, Any]:
        """All components by name."""
        raise NotImplementedError

    # Loading and saving

    @changes_networks
    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: AdapterSource,
        adapter_name: str | None = None,
        hotswap: bool = False,
        *,
        weight_name: str | None = None,
        subfolder: str | None = None,
        prefix: str | None = None,
        use_safetensors: bool | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        **options: Any,
    ) -> None:
        """Load an adapter and apply it with weight 1, instead of those that were active.

        All layouts of LoRA files are read, and files with whole weights of a fine-tuned network. Every tensor must fit;
        otherwise nothing has changed.

        Args:
            pretrained_model_name_or_path_or_dict: A file, a folder, a Hub id, "MODEL/distilled" for the distilled
                adapter of a checkpoint, or tensors by name.
            adapter_name: Name for the other methods; None for "default_0", "default_1" and so on.
            hotswap: Whether the adapter replaces the one of this name, with its weight.
            weight_name: Name of the file in the folder; None finds it.
            subfolder: Folder within the folder or repository; None for that itself.
            prefix: Beginning of the tensor names to read, such as "unet", without the dot; other tensors are ignored.
                None reads all.
            use_safetensors: True reads only safetensors files, False only pickled ones; None prefers safetensors.
            revision: Branch, tag or commit on the Hub; None for the default branch.
            cache_dir: Folder of the Hub cache; None for the default.
            local_files_only: Make no network request and use only cached files.
            token: Access token of the Hub; None for the stored one.
            **options: Other arguments of the reference. `force_download` acts, those without effect here are accepted.

        Raises:
            CheckpointError: If the file is missing or damaged, or does not fit the networks. The message lists what
                does not.
            InputError: If an argument is invalid, the name is in use, or a network cannot take the adapter.
        """
        arguments = LoadArguments.of(type(self).__name__, options)
        if arguments.others:
            raise InputError(f"load_lora_weights has no argument {', '.join(sorted(arguments.others))}")
        check_use_safetensors(use_safetensors)
        replaces = checked_flag("hotswap", hotswap)
        start: Any = prefix
        if start is not None and (not isinstance(start, str) or not start):
            raise invalid("prefix", prefix, "the beginning of tensor names, or None")
        networks = self._adaptable()
        name = new_name(adapter_name, networks, replaces=replaces)
        stored = read_adapter(
            pretrained_model_name_or_path_or_dict,
            weight_name=weight_name,
            subfolder=subfolder,
            use_safetensors=use_safetensors,
            options={
                "revision": revision,
                "cache_dir": cache_dir,
                "local_files_only": local_files_only,
                "token": arguments.token if token is None else token,
                "force_download": arguments.force_download,
            },
        )
        self._add_adapter(name, stored, prefix, networks, replaces=replaces)

    @changes_networks
    def load_distilled_adapter(self) -> int | None:
        """Load the distilled adapter of the checkpoint, named "distilled", and apply it besides the active adapters.

        `LCMScheduler` generates with it in a few steps, with `guidance_scale=1`. `kandinsky22 train distill` writes
        such adapters; a checkpoint has its own in the folder `distilled`.

        Returns:
            The number of steps that the adapter was made for; None if its file does not say.

        Raises:
            InputError: If the pipeline was not loaded from a checkpoint, or a network cannot take the adapter.
            CheckpointError: If the checkpoint has no distilled adapter, or a damaged one.
        """
        networks = self._adaptable()
        if self.origin is None:
            raise InputError(
                f"the {type(self).__name__} was made of objects, not loaded from a checkpoint that could have a "
                "distilled adapter; pass the adapter to load_lora_weights"
            )
        path = find_distilled_files(self.origin, self._hub_options)[0]
        steps = distilled_steps(path)
        if DISTILLED not in all_names(networks):
            self._add_adapter(DISTILLED, read_adapter(path.parent), None, networks, keeps_active=True)
            return steps
        selections = {component: adapters_of(network).selection for component, network in networks.items()}
        inactive = [name for name, each in selections.items() if DISTILLED in each.loaded.keys() - set(each.active)]
        selections |= {
            name: dataclasses.replace(selections[name], active=(*selections[name].active, DISTILLED))
            for name in inactive
        }
        self._select(networks, selections)
        return steps

    def _add_adapter(
        self,
        name: str,
        stored: AdapterTensors,
        prefix: str | None,
        networks: Mapping[str, nn.Module],
        *,
        keeps_active: bool = False,
        replaces: bool = False,
    ) -> None:
        """Add an adapter to the networks that it has tensors for. It is the only active one unless the others stay.

        One that replaces another is as active as that one.
        """
        by_role = {COMPONENTS[component]: network for component, network in networks.items()}
        matched = match_updates(stored.tensors, by_role, origin=stored.origin, settings=stored.settings, prefix=prefix)
        for role, adapter in matched.items():
            check_adaptable(by_role[role], role, adapter)
        current = {component: adapters_of(network).selection for component, network in networks.items()}
        new = {component: matched.get(COMPONENTS[component]) for component in networks}
        if replaces:
            self._select(networks, with_replaced(current, name, new))
            return
        selections = {
            component: with_adapter(current[component], name, new[component], keeps_active=keeps_active)
            for component in networks
        }
        self._select(networks, selections)

    def save_lora_weights(
        self,
        save_directory: str | os.PathLike[str],
        unet_lora_layers: Mapping[str, Tensor] | None = None,
        prior_lora_layers: Mapping[str, Tensor] | None = None,
        *,
        adapter_name: str | None = None,
        weight_name: str | None = None,
        safe_serialization: bool = True,
        unet_lora_adapter_metadata: Mapping[str, Any] | None = None,
        prior_lora_adapter_metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Write a loaded adapter, or tensors of one, to `pytorch_lora_weights.safetensors` in PEFT's layout.

        The file appears only when it is complete. Names begin with "unet." and "prior." if it holds both.

        Args:
            save_directory: Folder, which is created if it does not exist.
            unet_lora_layers: Tensors of the UNet's adapter, in any layout; None for none.
            prior_lora_layers: Tensors of the prior's adapter, in any layout; None for none.
            adapter_name: Name of a loaded adapter to write instead; None for the only loaded one, if no tensors are
                passed.
            weight_name: Name of the file; None for the usual one.
            safe_serialization: Whether to write safetensors instead of a pickled file.
            unet_lora_adapter_metadata: Settings of PEFT (`r`, `lora_alpha`) for `unet_lora_layers`; None for alpha = r.
            prior_lora_adapter_metadata: Settings of PEFT for `prior_lora_layers`; None for alpha = r.

        Raises:
            CheckpointError: If the file cannot be written, or the tensors do not fit the networks.
            InputError: If an argument is invalid, or there is nothing to write.
        """
        networks = self._adaptable()
        by_role = {COMPONENTS[component]: network for component, network in networks.items()}
        passed = {
            UNET: (unet_lora_layers, unet_lora_adapter_metadata),
            PRIOR: (prior_lora_layers, prior_lora_adapter_metadata),
        }
        adapters: dict[str, Adapter] = {}
        for role, (layers, metadata) in passed.items():
            if layers is None:
                continue
            if adapter_name is not None:
                raise invalid("adapter_name", adapter_name, f"None, because {role}_lora_layers are passed")
            if role not in by_role or not isinstance(layers, Mapping):
                expected = "tensors by name" if role in by_role else f"None: this pipeline has no {role}"
                raise invalid(f"{role}_lora_layers", layers, expected)
            tensors = read_adapter(layers).tensors
            network = {role: by_role[role]}
            adapters |= match_updates(tensors, network, origin=f"{role}_lora_layers", settings=metadata)
        if not adapters:
            name = self._only_name(adapter_name, networks)
            loaded = {role: adapters_of(network).selection.loaded for role, network in by_role.items()}
            adapters = {role: each[name] for role, each in loaded.items() if name in each}
        write_adapter(save_directory, adapters, weight_name=weight_name, safe_serialization=safe_serialization)

    def _only_name(self, adapter_name: str | None, networks: Mapping[str, nn.Module]) -> str:
        names = all_names(networks)
        if adapter_name is not None:
            return loaded_names(adapter_name, networks)[0]
        if len(names) != 1:
            expected = f"one of {', '.join(names)}" if names else "tensors to write: no adapter is loaded"
            raise invalid("adapter_name", None, expected)
        return names[0]

    # Applying

    @changes_networks
    def set_adapters(
        self,
        adapter_names: str | Iterable[str],
        adapter_weights: Weight | Iterable[Weight] = None,
    ) -> None:
        """Apply these adapters, and no others.

        Results with weight 0 are those without the adapter, bit for bit.

        Args:
            adapter_names: Names of loaded adapters, one or several; an empty list applies none.
            adapter_weights: Weight of all, or one per name: a number, or numbers by component ("unet", "prior",
                "prior_prior"); None for 1.

        Raises:
            InputError: If a name is unknown, repeated or fused, or a weight is not a finite number.
        """
        networks = self._adaptable()
        names = loaded_names(adapter_names, networks)
        per_name = weights_by_name(adapter_weights, names)
        selections = {}
        for component, network in networks.items():
            current = adapters_of(network).selection
            if fused := [name for name in names if name in current.fused]:
                raise invalid("adapter_names", fused, "adapters that are not fused", "call unfuse_lora() first")
            own = [name for name in names if name in current.loaded]
            # also those of other networks: a hotswap may bring tensors for this one
            weights = {name: component_weight(per_name[name], component, networks) for name in names}
            selections[component] = dataclasses.replace(
                current, active=tuple(own), weights={**current.weights, **weights}
            )
        self._select(networks, selections)

    @changes_networks
    def disable_lora(self) -> None:
        """Apply no adapter until `enable_lora`. Fused ones stay."""
        self._set_enabled(False)

    @changes_networks
    def enable_lora(self) -> None:
        """Apply the active adapters again."""
        self._set_enabled(True)

    def _set_enabled(self, enabled: bool) -> None:
        networks = self._adaptable()
        selections = {
            name: dataclasses.replace(adapters_of(network).selection, enabled=enabled)
            for name, network in networks.items()
        }
        self._select(networks, selections)

    def get_active_adapters(self) -> list[str]:
        """Return the names of the active adapters."""
        selections = [adapters_of(network).selection for network in self._adaptable().values()]
        return list(dict.fromkeys(name for selection in selections for name in selection.active))

    def get_list_adapters(self) -> dict[str, list[str]]:
        """Return the names of the loaded adapters by component, for components that have some."""
        names = {component: adapters_of(network).names for component, network in self._adaptable().items()}
        return {component: each for component, each in names.items() if each}

    @changes_networks
    def delete_adapters(self, adapter_names: str | Iterable[str]) -> None:
        """Remove adapters from the networks and from memory.

        Args:
            adapter_names: Names of loaded adapters, one or several.

        Raises:
            InputError: If a name is unknown, repeated or fused.
        """
        networks = self._adaptable()
        names = loaded_names(adapter_names, networks)
        selections = {}
        for component, network in networks.items():
            current = adapters_of(network).selection
            if fused := [name for name in names if name in current.fused]:
                raise invalid("adapter_names", fused, "adapters that are not fused", "call unfuse_lora() first")
            selections[component] = dataclasses.replace(
                current,
                loaded={name: adapter for name, adapter in current.loaded.items() if name not in names},
                weights={name: weight for name, weight in current.weights.items() if name not in names},
                active=tuple(name for name in current.active if name not in names),
            )
        self._select(networks, selections)

    @changes_networks
    def unload_lora_weights(self) -> None:
        """Remove all adapters. The networks have their base weights again, bit for bit.

        Adapters that are fused stay part of the weights, permanently.
        """
        networks = self._adaptable()
        fused = {name for name, network in networks.items() if adapters_of(network).selection.fused}
        self._select(networks, {name: Selection() for name in networks if name not in fused})
        for name in fused:
            adapters_of(networks[name]).keep_fused(networks[name])
            adapters_of(networks[name]).select(networks[name], Selection())

    # Fusing

    @changes_networks
    def fuse_lora(
        self,
        components: Iterable[str] | None = None,
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: Iterable[str] | None = None,
    ) -> None:
        """Make adapters part of the networks' own weights, which `save_pretrained` writes.

        `unfuse_lora` restores the weights, bit for bit; `unload_lora_weights` keeps them. Images do not change.

        Args:
            components: Names of the networks; None or an empty list for all.
            lora_scale: Factor of the adapters' weights.
            safe_fusing: Whether weights that would not be finite are an error.
            adapter_names: Names of the adapters; None for the active ones.

        Raises:
            InputError: If an argument is invalid, there is nothing to fuse, or a network is quantized.
            NotFiniteError: If a weight would not be finite, with `safe_fusing`.
        """
        networks = self._named_networks(components)
        scale = finite_number("lora_scale", lora_scale)
        check = checked_flag("safe_fusing", safe_fusing)
        names = None if adapter_names is None else loaded_names(adapter_names, networks)
        selections = {}
        for component, network in networks.items():
            current = adapters_of(network).selection
            chosen = [name for name in (current.active if names is None else names) if name in current.loaded]
            chosen = [name for name in chosen if name not in current.fused]
            if chosen and (kind := kind_of(network)) is not None:
                raise InputError(f"{component} is quantized ({kind}), and its weights take no adapters: fuse first")
            if chosen:
                fused = {name: scale * current.weights[name] for name in chosen}
                selections[component] = dataclasses.replace(current, fused={**current.fused, **fused})
        if not selections:
            raise invalid("adapter_names", names, "adapters that are loaded and not fused, or None with active ones")
        self._select({name: networks[name] for name in selections}, selections, check_finite=check)

    @changes_networks
    def unfuse_lora(self, components: Iterable[str] | None = None) -> None:
        """Undo `fuse_lora`: the weights are restored from the originals, and the adapters are as before.

        Args:
            components: Names of the networks; None or an empty list for all.

        Raises:
            InputError: If a network is not one of the pipeline's.
        """
        networks = self._named_networks(components)
        selections = {
            name: dataclasses.replace(adapters_of(network).selection, fused={}) for name, network in networks.items()
        }
        self._select(networks, selections)

    @property
    def fused_loras(self) -> set[str]:
        """Names of the fused adapters."""
        return {name for network in self._adaptable().values() for name in adapters_of(network).selection.fused}

    @property
    def num_fused_loras(self) -> int:
        """Number of the fused adapters."""
        return len(self.fused_loras)

    # Networks

    def _adaptable(self) -> dict[str, nn.Module]:
        """Return the networks that take adapters by component name."""
        parts = {name: unwrapped(self._components.get(name)) for name in COMPONENTS}
        networks = {name: part for name, part in parts.items() if isinstance(part, nn.Module)}
        if not networks:
            raise InputError(f"{type(self).__name__} has neither a prior nor a unet, which adapters are for")
        return networks

    def _named_networks(self, components: Iterable[str] | None) -> dict[str, nn.Module]:
        """Return the networks of the argument `components`."""
        networks = self._adaptable()
        if components is None or (isinstance(components, list | tuple) and not components):
            return networks
        names = names_among("components", components, list(networks), "networks that take adapters")
        return {name: networks[name] for name in names}

    @staticmethod
    def _select(
        networks: Mapping[str, nn.Module], selections: Mapping[str, Selection], *, check_finite: bool = False
    ) -> None:
        """Apply a selection per network; if one fails, those before it are as they were."""
        adapted = [name for name, each in selections.items() if each.loaded or adapters_of(networks[name]).names]
        check_run_by_torch({name: networks[name] for name in adapted}, "a change of adapters")
        with contextlib.ExitStack() as stack:
            for component, selection in selections.items():
                network = networks[component]
                if selection == adapters_of(network).selection:
                    continue
                stack.enter_context(_undone_on_error(network))
                attached_adapters(network).select(network, selection, check_finite=check_finite)


@contextlib.contextmanager
def _undone_on_error(network: nn.Module) -> Iterator[NetworkAdapters]:
    """Return a context manager that restores the adapters of a network if its block raises."""
    adapters = attached_adapters(network)
    before = adapters.selection
    try:
        yield adapters
    except BaseException:
        adapters.select(network, before)
        raise
