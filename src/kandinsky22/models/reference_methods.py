"""Methods of networks that scripts for the reference call: configs, gradient checkpointing, attention processors."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, TypeVar, cast

from torch import nn

from kandinsky22.checkpoints.atomic_files import checked_save_path, write_json
from kandinsky22.checkpoints.config_file import ConfigFile
from kandinsky22.checkpoints.load_arguments import checked_flag
from kandinsky22.config import Config
from kandinsky22.errors import ConfigError, InputError, invalid
from kandinsky22.models.attention_processors import STANDARD_PROCESSORS, StandardAttention
from kandinsky22.models.attention_settings import AttentionSettings
from kandinsky22.models.checkpointing import Checkpointing
from kandinsky22.verbosity import warn_once

logger = logging.getLogger(__name__)
M = TypeVar("M", bound="ReferenceMethods")

LAYOUT_VERSION = "0.42.0"  # release of the reference whose checkpoint layout is written
# Keys that moving averages (the reference's `EMAModel`) add to the config of the network that they save.
EMA_KEYS = ("decay", "min_decay", "optimization_step", "update_after_step", "use_ema_warmup", "inv_gamma", "power")


class ReferenceMethods(ConfigFile, AttentionSettings, Checkpointing, nn.Module):
    """Base of networks with a config: what the reference's networks have in common.

    Attributes:
        config_class: Class of the config.
        config_name: File name of the config in a checkpoint folder.
        positional: Names of the constructor's arguments in the order of the reference's class.
        supports_gradient_checkpointing: Whether `enable_gradient_checkpointing` is available.
        config: The constructor's arguments, an instance of `config_class`.
    """

    config_class: ClassVar[type[Config]] = Config
    config_name: ClassVar[str] = "config.json"
    positional: ClassVar[tuple[str, ...]] = ()
    supports_gradient_checkpointing: ClassVar[bool] = False
    config: Any

    def _parsed(self, arguments: tuple[Any, ...], settings: Mapping[str, Any]) -> Any:
        """Return the config of a constructor's arguments; keys of moving averages are stored next to it."""
        owner = type(self).__name__
        if len(arguments) > len(self.positional):
            expected = f"at most {len(self.positional)}: {', '.join(self.positional)}"
            raise invalid(f"{owner}: number of positional arguments", len(arguments), expected, error=ConfigError)
        by_position = dict(zip(self.positional, arguments, strict=False))
        if repeated := sorted(by_position.keys() & settings.keys()):
            raise ConfigError(f"{owner}: {', '.join(repeated)} passed both by position and by name: expected once")
        settings = {**by_position, **settings}
        self._bookkeeping: dict[str, Any] = {name: settings.pop(name) for name in EMA_KEYS if name in settings}
        return self.config_class.parse(settings, owner=owner)

    # Configs

    @classmethod
    def from_config(cls: type[M], config: Mapping[str, Any] | str | os.PathLike[str], **overrides: Any) -> M:
        """Return a newly initialised network.

        Args:
            config: Constructor arguments by name, another network's `config`, or a folder with a config.
            **overrides: Settings that replace those of `config`. `return_unused_kwargs=True` returns entries that are
                not settings, too.

        Returns:
            The network; with `return_unused_kwargs=True` a tuple of the network and a dict.

        Raises:
            ConfigError: A setting is unknown or invalid.
            InputError: `config` is not a mapping.
        """
        returns_unused = checked_flag("return_unused_kwargs", overrides.pop("return_unused_kwargs", None))
        if isinstance(config, str | os.PathLike):
            config = cls.load_config(config)
        if not isinstance(config, Mapping):
            raise invalid("config", config, "a mapping of settings by name, or a folder")
        settings = {**config, **overrides}
        names: list[Any] = list(settings)
        if unnamed := [name for name in names if not isinstance(name, str)]:
            raise invalid(f"{cls.__name__}: name of a setting", unnamed[0], "a string", error=ConfigError)
        unused = {name: value for name, value in settings.items() if name.startswith("_") or name in EMA_KEYS}
        network = cls(**{name: value for name, value in settings.items() if not name.startswith("_")})
        return cast(M, (network, unused)) if returns_unused else network

    def save_config(self, save_directory: str | os.PathLike[str]) -> None:
        """Write `config.json` alone.

        Args:
            save_directory: Folder, which is created if it does not exist.

        Raises:
            CheckpointError: The file cannot be written.
            InputError: `save_directory` is not a path.
        """
        write_json(checked_save_path(save_directory) / self.config_name, self.stored_config())

    def stored_config(self) -> dict[str, Any]:
        """Return the entries of `config.json`: settings, and those that have one value in Kandinsky 2.2."""
        fixed = {name: values[0] for name, values in self.config.supported_values.items()}
        about = {"_class_name": type(self).__name__, "_diffusers_version": LAYOUT_VERSION}
        return {**fixed, **self.config, **self._bookkeeping, **about}

    def register_to_config(self, **settings: Any) -> None:
        """Replace settings in the config, without changing the layers, as training scripts do after replacing some.

        Args:
            **settings: Settings by name. Keys of moving averages are stored with the config, names that start with an
                underscore are skipped.

        Raises:
            ConfigError: A setting is unknown or invalid. The config has not changed then.
        """
        bookkeeping = {name: settings.pop(name) for name in EMA_KEYS if name in settings}
        self.config = self.config_class.parse({**self.config, **settings}, owner=type(self).__name__)
        self._bookkeeping = {**self._bookkeeping, **bookkeeping}

    # Training

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether gradient checkpointing is enabled."""
        return any(getattr(module, "gradient_checkpointing", False) for module in self.modules())

    def enable_gradient_checkpointing(self, gradient_checkpointing_func: Callable[..., Any] | None = None) -> None:
        """Store only the inputs of blocks in training steps, and compute the rest again for the gradients.

        Gradients stay the same; a step needs a fraction of the memory and takes about a third longer. It acts on calls
        of the network with gradients.

        Args:
            gradient_checkpointing_func: Called as (module, *args) to run a block; None for torch's.

        Raises:
            InputError: This network has no blocks to checkpoint, or the function is not callable.
        """
        if not self.supports_gradient_checkpointing:
            raise InputError(f"{type(self).__name__} has no blocks whose gradients can be checkpointed")
        function: Any = gradient_checkpointing_func
        if function is not None and not callable(function):
            raise invalid("gradient_checkpointing_func", function, "a function (module, *args) -> output, or None")
        for module in self.modules():
            if isinstance(module, Checkpointing):
                module._gradient_checkpointing_func = gradient_checkpointing_func
                module.gradient_checkpointing = True

    def disable_gradient_checkpointing(self) -> None:
        """Store all features of training steps again."""
        for module in self.modules():
            if isinstance(module, Checkpointing):
                module._gradient_checkpointing_func = None
                module.gradient_checkpointing = False

    # Attention

    @property
    def attn_processors(self) -> dict[str, Any]:
        """Attention processors by path. All are alike: torch's fused attention, which cannot be replaced."""
        return {f"{path}.processor": self._processor() for path in self._attention_paths()}

    def set_attn_processor(self, processor: Any) -> None:
        """Accept the standard attention processors of the reference, which compute what is computed here anyway.

        Args:
            processor: An object of one of the standard classes, recognised by name, or a dict of such objects with
                the keys of `attn_processors`.

        Raises:
            InputError: The processor is of another class, whose computation would be ignored, or a dict has other keys.
        """
        paths = list(self.attn_processors)
        if not isinstance(processor, Mapping) and type(processor).__name__ in STANDARD_PROCESSORS:
            warn_once(logger, "attention processors have no effect: attention is always torch's fused one here")
        if isinstance(processor, Mapping) and processor.keys() != set(paths):
            expected = f"a dict with the {len(paths)} keys of attn_processors"
            raise invalid("processor", processor, expected)
        for each in processor.values() if isinstance(processor, Mapping) else [processor]:
            if type(each).__name__ not in STANDARD_PROCESSORS:
                expected = f"one of {', '.join(STANDARD_PROCESSORS)}"
                advice = "attention is always torch's fused one here: replace an attention layer by a module instead"
                raise invalid("processor", type(each), expected, advice)

    def set_default_attn_processor(self) -> None:
        """Do nothing: the default attention processor is the only one."""

    def fuse_qkv_projections(self) -> None:
        """Do nothing: products here are as fast without fusing the weights of query, key and value."""
        warn_once(logger, "fuse_qkv_projections() has no effect: results and speed are the same without it")

    def unfuse_qkv_projections(self) -> None:
        """Do nothing, see `fuse_qkv_projections`."""

    def _attention_paths(self) -> Iterator[str]:
        return (path for path, module in self.named_modules() if hasattr(module, "to_q"))

    def _processor(self) -> StandardAttention:
        is_unet = any(hasattr(module, "add_k_proj") for module in self.modules())
        return STANDARD_PROCESSORS["AttnAddedKVProcessor2_0" if is_unet else "AttnProcessor2_0"]()
