"""Training examples that the model draws itself, from a file of prompts: image embeddings and latents, cached."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import kandinsky22
from kandinsky22.checkpoints.fingerprint import weights_digest
from kandinsky22.errors import InputError, invalid
from kandinsky22.schedulers import DDIMScheduler
from kandinsky22.training.finetuning.batches import split_held_out
from kandinsky22.training.finetuning.networks import load_decoder
from kandinsky22.training.finetuning.options import DistillOptions
from kandinsky22.training.finetuning.preparation import Entry
from kandinsky22.training.finetuning.prior_samples import PriorSampling, Sample
from kandinsky22.training.finetuning.stages import DecoderData, Training


def read_prompts(options: DistillOptions) -> list[Sample]:
    """Return the samples that a file of prompts asks for.

    Args:
        options: Options of the training.

    Raises:
        InputError: The file cannot be read as text, or holds no prompt.
    """
    from kandinsky22.inputs.sources import read_file  # imports PIL

    path = Path(options.prompts or "")
    try:
        lines = list(io.StringIO(read_file(str(path)).decode("utf-8"), newline=None))
    except UnicodeDecodeError as error:
        raise InputError(f"--prompts {path} is not text in UTF-8: {error}") from error
    except (OSError, ValueError) as error:
        raise InputError(f"--prompts {path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    prompts = list(dict.fromkeys(line.strip() for line in lines if line.strip()))[: options.max_train_samples]
    if not prompts:
        raise InputError(f"--prompts {path} holds no prompts: expected one per line")
    return [Sample(prompt, number) for prompt in prompts for number in range(options.num_images_per_prompt)]


def guidance_scales(options: DistillOptions, pipe: Any) -> tuple[float, float]:
    """Return the smallest and the largest guidance scale of the teacher.

    Args:
        options: Options of the training.
        pipe: Its pipeline, which has the scale that suits it.
    """
    usual = float(pipe.generation_defaults.get("guidance_scale", 4.0))
    lowest = usual if options.guidance_scale is None else options.guidance_scale
    return lowest, lowest if options.guidance_scale_max is None else options.guidance_scale_max


class Generation(PriorSampling):
    """Draws what is missing in the cache, shared among the processes.

    Args:
        training: The training.
        options: Its options.
    """

    training: Training

    def __init__(self, training: Training, options: DistillOptions) -> None:
        super().__init__(training)
        self.options = options

    def latents(self, samples: Sequence[Sample], mode: str, kind: str) -> DecoderData:
        """Return latents that the decoder draws with DDIM, from embeddings that the prior generates.

        Args:
            samples: The samples.
            mode: Kind of decoder.
            kind: `LORA` or `FULL`.

        Raises:
            InputError: The decoder is not the plain one, or the size does not fit it.
            CheckpointError: Files are missing or damaged, or the cache cannot be written.
        """
        training, options = self.training, self.options
        if mode != "plain":
            advice = "name pictures with --train-data-dir"
            raise invalid("--prompts", options.prompts, f"None for a decoder of the kind {mode}", advice)
        validation = training.prompt_embeddings() if options.validation_prompt else []
        movq = load_decoder(options, mode, torch.float32, movq=True).movq
        side, _ = training.sizes(mode, movq.downscale_factor, kind)
        prior, key = self._prior()
        zero_embed = prior.get_zero_embed().float().cpu()
        decoder = load_decoder(options, mode, training.low_dtype, movq=False)
        guidance = sum(guidance_scales(options, decoder)) / 2
        pipe = kandinsky22.KandinskyV22Pipeline.from_pipe(
            decoder, movq=movq, scheduler=DDIMScheduler.from_config(decoder.scheduler.config)
        ).to(training.device)
        pipe.set_progress_bar_config(disable=True)
        key |= {"unet": weights_digest({"unet": pipe.unet}), "side": side, "guidance": guidance}
        key |= {"kind": "generated decoder", "steps": options.num_ddim_timesteps, "ddim": dict(pipe.scheduler.config)}
        paths = self._paths(samples, key)
        for batch in self._missing(samples, paths, "pictures", options.train_batch_size):
            embeds = self._embeds(prior, batch)
            result: Any = pipe(
                image_embeds=embeds,
                negative_image_embeds=zero_embed,
                height=side,
                width=side,
                num_inference_steps=options.num_ddim_timesteps,
                guidance_scale=guidance,
                generator=[sample.generator(options.seed) for sample in batch],
                output_type="latent",
            )
            for row, sample in enumerate(batch):
                latents = result.images[row : row + 1].float()
                training.cache.write(paths[sample], {"latents": latents, "embeds": embeds[row : row + 1]})
        channels = movq.config.latent_channels
        del pipe, prior, decoder, movq
        training.free()
        training.accelerator.wait_for_everyone()
        entries = [Entry(sample.prompt, paths[sample], (side, side), 1, sample.prompt) for sample in samples]
        own, held_out = split_held_out(entries, options.validation_images, options.seed)
        training.report(f"{len(own)} samples to train on, {len(held_out)} held out, {side}x{side}")
        return DecoderData(own, held_out, zero_embed, side, channels, validation, key["prior"])
