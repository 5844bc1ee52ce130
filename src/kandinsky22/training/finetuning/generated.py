"""Training examples that the model draws itself, from a file of prompts: image embeddings and latents, cached."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import kandinsky22
from kandinsky22.checkpoints.fingerprint import weights_digest
from kandinsky22.errors import InputError, invalid
from kandinsky22.runtime.lazy_component import loaded
from kandinsky22.schedulers import DDIMScheduler
from kandinsky22.training.finetuning.batches import split_held_out
from kandinsky22.training.finetuning.networks import load_decoder, load_prior
from kandinsky22.training.finetuning.options import DistillOptions
from kandinsky22.training.finetuning.preparation import Entry
from kandinsky22.training.finetuning.stages import DecoderData, Training
from kandinsky22.training.finetuning.training_base import COMPONENTS


@dataclass(frozen=True)
class Sample:
    """One sample that the model draws.

    Attributes:
        prompt: Its prompt.
        number: Number of the sample among those of the prompt.
    """

    prompt: str
    number: int

    def generator(self, seed: int) -> torch.Generator:
        """Return a new generator of the sample's noise.

        Args:
            seed: Seed of the training.
        """
        digest = hashlib.sha256(f"{seed} {self.number} {self.prompt}".encode(errors="surrogatepass")).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


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
        lines = read_file(str(path)).decode("utf-8").splitlines()
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


class Generation:
    """Draws what is missing in the cache, shared among the processes.

    Args:
        training: The training.
        options: Its options.
    """

    def __init__(self, training: Training, options: DistillOptions) -> None:
        self.training, self.options = training, options

    def _prior(self) -> tuple[Any, dict[str, Any]]:
        """Return the prior's pipeline, and what its embeddings depend on."""
        pipe = load_prior(self.options, self.training.low_dtype, *COMPONENTS).to(self.training.device)
        pipe.set_progress_bar_config(disable=True)
        names = ("prior", "text_encoder")
        digest = weights_digest({name: loaded(pipe.components[name]) for name in names})
        defaults = {name: repr(value) for name, value in pipe.generation_defaults.items()}
        scheduler = {name: repr(value) for name, value in pipe.scheduler.config.items()}
        key = {"prior": digest, "defaults": defaults, "scheduler": scheduler, "seed": self.options.seed}
        return pipe, {**key, "dtype": str(self.training.low_dtype)}

    def _missing(self, samples: Sequence[Sample], paths: Mapping[Sample, Path], kind: str) -> Iterator[list[Sample]]:
        """Yield this process's batches of samples that are not cached."""
        processes, cache = self.training.accelerator, self.training.cache
        own = list(samples)[processes.process_index :: processes.num_processes]
        missing = [sample for sample in own if cache.read(paths[sample]) is None]
        if missing:
            self.training.report(f"draws {len(missing)} {kind}")
        size = self.options.train_batch_size
        for first in range(0, len(missing), size):
            yield missing[first : first + size]

    def _embeds(self, pipe: Any, samples: Sequence[Sample]) -> Tensor:
        generators = [sample.generator(self.options.seed) for sample in samples]
        prompts = [sample.prompt for sample in samples]
        embeds: Tensor = pipe(prompts, generator=generators, **pipe.generation_defaults).image_embeds
        return embeds.float().cpu()

    def embeddings(self, samples: Sequence[Sample]) -> list[Entry]:
        """Return entries of image embeddings that the prior generates.

        Args:
            samples: The samples.

        Raises:
            CheckpointError: Files are missing or damaged, or the cache cannot be written.
        """
        training = self.training
        pipe, key = self._prior()
        paths = self._paths(samples, {"kind": "generated prior", **key})
        for batch in self._missing(samples, paths, "image embeddings"):
            for sample, embeds in zip(batch, self._embeds(pipe, batch), strict=True):
                training.cache.write(paths[sample], {"embeds": embeds[None]})
        del pipe
        training.free()
        training.accelerator.wait_for_everyone()
        return [Entry(sample.prompt, paths[sample], (0, 0), 1, sample.prompt) for sample in samples]

    def _paths(self, samples: Sequence[Sample], key: Mapping[str, Any]) -> dict[Sample, Path]:
        cache = self.training.cache
        return {sample: cache.path({**key, "prompt": sample.prompt, "number": sample.number}) for sample in samples}

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
        for batch in self._missing(samples, paths, "pictures"):
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
