"""Adapters of one network: the reference's methods of networks, for scripts that do not use those of pipelines."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any, ClassVar

from torch import nn

from kandinsky22.adapters.files import AdapterSource
from kandinsky22.adapters.methods import AdapterMixin


class NetworkAdapterMixin:
    """Mixin for networks that take adapters. Pipelines have methods for all their networks together.

    Attributes:
        adapter_role: Name of the network in files: "unet" or "prior".
    """

    adapter_role: ClassVar[str]

    def load_lora_adapter(
        self,
        pretrained_model_name_or_path_or_dict: AdapterSource,
        prefix: str | None = None,
        hotswap: bool = False,
        **options: Any,
    ) -> None:
        """Load an adapter and apply it with weight 1, instead of those that were active.

        Args:
            pretrained_model_name_or_path_or_dict: A file, a folder, a Hub id, or tensors by name.
            prefix: Beginning of the tensor names to read, without the dot; None reads all.
            hotswap: Whether the adapter replaces the one of this name, with its weight.
            **options: Other arguments of `load_lora_weights` of pipelines, such as `adapter_name` and `weight_name`.

        Raises:
            CheckpointError: If the file is missing or damaged, or does not fit the network.
            InputError: If an argument is invalid, or the network cannot take the adapter.
        """
        self._adapters().load_lora_weights(
            pretrained_model_name_or_path_or_dict, hotswap=hotswap, prefix=prefix, **options
        )

    def load_attn_procs(self, pretrained_model_name_or_path_or_dict: AdapterSource, **options: Any) -> None:
        """Load an adapter, as `load_lora_adapter` does.

        Args:
            pretrained_model_name_or_path_or_dict: A file, a folder, a Hub id, or tensors by name.
            **options: Arguments of `load_lora_adapter`.

        Raises:
            CheckpointError: If the file is missing or damaged, or does not fit the network.
            InputError: If an argument is invalid, or the network cannot take the adapter.
        """
        self.load_lora_adapter(pretrained_model_name_or_path_or_dict, **options)

    def save_lora_adapter(
        self,
        save_directory: str | os.PathLike[str],
        adapter_name: str | None = None,
        *,
        safe_serialization: bool = True,
        weight_name: str | None = None,
    ) -> None:
        """Write a loaded adapter to `pytorch_lora_weights.safetensors` in PEFT's layout.

        Args:
            save_directory: Folder, which is created if it does not exist.
            adapter_name: Name of the adapter; None for the only one.
            safe_serialization: Whether to write safetensors instead of a pickled file.
            weight_name: Name of the file; None for the usual one.

        Raises:
            CheckpointError: If the file cannot be written.
            InputError: If an argument is invalid.
        """
        self._adapters().save_lora_weights(
            save_directory, adapter_name=adapter_name, safe_serialization=safe_serialization, weight_name=weight_name
        )

    def set_adapters(
        self, adapter_names: str | Iterable[str], weights: float | Iterable[float | None] | None = None
    ) -> None:
        """Apply these adapters, and no others.

        Args:
            adapter_names: Names of loaded adapters, one or several.
            weights: Weight of all, or one per name; None for 1.

        Raises:
            InputError: If a name is unknown, repeated or fused, or a weight is not a finite number.
        """
        self._adapters().set_adapters(adapter_names, weights)

    def active_adapters(self) -> list[str]:
        """Return the names of the active adapters."""
        return self._adapters().get_active_adapters()

    def disable_lora(self) -> None:
        """Apply no adapter until `enable_lora`. Fused ones stay."""
        self._adapters().disable_lora()

    def enable_lora(self) -> None:
        """Apply the active adapters again."""
        self._adapters().enable_lora()

    def delete_adapters(self, adapter_names: str | Iterable[str]) -> None:
        """Remove adapters from the network and from memory.

        Args:
            adapter_names: Names of loaded adapters, one or several.

        Raises:
            InputError: If a name is unknown, repeated or fused.
        """
        self._adapters().delete_adapters(adapter_names)

    def fuse_lora(
        self, lora_scale: float = 1.0, safe_fusing: bool = False, adapter_names: Iterable[str] | None = None
    ) -> None:
        """Make adapters part of the network's own weights, which `save_pretrained` writes.

        Args:
            lora_scale: Factor of the adapters' weights.
            safe_fusing: Whether weights that would not be finite are an error.
            adapter_names: Names of the adapters; None for the active ones.

        Raises:
            InputError: If an argument is invalid, there is nothing to fuse, or the network is quantized.
            NotFiniteError: If a weight would not be finite, with `safe_fusing`.
        """
        self._adapters().fuse_lora(None, lora_scale, safe_fusing, adapter_names)

    def unfuse_lora(self) -> None:
        """Undo `fuse_lora`: the original weights are restored."""
        self._adapters().unfuse_lora()

    def unload_lora(self) -> None:
        """Remove all adapters. Those that are fused stay part of the weights, permanently."""
        self._adapters().unload_lora_weights()

    def _adapters(self) -> AdapterMixin:
        return _NetworkAlone(self.adapter_role, self)


class _NetworkAlone(AdapterMixin):
    """One network with the methods of pipelines."""

    def __init__(self, role: str, network: Any) -> None:
        self._components = {role: network}

    @property
    def components(self) -> dict[str, nn.Module]:
        """The network by its role."""
        return self._components
