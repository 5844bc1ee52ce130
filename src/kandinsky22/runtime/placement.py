"""Where a pipeline's networks are and in what precision: moved together, or each only while it works."""

from __future__ import annotations

import functools
import os
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn

from kandinsky22.errors import InputError
from kandinsky22.runtime import device_offload, lazy_component
from kandinsky22.runtime.device import chosen_accelerator, usable_device
from kandinsky22.runtime.disk_offload import InFiles

P = TypeVar("P", bound="Placed")


class Placed:
    """What has `components`, of which some are networks.

    `model_cpu_offload_seq` names the networks that take turns, in the order of their work, joined by "->". The others
    stay once they were called until the call ends, or all the time if `_exclude_from_cpu_offload` names them.
    """

    model_cpu_offload_seq: ClassVar[str] = ""
    _exclude_from_cpu_offload: ClassVar[list[str]] = []

    @property
    def components(self) -> dict[str, Any]:
        """All components by name."""
        raise NotImplementedError

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        names = vars(self).get("_component_names", ())
        if name in names and isinstance(value, nn.Module) and device_offload.place_of(value) is None:
            # what takes the place of an offloaded network, or stands beside one, is treated alike
            others = [vars(self).get(other) for other in names]
            places = [device_offload.place_of(other) for other in others if isinstance(other, nn.Module)]
            if (place := next(filter(None, places), None)) is not None and name not in self._exclude_from_cpu_offload:
                lazy_component.settle(value, place.join)

    def _networks(self) -> dict[str, nn.Module]:
        """The networks that are there: all but those that are asleep."""
        return {name: part for name, part in self._all_networks().items() if not lazy_component.is_asleep(part)}

    def _all_networks(self) -> dict[str, nn.Module]:
        return {name: part for name, part in self.components.items() if isinstance(part, nn.Module)}

    def _places(self) -> list[device_offload.Place]:
        """How networks are offloaded, of those that are."""
        places = [device_offload.place_of(network) for network in self._networks().values()]
        return [place for place in places if place is not None]

    # All together

    def to(
        self: P,
        *targets: torch.device | str | int | torch.dtype,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> P:
        """Move all networks to a device, convert them to a floating-point dtype, or both; returns the pipeline.

        Raises InputError before anything moves if the device is not usable here, the dtype is not floating, or
        networks are offloaded: those come and go by themselves, until `remove_all_hooks`. With model offloading they
        can still be sent to the CPU, and converted.
        """
        for target in targets:
            if isinstance(target, torch.dtype):
                dtype = target
            else:
                device = target
        if dtype is not None and not getattr(dtype, "is_floating_point", False):
            raise InputError(f"dtype={dtype!r}; accepted: a floating-point torch.dtype")
        goal = None if device is None else usable_device(device)
        for place in self._places():
            if place.method != "enable_model_cpu_offload" or (goal is not None and goal.type != "cpu"):
                raise InputError(
                    f"device={device!r}, dtype={dtype!r}: networks come and go by themselves since "
                    f"{place.method}(); call remove_all_hooks() first"
                )
        for place in self._places():
            place.free()
        for network in self._all_networks().values():
            lazy_component.move(network, goal, dtype)
        return self

    @property
    def device(self) -> torch.device:
        """Where the networks are; while they are offloaded some may be elsewhere."""
        parameters = (p for network in self._networks().values() for p in network.parameters())
        nowhere = bool(self._places())  # then weights on the meta device are those that are in files
        return next((p.device for p in parameters if not (nowhere and p.is_meta)), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the networks."""
        parameters = (p for network in self._networks().values() for p in network.parameters())
        return next((p.dtype for p in parameters if p.is_floating_point()), torch.float32)

    # Each while it works

    @property
    def _execution_device(self) -> torch.device:
        """Where the networks work, wherever they are now."""
        return next((place.device for place in self._places()), self.device)

    def enable_model_cpu_offload(
        self, gpu_id: int | None = None, device: torch.device | str | int | None = None
    ) -> None:
        """Keep networks in the CPU's memory, and each on the accelerator only while it works, one at a time.

        `device` is any device of torch (CUDA or MPS unless given), `gpu_id` its number. Takes the accelerator's memory
        of the largest network; the next call of another network or the end of the pipeline's call takes one away.
        Raises InputError if there is no accelerator, MissingDependencyError without accelerate.
        """
        method = "enable_model_cpu_offload"
        place = chosen_accelerator(method, gpu_id, device)
        device_offload.accelerate_hooks()
        self.remove_all_hooks()
        stages = device_offload.Stages(method, place, lambda: device_offload.InMemory(place), accelerated=True)
        turns = self.model_cpu_offload_seq.split("->")
        for name, network in self._all_networks().items():
            if name in turns or name not in self._exclude_from_cpu_offload:
                lazy_component.settle(network, functools.partial(stages.add, lasting=name not in turns))
            else:
                lazy_component.move(network, place, None)

    def enable_sequential_cpu_offload(
        self, gpu_id: int | None = None, device: torch.device | str | int | None = None
    ) -> None:
        """Keep networks in the CPU's memory, and each of their layers on the accelerator only while it works.

        Takes the accelerator's memory of one layer and its results, and much longer, for every step moves all weights.
        Arguments and errors are those of `enable_model_cpu_offload`.
        """
        place = chosen_accelerator("enable_sequential_cpu_offload", gpu_id, device)
        device_offload.accelerate_hooks()
        self.remove_all_hooks()
        for name, network in self._all_networks().items():
            if name in self._exclude_from_cpu_offload:
                lazy_component.move(network, place, None)
            else:
                lazy_component.settle(network, functools.partial(device_offload.Streamed, device=place))

    def enable_low_memory(self, folder: str | os.PathLike[str] | None = None, *, by_layer: bool = True) -> None:
        """Without an accelerator: keep a network in memory only while it works, large layers one at a time.

        Large weights come from their file, or the system's cache of it, at each use (on Linux), and are not rearranged:
        that takes longer and moves rounding. With `by_layer=False` a whole network stays for as long as it works, and
        is read anew for the next time; results are the same bit for bit.

        Networks are read from the checkpoint that they were loaded from. One that was changed since, loaded in torch's
        inference mode, or made in memory is first written to a temporary file in `folder` (the system's folder for
        such files unless given), and rounding may move. Weights that are converted when they are read, as their file
        has another type, stay while their network works, but are not rearranged either. Lost are later changes to
        weights, and those that nobody sees: of single numbers, through `weight.data` or a numpy view. Works without
        accelerate. Raises InputError if networks are on an accelerator or arguments are of the wrong kind,
        CheckpointError if the file cannot be written.
        """
        if not isinstance(by_layer, bool):
            raise InputError(f"by_layer={by_layer!r}; accepted: True or False")
        if folder is not None and not os.path.isdir(folder):
            raise InputError(f"folder={folder!r} is not there; accepted: a folder to write to, or None")
        self.remove_all_hooks()
        if self.device.type != "cpu":
            raise InputError(
                f"the networks are on {self.device}, the low-memory mode is for CPUs: call enable_model_cpu_offload() "
                "or enable_sequential_cpu_offload(), or first to('cpu')"
            )
        shelf = functools.partial(InFiles, folder, by_layer=by_layer)
        stages = device_offload.Stages("enable_low_memory", torch.device("cpu"), shelf, accelerated=False)
        for network in self._all_networks().values():
            lazy_component.settle(network, stages.add)

    def maybe_free_model_hooks(self) -> None:
        """Take networks that wait for their next turn off the device; each call of a pipeline ends with this."""
        for place in self._places():
            place.free()

    def remove_all_hooks(self) -> None:
        """End all offloading: networks are ordinary ones on the CPU again."""
        for network in self._all_networks().values():
            lazy_component.settle(network, None)
        if not self._places():
            return
        for network in self._networks().values():
            device_offload.release(network)
            network.to("cpu")
