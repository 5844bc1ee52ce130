"""Settings of CLIP's towers."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from kandinsky22.checkpoints.atomic_files import checked_save_path, write_json
from kandinsky22.errors import ConfigError, invalid

C = TypeVar("C", bound="CLIPTowerConfig")


def quick_gelu(features: Tensor) -> Tensor:
    """Return an approximation of GELU, with which OpenAI's CLIP was trained.

    Args:
        features: Any tensor.
    """
    return features * torch.sigmoid(1.702 * features)


def _tanh_gelu(features: Tensor) -> Tensor:
    return functional.gelu(features, approximate="tanh")


ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "quick_gelu": quick_gelu,
    "gelu_new": _tanh_gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
    "relu": functional.relu,
    "silu": functional.silu,
    "swish": functional.silu,
    "tanh": torch.tanh,
}


def _as_dtype(name: str, value: Any) -> torch.dtype | None:
    """Return a type of weights that may be named; None for "auto", which is the type of the weight files."""
    dtype = getattr(torch, value.removeprefix("torch."), value) if isinstance(value, str) and value != "auto" else value
    if isinstance(dtype, torch.dtype):
        return dtype
    if value not in (None, "auto"):
        raise invalid(name, value, "a torch.dtype, its name, 'auto' or None", error=ConfigError)
    return None


class CLIPTowerConfig:
    """Settings of a tower, as attributes. Entries of the file that the layers do not use are kept, and saved again.

    Args:
        **settings: Settings by name, which replace the defaults; `dtype` as text becomes a `torch.dtype`.
    """

    defaults: ClassVar[Mapping[str, Any]] = {
        "hidden_size": 512,
        "intermediate_size": 2048,
        "projection_dim": 512,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "attention_dropout": 0.0,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "return_dict": True,
        "output_hidden_states": False,
        "output_attentions": False,
    }
    # entries that every config of transformers has, and that its files leave out
    implied: ClassVar[Mapping[str, Any]] = {
        "return_dict": True,
        "output_hidden_states": False,
        "output_attentions": False,
    }
    hidden_size: int
    intermediate_size: int
    projection_dim: int
    num_hidden_layers: int
    num_attention_heads: int
    hidden_act: str
    layer_norm_eps: float
    return_dict: bool
    output_hidden_states: bool
    dtype: torch.dtype | None
    _name_or_path: str

    def __init__(self, **settings: Any) -> None:
        name = type(self).__name__
        if (use_return_dict := settings.pop("use_return_dict", True)) is not True:
            raise invalid(f"{name}: use_return_dict", use_return_dict, "True", "set return_dict", error=ConfigError)
        names = ("dtype", "torch_dtype")
        dtypes = [_as_dtype(f"{name}: {entry}", settings.pop(entry, None)) for entry in names]
        vars(self).update({**self.defaults, **settings, "dtype": dtypes[0] or dtypes[1]})
        self._name_or_path = ""
        width, heads = self.hidden_size, self.num_attention_heads
        if width % heads:
            expected = f"a multiple of num_attention_heads={heads}"
            raise invalid(f"{name}: hidden_size", width, expected, error=ConfigError)
        if self.hidden_act not in ACTIVATIONS:
            raise invalid(f"{name}: hidden_act", self.hidden_act, f"one of {', '.join(ACTIVATIONS)}", error=ConfigError)

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """Type of the weights, by the name of earlier releases of transformers."""
        return self.dtype

    @property
    def name_or_path(self) -> str:
        """Folder that the tower was loaded from; empty for one that was created in memory."""
        return self._name_or_path

    def to_dict(self) -> dict[str, Any]:
        """Return the entries of `config.json`."""
        settings = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        # releases of transformers before 4.56 read only this name of the type
        settings["torch_dtype"] = None if self.dtype is None else str(self.dtype).removeprefix("torch.")
        implied = {name for name, value in self.implied.items() if settings.get(name) is value}
        return {n: value for n, value in settings.items() if n not in {"dtype", *implied} and value is not None}

    @property
    def use_return_dict(self) -> bool:
        """Whether results have names, by the name of earlier releases of transformers."""
        return self.return_dict

    def to_json_string(self, use_diff: bool = True) -> str:
        """Return the content of `config.json`.

        Args:
            use_diff: Accepted for transformers' sake: all entries are returned.
        """
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_dict(cls: type[C], config_dict: Mapping[str, Any], **settings: Any) -> C:
        """Return a config.

        Args:
            config_dict: Settings by name.
            **settings: Settings that replace them.

        Raises:
            ConfigError: A setting is invalid.
            InputError: `config_dict` is not a mapping.
        """
        if not isinstance(config_dict, Mapping):
            raise invalid("config_dict", config_dict, "a mapping of settings by name")
        return cls(**{**config_dict, **settings})

    def update(self, config_dict: Mapping[str, Any]) -> None:
        """Replace settings. Layers that exist do not change.

        Args:
            config_dict: Settings by name.

        Raises:
            ConfigError: A setting is invalid. The config has not changed then.
            InputError: `config_dict` is not a mapping.
        """
        if not isinstance(config_dict, Mapping):
            raise invalid("config_dict", config_dict, "a mapping of settings by name")
        current = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        if "torch_dtype" in config_dict:  # the other name of the same setting
            del current["dtype"]
        path = self._name_or_path
        vars(self).update(vars(type(self)(**{**current, **config_dict})))
        self._name_or_path = path

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write `config.json`.

        Args:
            save_directory: Folder, which is created if it does not exist.

        Raises:
            CheckpointError: The file cannot be written.
            InputError: `save_directory` is not a path.
        """
        write_json(checked_save_path(save_directory) / "config.json", self.to_dict())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CLIPTowerConfig) and type(other) is type(self) and self.to_dict() == other.to_dict()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.to_dict().items())})"


class CLIPTextConfig(CLIPTowerConfig):
    """Settings of the text tower.

    Args:
        **settings: Settings by name, which replace the defaults.
    """

    defaults: ClassVar[Mapping[str, Any]] = {
        **CLIPTowerConfig.defaults,
        "model_type": "clip_text_model",
        "vocab_size": 49408,
        "max_position_embeddings": 77,
        "pad_token_id": 1,
        "bos_token_id": 49406,
        "eos_token_id": 49407,
    }
    vocab_size: int
    max_position_embeddings: int
    eos_token_id: int

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        if self.eos_token_id is None:  # the embedding of a text is read at its last token
            raise invalid("CLIPTextConfig: eos_token_id", None, "the id of a token", error=ConfigError)


class CLIPVisionConfig(CLIPTowerConfig):
    """Settings of the vision tower."""

    defaults: ClassVar[Mapping[str, Any]] = {
        **CLIPTowerConfig.defaults,
        "model_type": "clip_vision_model",
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_attention_heads": 12,
        "num_channels": 3,
        "image_size": 224,
        "patch_size": 32,
    }
    num_channels: int
    image_size: int
    patch_size: int

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        if self.patch_size > self.image_size:
            expected = f"at most image_size={self.image_size}"
            raise invalid("CLIPVisionConfig: patch_size", self.patch_size, expected, error=ConfigError)
