"""What every network has in common: a config that reads like its constructor, and (strict, lean) files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn

from kandinsky22.checkpoints.atomic_files import read_json, write_json
from kandinsky22.checkpoints.hub import Source, model_folder, shared_folder
from kandinsky22.checkpoints.weights import find_weights, read_tensors, weight_files, write_tensors
from kandinsky22.config import Config
from kandinsky22.errors import CheckpointError, ConfigError, InputError
from kandinsky22.kernels import host_memory
from kandinsky22.runtime import quantize

M = TypeVar("M", bound="Model")
LAYOUT_VERSION = "0.42.0"  # release of the published layout's own library whose files ours are like
SHOWN = 8  # so many names of each kind are listed when weights do not fit


class Model(nn.Module):
    """A network with a `config`. Subclasses name their `config_class` and build themselves from `self.config`.

    Networks may be built on the meta device and filled afterwards, so a subclass computes nothing from tensor values
    in its constructor. Buffers that are not part of a checkpoint are set in `reset_buffers`, which is called again
    once the weights are in place.
    """

    config_class: ClassVar[type[Config]] = Config
    config_name: ClassVar[str] = "config.json"
    compiled_blocks: ClassVar[tuple[type[nn.Module], ...]] = ()  # what compiling a network compiles, one by one

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

    @classmethod
    def from_pretrained(
        cls: type[M],
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        subfolder: str | None = None,
        torch_dtype: torch.dtype | Literal["auto"] | None = None,
        variant: str | None = None,
        use_safetensors: bool | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
    ) -> M:
        """The network of a checkpoint, in evaluation mode, on the CPU.

        The checkpoint is a folder, a Hub id, or "embedded". Weights stay mapped from their file until they are used,
        unless `torch_dtype` (default float32; "auto" keeps what is stored) converts them. Raises CheckpointError if a
        file is missing or damaged or its tensors are not exactly the network's, ConfigError if the config is not one
        of Kandinsky 2.2.
        """
        source = Source(pretrained_model_name_or_path, revision, cache_dir, token, local_files_only)
        folder = model_folder(
            source, subfolder, lambda names: [cls.config_name, *weight_files(names, variant, use_safetensors)]
        )
        dtype = checked_dtype(torch_dtype)
        config = read_json(folder / cls.config_name)
        saved_as = config.get("_class_name", cls.__name__)
        if saved_as != cls.__name__:
            raise ConfigError(f"{folder / cls.config_name} describes a {saved_as}, not a {cls.__name__}")
        try:
            quantization = config.pop(quantize.ENTRY, None)
            with torch.device("meta"):
                model = cls.from_config(config)
                quantize.prepare(model, quantization, dtype)
        except ConfigError as error:
            raise ConfigError(f"{folder / cls.config_name}: {error}") from error
        model._fill(find_weights(folder, variant, use_safetensors, shared_folder(folder)), dtype)
        return model.eval()

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
        safe_serialization: bool = True,
    ) -> None:
        """Write config and weights in the published layout, each file whole or not at all.

        Saving into the folder that the network was loaded from is fine. Raises CheckpointError if the place cannot
        be written, InputError for a `variant` or `max_shard_size` that makes no sense.
        """
        folder, config = Path(save_directory), self.config
        if folder.is_file():
            raise CheckpointError(f"cannot write weights to {folder}: it is a file")
        quantization, tensors = quantize.stored_as(self)
        write_tensors(folder, tensors, variant=variant, max_shard_size=max_shard_size, safe=safe_serialization)
        fixed = {name: accepted[0] for name, accepted in config.only.items()}
        about = {"_class_name": type(self).__name__, "_diffusers_version": LAYOUT_VERSION}
        write_json(folder / self.config_name, {**fixed, **config, **quantization, **about})

    def _fill(self, files: Iterable[Path], dtype: torch.dtype | None) -> None:
        """Take the weights in `files` instead of the (meta) ones; they must be exactly the network's."""
        files = list(files)
        expected = {name: tuple(tensor.shape) for name, tensor in self.state_dict().items()}
        found: dict[str, Tensor] = {}
        unexpected: list[str] = []
        reshaped: list[str] = []
        for file in files:
            for name, tensor in read_tensors(file):
                if name not in expected:
                    unexpected.append(name)
                    continue
                if tuple(tensor.shape) != expected[name]:
                    reshaped.append(f"{name} {tuple(tensor.shape)} instead of {expected[name]}")
                found[name] = tensor
                if dtype is not None and tensor.is_floating_point():
                    found[name] = host_memory.converted(tensor, dtype)
        missing = [name for name in expected if name not in found]
        problems = [
            f"{len(names)} {kind}: {', '.join(names[:SHOWN])}{', ...' if len(names) > SHOWN else ''}"
            for kind, names in (("missing", missing), ("unexpected", unexpected), ("of the wrong shape", reshaped))
            if names
        ]
        if problems:
            where = files[0] if len(files) == 1 else files[0].parent
            raise CheckpointError(f"{where} does not fit {type(self).__name__}: tensors {'; '.join(problems)}")
        self.load_state_dict(found, assign=True)
        self.reset_buffers()
        quantize.arrange(self)
        assert not any(tensor.is_meta for tensor in self.buffers()), "a buffer is not set by reset_buffers"

    def reset_buffers(self) -> None:
        """Set the buffers that no checkpoint holds. Nothing to do for networks without such buffers."""


def checked_dtype(torch_dtype: Any) -> torch.dtype | None:
    """What weights are converted to: float32 unless said otherwise, None ("auto") for what is stored."""
    if torch_dtype is None:
        return torch.float32
    if torch_dtype == "auto":
        return None
    if not isinstance(torch_dtype, torch.dtype) or not torch_dtype.is_floating_point:
        raise InputError(
            f"torch_dtype={torch_dtype!r}; accepted: a floating-point torch.dtype, 'auto' or None (float32)"
        )
    return torch_dtype
