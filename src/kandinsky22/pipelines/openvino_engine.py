"""Pipelines whose networks run by OpenVINO instead of PyTorch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from kandinsky22.checkpoints.atomic_files import checked_save_path
from kandinsky22.checkpoints.cache_folder import cache_folder
from kandinsky22.engines.calibration import denoising_inputs
from kandinsky22.engines.networks import MoVQEngine, NetworkEngine, PriorEngine, UNetEngine, check_exportable
from kandinsky22.engines.openvino import ELEMENT_TYPES, INT8, EngineSettings, check_settings
from kandinsky22.errors import InputError, invalid
from kandinsky22.runtime.calls import changes_networks
from kandinsky22.runtime.device import dtype_name
from kandinsky22.runtime.lazy_component import loaded, networks_in_memory
from kandinsky22.runtime.network_state import attached_state, state_of, unwrapped
from kandinsky22.sampling.presets import PRIOR_PREFIX, make_scheduler

P = TypeVar("P", bound="OpenVINOMixin")

NETWORKS = ("prior", f"{PRIOR_PREFIX}prior", "unet", "movq")  # components that OpenVINO can run
CALIBRATION_SCHEDULER = "DDIMScheduler"


class OpenVINOMixin:
    """Mixin for pipelines: run prior, UNet and MoVQ by OpenVINO."""

    _components: dict[str, Any]
    _feature_caching: Any

    @changes_networks
    def to_openvino(
        self: P,
        device: str = "CPU",
        precision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> P:
        """Export prior, UNet and MoVQ to OpenVINO, which runs them from now on. The CLIP towers stay with PyTorch.

        Schedulers, guidance and everything else of calls are as before, and all pipelines that share the networks run
        them in this way. Adapters that are applied are exported as part of the weights. Exported graphs are stored on
        disk, so that the same weights are not exported again. Later changes of weights and adapters, and hooks, are
        errors of the next call: call this method again. Only the device "CPU" was ever tested.

        Args:
            device: "CPU", "GPU" or "NPU" of Intel, or "AUTO" for OpenVINO's choice.
            precision: "float32", "bfloat16", "float16" or "int8"; None for the networks' own type. With "int8" weights
                of the prior, and weights and activations of the UNet have 8 bits; everything else computes in the
                networks' type. Their weights keep the type that they have in PyTorch.
            cache_dir: Folder of exported graphs, which are as large as the weights; None for the folder `openvino` in
                the folder of the variable KANDINSKY22_CACHE.

        Returns:
            The pipeline itself.

        Raises:
            InputError: If the device or the precision is not available here, or a network is offloaded, quantized,
                compiled, not on the CPU, or has hooks or feature caching. Nothing has changed then.
            MissingDependencyError: If the packages of the extra `openvino` are not installed.
        """
        components = {name: loaded(part) for name in NETWORKS if (part := self._components.get(name)) is not None}
        networks: dict[str, Any] = {name: unwrapped(part) for name, part in components.items()}
        if not networks:
            raise InputError(f"{type(self).__name__} has no network that OpenVINO could run")
        settings = {
            name: self._engine_settings(network, device, precision, cache_dir) for name, network in networks.items()
        }
        self._check_no_feature_caching()
        for name, network in networks.items():
            check_exportable(name, components[name], network)
        engines = {name: self._new_engine(name, network, settings[name]) for name, network in networks.items()}
        for name, network in networks.items():
            attached_state(network).engine = engines[name]
        return self

    @changes_networks
    def to_torch(self: P) -> P:
        """Undo `to_openvino`: PyTorch runs all networks again, with the weights that they have now.

        Returns:
            The pipeline itself.
        """
        for network in networks_in_memory(self._components).values():
            if state_of(network).engine is not None:
                attached_state(network).engine = None
        return self

    @staticmethod
    def _engine_settings(
        network: Any, device: str, precision: str | None, cache_dir: str | os.PathLike[str] | None
    ) -> EngineSettings:
        """Return the checked settings of one network."""
        own_type = dtype_name(network.dtype)
        if own_type not in ELEMENT_TYPES:
            raise invalid("dtype", network.dtype, f"one of {', '.join(ELEMENT_TYPES)}", "call to(dtype) first")
        chosen = own_type if precision is None else precision
        folder: Path | None = None
        if cache_dir is not None:
            folder = checked_save_path(cache_dir, "cache_dir")
        elif (root := cache_folder()) is not None:
            folder = root / "openvino"
        settings = EngineSettings(device, chosen, own_type if chosen == INT8 else chosen, folder)
        check_settings(settings)
        return settings

    def _new_engine(self, name: str, network: Any, settings: EngineSettings) -> NetworkEngine:
        """Return the engine of a network: the one that it has, if that has these settings and weights."""
        current = state_of(network).engine
        if isinstance(current, NetworkEngine) and current.settings == settings and current.is_current(network):
            return current
        if name == "unet":
            return UNetEngine(network, settings, self._calibration_inputs)
        return MoVQEngine(network, settings) if name == "movq" else PriorEngine(network, settings)

    def _calibration_inputs(self) -> list[tuple[Tensor, ...]]:
        """Return inputs of the UNet in some steps, from random embeddings; in the prior's range if there is one."""
        unet: Any = unwrapped(self._components["unet"])
        prior: Any = unwrapped(self._components.get(f"{PRIOR_PREFIX}prior"))
        generator = torch.Generator().manual_seed(0)
        embeds = torch.randn(2, unet.config.encoder_hid_dim, generator=generator).to(unet.dtype)
        if prior is not None:
            with torch.no_grad():
                embeds = prior.post_process_latents(embeds.to(prior.dtype))
        config = getattr(self._components["scheduler"], "config", {})
        scheduler = make_scheduler(CALIBRATION_SCHEDULER, config, {})
        movq: Any = self._components.get("movq")
        channels = 4 if movq is None else unwrapped(movq).config.latent_channels
        return denoising_inputs(unet, scheduler, embeds, channels)

    def _check_engines(self) -> None:
        """Raise InputError if a network that OpenVINO runs has changed since it was exported."""
        networks: Mapping[str, nn.Module] = networks_in_memory(self._components)
        for name, component in networks.items():
            engine = state_of(component).engine
            if engine is not None:
                engine.check(name, component, unwrapped(component))
                if name == "unet":
                    self._check_no_feature_caching()

    def _check_no_feature_caching(self) -> None:
        if self._feature_caching is not None:
            raise InputError("feature caching has no effect by OpenVINO: call disable_feature_caching() first")
