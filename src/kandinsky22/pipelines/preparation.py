"""Prepared checkpoints: packed weights of prior, UNet and MoVQ next to the weights themselves."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kandinsky22 import models
from kandinsky22.checkpoints.atomic_files import checked_save_path, read_json
from kandinsky22.checkpoints.cache_folder import signing_key
from kandinsky22.checkpoints.weights import find_weight_files
from kandinsky22.errors import CheckpointError
from kandinsky22.kernels import packed_memory
from kandinsky22.runtime.calls import loading_networks
from kandinsky22.runtime.prepared import NO_KEY, PACKED_FILE, write_packed

NETWORKS = {"prior": models.PriorTransformer, "unet": models.UNet2DConditionModel, "movq": models.VQModel}
NOTHING_PACKED = (
    "nothing was packed: this machine multiplies its types without packed weights, or packing is switched off "
    "(optimisations, KANDINSKY22_DISABLE)"
)
LATENT_SIDE = 64  # of pictures with 512 x 512 pixels; the config of a UNet may have another one


def pack_checkpoint(folder: Path) -> list[str]:
    """Write the packed weights of the networks of a checkpoint, in the type in which the weights are stored.

    Each network runs once. Networks of a type that oneDNN does not multiply here, and those of another quantization
    than "int8-static", are left out.

    Args:
        folder: Folder of a pipeline.

    Returns:
        Names of the components that were prepared.

    Raises:
        CheckpointError: This machine cannot map packed weights from files, or a file cannot be written.
    """
    check_preparation()
    prepared, side = [], _latent_side(folder)
    for name in read_json(folder / "model_index.json"):
        network_class: Any = NETWORKS.get(name.removeprefix("prior_"))
        component = folder / name
        if network_class is None or not component.is_dir():
            continue
        try:
            (component / PACKED_FILE).unlink(missing_ok=True)
        except OSError as error:
            raise CheckpointError(f"cannot replace {component / PACKED_FILE}: {error.strerror or error}") from error
        with loading_networks(), torch.no_grad():
            network = network_class.from_pretrained(component, torch_dtype="auto")
            _run_once(network, side)
        if write_packed(network, component, find_weight_files(component)):
            prepared.append(name)
    return prepared


class PreparedMixin:
    """Mixin for pipelines: saves prepared checkpoints."""

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write all components in the published layout.

        Args:
            save_directory: Folder to write to.
        """
        raise NotImplementedError

    def save_prepared(self, save_directory: str | os.PathLike[str]) -> None:
        """Write all components in the published layout, and next to them weights as this machine multiplies them.

        `from_pretrained` maps the packed weights from their files, which processes share, so that nothing is converted
        or packed when the checkpoint is used. They serve this user and this kind of machine; on others the checkpoint
        works as any other. Networks quantized by `quantize("int8-static")` are packed as well.

        Args:
            save_directory: Folder to write to.

        Raises:
            CheckpointError: If the folder cannot be written, or this machine has no packed weights for the type of the
                pipeline.
            InputError: If an argument is invalid.
        """
        folder = checked_save_path(save_directory)
        check_preparation()
        self.save_pretrained(folder)
        if not pack_checkpoint(folder):
            raise CheckpointError(f"{folder} is complete, but {NOTHING_PACKED}")


def check_preparation() -> None:
    """Check that packed weights can be written.

    Raises:
        CheckpointError: The system or the installed torch cannot map them, or the signing key cannot be created.
    """
    if packed_memory.fingerprint() is None:
        raise CheckpointError("prepared checkpoints need Linux, an x86 CPU, and a release of torch that can map them")
    if signing_key(create=True) is None:
        raise CheckpointError(NO_KEY)


def _latent_side(folder: Path) -> int:
    """Return the side of the latents of pictures in the model's own size."""
    config = folder / "unet" / models.UNet2DConditionModel.config_name
    side = read_json(config).get("sample_size") if config.is_file() else None
    # a multiple of 8 has complete features at each of up to four resolution levels
    return side if isinstance(side, int) and 0 < side <= LATENT_SIDE and side % 8 == 0 else LATENT_SIDE


def _run_once(network: nn.Module, side: int) -> None:
    """Run a network as pipelines do for a picture of the model's own size, so that its layers pack their weights."""
    config: Any = network.config
    dtype = next(p.dtype for p in network.parameters() if p.is_floating_point())
    if isinstance(network, models.PriorTransformer):
        rows = torch.zeros(2, config.embedding_dim, dtype=dtype)
        states = torch.zeros(2, config.num_embeddings, config.embedding_dim, dtype=dtype)
        network(rows, 0, proj_embedding=rows, encoder_hidden_states=states)
    elif isinstance(network, models.VQModel):
        network.decode(torch.zeros(1, config.latent_channels, side, side, dtype=dtype))
    else:
        condition = {"image_embeds": torch.zeros(2, config.encoder_hid_dim, dtype=dtype)}
        channels = config.in_channels
        if config.addition_embed_type == "image_hint":
            condition["hint"] = torch.zeros(2, 3, 8 * side, 8 * side, dtype=dtype)
            channels = 4
        latents = torch.zeros(2, channels, side, side, dtype=dtype)
        network(latents, 0, encoder_hidden_states=None, added_cond_kwargs=condition)
