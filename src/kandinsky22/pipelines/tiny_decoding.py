"""The tiny decoder of pipelines: a network besides their components that decodes latents instead of MoVQ."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kandinsky22.checkpoints.hub import HUB_ID, CheckpointSource
from kandinsky22.checkpoints.weights import select_weight_files
from kandinsky22.errors import CheckpointError, InputError, invalid
from kandinsky22.models.tiny_decoder import SUBFOLDER, TinyDecoder
from kandinsky22.pipelines.network_calls import decode_latents
from kandinsky22.runtime.calls import changing, check_idle
from kandinsky22.runtime.device_offload import remove_offload
from kandinsky22.runtime.network_state import unwrapped

if TYPE_CHECKING:
    from kandinsky22.models import VQModel

SUFFIXES = (".safetensors", ".bin")
TRAIN = "train one with kandinsky22 train tiny-decoder"


class TinyDecoderMixin:
    """Mixin for pipelines with MoVQ: decode latents with a tiny decoder, in a fraction of the time."""

    origin: str | None
    _hub_options: dict[str, Any]
    _components: dict[str, Any]
    _tiny_decoder: TinyDecoder | None = None

    @property
    def tiny_decoder(self) -> TinyDecoder | None:
        """The tiny decoder that decodes latents; None while MoVQ does.

        It moves and is converted with the networks, but is not a component and is not saved with them.
        """
        return self._tiny_decoder

    def enable_tiny_decoder(self, tiny_decoder: str | os.PathLike[str] | TinyDecoder | None = None) -> None:
        """Decode latents with a tiny decoder instead of MoVQ. Images change a little; MoVQ still encodes.

        Args:
            tiny_decoder: The network, which is moved and converted like MoVQ; or its file, its folder, or the folder or
                Hub id of a checkpoint that has it in the folder `tiny_decoder`. None takes that of the checkpoint that
                the pipeline was loaded from.

        Raises:
            InputError: If the pipeline has no MoVQ, or the network was trained for another one.
            CheckpointError: If no tiny decoder is found there, or its files are damaged.
        """
        movq = self._movq_to_replace()
        if isinstance(tiny_decoder, nn.Module):
            network: Any = tiny_decoder
            if not isinstance(unwrapped(network), TinyDecoder):
                raise invalid("tiny_decoder", type(network), "a TinyDecoder, or where to load one from")
            check_fits(unwrapped(network), movq)
            network.to(dtype=movq.dtype)
        else:
            network = self._load_tiny_decoder(tiny_decoder, movq.dtype)
            check_fits(network, movq)
        check_idle(self, "the tiny decoder")
        pipe: Any = self  # the methods are those of OffloadMixin
        if not pipe._offloads():
            network.to(pipe.device)
        self._tiny_decoder = network
        pipe._offload_like_others(SUBFOLDER, network)

    def disable_tiny_decoder(self) -> None:
        """Decode latents with MoVQ again."""
        check_idle(self, "the tiny decoder")
        if self._tiny_decoder is not None:
            with changing(self, "disable_tiny_decoder()", {SUBFOLDER: self._tiny_decoder}):
                remove_offload(self._tiny_decoder)
        self._tiny_decoder = None

    def _movq_to_replace(self) -> VQModel:
        movq = self._components.get("movq")
        if movq is None:
            raise InputError(f"{type(self).__name__} has no movq, the autoencoder whose latents could be decoded")
        network: VQModel = unwrapped(movq)
        return network

    def _load_tiny_decoder(self, source: str | os.PathLike[str] | None, dtype: torch.dtype) -> TinyDecoder:
        if source is not None:
            return load_tiny_decoder(source, dtype)
        if self.origin is None:
            raise InputError(
                "tiny_decoder is required: the pipeline was made of objects, not loaded from a checkpoint that could "
                f"have one; {TRAIN}"
            )
        return load_tiny_decoder(self.origin, dtype, self._hub_options)

    def _decode_latents(self, latents: Tensor) -> Tensor:
        """Return images (batch, 3, H, W), about in [-1, 1]."""
        if self._tiny_decoder is not None:
            pixels: Tensor = self._tiny_decoder(latents.to(unwrapped(self._tiny_decoder).dtype))
            return pixels
        movq = self._movq_to_replace()
        return decode_latents(movq, latents.to(movq.dtype))

    def _check_tiny_decoder(self) -> None:
        """Raise InputError if MoVQ was replaced by one that the tiny decoder does not fit."""
        if self._tiny_decoder is not None:
            check_fits(unwrapped(self._tiny_decoder), self._movq_to_replace())


def check_fits(network: TinyDecoder, movq: VQModel) -> None:
    """Check that a tiny decoder decodes the latents of an autoencoder.

    Args:
        network: The tiny decoder.
        movq: The autoencoder.

    Raises:
        InputError: If it was trained for another one.
    """
    sizes = {
        "latent_channels": (network.config.latent_channels, movq.config.latent_channels),
        "out_channels": (network.config.out_channels, movq.config.out_channels),
        "pixels per latent": (network.upscale_factor, movq.downscale_factor),
    }
    for name, (own, expected) in sizes.items():
        if own != expected:
            raise InputError(f"the tiny decoder does not fit MoVQ: {name} is {own}, and MoVQ's is {expected}; {TRAIN}")
    if not network.belongs_to(movq):
        raise InputError(f"the tiny decoder was trained against another MoVQ than that of the pipeline; {TRAIN}")


def load_tiny_decoder(
    source: str | os.PathLike[str], dtype: torch.dtype, options: Mapping[str, Any] | None = None
) -> TinyDecoder:
    """Return a tiny decoder, on the CPU.

    Args:
        source: See `find_tiny_decoder`.
        dtype: Type to convert the weights to.
        options: Options of `CheckpointSource`, for the Hub; None for the default ones.

    Raises:
        CheckpointError: If no tiny decoder is found there, or its files are damaged.
        InputError: If `source` is not a path.
    """
    path = find_tiny_decoder(source, options)
    if path.is_file():
        return TinyDecoder.from_single_file(path, torch_dtype=dtype)
    return TinyDecoder.from_pretrained(path, torch_dtype=dtype)


def find_tiny_decoder(source: str | os.PathLike[str], options: Mapping[str, Any] | None = None) -> Path:
    """Return the file or the folder of a tiny decoder, after downloading it if it is on the Hub.

    Args:
        source: A file of weights, the folder of the network, or the folder or Hub id of a checkpoint, or "embedded",
            that has it in the folder `tiny_decoder`.
        options: Options of `CheckpointSource`, for the Hub; None for the default ones.

    Raises:
        CheckpointError: If no tiny decoder is found there.
        InputError: If `source` is not a path.
    """
    given: Any = source
    if not isinstance(given, str | os.PathLike) or not os.fspath(given) or "\0" in os.fspath(given):
        raise invalid("tiny_decoder", source, "a TinyDecoder, a file, a folder or a Hub id such as 'owner/name'")
    text = os.fspath(source)
    if os.path.isfile(text):
        return Path(text)
    if not os.path.isdir(text) and (not HUB_ID.fullmatch(text) or text.endswith(SUFFIXES)):
        raise CheckpointError(f"no tiny decoder {text!r}: no such file or folder exists, and it is not a Hub id")
    folder = CheckpointSource(text, **(options or {})).fetch(_needed_files)
    for candidate in (folder / SUBFOLDER, folder):
        if (candidate / TinyDecoder.config_name).is_file():
            return candidate
    raise CheckpointError(
        f"{text} has no tiny decoder: neither a folder {SUBFOLDER} nor a {TinyDecoder.config_name}; {TRAIN}"
    )


def _needed_files(names: list[str]) -> list[str]:
    """Return the files of the tiny decoder among all files of a repository."""
    for prefix in (f"{SUBFOLDER}/", ""):
        inside = [name[len(prefix) :] for name in names if name.startswith(prefix)]
        if TinyDecoder.config_name in inside:
            return [prefix + name for name in (TinyDecoder.config_name, *select_weight_files(inside))]
    return []
