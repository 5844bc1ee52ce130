"""Mixin: the device and dtype of a pipeline's networks, and how they are offloaded."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn

from kandinsky22.errors import InputError, invalid
from kandinsky22.inputs.validation import existing_folder, strict_bool, usable_device
from kandinsky22.runtime import device_offload
from kandinsky22.runtime.calls import changes_networks
from kandinsky22.runtime.cpu_storage import CpuStorage
from kandinsky22.runtime.device import floating_dtype, select_accelerator
from kandinsky22.runtime.disk_offload import DiskStorage
from kandinsky22.runtime.lazy_component import AnyNetwork, LazyComponent, networks_in_memory
from kandinsky22.runtime.loading_on_first_use import LoadingOnFirstUse
from kandinsky22.runtime.network_locks import holding
from kandinsky22.runtime.network_state import check_run_by_torch, is_unread

P = TypeVar("P", bound="OffloadMixin")


class OffloadMixin:
    """Mixin for classes with `components`, some of which are networks.

    `model_cpu_offload_seq` names the networks that `enable_model_cpu_offload` moves one at a time, in the order of
    their use, joined by "->". Other networks stay on the device from their first use until the end of the call, or all
    the time if `_exclude_from_cpu_offload` names them.
    """

    hf_device_map: dict[str, str] | None = None  # devices by network, after `from_pretrained(device_map=...)`
    model_cpu_offload_seq: ClassVar[str] = ""
    _exclude_from_cpu_offload: ClassVar[list[str]] = []

    @property
    def components(self) -> dict[str, Any]:
        """All components by name."""
        raise NotImplementedError

    @property
    def _parts(self) -> dict[str, Any]:
        """All components by name, and the networks that are placed like them although they are none."""
        return self.components

    def _networks(self) -> dict[str, nn.Module]:
        """Return networks by name, without those that are not loaded yet."""
        return networks_in_memory(self._parts)

    def _all_networks(self) -> dict[str, AnyNetwork]:
        """Return networks by name, including those that are not loaded yet."""
        return {name: part for name, part in self._parts.items() if isinstance(part, nn.Module | LazyComponent)}

    def _offloads(self) -> list[device_offload.Offloaded]:
        """Return how networks are offloaded, without those that are not."""
        offloads = [device_offload.offload_of(network) for network in self._networks().values()]
        return [offload for offload in offloads if offload is not None]

    def _offload_like_others(self, name: str, component: Any) -> None:
        """Offload a newly assigned component in the same way as the others; nothing happens if those are not offloaded.

        Args:
            name: Name of the component.
            component: The object that was assigned; anything except a network is left alone.
        """
        if not isinstance(component, nn.Module | LazyComponent) or name in self._exclude_from_cpu_offload:
            return
        if any(device_offload.offload_of(network) for network in networks_in_memory({name: component}).values()):
            return
        if (offload := next(iter(self._offloads()), None)) is not None:
            _offload(component, offload.offload_alike)

    # All networks together

    @changes_networks
    def to(
        self: P,
        *targets: torch.device | str | int | torch.dtype | None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        silence_dtype_warnings: bool = False,
    ) -> P:
        """Move all networks to a device, convert them to a floating-point type, or both.

        Offloaded networks move by themselves, so this is an error until `remove_all_hooks`. With
        `enable_model_cpu_offload` they can still be moved to the CPU and converted.

        Args:
            *targets: A device, a dtype, or both, in any order.
            device: Device to move to; None leaves the networks where they are.
            dtype: Floating-point type to convert to; None leaves the type.
            silence_dtype_warnings: Accepted for the reference's sake: there are no such warnings.

        Returns:
            The pipeline itself.

        Raises:
            InputError: If the device cannot be used here, the dtype is not a floating-point type, the networks are
                offloaded, or OpenVINO runs some of them. Nothing has moved then.
        """
        for target in targets:
            is_dtype = isinstance(target, torch.dtype)
            if target is not None and (dtype if is_dtype else device) is not None:
                raise invalid("to(...)", [*targets, device, dtype], "at most one device and one dtype")
            if isinstance(target, torch.dtype):
                dtype = target
            elif target is not None:
                device = target
        if dtype is not None:
            floating_dtype(dtype)
        target_device = None if device is None else usable_device(device)
        moves_off_cpu = target_device is not None and target_device.type != "cpu"
        if moves_off_cpu or dtype not in (None, self.dtype):
            check_run_by_torch(self._networks(), "to()")
        for offload in self._offloads():
            if offload.method != "enable_model_cpu_offload" or moves_off_cpu:
                raise InputError(
                    f"device={device!r} and dtype={dtype!r} cannot be applied: the networks are offloaded by "
                    f"{offload.method}(); call remove_all_hooks() first"
                )
        for offload in self._offloads():
            offload.free()
        for network in self._all_networks().values():
            _move(network, target_device, dtype)
        return self

    @property
    def device(self) -> torch.device:
        """Device of the first parameter; parts of offloaded networks may be on another device."""
        parameters = (p for network in self._networks().values() for p in network.parameters())
        offloaded = bool(self._offloads())  # parameters on the meta device then belong to weights in files
        return next((p.device for p in parameters if not (offloaded and p.is_meta)), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the networks."""
        parameters = (p for network in self._networks().values() for p in network.parameters())
        return next((p.dtype for p in parameters if p.is_floating_point()), torch.float32)

    def _place(self, device: torch.device, *, may_offload: bool) -> None:
        """Move all networks to the device of the argument `device_map`, or offload them to the CPU if they do not fit.

        Args:
            device: Where to move them.
            may_offload: Whether they may be offloaded.
        """
        self.hf_device_map = {name: str(device) for name in self._all_networks()}
        if may_offload and device.type == "cuda" and self._weight_bytes() > torch.cuda.mem_get_info(device)[0]:
            self.enable_model_cpu_offload(device=device)
        else:
            self.to(device)

    def _weight_bytes(self) -> int:
        """Return the size of all weights; files stand for networks that are not loaded yet."""
        networks = self._networks()
        unloaded = [part for name, part in self._all_networks().items() if name not in networks]
        paths = [path for part in unloaded if isinstance(part, LazyComponent) for path in part.files]
        files = sum(os.path.getsize(path) for path in paths if os.path.isfile(path))
        return files + sum(p.nbytes for network in networks.values() for p in network.parameters())

    # Offloading

    @property
    def _execution_device(self) -> torch.device:
        """Device that the networks run on, wherever their weights are now."""
        return next((offload.device for offload in self._offloads()), self.device)

    @changes_networks
    def enable_model_cpu_offload(
        self, gpu_id: int | None = None, device: torch.device | str | int | None = None
    ) -> None:
        """Offload networks to the CPU's memory; each one is on the accelerator only while it runs, one at a time.

        The accelerator's memory has to hold the largest network. A network returns to the CPU when the next one runs or
        the call of the pipeline ends.

        Args:
            gpu_id: Index of the accelerator; None for the index in `device`, or 0.
            device: Any device of torch; None for CUDA or MPS, whichever is available.

        Raises:
            InputError: If no accelerator is available, `gpu_id` or `device` is invalid, or OpenVINO runs a network.
            MissingDependencyError: If accelerate is not installed.
        """
        method = "enable_model_cpu_offload"
        check_run_by_torch(self._networks(), f"{method}()")
        accelerator = select_accelerator(method, gpu_id, device)
        device_offload.accelerate_hooks()
        self.remove_all_hooks()
        make_storage = functools.partial(CpuStorage, accelerator)
        group = device_offload.ModelOffload(method, accelerator, make_storage, use_accelerate=True)
        others = self._parts.keys() - self.components.keys()
        sequence = [*self.model_cpu_offload_seq.split("->"), *others]
        for name, network in self._all_networks().items():
            if name in sequence or name not in self._exclude_from_cpu_offload:
                _offload(network, functools.partial(group.add, stays_until_freed=name not in sequence))
            else:
                _move(network, accelerator, None)

    @changes_networks
    def enable_sequential_cpu_offload(
        self, gpu_id: int | None = None, device: torch.device | str | int | None = None
    ) -> None:
        """Offload networks to the CPU's memory; each of their layers is on the accelerator only while it runs.

        The accelerator's memory has to hold one layer and its results. This is much slower than
        `enable_model_cpu_offload`, because every step moves all weights.

        Args:
            gpu_id: Index of the accelerator; None for the index in `device`, or 0.
            device: Any device of torch; None for CUDA or MPS, whichever is available.

        Raises:
            InputError: If no accelerator is available, `gpu_id` or `device` is invalid, or OpenVINO runs a network.
            MissingDependencyError: If accelerate is not installed.
        """
        check_run_by_torch(self._networks(), "enable_sequential_cpu_offload()")
        accelerator = select_accelerator("enable_sequential_cpu_offload", gpu_id, device)
        device_offload.accelerate_hooks()
        self.remove_all_hooks()
        for name, network in self._all_networks().items():
            if name in self._exclude_from_cpu_offload:
                _move(network, accelerator, None)
            else:
                _offload(network, functools.partial(device_offload.SequentialOffload, device=accelerator))

    @changes_networks
    def enable_low_memory(self, folder: str | os.PathLike[str] | None = None, *, by_layer: bool = True) -> None:
        """Offload networks to files, on a CPU without accelerator; each one is in memory only while it runs.

        Networks are read from the checkpoint that they were loaded from. A network that was changed since, loaded in
        torch's inference mode, or created in memory is first written to a temporary file; results may then differ by
        rounding. Weights that are converted while reading, because their file has another dtype, stay in memory while
        their network runs. Later changes to weights are lost. So are earlier changes of single elements through
        `weight.data` or a numpy view, which are not noticed. accelerate is not needed.

        Args:
            folder: Where temporary files are written; None for the system's temporary folder.
            by_layer: Whether large layers are loaded one at a time (on Linux). They are then read from their file, or
                the system's cache of it, at each use and not packed, which takes longer and changes rounding. If False,
                an entire network stays in memory while it runs and is read again for its next use; results are the same
                bit for bit.

        Raises:
            InputError: If the networks are on an accelerator or run by OpenVINO, `folder` does not exist, or `by_layer`
                is not a bool.
            CheckpointError: If the temporary file cannot be written.
        """
        strict_bool("by_layer", by_layer)
        check_run_by_torch(self._networks(), "enable_low_memory()")
        folder = None if folder is None else existing_folder("folder", folder)
        self.remove_all_hooks()
        if self.device.type != "cpu":
            raise InputError(
                f"enable_low_memory() is for CPUs, but the networks are on {self.device}: call to('cpu') first, or "
                "enable_model_cpu_offload() or enable_sequential_cpu_offload() instead"
            )
        make_storage = functools.partial(DiskStorage, folder, by_layer=by_layer)
        cpu = torch.device("cpu")
        group = device_offload.ModelOffload("enable_low_memory", cpu, make_storage, use_accelerate=False)
        for network in self._all_networks().values():
            _offload(network, group.add)

    @changes_networks
    def load_on_first_use(self, *, used_once: bool) -> None:
        """Read the weights of networks that were loaded inside `network_reader.deferred_weights` when they first run.

        Args:
            used_once: Whether each network leaves memory when the next one runs, and at the end of each call. If False,
                networks leave only when the memory does not suffice.
        """
        if not any(map(is_unread, self._networks().values())):
            return
        make_storage = functools.partial(DiskStorage, None, by_layer=False)
        group = LoadingOnFirstUse(make_storage, used_once=used_once)
        for network in self._all_networks().values():
            if isinstance(network, LazyComponent) or is_unread(network):
                _offload(network, group.add)

    def maybe_free_model_hooks(self) -> None:
        """Move offloaded networks that are still on the device back to their storage; every call ends with this."""
        for offload in self._offloads():
            with holding(offload.lock):  # waits for the call of another thread
                offload.free()

    @changes_networks
    def remove_all_hooks(self) -> None:
        """End all offloading: networks become ordinary ones on the CPU again."""
        for network in self._all_networks().values():
            _offload(network, None)
        if not self._offloads():
            return
        for network in self._networks().values():
            device_offload.remove_offload(network)
            network.to("cpu")


def _offload(network: AnyNetwork, offload: Callable[[nn.Module], Any] | None) -> None:
    """Call `offload(network)` now, or when the network is loaded; None cancels what was deferred."""
    if isinstance(network, LazyComponent):
        network.defer_offload(offload)
    elif offload is not None:
        offload(network)


def _move(network: AnyNetwork, device: torch.device | None, dtype: torch.dtype | None) -> None:
    """Move and convert a network now, or when it is loaded; None leaves device or dtype as it is."""
    if isinstance(network, LazyComponent):
        network.defer_to(device, dtype)
    else:
        network.to(device=device, dtype=dtype)
