"""Last stage of the training: saving the trained networks as the checkpoint folders that the package ships.

The weights of each UNet are in two files. The first file holds the weights that all three UNets share.
Inside the package, the folders of the variants do not contain files that are identical to the decoder's.
"""

from __future__ import annotations

import importlib.resources
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTokenizer

from kandinsky22.checkpoints.weights import write_tensors
from kandinsky22.models.movq import VQModel
from kandinsky22.models.prior import PriorTransformer
from kandinsky22.models.unet import UNet2DConditionModel
from kandinsky22.pipelines.decoder import (
    KandinskyV22ControlnetPipeline,
    KandinskyV22InpaintPipeline,
    KandinskyV22Pipeline,
)
from kandinsky22.pipelines.decoder_base import DecoderPipeline
from kandinsky22.pipelines.prior import KandinskyV22PriorPipeline
from kandinsky22.schedulers import DDPMScheduler, UnCLIPScheduler
from kandinsky22.training import decoder, prior, shared_network, shared_unet
from kandinsky22.training.clip import Towers, build_tokenizer, image_processor
from kandinsky22.training.loop import SUMMARY, is_finished
from kandinsky22.training.movq import load_movq

# These settings were selected on other prompts than those of the benchmark. With about a hundred prompts per setting,
# differences hardly exceed chance.
PRIOR_DEFAULTS: dict[str, Any] = {"num_inference_steps": 25, "guidance_scale": 2.0}
# Guidance ends where little noise remains: image to image at low strength then preserves its input.
DECODER_DEFAULTS: dict[str, Any] = {"num_inference_steps": 40, "guidance_scale": 2.0, "guidance_interval": [0.0, 0.7]}
CARD = """\
---
license: apache-2.0
prior: ../prior
---
A decoder of the embedded model of kandinsky22. The [model card](../README.md) describes the embedded model.
"""
STAGE_FOLDERS = ("clip", "movq/autoencoder", "prior", "decoder", "movq/decoder", "shared")


def embedded_weights() -> Path:
    """Return the folder of the embedded model inside the package."""
    return Path(str(importlib.resources.files("kandinsky22"))) / "embedded" / "weights"


def assemble(out: Path, folder: Path | None = None) -> None:
    """Save prior and decoders in half precision.

    If the stage of the shared UNet is not finished, only the decoder of text to image is saved. The folders of its
    variants are then removed, since they depend on weights of a decoder that no longer exists.

    Args:
        out: Folder of all stages.
        folder: Folder to save into; None takes that of the embedded model inside the package.
    """
    folder = embedded_weights() if folder is None else folder
    out = Path(out)
    towers = Towers.load(out / "clip" / "model")
    _save_prior(out, towers, folder / "prior")
    movq = load_movq(out / "movq").half()
    inpaint: UNet2DConditionModel | None = None
    hint: UNet2DConditionModel | None = None
    if is_finished(out / "shared"):
        shared = shared_unet.load_shared(out / "shared")
        text_to_image = shared.variant({})
        inpaint, hint = shared.variant(shared_network.INPAINT_CONFIG), shared.variant(shared_network.HINT_CONFIG)
    else:
        text_to_image = decoder.load_decoder(out / "decoder")
    _save_decoder(KandinskyV22Pipeline, text_to_image, movq, folder / "decoder")
    _save_decoder(KandinskyV22InpaintPipeline, inpaint, movq, folder / "inpaint")
    _save_decoder(KandinskyV22ControlnetPipeline, hint, movq, folder / "control")
    if folder == embedded_weights():
        for name in ("inpaint", "control"):
            remove_shared_files(folder / "decoder", folder / name)
    history = json.dumps(training_history(out), indent=2) + "\n"
    (folder / "training.json").write_text(history, encoding="utf-8")


def _save_decoder(kind: type[DecoderPipeline], unet: UNet2DConditionModel | None, movq: VQModel, folder: Path) -> None:
    if unet is None:
        shutil.rmtree(folder, ignore_errors=True)
        return
    pipe = kind(unet.half(), DDPMScheduler(**decoder.SCHEDULER), movq)
    pipe.generation_defaults = DECODER_DEFAULTS
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


def _save_prior(out: Path, towers: Towers, folder: Path) -> None:
    tokenizer: CLIPTokenizer = build_tokenizer(folder / "tokenizer")
    pipe = KandinskyV22PriorPipeline(
        prior=PriorTransformer.from_pretrained(out / "prior" / "model" / "prior").half(),
        image_encoder=towers.vision.half(),
        text_encoder=towers.text.half(),
        tokenizer=tokenizer,
        scheduler=UnCLIPScheduler(**prior.SCHEDULER),
        image_processor=image_processor(),
    )
    pipe.generation_defaults = PRIOR_DEFAULTS
    pipe.save_pretrained(folder)


def training_history(out: Path) -> dict[str, Any]:
    """Return how the finished stages were trained: their summaries, the total time in seconds, the version of torch.

    Args:
        out: Folder of all stages.
    """
    stages = {
        stage: json.loads((out / stage / SUMMARY).read_text(encoding="utf-8"))
        for stage in STAGE_FOLDERS
        if is_finished(out / stage)
    }
    seconds = round(sum(stage["seconds"] for stage in stages.values()))
    return {"torch": str(torch.__version__), "seconds": seconds, "stages": stages}
