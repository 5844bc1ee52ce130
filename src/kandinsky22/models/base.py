"""Base class of the networks: a config with the constructor's arguments, and strict loading from files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn

from kandinsky22.checkpoints.atomic_files import read_json, write_json
from kandinsky22.checkpoints.hub import CheckpointSource, embedded_fallback_folder, model_folder
from kandinsky22.checkpoints.weights import find_weight_files, read_tensors, select_weight_files, write_tensors
from kandinsky22.config import Config
from kandinsky22.errors import CheckpointError, ConfigError, invalid
from kandinsky22.kernels import host_memory
from kandinsky22.runtime import quantize

M = TypeVar("M", bound="Model")
LAYOUT_VERSION = "0.42.0"  # release of the reference whose checkpoint layout is written
SHOWN_NAMES = 8  # names listed per kind of problem when weights do not fit


class Model(nn.Module):
    """Network with a `config`. Subclasses set `config_class` and build their layers from `self.config`.

    Networks may be built on the meta device and filled afterwards, therefore a subclass computes nothing from tensor
    values in its constructor. Buffers that are not part of a checkpoint are set in `reset_buffers`, which is called
    again once the weights are loaded.

    Attributes:
        config_class: Class of the config.
        config_name: File name of the config in a checkpoint folder.
        compiled_blocks: Classes of the modules that `compile` of a pipeline compiles one by one.
        config: The constructor's arguments, an instance of `config_class`.
    """

    config_class: ClassVar[type[Config]] = Config
    config_name: ClassVar[str] = "config.json"
    compiled_blocks: ClassVar[tuple[type[nn.Module], ...]] = ()

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.config: Any = self.config_class.parse(config, owner=type(self).__name__)

    @classmethod
    def from_config(cls: type[M], config: Mapping[str, Any]) -> M:
        """Return a newly initialised network.

        Args:
            config: Constructor arguments by name, or another network's `config`.
        """
        return cls(**{name: value for name, value in config.items() if not name.startswith("_")})

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the floating-point parameters."""
        return next((p.dtype for p in self.parameters() if p.is_floating_point()), torch.float32)

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    def num_parameters(self, *, only_trainable: bool = False) -> int:
        """Return the number of parameter elements.

        Args:
            only_trainable: Whether to count only parameters that require gradients.
        """
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
        """Load a network, in evaluation mode, on the CPU.

        Weights that are not converted stay mapped from their file until they are used.

        Args:
            pretrained_model_name_or_path: A folder, a Hub id, or "embedded".
            subfolder: Folder of the network inside the checkpoint; None for the checkpoint's top folder.
            torch_dtype: Type to convert weights to; None for float32, "auto" for the stored type.
            variant: Variant of the weight files, such as "fp16"; None for files without one.
            use_safetensors: True reads only safetensors files, False only pickled ones; None prefers safetensors.
            revision: Branch, tag or commit of a Hub repository; None for the default branch.
            cache_dir: Folder of downloaded files; None for the default one of `huggingface_hub`.
            local_files_only: Whether to use only files that are already on this machine.
            token: Token for private Hub repositories; None or True for the stored one, False for none.

        Returns:
            The network.

        Raises:
            CheckpointError: A file is missing or damaged, or its tensors are not exactly those of the network.
            ConfigError: The config is not one of Kandinsky 2.2, or of another class.
            InputError: `torch_dtype` is not a floating-point type.
        """
        source = CheckpointSource(pretrained_model_name_or_path, revision, cache_dir, token, local_files_only)
        folder = model_folder(
            source, subfolder, lambda names: [cls.config_name, *select_weight_files(names, variant, use_safetensors)]
        )
        dtype = checked_dtype(torch_dtype)
        config = read_json(folder / cls.config_name)
        saved_as = config.get("_class_name", cls.__name__)
        if saved_as != cls.__name__:
            raise ConfigError(f"{folder / cls.config_name} is the config of a {saved_as}, not of a {cls.__name__}")
        try:
            quantization = config.pop(quantize.ENTRY, None)
            with torch.device("meta"):
                model = cls.from_config(config)
                quantize.prepare(model, quantization, dtype)
        except ConfigError as error:
            raise ConfigError(f"{folder / cls.config_name}: {error}") from error
        model._fill(find_weight_files(folder, variant, use_safetensors, embedded_fallback_folder(folder)), dtype)
        return model.eval()

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
        safe_serialization: bool = True,
    ) -> None:
        """Write config and weights in the published layout. Each file is replaced atomically.

        Args:
            save_directory: Folder to write to; it may be the one that the network was loaded from.
            variant: Variant in the names of the weight files, such as "fp16"; None for none.
            max_shard_size: Largest size of a weight file, in bytes or such as "10GB".
            safe_serialization: Whether to write safetensors instead of pickled files.

        Raises:
            CheckpointError: The folder cannot be written.
            InputError: `variant` or `max_shard_size` is invalid.
        """
        folder, config = Path(save_directory), self.config
        if folder.is_file():
            raise CheckpointError(f"{folder} is a file; save_directory must be a folder")
        quantization, tensors = quantize.stored_as(self)
        write_tensors(folder, tensors, variant=variant, max_shard_size=max_shard_size, safe=safe_serialization)
        fixed = {name: values[0] for name, values in config.supported_values.items()}
        about = {"_class_name": type(self).__name__, "_diffusers_version": LAYOUT_VERSION}
        write_json(folder / self.config_name, {**fixed, **config, **quantization, **about})

    def _fill(self, files: Iterable[Path], dtype: torch.dtype | None) -> None:
        """Replace the (meta) parameters by the tensors in `files`, which must be exactly the network's."""
        files = list(files)
        shapes = {name: tuple(tensor.shape) for name, tensor in self.state_dict().items()}
        tensors: dict[str, Tensor] = {}
        unexpected: list[str] = []
        mismatched: list[str] = []
        for file in files:
            for name, tensor in read_tensors(file):
                if name not in shapes:
                    unexpected.append(name)
                    continue
                if tuple(tensor.shape) != shapes[name]:
                    mismatched.append(f"{name} {tuple(tensor.shape)} instead of {shapes[name]}")
                tensors[name] = tensor
                if dtype is not None and tensor.is_floating_point():
                    tensors[name] = host_memory.convert_and_drop(tensor, dtype)
        missing = [name for name in shapes if name not in tensors]
        problems = [
            f"{len(names)} {kind}: {', '.join(names[:SHOWN_NAMES])}{', ...' if len(names) > SHOWN_NAMES else ''}"
            for kind, names in (("missing", missing), ("unexpected", unexpected), ("of the wrong shape", mismatched))
            if names
        ]
        if problems:
            path = files[0] if len(files) == 1 else files[0].parent
            raise CheckpointError(f"{path} does not fit {type(self).__name__}: tensors {'; '.join(problems)}")
        self.load_state_dict(tensors, assign=True)
        self.reset_buffers()
        quantize.arrange(self)
        assert not any(tensor.is_meta for tensor in self.buffers()), "a buffer is not set by reset_buffers"

    def reset_buffers(self) -> None:
        """Set the buffers that are not part of a checkpoint. The base class has none."""


def checked_dtype(torch_dtype: Any) -> torch.dtype | None:
    """Return the dtype that weights are converted to.

    Args:
        torch_dtype: None for float32, "auto" for no conversion, or a floating-point `torch.dtype`.

    Returns:
        The dtype, or None for no conversion.

    Raises:
        InputError: `torch_dtype` is something else.
    """
    if torch_dtype is None:
        return torch.float32
    if torch_dtype == "auto":
        return None
    if not isinstance(torch_dtype, torch.dtype) or not torch_dtype.is_floating_point:
        raise invalid("torch_dtype", torch_dtype, "a floating-point torch.dtype, 'auto' or None (float32)")
    return torch_dtype
