"""Last stage of the training on drawings: saving the trained networks as checkpoint folders."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kandinsky22.errors import CheckpointError
from kandinsky22.models.prior import PriorTransformer
from kandinsky22.pipelines.prior import KandinskyV22PriorPipeline
from kandinsky22.schedulers import UnCLIPScheduler
from kandinsky22.training.drawings import decoder, prior, shared
from kandinsky22.training.drawings.captions import VOCABULARY
from kandinsky22.training.drawings.clip import Clip
from kandinsky22.training.drawings.movq import load_movq
from kandinsky22.training.drawings.sprites import Sprites
from kandinsky22.training.loop import is_finished
from kandinsky22.training.packaging import DecoderUNets, save_decoders, save_history
from kandinsky22.training.towers import build_tokenizer, image_processor

PRIOR_DEFAULTS: Mapping[str, Any] = {"num_inference_steps": 25, "guidance_scale": 2.0}
# Guidance ends where little noise remains: image to image at low strength then preserves its input.
DECODER_DEFAULTS: Mapping[str, Any] = {
    "num_inference_steps": 25,
    "guidance_scale": 2.0,
    "guidance_interval": [0.0, 0.7],
}
STAGE_FOLDERS = (
    "clip",
    "towers",
    "movq/autoencoder",
    "prior",
    "decoder",
    "movq/decoder",
    "shared",
)


def assemble(out: Path, sprites: Sprites, folder: Path | None = None) -> None:
    """Save prior and decoders in half precision. All stages must be finished.

    Args:
        out: Folder of all stages.
        sprites: Pixels of all things.
        folder: Folder to save into; None takes the subfolder "model" of `out`.

    Raises:
        CheckpointError: A stage is not finished.
    """
    folder = out / "model" if folder is None else folder
    required = [out / name for name in STAGE_FOLDERS]
    if missing := [str(path) for path in required if not is_finished(path)]:
        raise CheckpointError(f"stages that are not finished: {', '.join(missing)}")
    clip = Clip.load(out / "towers")
    pipe = KandinskyV22PriorPipeline(
        prior=PriorTransformer.from_pretrained(out / "prior" / "model" / "prior").half(),
        image_encoder=clip.towers.vision.half(),
        text_encoder=clip.towers.text.half(),
        tokenizer=build_tokenizer(folder / "prior" / "tokenizer", VOCABULARY),
        scheduler=UnCLIPScheduler(**prior.SCHEDULER),
        image_processor=image_processor(clip.towers.image_size),
    )
    pipe.generation_defaults = dict(PRIOR_DEFAULTS)
    pipe.save_pretrained(folder / "prior")
    unets = DecoderUNets.of_shared(shared.load_shared(out / "shared", sprites))
    save_decoders(unets, load_movq(out / "movq", sprites), decoder.SCHEDULER, DECODER_DEFAULTS, folder)
    save_history(out, STAGE_FOLDERS, folder)
