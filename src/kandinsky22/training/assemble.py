"""The last stage: the trained networks become the checkpoint folders that the package ships.

The UNets' weights are in two files: what all three have in common, the same file to the byte in each, and their own.
Inside the package the variants leave what they share to the decoder.
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
    DecoderPipeline,
    KandinskyV22ControlnetPipeline,
    KandinskyV22InpaintPipeline,
    KandinskyV22Pipeline,
)
from kandinsky22.pipelines.prior import KandinskyV22PriorPipeline
from kandinsky22.schedulers import DDPMScheduler, UnCLIPScheduler
from kandinsky22.training import decoder, prior, shared_unet
from kandinsky22.training.clip import Towers, build_tokenizer, image_processor
from kandinsky22.training.loop import SUMMARY, finished
from kandinsky22.training.movq import load_movq

# Chosen on other prompts than the benchmark's, a hundred or so a setting, where differences are hardly above chance.
PRIOR_DEFAULTS: dict[str, Any] = {"num_inference_steps": 25, "guidance_scale": 2.0}
# Guidance ends where little noise is left: image to image at low strength then keeps to its picture.
DECODER_DEFAULTS: dict[str, Any] = {"num_inference_steps": 40, "guidance_scale": 2.0, "guidance_interval": [0.0, 0.7]}
CARD = """\
---
license: apache-2.0
prior: ../prior
---
Decoder of the embedded model of kandinsky22; the [card](../README.md) beside this folder describes the whole.
"""
STAGES = ("clip", "movq/autoencoder", "prior", "decoder", "movq/decoder", "shared")


def embedded_weights() -> Path:
    """Where the package keeps the embedded model."""
    return Path(str(importlib.resources.files("kandinsky22"))) / "embedded" / "weights"


def assemble(out: Path, folder: Path | None = None) -> None:
    """Write prior and decoders, in half precision, from the stages under `out`; into the package unless told where.

    Without the stage that all of them share, which must be finished or not be there, there is a decoder but none of its
    variants: their folders are removed, since they would share weights of a decoder that is gone.
    """
    folder = embedded_weights() if folder is None else folder
    out = Path(out)
    towers = Towers.load(out / "clip" / "model")
    _save_prior(out, towers, folder / "prior")
    movq = load_movq(out / "movq").half()
    if finished(out / "shared"):
        shared = shared_unet.load_shared(out / "shared")
        plain, inpaint, hint = (shared.part(changes) for changes in ({}, shared_unet.INPAINT, shared_unet.HINT))
    else:
        plain, inpaint, hint = decoder.load_decoder(out / "decoder"), None, None
    _save_decoder(KandinskyV22Pipeline, plain, movq, folder / "decoder")
    _save_decoder(KandinskyV22InpaintPipeline, inpaint, movq, folder / "inpaint")
    _save_decoder(KandinskyV22ControlnetPipeline, hint, movq, folder / "control")
    if folder == embedded_weights():
        for name in ("inpaint", "control"):
            leave_to(folder / "decoder", folder / name)
    (folder / "training.json").write_text(json.dumps(history(out), indent=2) + "\n", encoding="utf-8")


def _save_decoder(kind: type[DecoderPipeline], unet: UNet2DConditionModel | None, movq: VQModel, folder: Path) -> None:
    if unet is None:
        shutil.rmtree(folder, ignore_errors=True)
        return
    pipe = kind(unet.half(), DDPMScheduler(**decoder.SCHEDULER), movq)
    pipe.generation_defaults = DECODER_DEFAULTS
    pipe.save_pretrained(folder)
    _leave_spacing_open(folder / "scheduler" / "scheduler_config.json")
    own: dict[str, Tensor] = {}
    common: dict[str, Tensor] = {}
    for name, tensor in unet.state_dict().items():
        (own if name.startswith(shared_unet.OWN) else common)[name] = tensor
    size = sum(tensor.nbytes for tensor in common.values())
    write_tensors(folder / "unet", common | own, variant=None, max_shard_size=size, safe=True)
    (folder / "README.md").write_text(CARD, encoding="utf-8")


def _leave_spacing_open(path: Path) -> None:
    """Let each class of schedulers space its timesteps as it does by itself: DDPM's spacing, of which training knows
    nothing, starts few steps far below pure noise."""
    settings = json.loads(path.read_text(encoding="utf-8"))
    del settings["timestep_spacing"]
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def leave_to(shared: Path, folder: Path) -> None:
    """Take out of a variant's components all that is the decoder's to the byte, which loading finds there."""
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


def history(out: Path) -> dict[str, Any]:
    """How each stage was trained: steps, seconds, parameters, settings."""
    stages = {
        stage: json.loads((out / stage / SUMMARY).read_text(encoding="utf-8"))
        for stage in STAGES
        if finished(out / stage)
    }
    seconds = round(sum(stage["seconds"] for stage in stages.values()))
    return {"torch": str(torch.__version__), "seconds": seconds, "stages": stages}
