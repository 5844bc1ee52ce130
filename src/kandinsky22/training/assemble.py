"""The last stage: the trained networks become the two checkpoint folders that the package ships."""

from __future__ import annotations

import importlib.resources
import json
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPTokenizer

from kandinsky22.models.prior import PriorTransformer
from kandinsky22.pipelines.decoder import KandinskyV22Pipeline
from kandinsky22.pipelines.prior import KandinskyV22PriorPipeline
from kandinsky22.schedulers import DDPMScheduler, UnCLIPScheduler
from kandinsky22.training import decoder, prior
from kandinsky22.training.clip import Towers, build_tokenizer, image_processor
from kandinsky22.training.loop import SUMMARY
from kandinsky22.training.movq import load_movq

# Chosen among seven settings on 100 to 120 prompts each (seed 5), where differences are hardly above chance.
PRIOR_DEFAULTS: dict[str, Any] = {"num_inference_steps": 25, "guidance_scale": 2.0}
DECODER_DEFAULTS: dict[str, Any] = {"num_inference_steps": 40, "guidance_scale": 2.0}
STAGES = ("clip", "movq/autoencoder", "prior", "decoder", "movq/decoder")


def embedded_weights() -> Path:
    """Where the package keeps the embedded model."""
    return Path(str(importlib.resources.files("kandinsky22"))) / "embedded" / "weights"


def assemble(out: Path, folder: Path | None = None) -> None:
    """Write prior and decoder, in half precision, from the stages under `out`; into the package unless told where."""
    folder = embedded_weights() if folder is None else folder
    out = Path(out)
    towers = Towers.load(out / "clip" / "model")
    _save_prior(out, towers, folder / "prior")
    pipe = KandinskyV22Pipeline(
        unet=decoder.load_decoder(out / "decoder").half(),
        scheduler=DDPMScheduler(**decoder.SCHEDULER),
        movq=load_movq(out / "movq").half(),
    )
    pipe.generation_defaults = DECODER_DEFAULTS
    pipe.save_pretrained(folder / "decoder")
    (folder / "training.json").write_text(json.dumps(history(out), indent=2) + "\n", encoding="utf-8")


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
    stages = {stage: json.loads((out / stage / SUMMARY).read_text(encoding="utf-8")) for stage in STAGES}
    seconds = round(sum(stage["seconds"] for stage in stages.values()))
    return {"torch": str(torch.__version__), "seconds": seconds, "stages": stages}
