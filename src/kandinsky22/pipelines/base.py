"""What every pipeline is: components (see `Composite`), a place and precision for its networks, a progress bar."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import nn

from kandinsky22.composite import Composite
from kandinsky22.errors import InputError

P = TypeVar("P", bound="DiffusionPipeline")


class DiffusionPipeline(Composite):
    """Base of all pipelines; `DiffusionPipeline.from_pretrained` gives the one that a checkpoint names."""

    def __init__(self) -> None:
        super().__init__()
        self._progress_bar_config: dict[str, Any] = {}

    def _settings_of(self, other: Composite, prefix: str) -> None:
        super()._settings_of(other, prefix)
        if isinstance(other, DiffusionPipeline):
            self._progress_bar_config = dict(other._progress_bar_config)

    def _networks(self) -> list[nn.Module]:
        return [component for component in self.components.values() if isinstance(component, nn.Module)]

    def set_progress_bar_config(self, **options: Any) -> None:
        """Options of tqdm for all progress bars; without `disable`, bars show when standard error is a terminal."""
        self._progress_bar_config = options

    def progress_bar(self, iterable: Iterable[Any] | None = None, total: int | None = None) -> Any:
        """A tqdm bar around `iterable`, or one of `total` steps that is advanced by hand."""
        from tqdm.auto import tqdm

        if (iterable is None) == (total is None):
            raise InputError("progress_bar: pass either an iterable or total=")
        return tqdm(iterable, total=total, **{"disable": None, **self._progress_bar_config})

    # Place and precision

    def to(
        self: P,
        *targets: torch.device | str | int | torch.dtype,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> P:
        """Move all networks to a device, convert them to a floating-point dtype, or both; returns the pipeline.

        Raises InputError before anything moves if the device is not usable here or the dtype is not floating.
        """
        for target in targets:
            if isinstance(target, torch.dtype):
                dtype = target
            else:
                device = target
        if dtype is not None and not getattr(dtype, "is_floating_point", False):
            raise InputError(f"dtype={dtype!r}; accepted: a floating-point torch.dtype")
        if device is not None:
            try:
                torch.empty(0, device=device)
            except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
                reason = str(error).strip().split("\n")[0]
                raise InputError(f"device={device!r} is not usable here: {reason}") from error
        for network in self._networks():
            network.to(device=device, dtype=dtype)
        return self

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return next((p.device for network in self._networks() for p in network.parameters()), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the networks."""
        parameters = (p for network in self._networks() for p in network.parameters())
        return next((p.dtype for p in parameters if p.is_floating_point()), torch.float32)

    @property
    def _execution_device(self) -> torch.device:
        return self.device

    def maybe_free_model_hooks(self) -> None:
        """Called at the end of each call; for offloading modes to take networks off the device again."""

    def __repr__(self) -> str:
        parts = [f"  {name}: {type(component).__name__}" for name, component in self.components.items()]
        origin = f" from {self.origin}" if self.origin else ""
        return "\n".join([f"{type(self).__name__}{origin}", *parts])
