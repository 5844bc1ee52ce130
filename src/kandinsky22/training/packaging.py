"""Saving trained networks as the checkpoint folders of the embedded model.

The weights of each UNet are in two files. The first file holds the weights that all three UNets share.
Inside the package, the folders of the variants do not contain files that are identical to the decoder's.
"""

from __future__ import annotations

import importlib.resources
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kandinsky22.checkpoints.weights import write_tensors
from kandinsky22.models.movq import VQModel
from kandinsky22.models.unet import UNet2DConditionModel
from kandinsky22.pipelines.decoder import (
    KandinskyV22ControlnetPipeline,
    KandinskyV22InpaintPipeline,
    KandinskyV22Pipeline,
)
from kandinsky22.pipelines.decoder_base import DecoderPipeline
from kandinsky22.schedulers import DDPMScheduler
from kandinsky22.training import shared_network
from kandinsky22.training.loop import SUMMARY, is_finished
from kandinsky22.training.shared_network import SharedUNet

CARD = """\
---
license: apache-2.0
prior: ../prior
---
A decoder of the embedded model of kandinsky22. The [model card](../README.md) describes the embedded model.
"""


def embedded_weights() -> Path:
    """Return the folder of the embedded model inside the package."""
    return Path(str(importlib.resources.files("kandinsky22"))) / "embedded" / "weights"


@dataclass(frozen=True)
class DecoderUNets:
    """The UNets of the three kinds of decoders; None leaves a kind out.

    Attributes:
        text_to_image: UNet of text to image and image to image.
        inpaint: UNet of inpainting.
        hint: UNet with hints.
    """

    text_to_image: UNet2DConditionModel
    inpaint: UNet2DConditionModel | None = None
    hint: UNet2DConditionModel | None = None

    @classmethod
    def of_shared(cls, shared: SharedUNet) -> DecoderUNets:
        """Return the UNets that a shared network contains.

        Args:
            shared: Trained network.
        """
        return cls(
            shared.variant({}),
            shared.variant(shared_network.INPAINT_CONFIG),
            shared.variant(shared_network.HINT_CONFIG),
        )


def save_decoders(
    unets: DecoderUNets, movq: VQModel, scheduler: Mapping[str, Any], defaults: Mapping[str, Any], folder: Path
) -> None:
    """Save the decoders in half precision.

    Folders of kinds without a UNet are removed, since they depend on weights of a decoder that no longer exists.

    Args:
        unets: The UNets.
        movq: MoVQ of all decoders.
        scheduler: Config of the scheduler.
        defaults: Default arguments of the pipelines' calls.
        folder: Folder of the model; the decoders are its subfolders "decoder", "inpaint" and "control".
    """
    kinds: tuple[tuple[str, type[DecoderPipeline], UNet2DConditionModel | None], ...] = (
        ("decoder", KandinskyV22Pipeline, unets.text_to_image),
        ("inpaint", KandinskyV22InpaintPipeline, unets.inpaint),
        ("control", KandinskyV22ControlnetPipeline, unets.hint),
    )
    for name, kind, unet in kinds:
        if unet is None:
            shutil.rmtree(folder / name, ignore_errors=True)
            continue
        pipe = kind(unet.half(), DDPMScheduler(**scheduler), movq.half())
        pipe.generation_defaults = dict(defaults)
        _save_decoder(pipe, unet, folder / name)
    if folder == embedded_weights():
        for name in ("inpaint", "control"):
            remove_shared_files(folder / "decoder", folder / name)


def _save_decoder(pipe: DecoderPipeline, unet: UNet2DConditionModel, folder: Path) -> None:
    pipe.save_pretrained(folder)
    _remove_timestep_spacing(folder / "scheduler" / "scheduler_config.json")
    unshared: dict[str, Tensor] = {}
    shared: dict[str, Tensor] = {}
    for name, tensor in unet.state_dict().items():
        (unshared if name.startswith(shared_network.UNSHARED_PREFIXES) else shared)[name] = tensor
    size = sum(tensor.nbytes for tensor in shared.values())
    write_tensors(folder / "unet", shared | unshared, variant=None, max_shard_size=size, safe=True)
    (folder / "README.md").write_text(CARD, encoding="utf-8")


def _remove_timestep_spacing(path: Path) -> None:
    """Let each scheduler class use its default spacing of timesteps.

    Training does not depend on a spacing, and that of DDPM starts far below pure noise if there are few steps.
    """
    settings = json.loads(path.read_text(encoding="utf-8"))
    del settings["timestep_spacing"]
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def remove_shared_files(shared: Path, folder: Path) -> None:
    """Remove the files of a variant's components that are identical to the decoder's, where loading falls back to them.

    Args:
        shared: Folder of the decoder.
        folder: Folder of the variant.
    """
    for file in sorted(folder.glob("*/*")):
        if (twin := shared / file.relative_to(folder)).is_file() and twin.read_bytes() == file.read_bytes():
            file.unlink()
            if not any(file.parent.iterdir()):
                file.parent.rmdir()


def training_history(out: Path, stages: Sequence[str]) -> dict[str, Any]:
    """Return how the finished stages were trained: their summaries, the total time in seconds, the version of torch.

    Args:
        out: Folder of all stages.
        stages: Folders of the stages, relative to `out`.
    """
    summaries = {
        stage: json.loads((out / stage / SUMMARY).read_text(encoding="utf-8"))
        for stage in stages
        if is_finished(out / stage)
    }
    seconds = round(sum(stage["seconds"] for stage in summaries.values()))
    return {"torch": str(torch.__version__), "seconds": seconds, "stages": summaries}


def save_history(out: Path, stages: Sequence[str], folder: Path) -> None:
    """Write the training history into the model's folder.

    Args:
        out: Folder of all stages.
        stages: Folders of the stages, relative to `out`.
        folder: Folder of the model.
    """
    history = json.dumps(training_history(out, stages), indent=2) + "\n"
    (folder / "training.json").write_text(history, encoding="utf-8")
