"""What every network has in common: a config that reads like its constructor, and (strict, lean) files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn

from kandinsky22.config import Config

M = TypeVar("M", bound="Model")


class Model(nn.Module):
    """A network with a `config`. Subclasses name their `config_class` and build themselves from `self.config`.

    Networks may be built on the meta device and filled afterwards, so a subclass computes nothing from tensor values
    in its constructor. Buffers that are not part of a checkpoint are set in `reset_buffers`, which is called again
    once the weights are in place.
    """

    config_class: ClassVar[type[Config]] = Config
    config_name: ClassVar[str] = "config.json"

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.config: Any = self.config_class.parse(config, owner=type(self).__name__)

    @classmethod
    def from_config(cls: type[M], config: Mapping[str, Any]) -> M:
        """A freshly initialised network of this config (a mapping or another network's `config`)."""
        return cls(**{name: value for name, value in config.items() if not name.startswith("_")})

    @property
    def dtype(self) -> torch.dtype:
        """Type of the floating-point parameters."""
        return next((p.dtype for p in self.parameters() if p.is_floating_point()), torch.float32)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    def num_parameters(self, *, only_trainable: bool = False) -> int:
        """How many numbers the network learns."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not only_trainable)

    def reset_buffers(self) -> None:
        """Set the buffers that no checkpoint holds. Nothing to do for networks without such buffers."""
