"""Last stage of the training on shapes: saving the networks as the checkpoint folders that the package ships."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kandinsky22.models.prior import PriorTransformer
from kandinsky22.pipelines.prior import KandinskyV22PriorPipeline
from kandinsky22.schedulers import UnCLIPScheduler
from kandinsky22.training import decoder, prior, shared_unet
from kandinsky22.training.clip import Towers, build_tokenizer, image_processor
from kandinsky22.training.loop import is_finished
from kandinsky22.training.movq import load_movq
from kandinsky22.training.packaging import DecoderUNets, embedded_weights, save_decoders, save_history

# These settings were selected on other prompts than those of the benchmark. With about a hundred prompts per setting,
# differences hardly exceed chance.
PRIOR_DEFAULTS: dict[str, Any] = {"num_inference_steps": 25, "guidance_scale": 2.0}
# Guidance ends where little noise remains: image to image at low strength then preserves its input.
DECODER_DEFAULTS: dict[str, Any] = {"num_inference_steps": 40, "guidance_scale": 2.0, "guidance_interval": [0.0, 0.7]}
STAGE_FOLDERS = ("clip", "movq/autoencoder", "prior", "decoder", "movq/decoder", "shared")


def assemble(out: Path, folder: Path | None = None) -> None:
    """Save prior and decoders in half precision.

    If the stage of the shared UNet is not finished, only the decoder of text to image is saved.

    Args:
        out: Folder of all stages.
        folder: Folder to save into; None takes that of the embedded model inside the package.
    """
    folder = embedded_weights() if folder is None else folder
    out = Path(out)
    towers = Towers.load(out / "clip" / "model")
    _save_prior(out, towers, folder / "prior")
    if is_finished(out / "shared"):
        unets = DecoderUNets.of_shared(shared_unet.load_shared(out / "shared"))
    else:
        unets = DecoderUNets(decoder.load_decoder(out / "decoder"))
    save_decoders(unets, load_movq(out / "movq"), decoder.SCHEDULER, DECODER_DEFAULTS, folder)
    save_history(out, STAGE_FOLDERS, folder)


def _save_prior(out: Path, towers: Towers, folder: Path) -> None:
    tokenizer = build_tokenizer(folder / "tokenizer")
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
