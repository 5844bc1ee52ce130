"""Methods that scripts for the reference call on any pipeline, besides those that are the pipeline's own.

Some act, some have nothing to do here and say so once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from PIL.Image import Image

from kandinsky22.errors import InputError
from kandinsky22.inputs.image_processor import VaeImageProcessor
from kandinsky22.inputs.images import Array
from kandinsky22.models.attention_settings import AttentionSettings
from kandinsky22.models.base import LAYOUT_VERSION
from kandinsky22.pipelines.component_io import index_entry

if TYPE_CHECKING:
    from kandinsky22.models import VQModel


class PipelineConfig(Mapping[str, Any]):
    """Entries of the `model_index.json` of a pipeline: `config.name`, `config["name"]` and `dict(config)` all work.

    Args:
        entries: The entries of the file.
    """

    def __init__(self, entries: Mapping[str, Any]) -> None:
        self._entries = dict(entries)

    def __getitem__(self, name: str) -> Any:
        return self._entries[name]

    def __getattr__(self, name: str) -> Any:
        if name == "_entries" or name not in self._entries:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._entries!r})"


class ReferenceMethodsMixin(AttentionSettings):
    """Mixin with the reference's generic methods."""

    _optional_components: ClassVar[list[str]] = []
    origin: str | None
    hf_device_map: dict[str, str] | None
    _components: dict[str, Any]

    # What a pipeline is

    @property
    def config(self) -> PipelineConfig:
        """Library and class of each component, as in `model_index.json`."""
        entries = {name: tuple(index_entry(name, part)) for name, part in self._components.items()}
        named = {} if self.origin is None else {"_name_or_path": self.origin}
        return PipelineConfig(
            {"_class_name": type(self).__name__, "_diffusers_version": LAYOUT_VERSION, **named, **entries}
        )

    @property
    def name_or_path(self) -> str | None:
        """Name of the checkpoint that the pipeline was loaded from: another name of `origin`."""
        return self.origin

    # Memory

    def enable_attention_slicing(self, slice_size: str | int | None = "auto") -> None:
        """Do nothing: attention here never holds the scores of all tokens, which slicing would avoid.

        Args:
            slice_size: Ignored.
        """
        self.set_attention_slice(slice_size)

    def disable_attention_slicing(self) -> None:
        """Do nothing, see `enable_attention_slicing`."""

    def enable_vae_slicing(self) -> None:
        """Decode images of a batch one at a time, see `VQModel.enable_slicing`."""
        self._autoencoder("enable_vae_slicing").enable_slicing()

    def disable_vae_slicing(self) -> None:
        """Decode all images of a batch together again."""
        self._autoencoder("disable_vae_slicing").disable_slicing()

    def enable_vae_tiling(self) -> None:
        """Decode images in tiles, see `VQModel.enable_tiling`."""
        self._autoencoder("enable_vae_tiling").enable_tiling()

    def disable_vae_tiling(self) -> None:
        """Decode images as a whole again."""
        self._autoencoder("disable_vae_tiling").disable_tiling()

    def _autoencoder(self, method: str) -> VQModel:
        movq = self._components.get("movq")
        if movq is None:
            raise InputError(f"{method}: {type(self).__name__} has no movq, the autoencoder of the decoders")
        model: VQModel = movq
        return model

    def reset_device_map(self) -> None:
        """Undo `from_pretrained(device_map=...)`: end offloading and move all networks to the CPU."""
        if self.hf_device_map is None:
            return
        pipe: Any = self  # the methods are those of OffloadMixin
        pipe.remove_all_hooks()
        pipe.to("cpu")
        self.hf_device_map = None

    # Images

    @staticmethod
    def numpy_to_pil(images: Array) -> list[Image]:
        """Return PIL images.

        Args:
            images: One image (H, W, C) or several (N, H, W, C) in [0, 1], with C = 1 or 3.
        """
        return VaeImageProcessor.numpy_to_pil(images)
